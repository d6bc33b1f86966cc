//! An export: the root of a graph, offered to a guest as a virtio-blk device with queues served by worker threads.
//!
//! Queue `i` belongs to worker `i % threads`; a worker's thread is made when the first of its queues starts, so queues that
//! nobody uses cost nothing. The control side (a session, the main thread) sends commands and waits for answers; it
//! never touches a running queue itself.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::block::graph::RootUser;
use crate::block::{Graph, Node, Op, Opener};
use crate::error::{Errno, Result};
use crate::metrics::ExportMeter;
use crate::rt::{self, Inbox, Mail};
use crate::sandbox::{self, Thread};
use crate::virtio::blk::{Geometry, SECTOR};

mod active;
mod cache;
mod device;
mod policy;
mod queue;
pub mod request;
mod resize;
mod worker;

use active::Activation;
use cache::Cache;
use policy::Reports;
pub use policy::{OnError, OnErrors};
use queue::Stop;
use request::Doing;
use worker::Command;
#[cfg(feature = "bench")]
#[doc(hidden)]
pub use worker::hand_turned::HandTurned;

/// How often a drain that takes long is reported.
const DRAIN_REPORT: Duration = Duration::from_secs(5);

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
    /// What becomes of requests that fail (`rerror`, `werror`).
    pub on_error: OnErrors,
}

/// What the workers share.
struct Shared {
    id: String,
    /// The root's node-name.
    node: String,
    geometry: Geometry,
    serial: String,
    sectors: AtomicU64,
    cache: Cache,
    on_error: OnErrors,
    reports: Mutex<Reports>,
    /// Queues that keep requests which failed.
    holding: AtomicU32,
    meter: Arc<ExportMeter>,
}

impl Shared {
    fn capacity(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    fn writeback(&self) -> bool {
        self.cache.writeback()
    }

    /// The guest sends a flush to this process.
    #[inline]
    fn guest_flushes(&self) {
        if self.cache.flushed() {
            log::info!("export '{}': the guest flushes: its cache is write-back", self.id);
        }
    }

    /// Logs a failed request, once: see [`Reports`].
    fn report(&self, doing: &Doing, e: Errno) {
        if let Some(more) = self.may_report(doing.what, e) {
            log::error!("{}{}", self.describe(doing, e), left_out(more));
        }
    }

    /// Logs that a queue waits because a request failed.
    fn report_stop(&self, queue: u16, doing: &Doing, e: Errno) {
        if let Some(more) = self.may_report("stop", e) {
            let failed = self.describe(doing, e);
            log::error!("{failed}: queue {queue} waits for it to work{}", left_out(more));
            lock(&self.reports).waits(queue);
        }
    }

    /// Logs that it takes requests again, if it was logged that it did not.
    fn report_resume(&self, queue: u16) {
        if lock(&self.reports).goes_on(queue) {
            log::warn!("export '{}': queue {queue} goes on", self.id);
        }
    }

    fn describe(&self, Doing { what, offset, len, .. }: &Doing, e: Errno) -> String {
        let (id, node) = (&self.id, &self.node);
        format!("export '{id}': node '{node}': {what} of {len} bytes at {offset}: {e}")
    }

    /// Logs a request that is none, likewise: a guest must not be able to fill a disk with our log.
    fn report_malformed(&self, queue: u16, why: &str) {
        if let Some(more) = self.may_report("malformed", Errno(0)) {
            let more = left_out(more);
            log::warn!("export '{}': queue {queue}: malformed request: {why}{more}", self.id);
        }
    }

    fn may_report(&self, what: &'static str, e: Errno) -> Option<u64> {
        lock(&self.reports).may(Instant::now(), what, e)
    }
}

/// Behind a report: how many were left out before it.
fn left_out(more: u64) -> String {
    if more == 0 { String::new() } else { format!(" (and {more} more since the last report)") }
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
    /// The use of the root; none while the export is inactive.
    user: Option<RootUser>,
    closed: bool,
}

/// A root node, its device configuration and its workers.
pub struct Export {
    shared: Arc<Shared>,
    poll_max_ns: u64,
    activation: Activation,
    state: Mutex<State>,
    me: Weak<Export>,
    /// The length in bytes of a medium that has become shorter, as reported; `u64::MAX`: none.
    shrunk: AtomicU64,
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
        let user = active::attach(graph, node, config.writable, config.logical_block_size)?;
        let activation = Activation::new(Opener::of(graph, node), false);
        Ok(Export::make(node, config, activation, Some(user)))
    }

    /// An export whose nodes are closed until [`Export::activate`]; with `auto`, they are open only while rings run. `probe` is
    /// the root as it is now, opened by somebody else: what the device looks like until then.
    pub fn inactive(opener: Opener, probe: &Node, config: ExportConfig, auto: bool) -> Arc<Export> {
        Export::make(probe, config, Activation::new(opener, auto), None)
    }

    fn make(
        node: &Node,
        config: ExportConfig,
        activation: Activation,
        user: Option<RootUser>,
    ) -> Arc<Export> {
        let geometry = Geometry {
            read_only: !config.writable,
            logical_block: config.logical_block_size,
            num_queues: config.num_queues,
            queue_size: config.queue_size,
            limits: node.driver().limits(),
        };
        let threads = config.threads.clamp(1, usize::from(config.num_queues));
        let queues = usize::from(config.num_queues);
        let meter = Arc::new(ExportMeter::new(&config.id, node.name(), queues, threads));
        activation.graph().meters().add_export(&meter);
        let shared = Arc::new(Shared {
            id: config.id,
            node: node.name().to_owned(),
            geometry,
            serial: config.serial,
            sectors: AtomicU64::new(node.len() / SECTOR),
            cache: Cache::new(!config.writethrough),
            on_error: config.on_error,
            reports: Mutex::default(),
            holding: AtomicU32::new(0),
            meter,
        });
        let state = State {
            workers: (0..threads).map(|_| None).collect(),
            running: vec![false; config.num_queues.into()],
            user,
            ..State::default()
        };
        let (poll_max_ns, state) = (config.poll_max_ns, Mutex::new(state));
        Arc::new_cyclic(|me| Export {
            shared,
            poll_max_ns,
            activation,
            state,
            me: me.clone(),
            shrunk: AtomicU64::new(u64::MAX),
        })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// Stops all queues (drained), ends the workers, flushes the root node and gives up the permissions on it.
    /// Whether everything that was written is stable. Closing again does nothing.
    pub fn close(&self) -> bool {
        // A queue that is being started runs before, or never.
        let turn = lock(&self.activation.turn);
        if std::mem::replace(&mut lock(&self.state).closed, true) {
            return true;
        }
        let count = lock(&self.state).running.len();
        let all: Vec<u16> = (0..u16::try_from(count).unwrap_or(u16::MAX)).collect();
        drop(turn);
        self.halt_queues(&all, Stop::Leave);
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
        drop(user);
        flushed
    }

    /// Tries again the requests that failed and wait (`rerror=stop`, `werror=stop`): somebody has seen to the storage.
    pub fn resume(&self) {
        for inbox in self.inboxes() {
            self.send(&inbox, Command::Resume, "resume");
        }
    }

    /// Whether requests that failed wait: the guest would see them fail if its queues stopped now.
    pub fn is_holding(&self) -> bool {
        self.shared.holding.load(Ordering::Relaxed) > 0
    }

    fn inboxes(&self) -> Vec<Arc<Inbox>> {
        lock(&self.state).workers.iter().flatten().map(|w| Arc::clone(&w.inbox)).collect()
    }

    /// Makes everything stable that was written. Whether that worked; a failure is logged.
    fn flush(&self) -> bool {
        // Nothing is left to flush when it becomes inactive.
        let root = self.root().filter(|_| !self.shared.geometry.read_only);
        let Some(root) = root else { return true };
        // No descriptors left is an error like any other here.
        let flushed = rt::try_block_on(root.submit(Op::Flush)).and_then(|result| result);
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

    /// Stops queues, at the same time. Where each ring would go on, if it was running.
    fn halt_queues(&self, indexes: &[u16], how: Stop) -> Vec<Option<u32>> {
        let stop = |index: u16| {
            let running = lock(&self.state).running.get(usize::from(index)).copied()?;
            let inbox = if running { self.worker(index, false).ok().flatten() } else { None };
            Some((index, Export::post(&*inbox?, |answer| Command::Stop(index, how, answer))))
        };
        let stopping: Vec<_> = indexes.iter().map(|index| stop(*index)).collect();
        let wait = |(index, wait)| self.wait(&wait, &format!("queue {index}"));
        let stopped = stopping.into_iter().map(|one| one.and_then(wait)).collect();
        let mut state = lock(&self.state);
        for index in indexes {
            if let Some(running) = state.running.get_mut(usize::from(*index)) {
                *running = false;
            }
        }
        stopped
    }

    /// [`Export::halt_queues`], and a flush after the last one.
    fn end_queues(&self, indexes: &[u16], how: Stop) -> Vec<Option<u32>> {
        let next = self.halt_queues(indexes, how);
        // The guest has reset its driver, moves to another host, or is gone: what it has not flushed may stay unflushed
        // for ever.
        if !lock(&self.state).running.contains(&true) {
            self.flush_stopped();
        }
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
        let (poll_max_ns, grace) = (self.poll_max_ns, Arc::clone(self.activation.graph().grace()));
        let meter = self.shared.meter.worker(at);
        let thread = std::thread::Builder::new().name(format!("blk-{}-{at}", self.id())).spawn(
            move || {
                sandbox::thread(Thread::Worker);
                worker::run(poll_max_ns, &grace, meter, &ready);
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
        self.wait(&Export::post(to, make), what)
    }

    fn post<T>(to: &Inbox, make: impl FnOnce(SyncSender<T>) -> Command) -> Receiver<T> {
        let (answer, wait) = sync_channel(1);
        to.post(Mail::Command(Box::new(make(answer))));
        wait
    }

    fn wait<T>(&self, wait: &Receiver<T>, what: &str) -> Option<T> {
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

impl Drop for Export {
    fn drop(&mut self) {
        self.close();
    }
}
