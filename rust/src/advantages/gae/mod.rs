//! Generalised advantage estimation over rows, last position first:
//!
//! ```text
//! delta_t = r_t + gamma V_{t+1} (1 - done_t) - V_t
//! A_t     = delta_t + gamma lam (1 - done_t) A_{t+1}          returns_t = A_t + V_t
//! ```
//!
//! Cell by cell, sums run in float64 and are rounded once when they are stored; `scan` is the faster form for float32. A
//! termination selects rather than multiplies: whatever follows it, NaN included, has no effect.

mod episodes;
mod runs;
mod whitened;

use std::mem;
use std::ops::Range;

use episodes::Episodes;
use runs::Runs;
use whitened::{RowSums, Wanted};

use crate::advantages::moments::Moments;
use crate::rows::{Rows, share};
pub use crate::scan::Input;
use crate::scan::{Deviations, Episode, Real, Run, Scan, State};
use crate::threads::Helpers;

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
    pub terminated: Option<&'a [u8]>,
    pub mask: Option<&'a [u8]>,
    /// The value after the last cell of each row.
    pub bootstrap: Option<&'a [T]>,
    pub rows: Rows<'a>,
    pub gamma: f64,
    pub lam: f64,
    pub masked: Masked,
    /// None: cell by cell.
    pub scan: Option<Scan>,
}

struct Part<'o, T> {
    rows: Range<usize>,
    start: usize,
    advantages: &'o mut [T],
    returns: &'o mut [T],
    moments: &'o mut [Moments],
    sums: &'o mut [RowSums],
}

impl<T: Real> Gae<'_, T> {
    /// Fills `advantages` and `returns`, one element for each cell of `rows`.
    pub fn run(&self, advantages: &mut [T], returns: &mut [T], threads: usize) {
        let nothing = Wanted {
            moments: &mut [],
            sums: &mut [],
            center: None,
        };
        self.parts(advantages, returns, nothing, threads);
    }

    fn parts(&self, advantages: &mut [T], returns: &mut [T], wanted: Wanted<'_>, threads: usize) {
        // Cell by cell takes about four times as long as a scan.
        let slower = if self.scan.is_some() { 1 } else { 4 };
        let bytes = 4 * slower * size_of_val(advantages);
        let helpers = Helpers::for_bytes(bytes, threads);
        let mut parts = Vec::new();
        let (mut advantages, mut returns, mut start) = (advantages, returns, 0);
        let Wanted {
            mut moments,
            mut sums,
            center,
        } = wanted;
        for rows in self.rows.groups(helpers.threads()) {
            let end = self.rows.range(rows.end - 1).end;
            let (first, rest) = advantages.split_at_mut(end - start);
            let (second, remainder) = returns.split_at_mut(end - start);
            let (found, other_moments) = take(&mut moments, rows.len());
            let (found_sums, other_sums) = take(&mut sums, rows.len());
            parts.push(Part {
                rows,
                start,
                advantages: first,
                returns: second,
                moments: found,
                sums: found_sums,
            });
            (advantages, returns, start) = (rest, remainder, end);
            (moments, sums) = (other_moments, other_sums);
        }
        share(parts, helpers, |part| self.part(part, center));
    }

    /// Last row first: memory is then passed in one direction, which the prefetchers follow.
    fn part(&self, part: Part<'_, T>, center: Option<f64>) {
        let all = part.start..part.start + part.advantages.len();
        let place = |row| {
            let cells = self.rows.range(row);
            cells.start - part.start..cells.end - part.start
        };
        let begin = |row: usize| State {
            value: self.bootstrap.map_or(0.0, |values| values[row].widen()),
            advantage: 0.0,
            deviations: center.map(Deviations::from),
        };
        if let Some(scan) = &self.scan
            && (self.mask.is_none() || self.masked == Masked::Skip)
        {
            let cells = Run {
                rewards: inside(self.rewards, all.clone()),
                values: inside(self.values, all.clone()),
                advantages: &mut *part.advantages,
                returns: &mut *part.returns,
                room: 0,
            };
            let episodes = Episodes::of(self, part.rows.clone(), part.start);
            let sums = &mut *part.sums;
            let passed = |episode: &Episode, found: Option<&Deviations>| {
                if let Some(found) = found {
                    let sums = &mut sums[episode.row - part.rows.start];
                    *sums = sums.add(&RowSums::of(found));
                }
            };
            let mask = self.mask.map(|mask| &mask[all]);
            let scan = &self.past_caches(scan, center);
            if T::scan_episodes(scan, cells, mask, center, episodes, passed) {
                return;
            }
        }
        for (index, row) in part.rows.clone().enumerate().rev() {
            let (cells, place, mut state) = (self.rows.range(row), place(row), begin(row));
            let outputs = [&mut *part.advantages, &mut *part.returns];
            let [advantages, returns] = outputs.map(|cells| &mut cells[place.clone()]);
            self.row(cells.clone(), advantages, returns, &mut state);
            if let (Some(found), Some(passed)) = (part.sums.get_mut(index), &state.deviations) {
                *found = RowSums::of(passed);
            }
            if let Some(found) = part.moments.get_mut(index) {
                let mask = self.mask.map(|mask| &mask[cells]);
                *found = Moments::of_row(&part.advantages[place], mask);
            }
        }
    }

    /// Outputs that no cache would hold go past it, unless they are read again, were read, or are mostly filled with zeros.
    fn past_caches(&self, scan: &Scan, center: Option<f64>) -> Scan {
        let apart = |input: Input<'_, T>| matches!(input, Input::Separate(_));
        let once = center.is_none() && self.mask.is_none();
        if once && apart(self.rewards) && apart(self.values) {
            scan.of_bytes(4 * self.rows.total() * size_of::<T>())
        } else {
            *scan
        }
    }

    /// The last cell first, from the state after the row on.
    fn row(&self, cells: Range<usize>, advantages: &mut [T], returns: &mut [T], state: &mut State) {
        let start = cells.start;
        let mask = self.mask.map(|mask| &mask[cells.clone()]);
        let mut scored = Runs::new(
            mask.filter(|_| self.masked != Masked::Read),
            true,
            cells.len(),
        );
        let terminated = self.terminated.map(|terminated| &terminated[cells]);
        let mut terminated = Runs::new(terminated, false, advantages.len());
        let mut end = advantages.len();
        while end > 0 {
            let (is_scored, first) = scored.ending_at(end);
            if !is_scored {
                self.hidden(end - first, state);
                advantages[first..end].fill(T::ZERO);
                returns[first..end].fill(T::ZERO);
                end = first;
                continue;
            }
            let (is_terminated, from) = terminated.ending_at(end);
            let run = if is_terminated {
                end - 1
            } else {
                first.max(from)
            }..end;
            end = run.start;
            let read = start..start + run.end;
            let run = Run {
                rewards: inside(self.rewards, read.clone()),
                values: inside(self.values, read),
                advantages: &mut advantages[..run.end],
                returns: &mut returns[..run.end],
                room: run.start,
            };
            self.scored(run, is_terminated, state);
        }
        if let (Masked::Read, Some(mask)) = (self.masked, mask) {
            for (t, _) in mask.iter().enumerate().filter(|(_, flag)| **flag == 0) {
                (advantages[t], returns[t]) = (T::ZERO, T::ZERO);
            }
        }
    }

    /// Masked cells whose inputs are not read.
    fn hidden(&self, cells: usize, state: &mut State) {
        if self.masked == Masked::Zero {
            for _ in 0..cells {
                state.step(0.0, 0.0, self.gamma, self.gamma * self.lam);
            }
        }
    }

    /// Cells that the recursion reads; a termination is a run of its own.
    fn scored(&self, mut run: Run<'_, '_, T>, terminated: bool, state: &mut State) {
        let decay = self.gamma * self.lam;
        if terminated {
            (state.value, state.advantage) = (0.0, 0.0);
        }
        let left = match &self.scan {
            Some(scan) if !terminated => T::scan(scan, run.reborrow(), state),
            _ => run.advantages.len() - run.room,
        };
        for t in (run.room..run.room + left).rev() {
            let read = |input: &Input<'_, T>| match input {
                Input::Separate(given) => given[t],
                Input::Advantages => run.advantages[t],
                Input::Returns => run.returns[t],
            };
            let (reward, value) = (read(&run.rewards).widen(), read(&run.values).widen());
            state.step(reward, value, self.gamma, decay);
            run.advantages[t] = T::narrow(state.advantage);
            if let Some(deviations) = &mut state.deviations {
                deviations.add(run.advantages[t].widen());
            }
            run.returns[t] = T::narrow(state.advantage + value);
        }
    }
}

impl State {
    fn step(&mut self, reward: f64, value: f64, gamma: f64, decay: f64) {
        self.advantage = reward + gamma * self.value - value + decay * self.advantage;
        self.value = value;
    }
}

/// The first `count` elements, or as many as there are, and the others.
fn take<'o, T>(all: &mut &'o mut [T], count: usize) -> (&'o mut [T], &'o mut [T]) {
    let all = mem::take(all);
    let count = count.min(all.len());
    all.split_at_mut(count)
}

fn inside<T>(input: Input<'_, T>, cells: Range<usize>) -> Input<'_, T> {
    match input {
        Input::Separate(given) => Input::Separate(&given[cells]),
        in_place => in_place,
    }
}

#[cfg(test)]
mod tests;
