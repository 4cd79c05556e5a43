//! Advantages of whole completions relative to the other completions of their group, in float64, rounded once.
//!
//! A NaN reward is that of a completion that could not be scored: it belongs to no mean and its advantage is 0. Rewards are
//! summed as their differences from the group's first reward, so that equal rewards give exactly 0.

use std::collections::HashMap;
use std::iter::repeat;

use crate::failure::{Failure, collected, filled, with_room};
use crate::scan::Real;

/// Which rows belong together.
pub enum Groups<'a> {
    Ids(&'a [i64]),
    /// Each so many consecutive rows.
    Size(usize),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `(R - mean) / (std of the group + 1e-4)`.
    PerGroup,
    /// `(R - mean) / (std of all rewards + 1e-4)`.
    PerBatch,
    /// `R - mean`.
    Centered,
    /// `R - mean of the others`.
    LeaveOneOut,
    /// `R - mean`, divided by the root of its own variance over the batch `+ 1e-8`.
    Whitened,
}

/// What a reward's magnitude must not exceed, so that no square overflows.
pub const LIMIT: f64 = 1e150;
/// The number of a group before its first row.
const UNSEEN: u32 = u32::MAX;
/// Added to a standard deviation.
const STD_EPSILON: f64 = 1e-4;
/// Added to a variance.
const VARIANCE_EPSILON: f64 = 1e-8;

#[derive(Clone, Copy, Default)]
struct Group {
    count: f64,
    /// The reward that the others are measured from.
    origin: f64,
    /// The mean, measured from the origin.
    mean: f64,
    m2: f64,
}

impl Group {
    fn std(&self) -> f64 {
        if self.count > 1.0 {
            (self.m2 / (self.count - 1.0)).sqrt()
        } else {
            0.0
        }
    }

    fn deviation(&self, reward: f64) -> f64 {
        (reward - self.origin) - self.mean
    }
}

/// Fills `advantages`, one for each reward.
pub fn advantages<T: Real>(
    rewards: &[T],
    groups: &Groups<'_>,
    method: Method,
    advantages: &mut [T],
) -> Result<(), Failure> {
    let (index, count) = groups.index(rewards.len())?;
    let found = moments(rewards, index.iter().copied(), count)?;
    let batch = match method {
        Method::PerBatch => moments(rewards, repeat(0), 1)?[0].std(),
        Method::Whitened => {
            let scored: f64 = found.iter().map(|group| group.count).sum();
            let m2: f64 = found.iter().map(|group| group.m2).sum();
            // The deviations from the groups' means sum to 0: their squares are the batch's variance.
            (m2 / (scored - 1.0).max(1.0) + VARIANCE_EPSILON).sqrt()
        }
        _ => 0.0,
    };
    let scale = |group: &Group| match method {
        Method::PerGroup => (group.std() + STD_EPSILON).recip(),
        Method::PerBatch => (batch + STD_EPSILON).recip(),
        Method::Centered => 1.0,
        Method::LeaveOneOut => group.count / (group.count - 1.0).max(1.0),
        Method::Whitened => batch.recip(),
    };
    let scales: Vec<f64> = collected(found.iter().map(scale))?;
    for ((advantage, reward), &group) in advantages.iter_mut().zip(rewards).zip(&index) {
        let reward = reward.widen();
        *advantage = if reward.is_nan() {
            T::ZERO
        } else {
            T::narrow(found[group as usize].deviation(reward) * scales[group as usize])
        };
    }
    Ok(())
}

fn moments<T: Real>(
    rewards: &[T],
    index: impl Iterator<Item = u32> + Clone,
    count: usize,
) -> Result<Vec<Group>, Failure> {
    let mut groups = filled(Group::default(), count)?;
    let rows = || {
        let rewards = rewards.iter().map(|reward| reward.widen());
        rewards
            .zip(index.clone())
            .filter(|(reward, _)| !reward.is_nan())
            .map(|(reward, group)| (reward, group as usize))
    };
    for (reward, group) in rows() {
        let group = &mut groups[group];
        if group.count == 0.0 {
            group.origin = reward;
        }
        group.count += 1.0;
        group.mean += reward - group.origin;
    }
    for group in &mut groups {
        group.mean /= group.count.max(1.0);
    }
    for (reward, group) in rows() {
        let deviation = groups[group].deviation(reward);
        groups[group].m2 += deviation * deviation;
    }
    Ok(groups)
}

impl Groups<'_> {
    /// The group of each row, numbered in the order of their first rows, and how many groups there are: what the ids are
    /// called changes no digit of a result.
    fn index(&self, rows: usize) -> Result<(Vec<u32>, usize), Failure> {
        match self {
            Groups::Size(size) => {
                let index = collected((0..rows).map(|row| (row / size) as u32))?;
                Ok((index, rows.div_ceil(*size)))
            }
            Groups::Ids(ids) => {
                let (low, high) = ids.iter().fold((i64::MAX, i64::MIN), |(low, high), &id| {
                    (low.min(id), high.max(id))
                });
                let mut count = 0;
                let mut number = |known: &mut u32| {
                    if *known == UNSEEN {
                        *known = count;
                        count += 1;
                    }
                    *known
                };
                // Ids that lie close together are looked up in a table of all between: no hashing.
                let index = if low <= high && high.abs_diff(low) < 4 * rows as u64 {
                    let mut table = filled(UNSEEN, (high - low) as usize + 1)?;
                    let entry = |&id: &i64| number(&mut table[(id - low) as usize]);
                    collected(ids.iter().map(entry))?
                } else {
                    let mut known = HashMap::new();
                    let mut index = with_room(rows)?;
                    for &id in *ids {
                        known.try_reserve(1)?;
                        index.push(number(known.entry(id).or_insert(UNSEEN)));
                    }
                    index
                };
                Ok((index, count as usize))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REWARDS: [f64; 6] = [1.0, 10.0, 3.0, f64::NAN, 2.0, 7.0];
    // Groups {1, 3, 2} and {10} and, with its NaN, {7}.
    const IDS: [i64; 6] = [5, -9, 5, 8, 5, 8];

    fn run(groups: &Groups<'_>, method: Method) -> Vec<f64> {
        let mut found = vec![f64::NAN; REWARDS.len()];
        advantages(&REWARDS, groups, method, &mut found).unwrap();
        found
    }

    #[test]
    fn by_hand() {
        let ids = Groups::Ids(&IDS);
        assert_eq!(run(&ids, Method::Centered), [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
        assert_eq!(
            run(&ids, Method::LeaveOneOut),
            [-1.5, 0.0, 1.5, 0.0, 0.0, 0.0]
        );
        let a = 1.0001_f64.recip();
        assert_eq!(run(&ids, Method::PerGroup), [-a, 0.0, a, 0.0, 0.0, 0.0]);
        let b = (2.0_f64 / 4.0 + 1e-8).sqrt().recip();
        assert_eq!(run(&ids, Method::Whitened), [-b, 0.0, b, 0.0, 0.0, 0.0]);
        // All five: mean 4.6, squares 12.96 + 29.16 + 2.56 + 6.76 + 5.76 = 57.2
        let c = ((57.2_f64 / 4.0).sqrt() + 1e-4).recip();
        let found = run(&ids, Method::PerBatch);
        assert!((found[0] + c).abs() < 1e-15 && (found[2] - c).abs() < 1e-15);
    }

    #[test]
    fn sizes_are_consecutive_ids() {
        for method in [Method::Centered, Method::PerGroup, Method::Whitened] {
            let ids = Groups::Ids(&[0, 0, 0, 1, 1, 1]);
            assert_eq!(run(&Groups::Size(3), method), run(&ids, method));
        }
    }

    #[test]
    fn ids_of_any_values() {
        let far = [7, i64::MIN, 7, i64::MAX, 7, i64::MAX];
        assert_eq!(
            run(&Groups::Ids(&far), Method::Centered),
            run(&Groups::Ids(&IDS), Method::Centered)
        );
        assert_eq!(Groups::Ids(&[]).index(0), Ok((vec![], 0)));
    }

    #[test]
    fn names_do_not_matter() {
        for ids in [[3, 1, 3, 2, 2], [-9, 9, -9, 0, 0], [0, i64::MAX, 0, 5, 5]] {
            assert_eq!(Groups::Ids(&ids).index(5), Ok((vec![0, 1, 0, 2, 2], 3)));
        }
    }

    #[test]
    fn equal_rewards_give_exactly_0() {
        let mut found = [1.0; 7];
        advantages(&[0.1; 7], &Groups::Size(7), Method::PerGroup, &mut found).unwrap();
        assert_eq!(found, [0.0; 7]);
    }
}
