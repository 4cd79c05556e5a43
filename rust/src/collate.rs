//! Preference pairs from ragged columns to one batch: each sequence is a prompt and one of its two completions, cut to
//! `max_length` from one end.

use std::ops::Range;
use std::sync::Mutex;

use crate::rows::{Rows, check_offsets, name_rows, share, worthwhile_threads};

/// Token ids of a column, as they are stored.
#[derive(Clone, Copy)]
pub enum Ids<'a> {
    I32(&'a [i32]),
    I64(&'a [i64]),
}

impl Ids<'_> {
    fn len(&self) -> usize {
        match self {
            Ids::I32(ids) => ids.len(),
            Ids::I64(ids) => ids.len(),
        }
    }

    fn copy(&self, range: Range<usize>, out: &mut [i64]) {
        match self {
            Ids::I32(ids) => {
                for (to, &from) in out.iter_mut().zip(&ids[range]) {
                    *to = i64::from(from);
                }
            }
            Ids::I64(ids) => out.copy_from_slice(&ids[range]),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    Start,
    End,
}

/// The order of the 2 B sequences: all chosen ones and then all rejected ones, or each pair together.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Concatenated,
    Interleaved,
}

const NAMES: [&str; 3] = ["prompt_ids", "chosen_ids", "rejected_ids"];

/// The offsets of the columns (prompt, chosen, rejected), and how the sequences are cut and ordered.
pub struct Pairs<'a> {
    offsets: [&'a [i64]; 3],
    max_length: usize,
    keep: Keep,
    layout: Layout,
}

/// Where the rows of a batch are written: `tokens` is the attention mask of a padded batch, or the positions of a packed
/// one.
pub struct Batch<'o> {
    pub input_ids: &'o mut [i64],
    pub completion_mask: &'o mut [i64],
    pub tokens: Tokens<'o>,
}

pub enum Tokens<'o> {
    Mask(&'o mut [i64]),
    Positions(&'o mut [i64]),
}

struct Window {
    pair: usize,
    completion: usize,
    prompt_ids: Range<usize>,
    completion_ids: Range<usize>,
}

impl<'a> Pairs<'a> {
    pub fn new(
        offsets: [&'a [i64]; 3],
        max_length: Option<usize>,
        keep: Keep,
        layout: Layout,
    ) -> Result<Self, String> {
        for (column, name) in offsets.iter().zip(NAMES) {
            check_offsets(&format!("{name} offsets"), column)?;
        }
        let [prompt, chosen, rejected] = offsets.map(|column| column.len() - 1);
        if prompt != chosen || prompt != rejected {
            return Err(format!(
                "prompt_ids, chosen_ids and rejected_ids must have one row for each pair, got {prompt}, {chosen} and {rejected}"
            ));
        }
        Ok(Pairs {
            offsets,
            max_length: max_length.unwrap_or(usize::MAX),
            keep,
            layout,
        })
    }

    /// The number of sequences, two for each pair.
    pub fn len(&self) -> usize {
        2 * (self.offsets[0].len() - 1)
    }

    /// The number of tokens kept of each sequence, in the order of the layout; or the rows whose completion the cut empties.
    pub fn lengths(&self, out: &mut [i64]) -> Result<(), String> {
        let mut emptied = [Vec::new(), Vec::new()];
        for (sequence, length) in out.iter_mut().enumerate() {
            let window = self.window(sequence);
            *length = (window.prompt_ids.len() + window.completion_ids.len()) as i64;
            if window.completion_ids.is_empty()
                && !self.cells(window.completion, window.pair).is_empty()
            {
                emptied[window.completion - 1].push(window.pair);
            }
        }
        match &emptied {
            [chosen, rejected] if chosen.is_empty() && rejected.is_empty() => Ok(()),
            [chosen, rejected] => {
                let parts = [(chosen, "chosen"), (rejected, "rejected")];
                let parts = parts.iter().filter(|(rows, _)| !rows.is_empty());
                let parts: Vec<String> = parts
                    .map(|(rows, name)| format!("{name} of {}", name_rows(rows)))
                    .collect();
                Err(format!(
                    "max_length={} leaves no completion token in {}: their prompts fill it; raise max_length, shorten these \
                     prompts, or use truncation_mode=\"keep_end\"",
                    self.max_length,
                    parts.join(" and ")
                ))
            }
        }
    }

    /// Writes every sequence into its slot: its ids, then `pad` up to the slot's end.
    pub fn fill(
        &self,
        ids: [Ids<'_>; 3],
        slots: Rows<'_>,
        pad: i64,
        batch: Batch<'_>,
        threads: usize,
    ) -> Result<(), String> {
        for ((ids, offsets), name) in ids.iter().zip(self.offsets).zip(NAMES) {
            let last = offsets[offsets.len() - 1];
            if last as usize > ids.len() {
                return Err(format!(
                    "{name} offsets end at {last}, beyond its {} values",
                    ids.len()
                ));
            }
        }
        let (tokens, positions) = match batch.tokens {
            Tokens::Mask(mask) => (mask, false),
            Tokens::Positions(positions) => (positions, true),
        };
        let threads = worthwhile_threads(32 * slots.total(), threads);
        let (mut input_ids, mut completion_mask, mut tokens, mut start) =
            (batch.input_ids, batch.completion_mask, tokens, 0);
        let mut parts = Vec::new();
        for sequences in slots.groups(threads) {
            let end = slots.range(sequences.end - 1).end;
            let (a, rest_a) = input_ids.split_at_mut(end - start);
            let (b, rest_b) = completion_mask.split_at_mut(end - start);
            let (c, rest_c) = tokens.split_at_mut(end - start);
            parts.push((sequences, start, [a, b, c]));
            (input_ids, completion_mask, tokens, start) = (rest_a, rest_b, rest_c, end);
        }
        let first_error: Mutex<Option<(usize, String)>> = Mutex::new(None);
        share(
            parts,
            threads,
            |(sequences, start, [input_ids, completion_mask, tokens])| {
                for sequence in sequences {
                    let slot = slots.range(sequence);
                    let slot = slot.start - start..slot.end - start;
                    let out = [
                        &mut input_ids[slot.clone()],
                        &mut completion_mask[slot.clone()],
                        &mut tokens[slot],
                    ];
                    if let Err(message) = self.fill_one(sequence, &ids, pad, positions, out)
                        && let Ok(mut first) = first_error.lock()
                        && first
                            .as_ref()
                            .is_none_or(|(earlier, _)| sequence < *earlier)
                    {
                        *first = Some((sequence, message));
                    }
                }
            },
        );
        match first_error.into_inner() {
            Ok(Some((_, message))) => Err(message),
            _ => Ok(()),
        }
    }

    fn fill_one(
        &self,
        sequence: usize,
        ids: &[Ids<'_>; 3],
        pad: i64,
        positions: bool,
        [input_ids, completion_mask, tokens]: [&mut [i64]; 3],
    ) -> Result<(), String> {
        let window = self.window(sequence);
        let prompt = window.prompt_ids.len();
        let length = prompt + window.completion_ids.len();
        if length > input_ids.len() {
            return Err(format!(
                "sequence {sequence} has {length} tokens, its slot {}",
                input_ids.len()
            ));
        }
        ids[0].copy(window.prompt_ids.clone(), &mut input_ids[..prompt]);
        ids[window.completion].copy(
            window.completion_ids.clone(),
            &mut input_ids[prompt..length],
        );
        if let Some(at) = input_ids[..length].iter().position(|&id| id < 0) {
            let (column, from, at_cell) = if at < prompt {
                (0, window.prompt_ids, at)
            } else {
                (window.completion, window.completion_ids, at - prompt)
            };
            let position = from.start + at_cell - self.cells(column, window.pair).start;
            return Err(format!(
                "{}[{}][{position}] must be a token id, got the negative number {}",
                NAMES[column], window.pair, input_ids[at]
            ));
        }
        input_ids[length..].fill(pad);
        completion_mask[..prompt].fill(0);
        completion_mask[prompt..length].fill(1);
        completion_mask[length..].fill(0);
        if positions {
            for (position, token) in tokens[..length].iter_mut().enumerate() {
                *token = position as i64;
            }
        } else {
            tokens[..length].fill(1);
        }
        tokens[length..].fill(0);
        Ok(())
    }

    fn cells(&self, column: usize, row: usize) -> Range<usize> {
        self.offsets[column][row] as usize..self.offsets[column][row + 1] as usize
    }

    fn window(&self, sequence: usize) -> Window {
        let (pair, completion) = match self.layout {
            Layout::Concatenated => (sequence % (self.len() / 2), 1 + sequence / (self.len() / 2)),
            Layout::Interleaved => (sequence / 2, 1 + sequence % 2),
        };
        let (mut prompt_ids, mut completion_ids) =
            (self.cells(0, pair), self.cells(completion, pair));
        let cut = (prompt_ids.len() + completion_ids.len()).saturating_sub(self.max_length);
        match self.keep {
            Keep::Start => {
                let of_completion = cut.min(completion_ids.len());
                completion_ids.end -= of_completion;
                prompt_ids.end -= cut - of_completion;
            }
            Keep::End => {
                let of_prompt = cut.min(prompt_ids.len());
                prompt_ids.start += of_prompt;
                completion_ids.start += cut - of_prompt;
            }
        }
        Window {
            pair,
            completion,
            prompt_ids,
            completion_ids,
        }
    }
}

#[cfg(test)]
mod tests;
