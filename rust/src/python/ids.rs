//! Arrays of token ids.

use pyo3::buffer::PyUntypedBuffer;
use pyo3::prelude::*;

use super::Array;
use super::buffer::{Call, Reader};
use crate::batches::ids::Ids;

/// An int32 or int64 column of token ids.
pub enum Column {
    I32(Reader<i32>),
    I64(Reader<i64>),
}

impl Column {
    pub fn read(call: &mut Call, name: &str, array: Array<'_, '_>) -> PyResult<Self> {
        if PyUntypedBuffer::get(array).is_ok_and(|buffer| buffer.item_size() == 4) {
            Ok(Column::I32(call.read(name, array)?))
        } else {
            Ok(Column::I64(call.read(name, array)?))
        }
    }

    pub fn ids(&self) -> Ids<'_> {
        match self {
            Column::I32(reader) => Ids::I32(reader.slice()),
            Column::I64(reader) => Ids::I64(reader.slice()),
        }
    }

    pub fn shape(&self) -> &[usize] {
        match self {
            Column::I32(reader) => reader.shape(),
            Column::I64(reader) => reader.shape(),
        }
    }
}
