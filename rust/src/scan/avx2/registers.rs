//! Cells in memory and in registers.

use std::arch::x86_64::*;

use crate::scan::STEP;

pub(super) const WIDTH: usize = 8;
pub(super) type Lanes = [f32; WIDTH];

#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn load(cells: &Lanes) -> __m256 {
    // SAFETY: the reference is to eight floats; the load needs no alignment.
    unsafe { _mm256_loadu_ps(cells.as_ptr()) }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn store(cells: &mut Lanes, register: __m256) {
    // SAFETY: as in `load`, and the reference is exclusive.
    unsafe { _mm256_storeu_ps(cells.as_mut_ptr(), register) }
}

/// Within each half, from `BYTES` further on; zeros come in.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn shifted<const BYTES: i32>(x: __m256) -> __m256 {
    _mm256_castsi256_ps(_mm256_srli_si256::<BYTES>(_mm256_castps_si256(x)))
}

#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn first_lane(x: __m256) -> __m256 {
    _mm256_broadcastss_ps(_mm256_castps256_ps128(x))
}

/// One cell further on; the first of `later` comes in.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn following(cells: __m256, later: __m256) -> __m256 {
    let halves = _mm256_permute2f128_ps::<0x21>(cells, later);
    _mm256_castsi256_ps(_mm256_alignr_epi8::<4>(
        _mm256_castps_si256(halves),
        _mm256_castps_si256(cells),
    ))
}

/// Two registers with the cells of a step.
pub(super) type Pair = [__m256; 2];

#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn load_pair(cells: &[f32; STEP]) -> Pair {
    let halves = cells.as_chunks::<WIDTH>().0;
    [load(&halves[0]), load(&halves[1])]
}

#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn store_pair(cells: &mut [f32; STEP], [low, high]: Pair) {
    let halves = cells.as_chunks_mut::<WIDTH>().0;
    store(&mut halves[0], low);
    store(&mut halves[1], high);
}

#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn add_pairs(a: Pair, b: Pair) -> Pair {
    [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
}

/// All ones in the last `count` of sixteen lanes.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn last_lanes(count: usize) -> [__m256i; 2] {
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let before = (STEP - count) as i32;
    [before, before - WIDTH as i32]
        .map(|before| _mm256_cmpgt_epi32(lanes, _mm256_set1_epi32(before - 1)))
}

/// The last cells in the last lanes, as many as are kept, which the cells have.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) fn load_last(cells: &[f32], kept: [__m256i; 2]) -> Pair {
    let end = cells.as_ptr_range().end;
    // SAFETY: lanes that are not kept are not read, whatever lies there; the others are the last of `cells`.
    unsafe {
        [
            _mm256_maskload_ps(end.wrapping_sub(2 * WIDTH), kept[0]),
            _mm256_maskload_ps(end.wrapping_sub(WIDTH), kept[1]),
        ]
    }
}
