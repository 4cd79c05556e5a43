//! From rows of tokens to batches: which rows go together, and how they are laid out.

pub mod balance;
pub mod collate;
pub mod ids;
pub mod packing;
pub mod padding_free;
pub mod place_rows;
pub mod token_batches;
