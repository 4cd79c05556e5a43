//! Bindings: arguments are read as slices and checked, the interpreter is released, and the work is called.

pub mod collate;
pub mod flat;
pub mod gae;
pub mod groups;
mod ids;
pub mod lists;
pub mod moments;
pub mod packing;
pub mod penalty;
pub mod returns;
pub mod sampling;
mod shapes;

use pyo3::prelude::*;

/// An argument that must be an array.
type Array<'a, 'py> = &'a Bound<'py, PyAny>;
