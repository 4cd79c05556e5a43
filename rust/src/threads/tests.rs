use super::*;
use std::thread::ThreadId;

const fn started(count: usize) -> Helpers {
    Helpers {
        started: count,
        lingering: 0,
    }
}

/// The threads that entered the work of a call, which lasts long enough for helpers to start.
fn entered(helpers: Helpers) -> Vec<ThreadId> {
    let threads = Mutex::new(Vec::new());
    together(helpers, &|| {
        threads.lock().unwrap().push(thread::current().id());
        thread::sleep(Duration::from_millis(50));
    });
    threads.into_inner().unwrap()
}

#[test]
fn the_caller_works_once_and_helpers_with_it() {
    let caller = thread::current().id();
    assert_eq!(entered(started(0)), [caller]);
    let mut most = 0;
    for _ in 0..10 {
        let threads = entered(started(3));
        assert_eq!(threads.iter().filter(|&&id| id == caller).count(), 1);
        assert!(threads.len() <= 4);
        most = most.max(threads.len());
    }
    assert!(most > 1);
}

#[test]
fn nothing_of_a_call_runs_after_it() {
    for round in 0..2000 {
        let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let helpers = Helpers {
            started: round % 4,
            lingering: 3,
        };
        together(helpers, &|| {
            begun.fetch_add(1, Ordering::Relaxed);
            ended.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(begun.into_inner(), ended.into_inner());
    }
}

#[test]
fn helpers_take_part_in_the_next_call_and_end() {
    let team = Arc::new(Team::default());
    let threads = Mutex::new(Vec::new());
    let work = || threads.lock().unwrap().push(thread::current().id());
    // SAFETY: every call is ended below, before the work is dropped.
    let shared = unsafe { mem::transmute::<Work<'_>, Work<'static>>(&work) };
    let mut again = false;
    for _ in 0..100 {
        threads.lock().unwrap().clear();
        team.ask(started(1), shared);
        while threads.lock().unwrap().is_empty() {
            thread::yield_now();
        }
        let next = Helpers {
            started: 0,
            lingering: 1,
        };
        team.end();
        team.ask(next, shared);
        let asked = Instant::now();
        while threads.lock().unwrap().len() < 2 && asked.elapsed() < 2 * LINGER {
            thread::yield_now();
        }
        team.end();
        let threads = threads.lock().unwrap();
        assert!(threads.iter().all(|&id| id == threads[0]));
        again |= threads.len() == 2;
    }
    assert!(again);
    while !team.state().members.is_empty() {
        thread::yield_now();
    }
}

#[test]
fn small_work_stays_on_one_thread() {
    let of = |bytes, threads| Helpers::for_bytes(bytes, threads);
    assert_eq!(of(BYTES_WHERE_THERE, 8), started(0));
    assert_eq!(of(3 * BYTES_WHERE_THERE, 8).lingering, 2);
    assert_eq!(of(BYTES_TO_START, 8).started, 0);
    assert_eq!(of(3 * BYTES_TO_START, 8).started, 2);
    assert_eq!(of(100 * BYTES_TO_START, 8).threads(), 8);
    assert_eq!(of(100 * BYTES_TO_START, 0), started(0));
    assert_eq!(of(100 * BYTES_TO_START, 8).at_most(3).threads(), 4);
}

#[test]
fn a_panic_reaches_the_caller() {
    let caller = thread::current().id();
    let panics = |of_helpers: bool| {
        let call = || {
            together(started(1), &|| {
                thread::sleep(Duration::from_millis(50));
                let helper = thread::current().id() != caller;
                assert!(helper != of_helpers, "on purpose");
            });
        };
        (0..10).any(|_| catch_unwind(call).is_err())
    };
    assert!(panics(true) && panics(false));
    assert_eq!(entered(started(0)), [caller]);
}

#[test]
fn another_process_s_team_is_not_asked() {
    let team = Arc::new(Team {
        process: process::id() + 1,
        ..Team::default()
    });
    *LAST.lock().unwrap() = Some(Arc::clone(&team));
    let own = entered(Helpers {
        started: 0,
        lingering: 5,
    });
    assert_eq!(own, [thread::current().id()]);
    assert_eq!(Arc::strong_count(&team), 2); // it was forgotten
}
