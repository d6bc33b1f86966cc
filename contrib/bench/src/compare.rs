//! Two back ends on the same command line and the same jobs, in turn: A B A B ...
//!
//! Medians with their spread, because a shared machine lies now and then; a run during which others kept
//! the CPUs busy is repeated, and said when it could not be had quiet.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use vub_client::{Client, Options};

use crate::backend::{Backend, Program};
use crate::bars;
use crate::cases::{self, Case};
use crate::load::{self, Job, Mode, Report};
use crate::usage::{self, Rss, Snapshot};

/// CPUs that others may use in a run that counts.
pub const QUIET: f64 = 0.15;
/// Queues offered when idling: the bar's number.
const IDLE_QUEUES: u16 = 16;

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
    fn new(case: &str, backend: &str, runs: Vec<Report>) -> Self {
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
}

/// A back end doing nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Idle {
    /// The back end's label.
    pub backend: String,
    /// From fork to the first accepted connection.
    pub listening_ms: Spread,
    /// Memory before a client connects, 16 queues offered.
    pub rss_listening: Rss,
    /// Memory with one queue running and one request done.
    pub rss_connected: Rss,
    /// Context switches per second, connected and idle.
    pub switches_per_s: f64,
    /// CPU share in percent, connected and idle.
    pub cpu_percent: f64,
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
    /// Issue 2's bars, when both back ends ran.
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

    fn wanted(&self) -> Result<Vec<Case>, String> {
        let all = cases::all();
        for name in &self.cases {
            if !all.iter().any(|c| c.name.starts_with(name.as_str())) {
                let names: Vec<_> = all.iter().map(|c| c.name).collect();
                return Err(format!("no case {name}; there are {}", names.join(" ")));
            }
        }
        let chosen = |c: &Case| {
            self.cases.is_empty() || self.cases.iter().any(|n| c.name.starts_with(n.as_str()))
        };
        Ok(all.into_iter().filter(chosen).collect())
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
        case.prepare(&plan.dir).map_err(|e| format!("{}: {e}", case.name))?;
        for series in alternate(plan, &programs, case, &common)? {
            row(&series, results.series.iter().find(|s| s.case == series.case));
            results.series.push(series);
        }
    }
    if !plan.no_idle {
        cases::idle_disk().prepare(&plan.dir).map_err(text)?;
        for program in &programs {
            let idle = idle(plan, program)?;
            print_idle(&idle);
            results.idle.push(idle);
        }
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

/// A B A B ... on one case.
fn alternate(
    plan: &Plan,
    programs: &[Program],
    case: &Case,
    common: &Job,
) -> Result<Vec<Series>, String> {
    let mut job = case.job(common);
    let pin = plan.pin == Pin::All || plan.pin == Pin::Poll && job.client == Mode::Poll;
    job.pin = pin.then_some(0);
    let mut runs: Vec<Vec<Report>> = programs.iter().map(|_| Vec::new()).collect();
    for _ in 0..plan.repeat {
        for (program, runs) in programs.iter().zip(&mut runs) {
            runs.push(quiet(plan, program, case, &job)?);
        }
    }
    let series = |(p, runs): (&Program, Vec<Report>)| Series::new(case.name, &p.label, runs);
    Ok(programs.iter().zip(runs).map(series).collect())
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
    let blockdev = case.blockdev(&plan.dir);
    let mut backend =
        program.start(&blockdev, case.queues(), &plan.dir).map_err(|e| e.to_string())?;
    let mut client = connect(&mut backend, job.options())?;
    let report = load::run(job, &mut client, Some(backend.pid())).map_err(|e| e.to_string())?;
    if report.errors > 0 {
        return Err(format!("{} requests failed", report.errors));
    }
    Ok(report)
}

fn connect(backend: &mut Backend, options: Options) -> Result<Client, String> {
    let stream = backend.connect().map_err(|e| e.to_string())?;
    Client::from_stream(stream, options).map_err(|e| e.to_string())
}

/// Start-up time, memory, and what it costs to be connected and idle.
fn idle(plan: &Plan, program: &Program) -> Result<Idle, String> {
    let text = |e: io::Error| e.to_string();
    let blockdev = cases::idle_disk().blockdev(&plan.dir);
    let start = || program.start(&blockdev, IDLE_QUEUES, &plan.dir).map_err(text);
    let mut times = Vec::new();
    for _ in 0..plan.repeat.max(3) {
        times.push(start()?.listening.as_secs_f64() * 1e3);
    }
    let mut backend = start()?;
    let pid = backend.pid();
    let rss_listening = usage::rss(pid).map_err(text)?;
    let mut client = connect(&mut backend, Options::default())?;
    client.queue(0).read(0, &mut [0; 4096]).map_err(|e| e.to_string())?;
    // Let every adaptive poll find out that nothing comes.
    std::thread::sleep(Duration::from_secs(1));
    let before = Snapshot::take(pid).map_err(text)?;
    let seconds = 5.0;
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let used = before.until(&Snapshot::take(pid).map_err(text)?);
    Ok(Idle {
        backend: program.label.clone(),
        listening_ms: Spread::of(times),
        rss_listening,
        rss_connected: usage::rss(pid).map_err(text)?,
        switches_per_s: (used.voluntary + used.involuntary) as f64 / seconds,
        cpu_percent: used.cpu_ns as f64 / 1e7 / seconds,
    })
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
    let noisy = if s.foreign_cpus.median > QUIET {
        format!("  ({:.2} CPUs used by others)", s.foreign_cpus.median)
    } else {
        String::new()
    };
    println!(
        "{:<19} {} {:>9.0} {:>19} {:>8.0} {:>8.0} {:>8.1} {:>8.1} {:>9.1} {:>5.2} {ratio}{noisy}",
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

fn print_idle(idle: &Idle) {
    let mib = |kib: u64| kib as f64 / 1024.0;
    println!(
        "idle {}: listening after {:.1} ms ({:.1}..{:.1}); resident {:.1} MiB listening, {:.1} MiB \
         connected (anon {:.1}, file {:.1}, shared {:.1}); {:.1} switches/s, {:.3} % CPU",
        idle.backend,
        idle.listening_ms.median,
        idle.listening_ms.min,
        idle.listening_ms.max,
        mib(idle.rss_listening.total_kib),
        mib(idle.rss_connected.total_kib),
        mib(idle.rss_connected.anon_kib),
        mib(idle.rss_connected.file_kib),
        mib(idle.rss_connected.shmem_kib),
        idle.switches_per_s,
        idle.cpu_percent
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
