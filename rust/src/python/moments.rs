//! `masked_moments` and `standardise`.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use super::{Array, shapes};
use crate::advantages::moments::{self, Moments};
use crate::python::buffer::{Call, Dtype, Reader, Source, Writer};
use crate::scan::Real;

fn is_wide(x: Array<'_, '_>) -> bool {
    PyUntypedBuffer::get(x).is_ok_and(|buffer| buffer.item_size() == 8)
}

/// Count, mean and sum of squared deviations of float32 or float64 `x` where uint8 `mask` is not 0.
#[pyfunction]
#[pyo3(signature = (place, x, *, mask=None, threads=1))]
pub fn masked_moments(
    py: Python<'_>,
    place: &str,
    x: Array<'_, '_>,
    mask: Option<Array<'_, '_>>,
    threads: usize,
) -> PyResult<(usize, f64, f64)> {
    let found = if is_wide(x) {
        typed_moments::<f64>(py, Call::new(place), x, mask, threads)?
    } else {
        typed_moments::<f32>(py, Call::new(place), x, mask, threads)?
    };
    Ok((found.count, found.mean, found.m2))
}

fn typed_moments<T: Dtype + Real>(
    py: Python<'_>,
    mut call: Call,
    x: Array<'_, '_>,
    mask: Option<Array<'_, '_>>,
    threads: usize,
) -> PyResult<Moments> {
    let x: Reader<T> = call.read("x", x)?;
    let mask = shapes::flags(&mut call, "mask", mask, ("x", x.shape()))?;
    let (x, mask) = (x.slice(), mask.as_ref().map(Reader::slice));
    Ok(py.detach(|| Moments::of(x, mask, threads)))
}

/// `out = (x - center) * scale + shift` where uint8 `mask` is not 0, and 0 elsewhere; float32 or float64. `out` may be
/// `x`, where that is 0 wherever `mask` is.
#[pyfunction]
#[pyo3(signature = (place, x, out, *, center, scale, shift, mask=None, exact=true, threads=1))]
#[expect(clippy::too_many_arguments)]
pub fn standardise(
    py: Python<'_>,
    place: &str,
    x: Array<'_, '_>,
    out: Array<'_, '_>,
    center: f64,
    scale: f64,
    shift: f64,
    mask: Option<Array<'_, '_>>,
    exact: bool,
    threads: usize,
) -> PyResult<()> {
    let (call, line) = (Call::new(place), [center, scale, shift]);
    if is_wide(x) {
        typed_standardise::<f64>(py, call, [x, out], mask, (line, exact), threads)
    } else {
        typed_standardise::<f32>(py, call, [x, out], mask, (line, exact), threads)
    }
}

fn typed_standardise<T: Dtype + Real>(
    py: Python<'_>,
    mut call: Call,
    [x, out]: [Array<'_, '_>; 2],
    mask: Option<Array<'_, '_>>,
    (line, exact): ([f64; 3], bool),
    threads: usize,
) -> PyResult<()> {
    let mut out: Writer<T> = call.write("out", out)?;
    let x: Source<T> = call.read_in_place("x", x, &[&out])?;
    shapes::same_shape(&call, ("x", x.shape(&[&out])), ("out", out.shape()))?;
    let mask = shapes::flags(&mut call, "mask", mask, ("x", x.shape(&[&out])))?;
    let x = match &x {
        Source::Separate(x) => Some(x.slice()),
        Source::Output(_) => None,
    };
    let (mask, out) = (mask.as_ref().map(Reader::slice), out.slice_mut());
    py.detach(|| moments::standardise(x, mask, line, exact, out, threads));
    Ok(())
}
