//! What is scanned: cells, what is carried from one to the one before it, and what is found of them.

use std::ops::Range;

/// What the recursion carries from a cell to the one before it, and the sums over the cells that it has passed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    pub value: f64,
    pub advantage: f64,
    pub deviations: Option<Deviations>,
}

/// Of the advantages passed: the sums of their deviations from `center`, and of their squares, in lanes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Deviations {
    pub center: f64,
    pub count: usize,
    pub first: [f64; 8],
    pub second: [f64; 8],
}

impl Deviations {
    pub fn from(center: f64) -> Self {
        Deviations {
            center,
            count: 0,
            first: [0.0; 8],
            second: [0.0; 8],
        }
    }

    pub fn merge(&mut self, others: &Deviations) {
        self.count += others.count;
        for lane in 0..8 {
            self.first[lane] += others.first[lane];
            self.second[lane] += others.second[lane];
        }
    }

    pub fn add(&mut self, advantage: f64) {
        let deviation = advantage - self.center;
        self.count += 1;
        self.first[0] += deviation;
        self.second[0] += deviation * deviation;
    }
}

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

/// Cells of a run, all scored and none a termination; four slices of the same length. The first `room` of them come before
/// the run: their inputs are not read, their outputs may be overwritten, and the run has at least one cell.
pub struct Run<'a, 'o, T> {
    pub rewards: Input<'a, T>,
    pub values: Input<'a, T>,
    pub advantages: &'o mut [T],
    pub returns: &'o mut [T],
    pub room: usize,
}

impl<'a, T> Run<'a, '_, T> {
    pub fn reborrow(&mut self) -> Run<'a, '_, T> {
        Run {
            rewards: self.rewards,
            values: self.values,
            advantages: self.advantages,
            returns: self.returns,
            room: self.room,
        }
    }
}

/// Cells of a row that are passed from the last on; the value and the advantage that follow the last, and, once they are passed,
/// that of the first.
#[derive(Clone, Debug)]
pub struct Episode {
    pub row: usize,
    pub cells: Range<usize>,
    pub value: f64,
    pub advantage: f64,
}
