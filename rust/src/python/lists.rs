//! `flatten`: Python lists of numbers, or of lists of numbers, into a flat array.

use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use super::Array;
use super::buffer::{Call, Dtype, Writer, explained};
use super::exact_lists::{self, Exact};

/// Copies the numbers of a list (or tuple) of numbers, or with `nested` of lists (or tuples) of numbers, into `values`,
/// int64 or float64, which holds exactly their number. An element that is no such number is named, as `name[row][position]`
/// on behalf of `place`.
#[pyfunction]
pub fn flatten(
    place: &str,
    name: &str,
    rows: Array<'_, '_>,
    values: Array<'_, '_>,
    integers: bool,
    nested: bool,
) -> PyResult<()> {
    if integers {
        typed::<i64>(
            place,
            name,
            "an integer that fits int64",
            rows,
            values,
            nested,
        )
    } else {
        typed::<f64>(place, name, "a number", rows, values, nested)
    }
}

fn typed<'py, T>(
    place: &str,
    name: &str,
    kind: &str,
    rows: Array<'_, 'py>,
    values: Array<'_, 'py>,
    nested: bool,
) -> PyResult<()>
where
    T: Dtype + Exact + for<'a> FromPyObject<'a, 'py>,
{
    if all_exact::<T>(&mut Call::new(place), rows, values, nested)? {
        return Ok(());
    }
    let mut call = Call::new(place);
    // Reading an element may run Python code, so that the output is borrowed only after the last one was read.
    let mut found: Vec<T> = Vec::new();
    let mut read = |position: usize, item: &Bound<'py, PyAny>, row: &str| match item.extract() {
        Ok(value) => {
            found.push(value);
            Ok(())
        }
        Err(error) => {
            let got = describe(item);
            let message = format!("{name}{row}[{position}] must be {kind}, got {got}");
            Err(explained(item.py(), error.into(), call.type_error(message)))
        }
    };
    if nested {
        each(rows, |row, items| {
            let row = format!("[{row}]");
            each(items, |position, item| read(position, item, &row))
        })?;
    } else {
        each(rows, |position, item| read(position, item, ""))?;
    }
    let mut values: Writer<T> = call.write("values", values)?;
    let values = values.slice_mut();
    if values.len() != found.len() {
        return Err(call.value_error(format!(
            "{name} holds {} numbers, not {}",
            found.len(),
            values.len()
        )));
    }
    values.copy_from_slice(&found);
    Ok(())
}

/// Copies numbers that are all exact ints, or exact floats, in which case no Python code runs; or says that some are not.
fn all_exact<T: Dtype + Exact>(
    call: &mut Call,
    rows: Array<'_, '_>,
    values: Array<'_, '_>,
    nested: bool,
) -> PyResult<bool> {
    let mut values: Writer<T> = call.write("values", values)?;
    let mut rest = values.slice_mut();
    if !nested {
        return Ok(exact_lists::copy(rows, rest));
    }
    let mut copied = true;
    each(rows, |_, items| {
        let cells = exact_lists::length(items).filter(|_| copied);
        let taken = std::mem::take(&mut rest);
        match cells.and_then(|cells| taken.split_at_mut_checked(cells)) {
            Some((cells, after)) => {
                copied = exact_lists::copy(items, cells);
                rest = after;
            }
            _ => copied = false,
        }
        Ok(())
    })?;
    Ok(copied && rest.is_empty())
}

/// Calls `work` with the elements of a list or tuple and their positions.
fn each<'py>(
    items: Array<'_, 'py>,
    mut work: impl FnMut(usize, &Bound<'py, PyAny>) -> PyResult<()>,
) -> PyResult<()> {
    match items.cast::<PyList>() {
        Ok(list) => list
            .iter()
            .enumerate()
            .try_for_each(|(position, item)| work(position, &item)),
        Err(_) => items
            .cast::<PyTuple>()?
            .iter()
            .enumerate()
            .try_for_each(|(position, item)| work(position, &item)),
    }
}

fn describe(item: &Bound<'_, PyAny>) -> String {
    let kind = item
        .get_type()
        .name()
        .map_or_else(|_| "an object".to_owned(), |name| name.to_string());
    match item.repr() {
        Ok(text) if text.len().is_ok_and(|length| length <= 40) => format!("{kind} {text}"),
        _ => kind,
    }
}
