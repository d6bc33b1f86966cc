//! Back ends that do nothing: how long they take to listen, and what memory they take.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vub_client::{Client, Options};

use crate::backend::{Backend, Program};
use crate::cases;
use crate::load::{self, Job, Rw};
use crate::qcow2::{Image, Kind};
use crate::results::Spread;
use crate::usage::{self, Rss, Snapshot};

/// Queues offered when idling: the bar's number.
const IDLE_QUEUES: u16 = 16;
/// The large image.
const LARGE: u64 = 1 << 40;
/// Cache for all L2 tables of `LARGE`.
const WHOLE_CACHE: &str = ",l2-cache-size=134217728";
/// Guest bytes that a slice of 4 KiB describes: reading once in each loads all tables.
const SLICE_COVERS: u64 = 4096 / 8 * crate::qcow2::CLUSTER;

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

/// A back end that has opened a qcow2 image of 1 TiB.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Large {
    /// The back end's label.
    pub backend: String,
    /// No cluster of the image is allocated; else all are.
    pub empty: bool,
    /// From fork to the first accepted connection.
    pub listening_ms: Spread,
    /// Memory before a client connects.
    pub rss: Rss,
    /// Memory when a cache large enough has met every L2 table.
    pub rss_covered: Option<Rss>,
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// The client for a back end that listens.
pub fn connect(backend: &mut Backend, options: Options) -> Result<Client, String> {
    Client::from_stream(backend.connect().map_err(text)?, options).map_err(text)
}

fn listening_ms(
    program: &Program,
    blockdev: &[String],
    queues: u16,
    dir: &Path,
    repeat: usize,
) -> Result<Spread, String> {
    let times = (0..repeat.max(3)).map(|_| {
        let backend = program.start(blockdev, queues, dir).map_err(text)?;
        Ok(backend.listening.as_secs_f64() * 1e3)
    });
    Ok(Spread::of(times.collect::<Result<Vec<_>, String>>()?))
}

/// Start-up time, memory, and what it costs to be connected and idle.
///
/// # Errors
/// A back end that does not start, a client that fails.
pub fn idle(program: &Program, dir: &Path, repeat: usize) -> Result<Idle, String> {
    let blockdev = cases::idle_disk().blockdev(dir);
    let listening_ms = listening_ms(program, &blockdev, IDLE_QUEUES, dir, repeat)?;
    let mut backend = program.start(&blockdev, IDLE_QUEUES, dir).map_err(text)?;
    let pid = backend.pid();
    let rss_listening = usage::rss(pid).map_err(text)?;
    let mut client = connect(&mut backend, Options::default())?;
    client.queue(0).read(0, &mut [0; 4096]).map_err(text)?;
    // Let every adaptive poll find out that nothing comes.
    std::thread::sleep(Duration::from_secs(1));
    let before = Snapshot::take(pid).map_err(text)?;
    let seconds = 5.0;
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let used = before.until(&Snapshot::take(pid).map_err(text)?);
    Ok(Idle {
        backend: program.label.clone(),
        listening_ms,
        rss_listening,
        rss_connected: usage::rss(pid).map_err(text)?,
        switches_per_s: (used.voluntary + used.involuntary) as f64 / seconds,
        cpu_percent: used.cpu_ns as f64 / 1e7 / seconds,
    })
}

/// Opens an empty and a fully allocated image of 1 TiB with each program; makes and removes them.
///
/// # Errors
/// A back end that does not start, a client that fails, no room for the image (200 MiB).
pub fn large(programs: &[Program], dir: &Path, repeat: usize) -> Result<Vec<Large>, String> {
    let mut all = Vec::new();
    for kind in [Kind::Fresh, Kind::Mapped] {
        let image = Image::new(kind, LARGE);
        image.prepare(dir, Path::new("")).and_then(|()| image.renew(dir)).map_err(text)?;
        for program in programs {
            all.push(open(program, &image, dir, repeat)?);
        }
    }
    Ok(all)
}

fn open(program: &Program, image: &Image, dir: &Path, repeat: usize) -> Result<Large, String> {
    let blockdev = image.blockdev(dir);
    let listening_ms = listening_ms(program, &blockdev, 1, dir, repeat)?;
    let rss = {
        let backend = program.start(&blockdev, 1, dir).map_err(text)?;
        usage::rss(backend.pid()).map_err(text)?
    };
    let empty = image.kind == Kind::Fresh;
    let rss_covered = if empty { None } else { Some(covered(program, image, dir)?) };
    Ok(Large { backend: program.label.clone(), empty, listening_ms, rss, rss_covered })
}

/// Memory after one read through every slice of every L2 table.
fn covered(program: &Program, image: &Image, dir: &Path) -> Result<Rss, String> {
    let blockdev = Image { options: WHOLE_CACHE, ..*image }.blockdev(dir);
    let mut backend = program.start(&blockdev, 1, dir).map_err(text)?;
    let job = Job {
        rw: Rw::Read,
        stride: SLICE_COVERS,
        once: true,
        // A limit, not a duration.
        time: 60.0,
        ..Job::common()
    };
    let mut client = connect(&mut backend, job.options())?;
    let report = load::run(&job, &mut client, None).map_err(text)?;
    if report.ios != LARGE / SLICE_COVERS || report.errors > 0 {
        let (ios, errors) = (report.ios, report.errors);
        return Err(format!("{}: {ios} reads, {errors} failed", program.label));
    }
    usage::rss(backend.pid()).map_err(text)
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

impl Idle {
    /// Prints a line.
    pub fn print(&self) {
        println!(
            "idle {}: listening after {:.1} ms ({:.1}..{:.1}); resident {:.1} MiB listening, {:.1} MiB \
             connected (anon {:.1}, file {:.1}, shared {:.1}); {:.1} switches/s, {:.3} % CPU",
            self.backend,
            self.listening_ms.median,
            self.listening_ms.min,
            self.listening_ms.max,
            mib(self.rss_listening.total_kib),
            mib(self.rss_connected.total_kib),
            mib(self.rss_connected.anon_kib),
            mib(self.rss_connected.file_kib),
            mib(self.rss_connected.shmem_kib),
            self.switches_per_s,
            self.cpu_percent
        );
    }
}

impl Large {
    /// Prints a line.
    pub fn print(&self) {
        print!(
            "1 TiB, {}, {}: listening after {:.1} ms ({:.1}..{:.1}); resident {:.1} MiB",
            if self.empty { "empty" } else { "allocated" },
            self.backend,
            self.listening_ms.median,
            self.listening_ms.min,
            self.listening_ms.max,
            mib(self.rss.total_kib)
        );
        match self.rss_covered {
            Some(rss) => println!(", {:.1} MiB with every L2 table cached", mib(rss.total_kib)),
            None => println!(),
        }
    }
}
