//! `pack`.

use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Reader, Writer};
use super::detached::detached;
use crate::batches::packing;
use crate::failure::Stop;
use crate::rows::name_rows;

/// Best-fit decreasing of int64 `lengths` [n] into `order` [n] and `offsets` [n + 1]; returns (items placed, bins).
#[pyfunction]
pub fn pack(
    py: Python<'_>,
    lengths: Array<'_, '_>,
    capacity: i64,
    order: Array<'_, '_>,
    offsets: Array<'_, '_>,
) -> PyResult<(usize, usize)> {
    let mut call = Call::new("prefkern.data.pack");
    let lengths: Reader<i64> = call.read("lengths", lengths)?;
    let mut order: Writer<i64> = call.write("order", order)?;
    let mut offsets: Writer<i64> = call.write("offsets", offsets)?;
    let (lengths, order, offsets) = (lengths.slice(), order.slice_mut(), offsets.slice_mut());
    if order.len() != lengths.len() || offsets.len() != lengths.len() + 1 {
        return Err(
            call.value_error("order must hold as many elements as lengths, offsets one more")
        );
    }
    check_lengths(&call, lengths, Some(("capacity", capacity)))?;
    let work = |stop: Stop<'_>| packing::pack(lengths, capacity, order, offsets, stop);
    let placed = detached(py, work)?;
    Ok((placed.items, placed.bins))
}

/// Refuses negative lengths, those above a named limit with their rows, sums that do not fit int64, and 2^32 rows.
pub fn check_lengths(call: &Call, lengths: &[i64], limit: Option<(&str, i64)>) -> PyResult<()> {
    let high = limit.map_or(i64::MAX, |(_, high)| high);
    let sound = |&length: &i64| (0..=high).contains(&length);
    if !lengths.iter().all(sound) {
        let negative = rows_where(lengths, |length| length < 0);
        if let Some(&first) = negative.first() {
            let (got, rows) = (lengths[first], name_rows(&negative));
            return Err(
                call.value_error(format!("lengths must not be negative, got {got} in {rows}"))
            );
        }
        let long = rows_where(lengths, |length| length > high);
        let (got, rows) = (lengths[long[0]], name_rows(&long));
        let name = limit.map_or("", |(name, _)| name);
        return Err(call.value_error(format!(
            "lengths must not exceed {name} {high}, got {got} in {rows}: truncate or split these items first"
        )));
    }
    if u32::try_from(lengths.len()).is_err() || lengths.len() as u32 == u32::MAX {
        let count = lengths.len();
        return Err(call.value_error(format!(
            "lengths must hold less than 2^32 - 1 elements, got {count}"
        )));
    }
    if limit.is_none() && i64::try_from(lengths.iter().map(|&l| l as u128).sum::<u128>()).is_err() {
        return Err(call.value_error("the sum of lengths must fit int64"));
    }
    Ok(())
}

fn rows_where(lengths: &[i64], wrong: impl Fn(i64) -> bool) -> Vec<usize> {
    (0..lengths.len())
        .filter(|&row| wrong(lengths[row]))
        .collect()
}
