//! `gae`.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use super::{Array, shapes};
use crate::advantages::gae::{Gae, Input, Masked};
use crate::python::buffer::{Call, Dtype, Reader, Source, Writer};
use crate::scan::{Real, Scan};

/// Number, mean and sum of squared deviations of the scored advantages.
type Found = (usize, f64, f64);

/// What `gae` was called with, before the element type is known.
struct Arguments<'a, 'py> {
    inputs: [Array<'a, 'py>; 2],
    outputs: [Array<'a, 'py>; 2],
    terminated: Option<Array<'a, 'py>>,
    mask: Option<Array<'a, 'py>>,
    bootstrap: Option<Array<'a, 'py>>,
    cu_seqlens: Option<Array<'a, 'py>>,
    gamma: f64,
    lam: f64,
    masked: Masked,
    exact: bool,
    moments: bool,
    threads: usize,
}

/// Fills `advantages` and `returns`; float32 or float64, [B, T], or [N] with `cu_seqlens`; flags are uint8. `exact`:
/// cell by cell in float64, also where float32 could be scanned in vector registers.
/// `moments`: returns those of the scored advantages.
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
    let masked = shapes::masked(&call, masked)?;
    let arguments = Arguments {
        inputs: [rewards, values],
        outputs: [advantages, returns],
        terminated,
        mask,
        bootstrap,
        cu_seqlens,
        gamma,
        lam,
        masked,
        exact,
        moments,
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
) -> PyResult<Option<Found>> {
    let mut advantages: Writer<T> = call.write("out[0]", given.outputs[0])?;
    let mut returns: Writer<T> = call.write("out[1]", given.outputs[1])?;
    let outputs = [&advantages, &returns];
    let rewards: Source<T> = call.read_in_place("rewards", given.inputs[0], &outputs)?;
    let values: Source<T> = call.read_in_place("values", given.inputs[1], &outputs)?;
    let apart = |source: &Source<T>| matches!(source, Source::Separate(_));
    if given.moments && !(apart(&rewards) && apart(&values)) {
        return Err(call.value_error(
            "out must not be rewards or values with whiten=True: refused numbers would be lost",
        ));
    }
    let shape = rewards.shape(&outputs).to_vec();
    let like = ("rewards", &shape[..]);
    shapes::same_shape(&call, like, ("values", values.shape(&outputs)))?;
    shapes::same_shape(&call, like, ("out[0]", advantages.shape()))?;
    shapes::same_shape(&call, like, ("out[1]", returns.shape()))?;
    let terminated = shapes::flags(&mut call, "terminated", given.terminated, like)?;
    let mask = shapes::flags(&mut call, "mask", given.mask, like)?;
    let offsets = shapes::offsets(&mut call, given.cu_seqlens)?;
    let rows = shapes::rows(&call, like, offsets.as_ref())?;
    let bootstrap: Option<Reader<T>> = given
        .bootstrap
        .map(|array| shapes::per_row(&mut call, "bootstrap", array, rows.count()))
        .transpose()?;
    let problem = Gae {
        rewards: input(&rewards),
        values: input(&values),
        terminated: terminated.as_ref().map(Reader::slice),
        mask: mask.as_ref().map(Reader::slice),
        bootstrap: bootstrap.as_ref().map(Reader::slice),
        rows,
        gamma: given.gamma,
        lam: given.lam,
        masked: given.masked,
        scan: if given.exact {
            None
        } else {
            Scan::new(given.gamma, given.gamma * given.lam)
        },
    };
    let (advantages, returns) = (advantages.slice_mut(), returns.slice_mut());
    py.detach(|| {
        if !given.moments {
            problem.run(advantages, returns, given.threads);
            return Ok(None);
        }
        let found = problem.run_with_moments(advantages, returns, given.threads);
        Ok(Some((found.count, found.mean, found.m2)))
    })
}

fn input<T: Dtype>(source: &Source<T>) -> Input<'_, T> {
    match source {
        Source::Separate(reader) => Input::Separate(reader.slice()),
        Source::Output(0) => Input::Advantages,
        Source::Output(_) => Input::Returns,
    }
}
