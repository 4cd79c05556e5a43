//! The outputs of a collated batch.

/// Where the tokens of a batch are written, each output with the cells of all sequences.
pub struct Batch<'o> {
    pub input_ids: &'o mut [i64],
    pub completion_mask: &'o mut [i64],
    pub attention_mask: Option<&'o mut [i64]>,
    pub position_ids: Option<&'o mut [i64]>,
}

impl<'o> Batch<'o> {
    /// The first `cells` cells of every output, and the others.
    pub(super) fn split(self, cells: usize) -> (Batch<'o>, Batch<'o>) {
        let (input_ids, ids_after) = self.input_ids.split_at_mut(cells);
        let (completion_mask, completion_after) = self.completion_mask.split_at_mut(cells);
        let (attention_mask, attention_after) = self
            .attention_mask
            .map(|mask| mask.split_at_mut(cells))
            .unzip();
        let (position_ids, positions_after) =
            self.position_ids.map(|ids| ids.split_at_mut(cells)).unzip();
        (
            Batch {
                input_ids,
                completion_mask,
                attention_mask,
                position_ids,
            },
            Batch {
                input_ids: ids_after,
                completion_mask: completion_after,
                attention_mask: attention_after,
                position_ids: positions_after,
            },
        )
    }
}
