//! Batches of rows under a budget of tokens, shuffled, in steps of one batch for each rank.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::packing;
use crate::failure::{Failure, Stop, collected, filled, go_on};

/// Rows are gathered from windows of about this many steps, so that batches of alike rows stay random.
const STEPS_PER_WINDOW: u128 = 64;

/// What a batch costs: its tokens, or its cells when padded to its longest row.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    Tokens,
    Padded,
}

/// SplitMix64: small, and the same everywhere and always.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }

    /// Uniform up to 2^-64 of `below`.
    fn below(&mut self, below: usize) -> usize {
        ((u128::from(self.next()) * below as u128) >> 64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// Why there are no batches.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// There would have to be so many, which rows would have to be split for.
    Number(usize),
    Failed(Failure),
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Refused::Failed(failure)
    }
}

/// Every row once, in batches within `budget`: `order` gets the rows batch by batch, the result is where the batches
/// begin and where the last ends. Their number is a multiple of `ranks`; batch s * ranks + r is that of rank r in step s.
///
/// No length is negative or above `budget`; there are less than 2^32 rows; `order` has room for every one.
pub fn token_batches(
    lengths: &[i64],
    (budget, cost): (i64, Cost),
    ranks: usize,
    (seed, epoch): (u64, u64),
    order: &mut [i64],
    stop: Stop<'_>,
) -> Result<Vec<i64>, Refused> {
    let mut random = Random(seed);
    let mut random = Random(random.next() ^ epoch.wrapping_mul(0xD134_2543_DE82_EF95));
    let mut rows: Vec<i64> = collected((0..lengths.len()).map(|row| row as i64))?;
    random.shuffle(&mut rows);

    let tokens: u128 = lengths.iter().map(|&length| length as u128).sum();
    let per_batch = budget as u128 * lengths.len() as u128 / tokens.max(1);
    let steps = STEPS_PER_WINDOW.saturating_mul(ranks as u128);
    let window = per_batch
        .max(1)
        .saturating_mul(steps)
        .min(rows.len().max(1) as u128);
    let mut cuts: Vec<Range<usize>> = Vec::new();
    let mut begin = 0;
    for rows in rows.chunks_mut(window as usize) {
        let made = match cost {
            Cost::Padded => padded(lengths, budget, rows),
            Cost::Tokens => packed(lengths, budget, rows, stop)?,
        };
        go_on(stop)?;
        cuts.extend(made.iter().map(|cut| begin + cut.start..begin + cut.end));
        begin += rows.len();
    }
    split_until_multiple(&mut cuts, ranks)?;

    let cost_of = |cut: &Range<usize>| {
        let lengths = rows[cut.clone()].iter().map(|&row| lengths[row as usize]);
        match cost {
            Cost::Tokens => lengths.map(i128::from).sum::<i128>(),
            Cost::Padded => i128::from(lengths.max().unwrap_or(0)) * cut.len() as i128,
        }
    };
    // The batches of a step cost about the same, so that no rank waits for another.
    cuts.sort_by_cached_key(cost_of);
    let mut steps: Vec<&mut [Range<usize>]> = cuts.chunks_mut(ranks).collect();
    random.shuffle(&mut steps);
    let mut bounds = vec![0];
    let mut end = 0;
    for step in steps {
        random.shuffle(step);
        for cut in step.iter() {
            order[end..end + cut.len()].copy_from_slice(&rows[cut.clone()]);
            end += cut.len();
            bounds.push(end as i64);
        }
    }
    Ok(bounds)
}

/// Sorts the rows, the longest first, and cuts where one more would break the budget.
fn padded(lengths: &[i64], budget: i64, rows: &mut [i64]) -> Vec<Range<usize>> {
    rows.sort_by_key(|&row| Reverse(lengths[row as usize]));
    let mut cuts = Vec::new();
    let mut begin = 0;
    while begin < rows.len() {
        let longest = lengths[rows[begin] as usize].max(1);
        let end = rows.len().min(begin + (budget / longest).max(1) as usize);
        cuts.push(begin..end);
        begin = end;
    }
    cuts
}

/// Orders the rows by the bins of best-fit decreasing. Empty rows count as one token, so that they are in a bin.
fn packed(
    lengths: &[i64],
    budget: i64,
    rows: &mut [i64],
    stop: Stop<'_>,
) -> Result<Vec<Range<usize>>, Failure> {
    let costs: Vec<i64> = collected(rows.iter().map(|&row| lengths[row as usize].max(1)))?;
    let (mut order, mut offsets) = (filled(0, rows.len())?, filled(0, rows.len() + 1)?);
    let placed = packing::pack(&costs, budget, &mut order, &mut offsets, stop)?;
    let ordered: Vec<i64> = collected(order.iter().map(|&at| rows[at as usize]))?;
    rows.copy_from_slice(&ordered);
    let bounds = offsets[..=placed.bins].windows(2);
    Ok(bounds
        .map(|pair| pair[0] as usize..pair[1] as usize)
        .collect())
}

/// Halves the batches with the most rows until `ranks` divides their number, where that can be.
fn split_until_multiple(cuts: &mut Vec<Range<usize>>, ranks: usize) -> Result<(), Refused> {
    let target = cuts.len().next_multiple_of(ranks);
    if target == cuts.len() {
        return Ok(());
    }
    let mut largest: BinaryHeap<(usize, usize)> = cuts
        .iter()
        .enumerate()
        .map(|(at, cut)| (cut.len(), at))
        .collect();
    while cuts.len() < target {
        let Some((rows, at)) = largest.pop().filter(|(rows, _)| *rows > 1) else {
            return Err(Refused::Number(target));
        };
        let cut = cuts[at].clone();
        let middle = cut.start + rows / 2;
        cuts[at] = cut.start..middle;
        largest.push((rows / 2, at));
        largest.push((rows - rows / 2, cuts.len()));
        cuts.push(middle..cut.end);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_once_within_the_budget_and_a_multiple_of_the_ranks() {
        let mut random = Random(3);
        let lengths: Vec<i64> = (0..997).map(|_| random.below(101) as i64).collect();
        for cost in [Cost::Padded, Cost::Tokens] {
            for ranks in [1, 3, 8] {
                let mut order = vec![-1; lengths.len()];
                let given = (100, cost);
                let bounds =
                    token_batches(&lengths, given, ranks, (7, 2), &mut order, &|| false).unwrap();
                assert_eq!((bounds.len() - 1) % ranks, 0);
                for pair in bounds.windows(2) {
                    let rows = &order[pair[0] as usize..pair[1] as usize];
                    let of = rows.iter().map(|&row| lengths[row as usize]);
                    assert!(!rows.is_empty());
                    assert!(match cost {
                        Cost::Tokens => of.sum::<i64>() <= 100,
                        Cost::Padded => of.max().unwrap() * rows.len() as i64 <= 100,
                    });
                }
                order.sort_unstable();
                assert_eq!(order, (0..997).collect::<Vec<i64>>());
            }
        }
    }

    #[test]
    fn rows_that_cannot_be_split_are_reported() {
        let mut order = [0; 3];
        let go_on = &|| false;
        let given = (9, Cost::Tokens);
        let result = token_batches(&[9, 9, 9], given, 2, (0, 0), &mut order, go_on);
        assert_eq!(result, Err(Refused::Number(4)));
        let given = (1 << 62, Cost::Tokens);
        let result = token_batches(&[0; 3], given, 1 << 58, (0, 0), &mut order, go_on);
        assert_eq!(result, Err(Refused::Number(1 << 58)));
    }

    #[test]
    fn it_stops_where_it_is_told_to() {
        let result = token_batches(&[1], (1, Cost::Padded), 1, (0, 0), &mut [0], &|| true);
        assert_eq!(result, Err(Refused::Failed(Failure::Interrupted)));
    }

    #[test]
    fn a_row_above_the_budget_is_a_batch() {
        // Lengths are checked before, but another thread may change them meanwhile.
        assert_eq!(padded(&[3, 9], 5, &mut [0, 1]), [0..1, 1..2]);
    }

    #[test]
    fn the_shuffle_is_uniform_and_fixed() {
        let mut random = Random(1);
        let mut seen = [[0; 4]; 4];
        for _ in 0..24_000 {
            let mut items = [0, 1, 2, 3];
            random.shuffle(&mut items);
            for (place, &item) in items.iter().enumerate() {
                seen[place][item] += 1;
            }
        }
        // 6000 expected, standard deviation 67
        assert!(
            seen.iter()
                .flatten()
                .all(|&count: &i32| (count - 6000).abs() < 350)
        );
        assert_eq!(Random(0).next(), 0xE220_A839_7B1D_CDAF); // the published first output
    }
}
