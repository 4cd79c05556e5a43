//! Where helpers run. A new thread is often queued on the core of the thread that started it, and some schedulers (those of
//! virtual machines that know nothing of shared caches, for one) leave it there while other cores are idle: it would begin
//! when its caller is done.

use std::thread::JoinHandle;

/// A core, where the system says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Core(Option<usize>);

/// The one that this thread is on.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn here() -> Core {
    // SAFETY: it takes nothing and changes nothing.
    let core = unsafe { libc::sched_getcpu() };
    Core(usize::try_from(core).ok())
}

/// Lets a thread, which must not have ended, run on any core that this one may use, but for one; on that too where there is no
/// other. (Of a thread that has ended the C library may know so little that this one's cores are changed instead.)
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn elsewhere<T>(core: Core, thread: &JoinHandle<T>) {
    use std::mem::{size_of, zeroed};
    use std::os::unix::thread::JoinHandleExt;

    const SIZE: usize = size_of::<libc::cpu_set_t>();
    let Some(core) = core.0.filter(|&core| core < 8 * SIZE) else {
        return;
    };
    // SAFETY: the sets are as large as is said and hold the core; the thread is not joined, so that its handle is valid.
    // What fails changes nothing.
    unsafe {
        let mut cores: libc::cpu_set_t = zeroed();
        if libc::sched_getaffinity(0, SIZE, &mut cores) != 0 {
            return;
        }
        libc::CPU_CLR(core, &mut cores);
        if libc::CPU_COUNT(&cores) > 0 {
            libc::pthread_setaffinity_np(thread.as_pthread_t(), SIZE, &cores);
        }
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn here() -> Core {
    Core(None)
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn elsewhere<T>(_core: Core, _thread: &JoinHandle<T>) {}
