//! A worker: one thread that serves some of an export's queues, and its loop.
//!
//! One turn takes what the guest made available, runs ready tasks, hands everything new to the kernel in few system calls, takes
//! completions, publishes them and decides once per queue whether to notify. A turn without progress spins as long
//! as the policy thinks it pays, then asks for kicks, looks a last time, and blocks in the one wait point.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use super::policy::RETRY;
use super::queue::{Queue, Started, Stop, from_payload, payload};
use super::request::Slow;
use crate::error::Errno;
use crate::mem::{GuestMap, RingLog, sigbus};
use crate::metrics::{Stamp, Stopwatch, WorkerMeter};
use crate::rt::grace::{Domain, Participant};
use crate::rt::poll::Policy;
use crate::rt::{self, Event, Inbox, Installed, Runtime, WaitKind, best_wait_kind};

#[cfg(feature = "bench")]
#[path = "hand_turned.rs"]
pub mod hand_turned;

/// Requests of one worker in the kernel at once; more wait in their rings.
const IN_FLIGHT_MAX: usize = 4096;
/// Memory that one worker's slow-lane requests may take for bounce buffers, in bytes; more requests wait in their rings.
const SLOW_BYTES_MAX: u64 = 64 << 20;
/// Tasks polled per turn: rings and completions get their turn, too.
const TASKS_PER_TURN: usize = 128;
/// Workers of this process that do not sleep.
static AWAKE: AtomicUsize = AtomicUsize::new(0);
/// Where workers occupy all processors, a spin that lasts this long lets others have its own in between (`contrib/bench`,
/// case `null-4q`). Never elsewhere: a thread that yields may be moved to where its guest runs (case `null-d1-event`).
const YIELD_AFTER_NS: u64 = 2_000;
/// How long a ring without a kick descriptor is left alone at most.
const POLLED_RING_PAUSE: Duration = Duration::from_micros(100);

/// What others ask of a worker. Every command is answered, when it has been carried out, by a message or by the sender's drop.
pub enum Command {
    /// Serve this queue.
    Start(Box<Queue>, SyncSender<()>),
    /// Stop this queue, then answer its ring's base.
    Stop(u16, Stop, SyncSender<u32>),
    /// Replace a queue's call descriptor.
    SetCall(u16, Option<OwnedFd>, SyncSender<()>),
    /// Replace a queue's error descriptor.
    SetErr(u16, Option<OwnedFd>, SyncSender<()>),
    /// Log a queue's writes to the guest's memory there, and nowhere else any more.
    SetLog(u16, Option<RingLog>, SyncSender<()>),
    /// Switch all queues to another memory map; with `true`, drain first.
    SetMemory(Arc<GuestMap>, bool, SyncSender<()>),
    /// Try again what failed and is kept.
    Resume(SyncSender<()>),
    /// End. All queues have been stopped.
    Quit,
}

/// Results of slow-lane tasks: token payload, request and result.
type Done = Rc<RefCell<Vec<(u64, Slow, Result<(), Errno>)>>>;

struct Worker {
    rt: Installed,
    grace: Participant,
    queues: Vec<Queue>,
    policy: Policy,
    /// When the last idle gap ended.
    busy_since: Stamp,
    clock: Stopwatch,
    meter: Arc<WorkerMeter>,
    /// Of the machine.
    processors: usize,
    events: Vec<Event>,
    done: Done,
    /// The weight of all slow-lane requests.
    slow_bytes: u64,
    new_memory: Option<(Arc<GuestMap>, SyncSender<()>)>,
    /// When requests that failed for want of space are tried again.
    retry_at: Option<Instant>,
    /// [`sigbus::count`] when the queues' memory was last looked at; `None` after a command.
    lost_seen: Option<u64>,
    quit: bool,
}

/// Runs a worker on the calling thread; its mailbox is sent to `ready` first. Its requests take part in `grace`.
///
/// # Errors
/// If the thread cannot have a runtime.
pub fn run(
    poll_max_ns: u64,
    grace: &Arc<Domain>,
    meter: Arc<WorkerMeter>,
    ready: &SyncSender<Result<Arc<Inbox>, Errno>>,
) {
    // io_uring may have become unavailable since it was found out (memory limits, the administrator).
    let installed = Runtime::install(best_wait_kind()).or_else(|e| {
        log::warn!("waiting in epoll: {e}");
        Runtime::install(WaitKind::Epoll)
    });
    let rt = match installed {
        Ok(rt) => rt,
        Err(e) => {
            // Nobody listens only if the export is gone.
            ready.send(Err(e)).unwrap_or_default();
            return;
        }
    };
    ready.send(Ok(Arc::clone(rt.inbox()))).unwrap_or_default();
    let mut worker = Worker::new(rt, poll_max_ns, grace, meter);
    AWAKE.fetch_add(1, Ordering::Relaxed);
    while !worker.quit {
        if !worker.turn() {
            worker.idle();
        }
    }
    AWAKE.fetch_sub(1, Ordering::Relaxed);
}

impl Worker {
    /// A worker of the calling thread, without queues.
    fn new(
        rt: Installed,
        poll_max_ns: u64,
        grace: &Arc<Domain>,
        meter: Arc<WorkerMeter>,
    ) -> Worker {
        let clock = Stopwatch::start();
        Worker {
            rt,
            grace: Participant::new(grace),
            queues: Vec::new(),
            policy: Policy::new(poll_max_ns),
            busy_since: clock.now(),
            clock,
            meter,
            processors: crate::sys::processors(),
            events: Vec::with_capacity(1024),
            done: Rc::default(),
            slow_bytes: 0,
            new_memory: None,
            retry_at: None,
            lost_seen: None,
            quit: false,
        }
    }

    /// One turn of the loop. Whether anything happened.
    fn turn(&mut self) -> bool {
        let lost = Some(sigbus::count());
        if lost != self.lost_seen {
            self.lost_seen = lost;
            self.queues.iter_mut().for_each(Queue::check_memory);
        }
        let mut progress = self.take();
        progress |= self.run_tasks();
        self.rt.reactor.borrow_mut().flush();
        progress |= self.complete();
        let mut answered = false;
        for q in &mut self.queues {
            answered |= q.publish();
        }
        if progress || answered {
            // The one look at the clock: what has been answered ends now, what is taken next begins.
            self.clock.look();
            self.queues.iter_mut().for_each(|q| q.end_turn(self.clock.now()));
        }
        let orders = self.obey() | self.retry() | self.settle();
        if orders {
            self.clock.look();
        }
        progress | orders
    }

    /// Runs ready tasks, until they have written as much inline as a turn should: a write beyond that would go to a kernel thread,
    /// which fights with this one for the file.
    fn run_tasks(&mut self) -> bool {
        let mut ran = 0;
        while ran < TASKS_PER_TURN && !self.rt.reactor.borrow().turn_is_full() {
            match self.rt.executor.run_ready(1) {
                0 => break,
                n => ran += n,
            }
        }
        ran > 0
    }

    /// Takes what the guest made available.
    fn take(&mut self) -> bool {
        let mut progress = false;
        if self.new_memory.is_some() {
            return false;
        }
        let mut reactor = self.rt.reactor.borrow_mut();
        let mut full = false;
        for q in &mut self.queues {
            let room = IN_FLIGHT_MAX.saturating_sub(reactor.in_flight() + self.rt.executor.tasks());
            let available = q.available(room);
            if available == 0 {
                full |= room == 0;
                continue;
            }
            q.begin_turn(self.clock.now());
            // Only the first request of a thread pays for being seen by others: so it is one for all that come now.
            let all = self.grace.enter();
            let mut left = available;
            while left > 0 || q.is_ahead() {
                full = reactor.turn_is_full() || self.slow_bytes >= SLOW_BYTES_MAX;
                let take = left > 0 && !full;
                left = if take { left - 1 } else { 0 };
                progress |= take;
                match q.go_on(take, &mut reactor, &self.grace) {
                    Some(Started::Fast) => {}
                    Some(Started::Slow(head, slow)) => {
                        self.slow_bytes += slow.weight();
                        spawn(&self.rt, &self.done, q, head, slow);
                    }
                    Some(Started::Nothing) | None => left = 0,
                }
            }
            self.grace.leave(all);
        }
        if full {
            // The next turn begins with another queue, so that none starves.
            self.queues.rotate_left(1);
        }
        progress
    }

    /// Whether requests may be taken at all now.
    fn has_room(&self) -> bool {
        let in_flight = self.rt.reactor.borrow().in_flight() + self.rt.executor.tasks();
        in_flight < IN_FLIGHT_MAX && self.slow_bytes < SLOW_BYTES_MAX && self.new_memory.is_none()
    }

    /// Takes completions of both lanes.
    fn complete(&mut self) -> bool {
        self.rt.collect(&mut self.events);
        let mut progress = false;
        for event in self.events.drain(..) {
            let (token, result) = match event {
                Event::Done(token, result) => (token, result),
                Event::Ready(index) => {
                    self.queues
                        .iter()
                        .filter(|q| u64::from(q.index) == index)
                        .for_each(Queue::kicked);
                    continue;
                }
            };
            progress = true;
            let (index, head) = from_payload(token);
            if let Some(q) = queue(&mut self.queues, index)
                && let Some(slow) = q.fast_done(head, result, &self.grace)
            {
                self.slow_bytes += slow.weight();
                spawn(&self.rt, &self.done, q, head, slow);
            }
        }
        for (token, slow, result) in self.done.borrow_mut().drain(..) {
            progress = true;
            self.slow_bytes -= slow.weight();
            let (index, head) = from_payload(token);
            if let Some(q) = queue(&mut self.queues, index) {
                if let Some(slow) = q.slow_done(head, slow, result) {
                    self.slow_bytes += slow.weight();
                    spawn(&self.rt, &self.done, q, head, slow);
                }
                if q.wants_retry() {
                    self.retry_at.get_or_insert_with(|| Instant::now() + RETRY);
                }
            }
        }
        progress
    }

    /// Tries again what failed for want of space, if it is time to.
    fn retry(&mut self) -> bool {
        let due = self.retry_at.is_some_and(|at| at <= Instant::now());
        if due {
            self.resume(Queue::wants_retry);
        }
        due
    }

    /// Tries again what the queues in question keep.
    fn resume(&mut self, which: impl Fn(&Queue) -> bool) {
        self.retry_at = None;
        for q in self.queues.iter_mut().filter(|q| which(q)) {
            for (head, slow) in q.retry() {
                self.slow_bytes += slow.weight();
                spawn(&self.rt, &self.done, q, head, slow);
            }
        }
    }

    /// Carries out commands.
    fn obey(&mut self) -> bool {
        let commands = self.rt.take_commands();
        let progress = !commands.is_empty();
        if progress {
            self.lost_seen = None;
        }
        for command in commands {
            match command.downcast::<Command>() {
                Ok(command) => self.command(*command),
                Err(_) => unreachable!("only commands are sent to workers"),
            }
        }
        progress
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Start(mut q, done) => {
                q.watch = q.kick_fd().and_then(|fd| self.watch(fd, q.index));
                q.disarm();
                q.notify_recovered();
                self.queues.push(*q);
                drop(done);
            }
            Command::Stop(i, how, answer) => {
                if let Some(q) = queue(&mut self.queues, i) {
                    q.stop(how, answer, &mut self.rt.reactor.borrow_mut());
                    if how == Stop::Suspend {
                        self.rt.wake_sleepers();
                    }
                }
            }
            Command::SetCall(i, fd, done) => {
                if let Some(q) = queue(&mut self.queues, i) {
                    q.set_call(fd);
                }
                drop(done);
            }
            Command::SetErr(i, fd, done) => {
                if let Some(q) = queue(&mut self.queues, i) {
                    q.set_err(fd);
                }
                drop(done);
            }
            Command::SetLog(i, log, done) => {
                if let Some(q) = queue(&mut self.queues, i) {
                    q.set_log(log);
                }
                drop(done);
            }
            Command::SetMemory(map, true, done) => self.new_memory = Some((map, done)),
            Command::SetMemory(map, false, done) => {
                self.queues.iter_mut().for_each(|q| q.remap(&map));
                drop(done);
            }
            Command::Resume(done) => {
                self.resume(|_| true);
                drop(done);
            }
            Command::Quit => self.quit = true,
        }
    }

    fn watch(&self, fd: i32, index: u16) -> Option<usize> {
        match self.rt.reactor.borrow_mut().watch(fd, index.into()) {
            Ok(key) => Some(key),
            Err(e) => {
                log::warn!("queue {index}: its kick descriptor cannot be waited for, polling: {e}");
                None
            }
        }
    }

    /// Finishes stops and memory switches that waited for requests in flight.
    fn settle(&mut self) -> bool {
        let mut progress = false;
        let mut at = 0;
        while at < self.queues.len() {
            let Some((answer, next)) = self.queues[at].stopped() else {
                at += 1;
                continue;
            };
            let answer = answer.clone();
            let mut q = self.queues.remove(at);
            q.leave();
            if let Some(key) = q.watch {
                self.rt.reactor.borrow_mut().unwatch(key);
            }
            drop(q);
            // The session waits for this; if it is gone, nobody needs the index.
            answer.send(next).unwrap_or_default();
            progress = true;
        }
        if self.new_memory.is_some() {
            // What is kept uses the old memory.
            self.queues.iter_mut().for_each(Queue::give_up);
        }
        if self.new_memory.is_some() && self.queues.iter().all(|q| q.is_idle()) {
            let (map, done) = self.new_memory.take().expect("just seen");
            self.queues.iter_mut().for_each(|q| q.remap(&map));
            drop(done);
            progress = true;
        }
        progress
    }

    /// Nothing to do: spins for a while, then sleeps.
    fn idle(&mut self) {
        let in_flight = self.rt.reactor.borrow().in_flight();
        let budget = self.policy.budget_ns(in_flight);
        // At the end of the last turn that did something.
        let start = self.clock.now();
        let mut elapsed = 0;
        while elapsed < budget {
            for _ in 0..8 {
                if self.has_input() {
                    self.meter.poll_hits.add(1);
                    return self.observe(start, in_flight, false);
                }
                std::hint::spin_loop();
            }
            elapsed = Stamp::now().since(start);
            if elapsed >= YIELD_AFTER_NS && AWAKE.load(Ordering::Relaxed) >= self.processors {
                // Who should give us work may be waiting for this very processor.
                std::thread::yield_now();
            }
        }
        self.queues.iter_mut().for_each(|q| q.arm());
        if !self.has_input() {
            let polled = self.queues.iter().any(|q| q.watch.is_none());
            self.meter.poll_misses.add(1);
            AWAKE.fetch_sub(1, Ordering::Relaxed);
            let retry = self.retry_at.map(|at| at.saturating_duration_since(Instant::now()));
            let pause = polled.then_some(POLLED_RING_PAUSE);
            self.rt.wait_at_most(retry.into_iter().chain(pause).min());
            AWAKE.fetch_add(1, Ordering::Relaxed);
        }
        self.queues.iter_mut().for_each(|q| q.disarm());
        self.observe(start, in_flight, true);
    }

    /// Tells the policy of an idle gap that began at `start`.
    fn observe(&mut self, start: Stamp, in_flight: usize, slept: bool) {
        self.clock.look();
        let end = self.clock.now();
        let busy_ns = start.since(std::mem::replace(&mut self.busy_since, end));
        self.policy.observe(busy_ns, end.since(start), in_flight, slept);
    }

    #[inline]
    fn has_input(&self) -> bool {
        (self.queues.iter().any(Queue::has_avail) && self.has_room()) || self.rt.has_work()
    }
}

/// The queue of index `index`, if this worker serves it.
fn queue(queues: &mut [Queue], index: u16) -> Option<&mut Queue> {
    queues.iter_mut().find(|q| q.index == index)
}

/// A task for `slow`, which is what the chain `head` of `q` asks for.
fn spawn(rt: &Runtime, done: &Done, q: &Queue, head: u16, slow: Slow) {
    let (done, token, cancelled) = (Rc::clone(done), payload(q.index, head), q.cancelled());
    rt.spawn(async move {
        let result = if cancelled.load(Ordering::Relaxed) {
            Err(Errno::ECANCELED)
        } else {
            rt::cancellable(cancelled, slow.run()).await
        };
        done.borrow_mut().push((token, slow, result));
    });
}
