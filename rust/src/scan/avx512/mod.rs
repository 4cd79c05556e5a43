//! The scan in registers of sixteen float32: AVX-512. The parent module says what it computes.
//!
//! The four steps of a block go through each stage side by side: one alone would wait for its own last result all the time.
//! A mask costs no branch: the scored cells of a step are packed into its first lanes, scanned there, and spread again.

use std::arch::x86_64::*;
use std::ops::Range;

mod coefficients;
mod moments;
mod registers;

use super::{BLOCK, Deviations, Episode, Run, STEP};
pub use coefficients::Coefficients;
use moments::Moments;
pub use moments::standardise;
use registers::*;

/// Steps of a block.
const STEPS: usize = BLOCK / STEP;

/// The scan of episodes, last block first. Each kind of it is compiled apart, so that a kind of block has one caller, into which
/// it is inlined: a call would pass its registers through memory.
struct Walk<'a, const MASK: bool, const MOMENTS: bool> {
    given: &'a Coefficients,
    cells: Cells,
    gamma: __m512,
    doubled: [__m512; 4],
    carried: __m512,
    advantage: f64,
    /// The advantage after the block, in all lanes; the value there in the first.
    carry: __m512,
    later: __m512,
    moments: Moments,
}

impl<'a, const MASK: bool, const MOMENTS: bool> Walk<'a, MASK, MOMENTS> {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new(given: &'a Coefficients, cells: Cells) -> Self {
        Walk {
            given,
            cells,
            gamma: _mm512_set1_ps(given.gamma),
            doubled: given.doubled.map(|power| _mm512_set1_ps(power)),
            carried: given.carried(STEP),
            advantage: 0.0,
            carry: _mm512_setzero_ps(),
            later: _mm512_setzero_ps(),
            moments: Moments::about(0.0),
        }
    }

    /// Each step as if nothing followed it.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn scan(&self, mut cells: Block) -> Block {
        let [one, two, four, eight] = self.doubled;
        let zeros = _mm512_setzero_ps();
        cells = cells.map(|x| _mm512_fmadd_ps(one, further::<1>(x, zeros), x));
        cells = cells.map(|x| _mm512_fmadd_ps(two, further::<2>(x, zeros), x));
        cells = cells.map(|x| _mm512_fmadd_ps(four, further::<4>(x, zeros), x));
        cells.map(|x| _mm512_fmadd_ps(eight, further::<8>(x, zeros), x))
    }

    /// A step with what follows it: as many cells in its first lanes.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn pass(&mut self, scanned: __m512, cells: usize, carried: __m512) -> __m512 {
        let advantages = _mm512_fmadd_ps(self.carry, carried, scanned);
        let first = f64::from(_mm512_cvtss_f32(scanned));
        self.advantage = self.given.powers[cells].mul_add(self.advantage, first);
        self.carry = _mm512_set1_ps(self.advantage as f32);
        advantages
    }

    /// The values of the block from `at` on, whose cells are all scored, and each of its steps as if nothing followed it.
    ///
    /// # Safety
    /// They must be of the cells.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn begin(&mut self, at: usize) -> [Block; 2] {
        // SAFETY: the caller's.
        let read = |cells| unsafe { load(cells, at, lanes(u64::MAX)) };
        let (rewards, values) = (read(self.cells.rewards), read(self.cells.values));
        let mut deltas = values;
        for step in 0..STEPS {
            let later = *values.get(step + 1).unwrap_or(&self.later);
            let next = further::<1>(values[step], later);
            let away = _mm512_sub_ps(values[step], rewards[step]);
            deltas[step] = _mm512_fmsub_ps(self.gamma, next, away);
        }
        self.later = values[0];
        [values, self.scan(deltas)]
    }

    /// Fills the block from `at` on.
    ///
    /// # Safety
    /// As for `begin`.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn finish(&mut self, at: usize, [values, scanned]: [Block; 2]) {
        let (mut advantages, mut returns) = (scanned, values);
        for step in (0..STEPS).rev() {
            advantages[step] = self.pass(scanned[step], STEP, self.carried);
            returns[step] = _mm512_add_ps(advantages[step], values[step]);
        }
        let all = lanes(u64::MAX);
        // SAFETY: the caller's.
        unsafe {
            if !MASK && self.given.past_caches {
                stream(self.cells.advantages, at, advantages);
                stream(self.cells.returns, at, returns);
            } else {
                store(self.cells.advantages, at, all, advantages);
                store(self.cells.returns, at, all, returns);
            }
        }
        if MOMENTS {
            self.moments.add(advantages, all);
        }
    }

    /// Blocks one before another whose cells are all scored, the last from `at` on; returns where the first begins. Each is
    /// begun before the one after it is finished: both then wait less.
    ///
    /// # Safety
    /// As for `begin`, of every block that `another` allows before the given place.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn stretch(&mut self, mut at: usize, another: impl Fn(usize) -> bool) -> usize {
        // SAFETY: the caller's.
        unsafe {
            let mut begun = self.begin(at);
            while another(at) {
                let next = self.begin(at - BLOCK);
                self.finish(at, begun);
                (begun, at) = (next, at - BLOCK);
            }
            self.finish(at, begun);
        }
        at
    }

    /// The scored cells of the block from `at` on; 0 in others that are inside the episode.
    ///
    /// # Safety
    /// Those inside must be of the cells.
    #[target_feature(enable = "avx512f,bmi2,popcnt")]
    #[inline]
    unsafe fn some(&mut self, at: usize, inside: u64, scored: u64) {
        let scored = lanes(scored);
        // SAFETY: the caller's.
        let read = |cells| unsafe { load(cells, at, scored) };
        let (rewards, values) = (read(self.cells.rewards), read(self.cells.values));
        let cells = scored.map(|scored| scored.count_ones());
        let mut deltas = values;
        let mut later = first_lane(self.later);
        for step in (0..STEPS).rev() {
            let packed = _bzhi_u32(0xffff, cells[step]) as __mmask16;
            let rewards = _mm512_maskz_compress_ps(scored[step], rewards[step]);
            let values = _mm512_maskz_compress_ps(scored[step], values[step]);
            let away = _mm512_sub_ps(values, rewards);
            let next = further::<1>(_mm512_mask_blend_ps(packed, later, values), later);
            deltas[step] = _mm512_maskz_fmsub_ps(packed, self.gamma, next, away);
            let any = if cells[step] > 0 { !0 } else { 0 };
            later = _mm512_mask_mov_ps(later, any, first_lane(values));
        }
        self.later = later;
        let (mut advantages, mut returns) = (self.scan(deltas), values);
        for step in (0..STEPS).rev() {
            let cells = cells[step] as usize;
            let packed = self.pass(advantages[step], cells, self.given.carried(cells));
            advantages[step] = _mm512_maskz_expand_ps(scored[step], packed);
            returns[step] = _mm512_maskz_add_ps(scored[step], advantages[step], values[step]);
        }
        // SAFETY: the caller's.
        unsafe {
            store(self.cells.advantages, at, lanes(inside), advantages);
            store(self.cells.returns, at, lanes(inside), returns);
        }
        if MOMENTS {
            self.moments.add(advantages, scored);
        }
    }

    /// Fills those cells of the block from `at` on with 0.
    ///
    /// # Safety
    /// They must be of the cells.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn clear(&self, at: usize, cells: u64) {
        for output in [self.cells.advantages, self.cells.returns] {
            // SAFETY: the caller's.
            unsafe { store(output, at, lanes(cells), [_mm512_setzero_ps(); STEPS]) };
        }
    }
}

/// As `Scan::episodes`.
#[target_feature(enable = "avx512f,avx512bw,bmi2,popcnt")]
pub fn episodes(
    given: &Coefficients,
    cells: Run<'_, '_, f32>,
    mask: Option<&[u8]>,
    center: Option<f64>,
    episodes: impl Iterator<Item = Episode>,
    passed: impl FnMut(&Episode, Option<&Deviations>),
) {
    match (mask, center) {
        (None, None) => walk::<false, false>(given, cells, &[], 0.0, episodes, passed),
        (None, Some(center)) => walk::<false, true>(given, cells, &[], center, episodes, passed),
        (Some(mask), None) => walk::<true, false>(given, cells, mask, 0.0, episodes, passed),
        (Some(mask), Some(center)) => {
            walk::<true, true>(given, cells, mask, center, episodes, passed);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,bmi2,popcnt")]
#[inline]
fn walk<const MASK: bool, const MOMENTS: bool>(
    given: &Coefficients,
    mut cells: Run<'_, '_, f32>,
    mask: &[u8],
    center: f64,
    episodes: impl Iterator<Item = Episode>,
    mut passed: impl FnMut(&Episode, Option<&Deviations>),
) {
    let total = cells.advantages.len();
    assert!(!MASK || mask.len() == total);
    let mut walk = Walk::<MASK, MOMENTS>::new(given, Cells::of(&mut cells));
    for mut episode in episodes {
        let Range { start, mut end } = episode.cells;
        assert!(start <= end && end <= total);
        walk.advantage = episode.advantage;
        walk.carry = _mm512_set1_ps(episode.advantage as f32);
        walk.later = _mm512_set1_ps(episode.value as f32);
        walk.moments = Moments::about(center);
        // Of the block before `end`: the cells inside the episode, and the scored ones of them.
        let look = |end: usize| {
            let inside = last(BLOCK.min(end - start));
            if !MASK {
                return (inside, inside);
            }
            // SAFETY: only flags of the episode are read.
            let flags = unsafe {
                let place = mask.as_ptr().wrapping_add(end).wrapping_sub(BLOCK);
                _mm512_maskz_loadu_epi8(inside, place.cast())
            };
            (inside, _mm512_test_epi8_mask(flags, flags))
        };
        // Blocks begin at the last scored cell.
        while MASK && end > start {
            let (_, scored) = look(end);
            let padding = (scored.leading_zeros() as usize).min(end - start);
            // SAFETY: the padding is of the episode.
            unsafe { walk.clear(end.wrapping_sub(BLOCK), last(padding)) };
            end -= padding;
            if scored != 0 {
                break;
            }
        }
        let mut count = 0;
        while end > start {
            let (inside, scored) = look(end);
            let at = end.wrapping_sub(BLOCK);
            let another = |at: usize| at - start >= BLOCK && look(at).1 == u64::MAX;
            // SAFETY: no cell but those inside is asked for.
            unsafe {
                if scored == u64::MAX {
                    let from = walk.stretch(at, another);
                    count += end - from;
                    end = from;
                    continue;
                }
                if scored == 0 {
                    walk.clear(at, inside);
                } else {
                    walk.some(at, inside, scored);
                }
            }
            count += scored.count_ones() as usize;
            end -= BLOCK.min(end - start);
        }
        episode.value = f64::from(_mm512_cvtss_f32(walk.later));
        episode.advantage = walk.advantage;
        let found = MOMENTS.then(|| walk.moments.found(center, count));
        passed(&episode, found.as_ref());
    }
    if given.past_caches {
        _mm_sfence(); // before another thread is told
    }
}
