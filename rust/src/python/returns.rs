//! `discounted_returns`.

use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Dtype, Reader, Writer};
use super::grid::{Cells, Given, is_wide, masked, same_shape};
use crate::advantages::gae::Masked;
use crate::advantages::returns::Discounted;
use crate::scan::Real;

/// Fills `returns`; float32 or float64, [B, T], or [N] with `cu_seqlens`; flags are uint8.
#[pyfunction]
#[pyo3(signature = (rewards, returns, *, gamma, masked, terminated=None, mask=None, bootstrap=None, cu_seqlens=None, threads=1))]
#[expect(clippy::too_many_arguments)]
pub fn discounted_returns(
    py: Python<'_>,
    rewards: Array<'_, '_>,
    returns: Array<'_, '_>,
    gamma: f64,
    masked: &str,
    terminated: Option<Array<'_, '_>>,
    mask: Option<Array<'_, '_>>,
    bootstrap: Option<Array<'_, '_>>,
    cu_seqlens: Option<Array<'_, '_>>,
    threads: usize,
) -> PyResult<()> {
    let call = Call::new("prefkern.data.discounted_returns");
    let options = (gamma, self::masked(&call, masked)?, threads);
    let given = Given {
        mask,
        terminated,
        bootstrap,
        cu_seqlens,
    };
    if is_wide(&call, "rewards", rewards)? {
        typed::<f64>(py, call, [rewards, returns], &given, options)
    } else {
        typed::<f32>(py, call, [rewards, returns], &given, options)
    }
}

fn typed<T: Dtype + Real>(
    py: Python<'_>,
    mut call: Call,
    [rewards, returns]: [Array<'_, '_>; 2],
    given: &Given<'_, '_>,
    (gamma, masked, threads): (f64, Masked, usize),
) -> PyResult<()> {
    let mut returns: Writer<T> = call.write("returns", returns)?;
    let rewards: Reader<T> = call.read("rewards", rewards)?;
    let like = ("rewards", rewards.shape());
    same_shape(&call, like, ("returns", returns.shape()))?;
    let cells = Cells::read(&mut call, like, given)?;
    let problem = Discounted {
        rewards: rewards.slice(),
        grid: cells.grid(),
        gamma,
        masked,
    };
    let returns = returns.slice_mut();
    py.detach(|| problem.run(returns, threads));
    Ok(())
}
