//! A socket at which one program after the other serves the same disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vub_client::Client;

use crate::common::LIMIT;

/// One worker for each queue.
const THREADS: u16 = 4;

pub struct Place {
    node: String,
    /// Workers of the next program.
    pub threads: u16,
    child: Child,
    keeps_log: bool,
    dir: TempDir,
}

impl Place {
    /// The first program, listening. `node` is the value of its `--blockdev`, which must call itself `root`.
    pub fn new(node: String) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let child = spawn(&node, dir.path(), THREADS, Stdio::inherit());
        let mut place = Place { node, threads: THREADS, child, keeps_log: false, dir };
        place.wait_until_it_listens();
        place
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// Begins anew with a program whose log is kept.
    pub fn keep_log(&mut self) {
        self.kill();
        self.keeps_log = true;
        self.restart();
    }

    /// The log of the program of now.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// SIGKILL; the process is gone afterwards.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks the program to end, and waits until it has.
    pub fn terminate(&mut self) {
        vub_client::sys::kill(self.child.id(), libc::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }

    /// What programs have left for their successors.
    pub fn state_files(&self) -> Vec<String> {
        let dirs = std::fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let state =
            dirs.filter(|dir| dir.is_dir() && dir.to_str().unwrap().contains("/vhost-user-blk"));
        let files = state.flat_map(|dir| std::fs::read_dir(dir).unwrap());
        let names = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.contains(".journal") || name.contains(".rejected")).collect()
    }

    /// The next program; how long it took until it listened.
    pub fn restart(&mut self) -> Duration {
        let start = Instant::now();
        self.spawn();
        self.wait_until_it_listens();
        start.elapsed()
    }

    fn spawn(&mut self) {
        let log = if self.keeps_log {
            File::create(self.dir.path().join("log")).unwrap().into()
        } else {
            Stdio::inherit()
        };
        self.child = spawn(&self.node, self.dir.path(), self.threads, log);
    }

    fn wait_until_it_listens(&mut self) {
        let start = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            assert!(start.elapsed() < LIMIT, "nobody listens");
            // (The kernel may still be busy with the last requests of the one before it, and keeps its locks so long.)
            assert_eq!(self.child.try_wait().unwrap(), None, "the program has ended");
            std::thread::yield_now();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It may have ended; then there is nobody to kill.
        self.child.kill().unwrap_or_default();
        self.child.wait().unwrap();
    }
}

fn spawn(node: &str, dir: &Path, threads: u16, log: Stdio) -> Child {
    let socket = dir.join("s");
    let socket = socket.display();
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=root,writable=on,num-queues=4,threads={threads},addr.type=unix,\
         addr.path={socket}"
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
    command.args(["--blockdev", node, "--export", &export]).env("XDG_RUNTIME_DIR", dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

/// `N` bytes of the region, from `at` on in a queue's part.
fn region<const N: usize>(client: &Client, queue: u64, at: u64) -> [u8; N] {
    let (desc, fd) = client.inflight.as_ref().expect("the back end has given a region");
    let file = File::from(fd.try_clone().unwrap());
    let unit = unit(client);
    let part = (unit + unit * u64::from(desc.queue_size)).next_multiple_of(64);
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, desc.mmap_offset + queue * part + at).unwrap();
    bytes
}

/// Bytes before the entries of a part, and of each entry.
fn unit(client: &Client) -> u64 {
    if client.has_feature(34) { 32 } else { 16 }
}

/// The number of requests of a queue that the region says are in flight.
pub fn in_flight(client: &Client, queue: u64) -> usize {
    let size = client.inflight.as_ref().map_or(0, |(desc, _)| u64::from(desc.queue_size));
    let at = |entry: u64| unit(client) * (1 + entry);
    (0..size).map(|entry| usize::from(region::<1>(client, queue, at(entry))[0])).sum()
}

/// Where used descriptors go on, as the region knows it: an index, of a packed ring a position.
pub fn used_idx(client: &Client, queue: u64) -> u16 {
    if !client.has_feature(34) {
        return u16::from_ne_bytes(region(client, queue, 14));
    }
    let wrap = u16::from(region::<1>(client, queue, 21)[0]);
    u16::from_ne_bytes(region(client, queue, 18)) | wrap << 15
}

/// The same, as the driver knows it.
pub fn shown(client: &mut Client) -> u16 {
    if client.has_feature(34) {
        client.queue(0).packed().last_used()
    } else {
        client.queue(0).ring().mem().used_idx()
    }
}
