//! What is found of the advantages while their rows are passed: the moments that whitening needs.

use super::{Gae, Input, Masked};
use crate::advantages::moments::Moments;
use crate::scan::{Deviations, Real};

/// Of a row's scored advantages: their number, and the sums of their deviations from a center and of the squares.
#[derive(Clone, Copy, Default)]
pub(super) struct RowSums {
    count: usize,
    first: f64,
    second: f64,
}

impl RowSums {
    pub(super) fn of(found: &Deviations) -> Self {
        let add = |lanes: &[f64; 8]| {
            let [a, b, c, d, e, f, g, h] = *lanes;
            ((a + e) + (c + g)) + ((b + f) + (d + h))
        };
        RowSums {
            count: found.count,
            first: add(&found.first),
            second: add(&found.second),
        }
    }

    pub(super) fn add(self, other: &RowSums) -> Self {
        RowSums {
            count: self.count + other.count,
            first: self.first + other.first,
            second: self.second + other.second,
        }
    }
}

/// What is found of each row while it is passed: one element for each, or none.
pub(super) struct Wanted<'o> {
    pub(super) moments: &'o mut [Moments],
    pub(super) sums: &'o mut [RowSums],
    pub(super) center: Option<f64>,
}

impl<T: Real> Gae<'_, T> {
    /// As `run`; also the moments of the scored advantages: in the registers of the scan, or row by row while they are in
    /// cache. The former are sums of deviations from a scored advantage, so that no sum of squares is above the number of
    /// cells times that of the deviations from the mean: a relative error of at most that number times 2^-52.
    pub fn run_with_moments(
        &self,
        advantages: &mut [T],
        returns: &mut [T],
        threads: usize,
    ) -> Moments {
        let rows = self.rows.count();
        let scanned = T::SCANNED && self.scan.is_some();
        if !scanned || (self.masked == Masked::Read && self.mask.is_some()) {
            let mut found = vec![Moments::NONE; rows];
            let wanted = Wanted {
                moments: &mut found,
                sums: &mut [],
                center: None,
            };
            self.parts(advantages, returns, wanted, threads);
            return found.into_iter().fold(Moments::NONE, Moments::merge);
        }
        let center = self.any_scored(advantages, returns);
        let mut found = vec![RowSums::default(); rows];
        let wanted = Wanted {
            moments: &mut [],
            sums: &mut found,
            center: Some(center),
        };
        self.parts(advantages, returns, wanted, threads);
        let all = found.iter().fold(RowSums::default(), RowSums::add);
        Moments::about(center, all.count, (all.first, all.second))
    }

    /// The advantage of the last scored cell of the first row that has one, near enough to measure deviations from.
    fn any_scored(&self, advantages: &[T], returns: &[T]) -> f64 {
        let last = |row: usize| {
            let cells = self.rows.range(row);
            let mask = self.mask.map_or(&[][..], |mask| &mask[cells.clone()]);
            let last = mask.iter().rposition(|&flag| flag != 0);
            let last = if self.mask.is_some() {
                last
            } else {
                cells.len().checked_sub(1)
            };
            last.map(|last| (row, cells.start + last))
        };
        let Some((row, cell)) = (0..self.rows.count()).find_map(last) else {
            return 0.0;
        };
        let read = |input: &Input<'_, T>| match input {
            Input::Separate(given) => given[cell].widen(),
            Input::Advantages => advantages[cell].widen(),
            Input::Returns => returns[cell].widen(),
        };
        let ends = self
            .terminated
            .is_some_and(|terminated| terminated[cell] != 0);
        let after = self
            .bootstrap
            .filter(|_| !ends)
            .map_or(0.0, |values| values[row].widen());
        let advantage = read(&self.rewards) + self.gamma * after - read(&self.values);
        if advantage.is_finite() {
            advantage
        } else {
            0.0
        }
    }
}
