//! `gae`.

use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Dtype, Source, Writer};
use super::detached::detached;
use super::grid::{Cells, Given, is_wide, masked, same_shape};
use crate::advantages::gae::{Gae, Masked};
use crate::failure::Stop;
use crate::scan::{Input, Real};

/// Number, mean and sum of squared deviations of the scored advantages.
type Found = (usize, f64, f64);

struct Options {
    gamma: f64,
    lam: f64,
    masked: Masked,
    exact: bool,
    moments: bool,
    threads: usize,
}

/// Fills `advantages` and `returns`; float32 or float64, [B, T], or [N] with `cu_seqlens`; flags are uint8. `exact`: cell
/// by cell also in float32. `moments`: returns those of the scored advantages.
#[pyfunction]
#[pyo3(signature = (rewards, values, advantages, returns, *, gamma, lam, masked, exact=false, moments=false, terminated=None, mask=None, bootstrap=None, cu_seqlens=None, threads=1))]
#[expect(clippy::too_many_arguments)]
pub fn gae(
    py: Python<'_>,
    rewards: Array<'_, '_>,
    values: Array<'_, '_>,
    advantages: Array<'_, '_>,
    returns: Array<'_, '_>,
    gamma: f64,
    lam: f64,
    masked: &str,
    exact: bool,
    moments: bool,
    terminated: Option<Array<'_, '_>>,
    mask: Option<Array<'_, '_>>,
    bootstrap: Option<Array<'_, '_>>,
    cu_seqlens: Option<Array<'_, '_>>,
    threads: usize,
) -> PyResult<Option<Found>> {
    let call = Call::new("prefkern.data.gae");
    let options = Options {
        gamma,
        lam,
        masked: self::masked(&call, masked)?,
        exact,
        moments,
        threads,
    };
    let given = Given {
        mask,
        terminated,
        bootstrap,
        cu_seqlens,
    };
    let arrays = [rewards, values, advantages, returns];
    if is_wide(&call, "rewards", rewards)? {
        typed::<f64>(py, call, arrays, &given, &options)
    } else {
        typed::<f32>(py, call, arrays, &given, &options)
    }
}

fn typed<T: Dtype + Real>(
    py: Python<'_>,
    mut call: Call,
    [rewards, values, advantages, returns]: [Array<'_, '_>; 4],
    given: &Given<'_, '_>,
    options: &Options,
) -> PyResult<Option<Found>> {
    let mut advantages: Writer<T> = call.write("out[0]", advantages)?;
    let mut returns: Writer<T> = call.write("out[1]", returns)?;
    let outputs = [&advantages, &returns];
    let rewards: Source<T> = call.read_in_place("rewards", rewards, &outputs)?;
    let values: Source<T> = call.read_in_place("values", values, &outputs)?;
    let apart = |source: &Source<T>| matches!(source, Source::Separate(_));
    if options.moments && !(apart(&rewards) && apart(&values)) {
        return Err(call.value_error(
            "out must not be rewards or values with whiten=True: refused numbers would be lost",
        ));
    }
    let like = ("rewards", rewards.shape());
    same_shape(&call, like, ("values", values.shape()))?;
    same_shape(&call, like, ("out[0]", advantages.shape()))?;
    same_shape(&call, like, ("out[1]", returns.shape()))?;
    let cells = Cells::read(&mut call, like, given)?;
    let problem = Gae {
        rewards: input(&rewards),
        values: input(&values),
        grid: cells.grid(),
        gamma: options.gamma,
        lam: options.lam,
        masked: options.masked,
        exact: options.exact,
    };
    let (advantages, returns) = (advantages.slice_mut(), returns.slice_mut());
    let work = |_: Stop<'_>| {
        if !options.moments {
            problem.run(advantages, returns, options.threads);
            return Ok(None);
        }
        let found = problem.run_with_moments(advantages, returns, options.threads)?;
        Ok(Some((found.count, found.mean, found.m2)))
    };
    detached(py, work)
}

fn input<T: Dtype>(source: &Source<T>) -> Input<'_, T> {
    match source {
        Source::Separate(reader) => Input::Separate(reader.slice()),
        Source::Output { output: 0, .. } => Input::Advantages,
        Source::Output { .. } => Input::Returns,
    }
}
