//! A front end that says anything, with a guest that offers anything, to a whole device; another one beside it.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vhost_user_blk::block::Graph;
use vhost_user_blk::export::{Export, ExportConfig};
use vhost_user_blk::vhost_user::message::{GET_QUEUE_NUM, encode};
use vhost_user_blk::vhost_user::{Endpoint, Server};

use super::driver::{Driver, poke};
use super::entropy::Entropy;
use super::front_end::{beginning, message, read_to_end};
use super::memory::Memory;

/// The limit of every wait: a session that is silent for so long hangs.
const LIMIT: Duration = Duration::from_secs(15);
/// The most steps of a run.
const STEPS: usize = 40;
const QUEUES: u16 = 2;

/// A served disk.
struct Disk {
    address: SocketAddr,
    export: Arc<Export>,
    server: Server,
    _graph: Arc<Graph>,
}

impl Disk {
    fn new(name: &str) -> Disk {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vub-fuzz-{}-{count}-{name}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let graph = Graph::new();
        let node = json!({
            "driver": "null-co", "node-name": "root", "size": 1 << 20, "read-zeroes": true,
        });
        let Value::Object(node) = node else { unreachable!("it is an object") };
        let node = graph.add(node).unwrap();
        let config = ExportConfig {
            id: name.clone(),
            writable: true,
            writethrough: false,
            num_queues: QUEUES,
            queue_size: 256,
            logical_block_size: 512,
            serial: "fuzz".into(),
            threads: 2,
            poll_max_ns: 0,
            on_error: Default::default(),
        };
        let export = Export::new(&graph, &node, config).unwrap();
        let endpoint = Endpoint::Listener(listener);
        let device = Arc::clone(&export);
        let server = Server::start(endpoint, device, name, Box::new(|| ())).unwrap();
        Disk { address, export, server, _graph: graph }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect_addr(&self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.export.close();
    }
}

/// All that outlives a run.
struct Bed {
    disk: Disk,
    _other: Disk,
    /// A front end of the other disk.
    beside: UnixStream,
    memory: Memory,
    /// Descriptors and mappings, when nobody is connected.
    left: (usize, usize),
}

impl Bed {
    fn new() -> Bed {
        let (disk, other) = (Disk::new("hostile"), Disk::new("beside"));
        let beside = other.connect();
        let mut bed =
            Bed { disk, _other: other, beside, memory: Memory::new(c"messages"), left: (0, 0) };
        // Workers start when they are needed, and stay.
        bed.converse(Entropy(&[0; 4]), true);
        bed.left = bed.settled();
        while bed.left != bed.settled() {
            bed.left = bed.settled();
        }
        bed
    }

    /// What is open and mapped while a front end that has said nothing else is served: then the one before it is gone.
    fn settled(&self) -> (usize, usize) {
        let next = self.disk.connect();
        expect_answer(&next, "the next front end");
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let mapped = maps.lines().filter(|l| l.contains("memfd:messages")).count();
        (names().len(), mapped)
    }

    fn converse(&mut self, mut e: Entropy<'_>, both: bool) {
        self.memory.reset();
        let stream = self.disk.connect();
        let packed = e.one_in(2);
        let mut driver = Driver::new(16, packed);
        let mut kicks = Vec::new();
        if both || !e.one_in(4) {
            for queue in 0..if both { u32::from(QUEUES) } else { 1 } {
                let (parcels, more) = beginning(&self.memory, queue, packed, driver.size);
                parcels.iter().for_each(|p| p.send(&stream));
                kicks.extend(more);
            }
        }
        for _ in 0..STEPS {
            match e.below(8) {
                _ if e.0.is_empty() => break,
                0..=3 => message(&mut e, &mut self.memory).send(&stream),
                4 | 5 => driver.offer(&mut e, &mut self.memory),
                6 => poke(&mut e, &mut self.memory),
                _ => {
                    kicks.iter().for_each(|kick| kick.write(1).unwrap_or_default());
                    self.disk.server.config_change().changed();
                }
            }
        }
        kicks.iter().for_each(|kick| kick.write(1).unwrap_or_default());
        expect_answer(&self.beside, "the front end of another disk");
        stream.shutdown(Shutdown::Write).unwrap_or_default();
        read_to_end(&stream);
    }
}

fn expect_answer(mut stream: &UnixStream, who: &str) {
    let mut reply = [0; 20];
    let answered = stream
        .write_all(&encode(GET_QUEUE_NUM, 0, &[]))
        .and_then(|()| stream.read_exact(&mut reply));
    answered.unwrap_or_else(|e| panic!("{who} has no answer: {e}"));
    assert_eq!(reply[12..], u64::from(QUEUES).to_ne_bytes(), "{who}");
}

/// One run. They count what the process has open, so there is one at a time.
///
/// # Panics
/// If a front end hangs, or something is left of one.
pub fn run(data: &[u8]) {
    static BED: Mutex<Option<Bed>> = Mutex::new(None);
    let mut bed = BED.lock().unwrap_or_else(PoisonError::into_inner);
    let bed = bed.get_or_insert_with(Bed::new);
    bed.converse(Entropy(data), false);
    // A worker closes a queue's descriptors a moment after it has told that the queue has stopped.
    let start = Instant::now();
    let mut left = bed.settled();
    while left != bed.left && start.elapsed() < LIMIT {
        std::thread::yield_now();
        left = bed.settled();
    }
    bed.memory.expect_canaries();
    assert_eq!(left, bed.left, "descriptors and mappings: {:?}", names());
}

/// What is open, but for what others in this process open: files that have names, and the memory of rings.
fn names() -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc/self/fd").unwrap();
    let names = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let ours = |name: &PathBuf| {
        let name = name.to_string_lossy();
        !name.starts_with('/') || name.ends_with("(deleted)") && !name.starts_with("/memfd:ring")
    };
    names.filter(ours).collect()
}
