//! The only `unsafe` code beside that of the bindings: a call of a function compiled for instructions that were detected.
#![allow(unsafe_code)]

/// Work over many cells. `run` and what it calls are `#[inline(always)]`, or they are not compiled anew (and for the same
/// reason this is no closure).
pub trait Work {
    type Output;
    fn run(self) -> Self::Output;
}

/// Runs `work` compiled with wider registers, where this processor has them. The compiler fuses no operations: results are
/// the same.
pub fn widest<W: Work>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the instructions were detected.
        return unsafe { with_avx2(work) };
    }
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<W: Work>(work: W) -> W::Output {
    work.run()
}
