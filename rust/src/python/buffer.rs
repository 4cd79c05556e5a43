//! Python buffers as Rust slices: with `exact_lists.rs`, the `unsafe` code of the crate that touches Python objects.
//!
//! A slice is sound when its memory is initialised, aligned, contiguous, of the right type and alive, and when no `&mut`
//! overlaps another reference. Python guarantees the first and the last but one: an exported buffer is neither freed nor
//! moved until it is released, and the owners below release it only when they are dropped. (NumPy has a switch of its own
//! that breaks this promise, `resize(refcheck=False)`: no reader of buffers survives it.) `Call` guarantees the rest: format,
//! alignment and contiguity are checked, and memory that is written may overlap nothing else of this call or of any other
//! that is under way. What Rust cannot see is other code that writes to an array during the call: as with NumPy's own
//! functions, that is the caller's to avoid.
#![allow(unsafe_code)]

use std::ops::Range;
use std::process;
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::buffer::{Element, PyBuffer, PyUntypedBuffer};
use pyo3::exceptions::{PyBufferError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;

/// The element types that cross the boundary, under their NumPy names.
pub trait Dtype: Element + Send + Sync {
    const NAME: &'static str;
}

impl Dtype for u8 {
    const NAME: &'static str = "uint8";
}
impl Dtype for i32 {
    const NAME: &'static str = "int32";
}
impl Dtype for i64 {
    const NAME: &'static str = "int64";
}
impl Dtype for f32 {
    const NAME: &'static str = "float32";
}
impl Dtype for f64 {
    const NAME: &'static str = "float64";
}

/// A registered, contiguous, aligned buffer that is only read.
pub struct Reader<T: Dtype>(PyBuffer<T>);

/// A registered, contiguous, aligned, writable buffer whose memory no other argument of the call shares.
pub struct Writer<T: Dtype>(PyBuffer<T>);

/// An input that may be exactly one of the outputs, named by its position among them.
pub enum Source<T: Dtype> {
    Separate(Reader<T>),
    Output { output: usize, shape: Vec<usize> },
}

impl<T: Dtype> Source<T> {
    pub fn shape(&self) -> &[usize] {
        match self {
            Source::Separate(reader) => reader.shape(),
            Source::Output { shape, .. } => shape,
        }
    }
}

struct Span {
    process: u32,
    call: u64,
    name: String,
    bytes: Range<usize>,
    written: bool,
}

/// The buffers of all calls that are under way. A forked process has its parent's, whose calls it does not go on with. Who
/// holds the lock holds the interpreter too, where there is one to be held, so that no process is forked meanwhile.
static IN_USE: Mutex<Vec<Span>> = Mutex::new(Vec::new());
static CALLS: AtomicU64 = AtomicU64::new(0);

fn in_use() -> MutexGuard<'static, Vec<Span>> {
    IN_USE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The buffers of one call. Make one per bound function, register every argument with it, and let it live longer than they.
pub struct Call {
    place: String,
    process: u32,
    number: u64,
}

impl Drop for Call {
    fn drop(&mut self) {
        let own = |span: &Span| (span.process, span.call) == (self.process, self.number);
        in_use().retain(|span| !own(span));
    }
}

impl Call {
    pub fn new(place: &str) -> Self {
        Call {
            place: place.to_owned(),
            process: process::id(),
            number: CALLS.fetch_add(1, Ordering::Relaxed),
        }
    }

    pub fn value_error(&self, message: impl std::fmt::Display) -> PyErr {
        PyValueError::new_err(format!("{}: {message}", self.place))
    }

    pub fn type_error(&self, message: impl std::fmt::Display) -> PyErr {
        PyTypeError::new_err(format!("{}: {message}", self.place))
    }

    pub fn read<T: Dtype>(&mut self, name: &str, object: &Bound<'_, PyAny>) -> PyResult<Reader<T>> {
        let buffer = self.open(name, object)?;
        self.register(name, &buffer, false)?;
        Ok(Reader(buffer))
    }

    pub fn write<T: Dtype>(
        &mut self,
        name: &str,
        object: &Bound<'_, PyAny>,
    ) -> PyResult<Writer<T>> {
        let buffer = self.open(name, object)?;
        if buffer.readonly() {
            return Err(
                self.value_error(format!("{name} must be writable, got a read-only buffer"))
            );
        }
        self.register(name, &buffer, true)?;
        Ok(Writer(buffer))
    }

    /// As `read`, but memory that is exactly that of one of `outputs` is that output, read in place.
    pub fn read_in_place<T: Dtype>(
        &mut self,
        name: &str,
        object: &Bound<'_, PyAny>,
        outputs: &[&Writer<T>],
    ) -> PyResult<Source<T>> {
        let buffer = self.open(name, object)?;
        let bytes = span(&buffer);
        if !bytes.is_empty()
            && let Some(found) = outputs.iter().position(|output| span(&output.0) == bytes)
        {
            let shape = buffer.shape().to_vec();
            return Ok(Source::Output {
                output: found,
                shape,
            });
        }
        self.register(name, &buffer, false)?;
        Ok(Source::Separate(Reader(buffer)))
    }

    /// Refuses what could not be read.
    pub fn check<T: Dtype>(&self, name: &str, object: &Bound<'_, PyAny>) -> PyResult<()> {
        self.open::<T>(name, object).map(|_| ())
    }

    fn open<T: Dtype>(&self, name: &str, object: &Bound<'_, PyAny>) -> PyResult<PyBuffer<T>> {
        let buffer = PyUntypedBuffer::get(object).map_err(|error| {
            let kind = object.get_type();
            let message = format!("{name} must be {} array, got {kind}", with_article(T::NAME));
            explained(object.py(), error, self.type_error(message))
        })?;
        let format = buffer.format().to_string_lossy().into_owned();
        if !native(&format) || !T::is_compatible_format(buffer.format()) {
            return Err(self.type_error(format!(
                "{name} must be {} array, got format '{format}'",
                with_article(T::NAME)
            )));
        }
        if !buffer.is_c_contiguous() {
            return Err(self.value_error(format!(
                "{name} must be C-contiguous, got strides {:?}",
                buffer.strides()
            )));
        }
        // What is left to fail is the alignment of the first element.
        buffer
            .into_typed()
            .map_err(|error| self.value_error(format!("{name} cannot be read in place: {error}")))
    }

    fn register<T: Dtype>(
        &mut self,
        name: &str,
        buffer: &PyBuffer<T>,
        written: bool,
    ) -> PyResult<()> {
        let bytes = span(buffer);
        let mut spans = in_use();
        spans.retain(|span| span.process == self.process);
        let overlaps = |other: &&Span| {
            let (start, end) = (
                bytes.start.max(other.bytes.start),
                bytes.end.min(other.bytes.end),
            );
            (written || other.written) && start < end
        };
        match spans.iter().find(overlaps) {
            Some(other) if other.call == self.number => {
                return Err(self.value_error(format!(
                    "{name} overlaps {} in memory: an output must be separate memory, or exactly an input where the \
                     function works in place",
                    other.name
                )));
            }
            Some(other) => {
                let does = if other.written { "writes to" } else { "reads" };
                return Err(self.value_error(format!(
                    "{name} overlaps memory that another call {does}: let that one end first, or give each call an \
                     output of its own"
                )));
            }
            None => {}
        }
        spans.push(Span {
            process: self.process,
            call: self.number,
            name: name.to_owned(),
            bytes,
            written,
        });
        Ok(())
    }
}

/// The error of a call of Python code: `message`, with the error as its cause, where it says that a value was no good; the
/// error itself where it is of another kind, such as MemoryError or KeyboardInterrupt.
pub fn explained(py: Python<'_>, error: PyErr, message: PyErr) -> PyErr {
    let no_good = error.is_instance_of::<PyTypeError>(py)
        || error.is_instance_of::<PyValueError>(py)
        || error.is_instance_of::<PyBufferError>(py)
        || error.is_instance_of::<PyOverflowError>(py);
    if !no_good {
        return error;
    }
    message.set_cause(py, Some(error));
    message
}

fn with_article(name: &str) -> String {
    let article = if name.starts_with('i') { "an" } else { "a" };
    format!("{article} {name}")
}

/// Whether the format is in this machine's byte order (pyo3's own check lets big-endian formats pass on little-endian
/// machines).
fn native(format: &str) -> bool {
    let foreign: &[char] = if cfg!(target_endian = "little") {
        &['>', '!']
    } else {
        &['<']
    };
    !format.starts_with(foreign)
}

fn span<T: Dtype>(buffer: &PyBuffer<T>) -> Range<usize> {
    let start = buffer.buf_ptr() as usize;
    start..start + buffer.len_bytes()
}

impl<T: Dtype> Reader<T> {
    pub fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    pub fn slice(&self) -> &[T] {
        if self.0.len_bytes() == 0 {
            return &[];
        }
        // SAFETY: contiguous, aligned and of type T (`Call::open`), alive while `self` is, overlapping no writer of the
        // call (`Call::register`); every bit pattern is a T.
        unsafe { slice::from_raw_parts(self.0.buf_ptr().cast::<T>(), self.0.item_count()) }
    }
}

impl<T: Dtype> Writer<T> {
    pub fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    pub fn slice_mut(&mut self) -> &mut [T] {
        if self.0.len_bytes() == 0 {
            return &mut [];
        }
        // SAFETY: as in `Reader::slice`; writable, sharing memory with no other reader or writer of the call, and
        // borrowed mutably here.
        unsafe { slice::from_raw_parts_mut(self.0.buf_ptr().cast::<T>(), self.0.item_count()) }
    }
}

/// A shape as Python writes it.
pub fn shape_text(shape: &[usize]) -> String {
    match shape {
        [one] => format!("({one},)"),
        _ => format!(
            "({})",
            shape
                .iter()
                .map(usize::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        ),
    }
}
