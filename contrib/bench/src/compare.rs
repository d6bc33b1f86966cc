//! Two back ends on the same command line and the same jobs, in turn: A B A B ...
//!
//! Medians with their spread, because a shared machine lies now and then; a run during which others kept
//! the CPUs busy is repeated, and said when it could not be had quiet.

mod machine;
mod plan;
mod table;

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use vub_client::sys;

use crate::backend::Program;
use crate::cases::{self, Case};
use crate::idle::{self, Large};
use crate::load::{self, Job, Mode, Report};
use crate::qcow2::Image;
use crate::results::{Results, Series};
use crate::{bars, goals, host, many, usage};
pub use plan::{Pin, Plan};
use table::{heading, row};

/// CPUs that others may use in a run that counts.
pub const QUIET: f64 = 0.15;
/// Not a case with a job, but chosen as one: images of 1 TiB, opened.
const LARGE: &str = "q2-open-1t";

/// Runs the plan, prints as it goes, and writes the file.
///
/// # Errors
/// A back end that does not start, a client that fails.
pub fn run(plan: &Plan) -> Result<(), String> {
    let mut results = measure(plan)?;
    verdicts(&mut results);
    if let Some(path) = &plan.json {
        write_json(&results, path)?;
    }
    Ok(())
}

/// Writes everything to a file.
///
/// # Errors
/// The file system's.
pub fn write_json(results: &Results, path: &Path) -> Result<(), String> {
    let json = serde_json::to_string_pretty(results).map_err(|e| e.to_string())?;
    std::fs::write(path, json).map_err(|e| format!("{}: {e}", path.display()))
}

/// Judges what was measured, if A and B both were, and prints it.
pub fn verdicts(results: &mut Results) {
    let has = |label: &str| results.series.iter().any(|s| s.backend == label);
    if has("A") && has("B") || results.idle.len() > 1 {
        results.bars = bars::judge(results);
        results.goals = goals::judge(results);
        bars::print(&results.bars);
        goals::print(&results.goals);
    }
}

/// Runs the plan and prints as it goes.
///
/// # Errors
/// A back end that does not start, a client that fails.
pub fn measure(plan: &Plan) -> Result<Results, String> {
    let text = |e: io::Error| e.to_string();
    std::fs::create_dir_all(&plan.dir).map_err(text)?;
    let (programs, wanted) = (plan.programs()?, plan.wanted()?);
    let mut common = Job::common();
    common.time = plan.seconds;
    let mut results = describe(&programs);
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
    // A command of its own has no options for these.
    let own: Vec<Program> = programs.into_iter().filter(|p| p.template.is_none()).collect();
    if !plan.no_idle {
        cases::idle_disk().prepare(&plan.dir).map_err(text)?;
        for program in &own {
            let idle = idle::idle(program, &plan.dir, plan.repeat)?;
            idle.print();
            results.idle.push(idle);
        }
        if plan.exports > 0 {
            results.many = many::run(&own, plan.exports, &plan.dir, plan.repeat, &common)?;
            results.many.iter().for_each(many::Many::print);
        }
    }
    if plan.wants(LARGE) {
        let large = idle::large(&own, &plan.dir, plan.repeat);
        Image::remove(&plan.dir).map_err(text)?;
        results.large = large?;
        results.large.iter().for_each(Large::print);
    }
    Ok(results)
}

/// Who is compared, where and when.
fn describe(programs: &[Program]) -> Results {
    let mut results = Results {
        machine: machine::describe(),
        date: machine::date(),
        command_line: std::env::args().collect::<Vec<_>>().join(" "),
        syscalls_note: sys::SyscallCounter::new(std::process::id()).err().map(|e| e.to_string()),
        ..Results::default()
    };
    println!("{}, {}", results.machine, results.date);
    for program in programs {
        let line = match &program.template {
            Some(template) => template.text().to_string(),
            None => {
                let args = program.arguments(&cases::null(), 1, Path::new("SOCK"));
                format!("{} {}", program.path.display(), args.join(" "))
            }
        };
        let line = format!("{}: {line}", program.label);
        println!("{line}");
        results.commands.push(line);
        if program.template.is_none() {
            results.versions.push(format!(
                "{}: {}",
                program.label,
                machine::version(&program.path)
            ));
        }
    }
    if let Some(note) = &results.syscalls_note {
        println!("system calls are not counted: {note}");
    }
    results
}

/// Reads a file that `write_json` wrote.
///
/// # Errors
/// A file that is not one of ours.
pub fn read_json(path: &Path) -> Result<Results, String> {
    let named = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let text = std::fs::read_to_string(path).map_err(|e| named(&e))?;
    serde_json::from_str(&text).map_err(|e| named(&e))
}

/// Prints the bars of an earlier run.
///
/// # Errors
/// As `read_json`.
pub fn judge_file(path: &Path) -> Result<(), String> {
    let results = read_json(path)?;
    println!("{}", results.machine);
    bars::print(&bars::judge(&results));
    goals::print(&goals::judge(&results));
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
    for program in programs.iter().filter(|p| p.serves(case)) {
        peers.push((program.clone(), case.clone(), Vec::new()));
        if let Some(raw) = case.on_raw().filter(|_| program.label == "A") {
            peers.push((Program { label: bars::RAW.into(), ..program.clone() }, raw, Vec::new()));
        }
    }
    if plan.host && case.with_host {
        peers.push((Program::host(), case.clone(), Vec::new()));
    }
    for _ in 0..plan.repeat {
        for (program, case, runs) in &mut peers {
            let ring = if program.label == "B" { &plan.b_ring } else { &plan.a_ring };
            let job = Job { ring: ring.clone(), ..job.clone() };
            runs.push(quiet(plan, program, case, &job)?);
        }
    }
    let series = |(p, _, runs): (Program, _, _)| Series::new(&case.name, &p.label, runs);
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
    if program.host {
        let file = case.file(&plan.dir).ok_or("the host's loop needs a file")?;
        return host::run(job, &file, case.direct()).map_err(text);
    }
    let mut backend = program.start_case(case, &plan.dir).map_err(text)?;
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
