//! The CPU side of prefkern. This file exports; `python` holds the bindings with their argument checks; the work is in
//! the other modules, which know nothing of Python.
#![deny(unsafe_code)]

mod balance;
mod batches;
mod buffer;
mod collate;
mod exact;
mod flat;
mod gae;
mod groups;
mod helpers;
mod ids;
mod moments;
mod packing;
mod penalty;
mod place;
mod python;
mod returns;
mod rows;
mod scan;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::python::{
        collate::{fill_sequences, place_rows, sequence_lengths},
        flat::{flatten_tokens, kept_lengths},
        gae::gae,
        groups::group_advantages,
        lists::flatten,
        moments::{masked_moments, standardise},
        packing::pack,
        penalty::token_rewards,
        returns::discounted_returns,
        sampling::{balance_lengths, token_batches},
    };
}
