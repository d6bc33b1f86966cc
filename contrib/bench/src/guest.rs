//! fio's jobs in a real guest: `contrib/guest/run` with `contrib/fio/run.sh`, on each back end in turn. In an
//! emulated guest (TCG) latency is the emulator's; the back end's CPU time per request is its own all the same.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::backend::Program;
use crate::cases;
use crate::usage::Counted;

/// One job of fio on one back end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GuestRun {
    /// The back end's label.
    pub backend: String,
    /// The job file's name.
    pub job: String,
    /// Requests per second, reads and writes together.
    pub iops: f64,
    /// 10^6 bytes per second.
    pub mb_per_s: f64,
    /// Mean completion latency.
    pub lat_mean_us: f64,
    /// 99th percentile of it, of the slower direction.
    pub lat_p99_us: f64,
    /// CPU time of the back end per request.
    pub cpu_ns: f64,
    /// System calls of the back end per request, where they can be counted.
    pub syscalls: Option<f64>,
    /// Context switches of the back end per request.
    pub switches: f64,
}

/// Every job of `contrib/fio` in a guest, each program in turn. `contrib` is that directory.
///
/// # Errors
/// What the guest says when it fails.
pub fn run(
    programs: &[Program],
    contrib: &Path,
    dir: &Path,
    seconds: f64,
) -> Result<Vec<GuestRun>, String> {
    let case = cases::idle_disk();
    case.prepare(dir).map_err(|e| e.to_string())?;
    let mut all = Vec::new();
    for program in programs.iter().filter(|p| p.serves(&case)) {
        let named = |e: String| format!("guest on {}: {e}", program.label);
        all.extend(one(program, contrib, dir, seconds).map_err(named)?);
    }
    Ok(all)
}

fn job_files(contrib: &Path) -> std::io::Result<Vec<std::path::PathBuf>> {
    let entries = std::fs::read_dir(contrib.join("fio"))?.flatten().map(|e| e.path());
    let mut files: Vec<_> = entries.filter(|p| p.extension().is_some_and(|e| e == "fio")).collect();
    files.sort();
    Ok(files)
}

fn one(
    program: &Program,
    contrib: &Path,
    dir: &Path,
    seconds: f64,
) -> Result<Vec<GuestRun>, String> {
    let text = |e: std::io::Error| e.to_string();
    let mut backend = program.start_case(&cases::idle_disk(), dir).map_err(text)?;
    // Back ends that serve one front end at a time must not see ours as the first.
    drop(backend.connect());
    let mut command = Command::new(contrib.join("guest/run"));
    command.arg("--socket").arg(backend.socket());
    command.arg("--script").arg(contrib.join("fio/run.sh"));
    command.args(["--timeout", "400", "--env"]).arg(format!("RUNTIME={}", seconds.ceil().max(1.0)));
    for file in job_files(contrib).map_err(text)? {
        command.arg("--file").arg(file);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(text)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let log = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    });
    let (mut runs, mut before) = (Vec::new(), None);
    for line in BufReader::new(stdout.ok_or("no output")?).lines() {
        let line = line.map_err(text)?;
        if line.starts_with("@begin ") {
            before = Counted::begin(backend.pid()).ok();
        } else if let Some(rest) = line.strip_prefix("@end ") {
            let usage = before.take().and_then(|counted| counted.end().ok());
            let (job, terse) = rest.split_once(' ').unwrap_or((rest, ""));
            let (mut run, ios) =
                digest(terse).ok_or_else(|| format!("{job}: fio said {terse:?}"))?;
            (run.backend, run.job) = (program.label.clone(), job.into());
            if let Some(usage) = usage {
                run.syscalls = usage.syscalls.map(|n| n as f64 / ios);
                run.cpu_ns = usage.cpu_ns as f64 / ios;
                run.switches = (usage.voluntary + usage.involuntary) as f64 / ios;
            }
            println!(
                "guest {:<22} {:<5} {:>9.0} IOPS {:>8.0} CPU ns",
                run.job, run.backend, run.iops, run.cpu_ns
            );
            runs.push(run);
        }
    }
    let status = child.wait().map_err(text)?;
    let log = log.join().unwrap_or_default();
    if !status.success() || runs.is_empty() {
        return Err(format!("{status}: {}", log.trim_end()));
    }
    Ok(runs)
}

/// fio's terse line, version 3, and the number of requests. Its fields, from 1: 7 KiB/s, 8 IOPS, 9 ms of reads, 30 the 99th
/// percentile, 40 the mean latency; 41 more of each for writes.
fn digest(terse: &str) -> Option<(GuestRun, f64)> {
    let fields: Vec<&str> = terse.split(';').collect();
    let number =
        |i: usize| fields.get(i - 1)?.rsplit('=').next()?.trim_end_matches('%').parse::<f64>().ok();
    let [reads, writes] = [number(8)? * number(9)? / 1e3, number(49)? * number(50)? / 1e3];
    let ios = reads + writes;
    (ios > 0.0).then_some(())?;
    let run = GuestRun {
        iops: number(8)? + number(49)?,
        mb_per_s: (number(7)? + number(48)?) * 1024.0 / 1e6,
        lat_mean_us: (number(40)? * reads + number(81)? * writes) / ios,
        lat_p99_us: number(30)?.max(number(71)?),
        ..GuestRun::default()
    };
    Some((run, ios))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terse_line_is_read() {
        let mut fields = vec!["0".to_string(); 130];
        for (at, value) in [
            (7, "4000"),
            (8, "1000"),
            (9, "2000"),
            (30, "99.000000%=250"),
            (40, "100.5"),
            (71, "99.000000%=0"),
        ] {
            fields[at - 1] = value.into();
        }
        let (run, ios) = digest(&fields.join(";")).unwrap();
        assert!((ios - 2000.0).abs() < 1e-9 && (run.iops - 1000.0).abs() < 1e-9);
        assert!((run.lat_p99_us - 250.0).abs() < 1e-9 && (run.lat_mean_us - 100.5).abs() < 1e-9);
        assert!(digest("fio: no such job").is_none());
    }
}
