//! Why work ended without a result although its arguments are right.

use std::collections::TryReserveError;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no memory for what the work needs besides its arguments.
    Memory,
    /// The caller said so when it was asked whether to stop.
    Interrupted,
}

impl From<TryReserveError> for Failure {
    fn from(_: TryReserveError) -> Self {
        Failure::Memory
    }
}

/// Asked now and then by work that may take long: whether to stop.
pub type Stop<'a> = &'a dyn Fn() -> bool;

/// Ends the work where the caller wants it to.
pub fn go_on(stop: Stop<'_>) -> Result<(), Failure> {
    if stop() {
        return Err(Failure::Interrupted);
    }
    Ok(())
}

/// `vec![value; count]`, but for the end of the process where there is no memory for it.
pub fn filled<T: Clone>(value: T, count: usize) -> Result<Vec<T>, Failure> {
    let mut all = with_room(count)?;
    all.resize(count, value);
    Ok(all)
}

/// As `collect`, with that exception.
pub fn collected<T>(items: impl ExactSizeIterator<Item = T>) -> Result<Vec<T>, Failure> {
    let mut all = with_room(items.len())?;
    all.extend(items);
    Ok(all)
}

pub fn with_room<T>(count: usize) -> Result<Vec<T>, Failure> {
    let mut all = Vec::new();
    all.try_reserve_exact(count)?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_be_had_is_a_failure() {
        assert_eq!(filled(0u64, usize::MAX / 16), Err(Failure::Memory));
        assert_eq!(filled(7u8, 3), Ok(vec![7; 3]));
        assert_eq!(collected(0..3), Ok(vec![0, 1, 2]));
    }

    #[test]
    fn work_goes_on_until_it_is_to_stop() {
        assert_eq!(go_on(&|| false), Ok(()));
        assert_eq!(go_on(&|| true), Err(Failure::Interrupted));
    }
}
