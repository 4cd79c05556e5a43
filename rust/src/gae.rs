//! Generalised advantage estimation over rows, last position first:
//!
//! ```text
//! delta_t = r_t + gamma V_{t+1} (1 - done_t) - V_t
//! A_t     = delta_t + gamma lam (1 - done_t) A_{t+1}          returns_t = A_t + V_t
//! ```
//!
//! Sums run in float64 and are rounded once when they are stored. A termination selects rather than multiplies: whatever
//! follows it, NaN included, has no effect.

use crate::rows::{Rows, share, worthwhile_threads};

/// float32 or float64.
pub trait Real: Copy + Send + Sync {
    const ZERO: Self;
    fn widen(self) -> f64;
    fn narrow(wide: f64) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    fn widen(self) -> f64 {
        f64::from(self)
    }
    fn narrow(wide: f64) -> Self {
        wide as f32
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    fn widen(self) -> f64 {
        self
    }
    fn narrow(wide: f64) -> Self {
        wide
    }
}

/// Rewards or values: memory of their own, or one of the two outputs, which is then overwritten in place.
#[derive(Clone, Copy)]
pub enum Input<'a, T> {
    Separate(&'a [T]),
    Advantages,
    Returns,
}

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
}

struct Part<'o, T> {
    rows: std::ops::Range<usize>,
    start: usize,
    advantages: &'o mut [T],
    returns: &'o mut [T],
}

impl<T: Real> Gae<'_, T> {
    /// Fills `advantages` and `returns`, one element for each cell of `rows`.
    pub fn run(&self, advantages: &mut [T], returns: &mut [T], threads: usize) {
        let bytes = 4 * std::mem::size_of_val(advantages);
        let threads = worthwhile_threads(bytes, threads);
        let mut parts = Vec::new();
        let (mut advantages, mut returns, mut start) = (advantages, returns, 0);
        for rows in self.rows.groups(threads) {
            let end = self.rows.range(rows.end - 1).end;
            let (first, rest) = advantages.split_at_mut(end - start);
            let (second, remainder) = returns.split_at_mut(end - start);
            parts.push(Part {
                rows,
                start,
                advantages: first,
                returns: second,
            });
            (advantages, returns, start) = (rest, remainder, end);
        }
        share(parts, threads, |part| {
            for row in part.rows {
                let cells = self.rows.range(row);
                let local = cells.start - part.start..cells.end - part.start;
                self.row(
                    row,
                    cells.start,
                    &mut part.advantages[local.clone()],
                    &mut part.returns[local],
                );
            }
        });
    }

    fn row(&self, row: usize, start: usize, advantages: &mut [T], returns: &mut [T]) {
        let decay = self.gamma * self.lam;
        let mut next_value = self.bootstrap.map_or(0.0, |values| values[row].widen());
        let mut next_advantage = 0.0;
        for t in (0..advantages.len()).rev() {
            let cell = start + t;
            let scored = self.mask.is_none_or(|mask| mask[cell] != 0);
            if !scored && self.masked == Masked::Skip {
                (advantages[t], returns[t]) = (T::ZERO, T::ZERO);
                continue;
            }
            let (reward, value, done) = if scored || self.masked == Masked::Read {
                let read = |input: &Input<'_, T>| match input {
                    Input::Separate(given) => given[cell],
                    Input::Advantages => advantages[t],
                    Input::Returns => returns[t],
                };
                let done = self
                    .terminated
                    .is_some_and(|terminated| terminated[cell] != 0);
                (
                    read(&self.rewards).widen(),
                    read(&self.values).widen(),
                    done,
                )
            } else {
                (0.0, 0.0, false)
            };
            next_advantage = if done {
                reward - value
            } else {
                reward + self.gamma * next_value - value + decay * next_advantage
            };
            next_value = value;
            (advantages[t], returns[t]) = if scored {
                (T::narrow(next_advantage), T::narrow(next_advantage + value))
            } else {
                (T::ZERO, T::ZERO)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem<'a>(rewards: &'a [f64], values: &'a [f64], rows: Rows<'a>) -> Gae<'a, f64> {
        Gae {
            rewards: Input::Separate(rewards),
            values: Input::Separate(values),
            terminated: None,
            mask: None,
            bootstrap: None,
            rows,
            gamma: 0.5,
            lam: 0.5,
            masked: Masked::Skip,
        }
    }

    fn run(gae: &Gae<'_, f64>, threads: usize) -> (Vec<f64>, Vec<f64>) {
        let (mut advantages, mut returns) = (
            vec![f64::NAN; gae.rows.total()],
            vec![f64::NAN; gae.rows.total()],
        );
        gae.run(&mut advantages, &mut returns, threads);
        (advantages, returns)
    }

    // delta = [1 + 2 - 2, 2 + 4 - 4, 3 + 0 - 8] = [1, 2, -5]; A = [1 + .75/4, 2 - 1.25, -5]
    const REWARDS: [f64; 3] = [1.0, 2.0, 3.0];
    const VALUES: [f64; 3] = [2.0, 4.0, 8.0];
    const ROW: Rows<'static> = Rows::Padded { rows: 1, width: 3 };

    #[test]
    fn by_hand() {
        let (advantages, returns) = run(&problem(&REWARDS, &VALUES, ROW), 1);
        assert_eq!(advantages, [1.1875, 0.75, -5.0]);
        assert_eq!(returns, [3.1875, 4.75, 3.0]);
    }

    #[test]
    fn bootstrap_enters_after_the_last_cell() {
        let gae = Gae {
            bootstrap: Some(&[4.0]),
            ..problem(&REWARDS, &VALUES, ROW)
        };
        assert_eq!(run(&gae, 1).0, [1.3125, 1.25, -3.0]);
    }

    #[test]
    fn termination_hides_what_follows() {
        let rewards = [1.0, 2.0, f64::NAN];
        let gae = Gae {
            terminated: Some(&[0, 1, 0]),
            ..problem(&rewards, &VALUES, ROW)
        };
        let (advantages, _) = run(&gae, 1);
        assert_eq!(advantages[..2], [0.5, -2.0]);
        assert!(advantages[2].is_nan());
    }

    #[test]
    fn masked_cells() {
        let mask = [1, 0, 1];
        let with = |masked| {
            run(
                &Gae {
                    mask: Some(&mask),
                    masked,
                    ..problem(&REWARDS, &VALUES, ROW)
                },
                1,
            )
            .0
        };
        // skip: A_0 = 1 + .5 * 8 - 2 + .25 * -5
        assert_eq!(with(Masked::Skip), [1.75, 0.0, -5.0]);
        // zero: A_1 = 0 + .5 * 8 - 0 - 1.25 = 2.75, A_0 = 1 + 0 - 2 + .25 * 2.75
        assert_eq!(with(Masked::Zero), [-0.3125, 0.0, -5.0]);
        assert_eq!(with(Masked::Read), [1.1875, 0.0, -5.0]);
    }

    #[test]
    fn in_place_is_the_same() {
        let expected = run(&problem(&REWARDS, &VALUES, ROW), 1);
        for swapped in [false, true] {
            let (mut first, mut second) = (REWARDS.to_vec(), VALUES.to_vec());
            let mut gae = problem(&REWARDS, &VALUES, ROW);
            (gae.rewards, gae.values) = (Input::Advantages, Input::Returns);
            if swapped {
                (gae.rewards, gae.values) = (Input::Returns, Input::Advantages);
                (first, second) = (second, first);
            }
            gae.run(&mut first, &mut second, 1);
            assert_eq!((first, second), expected);
        }
    }

    #[test]
    fn threads_change_nothing() {
        let cells = 1 << 18;
        let rewards: Vec<f64> = (0..cells).map(|cell| (cell as f64).sin()).collect();
        let values: Vec<f64> = (0..cells).map(|cell| (cell as f64 * 0.7).cos()).collect();
        let offsets: Vec<i64> = (0..=1024).map(|row: i64| row * row / 4).collect();
        assert_eq!(offsets[1024] as usize, cells);
        let gae = problem(&rewards, &values, Rows::Packed(&offsets));
        assert_eq!(run(&gae, 1), run(&gae, 3));
    }
}
