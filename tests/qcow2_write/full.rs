//! A file system that fills up while guests write: they are told, nothing that was there is lost, and when there is room
//! again everything goes on.

use std::fs;
use std::path::Path;
use std::process::Command;

use vub_client::{Client, Status};

use crate::common::{ENGINES, Engine};
use crate::tools::Dirs;

use super::bed::{How, assert_clean, assert_same, connect, is_dirty, read_all, start};
use super::model::stamps;

/// A file system of its own, with little room; unmounted when dropped. Mounting needs root.
pub struct SmallFs {
    dirs: Dirs,
    _image: tempfile::NamedTempFile,
}

impl SmallFs {
    pub fn new(kind: &str, size: u64) -> SmallFs {
        let (dirs, image) = (Dirs::new(), tempfile::NamedTempFile::new().unwrap());
        image.as_file().set_len(size).unwrap();
        let mut mount = Command::new("mount");
        if kind == "tmpfs" {
            mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]);
        } else {
            let mut mkfs = Command::new("mkfs.ext4");
            mkfs.args(["-q", "-m", "0", "-O", "^has_journal"]).arg(image.path());
            assert!(mkfs.status().expect("mkfs.ext4 can be started").success());
            mount.args(["-o", "loop"]).arg(image.path());
        }
        assert!(mount.arg(dirs.0.path()).status().unwrap().success(), "mounting a {kind}");
        SmallFs { dirs, _image: image }
    }

    pub fn path(&self) -> &Path {
        self.dirs.0.path()
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        // A killed program's last requests may hold it for a moment: it goes when they have ended.
        let done = Command::new("umount").arg("-l").arg(self.dirs.0.path()).status();
        assert!(done.is_ok_and(|s| s.success()) || std::thread::panicking());
    }
}

/// Sectors of a write.
const CHUNK: u64 = 128;
/// Writes at the same time.
const TOGETHER: u64 = 8;

/// What a chunk may hold: any of these versions, zeroes being 0.
type May = Vec<u64>;

struct Guest {
    client: Client,
    chunks: Vec<May>,
    version: u64,
}

impl Guest {
    /// Writes chunks, all at once on all queues; the numbers of those that failed.
    fn write(&mut self, chunks: &[u64]) -> Vec<u64> {
        self.version += 1;
        let queues = self.client.queues_mut().len();
        let mut failed = Vec::new();
        let mut sent = Vec::new();
        for (n, &chunk) in chunks.iter().enumerate() {
            let q = self.client.queue(n % queues);
            let sector = chunk * CHUNK;
            let request = q.write_request(sector, &stamps(sector, CHUNK, self.version)).unwrap();
            sent.push((n % queues, q.submit(request).unwrap(), chunk));
        }
        for i in 0..queues {
            for done in self.client.queue(i).wait_all().unwrap() {
                let (.., chunk) =
                    sent.iter().find(|(q, tag, _)| (*q, *tag) == (i, done.tag)).unwrap();
                let may = &mut self.chunks[usize::try_from(*chunk).unwrap()];
                match done.status {
                    Status::Ok => *may = vec![self.version],
                    Status::IoErr => {
                        may.push(self.version);
                        failed.push(*chunk);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        failed
    }

    /// Reads the whole disk and checks it.
    fn look(&mut self) -> Vec<u8> {
        let disk = read_all(&mut self.client);
        for (chunk, may) in (0..).zip(&self.chunks) {
            for sector in chunk * CHUNK..(chunk + 1) * CHUNK {
                let at = usize::try_from(sector * 512).unwrap();
                let got = &disk[at..at + 512];
                let is = |v: &u64| match v {
                    0 => got.iter().all(|b| *b == 0),
                    _ => got == stamps(sector, 1, *v),
                };
                assert!(may.iter().any(is), "sector {sector} is none of {may:?}: {:?}", &got[..16]);
            }
        }
        disk
    }
}

fn fill(kind: &str, options: &str, engine: Engine) {
    // The journal is there, too.
    let fs = SmallFs::new(kind, 6 << 20);
    let dirs = &fs.dirs;
    dirs.create("a", options, &["16M"]);
    fs::write(dirs.path("filler"), vec![1; 2 << 20]).unwrap();
    let program = start(&dirs.path("a"), How { engine, ..How::default() });
    let client = connect(&program, 2);
    let mut guest = Guest { client, chunks: vec![vec![0]; 256], version: 0 };

    let mut failed = Vec::new();
    let mut next = 0;
    while failed.is_empty() {
        let some: Vec<_> = (next..next + TOGETHER).collect();
        failed = guest.write(&some);
        next += TOGETHER;
        assert!(next <= 72, "4.5 MiB written into less room");
    }
    assert!(next > 32, "{failed:?} failed after {next} chunks: there were 4 MiB of room");
    // It may say so, too, if its tables have no room; it may not lose them.
    let flushed = guest.client.queue(0).flush();
    guest.look();
    // Where there is something already, there is room.
    let there: Vec<_> = (0..next).filter(|chunk| !failed.contains(chunk)).step_by(8).collect();
    assert_eq!(guest.write(&there), Vec::<u64>::new());
    let more: Vec<_> = (next..next + 4).collect();
    failed.extend(guest.write(&more));
    guest.look();

    fs::remove_file(dirs.path("filler")).unwrap();
    println!("{kind} {options}: {failed:?} failed after {next} chunks, flush {flushed:?}");
    assert_eq!(guest.write(&failed), Vec::<u64>::new());
    guest.client.queue(1).flush().unwrap();
    let disk = guest.look();
    drop(guest);
    assert!(program.terminate().success());
    assert!(!is_dirty(&dirs.path("a")));
    assert_clean(dirs, "a", kind);
    // Beside the small file system: there is no room for it inside.
    let out = Dirs::new();
    out.run("qemu-img", &["convert", "-O", "raw", dirs.path("a").to_str().unwrap(), "raw"]);
    assert_same(&fs::read(out.path("raw")).unwrap(), &disk, "as QEMU reads it");
}

#[test]
fn a_full_tmpfs() {
    for (n, options) in
        ["", "cluster_size=4k", "cluster_size=512", "extended_l2=on"].into_iter().enumerate()
    {
        fill("tmpfs", options, ENGINES[[0, 2][n % 2]]);
    }
}

#[test]
fn a_full_ext4() {
    for (n, options) in ["", "cluster_size=512,lazy_refcounts=on"].into_iter().enumerate() {
        fill("ext4", options, ENGINES[n + 2]);
    }
}
