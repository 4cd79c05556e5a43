//! `pack`.

use pyo3::prelude::*;

use super::Array;
use crate::buffer::{Call, Reader, Writer};
use crate::packing;
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
    let negative = rows_where(lengths, |length| length < 0);
    if let Some(&first) = negative.first() {
        let (got, rows) = (lengths[first], name_rows(&negative));
        return Err(call.value_error(format!("lengths must not be negative, got {got} in {rows}")));
    }
    let long = rows_where(lengths, |length| length > capacity);
    if let Some(&first) = long.first() {
        let (got, rows) = (lengths[first], name_rows(&long));
        return Err(call.value_error(format!(
            "lengths must not exceed capacity {capacity}, got {got} in {rows}: truncate or split these items first"
        )));
    }
    let placed = py.detach(|| packing::pack(lengths, capacity, order, offsets));
    Ok((placed.items, placed.bins))
}

fn rows_where(lengths: &[i64], wrong: impl Fn(i64) -> bool) -> Vec<usize> {
    (0..lengths.len())
        .filter(|&row| wrong(lengths[row]))
        .collect()
}
