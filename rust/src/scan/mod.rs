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

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod cells;
mod real;

pub use cells::{Deviations, Episode, Input, Run, State};
pub use real::Real;

/// Memory of which a core's caches hold little.
const PAST_CACHES: usize = 48 << 20;

/// Cells that are scanned at once.
pub const STEP: usize = 16;

/// Those of the decay, up to that by which a step passes on what follows it.
#[cfg(target_arch = "x86_64")]
fn powers(decay: f64) -> [f64; STEP + 1] {
    std::array::from_fn(|exponent| decay.powi(exponent as i32))
}

/// The scan with its coefficients, on a processor that has the instructions. Results of the two differ in their last digits.
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
fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    let found = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    let found = false;
    found
}

/// Whether this processor has AVX-512 with the instructions for bytes.
fn avx512() -> bool {
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

/// `(x - center) * scale` as `(x - near) * scale - rest`, whose numbers are float32: `rest` is what `near` leaves of the center.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Line {
    near: f32,
    scale: f32,
    rest: f32,
}

#[cfg(target_arch = "x86_64")]
impl Line {
    fn new(center: f64, scale: f64) -> Self {
        let near = center as f32;
        Line {
            near,
            scale: scale as f32,
            rest: ((center - f64::from(near)) * scale) as f32,
        }
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
        unsafe { avx512::standardise(cells, mask, Line::new(center, scale), cleared) };
        return true;
    } else if available() {
        // SAFETY: the instructions were detected.
        unsafe { avx2::standardise(cells, mask, Line::new(center, scale), cleared) };
        return true;
    }
    let _ = (cells, mask, center, scale, cleared);
    false
}
