//! Recursions over runs of cells, and what they need of a float and of the processor.

mod cells;
mod real;
mod widest;
mod windows;

pub use cells::{Cells, Input};
pub use real::Real;
pub use widest::{Work, widest};
pub use windows::{State, Windows};
