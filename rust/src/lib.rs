//! The CPU side of prefkern: bindings only; the work is in the modules.
#![deny(unsafe_code)]

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _core {}
