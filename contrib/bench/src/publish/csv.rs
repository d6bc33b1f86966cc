//! Tables for other programs: a line per series with medians and extremes, and a line per run.

use crate::results::{Results, Spread};

/// A field: quoted where it must be (RFC 4180).
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.into()
    }
}

fn option(value: Option<f64>) -> String {
    value.map_or(String::new(), |v| format!("{v:.4}"))
}

/// Columns of `summary`, each with a median, the least and the most.
const SPREADS: [&str; 9] = [
    "iops",
    "mb_per_s",
    "cpu_ns_per_io",
    "p50_ns",
    "p99_ns",
    "p999_ns",
    "syscalls_per_io",
    "switches_per_io",
    "foreign_cpus",
];

/// One line per case and back end.
pub fn summary(results: &Results) -> String {
    let mut text = "case,backend,runs".to_string();
    for name in SPREADS {
        text += &format!(",{name},{name}_min,{name}_max");
    }
    text.push('\n');
    for s in &results.series {
        text += &format!("{},{},{}", field(&s.case), field(&s.backend), s.runs.len());
        let some = |s: Spread| Some(s);
        let spreads = [
            some(s.iops),
            some(s.mb_per_s),
            some(s.cpu_ns),
            some(s.p50_ns),
            some(s.p99_ns),
            some(s.p999_ns),
            s.syscalls,
            some(s.switches),
            some(s.foreign_cpus),
        ];
        for spread in spreads {
            let of = |f: fn(Spread) -> f64| option(spread.map(f));
            text += &format!(",{},{},{}", of(|s| s.median), of(|s| s.min), of(|s| s.max));
        }
        text.push('\n');
    }
    text
}

/// One line per run.
pub fn runs(results: &Results) -> String {
    let mut text = "case,backend,run,ios,reads,writes,flushes,errors,seconds,iops,mb_per_s,lat_mean_ns,\
                    lat_p50_ns,lat_p99_ns,lat_p999_ns,lat_max_ns,cpu_ns_per_io,syscalls_per_io,\
                    voluntary_per_io,involuntary_per_io,client_cpu_ns_per_io,kicks_per_io,sleeps_per_io,\
                    device_bytes_per_io,extents_per_gib,foreign_cpus\n"
        .to_string();
    for s in &results.series {
        for (i, r) in s.runs.iter().enumerate() {
            let counts = [r.ios, r.reads, r.writes, r.flushes, r.errors].map(|n| n.to_string());
            let lat = [r.lat_mean_ns, r.lat_p50_ns, r.lat_p99_ns, r.lat_p999_ns, r.lat_max_ns];
            let rest = [
                Some(r.backend_cpu_ns_per_io),
                r.backend_syscalls_per_io,
                Some(r.backend_voluntary_per_io),
                Some(r.backend_involuntary_per_io),
                Some(r.client_cpu_ns_per_io),
                Some(r.kicks_per_io),
                Some(r.sleeps_per_io),
                r.device_bytes_per_io(),
                r.extents_per_gib,
                Some(r.foreign_cpus),
            ];
            text += &format!(
                "{},{},{},{},{:.4},{:.1},{:.2},{},{}\n",
                field(&s.case),
                field(&s.backend),
                i + 1,
                counts.join(","),
                r.seconds,
                r.iops,
                r.mb_per_s,
                lat.map(|n| n.to_string()).join(","),
                rest.map(option).join(",")
            );
        }
    }
    text
}
