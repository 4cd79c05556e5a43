use super::*;

fn problem<'a>(rewards: &'a [f64], values: &'a [f64], rows: Rows<'a>) -> Gae<'a, f64> {
    Gae {
        rewards: Input::Separate(rewards),
        values: Input::Separate(values),
        terminated: None,
        mask: None,
        bootstrap: None,
        rows,
        gamma: 0.5,
        lam: 0.5,
        masked: Masked::Skip,
        scan: None,
    }
}

fn run(gae: &Gae<'_, f64>, threads: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut advantages, mut returns) = (
        vec![f64::NAN; gae.rows.total()],
        vec![f64::NAN; gae.rows.total()],
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
    let gae = Gae {
        bootstrap: Some(&[4.0]),
        ..problem(&REWARDS, &VALUES, ROW)
    };
    assert_eq!(run(&gae, 1).0, [1.3125, 1.25, -3.0]);
}

#[test]
fn termination_hides_what_follows() {
    let rewards = [1.0, 2.0, f64::NAN];
    let gae = Gae {
        terminated: Some(&[0, 1, 0]),
        ..problem(&rewards, &VALUES, ROW)
    };
    let (advantages, _) = run(&gae, 1);
    assert_eq!(advantages[..2], [0.5, -2.0]);
    assert!(advantages[2].is_nan());
}

#[test]
fn masked_cells() {
    let mask = [1, 0, 1];
    let with = |masked| {
        run(
            &Gae {
                mask: Some(&mask),
                masked,
                ..problem(&REWARDS, &VALUES, ROW)
            },
            1,
        )
        .0
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

#[test]
fn scanned_in_vector_registers() {
    for width in (0..70).chain([255, 1000]) {
        let cell = |t: usize, by: f32| (t as f32 * by).sin() * 3.0;
        let rewards: Vec<f32> = (0..3 * width).map(|t| cell(t, 0.9)).collect();
        let values: Vec<f32> = (0..3 * width).map(|t| cell(t, 1.7)).collect();
        let terms: Vec<f32> = rewards
            .iter()
            .zip(&values)
            .map(|(r, v)| r.abs() + 2.0 * v.abs())
            .collect();
        let sizes: Vec<f32> = values.iter().map(|v| v.abs()).collect();
        let problem = |rewards, values, scan| Gae {
            rewards,
            values,
            terminated: None,
            mask: None,
            bootstrap: Some(&[1.0, 2.0, 3.0]),
            rows: Rows::Padded { rows: 3, width },
            gamma: 0.99,
            lam: 0.95,
            masked: Masked::Skip,
            scan,
        };
        let scan = Scan::new(0.99, 0.99 * 0.95);
        let fresh = |rewards, values, scan| {
            let mut out = (vec![f32::NAN; 3 * width], vec![f32::NAN; 3 * width]);
            let gae = problem(Input::Separate(rewards), Input::Separate(values), scan);
            gae.run(&mut out.0, &mut out.1, 1);
            out
        };
        let fast = fresh(&rewards, &values, scan);
        let exact = fresh(&rewards, &values, None);
        let (bound, _) = fresh(&terms, &sizes, None);
        for ((fast, exact), bound) in fast.0.iter().zip(&exact.0).zip(&bound) {
            assert!((fast - exact).abs() <= bound * (2f32.powi(-20) + 2f32.powi(-23)));
        }
        for swapped in [false, true] {
            let mut pair = [rewards.clone(), values.clone()];
            let mut inputs = [Input::Advantages, Input::Returns];
            if swapped {
                pair.reverse();
                inputs.reverse();
            }
            let [mut first, mut second] = pair;
            problem(inputs[0], inputs[1], scan).run(&mut first, &mut second, 1);
            assert_eq!((&first, &second), (&fast.0, &fast.1));
        }
    }
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
