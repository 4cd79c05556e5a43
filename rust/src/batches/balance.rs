//! Karmarkar-Karp over k parts: the largest differencing method, with the tie-breaks of verl's `karmarkar_karp`.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::failure::{Failure, Stop, collected, filled, go_on};

const END: u32 = u32::MAX;
/// Merges between two questions whether to stop.
const MERGES: usize = 1 << 10;

/// Some items that go to one part: a list linked through `next`.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Set {
    sum: i64,
    count: u32,
    first: u32,
    last: u32,
}

impl Set {
    fn one(sum: i64, item: u32) -> Self {
        Set {
            sum,
            count: 1,
            first: item,
            last: item,
        }
    }
}

impl Set {
    /// Of two sets the larger sum, then the more items, then the later first item is greater.
    fn key(&self) -> (i64, u32, u32) {
        (self.sum, self.count, self.first)
    }
}

/// A division of some items into k parts, the largest first; those beyond the vector are empty.
struct State {
    /// The spread of the parts, then the largest of them: the greatest state is merged first. No two are equal.
    key: (i64, (i64, u32, u32)),
    sets: Vec<Set>,
}

impl State {
    fn new(mut sets: Vec<Set>, parts: usize) -> Self {
        sets.sort_unstable_by_key(|set| Reverse(set.key()));
        let least = if sets.len() == parts {
            sets[parts - 1].sum
        } else {
            0
        };
        State {
            key: (sets[0].sum - least, sets[0].key()),
            sets,
        }
    }

    /// The largest part of one with the smallest of the other, and so on.
    fn merge(self, other: &State, parts: usize, next: &mut [u32]) -> State {
        let mut sets = self.sets;
        let filled = sets.len();
        sets.reserve_exact(other.sets.len().min(parts - filled));
        for (part, set) in other.sets.iter().enumerate().rev() {
            match parts - 1 - part {
                at if at < filled => {
                    let into = &mut sets[at];
                    next[into.last as usize] = set.first;
                    into.sum += set.sum;
                    into.count += set.count;
                    into.last = set.last;
                }
                _ => sets.push(*set),
            }
        }
        State::new(sets, parts)
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Eq for State {}

impl Ord for State {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key.cmp(&other.key)
    }
}

impl PartialOrd for State {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The part of every item, into `part_of`. There are at least `parts` items, `parts` divides their number where `equal`
/// parts are asked for, none is negative and their sum fits.
pub fn balance(
    lengths: &[i64],
    parts: usize,
    equal: bool,
    part_of: &mut [i64],
    stop: Stop<'_>,
) -> Result<(), Failure> {
    let mut items: Vec<(i64, u32)> = collected(
        lengths
            .iter()
            .zip(0..lengths.len() as u32)
            .map(|(&length, item)| (length, item)),
    )?;
    items.sort_unstable();
    let each = if equal { parts } else { 1 };
    let states = items.chunks(each).map(|items| {
        let sets = items.iter().map(|&(length, item)| Set::one(length, item));
        State::new(sets.collect(), parts)
    });
    // The first states wait in order, so that only what was merged is in the heap.
    let mut first: Vec<State> = collected(states)?;
    first.sort_unstable();
    let mut merged = BinaryHeap::new();
    let mut next = filled(END, lengths.len())?;
    for merges in 1.. {
        let Some(state) = pop(&mut first, &mut merged) else {
            break;
        };
        let Some(second) = pop(&mut first, &mut merged) else {
            assign(&state, &next, part_of);
            break;
        };
        merged.push(state.merge(&second, parts, &mut next));
        if merges % MERGES == 0 {
            go_on(stop)?;
        }
    }
    Ok(())
}

/// Writes the part of every item of the last state.
fn assign(state: &State, next: &[u32], part_of: &mut [i64]) {
    for (part, set) in state.sets.iter().enumerate() {
        let mut item = set.first;
        while item != END {
            part_of[item as usize] = part as i64;
            item = next[item as usize];
        }
    }
}

/// The greatest state of both.
fn pop(first: &mut Vec<State>, merged: &mut BinaryHeap<State>) -> Option<State> {
    if first.last() > merged.peek() {
        first.pop()
    } else {
        merged.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(lengths: &[i64], parts: usize, equal: bool) -> Vec<i64> {
        let mut part_of = vec![-1; lengths.len()];
        balance(lengths, parts, equal, &mut part_of, &|| false).unwrap();
        part_of
    }

    #[test]
    fn the_textbook_example() {
        // 8 - 7 = 1, 6 - 5 = 1, 4 - 1 = 3, 3 - 1 = 2: {8, 6} and {7, 5, 4}
        assert_eq!(parts(&[8, 7, 6, 5, 4], 2, false), [1, 0, 1, 0, 0]);
    }

    #[test]
    fn equal_parts_hold_as_many_items() {
        let part_of = parts(&[100, 1, 1, 1, 1, 1], 2, true);
        assert_eq!(part_of.iter().filter(|&&part| part == 0).count(), 3);
    }

    #[test]
    fn as_many_parts_as_items() {
        let mut part_of = parts(&[5, 0, 0], 3, false);
        part_of.sort_unstable();
        assert_eq!(part_of, [0, 1, 2]);
        assert_eq!(parts(&[5, 1], 1, false), [0, 0]);
        assert!(parts(&[], 1, false).is_empty());
    }
}
