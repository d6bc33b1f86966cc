//! What must happen some time later although no request comes: metadata written back, caches cleaned.
//!
//! One thread for each graph, made when something is registered for the first time. It sleeps until the earliest date; with
//! nothing registered it never wakes up. What it tends to it does not own: who registers may go at any time.
//! Lock held: `state`, never while something is tended to or dropped.
#![forbid(unsafe_code)]

use std::ptr::addr_eq;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::IoFuture;
use crate::rt;
use crate::sandbox::{self, Thread};

/// Without descriptors for a runtime nothing can be tended to; they may come back.
const RETRY: Duration = Duration::from_secs(1);

/// Something that needs care from time to time.
pub trait Tend: Send + Sync {
    /// Takes care of it; it registers itself anew if it will need more. It happens on the thread of [`Upkeep`], one after
    /// the other, and beside requests. An error is logged.
    fn tend(&self) -> IoFuture<'_>;
}

/// When to tend to what.
#[derive(Default)]
pub struct Upkeep {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    dates: Vec<(Instant, Weak<dyn Tend>)>,
    thread: Option<JoinHandle<()>>,
    paused: bool,
    /// Something is being tended to.
    tending: bool,
    /// The [`Hold`]s that there are.
    holds: usize,
    ended: bool,
}

/// As long as it lives, nothing is tended to.
pub struct Hold {
    shared: Arc<Shared>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shared.lock().holds -= 1;
        self.shared.changed.notify_all();
    }
}

impl Upkeep {
    /// Waits until nothing is being tended to, and puts off what is due until the answer is dropped. Not to be called by
    /// what is tended to.
    pub fn hold(&self) -> Hold {
        let mut state = self.shared.lock();
        state.holds += 1;
        while state.tending {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Hold { shared: Arc::clone(&self.shared) }
    }

    /// Tends to `what` at `when`, or earlier if it is registered for an earlier date already: then once. Nothing happens if
    /// it is gone by then, after [`Upkeep::end`], or in a simulation, which has no threads.
    pub fn at(&self, when: Instant, what: Weak<dyn Tend>) {
        if rt::is_simulated() {
            return;
        }
        let mut state = self.shared.lock();
        if state.ended {
            return;
        }
        let known = state.dates.iter_mut().find(|(_, w)| addr_eq(w.as_ptr(), what.as_ptr()));
        match known {
            Some((date, _)) => *date = when.min(*date),
            None => state.dates.push((when, what)),
        }
        self.start(&mut state);
        self.shared.changed.notify_all();
    }

    /// Starts the thread, if it is not there.
    fn start(&self, state: &mut State) {
        if state.thread.is_some() || state.ended || state.paused {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name("blk-upkeep".into());
        let run = move || {
            sandbox::thread(Thread::Worker);
            shared.run();
        };
        match thread.spawn(run) {
            Ok(handle) => state.thread = Some(handle),
            // The next one who registers tries again; what a flush must do, it does without us.
            Err(e) => log::warn!("no thread for upkeep: {e}"),
        }
    }

    /// Has no thread until [`Upkeep::resume`]; keeps what is registered. Waits for what is being tended to.
    pub fn pause(&self) {
        let thread = {
            let mut state = self.shared.lock();
            state.paused = true;
            state.thread.take()
        };
        self.shared.changed.notify_all();
        join(thread);
    }

    /// Goes on after [`Upkeep::pause`].
    pub fn resume(&self) {
        let mut state = self.shared.lock();
        state.paused = false;
        if !state.dates.is_empty() {
            self.start(&mut state);
        }
    }

    /// Forgets everything and takes nothing more. Waits for what is being tended to, except on the very thread that does.
    pub fn end(&self) {
        let (dates, thread) = {
            let mut state = self.shared.lock();
            state.ended = true;
            (std::mem::take(&mut state.dates), state.thread.take())
        };
        self.shared.changed.notify_all();
        drop(dates);
        join(thread);
    }
}

/// Waits for the end of `thread`, unless it is the calling one.
fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread.filter(|t| t.thread().id() != thread::current().id())
        && thread.join().is_err()
    {
        log::error!("the upkeep thread panicked");
    }
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        while let Some(what) = self.next() {
            // May be the last reference: what is dropped here may be a whole graph, and this its last act.
            if let Some(what) = what.upgrade() {
                self.tend(&what);
            }
            self.lock().tending = false;
            self.changed.notify_all();
        }
    }

    fn tend(&self, what: &Arc<dyn Tend>) {
        match rt::try_block_on(what.tend()) {
            Ok(Ok(())) => {}
            Ok(Err(e)) => log::error!("upkeep: {e}"),
            Err(e) => {
                log::warn!("upkeep has to wait: {e}");
                self.lock().dates.push((Instant::now() + RETRY, Arc::downgrade(what)));
            }
        }
    }

    /// Sleeps until something is due. `None`: the end.
    fn next(&self) -> Option<Weak<dyn Tend>> {
        let mut state = self.lock();
        loop {
            if state.ended || state.paused {
                return None;
            }
            let dates = state.dates.iter().enumerate();
            let earliest =
                dates.min_by_key(|(_, (date, _))| *date).map(|(at, (date, _))| (at, *date));
            let now = Instant::now();
            state = match earliest {
                _ if state.holds > 0 => {
                    self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
                }
                Some((at, date)) if date <= now => {
                    state.tending = true;
                    return Some(state.dates.swap_remove(at).1);
                }
                Some((_, date)) => {
                    let wait = self.changed.wait_timeout(state, date - now);
                    wait.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::block::Graph;
    use crate::error::Errno;

    const LIMIT: Duration = Duration::from_secs(20);
    const SOON: Duration = Duration::from_millis(20);
    const LATER: Duration = Duration::from_secs(3600);

    /// Says when it is tended to, and then may do something more.
    struct Garden {
        said: Mutex<Sender<Instant>>,
        then: Box<dyn Fn() -> Result<(), Errno> + Send + Sync>,
    }

    impl Tend for Garden {
        fn tend(&self) -> IoFuture<'_> {
            Box::pin(async {
                // It waits for I/O like any other code.
                rt::blocking(|| ()).await;
                self.said.lock().unwrap().send(Instant::now()).unwrap_or_default();
                (self.then)()
            })
        }
    }

    fn garden(
        then: impl Fn() -> Result<(), Errno> + Send + Sync + 'static,
    ) -> (Arc<Garden>, Receiver<Instant>) {
        let (said, heard) = channel();
        (Arc::new(Garden { said: Mutex::new(said), then: Box::new(then) }), heard)
    }

    fn weak(garden: &Arc<Garden>) -> Weak<dyn Tend> {
        let weak: Weak<Garden> = Arc::downgrade(garden);
        weak
    }

    #[test]
    fn the_earliest_first_and_each_once() {
        let graph = Graph::new();
        let (a, heard_a) = garden(|| Ok(()));
        let (b, heard_b) = garden(|| Err(Errno::EIO));
        let start = Instant::now();
        let upkeep = graph.upkeep();
        upkeep.at(start + LATER, weak(&a));
        upkeep.at(start + SOON, weak(&b));
        assert!(heard_b.recv_timeout(LIMIT).unwrap() >= start + SOON);
        assert!(heard_a.try_recv().is_err());
        upkeep.at(start + 2 * SOON, weak(&a));
        // Registered already, for an earlier date: this one does not count.
        upkeep.at(start + LATER, weak(&a));
        assert!(heard_a.recv_timeout(LIMIT).unwrap() >= start + 2 * SOON);
        // Neither is left.
        assert!(upkeep.shared.lock().dates.is_empty());
        upkeep.at(Instant::now(), weak(&a));
        heard_a.recv_timeout(LIMIT).unwrap();
        assert!(heard_a.try_recv().is_err() && heard_b.try_recv().is_err());
    }

    #[test]
    fn who_is_gone_is_not_tended_to() {
        let graph = Graph::new();
        let ((gone, heard), (there, other)) = (garden(|| Ok(())), garden(|| Ok(())));
        let now = Instant::now();
        graph.upkeep().at(now + SOON, weak(&gone));
        graph.upkeep().at(now + 2 * SOON, weak(&there));
        drop(gone);
        other.recv_timeout(LIMIT).unwrap();
        assert!(heard.recv().is_err());
    }

    /// How often the upkeep thread of this process has gone to sleep; `None`: there is none.
    fn sleeps() -> Option<u64> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let text = |p: std::path::PathBuf| std::fs::read_to_string(p).unwrap_or_default();
        let mut ours = tasks.filter(|t| text(t.path().join("comm")).trim() == "blk-upkeep");
        let status = text(ours.next()?.path().join("status"));
        let line = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"))?;
        line.trim().parse().ok()
    }

    /// In a process of its own: threads of other tests have the same name.
    #[test]
    fn nothing_to_do_is_nothing_done() {
        let alone = "VUB_TEST_ALONE";
        if std::env::var_os(alone).is_none() {
            let exe = std::env::current_exe().unwrap();
            let mut me = std::process::Command::new(exe);
            let me = me.args(["nothing_to_do_is_nothing_done", "--test-threads=1"]).env(alone, "1");
            let out = me.output().unwrap();
            let text = String::from_utf8_lossy(&out.stdout);
            return assert!(out.status.success() && text.contains("1 passed"), "{text}");
        }
        let graph = Graph::new();
        assert_eq!(sleeps(), None, "nobody needs a thread yet");
        let (a, heard) = garden(|| Ok(()));
        graph.upkeep().at(Instant::now(), weak(&a));
        heard.recv_timeout(LIMIT).unwrap();
        // Until it sleeps: the same number twice in a row, with time in between to change.
        let count = || sleeps().expect("it is there");
        let mut before = count();
        loop {
            thread::sleep(Duration::from_millis(300));
            match count() {
                now if now == before => break,
                now => before = now,
            }
        }
        drop(graph);
        assert_eq!(sleeps(), None, "it ends with the graph");
    }

    #[test]
    fn a_hold_waits_and_puts_off() {
        let graph = Graph::new();
        let (go, may_go) = channel::<()>();
        let may_go = Mutex::new(may_go);
        let (slow, heard_slow) = garden(move || {
            may_go.lock().unwrap().recv_timeout(LIMIT).expect("told to go on");
            Ok(())
        });
        let (later, heard_later) = garden(|| Ok(()));
        graph.upkeep().at(Instant::now(), weak(&slow));
        heard_slow.recv_timeout(LIMIT).unwrap();
        let upkeep = Arc::clone(graph.upkeep());
        let holding = thread::spawn(move || upkeep.hold());
        while graph.upkeep().shared.lock().holds == 0 {
            thread::yield_now();
        }
        assert!(!holding.is_finished(), "something is being tended to");
        go.send(()).unwrap();
        let hold = holding.join().unwrap();
        graph.upkeep().at(Instant::now(), weak(&later));
        assert!(heard_later.recv_timeout(3 * SOON).is_err(), "it has to wait");
        drop(hold);
        heard_later.recv_timeout(LIMIT).unwrap();
    }

    #[test]
    fn the_end_waits_for_what_is_under_way() {
        let graph = Graph::new();
        let (go, may_go) = channel::<()>();
        let may_go = Mutex::new(may_go);
        let (a, heard) = garden(move || {
            may_go.lock().unwrap().recv_timeout(LIMIT).expect("told to go on");
            Ok(())
        });
        graph.upkeep().at(Instant::now(), weak(&a));
        heard.recv_timeout(LIMIT).unwrap();
        let upkeep = Arc::clone(graph.upkeep());
        let closing = thread::spawn(move || drop(graph));
        // Not before it has begun to end.
        while !upkeep.shared.lock().ended {
            thread::yield_now();
        }
        assert!(!closing.is_finished());
        go.send(()).unwrap();
        closing.join().unwrap();
        upkeep.at(Instant::now(), weak(&a));
        assert!(upkeep.shared.lock().dates.is_empty(), "there is no after");
        assert_eq!(Arc::strong_count(&a), 1);
    }

    /// The last reference to the graph goes on its own thread.
    #[test]
    fn a_graph_may_go_while_it_is_tended_to() {
        let graph = Graph::new();
        let upkeep = Arc::clone(graph.upkeep());
        let last = Mutex::new(Some(Arc::clone(&graph)));
        let (a, heard) = garden(move || {
            drop(last.lock().unwrap().take());
            Ok(())
        });
        upkeep.at(Instant::now() + SOON, weak(&a));
        drop(graph);
        heard.recv_timeout(LIMIT).unwrap();
        let start = Instant::now();
        while !upkeep.shared.lock().ended || Arc::strong_count(&upkeep) > 1 {
            assert!(start.elapsed() < LIMIT);
            thread::yield_now();
        }
    }
}
