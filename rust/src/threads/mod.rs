//! Threads that help with a call.
//!
//! The caller works too, and waits only for helpers that have begun: one that starts late, because other threads keep the
//! cores (those of an OpenMP pool spin for a while after each of their operations), finds nothing left to do. A helper stays
//! for `LINGER` after its work, since calls often follow each other, and one that is there begins at once; then it ends. A
//! forked process has none of its parent's threads, and does not ask them.
#![allow(unsafe_code)]

mod cores;

use std::hint;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use cores::{Core, elsewhere, here};

/// Memory traffic for which a helper is worth while: one that must be started, which takes about 30 us, and one that is there.
const BYTES_TO_START: usize = 4 << 20;
const BYTES_WHERE_THERE: usize = 1 << 19;
/// So long a helper looks for the next call before it ends, and a caller for the last helper before it sleeps.
const LINGER: Duration = Duration::from_micros(200);

type Work<'a> = &'a (dyn Fn() + Sync);

/// How many threads besides the caller are worth while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Helpers {
    /// So many are started,
    started: usize,
    /// and so many take part where they are there from an earlier call.
    lingering: usize,
}

impl Helpers {
    /// For `bytes` of memory traffic (of slower work, what a copy would move meanwhile) and so many threads in all.
    pub fn for_bytes(bytes: usize, threads: usize) -> Self {
        let others = |share: usize| (bytes / share).clamp(1, threads.max(1)) - 1;
        Helpers {
            started: others(BYTES_TO_START),
            lingering: others(BYTES_WHERE_THERE),
        }
    }

    pub fn at_most(self, others: usize) -> Self {
        Helpers {
            started: self.started.min(others),
            lingering: self.lingering.min(others),
        }
    }

    /// The caller and those that may help.
    pub fn threads(self) -> usize {
        self.started.max(self.lingering) + 1
    }
}

/// The helpers of one caller.
struct Team {
    process: u32,
    state: Mutex<State>,
    /// Helpers that may still begin; changed only by who holds `state`.
    wanted: AtomicUsize,
    /// Helpers that are inside the work.
    inside: AtomicUsize,
    left: Condvar,
}

struct State {
    work: Option<Work<'static>>,
    panicked: bool,
    /// Those that take part in this call or the next: each takes itself out before it ends.
    members: Vec<JoinHandle<()>>,
    /// Where their caller was, and they are not.
    core: Core,
}

/// The team of the last call. Nobody waits for this lock: who does not get it at once makes a team of its own.
static LAST: Mutex<Option<Arc<Team>>> = Mutex::new(None);

/// Runs `work` in the calling thread, and at the same time in up to so many others.
pub fn together(helpers: Helpers, work: Work<'_>) {
    let mut last = LAST.try_lock().ok().and_then(|mut last| last.take());
    if last
        .as_ref()
        .is_some_and(|team| team.process != process::id())
    {
        mem::forget(last.take()); // threads that are not of this process must not be detached here
    }
    if helpers.started == 0 && (helpers.lingering == 0 || last.is_none()) {
        keep(last);
        return work();
    }
    let team = last.unwrap_or_default();
    // SAFETY: `Ending` takes it back, and waits for those that have it, before this function returns or unwinds.
    let shared = unsafe { mem::transmute::<Work<'_>, Work<'static>>(work) };
    let ending = Ending(&team);
    team.ask(helpers, shared);
    work();
    drop(ending);
    assert!(!team.state().panicked, "a helper panicked"); // and so its team is not kept
    keep(Some(team));
}

fn keep(team: Option<Arc<Team>>) {
    if let Ok(mut last) = LAST.try_lock()
        && team.is_some()
    {
        *last = team;
    }
}

struct Ending<'a>(&'a Team);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Default for Team {
    fn default() -> Self {
        Team {
            process: process::id(),
            state: Mutex::new(State {
                work: None,
                panicked: false,
                members: Vec::new(),
                core: here(),
            }),
            wanted: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            left: Condvar::new(),
        }
    }
}

impl Team {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(self: &Arc<Self>, helpers: Helpers, work: Work<'static>) {
        let mut state = self.state();
        state.work = Some(work);
        self.wanted.store(helpers.threads() - 1, Ordering::Release);
        let core = here();
        if state.core != core {
            state.core = core;
            let members = state.members.iter();
            members.for_each(|member| elsewhere(core, member));
        }
        for _ in state.members.len()..helpers.started {
            let team = Arc::clone(self);
            let Ok(member) = thread::Builder::new().spawn(move || team.help()) else {
                return; // it costs speed and nothing else
            };
            elsewhere(core, &member); // it waits for `state`, and has not ended
            state.members.push(member);
            drop(state);
            state = self.state();
        }
    }

    fn help(&self) {
        let mut state = self.state();
        loop {
            match state.work {
                Some(work) if self.wanted.load(Ordering::Relaxed) > 0 => {
                    self.wanted.fetch_sub(1, Ordering::Relaxed);
                    self.inside.fetch_add(1, Ordering::Relaxed);
                    drop(state);
                    let panicked = catch_unwind(AssertUnwindSafe(work)).is_err();
                    state = self.state();
                    state.panicked |= panicked;
                    self.inside.fetch_sub(1, Ordering::Release);
                    self.left.notify_one();
                }
                _ => {
                    drop(state);
                    until(|| self.wanted.load(Ordering::Acquire) > 0, LINGER);
                    state = self.state();
                    if self.wanted.load(Ordering::Relaxed) == 0 {
                        let own = thread::current().id();
                        state.members.retain(|member| member.thread().id() != own);
                        return;
                    }
                }
            }
        }
    }

    /// No helper begins any more, and those that did have ended.
    fn end(&self) {
        let mut state = self.state();
        state.work = None;
        self.wanted.store(0, Ordering::Relaxed);
        drop(state);
        if until(|| self.inside.load(Ordering::Acquire) == 0, LINGER) {
            return;
        }
        state = self.state();
        while self.inside.load(Ordering::Acquire) > 0 {
            let waited = self.left.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Waits for so long without sleeping; whether it happened.
fn until(happened: impl Fn() -> bool, most: Duration) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..16 {
            if happened() {
                return true;
            }
            hint::spin_loop();
        }
        if start.elapsed() > most {
            return false;
        }
        thread::yield_now(); // helpers and their caller may share a core
    }
}

#[cfg(test)]
mod tests;
