//! What is passed over: cells with their inputs and their outputs, which may be the same memory.

use std::ops::Range;

/// Rewards or values: memory of their own, or one of the two outputs, which is then overwritten in place.
pub enum Input<'a, T> {
    Separate(&'a [T]),
    Advantages,
    Returns,
}

impl<T> Clone for Input<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Input<'_, T> {}

impl<'a, T> Input<'a, T> {
    /// That of some of the cells.
    pub fn part(self, cells: Range<usize>) -> Self {
        match self {
            Input::Separate(given) => Input::Separate(&given[cells]),
            in_place => in_place,
        }
    }
}

/// Four numbers for each cell.
pub struct Cells<'a, 'o, T> {
    pub rewards: Input<'a, T>,
    pub values: Input<'a, T>,
    pub advantages: &'o mut [T],
    pub returns: &'o mut [T],
}

impl<'a, T> Cells<'a, '_, T> {
    pub fn part(&mut self, cells: Range<usize>) -> Cells<'a, '_, T> {
        Cells {
            rewards: self.rewards.part(cells.clone()),
            values: self.values.part(cells.clone()),
            advantages: &mut self.advantages[cells.clone()],
            returns: &mut self.returns[cells],
        }
    }

    pub fn count(&self) -> usize {
        self.advantages.len()
    }

    pub fn rewards(&self) -> &[T] {
        self.input(&self.rewards)
    }

    pub fn values(&self) -> &[T] {
        self.input(&self.values)
    }

    #[inline(always)]
    fn input<'s>(&'s self, input: &'s Input<'a, T>) -> &'s [T] {
        match input {
            Input::Separate(given) => given,
            Input::Advantages => self.advantages,
            Input::Returns => self.returns,
        }
    }
}
