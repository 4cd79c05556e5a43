//! `balance_lengths` and `token_batches`.

use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Reader, Writer};
use super::detached::detached;
use super::packing::check_lengths;
use crate::batches::balance;
use crate::batches::token_batches::{self as batches, Cost, Refused};
use crate::failure::Stop;

/// The part of each of int64 `lengths` [n], into int64 `part_of` [n].
#[pyfunction]
pub fn balance_lengths(
    py: Python<'_>,
    lengths: Array<'_, '_>,
    parts: usize,
    equal: bool,
    part_of: Array<'_, '_>,
) -> PyResult<()> {
    let mut call = Call::new("prefkern.data.balance");
    let lengths: Reader<i64> = call.read("lengths", lengths)?;
    let mut part_of: Writer<i64> = call.write("part_of", part_of)?;
    let (lengths, part_of) = (lengths.slice(), part_of.slice_mut());
    check_lengths(&call, lengths, None)?;
    let count = lengths.len();
    if part_of.len() != count {
        return Err(call.value_error("part_of must hold as many elements as lengths"));
    }
    if parts == 0 || parts > count {
        return Err(call.value_error(format!(
            "k must be at least 1 and at most the number of lengths {count}, got {parts}"
        )));
    }
    if equal && count % parts != 0 {
        return Err(call.value_error(format!(
            "k must divide the number of lengths with equal_size=True, got {count} lengths and k={parts}"
        )));
    }
    let work = |stop: Stop<'_>| balance::balance(lengths, parts, equal, part_of, stop);
    detached(py, work)
}

/// Batches of int64 `lengths` [n] within `budget` into int64 `order` [n] and `offsets` [n + 1]; returns their number.
#[pyfunction]
#[pyo3(signature = (lengths, order, offsets, *, budget, padded, ranks, seed, epoch))]
#[expect(clippy::too_many_arguments)]
pub fn token_batches(
    py: Python<'_>,
    lengths: Array<'_, '_>,
    order: Array<'_, '_>,
    offsets: Array<'_, '_>,
    budget: i64,
    padded: bool,
    ranks: usize,
    seed: u64,
    epoch: u64,
) -> PyResult<usize> {
    let mut call = Call::new("prefkern.data.token_batches");
    let lengths: Reader<i64> = call.read("lengths", lengths)?;
    let mut order: Writer<i64> = call.write("order", order)?;
    let mut offsets: Writer<i64> = call.write("offsets", offsets)?;
    let (lengths, order, offsets) = (lengths.slice(), order.slice_mut(), offsets.slice_mut());
    if order.len() != lengths.len() || offsets.len() != lengths.len() + 1 {
        return Err(
            call.value_error("order must hold as many elements as lengths, offsets one more")
        );
    }
    check_lengths(&call, lengths, Some(("budget", budget)))?;
    if ranks == 0 {
        return Err(call.value_error("ranks must be at least 1, got 0"));
    }
    let cost = if padded { Cost::Padded } else { Cost::Tokens };
    let work = |stop: Stop<'_>| {
        let given = (budget, cost);
        match batches::token_batches(lengths, given, ranks, (seed, epoch), order, stop) {
            Err(Refused::Failed(failure)) => Err(failure),
            Err(Refused::Number(target)) => Ok(Err(target)),
            Ok(bounds) => Ok(Ok(bounds)),
        }
    };
    let bounds = detached(py, work)?.map_err(|target| {
        call.value_error(format!(
            "{} rows cannot make {target} batches, the least multiple of ranks={ranks} that budget={budget} allows: \
             lower ranks, raise budget or add rows",
            lengths.len()
        ))
    })?;
    offsets[..bounds.len()].copy_from_slice(&bounds);
    Ok(bounds.len() - 1)
}
