//! GAE's recursion over a run of cells in vector registers: float32, AVX-512 or AVX2 with FMA.
//!
//! With a constant decay `d`, `A_t = delta_t + d A_{t+1}` is a linear scan. Sixteen cells are scanned at once: shifts within
//! a register add `d`, then `d^2`, then `d^4`, then `d^8` times what follows (Kogge and Stone, 1973), and the advantage
//! carried in from later cells is added with its powers of `d`. The carry is kept in float64, so that errors do not grow
//! with the length of the row. What is added up in an advantage passes at most 14 roundings, each of at most 2^-24:
//!
//! ```text
//! delta    gamma, the difference, the fused product       3
//! scan     four powers and four fused products            8
//! carry    its narrowing, the power, the fused product    3
//! ```
//!
//! so that `|error| <= 2^-20 sum_k d^k (|r| + gamma |V'| + |V|)`, and one rounding more in a return.
//!
//! Beside `buffer`, `exact` and `helpers`, this file and those in `scan/` are the only ones with `unsafe` code: calls of
//! functions that need instructions which were detected first or which every x86-64 has, and loads and stores of registers.
#![allow(unsafe_code)]
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
#[path = "scan/avx2.rs"] // the fuzz target takes this file by its path
mod avx2;
#[cfg(target_arch = "x86_64")]
#[path = "scan/avx512.rs"]
mod avx512;

/// What the recursion carries from a cell to the one before it, and the sums over the cells that it has passed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    pub value: f64,
    pub advantage: f64,
    pub deviations: Option<Deviations>,
}

/// Of the advantages passed: the sums of their deviations from `center`, and of their squares, in lanes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Deviations {
    pub center: f64,
    pub count: usize,
    pub first: [f64; 8],
    pub second: [f64; 8],
}

impl Deviations {
    pub fn from(center: f64) -> Self {
        Deviations {
            center,
            count: 0,
            first: [0.0; 8],
            second: [0.0; 8],
        }
    }

    pub fn merge(&mut self, others: &Deviations) {
        self.count += others.count;
        for lane in 0..8 {
            self.first[lane] += others.first[lane];
            self.second[lane] += others.second[lane];
        }
    }

    pub fn add(&mut self, advantage: f64) {
        let deviation = advantage - self.center;
        self.count += 1;
        self.first[0] += deviation;
        self.second[0] += deviation * deviation;
    }
}

/// Rewards or values: memory of their own, or one of the two outputs, which is then overwritten in place.
pub enum Input<'a, T> {
    Separate(&'a [T]),
    Advantages,
    Returns,
}

impl<T> Clone for Input<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Input<'_, T> {}

/// Cells of a run, all scored and none a termination; four slices of the same length. The first `room` of them come before
/// the run: their inputs are not read, their outputs may be overwritten, and the run has at least one cell.
pub struct Run<'a, 'o, T> {
    pub rewards: Input<'a, T>,
    pub values: Input<'a, T>,
    pub advantages: &'o mut [T],
    pub returns: &'o mut [T],
    pub room: usize,
}

impl<'a, T> Run<'a, '_, T> {
    pub fn reborrow(&mut self) -> Run<'a, '_, T> {
        Run {
            rewards: self.rewards,
            values: self.values,
            advantages: self.advantages,
            returns: self.returns,
            room: self.room,
        }
    }
}

/// Cells of a row that are passed from the last on; the value and the advantage that follow the last, and, once they are passed,
/// that of the first.
#[derive(Clone, Debug)]
pub struct Episode {
    pub row: usize,
    pub cells: Range<usize>,
    pub value: f64,
    pub advantage: f64,
}

/// Memory of which a core's caches hold little.
const PAST_CACHES: usize = 48 << 20;

/// Cells that are scanned at once.
pub const STEP: usize = 16;

/// The scan with its coefficients, on a processor that has the instructions. One step's results differ between them in their
/// last digits.
#[derive(Clone, Copy)]
pub enum Scan {
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Coefficients),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Coefficients),
    /// Never made.
    #[cfg(not(target_arch = "x86_64"))]
    Elsewhere,
}

/// Whether this processor has AVX2 with FMA.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    let found = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    let found = false;
    found
}

/// Whether this processor has AVX-512 with the instructions for bytes.
pub fn avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    let found = std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("popcnt")
        && std::is_x86_feature_detected!("bmi2");
    #[cfg(not(target_arch = "x86_64"))]
    let found = false;
    found
}

/// Runs `work` compiled with wider registers, where this processor has them. The compiler fuses no operations: results
/// are the same.
pub fn widest<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if available() {
        // SAFETY: the instructions were detected.
        return unsafe { avx2::compiled_here(work) };
    }
    work()
}

/// Flags that are looked at together.
pub const BLOCK: usize = 64;

/// Which of the flags are not 0: bit i for the flag at i.
#[inline]
pub fn bits_of(flags: &[u8; BLOCK]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        let sixteen = |flags: &[u8; 16]| {
            // SAFETY: every x86-64 has these instructions; the load is of sixteen bytes and needs no alignment.
            let zeros = unsafe {
                let flags = _mm_loadu_si128(flags.as_ptr().cast());
                _mm_movemask_epi8(_mm_cmpeq_epi8(flags, _mm_setzero_si128()))
            };
            u64::from(!(zeros as u16))
        };
        let sixteens = flags.as_chunks().0.iter().rev();
        sixteens.fold(0, |bits, flags| bits << 16 | sixteen(flags))
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let flags = flags.iter().rev();
        flags.fold(0, |bits, &flag| bits << 1 | u64::from(flag != 0))
    }
}

/// Accumulators of `sums`.
pub const LANES: usize = 16;
pub type Sums = [[f64; LANES]; 2];

/// Adds to each lane the deviations of its cells from `center`, where the mask is not 0, and their squares; the cells are
/// whole rows of lanes. Bit for bit what the loop over cells gives.
pub fn sums(cells: &[f32], mask: &[u8], center: f64, sums: &mut Sums) -> bool {
    #[cfg(target_arch = "x86_64")]
    if available() {
        // SAFETY: the instructions were detected.
        unsafe { avx2::sums(cells, mask, center, sums) };
        return true;
    }
    let _ = (cells, mask, center, sums);
    false
}

impl Scan {
    /// None where this processor lacks the instructions.
    pub fn new(gamma: f64, decay: f64) -> Option<Self> {
        Self::each(gamma, decay).next()
    }

    /// For inputs and outputs of so many bytes in all: where no cache holds them, unmasked outputs are written past it. (A line
    /// that is written into a cache is read first.)
    pub fn of_bytes(self, bytes: usize) -> Self {
        match self {
            #[cfg(target_arch = "x86_64")]
            Scan::Avx512(given) if bytes >= PAST_CACHES => Scan::Avx512(given.past_caches()),
            other => {
                let _ = bytes;
                other
            }
        }
    }

    /// Those that this processor has the instructions for, the widest first.
    pub fn each(gamma: f64, decay: f64) -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        return [
            avx512().then(|| Scan::Avx512(avx512::Coefficients::new(gamma, decay))),
            available().then(|| Scan::Avx2(avx2::Coefficients::new(gamma, decay))),
        ]
        .into_iter()
        .flatten();
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = (gamma, decay);
            std::iter::empty()
        }
    }

    /// Fills the outputs, but for a few cells at the start of the run, which do not fill a step; returns their number.
    pub fn run(&self, run: Run<'_, '_, f32>, state: &mut State) -> usize {
        match self {
            // SAFETY: a `Scan` is made only where its instructions were detected.
            #[cfg(target_arch = "x86_64")]
            Scan::Avx2(given) => unsafe { avx2::run(given, run, state) },
            #[cfg(target_arch = "x86_64")]
            Scan::Avx512(given) => {
                let all = std::iter::once(Episode {
                    row: 0,
                    cells: run.room..run.advantages.len(),
                    value: state.value,
                    advantage: state.advantage,
                });
                let center = state.deviations.as_ref().map(|given| given.center);
                let passed = |episode: &Episode, found: Option<&Deviations>| {
                    (state.value, state.advantage) = (episode.value, episode.advantage);
                    if let (Some(deviations), Some(found)) = (&mut state.deviations, found) {
                        deviations.merge(found);
                    }
                };
                // SAFETY: as above.
                unsafe { avx512::episodes(given, run, None, center, all, passed) };
                0
            }
            #[cfg(not(target_arch = "x86_64"))]
            Scan::Elsewhere => {
                let _ = state;
                run.advantages.len() - run.room
            }
        }
    }

    /// Fills the outputs of one episode after another and hands each over, with the deviations from the center where one is
    /// given. Cells where the mask is 0 are passed as if they were not there; their outputs are 0. False, and nothing done,
    /// where the processor lacks the instructions.
    pub fn episodes(
        &self,
        cells: Run<'_, '_, f32>,
        mask: Option<&[u8]>,
        center: Option<f64>,
        episodes: impl Iterator<Item = Episode>,
        passed: impl FnMut(&Episode, Option<&Deviations>),
    ) -> bool {
        #[cfg(target_arch = "x86_64")]
        if let Scan::Avx512(given) = self {
            // SAFETY: a `Scan` is made only where its instructions were detected.
            unsafe { avx512::episodes(given, cells, mask, center, episodes, passed) };
            return true;
        }
        let _ = (cells, mask, center, episodes, passed);
        false
    }
}

/// `(cells - center) * scale` where the mask is not 0, and 0 elsewhere, within `3 * 2^-24` of each result; false where this
/// processor lacks the instructions. The mask, where given, is as long as the cells. `cleared`: it is 0 elsewhere already.
pub fn standardise(
    cells: &mut [f32],
    mask: Option<&[u8]>,
    center: f64,
    scale: f64,
    cleared: bool,
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if avx512() {
        // SAFETY: the instructions were detected.
        unsafe { avx512::standardise(cells, mask, center, scale, cleared) };
        return true;
    } else if available() {
        // SAFETY: the instructions were detected.
        unsafe { avx2::standardise(cells, mask, center, scale, cleared) };
        return true;
    }
    let _ = (cells, mask, center, scale, cleared);
    false
}
