//! Padding-free batches: the kept tokens of all rows behind each other, with their positions and where they stood.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ids::Ids;
use crate::rows::{Rows, Split};

/// The flags of a padded batch, as they are stored.
#[derive(Clone, Copy)]
pub enum Mask<'a> {
    U8(&'a [u8]),
    I64(&'a [i64]),
}

/// A flag of 0 or 1.
trait Flag: Copy + Sync {
    fn wide(self) -> i64;
}

impl Flag for u8 {
    fn wide(self) -> i64 {
        i64::from(self)
    }
}

impl Flag for i64 {
    fn wide(self) -> i64 {
        self
    }
}

/// The number of kept tokens of each row, into `counts`; or the row, position and value of a flag that is not 0 or 1.
pub fn count(mask: Mask<'_>, width: usize, counts: &mut [i64]) -> Result<(), (usize, usize, i64)> {
    match mask {
        Mask::U8(flags) => count_flags(flags, width, counts),
        Mask::I64(flags) => count_flags(flags, width, counts),
    }
}

fn count_flags<M: Flag>(
    flags: &[M],
    width: usize,
    counts: &mut [i64],
) -> Result<(), (usize, usize, i64)> {
    for (row, count) in counts.iter_mut().enumerate() {
        let flags = &flags[row * width..(row + 1) * width];
        let (sum, seen) = flags.iter().fold((0, 0), |(sum, seen), flag| {
            (sum + (flag.wide() & 1), seen | flag.wide())
        });
        if seen & !1 != 0 {
            let wrong = flags.iter().position(|flag| flag.wide() & !1 != 0);
            let position = wrong.unwrap_or_default();
            return Err((row, position, flags[position].wide()));
        }
        *count = sum;
    }
    Ok(())
}

/// Where the kept tokens are written, each output [N].
pub struct Flat<'o> {
    pub ids: &'o mut [i64],
    pub positions: &'o mut [i64],
    pub indices: &'o mut [i64],
}

/// Where tokens come from: padded rows and their flags, or rows behind each other.
#[derive(Clone, Copy)]
pub enum Tokens<'a> {
    Padded(Ids<'a>, Mask<'a>),
    Ragged(Ids<'a>),
}

/// Writes the kept tokens of every row, their positions among them, and the cells of a [B, `width`] batch where they stand.
/// `bounds` [B + 1] are those of the kept tokens. Whether an id among them is negative.
pub fn flatten(
    tokens: Tokens<'_>,
    width: usize,
    bounds: &[i64],
    out: Flat<'_>,
    threads: usize,
) -> Result<bool, String> {
    let total = out.ids.len();
    let rows = Rows::packed("bounds", bounds, total)?;
    let negative = AtomicBool::new(false);
    rows.each(out, 32 * total, threads, |row, out| {
        if flatten_row(tokens, row, rows.range(row), width, out) {
            negative.store(true, Ordering::Relaxed);
        }
    });
    Ok(negative.into_inner())
}

fn flatten_row(
    tokens: Tokens<'_>,
    row: usize,
    range: Range<usize>,
    width: usize,
    out: Flat<'_>,
) -> bool {
    match tokens {
        Tokens::Padded(ids, Mask::U8(flags)) => kept(row, width, ids, flags, out),
        Tokens::Padded(ids, Mask::I64(flags)) => kept(row, width, ids, flags, out),
        Tokens::Ragged(ids) => run(ids, range, row * width, 0, out),
    }
}

impl Split for Flat<'_> {
    fn split(self, _rows: usize, cells: usize) -> (Self, Self) {
        let [
            (ids, later_ids),
            (positions, later_positions),
            (indices, later_indices),
        ] = [self.ids, self.positions, self.indices].map(|output| output.split_at_mut(cells));
        (
            Flat {
                ids,
                positions,
                indices,
            },
            Flat {
                ids: later_ids,
                positions: later_positions,
                indices: later_indices,
            },
        )
    }
}

/// A run of tokens that stand in cells from `cell` on; whether one is negative.
fn run(ids: Ids<'_>, range: Range<usize>, cell: usize, position: usize, out: Flat<'_>) -> bool {
    count_up(position as i64, out.positions);
    count_up(cell as i64, out.indices);
    ids.copy(range, out.ids)
}

fn count_up(first: i64, out: &mut [i64]) {
    for (at, number) in out.iter_mut().enumerate() {
        *number = first + at as i64;
    }
}

fn kept<M: Flag>(row: usize, width: usize, ids: Ids<'_>, flags: &[M], out: Flat<'_>) -> bool {
    let start = row * width;
    let flags = &flags[start..start + width];
    let (mut at, mut column) = (0, 0);
    let (mut out, mut negative) = (out, false);
    while !out.ids.is_empty() {
        let skipped = flags[column..].iter().position(|flag| flag.wide() == 1);
        let begin = column + skipped.unwrap_or_default();
        let rest = &flags[begin..];
        let length = rest
            .iter()
            .position(|flag| flag.wide() == 0)
            .unwrap_or(rest.len())
            .min(out.ids.len())
            .max(1);
        let cells = start + begin..start + begin + length;
        let (own, rest) = out.split(0, length);
        negative |= run(ids, cells, start + begin, at, own);
        out = rest;
        (at, column) = (at + length, begin + length);
    }
    negative
}

/// The row and position of the first negative id among kept tokens.
pub fn negative(ids: &[i64], bounds: &[i64]) -> Option<(usize, usize)> {
    let at = ids.iter().position(|&id| id < 0)?;
    let row = bounds.partition_point(|&bound| bound as usize <= at) - 1;
    Some((row, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(tokens: Tokens<'_>, width: usize, bounds: &[i64]) -> [Vec<i64>; 3] {
        let total = bounds[bounds.len() - 1] as usize;
        let mut out = [(); 3].map(|()| vec![-7; total]);
        let [ids, positions, indices] = &mut out;
        let into = Flat {
            ids,
            positions,
            indices,
        };
        flatten(tokens, width, bounds, into, 2).unwrap();
        out
    }

    #[test]
    fn padded_rows_with_padding_anywhere() {
        let ids = [0, 1, 2, 3, 0, 5, 0, 7, 0, 0, 0, 0];
        let flags = [0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0];
        let mut counts = [0; 3];
        count(Mask::I64(&flags), 4, &mut counts).unwrap();
        assert_eq!(counts, [3, 2, 0]);
        let expected = [
            vec![1, 2, 3, 5, 7],
            vec![0, 1, 2, 0, 1],
            vec![1, 2, 3, 5, 7],
        ];
        let bounds = [0, 3, 5, 5];
        assert_eq!(
            flat(
                Tokens::Padded(Ids::I64(&ids), Mask::I64(&flags)),
                4,
                &bounds
            ),
            expected
        );
        let bytes = flags.map(|flag| flag as u8);
        assert_eq!(
            flat(Tokens::Padded(Ids::I64(&ids), Mask::U8(&bytes)), 4, &bounds),
            expected
        );
    }

    #[test]
    fn ragged_rows() {
        let [ids, positions, indices] =
            flat(Tokens::Ragged(Ids::I32(&[4, 5, 6])), 2, &[0, 2, 2, 3]);
        assert_eq!(ids, [4, 5, 6]);
        assert_eq!(positions, [0, 1, 0]);
        assert_eq!(indices, [0, 1, 4]);
    }

    #[test]
    fn wrong_flags_and_ids_are_found() {
        let wrong = count(Mask::I64(&[0, 1, 1, 2]), 2, &mut [0; 2]);
        assert_eq!(wrong, Err((1, 1, 2)));
        assert_eq!(count(Mask::I64(&[0, -1]), 2, &mut [0; 1]), Err((0, 1, -1)));
        assert_eq!(negative(&[1, 2, -3], &[0, 1, 1, 3]), Some((2, 2)));
        assert_eq!(negative(&[1, 2], &[0, 2]), None);
    }
}
