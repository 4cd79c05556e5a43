//! Count, mean and sum of squared deviations of the scored cells, in float64, of blocks that stay in cache, merged by
//! Chan's formula. The blocks do not depend on the number of threads, so that neither does the result.

use crate::failure::{Failure, filled};
use crate::scan::{Real, Work, widest};
use crate::threads::{share, worth};

const BLOCK: usize = 1 << 12;
const BLOCKS_PER_TASK: usize = 16;
static ALL: [u8; BLOCK] = [1; BLOCK];
/// Sums side by side.
const LANES: usize = 8;
type Sums = [[f64; LANES]; 2];

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moments {
    pub count: usize,
    pub mean: f64,
    pub m2: f64,
}

impl Moments {
    pub const NONE: Moments = Moments {
        count: 0,
        mean: 0.0,
        m2: 0.0,
    };

    /// Those of the cells where `mask` is not 0; `mask`, where given, is as long as `x`.
    pub fn of<T: Real>(x: &[T], mask: Option<&[u8]>, threads: usize) -> Result<Self, Failure> {
        let mut blocks = filled(Self::NONE, x.len().div_ceil(BLOCK))?;
        let parts: Vec<_> = blocks
            .chunks_mut(BLOCKS_PER_TASK)
            .zip(x.chunks(BLOCK * BLOCKS_PER_TASK))
            .zip((0..).step_by(BLOCK * BLOCKS_PER_TASK))
            .collect();
        share(
            parts,
            worth(size_of_val(x), threads),
            |((found, cells), start)| {
                let mask = mask.map(|mask| &mask[start..][..cells.len()]);
                for (found, block) in found.iter_mut().zip(Self::blocks(cells, mask)) {
                    *found = block;
                }
            },
        );
        Ok(blocks.into_iter().fold(Self::NONE, Self::merge))
    }

    /// From the sums of deviations from `center` and of their squares.
    fn about(center: f64, count: usize, (first, second): (f64, f64)) -> Self {
        if count == 0 {
            return Self::NONE;
        }
        let n = count as f64;
        let m2 = second - first * first / n;
        Moments {
            count,
            mean: center + first / n,
            m2: if m2 < 0.0 { 0.0 } else { m2 }, // NaN stays
        }
    }

    /// As `of`, for cells that are in cache.
    pub fn of_row<T: Real>(x: &[T], mask: Option<&[u8]>) -> Self {
        Self::blocks(x, mask).fold(Self::NONE, Self::merge)
    }

    fn blocks<T: Real>(x: &[T], mask: Option<&[u8]>) -> impl Iterator<Item = Self> {
        x.chunks(BLOCK).enumerate().map(move |(block, cells)| {
            let mask = mask.map(|mask| &mask[block * BLOCK..][..cells.len()]);
            Self::block(cells, mask.unwrap_or(&ALL[..cells.len()]))
        })
    }

    pub fn merge(self, other: Self) -> Self {
        if self.count == 0 || other.count == 0 {
            return if self.count == 0 { other } else { self };
        }
        let count = self.count + other.count;
        let share = other.count as f64 / count as f64;
        let apart = other.mean - self.mean;
        Moments {
            count,
            mean: self.mean + apart * share,
            m2: self.m2 + other.m2 + apart * apart * share * self.count as f64,
        }
    }

    fn block<T: Real>(cells: &[T], mask: &[u8]) -> Self {
        let count = scored(mask);
        if count == 0 {
            return Self::NONE;
        }
        let n = count as f64;
        // Any scored cell would do to measure from: the more the sum of squares exceeds that of the deviations from the
        // mean, the larger is that cell's own share of the latter. A float64 mean is to be right to the last digit.
        let center = match mask.iter().position(|&flag| flag != 0) {
            Some(first) if size_of::<T>() < size_of::<f64>() => cells[first].widen(),
            _ => sums(cells, mask, 0.0).0 / n,
        };
        Moments::about(center, count, sums(cells, mask, center))
    }
}

/// The sums of the scored cells' deviations from `center`, and of their squares.
fn sums<T: Real>(cells: &[T], mask: &[u8], center: f64) -> (f64, f64) {
    let mut lanes = [[0.0; LANES]; 2];
    let (whole, rest) = cells.as_chunks::<LANES>();
    let (flags, rest_flags) = mask.as_chunks::<LANES>();
    add(rest, rest_flags, center, &mut lanes);
    let lanes = widest(Adding {
        cells: whole,
        flags,
        center,
        lanes,
    });
    (lanes[0].iter().sum(), lanes[1].iter().sum())
}

/// The cells of whole lanes.
struct Adding<'a, T> {
    cells: &'a [[T; LANES]],
    flags: &'a [[u8; LANES]],
    center: f64,
    lanes: Sums,
}

impl<T: Real> Work for Adding<'_, T> {
    type Output = Sums;

    #[inline(always)]
    fn run(self) -> Sums {
        let mut lanes = self.lanes;
        for (cells, flags) in self.cells.iter().zip(self.flags) {
            add(cells, flags, self.center, &mut lanes);
        }
        lanes
    }
}

#[inline(always)]
fn add<T: Real>(cells: &[T], mask: &[u8], center: f64, [first, second]: &mut Sums) {
    for (lane, (cell, &flag)) in cells.iter().zip(mask).enumerate() {
        let deviation = if flag != 0 {
            cell.widen() - center
        } else {
            0.0
        };
        first[lane] += deviation;
        second[lane] += deviation * deviation;
    }
}

fn scored(mask: &[u8]) -> usize {
    let few = mask
        .chunks(128)
        .map(|flags| flags.iter().map(|&flag| u8::from(flag != 0)).sum::<u8>());
    few.map(usize::from).sum()
}

/// `out = (x - center) * scale + shift` where `mask` is not 0, and 0 elsewhere; without `x`, that of `out` itself. In float64,
/// rounded once.
pub fn standardise<T: Real>(
    x: Option<&[T]>,
    mask: Option<&[u8]>,
    line: [f64; 3],
    out: &mut [T],
    threads: usize,
) {
    const TASK: usize = BLOCK * BLOCKS_PER_TASK;
    let threads = worth(2 * size_of_val(out), threads);
    let parts: Vec<_> = out.chunks_mut(TASK).zip((0..).step_by(TASK)).collect();
    share(parts, threads, |(out, start)| {
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            let inside = start + block * BLOCK..start + block * BLOCK + out.len();
            if let Some(x) = x {
                out.copy_from_slice(&x[inside.clone()]);
            }
            let mask = mask.map_or(&ALL[..out.len()], |mask| &mask[inside]);
            widest(Standardising {
                cells: out,
                mask,
                line,
            });
        }
    });
}

struct Standardising<'a, T> {
    cells: &'a mut [T],
    mask: &'a [u8],
    line: [f64; 3],
}

impl<T: Real> Work for Standardising<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let [center, scale, shift] = self.line;
        for (cell, &flag) in self.cells.iter_mut().zip(self.mask) {
            let value = (cell.widen() - center) * scale + shift;
            *cell = T::narrow(if flag != 0 { value } else { 0.0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments<T: Real>(x: &[T], mask: Option<&[u8]>, threads: usize) -> Moments {
        Moments::of(x, mask, threads).unwrap()
    }

    #[test]
    fn by_hand() {
        let x = [1.0, 2.0, 3.0, 6.0];
        let expected = |count, mean, m2| Moments { count, mean, m2 };
        assert_eq!(moments(&x, None, 1), expected(4, 3.0, 14.0));
        assert_eq!(moments(&x, Some(&[1, 0, 1, 0]), 1), expected(2, 2.0, 2.0));
        assert_eq!(
            moments(&[7.0, f64::NAN], Some(&[1, 0]), 1),
            expected(1, 7.0, 0.0)
        );
        assert_eq!(moments(&x, Some(&[0; 4]), 1), Moments::NONE);
        assert_eq!(moments::<f32>(&[], None, 1), Moments::NONE);
    }

    #[test]
    fn blocks_and_threads_change_nothing() {
        let cells = 40 * BLOCK * BLOCKS_PER_TASK + 5;
        let x: Vec<f64> = (0..cells).map(|cell| (cell % 2) as f64 + 1e8).collect();
        let mask: Vec<u8> = (0..cells).map(|cell| u8::from(cell % 5 != 4)).collect();
        let one = moments(&x, Some(&mask), 1);
        let scored = mask.iter().filter(|&&flag| flag != 0).count();
        let ones = (0..cells)
            .filter(|cell| cell % 2 == 1 && cell % 5 != 4)
            .count() as f64;
        let n = scored as f64;
        assert_eq!(one.count, scored);
        assert!((one.mean - 1e8 - ones / n).abs() < 1e-7);
        assert!((one.m2 / (ones * (n - ones) / n) - 1.0).abs() < 1e-8);
        assert_eq!(moments(&x, Some(&mask), 7), one);
    }

    #[test]
    fn standardised() {
        let mut out = [9.0; 3];
        standardise(
            Some(&[1.0, f64::NAN, 5.0]),
            Some(&[1, 0, 1]),
            [3.0, 0.5, 10.0],
            &mut out,
            1,
        );
        assert_eq!(out, [9.0, 0.0, 11.0]);
    }
}
