//! In the steady state the fast lane allocates nothing: a counting allocator around an export that serves a ring.

#![allow(clippy::unwrap_used, reason = "tests")]

mod drivers;

use std::alloc::{GlobalAlloc, Layout as Shape, System};
use std::cell::Cell;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use drivers::Rng;
use drivers::bed::directory;
use drivers::guest::{DATA, FEATURES, Guest, SLOTS};
use serde_json::{Value, json};
use vhost_user_blk::block::Graph;
use vhost_user_blk::export::{Export, ExportConfig};
use vhost_user_blk::mem::Region;
use vhost_user_blk::rt::uring_available;
use vhost_user_blk::vhost_user::{Device, Endpoint, Server};
use vhost_user_blk::virtio::inflight::{View, part_len};
use vub_client::{Client, Options, Status};

const WARM_UP: u64 = 10_000;
const REQUESTS: u64 = 100_000;
/// Blocks of [`DATA`] bytes on the disk.
const BLOCKS: u64 = 4096;

/// Whether allocations of workers are counted now.
static COUNTING: AtomicBool = AtomicBool::new(false);
/// The allocations of all workers.
static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// Whether this thread is a worker, once it is known.
    static WORKER: Cell<Option<bool>> = const { Cell::new(None) };
}

struct Counting;

impl Counting {
    fn note() {
        if !COUNTING.load(Ordering::Relaxed) {
            return;
        }
        let worker = WORKER.try_with(|w| {
            let known = w.get().unwrap_or_else(named_worker);
            w.set(Some(known));
            known
        });
        if worker == Ok(true) {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Asked of the kernel, which allocates nothing here. Workers' names begin with `blk-`; upkeep's does, too, and it looks at
/// the medium's length now and then.
fn named_worker() -> bool {
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes.
    let rc = unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    rc == 0 && name.starts_with(b"blk-") && !name.starts_with(b"blk-upkeep")
}

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, shape: Shape) -> *mut u8 {
        Counting::note();
        // SAFETY: the caller's promises.
        unsafe { System.alloc(shape) }
    }

    unsafe fn alloc_zeroed(&self, shape: Shape) -> *mut u8 {
        Counting::note();
        // SAFETY: the caller's promises.
        unsafe { System.alloc_zeroed(shape) }
    }

    unsafe fn realloc(&self, at: *mut u8, shape: Shape, size: usize) -> *mut u8 {
        Counting::note();
        // SAFETY: the caller's promises.
        unsafe { System.realloc(at, shape, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, shape: Shape) {
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(at, shape) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `f`; the allocations of workers meanwhile.
fn counted(f: impl FnOnce()) -> u64 {
    COUNT.store(0, Ordering::SeqCst);
    COUNTING.store(true, Ordering::SeqCst);
    f();
    COUNTING.store(false, Ordering::SeqCst);
    COUNT.load(Ordering::SeqCst)
}

/// `count` reads and writes of random blocks, as many at once as the guest has room for. Block `n` begins with the number
/// `n`, if the disk keeps what is written (`checked`).
fn serve(guest: &mut Guest, rng: &mut Rng, count: u64, checked: bool) {
    let mut free: Vec<u16> = (0..SLOTS).collect();
    let mut blocks = [0; SLOTS as usize];
    let (mut offered, mut done) = (0, 0);
    while done < count {
        while offered < count
            && let Some(slot) = free.pop()
        {
            let (block, write) = (rng.below(BLOCKS), rng.one_in(2));
            guest.set_tag(slot, if write { block } else { u64::MAX });
            guest.offer(slot, write, block * u64::from(DATA) / 512);
            blocks[usize::from(slot)] = block;
            offered += 1;
        }
        guest.flush();
        guest.answers(|guest, slot, status, len| {
            assert_eq!(status, 0, "slot {slot}");
            assert!(len == 1 || len == DATA + 1);
            if checked {
                assert_eq!(guest.tag(slot), blocks[usize::from(slot)]);
            }
            free.push(slot);
            done += 1;
        });
    }
    assert_eq!(free.len(), usize::from(SLOTS));
}

/// Memory to track the guest's requests in that nobody has used yet.
fn fresh_region(size: u16) -> View {
    let file = tempfile::tempfile().unwrap();
    file.set_len(part_len(size, false)).unwrap();
    let region = Region::map(&file, 0, 0, part_len(size, false), 0).unwrap();
    View::new(Arc::new(region), 0, size, false).unwrap()
}

fn config(name: &str) -> ExportConfig {
    ExportConfig {
        id: name.into(),
        writable: true,
        writethrough: false,
        num_queues: 1,
        queue_size: 256,
        logical_block_size: 512,
        serial: String::new(),
        threads: 1,
        poll_max_ns: 32768,
        on_error: Default::default(),
    }
}

fn allocations(name: &str, node: Value, checked: bool) -> u64 {
    let (graph, state) = (Graph::new(), directory());
    graph.set_state_dir(state.path().to_owned());
    let Value::Object(options) = node else { unreachable!() };
    let node = graph.add(options).unwrap();
    let export = Export::new(&graph, &node, config(name)).unwrap();
    let mut rng = Rng::new(7);
    // The indices wrap around during the warm-up, and once more later.
    let mut guest = Guest::new(65_000);
    export.set_features(FEATURES);
    let mut setup = guest.setup();
    // Tracking may cost nothing here either.
    setup.inflight = Some(fresh_region(setup.size));
    export.start_queue(0, setup).unwrap();
    serve(&mut guest, &mut rng, WARM_UP, checked);
    let count = counted(|| serve(&mut guest, &mut rng, REQUESTS, checked));
    assert_eq!(export.stop_queue(0), Some(guest.avail().into()));
    export.close();
    count
}

/// The same of packed rings, with a guest on a socket: batches of reads and writes.
fn packed_allocations(dir: &Path) -> u64 {
    let graph = Graph::new();
    let options = json!({ "driver": "null-co", "node-name": "n", "size": 1 << 20 });
    let Value::Object(options) = options else { unreachable!() };
    let node = graph.add(options).unwrap();
    let export = Export::new(&graph, &node, config("packed")).unwrap();
    let path = dir.join("s");
    let listener = Endpoint::Listener(UnixListener::bind(&path).unwrap());
    let server = Server::start(listener, export.clone(), "packed".into(), Box::new(|| ())).unwrap();
    let options = Options { packed: true, queue_size: 50, ..Options::default() };
    let mut client = Client::connect(&path, options).unwrap();
    assert!(client.has_feature(34), "not packed");
    let q = client.queue(0);
    let mut run = |batches| {
        for batch in 0..batches {
            for i in 0..40 {
                let write = q.write_request(i, &[1; 4096]).unwrap();
                let request = if batch % 2 == 0 { write } else { q.read_request(i, 4096).unwrap() };
                q.push(request).unwrap();
            }
            q.kick().unwrap();
            assert!(q.wait_all().unwrap().iter().all(|done| done.status == Status::Ok));
        }
    };
    run(500);
    let count = counted(|| run(1000));
    drop((client, server));
    export.close();
    count
}

fn tagged_image(path: &Path) {
    let mut bytes = vec![0; usize::try_from(BLOCKS * u64::from(DATA)).unwrap()];
    for (block, n) in bytes.chunks_mut(DATA as usize).zip(0u64..) {
        block[..8].copy_from_slice(&n.to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

/// One test, because the counter is one.
#[test]
fn the_fast_lane_does_not_allocate() {
    // The counter counts: workers, and nobody else.
    let allocate = |name: &str| {
        let thread = std::thread::Builder::new().name(name.into());
        let run = || drop(std::hint::black_box(vec![1u8; 100]));
        counted(|| thread.spawn(run).unwrap().join().unwrap())
    };
    assert!(allocate("blk-test") >= 1);
    assert_eq!(allocate("other"), 0);

    let null = json!({ "driver": "null-co", "node-name": "n", "size": BLOCKS * u64::from(DATA) });
    assert_eq!(allocations("null", null, false), 0, "null-co");
    let dir = directory();
    assert_eq!(packed_allocations(dir.path()), 0, "packed");
    uring_available().expect("io_uring works here");
    let path = dir.path().join("image");
    for direct in [false, true] {
        tagged_image(&path);
        let before = std::fs::read(&path).unwrap();
        let file = json!({
            "driver": "raw", "node-name": "n", "cache": { "direct": direct },
            "file": { "driver": "file", "filename": path, "aio": "io_uring" },
        });
        assert_eq!(allocations("file", file, true), 0, "file, direct {direct}");
        let image = dir.path().join("image.qcow2");
        let convert = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args([&path, &image])
            .status();
        assert!(convert.unwrap().success());
        let qcow2 = json!({
            "driver": "qcow2", "node-name": "n", "cache": { "direct": direct },
            "file": { "driver": "file", "filename": image, "aio": "io_uring" },
        });
        // Its clusters are allocated, its table is cached after the warm-up.
        assert_eq!(allocations("qcow2", qcow2, true), 0, "qcow2, direct {direct}");
        let check = Command::new("qemu-img").arg("check").arg(&image).output().unwrap();
        assert!(check.status.success(), "{check:?}");
        // Writes wrote what they found there, except for the rest of the slots' memory.
        let after = std::fs::read(&path).unwrap();
        assert_eq!(after.len(), before.len());
        for (n, block) in after.chunks(DATA as usize).enumerate() {
            assert_eq!(block[..8], (n as u64).to_le_bytes(), "block {n}");
        }
    }
}
