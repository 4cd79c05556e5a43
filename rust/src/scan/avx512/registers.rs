//! Blocks of cells in memory and in registers.

use std::arch::asm;
use std::arch::x86_64::*;

use super::STEPS;
use crate::scan::{BLOCK, Input, Run, STEP};

/// Where the cells lie. Inputs may be outputs: a block reads its cells before it writes them.
pub(super) struct Cells {
    pub(super) rewards: *const f32,
    pub(super) values: *const f32,
    pub(super) advantages: *mut f32,
    pub(super) returns: *mut f32,
}

impl Cells {
    pub(super) fn of(run: &mut Run<'_, '_, f32>) -> Self {
        let cells = run.advantages.len();
        assert_eq!(run.returns.len(), cells);
        let (advantages, returns) = (run.advantages.as_mut_ptr(), run.returns.as_mut_ptr());
        let place = |input: &Input<'_, f32>| match input {
            Input::Separate(given) => {
                assert_eq!(given.len(), cells);
                given.as_ptr()
            }
            Input::Advantages => advantages.cast_const(),
            Input::Returns => returns.cast_const(),
        };
        Cells {
            rewards: place(&run.rewards),
            values: place(&run.values),
            advantages,
            returns,
        }
    }
}

/// The cells of a block, a step in each register.
pub(super) type Block = [__m512; STEPS];
/// Those of its cells that are set in 64 bits, the first lowest.
pub(super) type Lanes = [__mmask16; STEPS];

pub(super) fn lanes(bits: u64) -> Lanes {
    std::array::from_fn(|step| (bits >> (STEP * step)) as __mmask16)
}

/// The last cells of a block.
pub(super) fn last(cells: usize) -> u64 {
    u64::MAX.checked_shl((BLOCK - cells) as u32).unwrap_or(0)
}

/// Cells from `at` on, 0 in other lanes than those given.
///
/// # Safety
/// Those must be readable.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn load(cells: *const f32, at: usize, lanes: Lanes) -> Block {
    std::array::from_fn(|step| {
        let place = cells.wrapping_add(at).wrapping_add(STEP * step);
        // SAFETY: the caller's; other lanes are not touched, and the load needs no alignment.
        unsafe { _mm512_maskz_loadu_ps(lanes[step], place) }
    })
}

/// Writes the given lanes of the cells from `at` on.
///
/// # Safety
/// Those must be writable.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn store(cells: *mut f32, at: usize, lanes: Lanes, block: Block) {
    for step in 0..STEPS {
        let place = cells.wrapping_add(at).wrapping_add(STEP * step);
        // SAFETY: as in `load`.
        unsafe { _mm512_mask_storeu_ps(place, lanes[step], block[step]) };
    }
}

/// Writes the cells from `at` on past the caches, where they begin with one of their lines.
///
/// # Safety
/// As in `store`, of all lanes.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) unsafe fn stream(cells: *mut f32, at: usize, block: Block) {
    for (step, cells_of) in block.into_iter().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            let place = cells.add(at + STEP * step);
            if place.addr().is_multiple_of(64) {
                _mm512_stream_ps(place, cells_of);
            } else {
                _mm512_storeu_ps(place, cells_of);
            }
        }
    }
}

/// `LANES` lanes further on; the first ones of `later` come in. The intrinsic would be made a permutation of two registers,
/// which takes a quarter longer and a copy.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn further<const LANES: i32>(cells: __m512, later: __m512) -> __m512 {
    let found;
    // SAFETY: registers go in and one comes out; nothing else is touched.
    unsafe {
        asm!(
            "valignd {found}, {later}, {cells}, {lanes}",
            found = lateout(zmm_reg) found,
            later = in(zmm_reg) later,
            cells = in(zmm_reg) cells,
            lanes = const LANES,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    found
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn first_lane(x: __m512) -> __m512 {
    _mm512_broadcastss_ps(_mm512_castps512_ps128(x))
}
