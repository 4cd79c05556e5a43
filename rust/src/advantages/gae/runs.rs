//! Flags of a row as runs, last first.

/// Flags that are looked at together.
const BLOCK: usize = 64;

/// Runs of equal flags, found from the end of a row.
pub struct Runs<'a> {
    flags: Option<&'a [u8]>,
    set: bool,
    start: usize,
    /// Where the flags in `bits` begin, the first of them lowest.
    block: usize,
    bits: u64,
}

impl<'a> Runs<'a> {
    /// Without flags, every cell is `otherwise`.
    pub fn new(flags: Option<&'a [u8]>, otherwise: bool, cells: usize) -> Self {
        let start = if flags.is_some() { cells } else { 0 };
        Runs {
            flags,
            set: otherwise,
            start,
            block: start,
            bits: 0,
        }
    }

    /// Whether the cell before `end` is set, and where the run that it ends begins; `end` never grows and is above 0.
    pub fn ending_at(&mut self, end: usize) -> (bool, usize) {
        if let Some(flags) = self.flags
            && end <= self.start
        {
            self.set = flags[end - 1] != 0;
            self.start = end;
            self.pass(flags);
        }
        (self.set, self.start)
    }

    /// Moves `start` to where its run begins.
    fn pass(&mut self, flags: &[u8]) {
        while self.start > 0 {
            if self.start <= self.block {
                self.block = self.start.saturating_sub(BLOCK);
                self.bits = bits(&flags[self.block..self.start]);
            }
            let bits = if self.set { !self.bits } else { self.bits };
            let differs = bits << (BLOCK - (self.start - self.block));
            if differs != 0 {
                self.start -= differs.leading_zeros() as usize;
                return;
            }
            self.start = self.block; // a branch: the next block's place must not wait for this one's flags
        }
    }
}

/// At most a block of flags as bits, the first lowest.
fn bits(flags: &[u8]) -> u64 {
    let (eights, rest) = flags.as_chunks();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let eights = eights.iter().rev();
    eights.fold(bits_of_eight(last), |bits, &eight| {
        bits << 8 | bits_of_eight(eight)
    })
}

fn bits_of_eight(flags: [u8; 8]) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let word = u64::from_le_bytes(flags);
    // The highest bit of every byte that is not 0, ...
    let set = (((word & LOW) + LOW) | word) & !LOW;
    // ... moved to the highest byte, that of the first flag lowest.
    (set >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_as_bits() {
        for length in 0..=BLOCK {
            for set in 0..length {
                for flag in [1, 2, 128, 255] {
                    let mut flags = vec![0; length];
                    flags[set] = flag;
                    assert_eq!(bits(&flags), 1 << set);
                    flags.fill(flag);
                    flags[set] = 0;
                    let all = u64::MAX >> (BLOCK - length);
                    assert_eq!(bits(&flags), all & !(1 << set));
                }
            }
        }
    }

    #[test]
    fn runs_of_flags() {
        for length in 1..150 {
            for border in 0..=length {
                for (before, after) in [(0, 1), (0, 255), (2, 0), (128, 0)] {
                    let mut flags = vec![before; border];
                    flags.resize(length, after);
                    let mut runs = Runs::new(Some(&flags), true, length);
                    let mut found = Vec::new();
                    let mut end = length;
                    while end > 0 {
                        let (set, start) = runs.ending_at(end);
                        found.push((set, start));
                        assert_eq!(runs.ending_at(start + 1), (set, start));
                        end = start;
                    }
                    let mut expected = Vec::new();
                    if border < length {
                        expected.push((after != 0, border));
                    }
                    if border > 0 {
                        expected.push((before != 0, 0));
                    }
                    assert_eq!(found, expected, "{flags:?}");
                }
            }
        }
    }

    #[test]
    fn a_run_may_be_asked_for_from_within() {
        let flags = [1, 1, 0, 0, 0, 1];
        let mut runs = Runs::new(Some(&flags), false, 6);
        assert_eq!(runs.ending_at(6), (true, 5));
        assert_eq!(runs.ending_at(4), (false, 2)); // not asked about before
        assert_eq!(runs.ending_at(1), (true, 0));
        assert_eq!(Runs::new(None, true, 6).ending_at(6), (true, 0));
    }
}
