//! `gae`.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use super::Array;
use crate::buffer::{Call, Dtype, Reader, Source, Writer, shape_text};
use crate::gae::{Gae, Input, Masked, Real};
use crate::rows::Rows;

/// What `gae` was called with, before the element type is known.
struct Arguments<'a, 'py> {
    inputs: [Array<'a, 'py>; 2],
    outputs: [Array<'a, 'py>; 2],
    flags: [(&'static str, Option<Array<'a, 'py>>); 2],
    bootstrap: Option<Array<'a, 'py>>,
    cu_seqlens: Option<Array<'a, 'py>>,
    gamma: f64,
    lam: f64,
    masked: Masked,
    threads: usize,
}

/// Fills `advantages` and `returns`; float32 or float64, [B, T], or [N] with `cu_seqlens`; flags are uint8.
#[pyfunction]
#[pyo3(signature = (rewards, values, advantages, returns, *, gamma, lam, masked, terminated=None, mask=None, bootstrap=None, cu_seqlens=None, threads=1))]
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
    terminated: Option<Array<'_, '_>>,
    mask: Option<Array<'_, '_>>,
    bootstrap: Option<Array<'_, '_>>,
    cu_seqlens: Option<Array<'_, '_>>,
    threads: usize,
) -> PyResult<()> {
    let call = Call::new("prefkern.data.gae");
    let masked = match masked {
        "skip" => Masked::Skip,
        "zero" => Masked::Zero,
        "none" => Masked::Read,
        _ => {
            return Err(
                call.value_error(format!("masked must be skip, zero or none, got {masked:?}"))
            );
        }
    };
    let arguments = Arguments {
        inputs: [rewards, values],
        outputs: [advantages, returns],
        flags: [("terminated", terminated), ("mask", mask)],
        bootstrap,
        cu_seqlens,
        gamma,
        lam,
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
    let mut advantages: Writer<T> = call.write("out[0]", given.outputs[0])?;
    let mut returns: Writer<T> = call.write("out[1]", given.outputs[1])?;
    let outputs = [&advantages, &returns];
    let rewards: Source<T> = call.read_in_place("rewards", given.inputs[0], &outputs)?;
    let values: Source<T> = call.read_in_place("values", given.inputs[1], &outputs)?;
    let shape = rewards.shape(&outputs).to_vec();
    same_shape(&call, &shape, "values", values.shape(&outputs))?;
    same_shape(&call, &shape, "out[0]", advantages.shape())?;
    same_shape(&call, &shape, "out[1]", returns.shape())?;
    let mut flags: [Option<Reader<u8>>; 2] = [None, None];
    for (flag, (name, array)) in flags.iter_mut().zip(given.flags) {
        if let Some(array) = array {
            let reader = call.read(name, array)?;
            same_shape(&call, &shape, name, reader.shape())?;
            *flag = Some(reader);
        }
    }
    let offsets: Option<Reader<i64>> = given
        .cu_seqlens
        .map(|array| call.read("cu_seqlens", array))
        .transpose()?;
    let rows = match (&shape[..], &offsets) {
        ([total], Some(offsets)) => Rows::packed("cu_seqlens", offsets.slice(), *total)
            .map_err(|error| call.value_error(error))?,
        ([rows, width], None) => Rows::Padded {
            rows: *rows,
            width: *width,
        },
        _ => {
            let (shape, with) = (
                shape_text(&shape),
                if offsets.is_some() { "with" } else { "without" },
            );
            return Err(call.value_error(format!(
                "rewards must be [B, T], or packed [N] with cu_seqlens, got shape {shape} {with} cu_seqlens"
            )));
        }
    };
    let bootstrap: Option<Reader<T>> = given
        .bootstrap
        .map(|array| call.read("bootstrap", array))
        .transpose()?;
    if let Some(bootstrap) = &bootstrap
        && bootstrap.shape() != [rows.len()]
    {
        return Err(call.value_error(format!(
            "bootstrap must hold one value for each of the {} rows, got shape {}",
            rows.len(),
            shape_text(bootstrap.shape())
        )));
    }
    let problem = Gae {
        rewards: input(&rewards),
        values: input(&values),
        terminated: flags[0].as_ref().map(Reader::slice),
        mask: flags[1].as_ref().map(Reader::slice),
        bootstrap: bootstrap.as_ref().map(Reader::slice),
        rows,
        gamma: given.gamma,
        lam: given.lam,
        masked: given.masked,
    };
    let (advantages, returns) = (advantages.slice_mut(), returns.slice_mut());
    py.detach(|| problem.run(advantages, returns, given.threads));
    Ok(())
}

fn same_shape(call: &Call, expected: &[usize], name: &str, got: &[usize]) -> PyResult<()> {
    if got == expected {
        return Ok(());
    }
    let (expected, got) = (shape_text(expected), shape_text(got));
    Err(call.value_error(format!(
        "rewards and {name} must have the same shape, got {expected} and {got}"
    )))
}

fn input<T: Dtype>(source: &Source<T>) -> Input<'_, T> {
    match source {
        Source::Separate(reader) => Input::Separate(reader.slice()),
        Source::Output(0) => Input::Advantages,
        Source::Output(_) => Input::Returns,
    }
}
