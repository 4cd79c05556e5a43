//! Rows of a batch: padded or packed, and how they are shared between threads.

use std::mem;
use std::ops::Range;
use std::sync::Mutex;

use crate::threads::{Helpers, together};

/// The least number of cells in a task, so that handing tasks out costs nothing beside them.
const CELLS_PER_TASK: usize = 1 << 15;

/// Where each row lies in a flat array.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    Padded { rows: usize, width: usize },
    Packed(&'a [i64]),
}

impl<'a> Rows<'a> {
    /// Offsets that start at 0, never decrease and end at `total`, or what is wrong with them.
    pub fn packed(name: &str, offsets: &'a [i64], total: usize) -> Result<Self, String> {
        check_offsets(name, offsets)?;
        if offsets[0] != 0 {
            return Err(format!("{name} must start at 0, got {}", offsets[0]));
        }
        let last = offsets[offsets.len() - 1];
        if last as usize != total {
            return Err(format!(
                "{name} must end at the number of tokens {total}, got {last}"
            ));
        }
        Ok(Rows::Packed(offsets))
    }

    pub fn count(&self) -> usize {
        match self {
            Rows::Padded { rows, .. } => *rows,
            Rows::Packed(offsets) => offsets.len() - 1,
        }
    }

    pub fn range(&self, row: usize) -> Range<usize> {
        match self {
            Rows::Padded { width, .. } => row * width..(row + 1) * width,
            Rows::Packed(offsets) => offsets[row] as usize..offsets[row + 1] as usize,
        }
    }

    /// The number of cells.
    pub fn total(&self) -> usize {
        match self.count() {
            0 => 0,
            rows => self.range(rows - 1).end,
        }
    }

    /// Consecutive groups of rows of about equal size, several for each thread.
    pub fn groups(&self, threads: usize) -> Vec<Range<usize>> {
        let target = if threads <= 1 {
            usize::MAX
        } else {
            (self.total() / (4 * threads)).max(CELLS_PER_TASK)
        };
        let mut groups = Vec::new();
        let (mut first, mut cells) = (0, 0);
        for row in 0..self.count() {
            cells += self.range(row).len();
            if cells >= target {
                groups.push(first..row + 1);
                (first, cells) = (row + 1, 0);
            }
        }
        if first < self.count() {
            groups.push(first..self.count());
        }
        groups
    }

    /// The cells of `output` by rows, in the groups of `groups`.
    pub fn split<'o, T>(&self, mut output: &'o mut [T], threads: usize) -> Vec<Part<'o, T>> {
        let mut cells = |row| {
            let (first, rest) = mem::take(&mut output).split_at_mut(self.range(row).len());
            output = rest;
            (row, first)
        };
        let groups = self.groups(threads).into_iter();
        groups.map(|rows| rows.map(&mut cells).collect()).collect()
    }
}

/// Some rows, each with its cells of a flat output.
pub type Part<'o, T> = Vec<(usize, &'o mut [T])>;

/// One offset more than rows, none negative, none below the one before it.
pub fn check_offsets(name: &str, offsets: &[i64]) -> Result<(), String> {
    match offsets.first() {
        None => {
            return Err(format!(
                "{name} must hold one offset more than there are rows, got none"
            ));
        }
        Some(&first) if first < 0 => {
            return Err(format!("{name} must not be negative, got {first}"));
        }
        _ => {}
    }
    match offsets.windows(2).position(|pair| pair[1] < pair[0]) {
        Some(row) => Err(format!(
            "{name} must never decrease, got {} after {} at row {row}",
            offsets[row + 1],
            offsets[row]
        )),
        None => Ok(()),
    }
}

/// `row 3`, `rows 3 and 5`, `rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more`.
pub fn name_rows(rows: &[usize]) -> String {
    const SHOWN: usize = 8;
    let texts: Vec<String> = rows.iter().take(SHOWN).map(usize::to_string).collect();
    match (texts.as_slice(), rows.len()) {
        ([one], _) => format!("row {one}"),
        (all, count) if count > SHOWN => {
            format!("rows {} and {} more", all.join(", "), count - SHOWN)
        }
        ([most @ .., last], _) => format!("rows {} and {last}", most.join(", ")),
        ([], _) => "no row".to_owned(),
    }
}

/// Runs `work` on every part, in this thread and with helpers.
pub fn share<P: Send>(parts: Vec<P>, helpers: Helpers, work: impl Fn(P) + Sync) {
    let helpers = helpers.at_most(parts.len().saturating_sub(1));
    let queue = Mutex::new(parts.into_iter());
    let take = || queue.lock().ok()?.next();
    together(helpers, &|| {
        while let Some(part) = take() {
            work(part);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn groups_cover_every_row_once_and_in_order() {
        let offsets: Vec<i64> = (0..=300).map(|row| row * row * 7).collect();
        for rows in [
            Rows::Packed(&offsets),
            Rows::Padded {
                rows: 77,
                width: 5000,
            },
            Rows::Padded { rows: 9, width: 0 },
        ] {
            for threads in [1, 2, 5] {
                let covered: Vec<usize> = rows.groups(threads).into_iter().flatten().collect();
                assert_eq!(covered, (0..rows.count()).collect::<Vec<_>>());
            }
        }
        assert!(
            Rows::Padded {
                rows: 77,
                width: 5000
            }
            .groups(2)
            .len()
                > 2
        );
    }

    #[test]
    fn split_gives_every_row_its_cells() {
        let rows = Rows::Packed(&[0, 2, 2, 5]);
        let mut cells = [0, 1, 2, 3, 4];
        let parts: Vec<_> = rows.split(&mut cells, 1).into_iter().flatten().collect();
        let seen: Vec<(usize, Vec<i32>)> =
            parts.iter().map(|(row, c)| (*row, c.to_vec())).collect();
        assert_eq!(seen, [(0, vec![0, 1]), (1, vec![]), (2, vec![2, 3, 4])]);
    }

    #[test]
    fn offsets_are_checked() {
        assert!(Rows::packed("o", &[0, 2, 2, 5], 5).is_ok());
        let message = |offsets: &[i64]| Rows::packed("o", offsets, 5).err().unwrap();
        assert_eq!(
            message(&[]),
            "o must hold one offset more than there are rows, got none"
        );
        assert_eq!(message(&[1, 5]), "o must start at 0, got 1");
        assert_eq!(message(&[-1, 5]), "o must not be negative, got -1");
        assert_eq!(
            message(&[0, 4, 3, 5]),
            "o must never decrease, got 3 after 4 at row 1"
        );
        assert_eq!(
            message(&[0, 4]),
            "o must end at the number of tokens 5, got 4"
        );
    }

    #[test]
    fn every_part_is_worked_on_once() {
        let sum = AtomicUsize::new(0);
        share(
            (0..1000).collect(),
            Helpers::for_bytes(1 << 30, 4),
            |part| {
                sum.fetch_add(part, Ordering::Relaxed);
            },
        );
        assert_eq!(sum.into_inner(), 499_500);
    }

    #[test]
    fn rows_are_named() {
        assert_eq!(name_rows(&[3]), "row 3");
        assert_eq!(name_rows(&[3, 5]), "rows 3 and 5");
        assert_eq!(
            name_rows(&(0..20).collect::<Vec<_>>()),
            "rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
        );
    }
}
