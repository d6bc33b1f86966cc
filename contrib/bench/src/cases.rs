//! The preset cases: which disk, which job. They are what issue 2's bars are measured on.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::load::{Job, Mode, Rw};

/// Bytes of every test file and of the null device.
const DISK: u64 = 1 << 30;
/// What test files are written and read with.
const CHUNK: usize = 1 << 20;

/// Where the bytes of a case come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// null-co, which touches no data.
    Null,
    /// A file in the page cache, io_uring.
    Page,
    /// The same on tmpfs, Linux AIO and O_DIRECT.
    Tmpfs,
    /// A file with O_DIRECT, io_uring.
    Disk,
}

/// One preset.
#[derive(Clone, Debug)]
pub struct Case {
    /// What the user types.
    pub name: &'static str,
    /// Where the bytes come from.
    pub medium: Medium,
    rw: Rw,
    bs: u64,
    iodepth: u16,
    queues: u16,
    client: Mode,
}

const fn case(name: &'static str, medium: Medium, rw: Rw, iodepth: u16, client: Mode) -> Case {
    Case { name, medium, rw, bs: 4096, iodepth, queues: 1, client }
}

/// All presets, in the order they run.
pub fn all() -> Vec<Case> {
    use Medium::{Disk, Null, Page, Tmpfs};
    let seq = |name, rw| Case { bs: 128 << 10, ..case(name, Page, rw, 32, Mode::Poll) };
    vec![
        case("null-d32-poll", Null, Rw::RandRead, 32, Mode::Poll),
        case("null-d1-event", Null, Rw::RandRead, 1, Mode::Event),
        case("null-d1-poll", Null, Rw::RandRead, 1, Mode::Poll),
        Case { queues: 4, ..case("null-4q", Null, Rw::RandRead, 32, Mode::Poll) },
        case("page-d32-randread", Page, Rw::RandRead, 32, Mode::Poll),
        case("page-d32-randwrite", Page, Rw::RandWrite, 32, Mode::Poll),
        seq("page-seq128k-read", Rw::Read),
        seq("page-seq128k-write", Rw::Write),
        case("tmpfs-native-d32", Tmpfs, Rw::RandRead, 32, Mode::Poll),
        case("disk-d1", Disk, Rw::RandRead, 1, Mode::Event),
        case("disk-d32", Disk, Rw::RandRead, 32, Mode::Poll),
    ]
}

impl Case {
    /// The job, with what the command line says about all cases.
    pub fn job(&self, common: &Job) -> Job {
        Job {
            rw: self.rw,
            bs: self.bs,
            iodepth: self.iodepth,
            queues: self.queues,
            client: self.client,
            ..common.clone()
        }
    }

    /// Queues of the export: those that are busy.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// The test file, if there is one.
    fn file(&self, dir: &Path) -> Option<PathBuf> {
        match self.medium {
            Medium::Null => None,
            Medium::Page => Some(dir.join("page.raw")),
            Medium::Tmpfs => Some(PathBuf::from("/dev/shm/vub-bench.raw")),
            Medium::Disk => Some(dir.join("disk.raw")),
        }
    }

    /// The arguments that define node `n`.
    pub fn blockdev(&self, dir: &Path) -> Vec<String> {
        let options = match self.medium {
            Medium::Null => return null(),
            Medium::Page => "aio=io_uring",
            Medium::Tmpfs => "aio=native,cache.direct=on",
            Medium::Disk => "aio=io_uring,cache.direct=on",
        };
        let file = self.file(dir).unwrap_or_default();
        let direct = if options.contains("direct") { ",cache.direct=on" } else { "" };
        vec![
            "--blockdev".into(),
            format!("driver=file,node-name=f,filename={},{options}", file.display()),
            "--blockdev".into(),
            format!("driver=raw,node-name=n,file=f{direct}"),
        ]
    }

    /// Makes the test file if it is not there, and brings it into the state the case is about.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn prepare(&self, dir: &Path) -> io::Result<()> {
        let Some(path) = self.file(dir) else { return Ok(()) };
        if fs::metadata(&path).map_or(0, |m| m.len()) != DISK {
            fill(&path)?;
        }
        let file = File::open(&path)?;
        file.sync_all()?;
        if self.medium == Medium::Page {
            // Reading it through the cache is what keeps it there.
            io::copy(&mut file.take(DISK), &mut io::sink())?;
        }
        Ok(())
    }
}

/// A null device as node `n`.
pub fn null() -> Vec<String> {
    let node = format!("driver=null-co,node-name=n,size={DISK},read-zeroes=off");
    vec!["--blockdev".into(), node]
}

/// Every byte written: sparse or unwritten extents would be another thing to measure.
fn fill(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    let (mut chunk, mut word) = (vec![0; CHUNK], 0x9e37_79b9_7f4a_7c15_u64);
    for _ in 0..DISK / CHUNK as u64 {
        for bytes in chunk.chunks_exact_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        file.write_all(&chunk)?;
    }
    // Aligned extents, on the disk for good.
    file.sync_all()?;
    let mut last = [0];
    File::open(path)?.read_exact_at(&mut last, DISK - 1)
}

/// The disk's file, for the start-up and idle measurements.
pub fn idle_disk() -> Case {
    case("idle", Medium::Disk, Rw::RandRead, 1, Mode::Event)
}
