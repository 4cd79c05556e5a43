//! Powers of the decay.

use std::arch::x86_64::*;

use crate::scan::{STEP, powers};

/// Powers of the decay, narrowed from float64.
#[derive(Clone, Copy)]
pub struct Coefficients {
    pub(super) gamma: f32,
    /// The powers 1, 2, 4 and 8.
    pub(super) doubled: [f32; 4],
    /// The powers 16 to 1, and zeros: from `STEP - n` on, what `n` cells take over from the cell after them.
    carried: [f32; 2 * STEP],
    pub(super) powers: [f64; STEP + 1],
    pub(super) past_caches: bool,
}

impl Coefficients {
    pub fn new(gamma: f64, decay: f64) -> Self {
        let powers = powers(decay);
        Coefficients {
            gamma: gamma as f32,
            doubled: [1, 2, 4, 8].map(|exponent: usize| powers[exponent] as f32),
            carried: std::array::from_fn(|lane| match lane {
                0..STEP => powers[STEP - lane] as f32,
                _ => 0.0,
            }),
            powers,
            past_caches: false,
        }
    }

    /// With outputs that go past the caches to memory.
    pub fn past_caches(self) -> Self {
        Coefficients {
            past_caches: true,
            ..self
        }
    }

    /// In the first lanes, what as many cells take over from the cell after them.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn carried(&self, cells: usize) -> __m512 {
        let from = &self.carried[STEP - cells..][..STEP];
        // SAFETY: the reference is to sixteen floats; the load needs no alignment.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }
}
