//! Discounted returns over rows, last position first: `G_t = r_t + gamma (1 - done_t) G_{t+1}`.
//!
//! Sums run in float64 and are rounded once when they are stored. A termination selects rather than multiplies: whatever
//! follows it, NaN included, has no effect.

use crate::advantages::gae::Masked;
use crate::rows::{Rows, share};
use crate::scan::Real;
use crate::threads::Helpers;

pub struct Discounted<'a, T> {
    pub rewards: &'a [T],
    pub terminated: Option<&'a [u8]>,
    pub mask: Option<&'a [u8]>,
    /// The return after the last cell of each row.
    pub bootstrap: Option<&'a [T]>,
    pub rows: Rows<'a>,
    pub gamma: f64,
    pub masked: Masked,
}

impl<T: Real> Discounted<'_, T> {
    /// Fills `returns`, one element for each cell of `rows`.
    pub fn run(&self, returns: &mut [T], threads: usize) {
        let helpers = Helpers::for_bytes(8 * std::mem::size_of_val(returns), threads);
        share(
            self.rows.split(returns, helpers.threads()),
            helpers,
            |part| {
                for (row, cells) in part.into_iter().rev() {
                    self.row(row, self.rows.range(row).start, cells);
                }
            },
        );
    }

    fn row(&self, row: usize, start: usize, returns: &mut [T]) {
        let mut next = self.bootstrap.map_or(0.0, |values| values[row].widen());
        for t in (0..returns.len()).rev() {
            let cell = start + t;
            let set = |flags: Option<&[u8]>| flags.is_some_and(|flags| flags[cell] != 0);
            let scored = self.mask.is_none() || set(self.mask);
            if scored || self.masked == Masked::Read {
                let reward = self.rewards[cell].widen();
                next = if set(self.terminated) {
                    reward
                } else {
                    reward + self.gamma * next
                };
            } else if self.masked == Masked::Zero {
                next *= self.gamma;
            }
            returns[t] = if scored { T::narrow(next) } else { T::ZERO };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REWARDS: [f64; 4] = [1.0, 2.0, 4.0, 8.0];

    fn run(given: Discounted<'_, f64>) -> Vec<f64> {
        let mut returns = vec![f64::NAN; given.rows.total()];
        given.run(&mut returns, 1);
        returns
    }

    fn problem() -> Discounted<'static, f64> {
        Discounted {
            rewards: &REWARDS,
            terminated: None,
            mask: None,
            bootstrap: None,
            rows: Rows::Padded { rows: 1, width: 4 },
            gamma: 0.5,
            masked: Masked::Skip,
        }
    }

    #[test]
    fn by_hand() {
        assert_eq!(run(problem()), [4.0, 6.0, 8.0, 8.0]);
        let rows = Rows::Packed(&[0, 1, 1, 4]);
        let bootstrap = Some(&[2.0, 3.0, 4.0][..]);
        let packed = Discounted {
            rows,
            bootstrap,
            ..problem()
        };
        assert_eq!(run(packed), [2.0, 6.5, 9.0, 10.0]);
    }

    #[test]
    fn masked_cells() {
        let with = |masked| {
            let mask = Some(&[1, 0, 1, 1][..]);
            run(Discounted {
                mask,
                masked,
                ..problem()
            })
        };
        assert_eq!(with(Masked::Skip), [5.0, 0.0, 8.0, 8.0]);
        assert_eq!(with(Masked::Zero), [3.0, 0.0, 8.0, 8.0]);
        assert_eq!(with(Masked::Read), [4.0, 0.0, 8.0, 8.0]);
    }

    #[test]
    fn termination_hides_what_follows() {
        let terminated = Some(&[0, 1, 0, 0][..]);
        let rewards = &[1.0, 2.0, f64::NAN, f64::INFINITY];
        let returns = run(Discounted {
            rewards,
            terminated,
            ..problem()
        });
        assert_eq!(returns[..2], [2.0, 2.0]);
        assert!(returns[2].is_nan());
    }
}
