//! GAE's recursion over a run of cells in vector registers: float32, AVX2 with FMA.
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
//! Beside `buffer`, this is the only file with `unsafe` code: calls of functions that need instructions which were detected
//! first, and the loads and stores of whole arrays.
#![allow(unsafe_code)]

/// What the recursion carries from a cell to the one before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    pub value: f64,
    pub advantage: f64,
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

/// Cells of a run, all scored and none a termination; four slices of the same length.
pub struct Run<'a, 'o, T> {
    pub rewards: Input<'a, T>,
    pub values: Input<'a, T>,
    pub advantages: &'o mut [T],
    pub returns: &'o mut [T],
}

impl<'a, T> Run<'a, '_, T> {
    pub fn reborrow(&mut self) -> Run<'a, '_, T> {
        Run {
            rewards: self.rewards,
            values: self.values,
            advantages: self.advantages,
            returns: self.returns,
        }
    }
}

/// Cells that are scanned at once.
pub const STEP: usize = 16;

/// The scan with its coefficients, on a processor that has the instructions.
#[derive(Clone, Copy)]
pub struct Scan {
    #[cfg(target_arch = "x86_64")]
    coefficients: x86::Coefficients,
    #[cfg(not(target_arch = "x86_64"))]
    never: std::convert::Infallible,
}

/// Whether this processor has AVX2 with FMA.
pub fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    let found = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
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
        return unsafe { x86::compiled_here(work) };
    }
    work()
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
        unsafe { x86::sums(cells, mask, center, sums) };
        return true;
    }
    let _ = (cells, mask, center, sums);
    false
}

impl Scan {
    /// None where this processor lacks the instructions.
    pub fn new(gamma: f64, decay: f64) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        return available().then(|| Scan {
            coefficients: x86::Coefficients::new(gamma, decay),
        });
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = (gamma, decay);
            None
        }
    }

    /// Fills the outputs of the last whole steps, and returns how many cells at the start of the run are left.
    pub fn run(&self, run: Run<'_, '_, f32>, state: &mut State) -> usize {
        let left = run.advantages.len() % STEP;
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Scan` is made only where the instructions were detected.
        unsafe {
            x86::run(&self.coefficients, run, state);
        }
        #[cfg(not(target_arch = "x86_64"))]
        match (self.never, state) {}
        left
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Input, LANES, Run, State, Sums};

    const WIDTH: usize = 8;
    type Lanes = [f32; WIDTH];

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
        step: f64,
    }

    impl Coefficients {
        pub fn new(gamma: f64, decay: f64) -> Self {
            let power = |exponent: usize| decay.powi(exponent as i32) as f32;
            Coefficients {
                gamma: gamma as f32,
                first: power(1),
                second: power(2),
                across: std::array::from_fn(|lane| if lane < 4 { power(4 - lane) } else { 0.0 }),
                near: std::array::from_fn(|lane| power(WIDTH - lane)),
                far: std::array::from_fn(|lane| power(2 * WIDTH - lane)),
                step: decay.powi(2 * WIDTH as i32),
            }
        }
    }

    struct Registers {
        gamma: __m256,
        first: __m256,
        second: __m256,
        across: __m256,
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn load(cells: &Lanes) -> __m256 {
        // SAFETY: the reference is to eight floats; the load needs no alignment.
        unsafe { _mm256_loadu_ps(cells.as_ptr()) }
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn store(cells: &mut Lanes, register: __m256) {
        // SAFETY: as in `load`, and the reference is exclusive.
        unsafe { _mm256_storeu_ps(cells.as_mut_ptr(), register) }
    }

    /// Within each half, from `BYTES` further on; zeros come in.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn shifted<const BYTES: i32>(x: __m256) -> __m256 {
        _mm256_castsi256_ps(_mm256_srli_si256::<BYTES>(_mm256_castps_si256(x)))
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn first_lane(x: __m256) -> __m256 {
        _mm256_broadcastss_ps(_mm256_castps256_ps128(x))
    }

    impl Registers {
        /// Eight cells scanned as if nothing followed them but the value in the first lane of `later`.
        #[target_feature(enable = "avx2,fma")]
        #[inline]
        fn scan(&self, rewards: __m256, values: __m256, later: __m256) -> __m256 {
            let halves = _mm256_permute2f128_ps::<0x21>(values, later);
            let next = _mm256_castsi256_ps(_mm256_alignr_epi8::<4>(
                _mm256_castps_si256(halves),
                _mm256_castps_si256(values),
            ));
            let delta = _mm256_fmadd_ps(self.gamma, next, _mm256_sub_ps(rewards, values));
            let pairs = _mm256_fmadd_ps(self.first, shifted::<4>(delta), delta);
            let fours = _mm256_fmadd_ps(self.second, shifted::<8>(pairs), pairs);
            let upper = _mm256_permute2f128_ps::<0x81>(fours, fours);
            _mm256_fmadd_ps(self.across, _mm256_shuffle_ps::<0>(upper, upper), fours)
        }
    }

    /// No product is fused with its sum, so that the loop over cells gives the same.
    #[target_feature(enable = "avx2,fma")]
    pub fn sums(cells: &[f32], mask: &[u8], center: f64, sums: &mut Sums) {
        let center = _mm256_set1_pd(center);
        let [mut first, mut second] = [[_mm256_setzero_pd(); 4]; 2];
        for quarter in 0..4 {
            first[quarter] = load_wide(&sums[0], quarter);
            second[quarter] = load_wide(&sums[1], quarter);
        }
        let cells = cells.as_chunks::<4>().0.as_chunks::<4>().0;
        let mask = mask.as_chunks::<4>().0.as_chunks::<4>().0;
        for (cells, flags) in cells.iter().zip(mask) {
            for quarter in 0..4 {
                let [a, b, c, d] = cells[quarter];
                let wide = _mm256_cvtps_pd(_mm_setr_ps(a, b, c, d));
                let flags = _mm_cvtsi32_si128(i32::from_ne_bytes(flags[quarter]));
                let masked =
                    _mm256_cmpeq_epi64(_mm256_cvtepu8_epi64(flags), _mm256_setzero_si256());
                let deviation =
                    _mm256_andnot_pd(_mm256_castsi256_pd(masked), _mm256_sub_pd(wide, center));
                first[quarter] = _mm256_add_pd(first[quarter], deviation);
                let square = _mm256_mul_pd(deviation, deviation);
                second[quarter] = _mm256_add_pd(second[quarter], square);
            }
        }
        for quarter in 0..4 {
            store_wide(&mut sums[0], quarter, first[quarter]);
            store_wide(&mut sums[1], quarter, second[quarter]);
        }
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn load_wide(lanes: &[f64; LANES], quarter: usize) -> __m256d {
        let [a, b, c, d] = lanes.as_chunks::<4>().0[quarter];
        _mm256_setr_pd(a, b, c, d)
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn store_wide(lanes: &mut [f64; LANES], quarter: usize, register: __m256d) {
        let four = &mut lanes.as_chunks_mut::<4>().0[quarter];
        // SAFETY: the reference is to four numbers and exclusive; the store needs no alignment.
        unsafe { _mm256_storeu_pd(four.as_mut_ptr(), register) }
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn compiled_here<R>(work: impl FnOnce() -> R) -> R {
        work()
    }

    /// Whole steps, last first. All slices have the same length; what does not fill a step at their start is left.
    #[target_feature(enable = "avx2,fma")]
    pub fn run(given: &Coefficients, run: Run<'_, '_, f32>, state: &mut State) {
        let registers = Registers {
            gamma: _mm256_set1_ps(given.gamma),
            first: _mm256_set1_ps(given.first),
            second: _mm256_set1_ps(given.second),
            across: load(&given.across),
        };
        let (near, far) = (load(&given.near), load(&given.far));
        let rewards = lanes(run.rewards);
        let values = lanes(run.values);
        let advantages = run.advantages.as_rchunks_mut::<WIDTH>().1;
        let returns = run.returns.as_rchunks_mut::<WIDTH>().1;
        let mut later = _mm256_set1_ps(state.value as f32);
        let mut carry = _mm256_set1_ps(state.advantage as f32);
        let mut end = advantages.len();
        while end >= 2 {
            let (low, high) = (end - 2, end - 1);
            let read = |input: &Input<'_, Lanes>, at: usize| match input {
                Input::Separate(cells) => load(&cells[at]),
                Input::Advantages => load(&advantages[at]),
                Input::Returns => load(&returns[at]),
            };
            let (low_values, high_values) = (read(&values, low), read(&values, high));
            let high_scan = registers.scan(read(&rewards, high), high_values, later);
            let low_scan = registers.scan(read(&rewards, low), low_values, high_values);
            let low_scan = _mm256_fmadd_ps(first_lane(high_scan), near, low_scan);
            let high_sum = _mm256_fmadd_ps(carry, near, high_scan);
            let low_sum = _mm256_fmadd_ps(carry, far, low_scan);
            state.advantage = f64::from(_mm256_cvtss_f32(low_scan)) + given.step * state.advantage;
            carry = _mm256_set1_ps(state.advantage as f32);
            later = low_values;
            store(&mut advantages[high], high_sum);
            store(&mut returns[high], _mm256_add_ps(high_sum, high_values));
            store(&mut advantages[low], low_sum);
            store(&mut returns[low], _mm256_add_ps(low_sum, low_values));
            end = low;
        }
        state.value = f64::from(_mm256_cvtss_f32(later));
    }

    fn lanes(input: Input<'_, f32>) -> Input<'_, Lanes> {
        match input {
            Input::Separate(cells) => Input::Separate(cells.as_rchunks::<WIDTH>().1),
            Input::Advantages => Input::Advantages,
            Input::Returns => Input::Returns,
        }
    }
}
