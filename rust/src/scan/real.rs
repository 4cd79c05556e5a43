/// float32 or float64.
pub trait Real: Copy + Send + Sync {
    const ZERO: Self;
    /// Whether float64 holds sums of such numbers with digits to spare.
    const SPARE: bool;
    fn widen(self) -> f64;
    fn narrow(wide: f64) -> Self;
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const SPARE: bool = true;
    fn widen(self) -> f64 {
        f64::from(self)
    }
    fn narrow(wide: f64) -> Self {
        wide as f32
    }
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const SPARE: bool = false;
    fn widen(self) -> f64 {
        self
    }
    fn narrow(wide: f64) -> Self {
        wide
    }
}
