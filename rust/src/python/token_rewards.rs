//! `token_rewards`.

use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Dtype, Reader, Writer};
use super::grid::{Cells, Given, is_wide, per_row, same_shape};
use crate::advantages::token_rewards::{Estimator, Refused, Rewards};
use crate::rows::name_rows;
use crate::scan::Real;

struct Options {
    kl_coef: f64,
    estimator: Estimator,
    after_last: bool,
    threads: usize,
}

/// Fills `rewards`; float32 or float64, [B, T], or [N] with `cu_seqlens`; scores are [B], the mask is uint8.
#[pyfunction]
#[pyo3(signature = (logps, ref_logps, scores, rewards, *, kl_coef, kl_estimator, after_last, mask=None, cu_seqlens=None, threads=1))]
#[expect(clippy::too_many_arguments)]
pub fn token_rewards(
    py: Python<'_>,
    logps: Array<'_, '_>,
    ref_logps: Array<'_, '_>,
    scores: Array<'_, '_>,
    rewards: Array<'_, '_>,
    kl_coef: f64,
    kl_estimator: &str,
    after_last: bool,
    mask: Option<Array<'_, '_>>,
    cu_seqlens: Option<Array<'_, '_>>,
    threads: usize,
) -> PyResult<()> {
    let call = Call::new("prefkern.data.token_rewards");
    let estimator = match kl_estimator {
        "k1" => Estimator::K1,
        "k2" => Estimator::K2,
        "k3" => Estimator::K3,
        _ => {
            return Err(call.value_error(format!(
                "kl_estimator must be k1, k2 or k3, got {kl_estimator:?}"
            )));
        }
    };
    let options = Options {
        kl_coef,
        estimator,
        after_last,
        threads,
    };
    let given = Given {
        mask,
        cu_seqlens,
        ..Given::default()
    };
    let arrays = [logps, ref_logps, scores, rewards];
    if is_wide(&call, "logps", logps)? {
        typed::<f64>(py, call, arrays, &given, &options)
    } else {
        typed::<f32>(py, call, arrays, &given, &options)
    }
}

fn typed<T: Dtype + Real>(
    py: Python<'_>,
    mut call: Call,
    [logps, ref_logps, scores, rewards]: [Array<'_, '_>; 4],
    given: &Given<'_, '_>,
    options: &Options,
) -> PyResult<()> {
    let mut rewards: Writer<T> = call.write("rewards", rewards)?;
    let logps: Reader<T> = call.read("logps", logps)?;
    let ref_logps: Reader<T> = call.read("ref_logps", ref_logps)?;
    let like = ("logps", logps.shape());
    same_shape(&call, like, ("ref_logps", ref_logps.shape()))?;
    same_shape(&call, like, ("rewards", rewards.shape()))?;
    let cells = Cells::<T>::read(&mut call, like, given)?;
    let scores: Reader<T> = per_row(&mut call, "scores", scores, cells.rows())?;
    let scores = scores.slice();
    let wrong: Vec<usize> = (0..scores.len())
        .filter(|&row| !scores[row].widen().is_finite())
        .collect();
    if let Some(&first) = wrong.first() {
        let (got, rows) = (python(scores[first].widen()), name_rows(&wrong));
        return Err(call.value_error(format!(
            "scores must be finite, got {got} in {rows}: drop rows that could not be scored"
        )));
    }
    let problem = Rewards {
        logps: logps.slice(),
        ref_logps: ref_logps.slice(),
        scores,
        grid: cells.grid(),
        kl_coef: options.kl_coef,
        estimator: options.estimator,
        after_last: options.after_last,
    };
    let rewards = rewards.slice_mut();
    py.detach(|| problem.run(rewards, options.threads))
        .map_err(|refused| match refused {
            Refused::Empty(rows) => call.value_error(format!(
                "scores of rows without a scored position must be 0, because nothing can carry them, got others in {}",
                name_rows(&rows)
            )),
            Refused::NotFinite(rows) => call.value_error(format!(
                "logps and ref_logps must give a finite penalty at every scored position, got NaN or infinity in {}",
                name_rows(&rows)
            )),
        })
}

/// A number as Python writes it.
fn python(number: f64) -> String {
    if number.is_nan() {
        "nan".to_owned()
    } else {
        number.to_string()
    }
}
