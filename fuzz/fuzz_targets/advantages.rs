//! Whatever offsets, lengths and flags: no panic, no memory touched beyond the slices (AddressSanitizer), and results that
//! do not depend on threads, on where the outputs lie, or, beyond a rounding, on how many cells are summed at a time.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

use prefkern_core::advantages::gae::{Gae, Masked};
use prefkern_core::advantages::groups::{self, Groups, Method};
use prefkern_core::advantages::moments::{self, Moments};
use prefkern_core::advantages::returns::Discounted;
use prefkern_core::advantages::token_rewards::{Estimator, Rewards};
use prefkern_core::batches::packing;
use prefkern_core::rows::{self, Grid, Rows};
use prefkern_core::scan::{Input, Real};

#[derive(Arbitrary, Debug)]
struct Case {
    /// Taken as they are, they are mostly refused.
    offsets: Vec<i64>,
    total: u16,
    lengths: Vec<u8>,
    padded: Option<(u8, u8)>,
    numbers: Vec<i8>,
    /// Anything that a float can be.
    wild: Vec<(u16, u32)>,
    flags: Vec<u8>,
    with: [bool; 5],
    masked: u8,
    gamma: u8,
    lam: u8,
    threads: u8,
    ids: Vec<i64>,
    capacity: i64,
}

fuzz_target!(|case: Case| {
    let _ = Rows::packed("offsets", &case.offsets, usize::from(case.total));
    let _ = rows::check_offsets("offsets", &case.offsets);
    let mut offsets = vec![0];
    for &length in case.lengths.iter().take(64) {
        offsets.push(offsets[offsets.len() - 1] + i64::from(length));
    }
    let rows = match case.padded {
        Some((rows, width)) => Rows::Padded {
            rows: usize::from(rows % 16),
            width: usize::from(width),
        },
        None => {
            Rows::packed("offsets", &offsets, offsets[offsets.len() - 1] as usize).expect("valid")
        }
    };
    advantages::<f32>(&case, rows, f32::from_bits);
    advantages::<f64>(&case, rows, |bits| f64::from(f32::from_bits(bits)));
    pack(&case);
    group(&case);
});

fn flags(case: &Case, from: usize, cells: usize) -> Vec<u8> {
    let cycle = case.flags.iter().cycle().skip(from);
    let mut flags: Vec<u8> = cycle.take(cells).copied().collect();
    flags.resize(cells, 1);
    flags
}

fn numbers<T: Real>(case: &Case, from: usize, cells: usize) -> Vec<T> {
    let cycle = case.numbers.iter().cycle().skip(from).take(cells);
    let mut numbers: Vec<T> = cycle.map(|&n| T::narrow(f64::from(n) / 16.0)).collect();
    numbers.resize(cells, T::narrow(0.3));
    numbers
}

fn advantages<T: Real + PartialEq + std::fmt::Debug>(
    case: &Case,
    rows: Rows<'_>,
    any: fn(u32) -> T,
) {
    let cells = rows.total();
    let (mut rewards, values) = (numbers::<T>(case, 0, cells), numbers::<T>(case, 1, cells));
    if case.with[4] && cells > 0 {
        for &(cell, bits) in &case.wild {
            rewards[usize::from(cell) % cells] = any(bits);
        }
    }
    let (mask, terminated) = (flags(case, 0, cells), flags(case, 3, cells));
    let bootstrap = numbers::<T>(case, 2, rows.count());
    let gamma = f64::from(case.gamma) / 255.0;
    let lam = f64::from(case.lam) / 255.0;
    let masked = [Masked::Skip, Masked::Zero, Masked::Read][usize::from(case.masked % 3)];
    let threads = usize::from(case.threads % 4);
    let used = case.with[1].then_some(&mask[..]);
    let grid = Grid {
        rows,
        mask: used,
        terminated: case.with[0].then_some(&terminated[..]),
        bootstrap: case.with[2].then_some(&bootstrap[..]),
    };
    let problem = |rewards, values, exact| Gae::<T> {
        rewards,
        values,
        grid,
        gamma,
        lam,
        masked,
        exact,
    };
    let run = |exact, threads| {
        let [mut advantages, mut returns] = [(); 2].map(|()| vec![T::narrow(f64::NAN); cells]);
        let gae = problem(Input::Separate(&rewards), Input::Separate(&values), exact);
        let moments = gae.run_with_moments(&mut advantages, &mut returns, threads);
        (advantages, returns, moments.expect("memory"))
    };
    let same = |a: &[T], b: &[T]| {
        a.iter()
            .zip(b)
            .all(|(a, b)| a == b || (a.widen().is_nan() && b.widen().is_nan()))
    };
    let (exact, exact_returns, _) = run(true, 1);
    let (mut first, mut second) = (values.clone(), rewards.clone());
    for by_cell in [false, true] {
        let (fast, fast_returns, moments) = run(by_cell, 1);
        let (again, again_returns, _) = run(by_cell, threads);
        assert!(same(&fast, &again) && same(&fast_returns, &again_returns));
        (first, second) = (values.clone(), rewards.clone());
        problem(Input::Returns, Input::Advantages, by_cell).run(&mut first, &mut second, threads);
        assert!(same(&fast, &first) && same(&fast_returns, &second));
        if case.with[1] {
            assert!((0..cells).all(|cell| mask[cell] != 0 || fast[cell] == T::ZERO));
        }
        if !case.with[4] {
            // Numbers of a few bits: float64 loses less than 1e-9 of their sums, which are rounded once.
            let near = |a: &[T], b: &[T]| {
                a.iter().zip(b).all(|(a, b)| {
                    let rounding = if size_of::<T>() == 4 {
                        2f64.powi(-23)
                    } else {
                        0.0
                    };
                    (a.widen() - b.widen()).abs() <= 1e-9 + rounding * b.widen().abs()
                })
            };
            assert!(near(&fast, &exact) && near(&fast_returns, &exact_returns));
        }
        let found = Moments::of(&fast, used, threads).expect("memory");
        assert_eq!(found.count, moments.count);
    }
    moments::standardise(None, used, [0.5, 2.0, 0.0], &mut first, threads);
    let discounted = Discounted {
        rewards: &rewards,
        grid,
        gamma,
        masked,
    };
    discounted.run(&mut first, threads);
    let given = Rewards {
        logps: &rewards,
        ref_logps: &values,
        scores: &bootstrap,
        grid,
        kl_coef: lam,
        estimator: [Estimator::K1, Estimator::K2, Estimator::K3][usize::from(case.masked / 3 % 3)],
        after_last: case.with[3],
    };
    let _ = given.run(&mut second, threads);
}

fn pack(case: &Case) {
    let capacity = case.capacity.saturating_abs().clamp(1, 1 << 40);
    let lengths: Vec<i64> = case
        .offsets
        .iter()
        .map(|length| length.rem_euclid(capacity + 1))
        .collect();
    let (mut order, mut offsets) = (vec![-1; lengths.len()], vec![-1; lengths.len() + 1]);
    let placed =
        packing::pack(&lengths, capacity, &mut order, &mut offsets, &|| false).expect("memory");
    for bin in 0..placed.bins {
        let items = &order[offsets[bin] as usize..offsets[bin + 1] as usize];
        assert!(
            items
                .iter()
                .map(|&item| lengths[item as usize])
                .sum::<i64>()
                <= capacity
        );
    }
    let mut items = order[..placed.items].to_vec();
    items.sort_unstable();
    items.dedup();
    assert_eq!(
        items.len(),
        lengths.iter().filter(|&&length| length > 0).count()
    );
}

fn group(case: &Case) {
    let rewards = numbers::<f32>(case, 0, case.ids.len());
    let mut found = vec![f32::NAN; rewards.len()];
    let groups = match case.with[3] {
        true => Groups::Ids(&case.ids),
        false => Groups::Size(usize::from(case.threads) + 1),
    };
    for method in [
        Method::PerGroup,
        Method::PerBatch,
        Method::Centered,
        Method::LeaveOneOut,
        Method::Whitened,
    ] {
        groups::advantages(&rewards, &groups, method, &mut found).expect("memory");
        assert!(found.iter().all(|advantage| advantage.is_finite()));
    }
}
