//! The load generator: closed loop, a fixed number of requests in flight per queue.
//!
//! A client thread owns one or more lanes (a queue and its buffers). One turn: reap everything, record,
//! refill everything, publish once, kick if the device asks. A polling client goes on at once; an
//! event-driven one arms the interrupt, looks again, and sleeps on the call eventfd.
//!
//! The loop allocates nothing and reads the clock once per turn with completions: a request's latency
//! begins when its batch was reaped and ends when the batch it completes in was.

mod lane;
mod order;
mod report;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;
use vub_client::proto::pf;
use vub_client::{Client, Error, Options, Queue, Result, sys};

use crate::hist::Histogram;
use crate::usage::{self, Snapshot, Usage};
use lane::Lane;
pub use report::Report;

/// What the requests are.
#[expect(clippy::enum_variant_names, reason = "fio's words")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Rw {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    RandRead,
    /// Random writes.
    RandWrite,
    /// Random reads and writes, see --rwmixread.
    RandRw,
}

/// How the client learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Looks at the used ring all the time.
    Poll,
    /// Sleeps on the call eventfd.
    Event,
}

/// What costs a ring something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Extra {
    /// Requests in flight are tracked for a successor (INFLIGHT_SHMFD).
    Inflight,
    /// Written pages are logged, as during a migration (LOG_SHMFD, LOG_ALL).
    Log,
}

/// A size with a binary suffix: 4k, 128k, 1g.
pub fn size(text: &str) -> std::result::Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match lower[digits.len()..].trim_end_matches("ib") {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        other => return Err(format!("unknown suffix {other:?}")),
    };
    let number: u64 = digits.parse().map_err(|e| format!("{digits:?}: {e}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))
}

/// The job, in fio's words.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Job {
    /// What the requests are
    #[arg(long, value_enum, default_value = "randread")]
    pub rw: Rw,
    /// Reads per hundred requests of randrw
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub rwmixread: u32,
    /// Flush after every N writes of each request in flight, which is a writer of its own: it waits for
    /// its writes before it flushes, and for the flush before it goes on (0: never)
    #[arg(long, default_value_t = 0)]
    pub fsync: u32,
    /// Bytes per request
    #[arg(long, value_parser = size, default_value = "4k")]
    pub bs: u64,
    /// Cut a request's data into segments of this size (0: one segment)
    #[arg(long, value_parser = size, default_value = "0")]
    pub segment: u64,
    /// Requests in flight per queue
    #[arg(long, default_value_t = 1)]
    pub iodepth: u16,
    /// Queues
    #[arg(long, default_value_t = 1)]
    pub queues: u16,
    /// Client threads [default: 1 when polling, one per queue otherwise]
    #[arg(long, default_value_t = 0)]
    pub threads: u16,
    /// Measure for this many seconds
    #[arg(long, default_value_t = 3.0)]
    pub time: f64,
    /// Measure this many requests instead
    #[arg(long, default_value_t = 0)]
    pub ios: u64,
    /// Seconds before measuring (not with --ios and --once)
    #[arg(long, default_value_t = 0.5)]
    pub warmup: f64,
    /// How the client learns of completions
    #[arg(long, value_enum, default_value = "poll")]
    pub client: Mode,
    /// Check what is read against what this run has written
    #[arg(long)]
    pub verify: bool,
    /// Use only this much of the disk (0: all of it)
    #[arg(long, value_parser = size, default_value = "0")]
    pub size: u64,
    /// One request in each so many bytes, at an arbitrary block of them (0: every block)
    #[arg(long, value_parser = size, default_value = "0")]
    pub stride: u64,
    /// Touch every block (or stride) once, in random order if the job is random; ends when all were.
    /// No warm-up
    #[arg(long)]
    pub once: bool,
    /// Entries per ring
    #[arg(long, default_value_t = 256)]
    pub queue_size: u16,
    /// Do not use indirect descriptors
    #[arg(long)]
    pub no_indirect: bool,
    /// Do not use EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,
    /// What else the guest's rings ask of the back end (repeatable)
    #[arg(long, value_enum)]
    pub ring: Vec<Extra>,
    /// Pin client threads, the first to this CPU
    #[arg(long)]
    pub pin: Option<usize>,
    /// Seed of the offsets
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

impl Job {
    /// The command line's defaults.
    pub fn common() -> Self {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            job: Job,
        }
        <Line as clap::Parser>::parse_from(["job"]).job
    }

    /// Bytes per data segment.
    fn segment_len(&self) -> u64 {
        if self.segment == 0 { self.bs } else { self.segment.min(self.bs) }
    }

    /// Bytes of the disk that one request stands for.
    fn unit(&self) -> u64 {
        self.stride.max(self.bs)
    }

    /// The work is given and not only its time: every request counts, there is no warm-up.
    fn counted(&self) -> bool {
        self.ios > 0 || self.once
    }

    /// Descriptors of a request, header and status included.
    fn descs(&self) -> u64 {
        self.bs.div_ceil(self.segment_len().max(1)) + 2
    }

    /// What is wrong with it, if anything.
    pub fn check(&self) -> std::result::Result<(), String> {
        let per_request = if self.no_indirect { self.descs() } else { 1 };
        let room = u64::from(self.queue_size) / per_request.max(1);
        match () {
            () if self.bs == 0 || !self.bs.is_multiple_of(512) => {
                Err("--bs must be a multiple of 512".into())
            }
            () if !self.stride.is_multiple_of(self.bs) => {
                Err("--stride must be a multiple of --bs".into())
            }
            () if !self.segment.is_multiple_of(512) => {
                Err("--segment must be a multiple of 512".into())
            }
            () if self.queues == 0 || self.iodepth == 0 => {
                Err("--queues and --iodepth begin at 1".into())
            }
            () if u64::from(self.iodepth) > room => {
                Err(format!("a ring of {} has room for {room} such requests", self.queue_size))
            }
            () if !self.queue_size.is_power_of_two() => {
                Err("--queue-size must be a power of two".into())
            }
            () => Ok(()),
        }
    }

    fn is_logged(&self) -> bool {
        self.ring.contains(&Extra::Log)
    }

    /// The client this job needs.
    pub fn options(&self) -> Options {
        let depth = u64::from(self.iodepth);
        let lane = depth * (self.bs + 4096 + 64 + 16 * self.descs()) + (1 << 17);
        let ring = u64::from(self.queue_size) * 32 + 3 * 4096;
        let mem = (u64::from(self.queues) * (lane + ring)).next_multiple_of(1 << 21);
        let plain = Options::default();
        Options {
            queues: self.queues,
            queue_size: self.queue_size,
            event_idx: !self.no_event_idx,
            inflight: self.ring.contains(&Extra::Inflight),
            indirect: !self.no_indirect,
            polling: self.client == Mode::Poll,
            mem_size: usize::try_from(mem).unwrap_or(usize::MAX),
            want_protocol: plain.want_protocol | u64::from(self.is_logged()) << pf::LOG_SHMFD,
            ..plain
        }
    }
}

/// What was seen from outside during the window.
#[derive(Debug, Default)]
struct Window {
    seconds: f64,
    usage: Option<Usage>,
    busy_ns: u64,
}

/// What the client threads obey.
#[derive(Debug)]
struct Control {
    phase: AtomicU8,
    finished: AtomicUsize,
}

/// Running, not counted.
const WARMUP: u8 = 0;
/// Running and counted.
const MEASURE: u8 = 1;
/// Take back what is in flight and return.
const STOP: u8 = 2;
/// Return at once.
const ABORT: u8 = 3;

/// What a client thread has counted.
#[derive(Debug)]
struct Tally {
    lat: Histogram,
    /// Reads, writes, flushes.
    ops: [u64; 3],
    errors: u64,
    kicks: u64,
    sleeps: u64,
    cpu_ns: u64,
}

impl Tally {
    fn new() -> Self {
        Self { lat: Histogram::new(), ops: [0; 3], errors: 0, kicks: 0, sleeps: 0, cpu_ns: 0 }
    }

    /// Begins the window.
    fn clear(&mut self) {
        self.lat.clear();
        (self.ops, self.kicks, self.sleeps) = ([0; 3], 0, 0);
    }

    fn merge(&mut self, other: &Self) {
        self.lat.merge(&other.lat);
        self.ops.iter_mut().zip(other.ops).for_each(|(a, b)| *a += b);
        self.errors += other.errors;
        self.kicks += other.kicks;
        self.sleeps += other.sleeps;
        self.cpu_ns += other.cpu_ns;
    }
}

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
    let look = || pid.and_then(|pid| Snapshot::take(pid).ok());
    if !job.counted() {
        thread::sleep(Duration::from_secs_f64(job.warmup));
    }
    let (before, busy_before) = (look(), busy());
    let start = Instant::now();
    control.phase.store(MEASURE, Ordering::Relaxed);
    // With --ios the threads end by themselves, the limit is only against hanging for ever.
    let limit = if job.ios == 0 { job.time } else { 3600.0 };
    wait_finished(control, threads, Duration::from_secs_f64(limit));
    control.phase.store(STOP, Ordering::Relaxed);
    let seconds = start.elapsed().as_secs_f64();
    let usage = before.zip(look()).map(|(before, after)| before.until(&after));
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
            wait(job.client, &mut lanes, &mut tally)?;
        }
    }
    tally.cpu_ns = sys::thread_cpu_ns() - cpu;
    drain(&mut lanes, control)?;
    tally.errors = lanes.iter().map(Lane::errors).sum();
    Ok(tally)
}

/// Nothing was there: looks again soon, or sleeps until interrupted.
fn wait(mode: Mode, lanes: &mut [Lane], tally: &mut Tally) -> Result<()> {
    if mode == Mode::Poll {
        std::hint::spin_loop();
        return Ok(());
    }
    if lanes.iter_mut().any(Lane::arm) {
        return Ok(());
    }
    tally.sleeps += 1;
    lane::sleep(lanes)
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

fn report(job: &Job, total: &Tally, window: &Window) -> Report {
    let Window { seconds, usage, busy_ns } = *window;
    let ours = total.cpu_ns + usage.map_or(0, |u| u.cpu_ns);
    let ios: u64 = total.ops.iter().sum();
    let per_io = |n: u64| n as f64 / (ios.max(1) as f64);
    let data = (total.ops[0] + total.ops[1]) * job.bs;
    Report {
        ios,
        reads: total.ops[0],
        writes: total.ops[1],
        flushes: total.ops[2],
        errors: total.errors,
        seconds,
        iops: ios as f64 / seconds,
        mb_per_s: data as f64 / seconds / 1e6,
        lat_mean_ns: total.lat.mean(),
        lat_p50_ns: total.lat.percentile(0.5),
        lat_p99_ns: total.lat.percentile(0.99),
        lat_p999_ns: total.lat.percentile(0.999),
        lat_max_ns: total.lat.max(),
        client_cpu_ns_per_io: per_io(total.cpu_ns),
        kicks_per_io: per_io(total.kicks),
        sleeps_per_io: per_io(total.sleeps),
        backend_cpu_ns_per_io: usage.map_or(0.0, |u| per_io(u.cpu_ns)),
        backend_voluntary_per_io: usage.map_or(0.0, |u| per_io(u.voluntary)),
        backend_involuntary_per_io: usage.map_or(0.0, |u| per_io(u.involuntary)),
        foreign_cpus: busy_ns.saturating_sub(ours) as f64 / 1e9 / seconds,
        backend: usage,
        extents_per_gib: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("4k"), Ok(4096));
        assert_eq!(size("1GiB"), Ok(1 << 30));
        assert_eq!(size("512"), Ok(512));
        assert!(size("4x").is_err() && size("k").is_err() && size("99999999999t").is_err());
    }
}
