//! The CPU side of prefkern. `python` holds the bindings with their argument checks; the other modules do the work and know
//! nothing of Python: without the feature `python`, which is on by default, they are all there is.
#![deny(unsafe_code)]

pub mod advantages;
pub mod batches;
pub mod failure;
pub mod rows;
pub mod scan;
pub mod threads;

#[cfg(feature = "python")]
mod python;

#[cfg(feature = "python")]
#[pyo3::pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::python::{
        collate::{fill_sequences, place_rows, sequence_lengths},
        gae::gae,
        groups::group_advantages,
        lists::flatten,
        moments::{masked_moments, standardise},
        packing::pack,
        padding_free::{flatten_tokens, kept_lengths},
        returns::discounted_returns,
        sampling::{balance_lengths, token_batches},
        token_rewards::token_rewards,
    };
}
