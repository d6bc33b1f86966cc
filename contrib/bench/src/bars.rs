//! The bars of issue 2, and whether they were met.

use serde::{Deserialize, Serialize};

use crate::compare::{Results, Series, Spread};

/// One bar with its verdict.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// What is compared.
    pub bar: String,
    /// What the issue wants, as text.
    pub wanted: String,
    /// What was measured; None when the case did not run.
    pub measured: Option<f64>,
    /// Met.
    pub pass: Option<bool>,
}

/// Which number of a series.
#[derive(Clone, Copy)]
enum Metric {
    Iops,
    Cpu,
    P50,
}

/// A against B on one case: case, number, at least (or at most), factor.
const RATIOS: [(&str, Metric, bool, f64); 13] = [
    ("null-d32-poll", Metric::Iops, true, 4.0),
    ("null-d32-poll", Metric::Cpu, false, 0.25),
    ("null-d1-event", Metric::Iops, true, 2.5),
    ("page-d32-randread", Metric::Iops, true, 1.6),
    ("page-d32-randread", Metric::Cpu, false, 0.6),
    ("page-seq128k-read", Metric::Iops, true, 1.0),
    ("page-seq128k-write", Metric::Iops, true, 1.0),
    ("tmpfs-native-d32", Metric::Iops, true, 1.5),
    ("tmpfs-native-d32", Metric::Cpu, false, 0.65),
    ("disk-d1", Metric::Iops, true, 1.4),
    ("disk-d1", Metric::P50, false, 0.75),
    ("disk-d32", Metric::Cpu, false, 0.85),
    // Not in the issue, but a write path that loses would be hidden by the rest.
    ("page-d32-randwrite", Metric::Iops, true, 1.0),
];
/// CPU per request with 4 queues busy, against 1.
const QUEUES_FACTOR: f64 = 1.15;
const LISTENING_MS: f64 = 50.0;
const RSS_MIB: f64 = 20.0;
/// "No wakeups, 0 %" with room for one stray interrupt in 5 seconds.
const SWITCHES_PER_S: f64 = 0.2;
const CPU_PERCENT: f64 = 0.005;

fn of(series: &Series, metric: Metric) -> Spread {
    match metric {
        Metric::Iops => series.iops,
        Metric::Cpu => series.cpu_ns,
        Metric::P50 => series.p50_ns,
    }
}

fn outcome(bar: String, least: bool, limit: f64, unit: &str, measured: Option<f64>) -> Outcome {
    let pass = measured.map(|m| if least { m >= limit } else { m <= limit });
    let sign = if least { ">=" } else { "<=" };
    Outcome { bar, wanted: format!("{sign} {limit}{unit}"), measured, pass }
}

/// Compares what was measured with what the issue wants of A.
pub fn judge(results: &Results) -> Vec<Outcome> {
    let find =
        |case: &str, who: &str| results.series.iter().find(|s| s.case == case && s.backend == who);
    let mut bars: Vec<Outcome> = RATIOS
        .iter()
        .map(|(case, metric, least, factor)| {
            let name = match metric {
                Metric::Iops => "IOPS",
                Metric::Cpu => "CPU per I/O",
                Metric::P50 => "p50 latency",
            };
            let pair = find(case, "A").zip(find(case, "B"));
            let ratio = pair.map(|(a, b)| of(a, *metric).median / of(b, *metric).median);
            outcome(format!("{case}: {name} against B"), *least, *factor, "x", ratio)
        })
        .collect();
    let queues = find("null-4q", "A").zip(find("null-d32-poll", "A"));
    let queues = queues.map(|(four, one)| four.cpu_ns.median / one.cpu_ns.median);
    let bar = "null: CPU per I/O, 4 queues against 1".to_string();
    bars.push(outcome(bar, false, QUEUES_FACTOR, "x", queues));
    let idle = results.idle.iter().find(|i| i.backend == "A");
    let mut absolute = |bar: &str, limit, unit, measured| {
        bars.push(outcome(bar.into(), false, limit, unit, measured));
    };
    let mib = |kib: u64| kib as f64 / 1024.0;
    absolute("start to listening", LISTENING_MS, " ms", idle.map(|i| i.listening_ms.median));
    let rss = idle.map(|i| mib(i.rss_connected.total_kib.max(i.rss_listening.total_kib)));
    absolute("resident, idle, 16 queues", RSS_MIB, " MiB", rss);
    absolute("wakeups, connected idle", SWITCHES_PER_S, "/s", idle.map(|i| i.switches_per_s));
    absolute("CPU, connected idle", CPU_PERCENT, " %", idle.map(|i| i.cpu_percent));
    bars
}

/// Prints the verdicts.
pub fn print(bars: &[Outcome]) {
    println!("\n{:<44} {:>10} {:>10}", "bar", "wanted", "measured");
    for bar in bars {
        let measured = bar.measured.map_or("-".into(), |m| format!("{m:.3}"));
        let verdict = match bar.pass {
            Some(true) => "PASS",
            Some(false) => "MISS",
            None => "not run",
        };
        println!("{:<44} {:>10} {measured:>10} {verdict}", bar.bar, bar.wanted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_measured_is_neither_pass_nor_miss() {
        let bars = judge(&Results::default());
        assert!(bars.len() > 15 && bars.iter().all(|b| b.pass.is_none()));
        assert_eq!(outcome("x".into(), true, 4.0, "x", Some(4.1)).pass, Some(true));
        assert_eq!(outcome("x".into(), false, 4.0, "x", Some(4.1)).pass, Some(false));
    }
}
