//! `sequence_lengths`, `fill_sequences` and `place_rows`.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Dtype, Reader, Writer, shape_text};
use super::ids::Column;
use crate::batches::collate::{Batch, Keep, Layout, Options, Sequences, Slots};
use crate::batches::ids::Ids;
use crate::batches::place_rows as placing;
use crate::rows::Rows;

/// The int64 offsets of the columns.
fn read_offsets(
    call: &mut Call,
    names: &[String],
    arrays: &[Bound<'_, PyAny>],
) -> PyResult<Vec<Reader<i64>>> {
    let named = names.iter().zip(arrays);
    named
        .map(|(name, array)| call.read(&format!("{name} offsets"), array))
        .collect()
}

fn sequences<'a>(
    call: &Call,
    names: &'a [String],
    offsets: &'a [Reader<i64>],
    (max_length, keep_end, interleaved, shifted): (Option<usize>, bool, bool, bool),
) -> PyResult<Sequences<'a>> {
    let options = Options {
        max_length,
        keep: if keep_end { Keep::End } else { Keep::Start },
        layout: if interleaved {
            Layout::Interleaved
        } else {
            Layout::Concatenated
        },
        shifted,
    };
    let offsets = offsets.iter().map(Reader::slice).collect();
    Sequences::new(names, offsets, options).map_err(|error| call.value_error(error))
}

/// The kept length of each sequence, into int64 `lengths`; refuses completions that the cut empties. The first column is
/// the prompt, the others are completions. Errors are on behalf of `place`.
#[pyfunction]
#[pyo3(signature = (place, names, offsets, lengths, *, max_length, keep_end, interleaved, shifted))]
#[expect(clippy::too_many_arguments)]
pub fn sequence_lengths(
    place: &str,
    names: Vec<String>,
    offsets: Vec<Bound<'_, PyAny>>,
    lengths: Array<'_, '_>,
    max_length: Option<usize>,
    keep_end: bool,
    interleaved: bool,
    shifted: bool,
) -> PyResult<()> {
    let mut call = Call::new(place);
    let offsets = read_offsets(&mut call, &names, &offsets)?;
    let mut lengths: Writer<i64> = call.write("lengths", lengths)?;
    let options = (max_length, keep_end, interleaved, shifted);
    let sequences = sequences(&call, &names, &offsets, options)?;
    let lengths = lengths.slice_mut();
    if lengths.len() != sequences.count() {
        let (expected, got) = (sequences.count(), lengths.len());
        return Err(call.value_error(format!("lengths must hold {expected} elements, got {got}")));
    }
    sequences
        .lengths(lengths)
        .map_err(|error| call.value_error(error))
}

/// Writes the sequences into int64 arrays of one shape: [S, L], with completions that all begin at column `pivot` where it
/// is given; or [N] with `cu_seqlens` [S + 1].
#[pyfunction]
#[pyo3(signature = (place, names, ids, offsets, input_ids, completion_mask, attention_mask, position_ids, *, pad_token_id, max_length, keep_end, interleaved, shifted, cu_seqlens=None, pivot=None, threads=1))]
#[expect(clippy::too_many_arguments)]
pub fn fill_sequences(
    py: Python<'_>,
    place: &str,
    names: Vec<String>,
    ids: Vec<Bound<'_, PyAny>>,
    offsets: Vec<Bound<'_, PyAny>>,
    input_ids: Array<'_, '_>,
    completion_mask: Array<'_, '_>,
    attention_mask: Option<Array<'_, '_>>,
    position_ids: Option<Array<'_, '_>>,
    pad_token_id: i64,
    max_length: Option<usize>,
    keep_end: bool,
    interleaved: bool,
    shifted: bool,
    cu_seqlens: Option<Array<'_, '_>>,
    pivot: Option<usize>,
    threads: usize,
) -> PyResult<()> {
    let mut call = Call::new(place);
    let offsets = read_offsets(&mut call, &names, &offsets)?;
    let columns: Vec<Column> = names
        .iter()
        .zip(&ids)
        .map(|(name, array)| Column::read(&mut call, name, array))
        .collect::<PyResult<_>>()?;
    let options = (max_length, keep_end, interleaved, shifted);
    let sequences = sequences(&call, &names, &offsets, options)?;
    let cu_seqlens: Option<Reader<i64>> = cu_seqlens
        .map(|array| call.read("cu_seqlens", array))
        .transpose()?;
    let mut write = |name, array: Option<Array<'_, '_>>| -> PyResult<Option<Writer<i64>>> {
        array.map(|array| call.write(name, array)).transpose()
    };
    let mut outputs = [
        write("input_ids", Some(input_ids))?,
        write("completion_mask", Some(completion_mask))?,
        write("attention_mask", attention_mask)?,
        write("position_ids", position_ids)?,
    ];
    let shapes: Vec<&[usize]> = outputs.iter().flatten().map(Writer::shape).collect();
    let rows = match (shapes[0], &cu_seqlens) {
        (&[total], Some(offsets)) => Rows::packed("cu_seqlens", offsets.slice(), total)
            .map_err(|error| call.value_error(error))?,
        (&[rows, width], None) => Rows::Padded { rows, width },
        (shape, _) => {
            let shape = shape_text(shape);
            return Err(call.value_error(format!(
                "input_ids must be [S, L], or [N] with cu_seqlens, got {shape}"
            )));
        }
    };
    if shapes.iter().any(|shape| *shape != shapes[0]) || rows.count() != sequences.count() {
        let shapes: Vec<String> = shapes.iter().map(|shape| shape_text(shape)).collect();
        return Err(call.value_error(format!(
            "the outputs must have one shape with {} rows, got {}",
            sequences.count(),
            shapes.join(", ")
        )));
    }
    let [input_ids, completion_mask, attention_mask, position_ids] =
        outputs.each_mut().map(|output| output.as_mut());
    let (Some(input_ids), Some(completion_mask)) = (input_ids, completion_mask) else {
        return Ok(()); // both were given
    };
    let batch = Batch {
        input_ids: input_ids.slice_mut(),
        completion_mask: completion_mask.slice_mut(),
        attention_mask: attention_mask.map(Writer::slice_mut),
        position_ids: position_ids.map(Writer::slice_mut),
    };
    let ids: Vec<Ids<'_>> = columns.iter().map(Column::ids).collect();
    let slots = Slots { rows, pivot };
    py.detach(|| sequences.fill(&ids, slots, pad_token_id, batch, threads))
        .map_err(|error| call.value_error(error))
}

/// Copies the rows of ragged `values` into `out` [B, T] of the same dtype (int64, float32 or float64), row i from column
/// `starts[i]` on, and `blank` elsewhere. Errors are on behalf of `place`.
#[pyfunction]
#[pyo3(signature = (place, values, offsets, starts, out, *, blank, threads=1))]
#[expect(clippy::too_many_arguments)]
pub fn place_rows(
    py: Python<'_>,
    place: &str,
    values: Array<'_, '_>,
    offsets: Array<'_, '_>,
    starts: Array<'_, '_>,
    out: Array<'_, '_>,
    blank: i32,
    threads: usize,
) -> PyResult<()> {
    let call = Call::new(place);
    let arrays = [values, offsets, starts, out];
    let format = PyUntypedBuffer::get(values)
        .map(|buffer| buffer.format().to_string_lossy().into_owned())
        .unwrap_or_default();
    match format.as_str() {
        "f" => placed::<f32>(py, call, arrays, blank as f32, threads),
        "d" => placed::<f64>(py, call, arrays, f64::from(blank), threads),
        _ => placed::<i64>(py, call, arrays, i64::from(blank), threads),
    }
}

fn placed<T: Dtype>(
    py: Python<'_>,
    mut call: Call,
    [values, offsets, starts, out]: [Array<'_, '_>; 4],
    blank: T,
    threads: usize,
) -> PyResult<()> {
    let values: Reader<T> = call.read("values", values)?;
    let offsets: Reader<i64> = call.read("offsets", offsets)?;
    let starts: Reader<i64> = call.read("starts", starts)?;
    let mut out: Writer<T> = call.write("out", out)?;
    let &[_, width] = out.shape() else {
        let shape = shape_text(out.shape());
        return Err(call.value_error(format!("out must be [B, T], got {shape}")));
    };
    let (values, offsets, starts) = (values.slice(), offsets.slice(), starts.slice());
    let out = out.slice_mut();
    py.detach(|| placing::place_rows(values, offsets, starts, (width, blank), out, threads))
        .map_err(|error| call.value_error(error))
}
