//! What a job reports.

use serde::{Deserialize, Serialize};

use crate::usage::Usage;

/// Shares of all requests whose latency a report holds, for a distribution's plot.
pub const SHARES: [f64; 27] = [
    0.001, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75,
    0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0,
];

/// What was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Requests completed in the window.
    pub ios: u64,
    /// Of these, reads.
    pub reads: u64,
    /// Of these, writes.
    pub writes: u64,
    /// Of these, flushes.
    pub flushes: u64,
    /// Requests that ended with an error status, whenever.
    pub errors: u64,
    /// Length of the window.
    pub seconds: f64,
    /// Requests per second.
    pub iops: f64,
    /// 10^6 bytes per second.
    pub mb_per_s: f64,
    /// Latency.
    pub lat_mean_ns: u64,
    /// Median.
    pub lat_p50_ns: u64,
    /// 99th percentile.
    pub lat_p99_ns: u64,
    /// 99.9th percentile.
    pub lat_p999_ns: u64,
    /// Longest.
    pub lat_max_ns: u64,
    /// CPU time of the client's threads per request.
    pub client_cpu_ns_per_io: f64,
    /// Kicks sent per request.
    pub kicks_per_io: f64,
    /// Times an event-driven client slept, per request.
    pub sleeps_per_io: f64,
    /// CPU time of the back end per request, if its process is known.
    pub backend_cpu_ns_per_io: f64,
    /// Voluntary context switches of the back end per request.
    pub backend_voluntary_per_io: f64,
    /// Involuntary ones.
    pub backend_involuntary_per_io: f64,
    /// System calls of the back end per request, io_uring's workers included; None when the kernel
    /// does not count them for us.
    #[serde(default)]
    pub backend_syscalls_per_io: Option<f64>,
    /// The latency below which each of `SHARES` lies.
    #[serde(default)]
    pub lat_quantiles_ns: Vec<u64>,
    /// CPUs kept busy by neither client nor back end: compilers, but interrupts and kernel threads
    /// working for the job, too.
    pub foreign_cpus: f64,
    /// The back end's totals.
    pub backend: Option<Usage>,
    /// Of an image written in sequence: contiguous pieces of its file per GiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extents_per_gib: Option<f64>,
}

impl Report {
    /// What the back end read from devices per request; None for nothing at all.
    pub fn device_bytes_per_io(&self) -> Option<f64> {
        let bytes = self.backend.map_or(0, |u| u.read_bytes);
        (bytes > 0).then(|| bytes as f64 / self.ios.max(1) as f64)
    }
}
