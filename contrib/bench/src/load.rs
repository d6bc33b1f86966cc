//! The load generator: closed loop, a fixed number of requests in flight per queue.
//!
//! A client thread owns one or more lanes (a queue and its buffers). One turn: reap everything, record,
//! refill everything, publish once, kick if the device asks. A polling client goes on at once; an
//! event-driven one arms the interrupt, looks again, and sleeps on the call eventfd.
//!
//! The loop allocates nothing and reads the clock once per turn with completions: a request's latency
//! begins when its batch was reaped and ends when the batch it completes in was.

mod job;
mod lane;
mod order;
mod report;
mod tally;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vub_client::{Client, Error, Queue, Result, sys};

use crate::usage::{self, Counted};
pub use job::{Extra, Job, Mode, Rw};
use lane::Lane;
pub use report::{Report, SHARES};
pub use tally::{Tally, Window, report};

/// What the client threads obey.
#[derive(Debug)]
struct Control {
    phase: AtomicU8,
    finished: AtomicUsize,
}

/// Running, not counted.
pub const WARMUP: u8 = 0;
/// Running and counted.
pub const MEASURE: u8 = 1;
/// Take back what is in flight and return.
pub const STOP: u8 = 2;
/// Return at once.
const ABORT: u8 = 3;

/// Runs a job on a connected client; `pid` is the back end's process.
///
/// # Errors
/// The client's, and `Protocol` for a job that does not fit the disk.
pub fn run(job: &Job, client: &mut Client, pid: Option<u32>) -> Result<Report> {
    let capacity = client.capacity() * 512;
    // Must outlive the job.
    let _log = if job.is_logged() { Some(client.log_dirty()?) } else { None };
    run_queues(job, client.take_queues(), capacity, pid)
}

/// The same on queues from anywhere.
///
/// # Errors
/// As `run`.
pub fn run_queues(
    job: &Job,
    queues: Vec<Queue>,
    capacity: u64,
    pid: Option<u32>,
) -> Result<Report> {
    let size = if job.size == 0 { capacity } else { job.size.min(capacity) };
    if size / job.unit() < queues.len() as u64 {
        return Err(Error::Protocol(format!("disk of {size} bytes is too small for the job")));
    }
    let calls: Vec<_> = queues.iter().map(|q| q.call_fd().try_clone()).collect();
    let threads = match (job.threads, job.client) {
        (0, Mode::Poll) => 1,
        (0, Mode::Event) => queues.len(),
        (n, _) => usize::from(n).min(queues.len()),
    };
    let control = Arc::new(Control { phase: AtomicU8::new(WARMUP), finished: AtomicUsize::new(0) });
    let mut groups: Vec<Vec<Lane>> = (0..threads).map(|_| Vec::new()).collect();
    for (i, queue) in queues.into_iter().enumerate() {
        groups[i % threads].push(Lane::new(queue, job, size)?);
    }
    let workers = groups.into_iter().enumerate().map(|(i, lanes)| {
        let (job, control, conductor) = (job.clone(), Arc::clone(&control), thread::current());
        thread::spawn(move || {
            let result = worker(&job, i, lanes, &control);
            control.finished.fetch_add(1, Ordering::Release);
            conductor.unpark();
            result
        })
    });
    let workers: Vec<_> = workers.collect();
    let window = conduct(job, &control, threads, pid);
    if !wait_finished(&control, threads, vub_client::TIMEOUT) {
        control.phase.store(ABORT, Ordering::Relaxed);
        calls.iter().flatten().for_each(|call| drop(call.write(1)));
    }
    let mut total = Tally::new();
    for worker in workers {
        let tally = worker.join().map_err(|_| Error::Protocol("a client thread died".into()))??;
        total.merge(&tally);
    }
    Ok(report(job, &total, &window))
}

/// Waits for the client threads, `false` when they take too long.
fn wait_finished(control: &Control, threads: usize, limit: Duration) -> bool {
    let start = Instant::now();
    while control.finished.load(Ordering::Acquire) < threads {
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            return false;
        }
        // The threads wake us: looking now and then would take CPU time from what is measured.
        thread::park_timeout(left);
    }
    true
}

/// Leads the threads through the phases; what was seen from outside.
fn conduct(job: &Job, control: &Control, threads: usize, pid: Option<u32>) -> Window {
    let busy = || usage::machine_busy_ns().unwrap_or(0);
    if !job.counted() {
        thread::sleep(Duration::from_secs_f64(job.warmup));
    }
    let (before, busy_before) = (pid.and_then(|pid| Counted::begin(pid).ok()), busy());
    let start = Instant::now();
    control.phase.store(MEASURE, Ordering::Relaxed);
    // With --ios the threads end by themselves, the limit is only against hanging for ever.
    let limit = if job.ios == 0 { job.time } else { 3600.0 };
    wait_finished(control, threads, Duration::from_secs_f64(limit));
    control.phase.store(STOP, Ordering::Relaxed);
    let seconds = start.elapsed().as_secs_f64();
    let usage = before.and_then(|before| before.end().ok());
    Window { seconds, usage, busy_ns: busy().saturating_sub(busy_before) }
}

fn worker(job: &Job, index: usize, mut lanes: Vec<Lane>, control: &Control) -> Result<Tally> {
    if let Some(first) = job.pin {
        sys::pin_thread(first + index).map_err(|e| Error::Io("pin", e))?;
    }
    let (mut tally, mut phase) = (Tally::new(), WARMUP);
    let total = u64::from(job.queues);
    let quota = if job.ios == 0 { u64::MAX } else { job.ios * lanes.len() as u64 / total };
    // Counted work begins with the window; other work before it, to be warm by then.
    while job.counted() && control.phase.load(Ordering::Relaxed) == WARMUP {
        std::hint::spin_loop();
    }
    let (base, mut cpu) = (Instant::now(), sys::thread_cpu_ns());
    let mut completed = 0;
    lanes.iter_mut().try_for_each(|lane| lane.refill(0, &mut tally))?;
    loop {
        let now_phase = control.phase.load(Ordering::Relaxed);
        if now_phase != phase {
            if now_phase == MEASURE && !job.counted() {
                tally.clear();
                cpu = sys::thread_cpu_ns();
            }
            if now_phase >= STOP {
                break;
            }
            phase = now_phase;
        }
        let mut progress = 0;
        for lane in &mut lanes {
            let n = lane.turn(&base, &mut tally)?;
            progress += n;
        }
        completed += progress;
        if completed >= quota || lanes.iter_mut().all(Lane::done) {
            break;
        }
        if progress == 0 {
            wait(job.client, &mut lanes, &base, &mut tally)?;
        }
    }
    tally.cpu_ns = sys::thread_cpu_ns() - cpu;
    drain(&mut lanes, control)?;
    tally.errors = lanes.iter().map(Lane::errors).sum();
    Ok(tally)
}

/// Nothing was there: looks again soon, or sleeps until interrupted.
fn wait(mode: Mode, lanes: &mut [Lane], base: &Instant, tally: &mut Tally) -> Result<()> {
    if mode == Mode::Poll {
        std::hint::spin_loop();
        return Ok(());
    }
    if lanes.iter_mut().any(Lane::arm) {
        return Ok(());
    }
    tally.sleeps += 1;
    lane::sleep(lanes, base)
}

/// Takes back what is in flight, so that the back end is idle afterwards.
fn drain(lanes: &mut [Lane], control: &Control) -> Result<()> {
    let deadline = Instant::now() + vub_client::TIMEOUT;
    for lane in lanes {
        while lane.in_flight() > 0 {
            let abort = control.phase.load(Ordering::Relaxed) == ABORT;
            if abort || Instant::now() > deadline {
                return Err(Error::Timeout { what: "completion", after: vub_client::TIMEOUT });
            }
            lane.reap_quietly()?;
            thread::yield_now();
        }
    }
    Ok(())
}
