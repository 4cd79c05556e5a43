//! Arguments over a grid of cells, [B, T], or [N] with `cu_seqlens`, as several bindings take them.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Dtype, Reader, shape_text};
use crate::advantages::gae::Masked;
use crate::rows::{Grid, Rows};

/// What is known of the cells, as it was given. Flags are uint8.
#[derive(Default)]
pub struct Given<'a, 'py> {
    pub mask: Option<Array<'a, 'py>>,
    pub terminated: Option<Array<'a, 'py>>,
    pub bootstrap: Option<Array<'a, 'py>>,
    pub cu_seqlens: Option<Array<'a, 'py>>,
}

/// And as it was read.
pub struct Cells<T: Dtype> {
    width: Option<usize>,
    count: usize,
    mask: Option<Reader<u8>>,
    terminated: Option<Reader<u8>>,
    bootstrap: Option<Reader<T>>,
    offsets: Option<Reader<i64>>,
}

impl<T: Dtype> Cells<T> {
    /// For the cells of the argument `like`.
    pub fn read(call: &mut Call, like: Named<'_>, given: &Given<'_, '_>) -> PyResult<Self> {
        let terminated = flags(call, "terminated", given.terminated, like)?;
        let mask = flags(call, "mask", given.mask, like)?;
        let offsets: Option<Reader<i64>> = given
            .cu_seqlens
            .map(|array| call.read("cu_seqlens", array))
            .transpose()?;
        let rows = rows(call, like, offsets.as_ref())?;
        let (count, width) = match rows {
            Rows::Padded { rows, width } => (rows, Some(width)),
            Rows::Packed(_) => (rows.count(), None),
        };
        let bootstrap = given
            .bootstrap
            .map(|array| per_row(call, "bootstrap", array, count))
            .transpose()?;
        Ok(Cells {
            width,
            count,
            mask,
            terminated,
            bootstrap,
            offsets,
        })
    }

    pub fn rows(&self) -> usize {
        self.count
    }

    pub fn grid(&self) -> Grid<'_, T> {
        let rows = match (self.width, &self.offsets) {
            (None, Some(offsets)) => Rows::Packed(offsets.slice()),
            (width, _) => Rows::Padded {
                rows: self.count,
                width: width.unwrap_or(0),
            },
        };
        Grid {
            rows,
            mask: self.mask.as_ref().map(Reader::slice),
            terminated: self.terminated.as_ref().map(Reader::slice),
            bootstrap: self.bootstrap.as_ref().map(Reader::slice),
        }
    }
}

/// Whether the argument that decides is float64; else it is float32, or refused.
pub fn is_wide(call: &Call, name: &str, array: Array<'_, '_>) -> PyResult<bool> {
    let wide =
        PyUntypedBuffer::get(array).is_ok_and(|buffer| buffer.format().to_bytes().ends_with(b"d"));
    if wide {
        call.check::<f64>(name, array)?;
    } else {
        call.check::<f32>(name, array)?;
    }
    Ok(wide)
}

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

/// The rows of an array [B, T], or [N] with `cu_seqlens`.
fn rows<'a>(
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
