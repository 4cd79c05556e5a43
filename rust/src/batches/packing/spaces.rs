//! The open bins by the space left in them: a table for capacities that are not much above the number of items, or a tree.

use std::collections::BTreeMap;

use crate::failure::{Failure, filled};

/// No bin.
const NONE: u32 = u32::MAX;

/// Each space's bins are first come, first served.
pub trait Spaces {
    /// The least space of at least `length`, with the first and last of its bins.
    fn best(&mut self, length: i64) -> Option<(i64, u32, u32)>;
    /// Sets the bins of a space, which is open, or closes it.
    fn set(&mut self, space: i64, queue: Option<(u32, u32)>);
    fn get(&self, space: i64) -> Option<(u32, u32)>;
}

/// Any capacity: a search tree.
#[derive(Default)]
pub struct Tree(BTreeMap<i64, (u32, u32)>);

impl Spaces for Tree {
    fn best(&mut self, length: i64) -> Option<(i64, u32, u32)> {
        let (&space, &(first, last)) = self.0.range(length..).next()?;
        Some((space, first, last))
    }

    fn set(&mut self, space: i64, queue: Option<(u32, u32)>) {
        match queue {
            Some(queue) => self.0.insert(space, queue),
            None => self.0.remove(&space),
        };
    }

    fn get(&self, space: i64) -> Option<(u32, u32)> {
        self.0.get(&space).copied()
    }
}

/// One entry for each space, and bits that say which are open: each word of a level stands for 64 of the level below.
pub struct Table {
    queues: Vec<(u32, u32)>,
    levels: Vec<Vec<u64>>,
}

impl Table {
    pub fn new(capacity: i64) -> Result<Self, Failure> {
        let mut levels = Vec::new();
        let mut size = capacity as usize + 1;
        while size > 1 || levels.is_empty() {
            size = size.div_ceil(64);
            levels.push(filled(0, size)?);
        }
        Ok(Table {
            queues: filled((NONE, NONE), capacity as usize + 1)?,
            levels,
        })
    }
}

impl Spaces for Table {
    fn best(&mut self, length: i64) -> Option<(i64, u32, u32)> {
        let mut at = length as usize;
        let mut height = 0;
        // Up to the first word with an open space not below `at`, then down to it.
        loop {
            let words = self.levels.get(height)?;
            let bits = words
                .get(at / 64)
                .map_or(0, |word| word & (!0 << (at % 64)));
            if bits != 0 {
                at = at / 64 * 64 + bits.trailing_zeros() as usize;
                break;
            }
            at = at / 64 + 1;
            height += 1;
        }
        for level in self.levels[..height].iter().rev() {
            at = at * 64 + level[at].trailing_zeros() as usize;
        }
        let (first, last) = self.queues[at];
        Some((at as i64, first, last))
    }

    fn set(&mut self, space: i64, queue: Option<(u32, u32)>) {
        let mut at = space as usize;
        let was_open = self.queues[at].0 != NONE;
        self.queues[at] = queue.unwrap_or((NONE, NONE));
        if was_open == queue.is_some() {
            return;
        }
        for level in &mut self.levels {
            let word = &mut level[at / 64];
            let before = *word;
            *word ^= 1 << (at % 64);
            // The level above changes only where this word became empty or stopped being so.
            if before != 0 && *word != 0 {
                return;
            }
            at /= 64;
        }
    }

    fn get(&self, space: i64) -> Option<(u32, u32)> {
        let queue = self.queues[space as usize];
        (queue.0 != NONE).then_some(queue)
    }
}
