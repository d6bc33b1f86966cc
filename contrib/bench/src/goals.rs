//! The goals of issue 5: a bar for each line of its table, and what to reach for.

use serde::{Deserialize, Serialize};

use crate::bars::RAW;
use crate::cases::SIZES;
use crate::results::{Results, Series, Spread};

/// One line of the table with its verdict.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Goal {
    /// What is compared.
    pub goal: String,
    /// The bar, as text.
    pub bar: String,
    /// What was measured; None when a case of it did not run.
    pub measured: Option<f64>,
    /// Bar met.
    pub pass: Option<bool>,
    /// What to reach for, with its figure in this run where it is relative; empty for nothing more.
    pub reach: String,
    /// Reached.
    pub reached: Option<bool>,
}

/// SPDK's CPU per request on a null device.
const SPDK_NULL_NS: f64 = 130.0;
/// SPDK's with Linux AIO on tmpfs.
const SPDK_AIO_NS: f64 = 2500.0;
/// IOPS of the back ends that poll all the time, with a client that sleeps.
const POLLERS_IOPS: f64 = 52_000.0;
/// "CPU 0 %": one stray interrupt in 5 seconds.
const CPU_PERCENT: f64 = 0.005;
/// Reads of L2 tables per miss: one slice of 4 KiB, and 1 % for misses of two at once.
const MISS_BYTES: f64 = 4096.0 * 1.01;

struct Table<'a> {
    results: &'a Results,
    goals: Vec<Goal>,
}

/// At least, or at most, so much.
#[derive(Clone, Copy)]
enum Limit {
    Least(f64),
    Most(f64),
}
use Limit::{Least, Most};

impl Limit {
    fn met(self, value: f64) -> bool {
        match self {
            Least(limit) => value >= limit,
            Most(limit) => value <= limit,
        }
    }

    fn text(self, unit: &str) -> String {
        match self {
            Least(limit) => format!(">= {limit}{unit}"),
            Most(limit) => format!("<= {limit}{unit}"),
        }
    }
}

fn cpu(s: &Series) -> f64 {
    s.cpu_ns.median
}

fn iops(s: &Series) -> f64 {
    s.iops.median
}

fn p50(s: &Series) -> f64 {
    s.p50_ns.median
}

fn flushes(s: &Series) -> f64 {
    Spread::of(s.runs.iter().map(|r| r.flushes as f64 / r.seconds)).median
}

impl Table<'_> {
    fn value(&self, case: &str, who: &str, of: fn(&Series) -> f64) -> Option<f64> {
        self.results.find(case, who).map(of)
    }

    fn ratio(&self, case: &str, of: fn(&Series) -> f64, whom: &str) -> Option<f64> {
        Some(self.value(case, "A", of)? / self.value(case, whom, of)?)
    }

    /// A line; `reach` is a text and the verdict.
    fn add(
        &mut self,
        goal: impl Into<String>,
        bar: Limit,
        unit: &str,
        measured: Option<f64>,
        reach: (String, Option<bool>),
    ) {
        let pass = measured.map(|m| bar.met(m));
        let bar = bar.text(unit);
        self.goals.push(Goal {
            goal: goal.into(),
            bar,
            measured,
            pass,
            reach: reach.0,
            reached: reach.1,
        });
    }

    /// A's number of a case against a figure of this run or a constant.
    fn reach(
        &self,
        case: &str,
        of: fn(&Series) -> f64,
        what: &str,
        limit: fn(f64) -> Limit,
        figure: Option<f64>,
    ) -> (String, Option<bool>) {
        let Some(figure) = figure else { return (what.into(), None) };
        let met = self.value(case, "A", of).map(|value| limit(figure).met(value));
        (format!("{what}: {figure:.0}"), met)
    }
}

fn nothing() -> (String, Option<bool>) {
    (String::new(), None)
}

/// Judges every line of the table.
pub fn judge(results: &Results) -> Vec<Goal> {
    let mut table = Table { results, goals: Vec::new() };
    data_plane(&mut table);
    without_io_uring(&mut table);
    queues(&mut table);
    qcow2(&mut table);
    for word in ["read", "write"] {
        for (_, size) in SIZES {
            let case = format!("seq-{word}-{size}");
            let ratio = table.ratio(&case, iops, "B");
            table.add(
                format!("sequential {word} of {size}, page cache, IOPS"),
                Least(1.0),
                "x QSD",
                ratio,
                nothing(),
            );
        }
    }
    many(&mut table);
    open(&mut table);
    table.goals
}

fn data_plane(t: &mut Table) {
    let reach = t.reach("null-d32-poll", cpu, "ns, as SPDK", Most, Some(SPDK_NULL_NS));
    let ratio = t.ratio("null-d32-poll", cpu, "B");
    t.add("null-co, random read depth 32, CPU per I/O", Most(0.2), "x QSD", ratio, reach);
    let reach = t.reach("null-d1-event", iops, "IOPS, as the pollers", Least, Some(POLLERS_IOPS));
    let ratio = t.ratio("null-d1-event", iops, "B");
    t.add("null-co, depth 1, event-driven client, IOPS", Least(3.0), "x QSD", ratio, reach);
    for (word, least) in [("read", 1.8), ("write", 1.5)] {
        let case = format!("page-d32-rand{word}");
        let ceiling = t.value(&case, "host", iops).map(|n| n * 0.9);
        let reach = t.reach(&case, iops, "IOPS, the host's loop - 10 %", Least, ceiling);
        let ratio = t.ratio(&case, iops, "B");
        t.add(
            format!("page cache, depth 32 random {word}, IOPS"),
            Least(least),
            "x QSD",
            ratio,
            reach,
        );
    }
    let ceiling = t.value("depth-page-1", "host", p50).map(|n| n + 1000.0);
    let reach = t.reach("depth-page-1", p50, "ns p50, the host's + 1 us", Most, ceiling);
    let ratio = t.ratio("depth-page-1", iops, "B");
    t.add("page cache, depth 1, polling client, IOPS", Least(1.3), "x QSD", ratio, reach);
    let host = t.value("disk-d1", "host", p50);
    let over = t.value("disk-d1", "A", p50).zip(host).map(|(a, host)| (a - host) / 1000.0);
    let reach =
        t.reach("disk-d1", p50, "ns p50, the host's + 5 us", Most, host.map(|n| n + 5000.0));
    t.add("disk O_DIRECT depth 1, p50 over the host's loop", Most(9.0), " us", over, reach);
    for depth in [32, 128] {
        let case = format!("depth-disk-{depth}");
        let ceiling = t.value(&case, "host", cpu).map(|n| n + 500.0);
        let reach = t.reach(&case, cpu, "ns, the host's + 0.5 us", Most, ceiling);
        let ratio = t.ratio(&case, cpu, "B");
        t.add(
            format!("disk O_DIRECT depth {depth}, CPU per I/O"),
            Most(0.8),
            "x QSD",
            ratio,
            reach,
        );
    }
}

fn without_io_uring(t: &mut Table) {
    let ratio = t.ratio("nouring-page-threads", cpu, "B");
    t.add(
        "without io_uring, aio=threads, page cache depth 32, CPU per I/O",
        Most(0.5),
        "x QSD",
        ratio,
        nothing(),
    );
    for (case, medium, spdk) in [
        ("nouring-tmpfs-native", "tmpfs", Some(SPDK_AIO_NS)),
        ("nouring-disk-native", "disk", None),
    ] {
        let reach = match spdk {
            Some(_) => t.reach(case, cpu, "ns, SPDK's aio", Most, spdk),
            None => nothing(),
        };
        let ratio = t.ratio(case, cpu, "B");
        let goal = format!("without io_uring, aio=native, {medium} depth 32, CPU per I/O");
        t.add(goal, Most(0.65), "x QSD", ratio, reach);
    }
}

fn queues(t: &mut Table) {
    for name in ["null", "page"] {
        let one = t.value(&format!("queues-{name}-1"), "A", cpu);
        for queues in [2, 4] {
            let many = t.value(&format!("queues-{name}-{queues}"), "A", cpu);
            let ratio = many.zip(one).map(|(many, one)| many / one);
            let reach = ("1.0x".to_string(), ratio.map(|r| r <= 1.0));
            t.add(
                format!("{name}, {queues} queues, CPU per I/O"),
                Most(1.1),
                "x 1 queue",
                ratio,
                reach,
            );
        }
    }
}

fn qcow2(t: &mut Table) {
    for word in ["read", "write"] {
        let ratio = t.ratio(&format!("q2-alloc-{word}"), iops, RAW);
        let reach = ("1.0x".to_string(), ratio.map(|r| r >= 1.0));
        t.add(
            format!("qcow2 allocated, random {word}, IOPS"),
            Least(0.97),
            "x own raw",
            ratio,
            reach,
        );
    }
    let raw = t.value("q2-alloc-write", RAW, iops).map(|n| n * 0.8);
    let reach = t.reach("q2-fresh-write", iops, "IOPS, raw's - 20 %", Least, raw);
    let ratio = t.ratio("q2-fresh-write", iops, "B");
    t.add("qcow2 allocating, fresh, IOPS", Least(4.0), "x QSD", ratio, reach);
    let ratio = t.ratio("q2-overlay-cow", iops, "B");
    t.add("qcow2 allocating, overlay, IOPS", Least(4.0), "x QSD", ratio, nothing());
    let bytes = t
        .results
        .find("q2-miss", "A")
        .and_then(|s| s.some(crate::load::Report::device_bytes_per_io));
    let bytes = bytes.map(|s| s.median / crate::qcow2::MISSES);
    let reach = ("one 4 KiB read per miss, overlapped".to_string(), bytes.map(|b| b <= MISS_BYTES));
    let ratio = t.ratio("q2-miss", iops, "B");
    t.add("qcow2, L2 cache of 1/8, random read, IOPS", Least(3.0), "x QSD", ratio, reach);
    let ratio = t.ratio("q2-flush", flushes, "B");
    let reach = ("the disk's limit with group commit".to_string(), None);
    t.add("flush-heavy, 32 x write+flush, flushes/s", Least(3.0), "x QSD", ratio, reach);
}

fn many(t: &mut Table) {
    let many = t.results.many.iter().find(|m| m.backend == "A").cloned();
    let exports = many.as_ref().map_or(64, |m| m.exports);
    let idle = many.as_ref().map(|m| m.idle_cpu_percent);
    t.add(
        format!("one process, {exports} exports idle, CPU"),
        Most(CPU_PERCENT),
        " %",
        idle,
        nothing(),
    );
    let unfair = many.map(|m| m.unfairness.median);
    t.add(
        format!("{exports} exports at depth 1, fastest / slowest"),
        Most(1.5),
        "",
        unfair,
        nothing(),
    );
}

fn open(t: &mut Table) {
    let idle = |who: &str| t.results.idle.iter().find(|i| i.backend == who);
    let pair = idle("A").zip(idle("B"));
    let start = pair.map(|(a, b)| a.listening_ms.median / b.listening_ms.median);
    let kib = |r: crate::usage::Rss| r.total_kib as f64;
    let rss = pair.map(|(a, b)| kib(a.rss_listening) / kib(b.rss_listening));
    let large = |who: &str| t.results.large.iter().find(|l| l.backend == who && !l.empty);
    let pair = large("A").zip(large("B"));
    let opened = pair.map(|(a, b)| a.listening_ms.median / b.listening_ms.median);
    let opened_rss = pair.map(|(a, b)| kib(a.rss) / kib(b.rss));
    for (goal, measured) in [
        ("start to listening, time", start),
        ("open a qcow2 image of 1 TiB, time", opened),
        ("resident memory, listening", rss),
        ("resident memory, qcow2 image of 1 TiB", opened_rss),
    ] {
        t.add(goal, Most(0.5), "x QSD", measured, nothing());
    }
}

/// A verdict in a word.
pub fn verdict(pass: Option<bool>) -> &'static str {
    match pass {
        Some(true) => "PASS",
        Some(false) => "MISS",
        None => "not run",
    }
}

/// What a goal says about the figure to reach for.
pub fn reached(goal: &Goal) -> String {
    match (goal.reach.is_empty(), goal.reached) {
        (true, _) => String::new(),
        (false, Some(true)) => format!("reached: {}", goal.reach),
        (false, Some(false)) => format!("not reached: {}", goal.reach),
        (false, None) => goal.reach.clone(),
    }
}

/// Prints the verdicts of what ran.
pub fn print(goals: &[Goal]) {
    println!("\n{:<66} {:>16} {:>9}         reach for", "goal of issue 5", "bar", "measured");
    for goal in goals.iter().filter(|goal| goal.pass.is_some()) {
        let measured = goal.measured.map_or("-".into(), |m| format!("{m:.3}"));
        let (pass, reach) = (verdict(goal.pass), reached(goal));
        println!("{:<66} {:>16} {measured:>9} {pass:<7} {reach}", goal.goal, goal.bar);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Report;

    fn series(case: &str, who: &str, iops: f64, cpu: f64, p50: u64) -> Series {
        let run = Report {
            iops,
            seconds: 1.0,
            backend_cpu_ns_per_io: cpu,
            lat_p50_ns: p50,
            ..Report::default()
        };
        Series::new(case, who, vec![run])
    }

    #[test]
    fn goals_have_bar_and_reach() {
        let results = Results {
            series: vec![
                series("page-d32-randread", "A", 190.0, 1.0, 1),
                series("page-d32-randread", "B", 100.0, 1.0, 1),
                series("page-d32-randread", "host", 220.0, 1.0, 1),
                series("disk-d1", "A", 1.0, 1.0, 60_000),
                series("disk-d1", "host", 1.0, 1.0, 52_000),
                series("null-d32-poll", "A", 1.0, 120.0, 1),
                series("null-d32-poll", "B", 1.0, 500.0, 1),
                series("queues-page-1", "A", 1.0, 100.0, 1),
                series("queues-page-2", "A", 1.0, 105.0, 1),
            ],
            ..Results::default()
        };
        let goals = judge(&results);
        let of = |text: &str| {
            let goal = goals.iter().find(|g| g.goal.starts_with(text)).unwrap();
            (goal.pass, goal.reached)
        };
        assert_eq!(of("page cache, depth 32 random read"), (Some(true), Some(false)));
        assert_eq!(of("disk O_DIRECT depth 1"), (Some(true), Some(false)));
        assert_eq!(of("null-co, random read"), (Some(false), Some(true)));
        assert_eq!(of("page, 2 queues"), (Some(true), Some(false)));
        assert_eq!(of("page, 4 queues"), (None, None));
    }

    /// Each case a goal looks at is one that runs: with all cases measured, every ratio has a verdict.
    #[test]
    fn every_goal_has_its_cases() {
        let mut results = Results::default();
        for case in crate::cases::all() {
            let whom = ["A", "B", RAW].into_iter().filter(|w| *w != RAW || case.on_raw().is_some());
            let host = case.with_host.then_some("host");
            results.series.extend(whom.chain(host).map(|who| {
                let mut s = series(&case.name, who, 1.0, 1.0, 1);
                s.runs[0].flushes = 1;
                s
            }));
        }
        let missing: Vec<_> =
            judge(&results).into_iter().filter(|g| g.pass.is_none()).map(|g| g.goal).collect();
        assert_eq!(missing.len(), 6, "{missing:?}: those of idle, large and many only");
    }
}
