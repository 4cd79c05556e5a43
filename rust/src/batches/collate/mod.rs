//! Prompts and completions from ragged columns to one batch: each sequence is a prompt and one of its completions, cut
//! to `max_length` from one end.

mod batch;

use std::ops::Range;
use std::sync::Mutex;

pub use batch::Batch;

use super::ids::Ids;
use crate::rows::{Rows, check_offsets, name_rows};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    Start,
    End,
}

/// The order of the sequences of B rows with several completions: all first completions, then all second ones; or each
/// row's together.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Concatenated,
    Interleaved,
}

/// How sequences are made of their columns.
#[derive(Clone, Copy)]
pub struct Options {
    pub max_length: Option<usize>,
    pub keep: Keep,
    pub layout: Layout,
    /// Whether each prompt takes the completion of the row before it (the first one that of the last row).
    pub shifted: bool,
}

/// The columns (the prompt, then the completions) by name and offsets, and how sequences are made of them.
pub struct Sequences<'a> {
    names: &'a [String],
    offsets: Vec<&'a [i64]>,
    max_length: usize,
    options: Options,
}

/// Where sequences lie in a batch: in their slots from the first cell on, or with every completion beginning at `pivot`.
#[derive(Clone, Copy)]
pub struct Slots<'a> {
    pub rows: Rows<'a>,
    pub pivot: Option<usize>,
}

struct Window {
    row: usize,
    completion: usize,
    prompt_ids: Range<usize>,
    completion_ids: Range<usize>,
}

impl<'a> Sequences<'a> {
    pub fn new(
        names: &'a [String],
        offsets: Vec<&'a [i64]>,
        options: Options,
    ) -> Result<Self, String> {
        if names.len() != offsets.len() || names.len() < 2 {
            return Err("there must be a prompt and at least one completion column".to_owned());
        }
        for (column, name) in offsets.iter().zip(names) {
            check_offsets(&format!("{name} offsets"), column)?;
        }
        if offsets
            .iter()
            .any(|column| column.len() != offsets[0].len())
        {
            let counts: Vec<String> = offsets
                .iter()
                .map(|column| (column.len() - 1).to_string())
                .collect();
            return Err(format!(
                "{} must have the same number of rows, got {}",
                listed(names),
                listed(&counts)
            ));
        }
        Ok(Sequences {
            names,
            offsets,
            max_length: options.max_length.unwrap_or(usize::MAX),
            options,
        })
    }

    fn rows(&self) -> usize {
        self.offsets[0].len() - 1
    }

    /// The number of sequences, one for each completion.
    pub fn count(&self) -> usize {
        (self.names.len() - 1) * self.rows()
    }

    /// The number of tokens kept of each sequence, in the order of the layout; or the rows whose completion the cut empties.
    pub fn lengths(&self, out: &mut [i64]) -> Result<(), String> {
        let mut emptied = vec![Vec::new(); self.names.len()];
        for (sequence, length) in out.iter_mut().enumerate() {
            let window = self.window(sequence);
            *length = (window.prompt_ids.len() + window.completion_ids.len()) as i64;
            if window.completion_ids.is_empty()
                && !self
                    .cells(window.completion, self.source(window.row))
                    .is_empty()
            {
                emptied[window.completion].push(window.row);
            }
        }
        let parts: Vec<String> = emptied
            .iter()
            .zip(self.names)
            .filter(|(rows, _)| !rows.is_empty())
            .map(|(rows, name)| format!("{} of {}", name.trim_end_matches("_ids"), name_rows(rows)))
            .collect();
        if parts.is_empty() {
            return Ok(());
        }
        Err(format!(
            "max_length={} leaves no completion token in {}: their prompts fill it; raise max_length, shorten these \
             prompts, or use truncation_mode=\"keep_end\"",
            self.max_length,
            parts.join(" and ")
        ))
    }

    /// Writes every sequence into its slot: its ids, and `pad` in the other cells.
    pub fn fill(
        &self,
        ids: &[Ids<'_>],
        slots: Slots<'_>,
        pad: i64,
        batch: Batch<'_>,
        threads: usize,
    ) -> Result<(), String> {
        if ids.len() != self.names.len() {
            return Err("there must be ids for every column".to_owned());
        }
        for ((ids, offsets), name) in ids.iter().zip(&self.offsets).zip(self.names) {
            let last = offsets[offsets.len() - 1];
            if last as usize > ids.count() {
                return Err(format!(
                    "{name} offsets end at {last}, beyond its {} values",
                    ids.count()
                ));
            }
        }
        let first_error: Mutex<Option<(usize, String)>> = Mutex::new(None);
        let rows = slots.rows;
        rows.each(batch, 32 * rows.total(), threads, |sequence, slot| {
            if let Err(message) = self.fill_one(sequence, ids, slots.pivot, pad, slot)
                && let Ok(mut first) = first_error.lock()
                && first
                    .as_ref()
                    .is_none_or(|(earlier, _)| sequence < *earlier)
            {
                *first = Some((sequence, message));
            }
        });
        match first_error.into_inner() {
            Ok(Some((_, message))) => Err(message),
            _ => Ok(()),
        }
    }

    fn fill_one(
        &self,
        sequence: usize,
        ids: &[Ids<'_>],
        pivot: Option<usize>,
        pad: i64,
        slot: Batch<'_>,
    ) -> Result<(), String> {
        let window = self.window(sequence);
        let prompt = window.prompt_ids.len();
        let length = prompt + window.completion_ids.len();
        let cells = slot.input_ids.len();
        let begin = match pivot {
            None => Some(0),
            Some(pivot) => pivot.checked_sub(prompt),
        };
        let Some(begin) = begin.filter(|begin| begin + length <= cells) else {
            return Err(format!(
                "sequence {sequence} has {length} tokens, its slot {cells}"
            ));
        };
        let (pivot, end) = (begin + prompt, begin + length);
        let input_ids = slot.input_ids;
        let (prompts, completions) = (ids[0], ids[window.completion]);
        let of_prompt = prompts.copy(window.prompt_ids.clone(), &mut input_ids[begin..pivot]);
        let of_completion =
            completions.copy(window.completion_ids.clone(), &mut input_ids[pivot..end]);
        if of_prompt || of_completion {
            return Err(self.negative(&window, &input_ids[begin..end]));
        }
        input_ids[..begin].fill(pad);
        input_ids[end..].fill(pad);
        slot.completion_mask[..pivot].fill(0);
        slot.completion_mask[pivot..end].fill(1);
        slot.completion_mask[end..].fill(0);
        if let Some(mask) = slot.attention_mask {
            mask[..begin].fill(0);
            mask[begin..end].fill(1);
            mask[end..].fill(0);
        }
        if let Some(positions) = slot.position_ids {
            positions[..begin].fill(0);
            for (position, cell) in positions[begin..end].iter_mut().enumerate() {
                *cell = position as i64;
            }
            positions[end..].fill(0);
        }
        Ok(())
    }

    fn negative(&self, window: &Window, ids: &[i64]) -> String {
        let at = ids.iter().position(|&id| id < 0).unwrap_or_default();
        let prompt = window.prompt_ids.len();
        let (column, row, cell) = if at < prompt {
            (0, window.row, window.prompt_ids.start + at)
        } else {
            let cell = window.completion_ids.start + at - prompt;
            (window.completion, self.source(window.row), cell)
        };
        let position = cell - self.cells(column, row).start;
        format!(
            "{}[{row}][{position}] must be a token id, got the negative number {}",
            self.names[column], ids[at]
        )
    }

    fn cells(&self, column: usize, row: usize) -> Range<usize> {
        self.offsets[column][row] as usize..self.offsets[column][row + 1] as usize
    }

    /// The row that the completion of a row's sequence comes from.
    fn source(&self, row: usize) -> usize {
        match (self.options.shifted, row) {
            (false, _) => row,
            (true, 0) => self.rows() - 1,
            (true, _) => row - 1,
        }
    }

    fn window(&self, sequence: usize) -> Window {
        let completions = self.names.len() - 1;
        let (row, completion) = match self.options.layout {
            Layout::Concatenated => (sequence % self.rows(), 1 + sequence / self.rows()),
            Layout::Interleaved => (sequence / completions, 1 + sequence % completions),
        };
        let mut prompt_ids = self.cells(0, row);
        let mut completion_ids = self.cells(completion, self.source(row));
        let cut = (prompt_ids.len() + completion_ids.len()).saturating_sub(self.max_length);
        match self.options.keep {
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
            row,
            completion,
            prompt_ids,
            completion_ids,
        }
    }
}

/// `a`, `a and b`, `a, b and c`.
fn listed(texts: &[String]) -> String {
    match texts {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

#[cfg(test)]
mod tests;
