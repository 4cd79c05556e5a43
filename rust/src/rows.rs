//! Rows of a batch: padded or packed, what is known of their cells, and how they are shared between threads.

use std::ops::Range;

use crate::threads::{share, worth};

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
        if usize::try_from(last) != Ok(total) {
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
    fn groups(&self, threads: usize) -> Vec<Range<usize>> {
        let target = match threads {
            1 => usize::MAX,
            _ => (self.total() / (4 * threads)).max(CELLS_PER_TASK),
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

    /// Calls `work` with every row, the last first, and its part of the outputs, on as many threads as are worth while for
    /// `bytes` of memory traffic.
    pub fn each<O: Split + Send>(
        &self,
        outputs: O,
        bytes: usize,
        threads: usize,
        work: impl Fn(usize, O) + Sync,
    ) {
        let threads = worth(bytes, threads);
        let (mut parts, mut outputs) = (Vec::new(), outputs);
        for rows in self.groups(threads) {
            let cells = self.range(rows.end - 1).end - self.range(rows.start).start;
            let (part, rest) = outputs.split(rows.len(), cells);
            parts.push((rows, part));
            outputs = rest;
        }
        share(parts, threads, |(rows, mut part)| {
            let first = self.range(rows.start).start;
            for row in rows.clone().rev() {
                let (rest, own) = part.split(row - rows.start, self.range(row).start - first);
                work(row, own);
                part = rest;
            }
        });
    }
}

/// Outputs that can be cut between rows.
pub trait Split: Sized {
    /// The part of the first rows, which have so many cells, and that of the others.
    fn split(self, rows: usize, cells: usize) -> (Self, Self);
}

/// An element for each cell.
impl<T> Split for &mut [T] {
    fn split(self, _rows: usize, cells: usize) -> (Self, Self) {
        self.split_at_mut(cells)
    }
}

/// An element for each row.
pub struct PerRow<'o, T>(pub &'o mut [T]);

impl<T> Split for PerRow<'_, T> {
    fn split(self, rows: usize, _cells: usize) -> (Self, Self) {
        let (first, others) = self.0.split_at_mut(rows);
        (PerRow(first), PerRow(others))
    }
}

impl<O: Split> Split for Option<O> {
    fn split(self, rows: usize, cells: usize) -> (Self, Self) {
        self.map(|output| output.split(rows, cells)).unzip()
    }
}

impl<A: Split, B: Split> Split for (A, B) {
    fn split(self, rows: usize, cells: usize) -> (Self, Self) {
        let (a, others_a) = self.0.split(rows, cells);
        let (b, others_b) = self.1.split(rows, cells);
        ((a, b), (others_a, others_b))
    }
}

/// Cells in rows, and what is known of them.
#[derive(Clone, Copy)]
pub struct Grid<'a, T> {
    pub rows: Rows<'a>,
    /// Whether a cell is scored; without it, all are.
    pub mask: Option<&'a [u8]>,
    /// Whether nothing after a cell has an effect on it.
    pub terminated: Option<&'a [u8]>,
    /// What follows the last cell of each row, 0 without it.
    pub bootstrap: Option<&'a [T]>,
}

/// A row of a grid.
#[derive(Clone, Copy)]
pub struct Row<'a, T> {
    pub mask: Option<&'a [u8]>,
    pub terminated: Option<&'a [u8]>,
    pub bootstrap: Option<T>,
}

impl<'a, T: Copy> Grid<'a, T> {
    pub fn row(&self, row: usize) -> Row<'a, T> {
        let cells = self.rows.range(row);
        let flags = |flags: &'a [u8]| &flags[cells.clone()];
        Row {
            mask: self.mask.map(flags),
            terminated: self.terminated.map(flags),
            bootstrap: self.bootstrap.map(|values| values[row]),
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn every_row_is_given_its_part_of_the_outputs() {
        let rows = Rows::Packed(&[0, 2, 2, 5]);
        let (mut cells, mut of_rows) = ([0, 1, 2, 3, 4], [0; 3]);
        let outputs = (
            &mut cells[..],
            (Some(PerRow(&mut of_rows)), None::<&mut [u8]>),
        );
        rows.each(outputs, 0, 1, |row, (cells, (of_row, nothing))| {
            assert!(nothing.is_none());
            of_row.unwrap().0[0] = 10 * row + cells.len();
            cells.iter_mut().for_each(|cell| *cell += 100 * row);
        });
        assert_eq!(cells, [0, 1, 202, 203, 204]);
        assert_eq!(of_rows, [2, 10, 23]);
    }

    #[test]
    fn no_rows_are_no_work() {
        let none: &mut [u8] = &mut [];
        Rows::Packed(&[0]).each(none, 0, 1, |_, _| unreachable!());
    }

    #[test]
    fn threads_share_all_rows() {
        let rows = Rows::Padded {
            rows: 77,
            width: 5000,
        };
        let mut cells = vec![0; rows.total()];
        rows.each(&mut cells[..], usize::MAX, 3, |row, cells| cells.fill(row));
        assert!((0..cells.len()).all(|cell| cells[cell] == cell / 5000));
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
    fn rows_are_named() {
        assert_eq!(name_rows(&[3]), "row 3");
        assert_eq!(name_rows(&[3, 5]), "rows 3 and 5");
        assert_eq!(
            name_rows(&(0..20).collect::<Vec<_>>()),
            "rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
        );
    }
}
