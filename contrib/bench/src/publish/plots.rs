//! Which plots there are, and what they show.

use super::chart::{Axis, Chart, Line, Point};
use super::{labels, name_of};
use crate::cases::{DEPTHS, QUEUES, SIZES};
use crate::compare::QUIET;
use crate::load::SHARES;
use crate::results::{Results, Series, Spread};

/// A number of a series.
type Number = fn(&Series) -> Spread;

fn scaled(s: Spread, by: f64) -> Spread {
    Spread { median: s.median * by, min: s.min * by, max: s.max * by }
}

fn iops(s: &Series) -> Spread {
    s.iops
}

fn cpu_us(s: &Series) -> Spread {
    scaled(s.cpu_ns, 1e-3)
}

fn mb_per_s(s: &Series) -> Spread {
    s.mb_per_s
}

const IOPS: (&str, &str, Number) = ("iops", "IOPS", iops);
const CPU: (&str, &str, Number) = ("cpu", "back-end CPU per I/O, us", cpu_us);

/// Where, when, with what: said by every plot.
pub fn foot(results: &Results) -> Vec<String> {
    let mut foot = vec![format!("{}; {}", results.machine, results.date)];
    foot.push(results.versions.join("; "));
    foot.push(format!("$ {}", results.command_line));
    foot.push("medians, whiskers from least to most; hollow: others disturbed the runs".into());
    foot
}

/// All that have something to show.
pub fn all(results: &Results) -> Vec<Chart> {
    let mut charts = Vec::new();
    for (medium, text) in [("null", "null-co"), ("page", "page cache"), ("disk", "disk, O_DIRECT")]
    {
        for number in [IOPS, CPU] {
            let cases: Vec<_> =
                DEPTHS.iter().map(|d| (format!("depth-{medium}-{d}"), d.to_string())).collect();
            let title = format!("{text}: random reads of 4 KiB, {}", number.1);
            let name = format!("depth-{medium}-{}", number.0);
            charts.push(over_cases(results, &name, &title, ("requests in flight", &cases), number));
        }
    }
    for (case, text) in [("null-d1-event", "null-co"), ("disk-d1", "disk, O_DIRECT")] {
        charts.push(latency(results, case, text));
    }
    for (medium, text) in [("null", "null-co"), ("page", "page cache")] {
        for number in [IOPS, CPU] {
            let cases: Vec<_> =
                QUEUES.iter().map(|q| (format!("queues-{medium}-{q}"), q.to_string())).collect();
            let title = format!("{text}: depth 32 per queue, {}", number.1);
            let name = format!("queues-{medium}-{}", number.0);
            charts.push(over_cases(results, &name, &title, ("queues", &cases), number));
        }
    }
    for word in ["read", "write"] {
        let cases: Vec<_> =
            SIZES.iter().map(|(_, s)| (format!("seq-{word}-{s}"), (*s).to_string())).collect();
        let title = format!("page cache: sequential {word}s, 1 queue, depth 32, MB/s");
        let number = ("mb", "MB/s", mb_per_s as Number);
        let x = ("bytes per request", &cases[..]);
        charts.push(over_cases(results, &format!("seq-{word}"), &title, x, number));
    }
    let mut cases: Vec<(String, String)> = Vec::new();
    for case in results.series.iter().map(|s| &s.case).filter(|c| c.starts_with("q2-")) {
        if !cases.iter().any(|(name, _)| name == case) {
            cases.push((case.clone(), case.trim_start_matches("q2-").into()));
        }
    }
    for number in [IOPS, CPU] {
        charts.push(relative(
            results,
            &format!("qcow2-{}", number.0),
            "qcow2 by case",
            &cases,
            number,
        ));
    }
    charts.push(relative(results, "cases", "single cases", &other(results), IOPS));
    charts.push(guest(results));
    charts.retain(|c| !c.is_empty());
    charts
}

fn lines(results: &Results, points: impl Fn(&str) -> Vec<Point>) -> Vec<Line> {
    let line = |(colour, label): (usize, &&str)| Line {
        name: name_of(results, label),
        colour,
        points: points(label),
    };
    let all: Vec<Line> = labels(results).iter().enumerate().map(line).collect();
    all.into_iter().filter(|l| !l.points.is_empty()).collect()
}

/// A number of each back end over some cases, each with its text on the axis.
fn over_cases(
    results: &Results,
    name: &str,
    title: &str,
    (axis, cases): (&str, &[(String, String)]),
    (_, unit, number): (&str, &str, Number),
) -> Chart {
    let points = |label: &str| {
        let point = |(i, (case, _)): (usize, &(String, String))| {
            let series = results.find(case, label)?;
            let noisy = series.foreign_cpus.median > QUIET;
            Some(Point { x: i as f64, y: number(series), noisy })
        };
        cases.iter().enumerate().filter_map(point).collect()
    };
    Chart {
        name: name.into(),
        title: title.into(),
        x: (Axis::Categories(cases.iter().map(|c| c.1.clone()).collect()), axis.into()),
        y: unit.into(),
        bars: false,
        ratios: false,
        lines: lines(results, points),
        foot: foot(results),
    }
}

/// The share of requests answered within a time: of each share the median of the runs.
fn latency(results: &Results, case: &str, text: &str) -> Chart {
    let points = |label: &str| {
        let Some(series) = results.find(case, label) else { return Vec::new() };
        let point = |(i, share): (usize, &f64)| {
            let of_runs = series.runs.iter().filter_map(|r| r.lat_quantiles_ns.get(i));
            let ns = Spread::of(of_runs.map(|ns| *ns as f64));
            let y = Spread { median: *share, min: *share, max: *share };
            (ns.median > 0.0).then_some(Point { x: ns.median / 1e3, y, noisy: false })
        };
        SHARES.iter().enumerate().filter_map(point).collect()
    };
    let lines = lines(results, points);
    let all = || lines.iter().flat_map(|l| &l.points).map(|p| p.x);
    let (min, max) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    Chart {
        name: format!("latency-{case}"),
        title: format!("{text}: latency of one read at a time, event-driven client"),
        x: (Axis::Log(min.min(max) * 0.9, max.max(min.min(max)) * 1.1), "us".into()),
        y: "share of requests".into(),
        bars: false,
        ratios: false,
        lines,
        foot: foot(results),
    }
}

/// Cases that are on no other plot.
fn other(results: &Results) -> Vec<(String, String)> {
    let shown = ["depth-", "queues-", "seq-", "q2-"];
    let mut cases: Vec<&Series> = results.series.iter().filter(|s| s.backend == "A").collect();
    cases.retain(|s| !shown.iter().any(|p| s.case.starts_with(p)));
    cases.iter().map(|s| (s.case.clone(), s.case.clone())).collect()
}

/// Bars of cases that have no size in common: relative to the peer, or to ourselves where there is none.
fn relative(
    results: &Results,
    name: &str,
    title: &str,
    cases: &[(String, String)],
    (_, what, number): (&str, &str, Number),
) -> Chart {
    let base = if results.series.iter().any(|s| s.backend == "B") { "B" } else { "A" };
    let points = |label: &str| {
        let point = |(i, (case, _)): (usize, &(String, String))| {
            let (series, one) = (results.find(case, label)?, results.find(case, base)?);
            let y = scaled(number(series), 1.0 / number(one).median.max(f64::MIN_POSITIVE));
            Some(Point { x: i as f64, y, noisy: series.foreign_cpus.median > QUIET })
        };
        cases.iter().enumerate().filter_map(point).collect()
    };
    Chart {
        name: name.into(),
        title: format!("{title}: {what}, relative to {}", name_of(results, base)),
        x: (Axis::Categories(cases.iter().map(|c| c.1.clone()).collect()), String::new()),
        y: "ratio".into(),
        bars: true,
        ratios: true,
        lines: lines(results, points),
        foot: foot(results),
    }
}

fn guest(results: &Results) -> Chart {
    let mut jobs: Vec<String> = Vec::new();
    for run in &results.guest {
        if !jobs.contains(&run.job) {
            jobs.push(run.job.clone());
        }
    }
    let points = |label: &str| {
        let point = |(i, job): (usize, &String)| {
            let run = results.guest.iter().find(|r| r.backend == label && r.job == *job)?;
            Some(Point { x: i as f64, y: Spread::of([run.cpu_ns / 1e3]), noisy: false })
        };
        jobs.iter().enumerate().filter_map(point).collect()
    };
    Chart {
        name: "guest-cpu".into(),
        title: "fio in a guest: back-end CPU per I/O".into(),
        x: (Axis::Categories(jobs.clone()), String::new()),
        y: "us".into(),
        bars: true,
        ratios: false,
        lines: lines(results, points),
        foot: foot(results),
    }
}
