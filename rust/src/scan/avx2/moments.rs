//! Sums of deviations and the whitening line in registers: AVX2 with FMA.

use std::arch::x86_64::*;

use super::registers::{Lanes, WIDTH, load, store};
use crate::scan::{Deviations, Line, Sums};

#[target_feature(enable = "avx2,fma")]
#[inline]
fn load_four(lanes: &[f64], at: usize) -> __m256d {
    _mm256_setr_pd(lanes[at], lanes[at + 1], lanes[at + 2], lanes[at + 3])
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn store_four(lanes: &mut [f64], at: usize, register: __m256d) {
    let four = &mut lanes[at..at + 4];
    // SAFETY: the reference is to four numbers and exclusive; the store needs no alignment.
    unsafe { _mm256_storeu_pd(four.as_mut_ptr(), register) }
}

/// No product is fused with its sum, so that the loop over cells gives the same.
#[target_feature(enable = "avx2,fma")]
pub fn sums(cells: &[f32], mask: &[u8], center: f64, sums: &mut Sums) {
    let center = _mm256_set1_pd(center);
    let [mut first, mut second] = [[_mm256_setzero_pd(); 4]; 2];
    for quarter in 0..4 {
        first[quarter] = load_four(&sums[0], 4 * quarter);
        second[quarter] = load_four(&sums[1], 4 * quarter);
    }
    let cells = cells.as_chunks::<4>().0.as_chunks::<4>().0;
    let mask = mask.as_chunks::<4>().0.as_chunks::<4>().0;
    for (cells, flags) in cells.iter().zip(mask) {
        for quarter in 0..4 {
            let [a, b, c, d] = cells[quarter];
            let wide = _mm256_cvtps_pd(_mm_setr_ps(a, b, c, d));
            let flags = _mm_cvtsi32_si128(i32::from_ne_bytes(flags[quarter]));
            let masked = _mm256_cmpeq_epi64(_mm256_cvtepu8_epi64(flags), _mm256_setzero_si256());
            let deviation =
                _mm256_andnot_pd(_mm256_castsi256_pd(masked), _mm256_sub_pd(wide, center));
            first[quarter] = _mm256_add_pd(first[quarter], deviation);
            let square = _mm256_mul_pd(deviation, deviation);
            second[quarter] = _mm256_add_pd(second[quarter], square);
        }
    }
    for quarter in 0..4 {
        store_four(&mut sums[0], 4 * quarter, first[quarter]);
        store_four(&mut sums[1], 4 * quarter, second[quarter]);
    }
}

/// The sums of `Deviations` in registers.
pub(super) struct Moments {
    center: __m256d,
    first: [__m256d; 2],
    second: [__m256d; 2],
}

impl Moments {
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    pub(super) fn new(given: Option<&Deviations>) -> Self {
        let read = |lanes: &[f64; 8]| [0, 4].map(|at| load_four(lanes, at));
        let zeros = [_mm256_setzero_pd(); 2];
        Moments {
            center: _mm256_set1_pd(given.map_or(0.0, |given| given.center)),
            first: given.map_or(zeros, |given| read(&given.first)),
            second: given.map_or(zeros, |given| read(&given.second)),
        }
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    pub(super) fn add(&mut self, cells: __m256, kept: Option<__m256i>) {
        let halves = [
            _mm256_castps256_ps128(cells),
            _mm256_extractf128_ps::<1>(cells),
        ];
        for (half, cells) in halves.into_iter().enumerate() {
            let mut deviation = _mm256_sub_pd(_mm256_cvtps_pd(cells), self.center);
            if let Some(kept) = kept {
                let kept = match half {
                    0 => _mm256_castsi256_si128(kept),
                    _ => _mm256_extracti128_si256::<1>(kept),
                };
                let kept = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(kept));
                deviation = _mm256_and_pd(deviation, kept);
            }
            self.first[half] = _mm256_add_pd(self.first[half], deviation);
            self.second[half] = _mm256_fmadd_pd(deviation, deviation, self.second[half]);
        }
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    pub(super) fn store(&self, into: &mut Deviations, cells: usize) {
        into.count += cells;
        for half in 0..2 {
            store_four(&mut into.first, 4 * half, self.first[half]);
            store_four(&mut into.second, 4 * half, self.second[half]);
        }
    }
}

/// As `crate::scan::standardise`.
#[target_feature(enable = "avx2,fma")]
pub fn standardise(cells: &mut [f32], mask: Option<&[u8]>, line: Line, cleared: bool) {
    let Line { near, scale, rest } = line;
    let (whole, few) = cells.as_chunks_mut::<WIDTH>();
    let (flags, few_flags) = mask.unwrap_or_default().as_chunks::<WIDTH>();
    let line = |cells: &Lanes| {
        let away = _mm256_sub_ps(load(cells), _mm256_set1_ps(near));
        _mm256_fmsub_ps(away, _mm256_set1_ps(scale), _mm256_set1_ps(rest))
    };
    if mask.is_none() {
        whole.iter_mut().for_each(|cells| store(cells, line(cells)));
    }
    for (cells, &flags) in whole.iter_mut().zip(flags) {
        if cleared && flags == [0; WIDTH] {
            continue;
        }
        let flags = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_ne_bytes(flags)));
        let masked = _mm256_castsi256_ps(_mm256_cmpeq_epi32(flags, _mm256_setzero_si256()));
        store(cells, _mm256_andnot_ps(masked, line(cells)));
    }
    for (at, cell) in few.iter_mut().enumerate() {
        let scored = mask.is_none() || few_flags[at] != 0;
        *cell = if scored {
            (*cell - near).mul_add(scale, -rest)
        } else {
            0.0
        };
    }
}
