//! What the functions over cells need of a float.

use crate::scan::{self, Deviations, Episode, Run, Scan, State, Sums};

/// float32 or float64.
pub trait Real: Copy + Send + Sync {
    const ZERO: Self;
    /// Whether `scan` does anything.
    const SCANNED: bool = false;
    fn widen(self) -> f64;
    fn narrow(wide: f64) -> Self;
    /// Runs the last cells in vector registers, where they can be; returns how many at the start are left.
    fn scan(_scan: &Scan, run: Run<'_, '_, Self>, _state: &mut State) -> usize {
        run.advantages.len() - run.room
    }
    /// `Scan::episodes`, where there is one for this type; whether there was.
    fn scan_episodes(
        _scan: &Scan,
        _cells: Run<'_, '_, Self>,
        _mask: Option<&[u8]>,
        _center: Option<f64>,
        _episodes: impl Iterator<Item = Episode>,
        _passed: impl FnMut(&Episode, Option<&Deviations>),
    ) -> bool {
        false
    }
    /// `scan::standardise`, where there is one for this type; whether there was.
    fn standardise(
        _cells: &mut [Self],
        _mask: Option<&[u8]>,
        _center: f64,
        _scale: f64,
        _cleared: bool,
    ) -> bool {
        false
    }
    /// `scan::sums`, where there is one for this type; whether there was.
    fn sums(_cells: &[Self], _mask: &[u8], _center: f64, _sums: &mut Sums) -> bool {
        false
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const SCANNED: bool = true;
    fn widen(self) -> f64 {
        f64::from(self)
    }
    fn narrow(wide: f64) -> Self {
        wide as f32
    }
    fn scan(scan: &Scan, run: Run<'_, '_, f32>, state: &mut State) -> usize {
        scan.run(run, state)
    }
    fn scan_episodes(
        scan: &Scan,
        cells: Run<'_, '_, f32>,
        mask: Option<&[u8]>,
        center: Option<f64>,
        episodes: impl Iterator<Item = Episode>,
        passed: impl FnMut(&Episode, Option<&Deviations>),
    ) -> bool {
        scan.episodes(cells, mask, center, episodes, passed)
    }
    fn standardise(
        cells: &mut [f32],
        mask: Option<&[u8]>,
        center: f64,
        scale: f64,
        cleared: bool,
    ) -> bool {
        scan::standardise(cells, mask, center, scale, cleared)
    }
    fn sums(cells: &[f32], mask: &[u8], center: f64, sums: &mut Sums) -> bool {
        scan::sums(cells, mask, center, sums)
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    fn widen(self) -> f64 {
        self
    }
    fn narrow(wide: f64) -> Self {
        wide
    }
}
