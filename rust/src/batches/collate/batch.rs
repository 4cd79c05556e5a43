//! The outputs of a collated batch.

use crate::rows::Split;

/// Where the tokens of a batch are written, each output with the cells of all sequences.
pub struct Batch<'o> {
    pub input_ids: &'o mut [i64],
    pub completion_mask: &'o mut [i64],
    pub attention_mask: Option<&'o mut [i64]>,
    pub position_ids: Option<&'o mut [i64]>,
}

impl Split for Batch<'_> {
    fn split(self, rows: usize, cells: usize) -> (Self, Self) {
        let (input_ids, later_ids) = self.input_ids.split_at_mut(cells);
        let (completion_mask, later_completion) = self.completion_mask.split_at_mut(cells);
        let (attention_mask, later_attention) = self.attention_mask.split(rows, cells);
        let (position_ids, later_positions) = self.position_ids.split(rows, cells);
        (
            Batch {
                input_ids,
                completion_mask,
                attention_mask,
                position_ids,
            },
            Batch {
                input_ids: later_ids,
                completion_mask: later_completion,
                attention_mask: later_attention,
                position_ids: later_positions,
            },
        )
    }
}
