//! The CPU side of prefkern. This file exports; `python` holds the bindings with their argument checks; the work is in
//! the other modules, which know nothing of Python.
#![deny(unsafe_code)]

mod buffer;
mod collate;
mod gae;
mod packing;
mod python;
mod returns;
mod rows;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::python::{
        collate::{collate_pairs, pair_lengths},
        gae::gae,
        lists::flatten,
        packing::pack,
        returns::discounted_returns,
    };
}
