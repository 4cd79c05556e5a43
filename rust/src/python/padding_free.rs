//! `kept_lengths` and `flatten_tokens`.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Reader, Writer, shape_text};
use super::ids::Column;
use crate::batches::padding_free::{self, Flat, Mask, Tokens};

const PLACE: &str = "prefkern.data.flatten";

/// uint8 or int64 flags.
enum Flags {
    U8(Reader<u8>),
    I64(Reader<i64>),
}

impl Flags {
    fn read(call: &mut Call, array: Array<'_, '_>) -> PyResult<Self> {
        if PyUntypedBuffer::get(array).is_ok_and(|buffer| buffer.item_size() == 1) {
            Ok(Flags::U8(call.read("mask", array)?))
        } else {
            Ok(Flags::I64(call.read("mask", array)?))
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Flags::U8(reader) => reader.shape(),
            Flags::I64(reader) => reader.shape(),
        }
    }

    fn mask(&self) -> Mask<'_> {
        match self {
            Flags::U8(reader) => Mask::U8(reader.slice()),
            Flags::I64(reader) => Mask::I64(reader.slice()),
        }
    }
}

/// The number of kept tokens of each row of `mask` [B, T], uint8 or int64, into int64 `counts` [B].
#[pyfunction]
pub fn kept_lengths(mask: Array<'_, '_>, counts: Array<'_, '_>) -> PyResult<()> {
    let mut call = Call::new(PLACE);
    let mask = Flags::read(&mut call, mask)?;
    let mut counts: Writer<i64> = call.write("counts", counts)?;
    let (&[rows, width], &[expected]) = (mask.shape(), counts.shape()) else {
        let shape = shape_text(mask.shape());
        return Err(call.value_error(format!("mask must be [B, T], got {shape}")));
    };
    if rows != expected {
        return Err(call.value_error("counts must hold one element for each row of mask"));
    }
    padding_free::count(mask.mask(), width, counts.slice_mut()).map_err(|(row, position, got)| {
        call.value_error(format!(
            "mask must hold only 0 and 1 (or be bool), got {got} at [{row}, {position}]"
        ))
    })
}

/// Writes the kept tokens of int32 or int64 `ids`, [B, T] with `mask`, or [N] without, with their positions and their
/// cells in a batch [B, T] (without a mask: as wide as the longest row), into int64 arrays [N]. `bounds` [B + 1] are those
/// of the kept tokens. `name` is that of the ids. Returns the most tokens of a row.
#[pyfunction]
#[pyo3(signature = (name, ids, mask, bounds, flat_ids, positions, indices, *, threads=1))]
#[expect(clippy::too_many_arguments)]
pub fn flatten_tokens(
    py: Python<'_>,
    name: &str,
    ids: Array<'_, '_>,
    mask: Option<Array<'_, '_>>,
    bounds: Array<'_, '_>,
    flat_ids: Array<'_, '_>,
    positions: Array<'_, '_>,
    indices: Array<'_, '_>,
    threads: usize,
) -> PyResult<usize> {
    let mut call = Call::new(PLACE);
    let ids = Column::read(&mut call, "input_ids", ids)?;
    let mask = mask.map(|mask| Flags::read(&mut call, mask)).transpose()?;
    let bounds: Reader<i64> = call.read("bounds", bounds)?;
    let mut outputs: [Writer<i64>; 3] = [
        call.write("flat_ids", flat_ids)?,
        call.write("positions", positions)?,
        call.write("indices", indices)?,
    ];
    let kept = outputs[0].shape();
    if outputs.iter().any(|output| output.shape() != kept) {
        return Err(call.value_error("the outputs must have one shape"));
    }
    let bounds = bounds.slice();
    let lengths = bounds.windows(2).map(|pair| pair[1].wrapping_sub(pair[0]));
    let longest = lengths.clone().max().unwrap_or_default() as usize;
    let (tokens, width) = match (&mask, ids.shape()) {
        (None, shape) if shape == kept => (Tokens::Ragged(ids.ids()), longest),
        (Some(mask), shape @ &[rows, width])
            if mask.shape() == shape && bounds.len() == rows + 1 =>
        {
            let mut counts = vec![0; rows];
            if padding_free::count(mask.mask(), width, &mut counts).is_err() || !lengths.eq(counts)
            {
                return Err(call.value_error("bounds must be those of the mask"));
            }
            (Tokens::Padded(ids.ids(), mask.mask()), width)
        }
        (_, shape) => {
            let (ids, kept) = (shape_text(shape), shape_text(kept));
            return Err(call.value_error(format!(
                "input_ids must be [B, T] with a mask of its shape, or [N], got {ids} for {kept} outputs"
            )));
        }
    };
    let [ids, positions, indices] = outputs.each_mut().map(Writer::slice_mut);
    let out = Flat {
        ids: &mut *ids,
        positions,
        indices: &mut *indices,
    };
    let negative = py
        .detach(|| padding_free::flatten(tokens, width, bounds, out, threads))
        .map_err(|error| call.value_error(error))?;
    match negative
        .then(|| padding_free::negative(ids, bounds))
        .flatten()
    {
        None => Ok(longest),
        Some((row, at)) => Err(call.value_error(format!(
            "{name}[{row}][{}] must be a token id, got the negative number {}",
            indices[at] as usize - row * width,
            ids[at]
        ))),
    }
}
