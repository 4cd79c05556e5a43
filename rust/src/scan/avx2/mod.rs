//! The scan in registers of eight float32: AVX2 with FMA. The parent module says what it computes.

use std::arch::x86_64::*;

use super::{Input, Run, STEP, State, powers};

mod moments;
mod registers;

use moments::Moments;
pub use moments::{standardise, sums};
use registers::*;

/// Powers of the decay, narrowed from float64.
#[derive(Clone, Copy)]
pub struct Coefficients {
    gamma: f32,
    first: f32,
    second: f32,
    /// For the lanes of the lower half, what follows from the first lane of the upper one.
    across: Lanes,
    /// For all lanes, what follows from the cell after the register, and from the one eight further.
    near: Lanes,
    far: Lanes,
    powers: [f64; STEP + 1],
}

impl Coefficients {
    pub fn new(gamma: f64, decay: f64) -> Self {
        let powers = powers(decay);
        let power = |exponent: usize| powers[exponent] as f32;
        Coefficients {
            gamma: gamma as f32,
            first: power(1),
            second: power(2),
            across: std::array::from_fn(|lane| if lane < 4 { power(4 - lane) } else { 0.0 }),
            near: std::array::from_fn(|lane| power(WIDTH - lane)),
            far: std::array::from_fn(|lane| power(2 * WIDTH - lane)),
            powers,
        }
    }
}

struct Registers {
    gamma: __m256,
    first: __m256,
    second: __m256,
    across: __m256,
}

impl Registers {
    /// Eight cells scanned as if nothing followed them; `next` are the values after each of `values`.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn scan(&self, rewards: __m256, values: __m256, next: __m256) -> __m256 {
        let delta = _mm256_fmadd_ps(self.gamma, next, _mm256_sub_ps(rewards, values));
        let pairs = _mm256_fmadd_ps(self.first, shifted::<4>(delta), delta);
        let fours = _mm256_fmadd_ps(self.second, shifted::<8>(pairs), pairs);
        let upper = _mm256_permute2f128_ps::<0x81>(fours, fours);
        _mm256_fmadd_ps(self.across, _mm256_shuffle_ps::<0>(upper, upper), fours)
    }
}

#[target_feature(enable = "avx2,fma")]
pub fn compiled_here<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// Fewer cells than so many at the start of a run are stepped one by one.
const LEAST: usize = 4;

/// The scan of a run, last step first: sixteen cells in two registers, the lower cells first.
struct Walk {
    registers: Registers,
    near: __m256,
    far: __m256,
    decay: f64,
    advantage: f64,
    carry: __m256,
    later: __m256,
}

impl Walk {
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn new(given: &Coefficients, state: &State) -> Self {
        Walk {
            registers: Registers {
                gamma: _mm256_set1_ps(given.gamma),
                first: _mm256_set1_ps(given.first),
                second: _mm256_set1_ps(given.second),
                across: load(&given.across),
            },
            near: load(&given.near),
            far: load(&given.far),
            decay: given.powers[STEP],
            advantage: state.advantage,
            carry: _mm256_set1_ps(state.advantage as f32),
            later: _mm256_set1_ps(state.value as f32),
        }
    }

    /// The values after each of these and before `later`.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn next(&self, [low, high]: Pair) -> Pair {
        [following(low, high), following(high, self.later)]
    }

    /// The advantages of a step but for what follows it; `next` are the values after each of `values`.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn scan(&self, rewards: Pair, values: Pair, next: Pair) -> Pair {
        let high = self.registers.scan(rewards[1], values[1], next[1]);
        let low = self.registers.scan(rewards[0], values[0], next[0]);
        [_mm256_fmadd_ps(first_lane(high), self.near, low), high]
    }

    /// And with it.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn carried(&self, [low, high]: Pair) -> Pair {
        [
            _mm256_fmadd_ps(self.carry, self.far, low),
            _mm256_fmadd_ps(self.carry, self.near, high),
        ]
    }

    /// Moves on to the cells before a step.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn pass(&mut self, first_scan: __m256, first_values: __m256) {
        self.advantage = f64::from(_mm256_cvtss_f32(first_scan)) + self.decay * self.advantage;
        self.carry = _mm256_set1_ps(self.advantage as f32);
        self.later = first_values;
    }
}

/// As `Scan::run`.
#[target_feature(enable = "avx2,fma")]
pub fn run(given: &Coefficients, run: Run<'_, '_, f32>, state: &mut State) -> usize {
    match state.deviations {
        None => walk::<false>(given, run, state),
        Some(_) => walk::<true>(given, run, state),
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn walk<const MOMENTS: bool>(
    given: &Coefficients,
    run: Run<'_, '_, f32>,
    state: &mut State,
) -> usize {
    let cells = run.advantages.len() - run.room;
    let (whole, left) = (cells / STEP, cells % STEP);
    let mut walk = Walk::new(given, state);
    let mut moments = Moments::new(state.deviations.as_ref());
    if let (Input::Separate(rewards), Input::Separate(values)) = (run.rewards, run.values) {
        let first = rewards.len() - whole * STEP;
        let (rewards, values) = (&rewards[first..], &values[first..]);
        // The values after those of each step but the last.
        let next = values.get(1..).unwrap_or_default().as_chunks::<STEP>().0;
        let rewards = rewards.as_chunks::<STEP>().0;
        let values = values.as_chunks::<STEP>().0;
        let advantages = run.advantages[first..].as_chunks_mut::<STEP>().0;
        let returns = run.returns[first..].as_chunks_mut::<STEP>().0;
        let begin = |walk: &Walk, at: usize, next: Option<Pair>| {
            let read = load_pair(&values[at]);
            let next = next.unwrap_or(walk.next(read));
            (walk.scan(load_pair(&rewards[at]), read, next), read)
        };
        let mut finish = |walk: &mut Walk, at: usize, (scans, read): (Pair, Pair)| {
            let sums = walk.carried(scans);
            walk.pass(scans[0], read[0]);
            store_pair(&mut advantages[at], sums);
            store_pair(&mut returns[at], add_pairs(sums, read));
            if MOMENTS {
                moments.add(sums[1], None);
                moments.add(sums[0], None);
            }
        };
        if whole > 0 {
            let mut begun = begin(&walk, whole - 1, None);
            for at in (0..whole - 1).rev() {
                let next = begin(&walk, at, Some(load_pair(&next[at])));
                finish(&mut walk, at + 1, begun);
                begun = next;
            }
            finish(&mut walk, 0, begun);
        }
    } else {
        let first = run.advantages.len() - whole * STEP;
        let advantages = run.advantages[first..].as_chunks_mut::<STEP>().0;
        let returns = run.returns[first..].as_chunks_mut::<STEP>().0;
        for at in (0..whole).rev() {
            let cells = |input: &Input<'_, f32>| match input {
                Input::Separate(cells) => load_pair(&cells[first..].as_chunks().0[at]),
                Input::Advantages => load_pair(&advantages[at]),
                Input::Returns => load_pair(&returns[at]),
            };
            let (rewards, values) = (cells(&run.rewards), cells(&run.values));
            let scans = walk.scan(rewards, values, walk.next(values));
            let sums = walk.carried(scans);
            walk.pass(scans[0], values[0]);
            store_pair(&mut advantages[at], sums);
            store_pair(&mut returns[at], add_pairs(sums, values));
            if MOMENTS {
                moments.add(sums[1], None);
                moments.add(sums[0], None);
            }
        }
    }
    state.value = f64::from(_mm256_cvtss_f32(walk.later));
    state.advantage = walk.advantage;
    let part = if left < LEAST { 0 } else { left };
    if part > 0 {
        let kept = last_lanes(part);
        partial(given, &walk, run, (part, kept), state, |sums| {
            if MOMENTS {
                moments.add(sums[1], Some(kept[1]));
                moments.add(sums[0], Some(kept[0]));
            }
        });
    }
    if let Some(deviations) = &mut state.deviations {
        moments.store(deviations, whole * STEP + part);
    }
    left - part
}

/// The first cells of a run, in the last lanes of a step whose other lanes are 0.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn partial(
    given: &Coefficients,
    walk: &Walk,
    run: Run<'_, '_, f32>,
    (cells, kept): (usize, [__m256i; 2]),
    state: &mut State,
    found: impl FnOnce(Pair),
) {
    let end = run.room + cells;
    let read = |input: &Input<'_, f32>| match input {
        Input::Separate(given) => load_last(&given[..end], kept),
        Input::Advantages => load_last(&run.advantages[..end], kept),
        Input::Returns => load_last(&run.returns[..end], kept),
    };
    let (rewards, values) = (read(&run.rewards), read(&run.values));
    let scans = walk.scan(rewards, values, walk.next(values));
    let sums = walk.carried(scans);
    let (mut scanned, mut first) = ([0.0; STEP], [0.0; STEP]);
    store_pair(&mut scanned, scans);
    store_pair(&mut first, values);
    state.advantage = f64::from(scanned[STEP - cells]) + given.powers[cells] * state.advantage;
    state.value = f64::from(first[STEP - cells]);
    let separate = matches!(
        (run.rewards, run.values),
        (Input::Separate(_), Input::Separate(_))
    );
    for (out, sums) in [
        (run.advantages, sums),
        (run.returns, add_pairs(sums, values)),
    ] {
        match out[..end].last_chunk_mut() {
            Some(out) if separate => store_pair(out, sums),
            _ => {
                let mut cells_of = [0.0; STEP];
                store_pair(&mut cells_of, sums);
                out[run.room..end].copy_from_slice(&cells_of[STEP - cells..]);
            }
        }
    }
    found(sums);
}
