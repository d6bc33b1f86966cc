//! One process with many exports: what it costs when nobody asks for anything, and whether each gets its
//! share when all do. Null devices, so that nothing but the program itself decides.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vub_client::Client;

use crate::backend::{Backend, Program};
use crate::cases::DISK;
use crate::load::{self, Job, Mode, Report};
use crate::results::Spread;
use crate::usage::Snapshot;

/// Seconds of idling that are measured.
const IDLE_SECONDS: f64 = 5.0;

/// A back end with many exports.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Many {
    /// The back end's label.
    pub backend: String,
    /// How many.
    pub exports: usize,
    /// CPU share in percent, all connected, none busy.
    pub idle_cpu_percent: f64,
    /// Context switches per second then.
    pub idle_switches_per_s: f64,
    /// Requests per second of all exports together, each at depth 1 with a client that sleeps.
    pub iops: Spread,
    /// The fastest export's over the slowest's.
    pub unfairness: Spread,
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn start(program: &Program, exports: usize, dir: &Path) -> Result<(Backend, Vec<PathBuf>), String> {
    let sockets: Vec<PathBuf> =
        (0..exports).map(|i| dir.join(format!("{}-{i}.sock", program.label))).collect();
    let mut args = program.extra.0.clone();
    let mut iothread = "";
    if program.iothread {
        args.extend(["--object".into(), "iothread,id=io0".into()]);
        iothread = ",iothread=io0";
    }
    for (i, socket) in sockets.iter().enumerate() {
        let _ = std::fs::remove_file(socket);
        let (socket, extra) = (socket.display(), &program.extra.1);
        args.extend([
            "--blockdev".into(),
            format!("driver=null-co,node-name=n{i},size={DISK},read-zeroes=off"),
            "--export".into(),
            format!(
                "type=vhost-user-blk,id=e{i},node-name=n{i},addr.type=unix,addr.path={socket},writable=on,\
                 num-queues=1{iothread}{extra}"
            ),
        ]);
    }
    let mut command = std::process::Command::new(&program.path);
    command.args(args);
    // The last one made is the last to listen.
    let last = sockets.last().cloned().ok_or("no exports")?;
    Ok((program.spawn(command, last, dir).map_err(text)?, sockets))
}

/// Idle once, busy `repeat` times, each program in turn.
///
/// # Errors
/// A back end that does not start, a client that fails.
pub fn run(
    programs: &[Program],
    exports: usize,
    dir: &Path,
    repeat: usize,
    common: &Job,
) -> Result<Vec<Many>, String> {
    let job = Job { client: Mode::Event, warmup: 0.5, ..common.clone() };
    let mut all: Vec<(Many, Vec<f64>, Vec<f64>)> = Vec::new();
    for program in programs {
        let named = |e| format!("{} with {exports} exports: {e}", program.label);
        let (cpu, switches) = idle(program, exports, dir, &job).map_err(named)?;
        let many = Many {
            backend: program.label.clone(),
            exports,
            idle_cpu_percent: cpu,
            idle_switches_per_s: switches,
            iops: Spread::default(),
            unfairness: Spread::default(),
        };
        all.push((many, Vec::new(), Vec::new()));
    }
    for _ in 0..repeat {
        for (program, (_, iops, unfairness)) in programs.iter().zip(&mut all) {
            let reports = busy(program, exports, dir, &job)
                .map_err(|e| format!("{} with {exports} exports: {e}", program.label))?;
            let each = || reports.iter().map(|r| r.iops);
            iops.push(each().sum());
            let slowest = each().fold(f64::INFINITY, f64::min).max(f64::MIN_POSITIVE);
            unfairness.push(each().fold(0.0, f64::max) / slowest);
        }
    }
    let done = |(many, iops, unfairness)| Many {
        iops: Spread::of(iops),
        unfairness: Spread::of(unfairness),
        ..many
    };
    Ok(all.into_iter().map(done).collect())
}

fn clients(backend: &mut Backend, sockets: &[PathBuf], job: &Job) -> Result<Vec<Client>, String> {
    let (last, others) = sockets.split_last().ok_or("no exports")?;
    let mut clients = Vec::new();
    for socket in others {
        let stream =
            UnixStream::connect(socket).map_err(|e| format!("{}: {e}", socket.display()))?;
        clients.push(Client::from_stream(stream, job.options()).map_err(text)?);
    }
    let stream = backend.connect().map_err(|e| format!("{}: {e}", last.display()))?;
    clients.push(Client::from_stream(stream, job.options()).map_err(text)?);
    Ok(clients)
}

/// CPU in percent and switches per second.
fn idle(program: &Program, exports: usize, dir: &Path, job: &Job) -> Result<(f64, f64), String> {
    let (mut backend, sockets) = start(program, exports, dir)?;
    let mut clients = clients(&mut backend, &sockets, job)?;
    for client in &mut clients {
        client.queue(0).read(0, &mut [0; 4096]).map_err(text)?;
    }
    // Let every adaptive poll find out that nothing comes.
    thread::sleep(Duration::from_secs(1));
    let before = Snapshot::take(backend.pid()).map_err(text)?;
    thread::sleep(Duration::from_secs_f64(IDLE_SECONDS));
    let used = before.until(&Snapshot::take(backend.pid()).map_err(text)?);
    let switches = (used.voluntary + used.involuntary) as f64 / IDLE_SECONDS;
    Ok((used.cpu_ns as f64 / 1e7 / IDLE_SECONDS, switches))
}

fn busy(program: &Program, exports: usize, dir: &Path, job: &Job) -> Result<Vec<Report>, String> {
    let (mut backend, sockets) = start(program, exports, dir)?;
    let mut clients = clients(&mut backend, &sockets, job)?;
    thread::scope(|scope| {
        let one = |client| scope.spawn(move || load::run(job, client, None));
        let workers: Vec<_> = clients.iter_mut().map(one).collect();
        let join = |w: thread::ScopedJoinHandle<'_, vub_client::Result<Report>>| {
            let report = w.join().map_err(|_| "a client thread died")?.map_err(text)?;
            if report.errors > 0 {
                return Err(format!("{} requests failed", report.errors));
            }
            Ok(report)
        };
        workers.into_iter().map(join).collect()
    })
}

impl Many {
    /// Prints a line.
    pub fn print(&self) {
        println!(
            "{} exports, {}: idle {:.3} % CPU, {:.1} switches/s; each at depth 1: {:.0} IOPS ({:.0}..{:.0}), \
             fastest / slowest {:.2} ({:.2}..{:.2})",
            self.exports,
            self.backend,
            self.idle_cpu_percent,
            self.idle_switches_per_s,
            self.iops.median,
            self.iops.min,
            self.iops.max,
            self.unfairness.median,
            self.unfairness.min,
            self.unfairness.max
        );
    }
}
