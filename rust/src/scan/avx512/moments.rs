//! Sums of deviations and the whitening line in registers: AVX-512.

use std::arch::x86_64::*;

use super::{Block, Lanes, lanes, load, store};
use crate::scan::{BLOCK, Deviations, Line};

#[target_feature(enable = "avx512f")]
#[inline]
fn halves(cells: __m512) -> [__m256; 2] {
    let upper = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(cells));
    [_mm512_castps512_ps256(cells), _mm256_castpd_ps(upper)]
}

/// The sums of `Deviations` in registers.
pub(super) struct Moments {
    center: __m512d,
    first: __m512d,
    second: __m512d,
}

impl Moments {
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn about(center: f64) -> Self {
        Moments {
            center: _mm512_set1_pd(center),
            first: _mm512_setzero_pd(),
            second: _mm512_setzero_pd(),
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn add(&mut self, block: Block, scored: Lanes) {
        for step in (0..block.len()).rev() {
            let [low, high] = halves(block[step]);
            for (cells, scored) in [(high, scored[step] >> 8), (low, scored[step])] {
                let wide = _mm512_cvtps_pd(cells);
                let deviation = _mm512_maskz_sub_pd(scored as __mmask8, wide, self.center);
                self.first = _mm512_add_pd(self.first, deviation);
                self.second = _mm512_fmadd_pd(deviation, deviation, self.second);
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn found(&self, center: f64, count: usize) -> Deviations {
        let mut found = Deviations::from(center);
        found.count = count;
        // SAFETY: each store is of eight numbers and needs no alignment.
        unsafe {
            _mm512_storeu_pd(found.first.as_mut_ptr(), self.first);
            _mm512_storeu_pd(found.second.as_mut_ptr(), self.second);
        }
        found
    }
}

/// As `crate::scan::standardise`.
#[target_feature(enable = "avx512f,avx512bw")]
pub fn standardise(cells: &mut [f32], mask: Option<&[u8]>, line: Line, cleared: bool) {
    let [near, scale, rest] = [line.near, line.scale, line.rest].map(|x| _mm512_set1_ps(x));
    assert!(mask.is_none_or(|mask| mask.len() == cells.len()));
    let output = cells.as_mut_ptr();
    for at in (0..cells.len()).step_by(BLOCK) {
        let inside = u64::MAX >> BLOCK.saturating_sub(cells.len() - at);
        // SAFETY: only cells and flags inside the slices are read and written.
        unsafe {
            let scored = mask.map_or(inside, |mask| {
                let flags = _mm512_maskz_loadu_epi8(inside, mask.as_ptr().add(at).cast());
                _mm512_test_epi8_mask(flags, flags)
            });
            if scored == 0 && cleared {
                continue;
            }
            let scored = lanes(scored);
            let mut block = load(output, at, scored);
            for step in 0..block.len() {
                let away = _mm512_sub_ps(block[step], near);
                block[step] = _mm512_maskz_fmsub_ps(scored[step], away, scale, rest);
            }
            store(output, at, lanes(inside), block);
        }
    }
}
