//! An export: the root of a graph, offered to a guest as a virtio-blk device with queues served by worker threads.
//!
//! Queue `i` belongs to worker `i % threads`; a worker's thread is made when the first of its queues starts, so queues that
//! nobody uses cost nothing. The control side (a session, the main thread) sends commands and waits for answers; it
//! never touches a running queue itself.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use crate::block::graph::RootUser;
use crate::block::perm::{Perm, Perms};
use crate::block::{Graph, Node, Op};
use crate::err;
use crate::error::{Errno, Result};
use crate::mem::GuestMap;
use crate::rt::{self, Inbox, Mail};
use crate::sandbox::{self, Thread};
use crate::vhost_user::{Device, QueueSetup};
use crate::virtio::blk::{CONFIG_LEN, CONFIG_WCE, Geometry, SECTOR};
use crate::virtio::feature;
use crate::virtio::ring::{Ring, RingAddrs};

mod queue;
mod request;
mod worker;

use queue::Queue;
use request::Doing;
use worker::Command;

/// How often a drain that takes long is reported.
const DRAIN_REPORT: Duration = Duration::from_secs(5);
/// Failed requests are reported at most this often.
const FAILURE_REPORT: Duration = Duration::from_secs(1);

/// What the user chose for an export.
#[derive(Clone, Debug)]
pub struct ExportConfig {
    /// Its id.
    pub id: String,
    /// Guests may write (`writable=on`).
    pub writable: bool,
    /// Every write is stable before it completes (`writethrough=on`).
    pub writethrough: bool,
    /// Queues offered.
    pub num_queues: u16,
    /// The largest ring accepted, in entries.
    pub queue_size: u16,
    /// Bytes, power of two, 512 to 2 MiB.
    pub logical_block_size: u32,
    /// At most 20 bytes.
    pub serial: String,
    /// Worker threads.
    pub threads: usize,
    /// The longest busy wait for the guest, in nanoseconds; 0 = never.
    pub poll_max_ns: u64,
}

/// What the workers share.
struct Shared {
    id: String,
    root: Arc<Node>,
    geometry: Geometry,
    serial: String,
    sectors: AtomicU64,
    writeback: AtomicBool,
    reported: Mutex<Option<Instant>>,
}

impl Shared {
    fn capacity(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Logs a failed request, not more than one a second.
    fn report(&self, doing: &Doing, e: Errno) {
        if self.may_report() {
            let Doing { what, offset, len, .. } = doing;
            let node = self.root.name();
            log::error!(
                "export '{}': node '{node}': {what} of {len} bytes at {offset}: {e}",
                self.id
            );
        }
    }

    /// Logs a request that is none, likewise: a guest must not be able to fill a disk with our log.
    fn report_malformed(&self, queue: u16, why: &str) {
        if self.may_report() {
            log::warn!("export '{}': queue {queue}: malformed request: {why}", self.id);
        }
    }

    fn may_report(&self) -> bool {
        let now = Instant::now();
        let mut last = lock(&self.reported);
        let may = last.is_none_or(|t| now - t >= FAILURE_REPORT);
        if may {
            *last = Some(now);
        }
        may
    }
}

struct Worker {
    inbox: Arc<Inbox>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    workers: Vec<Option<Worker>>,
    running: Vec<bool>,
    /// A queue has run since the last flush of a stopped device.
    unflushed: bool,
    features: u64,
    user: Option<RootUser>,
}

/// A root node, its device configuration and its workers.
pub struct Export {
    shared: Arc<Shared>,
    poll_max_ns: u64,
    graph: Arc<Graph>,
    state: Mutex<State>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder panics")
}

impl Export {
    /// Attaches to `node`, with the permissions that `config` implies.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn new(graph: &Arc<Graph>, node: &Arc<Node>, config: ExportConfig) -> Result<Arc<Export>> {
        if config.writable && node.read_only() {
            return Err(err!("Cannot export read-only node as writable"));
        }
        let mut used = Perm::CONSISTENT_READ;
        used.set(Perm::WRITE, config.writable);
        let perms = Perms { used, shared: Perm::all() };
        let user = graph.attach_root(node, "an unnamed block device", perms)?;
        node.expect_ragged_writes(config.logical_block_size);
        let geometry = Geometry {
            read_only: !config.writable,
            logical_block: config.logical_block_size,
            num_queues: config.num_queues,
            queue_size: config.queue_size,
            limits: node.driver().limits(),
        };
        let shared = Arc::new(Shared {
            id: config.id,
            root: Arc::clone(node),
            geometry,
            serial: config.serial,
            sectors: AtomicU64::new(node.len() / SECTOR),
            writeback: AtomicBool::new(!config.writethrough),
            reported: Mutex::new(None),
        });
        let threads = config.threads.clamp(1, usize::from(config.num_queues));
        let state = State {
            workers: (0..threads).map(|_| None).collect(),
            running: vec![false; config.num_queues.into()],
            unflushed: false,
            features: 0,
            user: Some(user),
        };
        let (graph, state) = (Arc::clone(graph), Mutex::new(state));
        Ok(Arc::new(Export { shared, poll_max_ns: config.poll_max_ns, graph, state }))
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// Stops all queues (drained), ends the workers, flushes the root node and gives up the permissions on it.
    /// Whether everything that was written is stable. Closing again does nothing.
    pub fn close(&self) -> bool {
        if lock(&self.state).user.is_none() {
            return true;
        }
        let count = lock(&self.state).running.len();
        for index in 0..u16::try_from(count).unwrap_or(u16::MAX) {
            self.halt_queue(index);
        }
        let workers: Vec<Worker> =
            lock(&self.state).workers.iter_mut().filter_map(Option::take).collect();
        for worker in workers {
            worker.inbox.post(Mail::Command(Box::new(Command::Quit)));
            if worker.thread.join().is_err() {
                log::error!("export '{}': a worker panicked", self.id());
            }
        }
        let flushed = self.flush_stopped();
        let user = lock(&self.state).user.take();
        if let Some(user) = user {
            self.graph.detach(user);
        }
        flushed
    }

    /// Makes everything stable that was written. Whether that worked; a failure is logged.
    fn flush(&self) -> bool {
        if self.shared.geometry.read_only {
            return true;
        }
        // No descriptors left is an error like any other here.
        let flushed =
            rt::try_block_on(self.shared.root.submit(Op::Flush)).and_then(|result| result);
        if let Err(e) = flushed {
            log::error!("export '{}': flush: {e}", self.id());
        }
        flushed.is_ok()
    }

    /// [`Export::flush`], with no queue running: not again, if it worked and none has run since.
    fn flush_stopped(&self) -> bool {
        let flushed = !lock(&self.state).unflushed || self.flush();
        lock(&self.state).unflushed = !flushed;
        flushed
    }

    /// Stops a queue (drained). Its next available index, if it was running.
    fn halt_queue(&self, index: u16) -> Option<u16> {
        let running = lock(&self.state).running.get(usize::from(index)).copied()?;
        let next =
            if running { self.command(index, |answer| Command::Stop(index, answer)) } else { None };
        lock(&self.state).running[usize::from(index)] = false;
        next
    }

    /// The mailbox of the worker that serves queue `index`; started if `start`.
    fn worker(&self, index: u16, start: bool) -> std::result::Result<Option<Arc<Inbox>>, Errno> {
        let mut state = lock(&self.state);
        let at = usize::from(index) % state.workers.len();
        let place = &mut state.workers[at];
        if place.is_none() && start {
            *place = Some(self.spawn_worker(at)?);
        }
        Ok(place.as_ref().map(|w| Arc::clone(&w.inbox)))
    }

    fn spawn_worker(&self, at: usize) -> std::result::Result<Worker, Errno> {
        let (ready, wait) = sync_channel(1);
        let (poll_max_ns, grace) = (self.poll_max_ns, Arc::clone(self.graph.grace()));
        let thread = std::thread::Builder::new().name(format!("blk-{}-{at}", self.id())).spawn(
            move || {
                sandbox::thread(Thread::Worker);
                worker::run(poll_max_ns, &grace, &ready);
            },
        )?;
        let inbox = wait.recv().map_err(|_| Errno::EIO)??;
        Ok(Worker { inbox, thread })
    }

    /// Sends a command to the worker of queue `index` and waits until it has been carried out. `None`: no such worker.
    fn command<T>(&self, index: u16, make: impl FnOnce(SyncSender<T>) -> Command) -> Option<T> {
        let inbox = self.worker(index, false).ok().flatten()?;
        self.send(&inbox, make, &format!("queue {index}"))
    }

    fn send<T>(
        &self,
        to: &Inbox,
        make: impl FnOnce(SyncSender<T>) -> Command,
        what: &str,
    ) -> Option<T> {
        let (answer, wait): (_, Receiver<T>) = sync_channel(1);
        to.post(Mail::Command(Box::new(make(answer))));
        let start = Instant::now();
        loop {
            match wait.recv_timeout(DRAIN_REPORT) {
                Ok(value) => return Some(value),
                Err(RecvTimeoutError::Disconnected) => return None,
                // Answering early would let the guest reuse memory that the disk still writes to.
                Err(RecvTimeoutError::Timeout) => {
                    let waited = start.elapsed().as_secs();
                    log::warn!("export '{}': {what}: requests in flight for {waited} s", self.id());
                }
            }
        }
    }
}

impl Device for Export {
    fn features(&self) -> u64 {
        self.shared.geometry.features()
    }

    fn num_queues(&self) -> u16 {
        self.shared.geometry.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.shared.geometry.queue_size
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        let config = self.shared.geometry.config(self.shared.capacity(), self.shared.writeback());
        for (i, byte) in to.iter_mut().enumerate() {
            *byte = config.get(offset.saturating_add(i)).copied().unwrap_or(0);
        }
        debug_assert_eq!(config.len(), CONFIG_LEN);
    }

    fn write_config(&self, offset: usize, from: &[u8]) {
        let wce = CONFIG_WCE.checked_sub(offset).and_then(|at| from.get(at));
        if let Some(wce) = wce {
            let writeback = wce & 1 != 0;
            if self.shared.writeback.swap(writeback, Ordering::SeqCst) && !writeback {
                // What completed before may be volatile; from now on the driver will not flush.
                self.flush();
            }
            log::info!(
                "export '{}': cache is write-{}",
                self.id(),
                if writeback { "back" } else { "through" }
            );
        }
    }

    fn set_features(&self, acked: u64) {
        lock(&self.state).features = acked;
    }

    fn start_queue(&self, index: u16, setup: QueueSetup) -> std::result::Result<(), Errno> {
        let running = lock(&self.state).running.get(usize::from(index)).copied();
        if running != Some(false) || setup.size > self.max_queue_size() {
            return Err(Errno::EINVAL);
        }
        let addrs = RingAddrs { desc: setup.desc, avail: setup.avail, used: setup.used };
        let ring = Ring::new(setup.map, addrs, setup.size, setup.base, setup.features)?;
        let write_through = setup.features & feature(VIRTIO_BLK_F_FLUSH) == 0;
        if write_through && index == 0 && !self.shared.geometry.read_only {
            log::info!(
                "export '{}': the driver cannot flush: every write is made stable",
                self.id()
            );
        }
        let fds = [setup.kick, setup.call, setup.err];
        let queue = Box::new(Queue::new(index, Arc::clone(&self.shared), ring, fds, write_through));
        let inbox = self.worker(index, true)?.ok_or(Errno::EIO)?;
        self.send(&inbox, |done| Command::Start(queue, done), "start");
        let mut state = lock(&self.state);
        state.running[usize::from(index)] = true;
        state.unflushed = true;
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> Option<u16> {
        let next = self.halt_queue(index);
        // The guest has reset its driver, moves to another host, or is gone: what it has not flushed may stay unflushed
        // for ever.
        if !lock(&self.state).running.contains(&true) {
            self.flush_stopped();
        }
        next
    }

    fn set_call(&self, index: u16, call: Option<OwnedFd>) {
        self.command(index, |done| Command::SetCall(index, call, done));
    }

    fn set_err(&self, index: u16, err: Option<OwnedFd>) {
        self.command(index, |done| Command::SetErr(index, err, done));
    }

    fn set_memory(&self, map: Arc<GuestMap>, drain: bool) {
        let inboxes: Vec<Arc<Inbox>> =
            lock(&self.state).workers.iter().flatten().map(|w| Arc::clone(&w.inbox)).collect();
        for inbox in inboxes {
            let map = Arc::clone(&map);
            self.send(&inbox, |done| Command::SetMemory(map, drain, done), "memory change");
        }
    }

    fn disconnected(&self) {
        // `writeback` stays as the driver set it: a guest that comes back (or reads the configuration anew) sees what is true.
        self.set_features(0);
        self.flush_stopped();
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.close();
    }
}
