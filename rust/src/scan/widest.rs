//! The only `unsafe` code beside that of the bindings: a call of a function compiled for instructions that were detected.
#![allow(unsafe_code)]

/// Runs `work` compiled with wider registers, where this processor has them. The compiler fuses no operations: results
/// are the same.
#[inline]
pub fn widest<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the instructions were detected.
        return unsafe { with_avx2(work) };
    }
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}
