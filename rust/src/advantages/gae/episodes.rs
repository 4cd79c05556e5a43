//! Rows as episodes: parts that no recursion crosses.

use std::ops::Range;

use super::Gae;
use super::runs::bits;
use crate::scan::{BLOCK, Episode, Real};

/// The episodes of rows, last first.
pub struct Episodes<'a, T> {
    gae: &'a Gae<'a, T>,
    rows: Range<usize>,
    /// Where the cells begin that are counted from 0.
    start: usize,
    /// The row that is being cut, where there are terminations.
    cuts: Option<Cuts<'a>>,
}

impl<'a, T: Real> Episodes<'a, T> {
    pub fn of(gae: &'a Gae<'a, T>, rows: Range<usize>, start: usize) -> Self {
        Episodes {
            gae,
            rows,
            start,
            cuts: None,
        }
    }

    /// Of the row that was taken last; what follows its last cell.
    #[inline]
    fn row(&self) -> Episode {
        let (row, cells) = (self.rows.end, self.gae.rows.range(self.rows.end));
        Episode {
            row,
            cells: cells.start - self.start..cells.end - self.start,
            value: self.gae.bootstrap.map_or(0.0, |after| after[row].widen()),
            advantage: 0.0,
        }
    }
}

impl<T: Real> Iterator for Episodes<'_, T> {
    type Item = Episode;

    #[inline]
    fn next(&mut self) -> Option<Episode> {
        loop {
            if let Some((cells, terminated)) = self.cuts.as_mut().and_then(Cuts::next) {
                let mut episode = self.row();
                let place = episode.cells.start;
                episode.cells = place + cells.start..place + cells.end;
                if terminated {
                    episode.value = 0.0;
                }
                return Some(episode);
            }
            let row = self.rows.next_back()?;
            let Some(terminated) = self.gae.terminated else {
                return Some(self.row());
            };
            let cells = self.gae.rows.range(row);
            let mask = self.gae.mask.map(|mask| &mask[cells.clone()]);
            self.cuts = Some(Cuts::new(&terminated[cells], mask));
        }
    }
}

/// A row cut after each of its terminations, last part first; a termination at a masked cell is none.
struct Cuts<'a> {
    terminated: &'a [u8],
    mask: Option<&'a [u8]>,
    /// Where the part that is next ends, and whether in a termination.
    next: Option<(usize, bool)>,
    /// Where the terminations in `bits` begin, the first of them lowest; those of parts before are no longer among them.
    block: usize,
    bits: u64,
}

impl<'a> Cuts<'a> {
    fn new(terminated: &'a [u8], mask: Option<&'a [u8]>) -> Self {
        Cuts {
            terminated,
            mask,
            next: Some((terminated.len(), false)),
            block: terminated.len(),
            bits: 0,
        }
    }

    /// The cell of the last termination that was not yet found.
    fn termination(&mut self) -> Option<usize> {
        while self.bits == 0 {
            let end = self.block;
            if end == 0 {
                return None;
            }
            self.block = end.saturating_sub(BLOCK);
            self.bits = bits(&self.terminated[self.block..end]);
            if let Some(mask) = self.mask
                && self.bits != 0
            {
                self.bits &= bits(&mask[self.block..end]);
            }
        }
        let last = BLOCK - 1 - self.bits.leading_zeros() as usize;
        self.bits &= !(1 << last);
        Some(self.block + last)
    }
}

impl Iterator for Cuts<'_> {
    /// Cells, and whether the last of them is a termination.
    type Item = (Range<usize>, bool);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (end, terminated) = self.next?;
        let before = self.termination().map(|cell| cell + 1);
        self.next = before.map(|start| (start, true));
        Some((before.unwrap_or(0)..end, terminated))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_after_terminations() {
        for cells in [0, 1, 2, 63, 64, 65, 200] {
            for seed in 0..40_usize {
                let flag =
                    |t: usize, by: usize| u8::from((t * t + seed * by).is_multiple_of(3 + seed));
                let terminated: Vec<u8> = (0..cells).map(|t| 2 * flag(t, 5)).collect();
                let mask: Vec<u8> = (0..cells).map(|t| 1 - flag(t, 3)).collect();
                for (mask, by) in [(None, &vec![1; cells]), (Some(&mask[..]), &mask)] {
                    let mut end = cells;
                    let mut ends = false;
                    for (part, terminates) in Cuts::new(&terminated, mask) {
                        assert_eq!((part.end, terminates), (end, ends));
                        let inner = part.start..part.end - usize::from(ends);
                        assert!(inner.into_iter().all(|t| terminated[t] * by[t] == 0));
                        (end, ends) = (part.start, true);
                        assert!(end == 0 || terminated[end - 1] * by[end - 1] != 0);
                    }
                    assert_eq!(end, 0);
                }
            }
        }
        assert!(Cuts::new(&[0; 3], None).eq([(0..3, false)]));
    }
}
