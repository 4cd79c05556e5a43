//! `masked_moments` and `standardise`.

use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Dtype, Reader, Source, Writer};
use super::detached::detached;
use super::grid::{flags, is_wide, same_shape};
use crate::advantages::moments::{self, Moments};
use crate::scan::Real;

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
    let call = Call::new(place);
    let found = if is_wide(&call, "x", x)? {
        typed_moments::<f64>(py, call, x, mask, threads)?
    } else {
        typed_moments::<f32>(py, call, x, mask, threads)?
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
    let mask = flags(&mut call, "mask", mask, ("x", x.shape()))?;
    let (x, mask) = (x.slice(), mask.as_ref().map(Reader::slice));
    detached(py, |_| Moments::of(x, mask, threads))
}

/// `out = (x - center) * scale + shift` where uint8 `mask` is not 0, and 0 elsewhere; float32 or float64, rounded
/// once. `out` may be `x`.
#[pyfunction]
#[pyo3(signature = (place, x, out, *, center, scale, shift, mask=None, threads=1))]
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
    threads: usize,
) -> PyResult<()> {
    let (call, line) = (Call::new(place), [center, scale, shift]);
    if is_wide(&call, "x", x)? {
        typed_standardise::<f64>(py, call, [x, out], mask, line, threads)
    } else {
        typed_standardise::<f32>(py, call, [x, out], mask, line, threads)
    }
}

fn typed_standardise<T: Dtype + Real>(
    py: Python<'_>,
    mut call: Call,
    [x, out]: [Array<'_, '_>; 2],
    mask: Option<Array<'_, '_>>,
    line: [f64; 3],
    threads: usize,
) -> PyResult<()> {
    let mut out: Writer<T> = call.write("out", out)?;
    let x: Source<T> = call.read_in_place("x", x, &[&out])?;
    same_shape(&call, ("x", x.shape()), ("out", out.shape()))?;
    let mask = flags(&mut call, "mask", mask, ("x", x.shape()))?;
    let x = match &x {
        Source::Separate(x) => Some(x.slice()),
        Source::Output { .. } => None,
    };
    let (mask, out) = (mask.as_ref().map(Reader::slice), out.slice_mut());
    py.detach(|| moments::standardise(x, mask, line, out, threads));
    Ok(())
}
