//! Two back ends on the same command line and the same jobs, in turn: A B A B ...
//!
//! Medians with their spread, because a shared machine lies now and then; a run during which others kept
//! the CPUs busy is repeated, and said when it could not be had quiet.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::backend::Program;
use crate::bars;
use crate::cases::{self, Case};
use crate::idle::{self, Idle, Large};
use crate::load::{self, Extra, Job, Mode, Report};
use crate::qcow2::Image;
use crate::usage;

/// CPUs that others may use in a run that counts.
pub const QUIET: f64 = 0.15;
/// Not a case with a job, but chosen as one: images of 1 TiB, opened.
const LARGE: &str = "q2-open-1t";

/// What to compare and how.
#[derive(Args, Clone, Debug)]
pub struct Plan {
    /// Back end A
    #[arg(long, default_value = "target/release/vhost-user-blk")]
    a: PathBuf,
    /// Back end B
    #[arg(long, default_value = "qemu-storage-daemon")]
    b: PathBuf,
    /// Run only one of them: a or b
    #[arg(long, value_parser = ["a", "b"])]
    only: Option<String>,
    /// Options added to A's export, as in ",poll-max-ns=0"
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    a_export: String,
    /// The same for B
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    b_export: String,
    /// An argument put before all others of A (repeatable)
    #[arg(long, allow_hyphen_values = true)]
    a_arg: Vec<String>,
    /// The same for B
    #[arg(long, allow_hyphen_values = true)]
    b_arg: Vec<String>,
    /// What else A's rings are asked for (repeatable)
    #[arg(long, value_enum)]
    a_ring: Vec<Extra>,
    /// The same for B
    #[arg(long, value_enum)]
    b_ring: Vec<Extra>,
    /// Give qemu-storage-daemon an iothread
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1,
          default_missing_value = "true")]
    qsd_iothread: bool,
    /// Cases, by name or beginning of one [default: all]
    #[arg(long, value_delimiter = ',')]
    cases: Vec<String>,
    /// Runs of each back end per case
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Tries to get a quiet run
    #[arg(long, default_value_t = 5)]
    tries: usize,
    /// Seconds to wait for others to leave the CPUs alone, before each run
    #[arg(long, default_value_t = 20.0)]
    wait: f64,
    /// Seconds per run
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Which clients to pin to CPU 0, for both back ends (which stay unpinned)
    #[arg(long, value_enum, default_value = "poll")]
    pin: Pin,
    /// Do not measure start, memory and idling
    #[arg(long)]
    no_idle: bool,
    /// Where test files and sockets live: a real file system
    #[arg(long, default_value = "/var/tmp/vub-bench")]
    dir: PathBuf,
    /// Write everything measured to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Which clients are pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Pin {
    /// Those that poll: else back end and client share a CPU for part of the run, by luck.
    Poll,
    /// All.
    All,
    /// None.
    None,
}

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
        Self {
            case: case.into(),
            backend: backend.into(),
            iops: of(|r| r.iops),
            mb_per_s: of(|r| r.mb_per_s),
            cpu_ns: of(|r| r.backend_cpu_ns_per_io),
            p50_ns: of(|r| r.lat_p50_ns as f64),
            p99_ns: of(|r| r.lat_p99_ns as f64),
            p999_ns: of(|r| r.lat_p999_ns as f64),
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
    /// Command lines, one per back end, with a null device.
    pub commands: Vec<String>,
    /// One per case and back end.
    pub series: Vec<Series>,
    /// One per back end.
    pub idle: Vec<Idle>,
    /// Two per back end.
    #[serde(default)]
    pub large: Vec<Large>,
    /// The bars, when both back ends ran.
    pub bars: Vec<bars::Outcome>,
}

impl Plan {
    fn programs(&self) -> Vec<Program> {
        let program = |label: &str, path: &Path, args: &[String], export: &String| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Program {
                label: label.into(),
                path: path.into(),
                iothread: self.qsd_iothread && name.contains("storage-daemon"),
                extra: (args.to_vec(), export.clone()),
            }
        };
        let a = program("A", &self.a, &self.a_arg, &self.a_export);
        let b = program("B", &self.b, &self.b_arg, &self.b_export);
        match self.only.as_deref() {
            Some("a") => vec![a],
            Some(_) => vec![b],
            None => vec![a, b],
        }
    }

    fn wants(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|n| case.starts_with(n.as_str()))
    }

    fn wanted(&self) -> Result<Vec<Case>, String> {
        let all = cases::all();
        let names: Vec<_> = all.iter().map(|c| c.name).chain([LARGE]).collect();
        for name in &self.cases {
            if !names.iter().any(|n| n.starts_with(name.as_str())) {
                return Err(format!("no case {name}; there are {}", names.join(" ")));
            }
        }
        Ok(all.into_iter().filter(|c| self.wants(c.name)).collect())
    }
}

fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let model = read("/proc/cpuinfo");
    let model = model.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("");
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("Linux {}, {cpus} CPUs{model}", kernel.trim())
}

/// Runs the plan, prints as it goes, and writes the file.
///
/// # Errors
/// A back end that does not start, a client that fails.
pub fn run(plan: &Plan) -> Result<(), String> {
    let text = |e: io::Error| e.to_string();
    std::fs::create_dir_all(&plan.dir).map_err(text)?;
    let (programs, wanted) = (plan.programs(), plan.wanted()?);
    let mut common = Job::common();
    common.time = plan.seconds;
    let mut results = Results { machine: machine(), ..Results::default() };
    println!("{}", results.machine);
    for program in &programs {
        let args = program.arguments(&cases::null(), 1, Path::new("SOCK"));
        let line = format!("{}: {} {}", program.label, program.path.display(), args.join(" "));
        println!("{line}");
        results.commands.push(line);
    }
    heading();
    for case in &wanted {
        let named = |e: io::Error| format!("{}: {e}", case.name);
        let prepared = case.prepare(&plan.dir).map_err(named);
        let all = prepared.and_then(|()| alternate(plan, &programs, case, &common));
        case.clean(&plan.dir).map_err(named)?;
        for series in all? {
            row(&series, results.series.iter().find(|s| s.case == series.case));
            results.series.push(series);
        }
    }
    if !plan.no_idle {
        cases::idle_disk().prepare(&plan.dir).map_err(text)?;
        for program in &programs {
            let idle = idle::idle(program, &plan.dir, plan.repeat)?;
            idle.print();
            results.idle.push(idle);
        }
    }
    if plan.wants(LARGE) {
        let large = idle::large(&programs, &plan.dir, plan.repeat);
        Image::remove(&plan.dir).map_err(text)?;
        results.large = large?;
        results.large.iter().for_each(Large::print);
    }
    if programs.len() == 2 {
        results.bars = bars::judge(&results);
        bars::print(&results.bars);
    }
    if let Some(path) = &plan.json {
        let json = serde_json::to_string_pretty(&results).map_err(|e| e.to_string())?;
        std::fs::write(path, json).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

/// Prints the bars of an earlier run.
///
/// # Errors
/// A file that is not one of ours.
pub fn judge_file(path: &Path) -> Result<(), String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let results: Results = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    println!("{}", results.machine);
    bars::print(&bars::judge(&results));
    Ok(())
}

/// A B A B ... on one case, or A R B A R B ... with A on a raw file as R.
fn alternate(
    plan: &Plan,
    programs: &[Program],
    case: &Case,
    common: &Job,
) -> Result<Vec<Series>, String> {
    let mut job = case.job(common);
    let pin = plan.pin == Pin::All || plan.pin == Pin::Poll && job.client == Mode::Poll;
    job.pin = pin.then_some(0);
    let mut peers: Vec<(Program, Case, Vec<Report>)> = Vec::new();
    for program in programs {
        peers.push((program.clone(), case.clone(), Vec::new()));
        if let Some(raw) = case.on_raw().filter(|_| program.label == "A") {
            peers.push((Program { label: bars::RAW.into(), ..program.clone() }, raw, Vec::new()));
        }
    }
    for _ in 0..plan.repeat {
        for (program, case, runs) in &mut peers {
            let ring = if program.label == "B" { &plan.b_ring } else { &plan.a_ring };
            let job = Job { ring: ring.clone(), ..job.clone() };
            runs.push(quiet(plan, program, case, &job)?);
        }
    }
    let series = |(p, case, runs): (Program, Case, _)| Series::new(case.name, &p.label, runs);
    Ok(peers.into_iter().map(series).collect())
}

/// One run, repeated while others disturb it; the least disturbed one. Where the kernel itself works
/// for the job in threads of its own no run looks quiet: such cases cost all tries.
fn quiet(plan: &Plan, program: &Program, case: &Case, job: &Job) -> Result<Report, String> {
    let mut best: Option<Report> = None;
    for _ in 0..plan.tries.max(1) {
        wait_for_quiet(Duration::from_secs_f64(plan.wait));
        let report = once(plan, program, case, job)
            .map_err(|e| format!("{} on {}: {e}", program.label, case.name))?;
        if best.as_ref().is_none_or(|b| report.foreign_cpus < b.foreign_cpus) {
            best = Some(report);
        }
        if best.as_ref().is_some_and(|b| b.foreign_cpus < QUIET) {
            break;
        }
    }
    best.ok_or_else(|| "no run".into())
}

/// Waits until the machine idles, or the time is over.
fn wait_for_quiet(limit: Duration) {
    let (begin, step) = (Instant::now(), Duration::from_millis(500));
    while begin.elapsed() < limit {
        let before = usage::machine_busy_ns().unwrap_or(0);
        std::thread::sleep(step);
        let busy = usage::machine_busy_ns().unwrap_or(0).saturating_sub(before);
        if (busy as f64) < QUIET * step.as_nanos() as f64 {
            return;
        }
    }
}

fn once(plan: &Plan, program: &Program, case: &Case, job: &Job) -> Result<Report, String> {
    let text = |e: io::Error| e.to_string();
    case.renew(&plan.dir).map_err(text)?;
    let blockdev = case.blockdev(&plan.dir);
    let mut backend = program.start(&blockdev, case.queues(), &plan.dir).map_err(text)?;
    let mut client = idle::connect(&mut backend, job.options())?;
    case.back_memory();
    let report = load::run(job, &mut client, Some(backend.pid())).map_err(|e| e.to_string())?;
    if report.errors > 0 {
        return Err(format!("{} requests failed", report.errors));
    }
    drop(client);
    drop(backend);
    Ok(Report { extents_per_gib: case.judge(&plan.dir).map_err(text)?, ..report })
}

fn heading() {
    println!(
        "\n{:<21} {:>9} {:>19} {:>8} {:>8} {:>8} {:>8} {:>9} {:>5} {:>8} {:>7}",
        "case and back end",
        "IOPS",
        "min..max",
        "MB/s",
        "CPU ns",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "sw/io",
        "IOPS A/B",
        "CPU A/B"
    );
}

fn row(s: &Series, first: Option<&Series>) {
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
    let noisy = if s.foreign_cpus.median > QUIET {
        format!("  ({:.2} CPUs used by others)", s.foreign_cpus.median)
    } else {
        String::new()
    };
    println!(
        "{:<19} {} {:>9.0} {:>19} {:>8.0} {:>8.0} {:>8.1} {:>8.1} {:>9.1} {:>5.2} {ratio}{extents}{reads}{noisy}",
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
