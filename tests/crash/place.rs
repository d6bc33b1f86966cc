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
    dir: TempDir,
}

impl Place {
    /// The first program, listening. `node` is the value of its `--blockdev`, which must call itself `root`.
    pub fn new(node: String) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let child = spawn(&node, &dir.path().join("s"), THREADS);
        let mut place = Place { node, threads: THREADS, child, dir };
        place.wait_until_it_listens();
        place
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// SIGKILL; the process is gone afterwards.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The next program; how long it took until it listened.
    pub fn restart(&mut self) -> Duration {
        let start = Instant::now();
        self.child = spawn(&self.node, &self.socket(), self.threads);
        self.wait_until_it_listens();
        start.elapsed()
    }

    fn wait_until_it_listens(&mut self) {
        let start = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            assert!(start.elapsed() < LIMIT, "nobody listens");
            // The kernel may still be busy with the last requests of the one before it, and keeps its locks so long.
            if self.child.try_wait().unwrap().is_some() {
                self.child = spawn(&self.node, &self.socket(), self.threads);
            }
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

fn spawn(node: &str, socket: &Path, threads: u16) -> Child {
    let socket = socket.display();
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=root,writable=on,num-queues=4,threads={threads},addr.type=unix,\
         addr.path={socket}"
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
    command.args(["--blockdev", node, "--export", &export]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

/// `N` bytes of the region, from `at` on in a queue's part.
fn region<const N: usize>(client: &Client, queue: u64, at: u64) -> [u8; N] {
    let (desc, fd) = client.inflight.as_ref().expect("the back end has given a region");
    let file = File::from(fd.try_clone().unwrap());
    let part = (16 + 16 * u64::from(desc.queue_size)).next_multiple_of(64);
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, desc.mmap_offset + queue * part + at).unwrap();
    bytes
}

/// The number of requests of a queue that the region says are in flight.
pub fn in_flight(client: &Client, queue: u64) -> usize {
    let size = client.inflight.as_ref().map_or(0, |(desc, _)| u64::from(desc.queue_size));
    (0..size).map(|head| usize::from(region::<1>(client, queue, 16 + 16 * head)[0])).sum()
}

/// The used index that the region knows.
pub fn used_idx(client: &Client, queue: u64) -> u16 {
    u16::from_ne_bytes(region(client, queue, 14))
}
