//! Work without the interpreter.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;

use crate::failure::{Failure, Stop};

/// Between two looks for signals: taking the interpreter may mean to wait for another thread.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// Releases the interpreter for `work`, which may ask whether a signal's handler has raised an exception, as that of Ctrl-C
/// does, and ends with that exception.
pub fn detached<R: Send>(
    py: Python<'_>,
    work: impl FnOnce(Stop<'_>) -> Result<R, Failure> + Send,
) -> PyResult<R> {
    py.detach(|| {
        let (looked, raised) = (Cell::new(Instant::now()), RefCell::new(None));
        let stop = || {
            if looked.get().elapsed() >= BETWEEN_LOOKS {
                *raised.borrow_mut() = Python::attach(|py| py.check_signals()).err();
                looked.set(Instant::now());
            }
            raised.borrow().is_some()
        };
        let result = work(&stop);
        result.map_err(|failure| match (failure, raised.take()) {
            (Failure::Interrupted, Some(raised)) => raised,
            _ => {
                PyMemoryError::new_err("there is no memory for what this takes besides its arrays")
            }
        })
    })
}
