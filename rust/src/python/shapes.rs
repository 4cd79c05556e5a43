//! Checks of shapes that several bindings share.

use pyo3::prelude::*;

use super::Array;
use crate::advantages::gae::Masked;
use crate::python::buffer::{Call, Dtype, Reader, shape_text};
use crate::rows::Rows;

/// An argument's name and its shape.
pub type Named<'a> = (&'a str, &'a [usize]);

pub fn same_shape(
    call: &Call,
    (first, expected): Named<'_>,
    (name, got): Named<'_>,
) -> PyResult<()> {
    if got == expected {
        return Ok(());
    }
    let (expected, got) = (shape_text(expected), shape_text(got));
    Err(call.value_error(format!(
        "{first} and {name} must have the same shape, got {expected} and {got}"
    )))
}

/// Flags of the shape of `like`, where they were given.
pub fn flags(
    call: &mut Call,
    name: &str,
    array: Option<Array<'_, '_>>,
    like: Named<'_>,
) -> PyResult<Option<Reader<u8>>> {
    let Some(array) = array else { return Ok(None) };
    let reader = call.read(name, array)?;
    same_shape(call, like, (name, reader.shape()))?;
    Ok(Some(reader))
}

pub fn offsets(call: &mut Call, array: Option<Array<'_, '_>>) -> PyResult<Option<Reader<i64>>> {
    array
        .map(|array| call.read("cu_seqlens", array))
        .transpose()
}

/// The rows of an array [B, T], or [N] with `cu_seqlens`.
pub fn rows<'a>(
    call: &Call,
    (name, shape): Named<'_>,
    offsets: Option<&'a Reader<i64>>,
) -> PyResult<Rows<'a>> {
    match (shape, offsets) {
        (&[total], Some(offsets)) => Rows::packed("cu_seqlens", offsets.slice(), total)
            .map_err(|error| call.value_error(error)),
        (&[rows, width], None) => Ok(Rows::Padded { rows, width }),
        _ => {
            let with = if offsets.is_some() { "with" } else { "without" };
            let shape = shape_text(shape);
            Err(call.value_error(format!(
                "{name} must be [B, T], or packed [N] with cu_seqlens, got shape {shape} {with} cu_seqlens"
            )))
        }
    }
}

pub fn per_row<T: Dtype>(
    call: &mut Call,
    name: &str,
    array: Array<'_, '_>,
    rows: usize,
) -> PyResult<Reader<T>> {
    let reader: Reader<T> = call.read(name, array)?;
    if reader.shape() == [rows] {
        return Ok(reader);
    }
    let shape = shape_text(reader.shape());
    Err(call.value_error(format!(
        "{name} must hold one value for each of the {rows} rows, got shape {shape}"
    )))
}

pub fn masked(call: &Call, masked: &str) -> PyResult<Masked> {
    match masked {
        "skip" => Ok(Masked::Skip),
        "zero" => Ok(Masked::Zero),
        "none" => Ok(Masked::Read),
        _ => Err(call.value_error(format!("masked must be skip, zero or none, got {masked:?}"))),
    }
}
