//! `discounted_returns`.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use super::{Array, shapes};
use crate::advantages::gae::Masked;
use crate::advantages::returns::Discounted;
use crate::python::buffer::{Call, Dtype, Reader, Writer};
use crate::scan::Real;

/// What `discounted_returns` was called with, before the element type is known.
struct Arguments<'a, 'py> {
    rewards: Array<'a, 'py>,
    returns: Array<'a, 'py>,
    terminated: Option<Array<'a, 'py>>,
    mask: Option<Array<'a, 'py>>,
    bootstrap: Option<Array<'a, 'py>>,
    cu_seqlens: Option<Array<'a, 'py>>,
    gamma: f64,
    masked: Masked,
    threads: usize,
}

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
    let masked = shapes::masked(&call, masked)?;
    let arguments = Arguments {
        rewards,
        returns,
        terminated,
        mask,
        bootstrap,
        cu_seqlens,
        gamma,
        masked,
        threads,
    };
    if PyUntypedBuffer::get(rewards).is_ok_and(|buffer| buffer.item_size() == 8) {
        typed::<f64>(py, call, arguments)
    } else {
        typed::<f32>(py, call, arguments)
    }
}

fn typed<T: Dtype + Real>(
    py: Python<'_>,
    mut call: Call,
    given: Arguments<'_, '_>,
) -> PyResult<()> {
    let mut returns: Writer<T> = call.write("returns", given.returns)?;
    let rewards: Reader<T> = call.read("rewards", given.rewards)?;
    let like = ("rewards", rewards.shape());
    shapes::same_shape(&call, like, ("returns", returns.shape()))?;
    let terminated = shapes::flags(&mut call, "terminated", given.terminated, like)?;
    let mask = shapes::flags(&mut call, "mask", given.mask, like)?;
    let offsets = shapes::offsets(&mut call, given.cu_seqlens)?;
    let rows = shapes::rows(&call, like, offsets.as_ref())?;
    let bootstrap: Option<Reader<T>> = given
        .bootstrap
        .map(|array| shapes::per_row(&mut call, "bootstrap", array, rows.count()))
        .transpose()?;
    let problem = Discounted {
        rewards: rewards.slice(),
        terminated: terminated.as_ref().map(Reader::slice),
        mask: mask.as_ref().map(Reader::slice),
        bootstrap: bootstrap.as_ref().map(Reader::slice),
        rows,
        gamma: given.gamma,
        masked: given.masked,
    };
    let returns = returns.slice_mut();
    py.detach(|| problem.run(returns, given.threads));
    Ok(())
}
