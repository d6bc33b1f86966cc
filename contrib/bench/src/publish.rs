//! The report: everything measured once more as JSON, CSV, SVG plots and one HTML page that needs nothing else.

mod chart;
mod csv;
mod html;
mod plots;
mod svg;

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::compare::{self, Plan};
use crate::guest;
use crate::results::Results;

/// What to measure and where the report goes.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Directory of the report; made if it is not there
    #[arg(long, default_value = "target/bench-report")]
    pub out: PathBuf,
    /// Run fio's jobs in a guest too, on each back end (contrib/guest/run; takes minutes)
    #[arg(long)]
    pub guest: bool,
    /// Where contrib/ is, for --guest
    #[arg(long, default_value = "contrib")]
    pub contrib: PathBuf,
    /// Measure nothing: make the report anew from the results.json of an earlier one
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    #[command(flatten)]
    pub plan: Box<Plan>,
}

/// Measures and writes the report.
///
/// # Errors
/// A back end or client that fails; the file system's.
pub fn run(options: &Options) -> Result<(), String> {
    // First of all: an hour of measuring must not end in a directory that cannot be made.
    let at = |e: std::io::Error| format!("{}: {e}", options.out.display());
    fs::create_dir_all(&options.out).map_err(at)?;
    let results = match &options.from {
        Some(file) => {
            let mut results = compare::read_json(file)?;
            compare::verdicts(&mut results);
            results
        }
        None => measure(options)?,
    };
    let files = write(&results, &options.out)?;
    println!("\n{}: {}", options.out.display(), files.join(" "));
    Ok(())
}

fn measure(options: &Options) -> Result<Results, String> {
    let plan = Plan { sweeps: true, host: true, ..(*options.plan).clone() };
    let mut results = compare::measure(&plan)?;
    // Before the guest, which takes longest and may fail.
    compare::write_json(&results, &options.out.join("results.json"))?;
    if options.guest {
        results.guest = guest::run(&plan.programs()?, &options.contrib, &plan.dir, plan.seconds)?;
    }
    compare::verdicts(&mut results);
    if let Some(path) = &plan.json {
        compare::write_json(&results, path)?;
    }
    Ok(results)
}

/// Writes all files; their names.
fn write(results: &Results, out: &Path) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    let mut put = |name: String, text: &str| {
        fs::write(out.join(&name), text)
            .map_err(|e| format!("{}: {e}", out.join(&name).display()))?;
        names.push(name);
        Ok::<(), String>(())
    };
    let plots = plots::all(results);
    put("summary.csv".into(), &csv::summary(results))?;
    put("runs.csv".into(), &csv::runs(results))?;
    for plot in &plots {
        put(format!("{}.svg", plot.name), &plot.svg())?;
    }
    put("index.html".into(), &html::page(results, &plots))?;
    compare::write_json(results, &out.join("results.json"))?;
    names.push("results.json".into());
    Ok(names)
}

/// What a label of the table stands for: the program's name, or its own.
fn name_of(results: &Results, label: &str) -> String {
    let program = |label: &str| {
        let line =
            results.commands.iter().find_map(|c| c.strip_prefix(label)?.strip_prefix(": "))?;
        Path::new(line.split(' ').next()?).file_name()?.to_str().map(str::to_string)
    };
    match label {
        "host" => "host's own io_uring".into(),
        "R" => "own raw".into(),
        // Two builds of one program keep their letters.
        "A" | "B" if program("A") == program("B") => {
            format!("{} {label}", program(label).unwrap_or_default())
        }
        "A" | "B" => program(label).unwrap_or_else(|| label.into()),
        other => other.into(),
    }
}

/// Labels in the order of their first run.
fn labels(results: &Results) -> Vec<&str> {
    let mut labels: Vec<&str> = Vec::new();
    for series in &results.series {
        if !labels.contains(&series.backend.as_str()) {
            labels.push(&series.backend);
        }
    }
    labels
}
