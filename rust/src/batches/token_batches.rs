//! Batches of rows under a budget of tokens, shuffled, in steps of one batch for each rank.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use crate::batches::packing;

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

/// Every row once, in batches within `budget`: `order` gets the rows batch by batch, the result is where the batches
/// begin and where the last ends. Their number is a multiple of `ranks`; batch s * ranks + r is that of rank r in step s.
/// Or how many batches there would have to be, when rows would have to be split for that.
///
/// No length is negative or above `budget`; there are less than 2^32 rows; `order` has room for every one.
pub fn batches(
    lengths: &[i64],
    (budget, cost): (i64, Cost),
    ranks: usize,
    (seed, epoch): (u64, u64),
    order: &mut [i64],
) -> Result<Vec<i64>, usize> {
    let mut random = Random(seed);
    let mut random = Random(random.next() ^ epoch.wrapping_mul(0xD134_2543_DE82_EF95));
    let mut rows: Vec<i64> = (0..lengths.len() as i64).collect();
    random.shuffle(&mut rows);

    let tokens: u128 = lengths.iter().map(|&length| length as u128).sum();
    let per_batch = budget as u128 * lengths.len() as u128 / tokens.max(1);
    let window =
        (per_batch.max(1) * STEPS_PER_WINDOW * ranks as u128).min(rows.len().max(1) as u128);
    let mut cuts: Vec<Range<usize>> = Vec::new();
    let mut begin = 0;
    for rows in rows.chunks_mut(window as usize) {
        let made = match cost {
            Cost::Padded => padded(lengths, budget, rows),
            Cost::Tokens => filled(lengths, budget, rows),
        };
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
        let end = rows.len().min(begin + (budget / longest) as usize);
        cuts.push(begin..end);
        begin = end;
    }
    cuts
}

/// Orders the rows by the bins of best-fit decreasing. Empty rows count as one token, so that they are in a bin.
fn filled(lengths: &[i64], budget: i64, rows: &mut [i64]) -> Vec<Range<usize>> {
    let costs: Vec<i64> = rows
        .iter()
        .map(|&row| lengths[row as usize].max(1))
        .collect();
    let (mut order, mut offsets) = (vec![0; rows.len()], vec![0; rows.len() + 1]);
    let placed = packing::pack(&costs, budget, &mut order, &mut offsets);
    let packed: Vec<i64> = order.iter().map(|&at| rows[at as usize]).collect();
    rows.copy_from_slice(&packed);
    let bounds = offsets[..=placed.bins].windows(2);
    bounds
        .map(|pair| pair[0] as usize..pair[1] as usize)
        .collect()
}

/// Halves the batches with the most rows until `ranks` divides their number, or returns the number that it cannot reach.
fn split_until_multiple(cuts: &mut Vec<Range<usize>>, ranks: usize) -> Result<(), usize> {
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
            return Err(target);
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
                let bounds = batches(&lengths, (100, cost), ranks, (7, 2), &mut order).unwrap();
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
        let result = batches(&[9, 9, 9], (9, Cost::Tokens), 2, (0, 0), &mut order);
        assert_eq!(result, Err(4));
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
