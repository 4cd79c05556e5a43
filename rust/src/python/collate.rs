//! `pair_lengths` and `collate_pairs`.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use super::Array;
use crate::buffer::{Call, Reader, Writer, shape_text};
use crate::collate::{Batch, Ids, Keep, Layout, Pairs, Tokens};
use crate::rows::Rows;

const PLACE: &str = "prefkern.data.collate_pairs";

/// The int64 offsets of the prompt, chosen and rejected columns.
struct Offsets([Reader<i64>; 3]);

impl Offsets {
    fn read(call: &mut Call, [prompt, chosen, rejected]: &[Bound<'_, PyAny>; 3]) -> PyResult<Self> {
        Ok(Offsets([
            call.read("prompt_ids offsets", prompt)?,
            call.read("chosen_ids offsets", chosen)?,
            call.read("rejected_ids offsets", rejected)?,
        ]))
    }

    fn pairs(
        &self,
        call: &Call,
        max_length: Option<usize>,
        keep_end: bool,
        interleaved: bool,
    ) -> PyResult<Pairs<'_>> {
        let keep = if keep_end { Keep::End } else { Keep::Start };
        let layout = if interleaved {
            Layout::Interleaved
        } else {
            Layout::Concatenated
        };
        let offsets = self.0.each_ref().map(Reader::slice);
        Pairs::new(offsets, max_length, keep, layout).map_err(|error| call.value_error(error))
    }
}

/// The kept length of each of the 2 B sequences, into int64 `lengths` [2 B]; refuses completions that the cut empties.
#[pyfunction]
#[pyo3(signature = (offsets, lengths, *, max_length, keep_end, interleaved))]
pub fn pair_lengths(
    offsets: [Bound<'_, PyAny>; 3],
    lengths: Array<'_, '_>,
    max_length: Option<usize>,
    keep_end: bool,
    interleaved: bool,
) -> PyResult<()> {
    let mut call = Call::new(PLACE);
    let offsets = Offsets::read(&mut call, &offsets)?;
    let mut lengths: Writer<i64> = call.write("lengths", lengths)?;
    let pairs = offsets.pairs(&call, max_length, keep_end, interleaved)?;
    let lengths = lengths.slice_mut();
    if lengths.len() != pairs.len() {
        let (expected, got) = (pairs.len(), lengths.len());
        return Err(call.value_error(format!("lengths must hold {expected} elements, got {got}")));
    }
    pairs
        .lengths(lengths)
        .map_err(|error| call.value_error(error))
}

/// An int32 or int64 column of token ids.
enum Column {
    I32(Reader<i32>),
    I64(Reader<i64>),
}

impl Column {
    fn read(call: &mut Call, name: &str, array: Array<'_, '_>) -> PyResult<Self> {
        if PyUntypedBuffer::get(array).is_ok_and(|buffer| buffer.item_size() == 4) {
            Ok(Column::I32(call.read(name, array)?))
        } else {
            Ok(Column::I64(call.read(name, array)?))
        }
    }

    fn ids(&self) -> Ids<'_> {
        match self {
            Column::I32(reader) => Ids::I32(reader.slice()),
            Column::I64(reader) => Ids::I64(reader.slice()),
        }
    }
}

/// Writes the sequences into int64 arrays of one shape: [2 B, L], or [N] with `cu_seqlens` [2 B + 1]. `tokens` becomes
/// the attention mask of the former, the positions of the latter.
#[pyfunction]
#[pyo3(signature = (ids, offsets, input_ids, completion_mask, tokens, *, pad_token_id, max_length, keep_end, interleaved, cu_seqlens=None, threads=1))]
#[expect(clippy::too_many_arguments)]
pub fn collate_pairs(
    py: Python<'_>,
    ids: [Bound<'_, PyAny>; 3],
    offsets: [Bound<'_, PyAny>; 3],
    input_ids: Array<'_, '_>,
    completion_mask: Array<'_, '_>,
    tokens: Array<'_, '_>,
    pad_token_id: i64,
    max_length: Option<usize>,
    keep_end: bool,
    interleaved: bool,
    cu_seqlens: Option<Array<'_, '_>>,
    threads: usize,
) -> PyResult<()> {
    let mut call = Call::new(PLACE);
    let offsets = Offsets::read(&mut call, &offsets)?;
    let pairs = offsets.pairs(&call, max_length, keep_end, interleaved)?;
    let [prompt, chosen, rejected] = &ids;
    let columns = [
        Column::read(&mut call, "prompt_ids", prompt)?,
        Column::read(&mut call, "chosen_ids", chosen)?,
        Column::read(&mut call, "rejected_ids", rejected)?,
    ];
    let cu_seqlens: Option<Reader<i64>> = cu_seqlens
        .map(|array| call.read("cu_seqlens", array))
        .transpose()?;
    let mut input_ids: Writer<i64> = call.write("input_ids", input_ids)?;
    let mut completion_mask: Writer<i64> = call.write("completion_mask", completion_mask)?;
    let mut tokens: Writer<i64> = call.write("tokens", tokens)?;
    let slots = match (input_ids.shape(), &cu_seqlens) {
        (&[total], Some(offsets)) => Rows::packed("cu_seqlens", offsets.slice(), total)
            .map_err(|error| call.value_error(error))?,
        (&[rows, width], None) => Rows::Padded { rows, width },
        (shape, _) => {
            let shape = shape_text(shape);
            return Err(call.value_error(format!(
                "input_ids must be [2 B, L], or [N] with cu_seqlens, got {shape}"
            )));
        }
    };
    let same = completion_mask.shape() == input_ids.shape() && tokens.shape() == input_ids.shape();
    if !same || slots.len() != pairs.len() {
        return Err(call.value_error(format!(
            "the outputs must have one shape with {} rows, got {}, {} and {}",
            pairs.len(),
            shape_text(input_ids.shape()),
            shape_text(completion_mask.shape()),
            shape_text(tokens.shape())
        )));
    }
    let tokens = tokens.slice_mut();
    let batch = Batch {
        input_ids: input_ids.slice_mut(),
        completion_mask: completion_mask.slice_mut(),
        tokens: if cu_seqlens.is_some() {
            Tokens::Positions(tokens)
        } else {
            Tokens::Mask(tokens)
        },
    };
    let ids = columns.each_ref().map(Column::ids);
    py.detach(|| pairs.fill(ids, slots, pad_token_id, batch, threads))
        .map_err(|error| call.value_error(error))
}
