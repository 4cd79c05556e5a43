//! Per-token rewards: minus a KL penalty at every scored cell, and the row's score at one of them. Sums run in float64 and
//! are rounded once when they are stored; cells that are not scored are never read.

use std::sync::Mutex;

use crate::rows::Grid;
use crate::scan::Real;

/// Estimates of the KL divergence from one sample, by `x = lp_ref - lp`.
#[derive(Clone, Copy)]
pub enum Estimator {
    /// `-x`
    K1,
    /// `x^2 / 2`
    K2,
    /// `e^x - x - 1`
    K3,
}

impl Estimator {
    fn of(self, x: f64) -> f64 {
        match self {
            Estimator::K1 => -x,
            Estimator::K2 => x * x / 2.0,
            Estimator::K3 => x.exp_m1() - x,
        }
    }
}

pub struct Rewards<'a, T> {
    pub logps: &'a [T],
    pub ref_logps: &'a [T],
    /// One for each row.
    pub scores: &'a [T],
    pub grid: Grid<'a, T>,
    pub kl_coef: f64,
    pub estimator: Estimator,
    /// The score goes to the cell after the last scored one, where the row has one.
    pub after_last: bool,
}

/// Rows that have no right answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// Their score has no cell to go to.
    Empty(Vec<usize>),
    /// A scored cell holds NaN, or an infinite penalty.
    NotFinite(Vec<usize>),
}

impl<T: Real> Rewards<'_, T> {
    /// Fills `rewards`, one element for each cell of the grid.
    pub fn run(&self, rewards: &mut [T], threads: usize) -> Result<(), Refused> {
        let (bytes, rows) = (3 * size_of_val(rewards), self.grid.rows);
        let wrong = Mutex::new((Vec::new(), Vec::new()));
        rows.each(rewards, bytes, threads, |row, rewards| {
            let (placed, finite) = self.row(row, rewards);
            if let (false, Ok(mut wrong)) = (placed && finite, wrong.lock()) {
                if !placed {
                    wrong.0.push(row);
                }
                if !finite {
                    wrong.1.push(row);
                }
            }
        });
        let (mut empty, mut not_finite) = wrong.into_inner().unwrap_or_default();
        empty.sort_unstable();
        not_finite.sort_unstable();
        if !empty.is_empty() {
            return Err(Refused::Empty(empty));
        }
        if !not_finite.is_empty() {
            return Err(Refused::NotFinite(not_finite));
        }
        Ok(())
    }

    /// Whether the score found its cell, and whether every penalty is finite.
    fn row(&self, row: usize, rewards: &mut [T]) -> (bool, bool) {
        let cells = self.grid.rows.range(row);
        let (logps, ref_logps) = (&self.logps[cells.clone()], &self.ref_logps[cells]);
        let mask = self.grid.row(row).mask;
        let penalty = |cell: usize| {
            let log_ratio = ref_logps[cell].widen() - logps[cell].widen();
            -self.kl_coef * self.estimator.of(log_ratio)
        };
        let (mut last, mut finite) = (None, true);
        for cell in 0..rewards.len() {
            rewards[cell] = T::ZERO;
            if mask.is_some_and(|mask| mask[cell] == 0) {
                continue;
            }
            last = Some(cell);
            if self.kl_coef != 0.0 {
                rewards[cell] = T::narrow(penalty(cell));
                finite &= rewards[cell].widen().is_finite();
            }
        }
        let score = self.scores[row].widen();
        let Some(last) = last else {
            return (score == 0.0, finite);
        };
        if self.after_last && last + 1 < rewards.len() {
            rewards[last + 1] = T::narrow(score);
        } else {
            let penalty = if self.kl_coef == 0.0 {
                0.0
            } else {
                penalty(last)
            };
            rewards[last] = T::narrow(penalty + score);
        }
        (true, finite)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::Rows;

    const LOGPS: [f64; 4] = [-1.0, -2.0, f64::NAN, -3.0];
    const REF: [f64; 4] = [-2.0, -1.0, f64::NAN, -3.0];

    fn problem(mask: &[u8]) -> Rewards<'_, f64> {
        Rewards {
            logps: &LOGPS,
            ref_logps: &REF,
            scores: &[10.0],
            grid: Grid {
                rows: Rows::Padded { rows: 1, width: 4 },
                mask: Some(mask),
                terminated: None,
                bootstrap: None,
            },
            kl_coef: 0.5,
            estimator: Estimator::K1,
            after_last: false,
        }
    }

    fn run(given: &Rewards<'_, f64>) -> Result<Vec<f64>, Refused> {
        let mut rewards = vec![f64::NAN; 4];
        given.run(&mut rewards, 1).map(|()| rewards)
    }

    #[test]
    fn by_hand() {
        let mut given = problem(&[1, 1, 0, 0]);
        assert_eq!(run(&given).unwrap(), [-0.5, 10.5, 0.0, 0.0]);
        given.after_last = true;
        assert_eq!(run(&given).unwrap(), [-0.5, 0.5, 10.0, 0.0]);
        given.estimator = Estimator::K2;
        assert_eq!(run(&given).unwrap(), [-0.25, -0.25, 10.0, 0.0]);
        given.estimator = Estimator::K3;
        let (e, e_inverse) = (1.0_f64.exp_m1() - 1.0, (-1.0_f64).exp_m1() + 1.0);
        assert_eq!(
            run(&given).unwrap(),
            [-0.5 * e_inverse, -0.5 * e, 10.0, 0.0]
        );
    }

    #[test]
    fn a_full_row_takes_the_score_at_its_last_cell() {
        let mut given = problem(&[1, 1, 0, 1]);
        given.after_last = true;
        assert_eq!(run(&given).unwrap(), [-0.5, 0.5, 0.0, 10.0]);
    }

    #[test]
    fn refused_rows() {
        assert_eq!(run(&problem(&[0; 4])), Err(Refused::Empty(vec![0])));
        assert_eq!(run(&problem(&[1; 4])), Err(Refused::NotFinite(vec![0])));
        let scores = &[0.0];
        let silent = Rewards {
            scores,
            ..problem(&[0; 4])
        };
        assert_eq!(run(&silent).unwrap(), [0.0; 4]);
        let kl_coef = 0.0;
        let free = Rewards {
            kl_coef,
            ..problem(&[1; 4])
        };
        assert_eq!(run(&free).unwrap(), [0.0, 0.0, 0.0, 10.0]);
    }
}
