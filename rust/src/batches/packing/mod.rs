//! Best-fit decreasing: the longest item first, each into the fullest bin that still holds it.

mod spaces;

use std::cmp::Reverse;

use crate::failure::{Failure, Stop, collected, filled, go_on, with_room};
use spaces::{Spaces, Table, Tree};

/// The largest capacity whose spaces are kept in a table, ...
const TABLED: i64 = 1 << 22;
/// ... which may be so many times the number of items: a table costs its capacity however few they are. A tree takes 11 times
/// as long for 100 000 items in bins of 4096, and 2 to 4 times for fewer or for larger bins.
const SPARSE: usize = 64;
/// Items between two questions whether to stop.
const ITEMS: usize = 1 << 14;

/// How many items were placed, in how many bins.
#[derive(Debug, PartialEq, Eq)]
pub struct Placed {
    pub items: usize,
    pub bins: usize,
}

/// Packs items of `lengths` into bins of `capacity`. `order` begins with the items bin by bin, `offsets` with the place in
/// `order` where each bin begins, and the number of items after the last. Items of length 0 belong to no bin. Ties go to
/// the lower item and to the bin that got its present space first: the bins are those of TRL's packer.
///
/// Every length lies in `0..=capacity`; there are less than 2^32 items; `order` has room for every item, `offsets` for one
/// more.
pub fn pack(
    lengths: &[i64],
    capacity: i64,
    order: &mut [i64],
    offsets: &mut [i64],
    stop: Stop<'_>,
) -> Result<Placed, Failure> {
    let sorted = descending(lengths, capacity)?;
    if tabled(capacity, lengths.len()) {
        let table = Table::new(capacity)?;
        place(&sorted, capacity, table, order, offsets, stop)
    } else {
        place(&sorted, capacity, Tree::default(), order, offsets, stop)
    }
}

fn tabled(capacity: i64, items: usize) -> bool {
    capacity <= TABLED && capacity as usize / SPARSE <= items
}

/// The items that are not empty, the longest first and the lower first among equals; and each length with the number of
/// its items, so that lengths need not be looked up again, far apart.
#[derive(Debug, PartialEq, Eq)]
struct Sorted {
    items: Vec<u32>,
    runs: Vec<(i64, usize)>,
}

fn descending(lengths: &[i64], capacity: i64) -> Result<Sorted, Failure> {
    if !tabled(capacity, lengths.len()) {
        let mut items: Vec<u32> = collected(0..lengths.len() as u32)?;
        items.retain(|&item| lengths[item as usize] > 0);
        items.sort_unstable_by_key(|&item| (Reverse(lengths[item as usize]), item));
        let equal = items.chunk_by(|&a, &b| lengths[a as usize] == lengths[b as usize]);
        let runs = equal.map(|run| (lengths[run[0] as usize], run.len()));
        let runs = runs.collect();
        return Ok(Sorted { items, runs });
    }
    let mut next = filled(0u32, capacity as usize + 1)?;
    for &length in lengths {
        next[length as usize] += 1;
    }
    next[0] = 0;
    let mut before = 0;
    let mut runs = Vec::new();
    for (length, count) in next.iter_mut().enumerate().rev() {
        if *count > 0 {
            runs.push((length as i64, *count as usize));
        }
        (*count, before) = (before, before + *count);
    }
    let mut items = filled(0u32, before as usize)?;
    for (item, &length) in lengths.iter().enumerate() {
        if length > 0 {
            let place = &mut next[length as usize];
            items[*place as usize] = item as u32;
            *place += 1;
        }
    }
    Ok(Sorted { items, runs })
}

fn place(
    sorted: &Sorted,
    capacity: i64,
    mut open: impl Spaces,
    order: &mut [i64],
    offsets: &mut [i64],
    stop: Stop<'_>,
) -> Result<Placed, Failure> {
    let mut bin_of: Vec<u32> = with_room(sorted.items.len())?;
    // The bin behind each bin in the queue of their space.
    let mut behind: Vec<u32> = with_room(sorted.items.len())?;
    // Meanwhile `offsets` counts the items of each bin, behind its first element.
    let lengths = sorted.runs.iter();
    let lengths = lengths.flat_map(|&(length, count)| std::iter::repeat_n(length, count));
    for length in lengths {
        if bin_of.len() % ITEMS == ITEMS - 1 {
            go_on(stop)?;
        }
        let (bin, space) = match open.best(length) {
            Some((space, first, last)) => {
                let rest = (first != last).then(|| (behind[first as usize], last));
                open.set(space, rest);
                (first, space)
            }
            None => {
                behind.push(u32::MAX); // none yet
                offsets[behind.len()] = 0;
                (behind.len() as u32 - 1, capacity)
            }
        };
        bin_of.push(bin);
        offsets[bin as usize + 1] += 1;
        let space = space - length;
        if space > 0 {
            let first = match open.get(space) {
                Some((first, last)) => {
                    behind[last as usize] = bin;
                    first
                }
                None => bin,
            };
            open.set(space, Some((first, bin)));
        }
    }

    // Each count becomes the place where its bin begins, which moves to where it ends as the items are written.
    let bins = behind.len();
    offsets[0] = 0;
    let mut begin = 0;
    for offset in &mut offsets[1..=bins] {
        (*offset, begin) = (begin, begin + *offset);
    }
    for (&item, &bin) in sorted.items.iter().zip(&bin_of) {
        let place = &mut offsets[bin as usize + 1];
        order[*place as usize] = i64::from(item);
        *place += 1;
    }
    Ok(Placed {
        items: sorted.items.len(),
        bins,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bins(lengths: &[i64], capacity: i64) -> Vec<Vec<i64>> {
        let (mut order, mut offsets) = (vec![-1; lengths.len()], vec![-1; lengths.len() + 1]);
        let placed = pack(lengths, capacity, &mut order, &mut offsets, &|| false).unwrap();
        assert_eq!(offsets[placed.bins] as usize, placed.items);
        (0..placed.bins)
            .map(|bin| order[offsets[bin] as usize..offsets[bin + 1] as usize].to_vec())
            .collect()
    }

    #[test]
    fn best_fit_decreasing() {
        // 7, 6 and 5 open bins; 4 fills the one with 4 left, not the one with 5; 3 fills the one with 3 left.
        assert_eq!(
            bins(&[3, 7, 5, 6, 4, 3], 10),
            vec![vec![1, 0], vec![3, 4], vec![2, 5]]
        );
    }

    #[test]
    fn ties_are_first_come_first_served() {
        assert_eq!(bins(&[6, 6, 4, 4], 10), vec![vec![0, 2], vec![1, 3]]);
    }

    #[test]
    fn empty_items_are_in_no_bin() {
        assert_eq!(bins(&[0, 2, 0], 2), vec![vec![1]]);
        assert!(bins(&[0, 0], 2).is_empty());
        assert!(bins(&[], 2).is_empty());
    }

    #[test]
    fn capacity_costs_no_memory() {
        assert_eq!(bins(&[1, i64::MAX], i64::MAX), vec![vec![1], vec![0]]);
    }

    #[test]
    fn the_table_and_the_tree_agree() {
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            (state >> 33) % below
        };
        for capacity in [1, 7, 63, 64, 65, 4095, 4096, 5000, 190_000] {
            let lengths: Vec<i64> = (0..3000).map(|_| random(capacity + 1) as i64).collect();
            let capacity = capacity as i64;
            let by_table = descending(&lengths, capacity).unwrap();
            let mut items: Vec<u32> = (0..3000).filter(|&i| lengths[i as usize] > 0).collect();
            items.sort_by_key(|&item| Reverse(lengths[item as usize]));
            assert_eq!(by_table.items, items);
            let by_tree = descending(&lengths, i64::MAX).unwrap();
            assert_eq!(by_table, by_tree);
            let mut results = Vec::new();
            for tabled in [true, false] {
                let (mut order, mut offsets) = (vec![-1; 3000], vec![-1; 3001]);
                let placed = if tabled {
                    let table = Table::new(capacity).unwrap();
                    place(
                        &by_table,
                        capacity,
                        table,
                        &mut order,
                        &mut offsets,
                        &|| false,
                    )
                } else {
                    let tree = Tree::default();
                    place(&by_tree, capacity, tree, &mut order, &mut offsets, &|| {
                        false
                    })
                };
                results.push((placed, order, offsets));
            }
            assert_eq!(results[0], results[1]);
        }
    }

    #[test]
    fn few_items_make_no_table_of_a_large_capacity() {
        assert!(!tabled(TABLED, 1));
        assert!(tabled(TABLED, TABLED as usize / SPARSE));
        assert!(!tabled(TABLED + 1, usize::MAX));
        assert!(tabled(1, 1));
    }

    #[test]
    fn it_stops_where_it_is_told_to() {
        let lengths = vec![1; 2 * ITEMS];
        let (mut order, mut offsets) = (vec![0; 2 * ITEMS], vec![0; 2 * ITEMS + 1]);
        let stopped = pack(&lengths, 4, &mut order, &mut offsets, &|| true);
        assert_eq!(stopped, Err(Failure::Interrupted));
    }
}
