//! From rewards to advantages: numbers of tokens, in rows, and numbers of whole completions, in groups.

pub mod gae;
pub mod groups;
pub mod moments;
pub mod returns;
pub mod token_rewards;
