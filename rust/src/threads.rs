//! Threads that help with a call: they are started for it and end with it, so that a forked process misses none.

use std::sync::Mutex;
use std::thread::{self, Builder};

/// Bytes of memory traffic that one more thread is worth starting for, which takes about 30 us.
const BYTES_FOR_ONE: usize = 4 << 20;

/// The threads, the caller among them, that are worth while for `bytes` of memory traffic (of slower work, what a copy
/// would move meanwhile); at most `most`.
pub fn worth(bytes: usize, most: usize) -> usize {
    (bytes / BYTES_FOR_ONE).clamp(1, most.max(1))
}

/// Runs `work` on every part, in the calling thread and in up to `threads - 1` others. A thread that the system refuses
/// costs speed and nothing else.
pub fn share<P: Send>(parts: Vec<P>, threads: usize, work: impl Fn(P) + Sync) {
    let others = threads.min(parts.len()).saturating_sub(1);
    if others == 0 {
        return parts.into_iter().for_each(work);
    }
    let queue = Mutex::new(parts.into_iter());
    let take = || queue.lock().ok()?.next();
    let all = || {
        while let Some(part) = take() {
            work(part);
        }
    };
    thread::scope(|scope| {
        for _ in 0..others {
            if Builder::new().spawn_scoped(scope, all).is_err() {
                break;
            }
        }
        all();
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    #[test]
    fn every_part_is_worked_on_once() {
        for threads in [0, 1, 2, 5, 2000] {
            let sum = AtomicUsize::new(0);
            share((0..1000).collect(), threads, |part| {
                sum.fetch_add(part, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 499_500);
        }
        share(Vec::<usize>::new(), 3, |_| unreachable!());
    }

    #[test]
    fn parts_are_worked_on_at_the_same_time() {
        let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        share(vec![(); 3], 3, |()| {
            most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let mut waited = 0;
            while most.load(Ordering::SeqCst) < 2 && waited < 10_000 {
                thread::sleep(Duration::from_millis(1));
                waited += 1;
            }
            inside.fetch_sub(1, Ordering::SeqCst);
        });
        assert!(most.into_inner() >= 2);
    }

    #[test]
    fn small_work_stays_on_one_thread() {
        assert_eq!(worth(2 * BYTES_FOR_ONE - 1, 8), 1);
        assert_eq!(worth(3 * BYTES_FOR_ONE, 8), 3);
        assert_eq!(worth(100 * BYTES_FOR_ONE, 8), 8);
        assert_eq!(worth(100 * BYTES_FOR_ONE, 0), 1);
        assert_eq!(worth(0, 8), 1);
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        let call = |threads| {
            move || {
                share(vec![1, 2, 3], threads, |part| {
                    assert!(part != 2, "on purpose")
                })
            }
        };
        assert!(catch_unwind(call(1)).is_err());
        assert!(catch_unwind(call(3)).is_err());
    }
}
