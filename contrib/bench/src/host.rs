//! The host's own io_uring loop: the same job on the file itself, with neither virtqueue nor back end. One
//! thread and one ring per queue, `iodepth` requests in flight; what is called the back end's CPU time
//! elsewhere is this process's own.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vub_client::sys::{self, FileRing};

use crate::load::{Job, MEASURE, Report, Rw, STOP, Tally, WARMUP, Window, report};
use crate::usage::{self, Counted};

/// Runs a job on a file.
///
/// # Errors
/// Those of the file and of io_uring, and a job this loop does not know.
pub fn run(job: &Job, path: &Path, direct: bool) -> io::Result<Report> {
    let paced = job.rate_iops > 0;
    if job.once || job.stride > 0 || job.fsync > 0 || job.verify || job.ios > 0 || paced {
        return Err(io::Error::other(
            "the host's loop knows neither --once, --stride, --fsync, --verify, --ios nor --rate-iops",
        ));
    }
    let len = sys::open_direct(path, direct)?.metadata()?.len();
    let size = if job.size == 0 { len } else { len.min(job.size) };
    let blocks = size / job.bs / u64::from(job.queues);
    if blocks == 0 {
        return Err(io::Error::other(format!("{}: too small for the job", path.display())));
    }
    let phase = AtomicU8::new(WARMUP);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..u64::from(job.queues))
            .map(|queue| {
                let (phase, first) = (&phase, queue * blocks);
                scope.spawn(move || {
                    let file = sys::open_direct(path, direct)?;
                    worker(job, file, first, blocks, phase)
                })
            })
            .collect();
        let window = window(job, &phase);
        phase.store(STOP, Ordering::Relaxed);
        let window = window?;
        let mut total = Tally::new();
        for worker in workers {
            let tally = worker.join().map_err(|_| io::Error::other("a thread died"))?;
            total.merge(&tally?);
        }
        Ok(report(job, &total, &window))
    })
}

fn window(job: &Job, phase: &AtomicU8) -> io::Result<Window> {
    let pid = std::process::id();
    thread::sleep(Duration::from_secs_f64(job.warmup));
    let (before, busy) = (Counted::begin(pid)?, usage::machine_busy_ns()?);
    let start = Instant::now();
    phase.store(MEASURE, Ordering::Relaxed);
    thread::sleep(Duration::from_secs_f64(job.time));
    phase.store(STOP, Ordering::Relaxed);
    let seconds = start.elapsed().as_secs_f64();
    let usage = before.end()?;
    let busy_ns = usage::machine_busy_ns()?.saturating_sub(busy);
    Ok(Window { seconds, usage: Some(usage), busy_ns })
}

fn worker(job: &Job, file: File, first: u64, blocks: u64, phase: &AtomicU8) -> io::Result<Tally> {
    let len = u32::try_from(job.bs).map_err(io::Error::other)?;
    let mut ring = FileRing::new(file, job.iodepth, len)?;
    let (mut tally, mut measuring) = (Tally::new(), false);
    let mut random = (job.seed + first).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = 0;
    let mut started: Vec<(u64, bool)> = vec![(0, false); usize::from(job.iodepth)];
    let mut free: Vec<u16> = (0..job.iodepth).collect();
    let base = Instant::now();
    while phase.load(Ordering::Relaxed) != STOP {
        if !measuring && phase.load(Ordering::Relaxed) == MEASURE {
            measuring = true;
            tally.clear();
        }
        let now = base.elapsed().as_nanos() as u64;
        while let Some(slot) = free.pop() {
            let (block, write) = choose(job, &mut random, &mut next, blocks);
            ring.push(slot, write, (first + block) * job.bs);
            started[usize::from(slot)] = (now, write);
        }
        ring.submit_and_wait()?;
        let now = base.elapsed().as_nanos() as u64;
        while let Some((slot, whole)) = ring.pop() {
            let (start, write) = started[usize::from(slot)];
            tally.record(usize::from(write), now - start);
            tally.errors += u64::from(!whole);
            free.push(slot);
        }
    }
    Ok(tally)
}

fn choose(job: &Job, random: &mut u64, next: &mut u64, blocks: u64) -> (u64, bool) {
    let mut draw = || {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        *random
    };
    let write = match job.rw {
        Rw::Read | Rw::RandRead => false,
        Rw::Write | Rw::RandWrite => true,
        Rw::RandRw | Rw::Mixed => (draw() >> 32) % 100 >= u64::from(job.rwmixread),
    };
    if job.rw.is_sequential() {
        let block = *next;
        *next = (block + 1) % blocks;
        return (block, write);
    }
    (((u128::from(draw()) * u128::from(blocks)) >> 64) as u64, write)
}
