use super::*;
use crate::rows::Rows;

fn problem<'a>(rewards: &'a [f64], values: &'a [f64], rows: Rows<'a>) -> Gae<'a, f64> {
    Gae {
        rewards: Input::Separate(rewards),
        values: Input::Separate(values),
        grid: Grid {
            rows,
            mask: None,
            terminated: None,
            bootstrap: None,
        },
        gamma: 0.5,
        lam: 0.5,
        masked: Masked::Skip,
        exact: false,
    }
}

fn run(gae: &Gae<'_, f64>, threads: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut advantages, mut returns) = (
        vec![f64::NAN; gae.grid.rows.total()],
        vec![f64::NAN; gae.grid.rows.total()],
    );
    gae.run(&mut advantages, &mut returns, threads);
    (advantages, returns)
}

// delta = [1 + 2 - 2, 2 + 4 - 4, 3 + 0 - 8] = [1, 2, -5]; A = [1 + .75/4, 2 - 1.25, -5]
const REWARDS: [f64; 3] = [1.0, 2.0, 3.0];
const VALUES: [f64; 3] = [2.0, 4.0, 8.0];
const ROW: Rows<'static> = Rows::Padded { rows: 1, width: 3 };

#[test]
fn by_hand() {
    let (advantages, returns) = run(&problem(&REWARDS, &VALUES, ROW), 1);
    assert_eq!(advantages, [1.1875, 0.75, -5.0]);
    assert_eq!(returns, [3.1875, 4.75, 3.0]);
}

#[test]
fn bootstrap_enters_after_the_last_cell() {
    let mut gae = problem(&REWARDS, &VALUES, ROW);
    gae.grid.bootstrap = Some(&[4.0]);
    assert_eq!(run(&gae, 1).0, [1.3125, 1.25, -3.0]);
}

#[test]
fn termination_hides_what_follows() {
    let rewards = [1.0, 2.0, f64::NAN];
    let mut gae = problem(&rewards, &VALUES, ROW);
    gae.grid.terminated = Some(&[0, 1, 0]);
    let (advantages, _) = run(&gae, 1);
    assert_eq!(advantages[..2], [0.5, -2.0]);
    assert!(advantages[2].is_nan());
}

#[test]
fn masked_cells() {
    let mask = [1, 0, 1];
    let with = |masked| {
        let mut gae = problem(&REWARDS, &VALUES, ROW);
        (gae.grid.mask, gae.masked) = (Some(&mask[..]), masked);
        run(&gae, 1).0
    };
    // skip: A_0 = 1 + .5 * 8 - 2 + .25 * -5
    assert_eq!(with(Masked::Skip), [1.75, 0.0, -5.0]);
    // zero: A_1 = 0 + .5 * 8 - 0 - 1.25 = 2.75, A_0 = 1 + 0 - 2 + .25 * 2.75
    assert_eq!(with(Masked::Zero), [-0.3125, 0.0, -5.0]);
    assert_eq!(with(Masked::Read), [1.1875, 0.0, -5.0]);
}

#[test]
fn in_place_is_the_same() {
    let expected = run(&problem(&REWARDS, &VALUES, ROW), 1);
    for swapped in [false, true] {
        let (mut first, mut second) = (REWARDS.to_vec(), VALUES.to_vec());
        let mut gae = problem(&REWARDS, &VALUES, ROW);
        (gae.rewards, gae.values) = (Input::Advantages, Input::Returns);
        if swapped {
            (gae.rewards, gae.values) = (Input::Returns, Input::Advantages);
            (first, second) = (second, first);
        }
        gae.run(&mut first, &mut second, 1);
        assert_eq!((first, second), expected);
    }
}

/// Numbers, flags and rows for the scans: some cells are masked, or all, or none, and what they hold must not be read.
struct Given {
    rewards: Vec<f32>,
    values: Vec<f32>,
    mask: Option<Vec<u8>>,
    terminated: Option<Vec<u8>>,
    width: usize,
}

const ROWS: usize = 3;
const BOOTSTRAP: [f32; ROWS] = [1.0, 2.0, 3.0];

impl Given {
    /// `scored` of eight cells on an average, in runs of `runs`.
    fn new(width: usize, scored: u64, runs: usize, ends: bool) -> Self {
        let cells = ROWS * width;
        let hash = |t: usize| (t as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let flag = |t: usize| u8::from(hash(t / runs) % 8 < scored) * (1 + t as u8 % 3);
        let wave = |by: f32| {
            let cell = |t: usize| match flag(t) {
                0 => f32::NAN,
                _ => (t as f32 * by).sin() * 3.0,
            };
            (0..cells).map(cell).collect()
        };
        Given {
            rewards: wave(0.9),
            values: wave(1.7),
            mask: (scored < 8).then(|| (0..cells).map(flag).collect()),
            terminated: ends.then(|| (0..cells).map(|t| u8::from(hash(t) % 50 == 0)).collect()),
            width,
        }
    }

    fn gae<'a>(&'a self, inputs: [Input<'a, f32>; 2], exact: bool) -> Gae<'a, f32> {
        Gae {
            rewards: inputs[0],
            values: inputs[1],
            grid: Grid {
                rows: Rows::Padded {
                    rows: ROWS,
                    width: self.width,
                },
                mask: self.mask.as_deref(),
                terminated: self.terminated.as_deref(),
                bootstrap: Some(&BOOTSTRAP),
            },
            gamma: 0.99,
            lam: 0.95,
            masked: Masked::Skip,
            exact,
        }
    }

    fn fresh(&self, exact: bool) -> (Vec<f32>, Vec<f32>, Moments) {
        let mut out = [&self.rewards, &self.values].map(|cells| vec![f32::NAN; cells.len()]);
        let [advantages, returns] = &mut out;
        let inputs = [&self.rewards, &self.values].map(|x| Input::Separate(&x[..]));
        let gae = self.gae(inputs, exact);
        let moments = gae.run_with_moments(advantages, returns, 1).unwrap();
        let [advantages, returns] = out;
        (advantages, returns, moments)
    }

    /// The sum of the absolute terms of each advantage.
    fn terms(&self) -> Vec<f32> {
        let pairs = self.rewards.iter().zip(&self.values);
        let given = Given {
            rewards: pairs.map(|(r, v)| r.abs() + 2.0 * v.abs()).collect(),
            values: self.values.iter().map(|v| v.abs()).collect(),
            mask: self.mask.clone(),
            terminated: self.terminated.clone(),
            width: self.width,
        };
        given.fresh(true).0
    }
}

/// Whether two numbers are the same but for a rounding to float32 and for what float64 loses of `terms`.
fn near(a: f32, b: f32, terms: f32) -> bool {
    let (wide, other) = (f64::from(a), f64::from(b));
    (wide - other).abs() <= 2f64.powi(-23) * other.abs() + 2f64.powi(-45) * f64::from(terms)
}

#[test]
fn four_cells_at_a_time_or_one() {
    let widths = (0..36).chain([
        63, 64, 65, 126, 127, 128, 129, 135, 136, 137, 255, 256, 257, 300, 1000,
    ]);
    let kinds = [(8, 1), (0, 1), (4, 1), (7, 1), (5, 20), (6, 90)];
    let cases = widths.flat_map(|width| kinds.map(|(scored, runs)| (width, scored, runs)));
    for ((width, scored, runs), ends) in cases.flat_map(|case| [(case, false), (case, true)]) {
        let given = Given::new(width, scored, runs, ends);
        let (exact, exact_returns, wanted) = given.fresh(true);
        let (advantages, returns, moments) = given.fresh(false);
        let terms = given.terms();
        let mut apart = 0;
        for t in 0..ROWS * width {
            assert!(near(advantages[t], exact[t], terms[t]));
            assert!(near(returns[t], exact_returns[t], terms[t]));
            apart += usize::from(advantages[t] != exact[t]);
            let hidden = given.mask.as_ref().is_some_and(|mask| mask[t] == 0);
            assert!(!hidden || (advantages[t], returns[t]) == (0.0, 0.0));
        }
        assert!(apart <= 1); // they are rounded apart where float64 hits the middle between two float32
        assert_eq!(moments.count, wanted.count);
        assert_eq!(moments, moments_of_rows(&advantages, &given));
        for swapped in [false, true] {
            let mut pair = [given.rewards.clone(), given.values.clone()];
            let mut inputs = [Input::Advantages, Input::Returns];
            if swapped {
                pair.reverse();
                inputs.reverse();
            }
            let [mut first, mut second] = pair;
            given.gae(inputs, false).run(&mut first, &mut second, 1);
            assert_eq!((&first, &second), (&advantages, &returns));
        }
    }
}

fn moments_of_rows(advantages: &[f32], given: &Given) -> Moments {
    let cells = |row: usize| row * given.width..(row + 1) * given.width;
    let found = (0..ROWS).map(|row| {
        let mask = given.mask.as_ref().map(|mask| &mask[cells(row)]);
        Moments::of(&advantages[cells(row)], mask, 1).unwrap()
    });
    found.fold(Moments::NONE, Moments::merge)
}

#[test]
fn windows_are_what_runs() {
    // From the last cell on, the 1 is lost in 1 + 2^60 - 2^60; the pair cancels first in a window.
    let mut rewards = vec![0f32; 8];
    (rewards[4], rewards[5], rewards[7]) = (-2f32.powi(60), 2f32.powi(60), 1.0);
    let values = vec![0f32; 8];
    let advantage = |exact| {
        let gae = Gae {
            rewards: Input::Separate(&rewards),
            values: Input::Separate(&values),
            grid: Grid {
                rows: Rows::Padded { rows: 1, width: 8 },
                mask: None,
                terminated: None,
                bootstrap: None,
            },
            gamma: 1.0,
            lam: 1.0,
            masked: Masked::Skip,
            exact,
        };
        let (mut advantages, mut returns) = (vec![0f32; 8], vec![0f32; 8]);
        gae.run(&mut advantages, &mut returns, 1);
        advantages[0]
    };
    assert_eq!((advantage(true), advantage(false)), (0.0, 1.0));
}

#[test]
fn rows_without_cells_take_no_time() {
    let gae = problem(
        &[],
        &[],
        Rows::Padded {
            rows: usize::MAX,
            width: 0,
        },
    );
    gae.run(&mut [], &mut [], 4);
    assert_eq!(gae.run_with_moments(&mut [], &mut [], 4), Ok(Moments::NONE));
}

#[test]
fn threads_change_nothing() {
    let cells = 1 << 18;
    let rewards: Vec<f64> = (0..cells).map(|cell| (cell as f64).sin()).collect();
    let values: Vec<f64> = (0..cells).map(|cell| (cell as f64 * 0.7).cos()).collect();
    let offsets: Vec<i64> = (0..=1024).map(|row: i64| row * row / 4).collect();
    assert_eq!(offsets[1024] as usize, cells);
    let gae = problem(&rewards, &values, Rows::Packed(&offsets));
    assert_eq!(run(&gae, 1), run(&gae, 3));
}
