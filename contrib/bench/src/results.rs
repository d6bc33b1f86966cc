//! Everything measured, as it is written to a file and read again.

use serde::{Deserialize, Serialize};

use crate::bars::Outcome;
use crate::goals::Goal;
use crate::guest::GuestRun;
use crate::idle::{Idle, Large};
use crate::load::Report;
use crate::many::Many;

/// Median and extremes of some runs.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Spread {
    /// The middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of some values; zeros when there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let n = values.len();
        if n == 0 {
            return Self::default();
        }
        let median = f64::midpoint(values[(n - 1) / 2], values[n / 2]);
        Self { median, min: values[0], max: values[n - 1] }
    }
}

fn counted(runs: &[Report]) -> Option<Spread> {
    let values: Vec<f64> = runs.iter().filter_map(|r| r.backend_syscalls_per_io).collect();
    (!values.is_empty()).then(|| Spread::of(values))
}

/// All runs of one back end on one case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Series {
    /// The case.
    pub case: String,
    /// The back end's label.
    pub backend: String,
    /// Requests per second.
    pub iops: Spread,
    /// 10^6 bytes per second.
    pub mb_per_s: Spread,
    /// Back-end CPU per request.
    pub cpu_ns: Spread,
    /// Median latency.
    pub p50_ns: Spread,
    /// 99th percentile.
    pub p99_ns: Spread,
    /// 99.9th percentile.
    pub p999_ns: Spread,
    /// System calls of the back end per request, where they can be counted.
    #[serde(default)]
    pub syscalls: Option<Spread>,
    /// Voluntary and involuntary context switches of the back end per request.
    pub switches: Spread,
    /// CPUs others used.
    pub foreign_cpus: Spread,
    /// Every run.
    pub runs: Vec<Report>,
}

impl Series {
    /// Of all runs of a back end.
    pub fn new(case: &str, backend: &str, runs: Vec<Report>) -> Self {
        let of = |f: fn(&Report) -> f64| Spread::of(runs.iter().map(f));
        let syscalls = counted(&runs);
        Self {
            case: case.into(),
            backend: backend.into(),
            iops: of(|r| r.iops),
            mb_per_s: of(|r| r.mb_per_s),
            cpu_ns: of(|r| r.backend_cpu_ns_per_io),
            p50_ns: of(|r| r.lat_p50_ns as f64),
            p99_ns: of(|r| r.lat_p99_ns as f64),
            p999_ns: of(|r| r.lat_p999_ns as f64),
            syscalls,
            switches: of(|r| r.backend_voluntary_per_io + r.backend_involuntary_per_io),
            foreign_cpus: of(|r| r.foreign_cpus),
            runs,
        }
    }

    /// Of a number that not every run has.
    pub fn some(&self, of: impl Fn(&Report) -> Option<f64>) -> Option<Spread> {
        let values: Vec<f64> = self.runs.iter().filter_map(of).collect();
        (!values.is_empty()).then(|| Spread::of(values))
    }
}

/// Everything measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Results {
    /// The kernel, the CPUs.
    pub machine: String,
    /// When it began, UTC.
    #[serde(default)]
    pub date: String,
    /// The command line of this program.
    #[serde(default)]
    pub command_line: String,
    /// What each back end says of its version.
    #[serde(default)]
    pub versions: Vec<String>,
    /// Why system calls are not counted, if they are not.
    #[serde(default)]
    pub syscalls_note: Option<String>,
    /// Command lines, one per back end, with a null device.
    pub commands: Vec<String>,
    /// One per case and back end.
    pub series: Vec<Series>,
    /// One per back end.
    pub idle: Vec<Idle>,
    /// Two per back end.
    #[serde(default)]
    pub large: Vec<Large>,
    /// Many exports of one process, one entry per back end.
    #[serde(default)]
    pub many: Vec<Many>,
    /// fio's jobs in a guest.
    #[serde(default)]
    pub guest: Vec<GuestRun>,
    /// The goals of issue 5, when both back ends ran.
    #[serde(default)]
    pub goals: Vec<Goal>,
    /// The bars, when both back ends ran.
    pub bars: Vec<Outcome>,
}

impl Results {
    /// The runs of a back end on a case.
    pub fn find(&self, case: &str, backend: &str) -> Option<&Series> {
        self.series.iter().find(|s| s.case == case && s.backend == backend)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((Spread::of([3.0, 1.0, 2.0]).median - 2.0).abs() < 1e-9);
        let s = Spread::of([4.0, 1.0]);
        assert!((s.median - 2.5).abs() < 1e-9 && (s.max - 4.0).abs() < 1e-9);
        assert!(Spread::of([]).median.abs() < 1e-9);
    }
}
