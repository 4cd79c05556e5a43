//! Best-fit decreasing: the longest item first, each into the fullest bin that still holds it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

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
/// Every length lies in `0..=capacity`; `order` has room for every item, `offsets` for one more.
pub fn pack(lengths: &[i64], capacity: i64, order: &mut [i64], offsets: &mut [i64]) -> Placed {
    let mut items: Vec<usize> = (0..lengths.len())
        .filter(|&item| lengths[item] > 0)
        .collect();
    items.sort_by_key(|&item| Reverse(lengths[item]));
    let mut open: BTreeMap<i64, VecDeque<usize>> = BTreeMap::new();
    let mut bin_of = Vec::with_capacity(items.len());
    let mut counts: Vec<usize> = Vec::new();
    for &item in &items {
        let length = lengths[item];
        let (bin, space) = match open.range_mut(length..).next() {
            Some((&space, bins)) => {
                let bin = bins.pop_front().expect("a space without bins is removed");
                if bins.is_empty() {
                    open.remove(&space);
                }
                (bin, space)
            }
            None => {
                counts.push(0);
                (counts.len() - 1, capacity)
            }
        };
        bin_of.push(bin);
        counts[bin] += 1;
        if space > length {
            open.entry(space - length).or_default().push_back(bin);
        }
    }

    offsets[0] = 0;
    for (bin, &count) in counts.iter().enumerate() {
        offsets[bin + 1] = offsets[bin] + count as i64;
    }
    let mut next: Vec<usize> = offsets[..counts.len()]
        .iter()
        .map(|&offset| offset as usize)
        .collect();
    for (&item, &bin) in items.iter().zip(&bin_of) {
        order[next[bin]] = item as i64;
        next[bin] += 1;
    }
    Placed {
        items: items.len(),
        bins: counts.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bins(lengths: &[i64], capacity: i64) -> Vec<Vec<i64>> {
        let (mut order, mut offsets) = (vec![-1; lengths.len()], vec![-1; lengths.len() + 1]);
        let placed = pack(lengths, capacity, &mut order, &mut offsets);
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
}
