//! Token ids as columns store them: int32 or int64.

use std::ops::Range;

#[derive(Clone, Copy)]
pub enum Ids<'a> {
    I32(&'a [i32]),
    I64(&'a [i64]),
}

impl Ids<'_> {
    pub fn count(&self) -> usize {
        match self {
            Ids::I32(ids) => ids.len(),
            Ids::I64(ids) => ids.len(),
        }
    }

    /// Copies a range into as many cells; whether an id among them is negative.
    pub fn copy(&self, range: Range<usize>, out: &mut [i64]) -> bool {
        match self {
            Ids::I32(ids) => copy(&ids[range], out),
            Ids::I64(ids) => copy(&ids[range], out),
        }
    }
}

fn copy<T: Copy + Into<i64>>(ids: &[T], out: &mut [i64]) -> bool {
    let mut seen = 0;
    for (to, &from) in out.iter_mut().zip(ids) {
        *to = from.into();
        seen |= *to;
    }
    seen < 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copied_and_checked() {
        let mut out = [0; 3];
        assert!(!Ids::I32(&[1, 2, 3, -4]).copy(0..3, &mut out));
        assert_eq!(out, [1, 2, 3]);
        assert!(Ids::I64(&[1, -2, 3, 4]).copy(1..4, &mut out));
        assert_eq!(out, [-2, 3, 4]);
    }
}
