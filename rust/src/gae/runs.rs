//! Flags of a row as runs, last first.

/// Runs of equal flags, found from the end of a row.
pub struct Runs<'a> {
    flags: Option<&'a [u8]>,
    set: bool,
    start: usize,
}

impl<'a> Runs<'a> {
    /// Without flags, every cell is `otherwise`.
    pub fn new(flags: Option<&'a [u8]>, otherwise: bool, cells: usize) -> Self {
        Runs {
            flags,
            set: otherwise,
            start: if flags.is_some() { cells } else { 0 },
        }
    }

    /// Whether the cell before `end` is set, and where the run that it ends begins; `end` never grows and is above 0.
    pub fn ending_at(&mut self, end: usize) -> (bool, usize) {
        if let Some(flags) = self.flags
            && end <= self.start
        {
            self.set = flags[end - 1] != 0;
            self.start = equal_from(&flags[..end], self.set);
        }
        (self.set, self.start)
    }
}

/// Where the last flags that are all `set` begin.
fn equal_from(flags: &[u8], set: bool) -> usize {
    const LOW: u64 = u64::MAX / 255 * 0x7f;
    let wanted = if set { !LOW } else { 0 };
    let (rest, eights) = flags.as_rchunks::<8>();
    for (index, eight) in eights.iter().enumerate().rev() {
        let word = u64::from_le_bytes(*eight);
        // The highest bit of every byte that is not 0.
        let found = (((word & LOW) + LOW) | word) & !LOW;
        let equal = (found ^ wanted).leading_zeros() as usize / 8;
        if equal < 8 {
            return rest.len() + 8 * (index + 1) - equal;
        }
    }
    let equal = rest.iter().rev().take_while(|&&flag| (flag != 0) == set);
    rest.len() - equal.count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_flags() {
        for length in 0..40 {
            for border in 0..=length {
                for (before, after) in [(0, 1), (0, 255), (2, 0), (128, 0)] {
                    let mut flags = vec![before; border];
                    flags.resize(length, after);
                    let expected = if border == length && length > 0 {
                        0
                    } else {
                        border
                    };
                    let set = flags.last().is_some_and(|&flag| flag != 0);
                    assert_eq!(equal_from(&flags, set), expected, "{flags:?}");
                    assert_eq!(equal_from(&flags, !set), length);
                }
            }
        }
    }
}
