//! GAE's recursion `A_t = delta_t + d A_{t+1}`, eight cells at a time.
//!
//! Cell by cell it is a chain: each advantage waits for the one after it, a product and a sum. Sums over windows of eight
//! cells, `w_t = sum_{k<8} d^k delta_{t+k}`, wait for nothing, and `A_t = w_t + d^8 A_{t+8}` is eight such chains side by
//! side, which the compiler keeps in vector registers. The windows are found by doubling: pairs, fours, eights.
//!
//! Sums run in float64. What is added up in an advantage passes few roundings, at most three for each eight cells between and
//! a dozen more, each of at most 2^-53: rounded to float32, it is that of the sum itself but where that lies as near as this
//! to the middle between two float32.

use std::array::from_fn;

use super::{Cells, Real};

/// Cells of a window.
const LANES: usize = 4;
/// Cells whose deltas are made before they are used: long enough for what is written to be there when it is read across
/// the borders of registers, short enough to stay next to the core. (64 and 512 cells take 1.4 times as long.)
const BLOCK: usize = 64;

/// What the recursion carries from a cell to the one before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    pub value: f64,
    pub advantage: f64,
}

/// The coefficients of the recursion.
#[derive(Clone, Copy)]
pub struct Windows {
    gamma: f64,
    /// The powers of the decay, up to that by which a window passes on what follows it.
    powers: [f64; LANES + 1],
}

type Lanes = [f64; LANES];

/// The deltas of a block and of the window after it, eight in each line of the cache, and the values of the block.
#[repr(align(64))]
struct Block<T> {
    deltas: [f64; BLOCK + LANES],
    values: [[T; LANES]; BLOCK / LANES],
}

impl Windows {
    pub fn new(gamma: f64, decay: f64) -> Self {
        let powers = from_fn(|exponent| decay.powi(exponent as i32));
        Windows { gamma, powers }
    }

    /// Passes the cells of a run from the last on, all but the few at its start that fill no window; returns their number.
    #[inline(always)] // into the function that is compiled with wider registers
    pub fn run<T: Real>(&self, cells: &mut Cells<'_, '_, T>, state: &mut State) -> usize {
        let count = cells.count();
        let left = count % LANES;
        let power = self.powers;
        let mut block = Block {
            deltas: [0.0; BLOCK + LANES],
            values: [[T::ZERO; LANES]; BLOCK / LANES],
        };
        // For each lane, what is behind its window; and the windows of four that follow those of a step.
        let mut behind: Lanes = from_fn(|lane| power[LANES - lane] * state.advantage);
        let mut end = count;
        while end > left {
            let start = end.saturating_sub(BLOCK).max(left);
            self.prepare(&mut block, cells.part(start..end), state.value);
            let steps = (end - start) / LANES;
            let out = cells.part(start..end);
            let advantages = out.advantages.as_chunks_mut::<LANES>().0;
            let returns = out.returns.as_chunks_mut::<LANES>().0;
            for at in (0..steps).rev() {
                let delta = &block.deltas[at * LANES..at * LANES + LANES + 3];
                let pair = |at: usize| delta[at] + power[1] * delta[at + 1];
                let four: Lanes = from_fn(|lane| pair(lane) + power[2] * pair(lane + 2));
                let sums: Lanes = from_fn(|lane| four[lane] + behind[lane]);
                let values = block.values[at];
                advantages[at] = sums.map(T::narrow);
                returns[at] = from_fn(|lane| T::narrow(sums[lane] + values[lane].widen()));
                behind = sums.map(|sum| power[LANES] * sum);
                state.advantage = sums[0];
            }
            state.value = block.values[0][0].widen();
            end = start;
        }
        left
    }

    /// The deltas and values of a block; `value` follows its last cell.
    #[inline(always)]
    fn prepare<T: Real>(&self, block: &mut Block<T>, cells: Cells<'_, '_, T>, value: f64) {
        let (first, count): (Lanes, _) = (from_fn(|lane| block.deltas[lane]), cells.count());
        block.deltas[count..count + LANES].copy_from_slice(&first);
        let deltas = block.deltas.as_chunks_mut::<LANES>().0;
        let (rewards, values) = (cells.rewards(), cells.values());
        let after = values[1..].as_chunks::<LANES>().0;
        let (rewards, values) = (
            rewards.as_chunks::<LANES>().0,
            values.as_chunks::<LANES>().0,
        );
        let last = count / LANES - 1;
        let next = from_fn(|lane| {
            values[last]
                .get(lane + 1)
                .map_or(value, |next| next.widen())
        });
        deltas[last] = self.deltas(&rewards[last], &values[last], next);
        block.values[last] = values[last];
        for at in (0..last).rev() {
            deltas[at] = self.deltas(&rewards[at], &values[at], after[at].map(T::widen));
            block.values[at] = values[at];
        }
    }

    #[inline(always)]
    fn deltas<T: Real>(&self, rewards: &[T; LANES], values: &[T; LANES], next: Lanes) -> Lanes {
        from_fn(|lane| rewards[lane].widen() + self.gamma * next[lane] - values[lane].widen())
    }
}
