//! The preset cases: which disk, which job. They are what the bars of issues 2 and 3 are measured on.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use vub_client::sys;

use crate::load::{Job, Mode, Rw};
use crate::qcow2::{self, CLUSTER, Image, Kind};

/// Bytes of every test file and of the null device.
pub const DISK: u64 = 1 << 30;
/// What test files are written and read with.
const CHUNK: usize = 1 << 20;
/// Bytes per request of the sequential cases.
const SEQ: u64 = 128 << 10;

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
    /// A qcow2 image in a file, io_uring.
    Qcow2(Image),
}

/// One preset.
#[derive(Clone, Debug)]
pub struct Case {
    /// What the user types.
    pub name: String,
    /// Where the bytes come from.
    pub medium: Medium,
    /// The file node's `aio`, where it is not the medium's own.
    pub aio: Option<&'static str>,
    /// VHOST_USER_BLK_NO_IO_URING=1 in the back end's environment.
    pub no_io_uring: bool,
    /// The host's own io_uring loop runs the same job.
    pub with_host: bool,
    /// Part of the report, not of `compare`, unless asked for by name.
    pub report_only: bool,
    /// What the requests are.
    pub rw: Rw,
    /// Bytes of each.
    pub bs: u64,
    /// In flight per queue.
    pub iodepth: u16,
    queues: u16,
    /// How the client learns of completions.
    pub client: Mode,
    fsync: u32,
    stride: u64,
    once: bool,
}

fn case(name: &str, medium: Medium, rw: Rw, iodepth: u16, client: Mode) -> Case {
    Case {
        name: name.into(),
        medium,
        aio: None,
        no_io_uring: false,
        with_host: false,
        report_only: false,
        rw,
        bs: 4096,
        iodepth,
        queues: 1,
        client,
        fsync: 0,
        stride: 0,
        once: false,
    }
}

/// Bytes of memory touched before a run that fills the page cache: all it can write, and more.
const BACKED: usize = 4 << 30;

/// All presets, in the order they run.
pub fn all() -> Vec<Case> {
    use Medium::{Disk, Null, Page, Tmpfs};
    let seq = |name, rw| Case { bs: SEQ, ..case(name, Page, rw, 32, Mode::Poll) };
    let mut cases = vec![
        case("null-d32-poll", Null, Rw::RandRead, 32, Mode::Poll),
        case("null-d1-event", Null, Rw::RandRead, 1, Mode::Event),
        case("null-d1-poll", Null, Rw::RandRead, 1, Mode::Poll),
        Case { queues: 4, ..case("null-4q", Null, Rw::RandRead, 32, Mode::Poll) },
        Case { with_host: true, ..case("page-d32-randread", Page, Rw::RandRead, 32, Mode::Poll) },
        Case { with_host: true, ..case("page-d32-randwrite", Page, Rw::RandWrite, 32, Mode::Poll) },
        seq("page-seq128k-read", Rw::Read),
        seq("page-seq128k-write", Rw::Write),
        case("tmpfs-native-d32", Tmpfs, Rw::RandRead, 32, Mode::Poll),
        Case { with_host: true, ..case("disk-d1", Disk, Rw::RandRead, 1, Mode::Event) },
        Case { with_host: true, ..case("disk-d1-poll", Disk, Rw::RandRead, 1, Mode::Poll) },
        case("disk-d32", Disk, Rw::RandRead, 32, Mode::Poll),
    ];
    cases.extend(qcow2_cases());
    cases.extend(sweeps());
    cases
}

/// Depths of the sweeps.
pub const DEPTHS: [u16; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
/// Numbers of queues of the sweeps.
pub const QUEUES: [u16; 3] = [1, 2, 4];
/// Bytes per request of the sequential sweeps: 512 B to 1 MiB.
pub const SIZES: [(u64, &str); 6] = [
    (512, "512"),
    (4 << 10, "4k"),
    (16 << 10, "16k"),
    (64 << 10, "64k"),
    (256 << 10, "256k"),
    (1 << 20, "1m"),
];

/// What issue 5 adds: the lines of the report's plots, and the rest of its table.
fn sweeps() -> Vec<Case> {
    use Medium::{Disk, Null, Page, Tmpfs};
    let read = |name: String, medium, depth| case(&name, medium, Rw::RandRead, depth, Mode::Poll);
    let mut cases = Vec::new();
    for (name, medium) in [("null", Null), ("page", Page), ("disk", Disk)] {
        for depth in DEPTHS {
            let case = read(format!("depth-{name}-{depth}"), medium, depth);
            cases.push(Case { with_host: medium != Null, ..case });
        }
    }
    for (name, medium) in [("null", Null), ("page", Page)] {
        for queues in QUEUES {
            let case = read(format!("queues-{name}-{queues}"), medium, 32);
            cases.push(Case { queues, with_host: medium != Null, ..case });
        }
    }
    for (rw, word) in [(Rw::Read, "read"), (Rw::Write, "write")] {
        for (bs, size) in SIZES {
            cases
                .push(Case { bs, ..case(&format!("seq-{word}-{size}"), Page, rw, 32, Mode::Poll) });
        }
    }
    for (name, medium, aio) in [
        ("page-threads", Page, "threads"),
        ("tmpfs-native", Tmpfs, "native"),
        ("disk-native", Disk, "native"),
    ] {
        let case = read(format!("nouring-{name}"), medium, 32);
        cases.push(Case { aio: Some(aio), no_io_uring: true, ..case });
    }
    cases.iter_mut().for_each(|c| c.report_only = true);
    cases
}

/// Those of issue 3. Allocating ones meet each cluster once: the second write to it is another case.
fn qcow2_cases() -> [Case; 10] {
    let any = |name, image, rw| case(name, Medium::Qcow2(image), rw, 32, Mode::Poll);
    let full = Image::new(Kind::Full, qcow2::FULL);
    let fresh = Image::new(Kind::Fresh, qcow2::FRESH);
    let short = Image::new(Kind::Fresh, qcow2::COPIED);
    let overlay = Image::new(Kind::Overlay, qcow2::COPIED);
    let wide = Image {
        direct: true,
        options: qcow2::SMALL_CACHE,
        ..Image::new(Kind::Mapped, qcow2::WIDE)
    };
    let allocating =
        |name, image| Case { stride: CLUSTER, once: true, ..any(name, image, Rw::RandWrite) };
    let seq = |name, queues| Case { bs: SEQ, once: true, queues, ..any(name, short, Rw::Write) };
    [
        any("q2-alloc-read", full, Rw::RandRead),
        any("q2-alloc-write", full, Rw::RandWrite),
        allocating("q2-fresh-write", fresh),
        // No bar: one write in sixteen allocates, as when a guest fills a small disk.
        Case { stride: 0, ..allocating("q2-fresh-mixed", Image { size: qcow2::FULL, ..fresh }) },
        allocating("q2-fresh-direct", Image { direct: true, ..fresh }),
        allocating("q2-overlay-cow", overlay),
        seq("q2-seq-write", 1),
        seq("q2-seq-write-4q", 4),
        Case { fsync: 1, ..allocating("q2-flush", fresh) },
        any("q2-miss", wide, Rw::RandRead),
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
            fsync: self.fsync,
            stride: self.stride,
            once: self.once,
            ..common.clone()
        }
    }

    /// Queues of the export: those that are busy.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// The same job on a raw file, where that is what qcow2 is measured by.
    pub fn on_raw(&self) -> Option<Self> {
        let full = |image: Image| image.kind == Kind::Full;
        matches!(self.medium, Medium::Qcow2(image) if full(image))
            .then(|| Self { medium: Medium::Page, ..self.clone() })
    }

    /// Touches and frees as much memory as a run that fills the page cache takes.
    ///
    /// In a virtual machine with free page reporting the kernel gives free pages back to the host; who
    /// touches one again waits for the host, 4 to 20 us a page, inside its own copy. Whether a run met
    /// such pages decided over three times its speed. Reporting begins 2 s after pages are freed.
    pub fn back_memory(&self) {
        if self.once {
            drop(std::hint::black_box(vec![1_u8; BACKED]));
        }
    }

    fn writes(&self) -> bool {
        !matches!(self.rw, Rw::Read | Rw::RandRead)
    }

    /// Past the page cache.
    pub fn direct(&self) -> bool {
        match self.medium {
            Medium::Tmpfs | Medium::Disk => true,
            Medium::Null | Medium::Page => false,
            Medium::Qcow2(image) => image.direct,
        }
    }

    /// QEMU's name of the disk's format; `null` for none.
    pub fn format(&self) -> &'static str {
        match self.medium {
            Medium::Null => "null",
            Medium::Page | Medium::Tmpfs | Medium::Disk => "raw",
            Medium::Qcow2(_) => "qcow2",
        }
    }

    /// The test file, if there is one.
    pub fn file(&self, dir: &Path) -> Option<PathBuf> {
        match self.medium {
            Medium::Null => None,
            Medium::Page => Some(dir.join("page.raw")),
            Medium::Tmpfs => Some(PathBuf::from("/dev/shm/vub-bench.raw")),
            Medium::Disk => Some(dir.join("disk.raw")),
            Medium::Qcow2(_) => Some(Image::path(dir)),
        }
    }

    /// The arguments that define node `n`.
    pub fn blockdev(&self, dir: &Path) -> Vec<String> {
        let own = match self.medium {
            Medium::Null => return null(),
            Medium::Qcow2(image) => return image.blockdev(dir),
            Medium::Page | Medium::Disk => "io_uring",
            Medium::Tmpfs => "native",
        };
        let file = self.file(dir).unwrap_or_default();
        let direct = if self.direct() { ",cache.direct=on" } else { "" };
        let options = format!("aio={}{direct}", self.aio.unwrap_or(own));
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
        if let Medium::Qcow2(image) = self.medium {
            let Some(raw) = self.on_raw() else { return image.prepare(dir, Path::new("")) };
            // Both new: where the page cache, and the host below it, keep a file is decided when it is made, and may cost a
            // third of the speed.
            let data = raw.file(dir).unwrap_or_default();
            fill(&data, DISK)?;
            image.prepare(dir, &data)?;
            return raw.prepare(dir);
        }
        let Some(path) = self.file(dir) else { return Ok(()) };
        if fs::metadata(&path).map_or(0, |m| m.len()) != DISK {
            fill(&path, DISK)?;
        }
        if self.medium == Medium::Page { warm(&path) } else { File::open(&path)?.sync_all() }
    }

    /// Before each run.
    ///
    /// # Errors
    /// Those of making an image.
    pub fn renew(&self, dir: &Path) -> io::Result<()> {
        match self.medium {
            Medium::Qcow2(image) => image.renew(dir),
            Medium::Page => keep_warm(&self.file(dir).unwrap_or_default()),
            _ => Ok(()),
        }
    }

    /// After each run, the back end having ended: an image must be without fault. Extents per GiB where
    /// the job was to write one in sequence.
    ///
    /// What was written goes to the disk now: some back ends flush when they end and some do not, and the
    /// next run would pay for it.
    ///
    /// # Errors
    /// What is wrong with the image.
    pub fn judge(&self, dir: &Path) -> io::Result<Option<f64>> {
        if let Some(path) = self.file(dir).filter(|_| self.writes()) {
            File::open(path)?.sync_all()?;
        }
        let Medium::Qcow2(_) = self.medium else { return Ok(None) };
        Image::check(dir)?;
        (self.rw == Rw::Write).then(|| Image::extents_per_gib(dir)).transpose()
    }

    /// After the last run: images go, raw files stay for the next time.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn clean(&self, dir: &Path) -> io::Result<()> {
        if let Medium::Qcow2(_) = self.medium { Image::remove(dir) } else { Ok(()) }
    }
}

/// A null device as node `n`.
pub fn null() -> Vec<String> {
    let node = format!("driver=null-co,node-name=n,size={DISK},read-zeroes=off");
    vec!["--blockdev".into(), node]
}

/// Every byte written: sparse or unwritten extents would be another thing to measure.
pub fn fill(path: &Path, size: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    let (mut chunk, mut word) = (vec![0; CHUNK], 0x9e37_79b9_7f4a_7c15_u64);
    for _ in 0..size / CHUNK as u64 {
        for bytes in chunk.chunks_exact_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        file.write_all(&chunk)?;
    }
    // Aligned extents, on the disk for good.
    file.sync_all()
}

/// On the disk for good, and in the page cache in small pages. Writing and reading ahead leave large ones, of
/// any size, and a small write into a large one costs the kernel up to ten times more: that would drown what is
/// measured, and two files that are compared must not differ in it.
pub fn warm(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    sys::advise(&file, libc::POSIX_FADV_DONTNEED)?;
    keep_warm(path)
}

/// Reads what the page cache has lost since `warm`: some machines take it away with memory to spare.
pub fn keep_warm(path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    // No reading ahead, which makes large pages.
    sys::advise(&file, libc::POSIX_FADV_RANDOM)?;
    let mut chunk = vec![0; CHUNK];
    while file.read(&mut chunk)? > 0 {}
    Ok(())
}

/// The disk's file, for the start-up and idle measurements.
pub fn idle_disk() -> Case {
    case("idle", Medium::Disk, Rw::RandRead, 1, Mode::Event)
}
