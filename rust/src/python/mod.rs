//! Bindings: arguments are read as slices and checked, the interpreter is released, and the work is called.

mod buffer;
pub mod collate;
mod detached;
mod exact_lists;
pub mod gae;
mod grid;
pub mod groups;
mod ids;
pub mod lists;
pub mod moments;
pub mod packing;
pub mod padding_free;
pub mod returns;
pub mod sampling;
pub mod token_rewards;

use pyo3::prelude::*;

/// An argument that must be an array.
type Array<'a, 'py> = &'a Bound<'py, PyAny>;
