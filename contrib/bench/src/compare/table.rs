//! The table on the terminal.

use super::QUIET;
use crate::load::Report;
use crate::results::{Series, Spread};

/// Its heading.
pub fn heading() {
    println!(
        "\n{:<27} {:>9} {:>19} {:>8} {:>8} {:>8} {:>8} {:>9} {:>5} {:>7} {:>8} {:>7}",
        "case and back end",
        "IOPS",
        "min..max",
        "MB/s",
        "CPU ns",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "sw/io",
        "sysc/io",
        "IOPS A/B",
        "CPU A/B"
    );
}

/// A row; ratios against `first`, A on the same case.
pub fn row(s: &Series, first: Option<&Series>) {
    let us = |s: Spread| s.median / 1e3;
    let span = format!("{:.0}..{:.0}", s.iops.min, s.iops.max);
    let ratio = first.map_or(String::new(), |a| {
        format!("{:>7.2} {:>7.2}", a.iops.median / s.iops.median, a.cpu_ns.median / s.cpu_ns.median)
    });
    let note = |name: &str, of: fn(&Report) -> Option<f64>| {
        s.some(of).map_or(String::new(), |v| format!("  {:.0} {name}", v.median))
    };
    let extents = note("extents/GiB", |r| r.extents_per_gib);
    // Less is a page of the program now and then.
    let reads = note("bytes read/io", |r| r.device_bytes_per_io().filter(|b| *b >= 512.0));
    let syscalls = s.syscalls.map_or("-".into(), |n| format!("{:.2}", n.median));
    let noisy = if s.foreign_cpus.median > QUIET {
        format!("  ({:.2} CPUs used by others)", s.foreign_cpus.median)
    } else {
        String::new()
    };
    println!(
        "{:<21} {:<5} {:>9.0} {:>19} {:>8.0} {:>8.0} {:>8.1} {:>8.1} {:>9.1} {:>5.2} {syscalls:>7} {ratio}{extents}{reads}{noisy}",
        s.case,
        s.backend,
        s.iops.median,
        span,
        s.mb_per_s.median,
        s.cpu_ns.median,
        us(s.p50_ns),
        us(s.p99_ns),
        us(s.p999_ns),
        s.switches.median
    );
}
