//! Generalised advantage estimation over rows, last position first:
//!
//! ```text
//! delta_t = r_t + gamma V_{t+1} (1 - done_t) - V_t
//! A_t     = delta_t + gamma lam (1 - done_t) A_{t+1}          returns_t = A_t + V_t
//! ```
//!
//! Sums run in float64 and are rounded once when they are stored. A termination selects rather than multiplies: whatever
//! follows it, NaN included, has no effect.

mod runs;

use runs::Runs;

use super::moments::Moments;
use crate::failure::{Failure, filled};
use crate::rows::{Grid, PerRow, Row};
use crate::scan::{Cells, Input, Real, State, Windows};

/// What the recursion does at a masked cell. The outputs there are 0 in every case.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Masked {
    /// It goes on at the next scored cell, as if the masked one were not there.
    Skip,
    /// It runs through the cell with reward 0, value 0 and no termination.
    Zero,
    /// It reads the cell like any other.
    Read,
}

pub struct Gae<'a, T> {
    pub rewards: Input<'a, T>,
    pub values: Input<'a, T>,
    pub grid: Grid<'a, T>,
    pub gamma: f64,
    pub lam: f64,
    pub masked: Masked,
    /// Cell by cell also in float32; else its sums, in float64, are added in an order that depends on where runs of scored
    /// cells end. float64 always is.
    pub exact: bool,
}

impl<T: Real> Gae<'_, T> {
    /// Fills `advantages` and `returns`, one element for each cell of the grid.
    pub fn run(&self, advantages: &mut [T], returns: &mut [T], threads: usize) {
        self.rows(advantages, returns, None, threads);
    }

    /// As `run`; also the moments of the scored advantages, found row by row while they are in cache and merged in the
    /// order of the rows.
    pub fn run_with_moments(
        &self,
        advantages: &mut [T],
        returns: &mut [T],
        threads: usize,
    ) -> Result<Moments, Failure> {
        let rows = if advantages.is_empty() {
            0
        } else {
            self.grid.rows.count()
        };
        let mut found = filled(Moments::NONE, rows)?;
        self.rows(advantages, returns, Some(PerRow(&mut found)), threads);
        Ok(found.into_iter().fold(Moments::NONE, Moments::merge))
    }

    fn rows(
        &self,
        advantages: &mut [T],
        returns: &mut [T],
        moments: Option<PerRow<'_, Moments>>,
        threads: usize,
    ) {
        if advantages.is_empty() {
            return; // of however many rows
        }
        let exact = self.exact || !T::SPARE;
        let windows = (!exact).then(|| Windows::new(self.gamma, self.gamma * self.lam));
        // Cell by cell takes about twice as long.
        let bytes = if exact { 16 } else { 8 } * size_of_val(advantages);
        let outputs = ((advantages, returns), moments);
        let rows = self.grid.rows;
        rows.each(
            outputs,
            bytes,
            threads,
            |row, ((advantages, returns), moments)| {
                let cells = rows.range(row);
                let given = self.grid.row(row);
                let all = Cells {
                    rewards: self.rewards.part(cells.clone()),
                    values: self.values.part(cells),
                    advantages: &mut *advantages,
                    returns,
                };
                self.row(&given, all, windows.as_ref());
                if let Some(PerRow([found])) = moments {
                    *found = Moments::of_row(advantages, given.mask);
                }
            },
        );
    }

    /// The last cell first.
    fn row(&self, row: &Row<'_, T>, mut cells: Cells<'_, '_, T>, windows: Option<&Windows>) {
        let mut state = State {
            value: row.bootstrap.map_or(0.0, T::widen),
            advantage: 0.0,
        };
        let mut end = cells.count();
        let mask = row.mask.filter(|_| self.masked != Masked::Read);
        let mut scored = Runs::new(mask, true, end);
        let mut terminated = Runs::new(row.terminated, false, end);
        while end > 0 {
            let (is_scored, first) = scored.ending_at(end);
            if !is_scored {
                self.skip(end - first, &mut state);
                zero(cells.part(first..end));
                end = first;
                continue;
            }
            let (is_terminated, from) = terminated.ending_at(end);
            let start = if is_terminated {
                (state.value, state.advantage) = (0.0, 0.0);
                end - 1
            } else {
                first.max(from)
            };
            self.pass(cells.part(start..end), windows, &mut state);
            end = start;
        }
        if let (Masked::Read, Some(mask)) = (self.masked, row.mask) {
            let hidden = (0..mask.len()).filter(|&cell| mask[cell] == 0);
            hidden.for_each(|cell| zero(cells.part(cell..cell + 1)));
        }
    }

    /// Masked cells whose inputs are not read.
    fn skip(&self, cells: usize, state: &mut State) {
        if self.masked == Masked::Zero {
            for _ in 0..cells {
                self.step(0.0, 0.0, state);
            }
        }
    }

    /// Cells that the recursion reads, none of them a termination but the last.
    fn pass(&self, mut cells: Cells<'_, '_, T>, windows: Option<&Windows>, state: &mut State) {
        let count = cells.count();
        let left = match windows {
            Some(windows) => windows.run(cells.part(0..count), state),
            None => count,
        };
        let mut now = *state; // a copy, which can stay in registers
        for cell in (0..left).rev() {
            let (reward, value) = (cells.rewards()[cell].widen(), cells.values()[cell].widen());
            self.step(reward, value, &mut now);
            cells.advantages[cell] = T::narrow(now.advantage);
            cells.returns[cell] = T::narrow(now.advantage + value);
        }
        *state = now;
    }

    fn step(&self, reward: f64, value: f64, state: &mut State) {
        let decay = self.gamma * self.lam;
        state.advantage = reward + self.gamma * state.value - value + decay * state.advantage;
        state.value = value;
    }
}

fn zero<T: Real>(cells: Cells<'_, '_, T>) {
    cells.advantages.fill(T::ZERO);
    cells.returns.fill(T::ZERO);
}

#[cfg(test)]
mod tests;
