//! `group_advantages`.

use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Dtype, Reader, Writer, shape_text};
use super::detached::detached;
use super::grid::{is_wide, same_shape};
use crate::advantages::groups::{self, Groups, Method};
use crate::failure::Stop;
use crate::rows::name_rows;
use crate::scan::Real;

/// Fills `advantages` [B]; float32 or float64. Groups are int64 ids [B], or each `size` consecutive rows.
#[pyfunction]
#[pyo3(signature = (rewards, advantages, *, method, ids=None, size=1))]
pub fn group_advantages(
    py: Python<'_>,
    rewards: Array<'_, '_>,
    advantages: Array<'_, '_>,
    method: &str,
    ids: Option<Array<'_, '_>>,
    size: usize,
) -> PyResult<()> {
    let call = Call::new("prefkern.data.group_advantages");
    let method = match method {
        "per_group" => Method::PerGroup,
        "per_batch" => Method::PerBatch,
        "centered" => Method::Centered,
        "leave_one_out" => Method::LeaveOneOut,
        "whitened" => Method::Whitened,
        _ => return Err(call.value_error(format!("method is unknown: {method:?}"))),
    };
    if is_wide(&call, "rewards", rewards)? {
        typed::<f64>(py, call, [rewards, advantages], ids, size, method)
    } else {
        typed::<f32>(py, call, [rewards, advantages], ids, size, method)
    }
}

fn typed<T: Dtype + Real>(
    py: Python<'_>,
    mut call: Call,
    [rewards, advantages]: [Array<'_, '_>; 2],
    ids: Option<Array<'_, '_>>,
    size: usize,
    method: Method,
) -> PyResult<()> {
    let rewards: Reader<T> = call.read("rewards", rewards)?;
    let mut advantages: Writer<T> = call.write("advantages", advantages)?;
    let &[rows] = rewards.shape() else {
        let shape = shape_text(rewards.shape());
        return Err(call.value_error(format!(
            "rewards must have one dimension, one for each completion, got shape {shape}"
        )));
    };
    let like = ("rewards", rewards.shape());
    same_shape(&call, like, ("advantages", advantages.shape()))?;
    if rows > u32::MAX as usize {
        return Err(call.value_error(format!("rewards must hold less than 2^32 rows, got {rows}")));
    }
    let ids: Option<Reader<i64>> = ids.map(|ids| call.read("groups", ids)).transpose()?;
    let groups = match &ids {
        Some(ids) => {
            same_shape(&call, like, ("groups", ids.shape()))?;
            Groups::Ids(ids.slice())
        }
        None if size == 0 || rows % size != 0 => {
            return Err(call.value_error(format!(
                "rewards must hold whole groups of {size} rows, got {rows} rows"
            )));
        }
        None => Groups::Size(size),
    };
    let wrong: Vec<usize> = (0..rows)
        .filter(|&row| rewards.slice()[row].widen().abs() > groups::LIMIT)
        .collect();
    if let Some(&first) = wrong.first() {
        let (got, rows) = (rewards.slice()[first].widen(), name_rows(&wrong));
        return Err(call.value_error(format!(
            "rewards must be finite and within +-1e150, or NaN where a completion could not be scored, got {got:e} in {rows}"
        )));
    }
    let (rewards, advantages) = (rewards.slice(), advantages.slice_mut());
    let work = |_: Stop<'_>| groups::advantages(rewards, &groups, method, advantages);
    detached(py, work)
}
