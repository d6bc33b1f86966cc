//! What client threads count, what is seen from outside meanwhile, and both as a report.

use super::{Job, Report, SHARES};
use crate::hist::Histogram;
use crate::usage::Usage;

/// What was seen from outside during the window.
#[derive(Debug, Default)]
pub struct Window {
    pub seconds: f64,
    pub usage: Option<Usage>,
    pub busy_ns: u64,
}

/// What a client thread has counted.
#[derive(Debug)]
pub struct Tally {
    pub lat: Histogram,
    /// Reads, writes, flushes.
    pub ops: [u64; 3],
    pub errors: u64,
    pub kicks: u64,
    pub sleeps: u64,
    pub cpu_ns: u64,
}

impl Tally {
    pub fn new() -> Self {
        Self { lat: Histogram::new(), ops: [0; 3], errors: 0, kicks: 0, sleeps: 0, cpu_ns: 0 }
    }

    /// Begins the window.
    pub fn clear(&mut self) {
        self.lat.clear();
        (self.ops, self.kicks, self.sleeps) = ([0; 3], 0, 0);
    }

    /// Counts a completed request: read 0, write 1, flush 2.
    #[inline]
    pub fn record(&mut self, op: usize, ns: u64) {
        self.ops[op] += 1;
        self.lat.record(ns);
    }

    pub fn merge(&mut self, other: &Self) {
        self.lat.merge(&other.lat);
        self.ops.iter_mut().zip(other.ops).for_each(|(a, b)| *a += b);
        self.errors += other.errors;
        self.kicks += other.kicks;
        self.sleeps += other.sleeps;
        self.cpu_ns += other.cpu_ns;
    }
}

/// Both together.
pub fn report(job: &Job, total: &Tally, window: &Window) -> Report {
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
        backend_syscalls_per_io: usage.and_then(|u| u.syscalls).map(per_io),
        lat_quantiles_ns: SHARES.iter().map(|share| total.lat.percentile(*share)).collect(),
        ..Report::default()
    }
}
