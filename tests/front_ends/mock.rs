//! A device that does nothing but write down, in order, what is done to it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use vhost_user_blk::error::Errno;
use vhost_user_blk::mem::{GuestMap, RingLog};
use vhost_user_blk::vhost_user::{Device, QueueSetup};

/// What the mock offers: SEG_MAX, BLK_SIZE, FLUSH, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES, INDIRECT_DESC, EVENT_IDX,
/// VERSION_1.
pub const FEATURES: u64 =
    1 << 2 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 3 << 28 | 1 << 32;

/// The longest that any test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct State {
    calls: VecDeque<String>,
    running: BTreeMap<u16, QueueSetup>,
    /// How far each ring gets before it is stopped.
    progress: BTreeMap<u16, u16>,
    /// Requests are in flight: stop_queue waits.
    busy: bool,
    violations: Vec<String>,
}

pub struct Mock {
    queues: u16,
    state: Mutex<State>,
    /// What happens when the configuration has just been read.
    on_read: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    changed: Condvar,
}

impl Mock {
    pub fn new(queues: u16) -> Self {
        Mock { queues, state: Mutex::default(), on_read: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn record(&self, call: String) {
        self.state().calls.push_back(call);
        self.changed.notify_all();
    }

    /// The next call; fails the test if none comes.
    pub fn next_call(&self) -> String {
        let (mut state, timeout) = self
            .changed
            .wait_timeout_while(self.state(), PATIENCE, |s| s.calls.is_empty())
            .unwrap();
        assert!(!timeout.timed_out(), "the device was not called");
        state.calls.pop_front().unwrap()
    }

    /// The next calls are these.
    #[track_caller]
    pub fn expect(&self, calls: &[&str]) {
        for call in calls {
            assert_eq!(self.next_call(), *call);
        }
    }

    /// All calls that nobody has looked at yet.
    pub fn rest(&self) -> Vec<String> {
        self.state().calls.drain(..).collect()
    }

    /// Waits until the front end is gone; answers the calls up to there.
    pub fn until_gone(&self) -> Vec<String> {
        let mut calls = Vec::new();
        while calls.last().is_none_or(|c| c != "gone") {
            calls.push(self.next_call());
        }
        calls
    }

    /// The ring takes `n` requests before it is stopped.
    pub fn set_progress(&self, queue: u16, n: u16) {
        self.state().progress.insert(queue, n);
    }

    /// Whether requests are in flight that a stop has to wait for.
    pub fn set_busy(&self, busy: bool) {
        self.state().busy = busy;
        self.changed.notify_all();
    }

    /// Has `f` happen when the configuration has been read, but not been answered.
    pub fn on_config_read(&self, f: impl FnOnce() + Send + 'static) {
        *self.on_read.lock().unwrap() = Some(Box::new(f));
    }

    /// The number of rings that run.
    pub fn running(&self) -> usize {
        self.state().running.len()
    }

    /// The configuration space's byte at `i`.
    pub fn config_byte(i: usize) -> u8 {
        u8::try_from((i * 7 + 1) % 256).unwrap()
    }

    /// What the session did that it must never do.
    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    fn check(&self, holds: bool, what: &str) {
        if !holds {
            self.state().violations.push(what.into());
        }
    }
}

fn lies_in(map: &GuestMap, s: &QueueSetup) -> bool {
    let n = u64::from(s.size);
    let parts = [(s.desc, 16 * n, 16), (s.avail, 6 + 2 * n, 2), (s.used, 6 + 8 * n, 4)];
    parts.iter().all(|(at, len, align)| map.translate_user(*at, *len, *align).is_some())
}

impl Device for Mock {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn num_queues(&self) -> u16 {
        self.queues
    }

    fn max_queue_size(&self) -> u16 {
        1024
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        for (i, byte) in to.iter_mut().enumerate() {
            *byte = Mock::config_byte(offset + i);
        }
        let happens = self.on_read.lock().unwrap().take();
        happens.into_iter().for_each(|f| f());
    }

    fn write_config(&self, offset: usize, from: &[u8]) {
        let bytes: String = from.iter().map(|b| format!("{b:02x}")).collect();
        self.record(format!("config {offset} {bytes}"));
    }

    fn set_features(&self, acked: u64) {
        self.check(acked & 1 << 30 == 0, "bit 30 is vhost-user's own");
        self.record(format!("features {acked:#x}"));
    }

    fn start_queue(&self, index: u16, setup: QueueSetup) -> Result<(), Errno> {
        let has = |fd: bool, name: &str| if fd { format!(" {name}") } else { String::new() };
        let call = format!(
            "start {index} base={} size={}{}{}{}{}{}",
            setup.base,
            setup.size,
            has(setup.kick.is_some(), "kick"),
            has(setup.call.is_some(), "call"),
            has(setup.err.is_some(), "err"),
            has(setup.inflight.is_some(), "inflight"),
            has(setup.log.is_some(), "log"),
        );
        self.check(setup.features & 1 << 30 == 0, "bit 30 is vhost-user's own");
        self.check(lies_in(&setup.map, &setup), "started with a ring outside of memory");
        let old = self.state().running.insert(index, setup);
        self.check(old.is_none(), "started twice");
        self.record(call);
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> Option<u32> {
        if self.state().busy {
            self.record(format!("draining {index}"));
            let idle = self.changed.wait_timeout_while(self.state(), PATIENCE, |s| s.busy);
            let timeout = idle.unwrap().1;
            self.check(!timeout.timed_out(), "nobody ended the drain");
        }
        let mut state = self.state();
        let setup = state.running.remove(&index);
        let progress = state.progress.remove(&index).unwrap_or(0);
        drop(state);
        self.record(format!("stop {index}"));
        setup.map(|s| u16::try_from(s.base).expect("split").wrapping_add(progress).into())
    }

    fn suspend_queue(&self, index: u16) -> Option<u32> {
        let mut state = self.state();
        let setup = state.running.remove(&index);
        let progress = state.progress.remove(&index).unwrap_or(0);
        drop(state);
        self.record(format!("suspend {index}"));
        setup.map(|s| u16::try_from(s.base).expect("split").wrapping_add(progress).into())
    }

    fn set_call(&self, index: u16, call: Option<std::os::fd::OwnedFd>) {
        self.check(self.state().running.contains_key(&index), "set_call on a stopped ring");
        self.record(format!("call {index} {}", call.is_some()));
    }

    fn set_err(&self, index: u16, err: Option<std::os::fd::OwnedFd>) {
        self.check(self.state().running.contains_key(&index), "set_err on a stopped ring");
        self.record(format!("err {index} {}", err.is_some()));
    }

    fn set_log(&self, index: u16, log: Option<RingLog>) {
        self.check(self.state().running.contains_key(&index), "set_log on a stopped ring");
        let used = |l: &RingLog| l.used.map_or("none".into(), |at| format!("{at:#x}"));
        let describe = |l: RingLog| format!("data={} used={}", l.data, used(&l));
        self.record(format!("log {index} {}", log.map_or("off".into(), describe)));
    }

    fn set_memory(&self, map: Arc<GuestMap>, drain: bool) {
        let mut state = self.state();
        let inside = state.running.values().all(|s| lies_in(&map, s));
        for setup in state.running.values_mut() {
            setup.map = Arc::clone(&map);
        }
        drop(state);
        self.check(inside, "a running ring lost its memory");
        self.record(format!("memory {} drain={drain}", map.regions().len()));
    }

    fn disconnected(&self) {
        self.check(self.state().running.is_empty(), "rings run without a front end");
        self.record("gone".into());
    }
}
