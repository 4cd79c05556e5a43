//! Discounted returns over rows, last position first: `G_t = r_t + gamma (1 - done_t) G_{t+1}`.
//!
//! Sums run in float64 and are rounded once when they are stored. A termination selects rather than multiplies: whatever
//! follows it, NaN included, has no effect.

use super::gae::Masked;
use crate::rows::{Grid, Row};
use crate::scan::Real;

pub struct Discounted<'a, T> {
    pub rewards: &'a [T],
    /// The bootstrap is the return after the last cell of a row.
    pub grid: Grid<'a, T>,
    pub gamma: f64,
    pub masked: Masked,
}

impl<T: Real> Discounted<'_, T> {
    /// Fills `returns`, one element for each cell of the grid.
    pub fn run(&self, returns: &mut [T], threads: usize) {
        if returns.is_empty() {
            return; // of however many rows
        }
        let (bytes, rows) = (8 * size_of_val(returns), self.grid.rows);
        rows.each(returns, bytes, threads, |row, returns| {
            self.row(&self.grid.row(row), &self.rewards[rows.range(row)], returns);
        });
    }

    fn row(&self, row: &Row<'_, T>, rewards: &[T], returns: &mut [T]) {
        let mut next = row.bootstrap.map_or(0.0, T::widen);
        for cell in (0..returns.len()).rev() {
            let set = |flags: Option<&[u8]>| flags.is_some_and(|flags| flags[cell] != 0);
            let scored = row.mask.is_none() || set(row.mask);
            if scored || self.masked == Masked::Read {
                let reward = rewards[cell].widen();
                next = if set(row.terminated) {
                    reward
                } else {
                    reward + self.gamma * next
                };
            } else if self.masked == Masked::Zero {
                next *= self.gamma;
            }
            returns[cell] = if scored { T::narrow(next) } else { T::ZERO };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::Rows;

    const REWARDS: [f64; 4] = [1.0, 2.0, 4.0, 8.0];

    fn run(given: Discounted<'_, f64>) -> Vec<f64> {
        let mut returns = vec![f64::NAN; given.grid.rows.total()];
        given.run(&mut returns, 1);
        returns
    }

    const GRID: Grid<'static, f64> = Grid {
        rows: Rows::Padded { rows: 1, width: 4 },
        mask: None,
        terminated: None,
        bootstrap: None,
    };

    fn problem(grid: Grid<'_, f64>) -> Discounted<'_, f64> {
        Discounted {
            rewards: &REWARDS,
            grid,
            gamma: 0.5,
            masked: Masked::Skip,
        }
    }

    #[test]
    fn by_hand() {
        assert_eq!(run(problem(GRID)), [4.0, 6.0, 8.0, 8.0]);
        let rows = Rows::Packed(&[0, 1, 1, 4]);
        let bootstrap = Some(&[2.0, 3.0, 4.0][..]);
        let packed = problem(Grid {
            rows,
            bootstrap,
            ..GRID
        });
        assert_eq!(run(packed), [2.0, 6.5, 9.0, 10.0]);
    }

    #[test]
    fn masked_cells() {
        let with = |masked| {
            let mask = Some(&[1, 0, 1, 1][..]);
            run(Discounted {
                masked,
                ..problem(Grid { mask, ..GRID })
            })
        };
        assert_eq!(with(Masked::Skip), [5.0, 0.0, 8.0, 8.0]);
        assert_eq!(with(Masked::Zero), [3.0, 0.0, 8.0, 8.0]);
        assert_eq!(with(Masked::Read), [4.0, 0.0, 8.0, 8.0]);
    }

    #[test]
    fn termination_hides_what_follows() {
        let terminated = Some(&[0, 1, 0, 0][..]);
        let returns = run(Discounted {
            rewards: &[1.0, 2.0, f64::NAN, f64::INFINITY],
            ..problem(Grid { terminated, ..GRID })
        });
        assert_eq!(returns[..2], [2.0, 2.0]);
        assert!(returns[2].is_nan());
    }
}
