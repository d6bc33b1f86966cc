//! A driver for tests: bytes in memory, a log of what was asked, a gate that holds completions back, and failures on demand.
//!
//! With `fast`, reads of it are located in a pipe ([`Probe::pour`] lets them complete): a request of the fast lane that
//! stays in the kernel for as long as a test wants. With `in-place`, writes of it are located in a file of their own, with
//! `jammed`, in a full pipe, until [`Probe::drain`].

use std::collections::HashMap;
use std::future::poll_fn;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard};
use std::task::{Poll, Waker};

use serde_json::json;
use vhost_user_blk::block::perm::default_child_perms;
use vhost_user_blk::block::{
    Dir, Driver, DriverDef, DriverKind, Graph, IoFuture, Limits, Map, Op, OpenArgs, WriteFlags,
};
use vhost_user_blk::error::{Errno, Result};
use vhost_user_blk::export::ExportConfig;
use vhost_user_blk::qapi::{Kind, OptionSpec, Options};
use vhost_user_blk::rt;

use super::{Disk, LIMIT, add};

/// What was asked of the driver, when it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Offset and length.
    Read(u64, u64),
    /// Offset, length, whether it must be stable.
    Write(u64, u64, bool),
    /// Offset and length.
    Zeroes(u64, u64),
    /// Offset and length.
    Discard(u64, u64),
    Flush,
}

#[derive(Default)]
struct State {
    data: Vec<u8>,
    log: Vec<Asked>,
    closed: bool,
    held: usize,
    waiting: Vec<Waker>,
    flush_error: Option<Errno>,
}

/// A probe's state, for the test and for the driver.
#[derive(Default)]
pub struct Probe {
    state: Mutex<State>,
    changed: Condvar,
    unstable: AtomicBool,
    pipe: Mutex<Option<std::io::PipeWriter>>,
    jam: Mutex<Option<std::io::PipeReader>>,
}

/// What fits into a pipe, in bytes.
const JAM: usize = 64 << 10;

static PROBES: LazyLock<Mutex<HashMap<String, Arc<Probe>>>> = LazyLock::new(Mutex::default);

impl Probe {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A graph with a probe of `size` bytes called `root`, which options may be added to, and the probe.
    pub fn graph(size: usize, more: serde_json::Value) -> (Arc<Graph>, Arc<Probe>) {
        let probe = Arc::new(Probe::default());
        probe.lock().data = vec![0; size];
        let key = format!("{:p}", Arc::as_ptr(&probe));
        PROBES.lock().unwrap().insert(key.clone(), probe.clone());
        let graph = Graph::with_drivers(DRIVERS);
        let mut options = json!({"driver": "probe", "node-name": "root", "key": key});
        let serde_json::Value::Object(more) = more else { panic!("options are an object") };
        options.as_object_mut().unwrap().extend(more);
        add(&graph, options);
        (graph, probe)
    }

    /// A served probe of 1 MiB.
    pub fn disk(config: ExportConfig) -> (Disk, Arc<Probe>) {
        let (graph, probe) = Probe::graph(1 << 20, json!({"discard": "unmap"}));
        (Disk::serve(graph, "root", config), probe)
    }

    /// A served probe whose reads are in the kernel until [`Probe::pour`].
    pub fn piped(config: ExportConfig) -> (Disk, Arc<Probe>) {
        let (graph, probe) = Probe::graph(1 << 20, json!({"fast": true}));
        (Disk::serve(graph, "root", config), probe)
    }

    /// From now on nothing completes.
    pub fn hold(&self) {
        self.lock().closed = true;
    }

    /// Everything held completes, and what comes completes at once.
    pub fn release(&self) {
        let mut state = self.lock();
        state.closed = false;
        state.waiting.drain(..).for_each(Waker::wake);
    }

    /// Lets reads of `len` bytes complete.
    pub fn pour(&self, bytes: &[u8]) {
        self.pipe.lock().unwrap().as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// Lets writes of `len` bytes together, that are in the full pipe, complete.
    pub fn drain(&self, len: usize) {
        let mut bytes = vec![0; JAM + len];
        self.jam.lock().unwrap().as_mut().unwrap().read_exact(&mut bytes).unwrap();
    }

    /// How many are held.
    pub fn held(&self) -> usize {
        self.lock().held
    }

    /// Waits until `n` are held.
    pub fn wait_held(&self, n: usize) {
        let state = self.lock();
        let (state, late) = self.changed.wait_timeout_while(state, LIMIT, |s| s.held < n).unwrap();
        assert!(!late.timed_out(), "only {} of {n} requests came", state.held);
    }

    /// What was asked since the last call.
    pub fn take_log(&self) -> Vec<Asked> {
        std::mem::take(&mut self.lock().log)
    }

    /// From now on flushes answer this.
    pub fn fail_flushes(&self, error: Option<Errno>) {
        self.lock().flush_error = error;
    }

    /// From now on metadata waits in memory, or does not.
    pub fn set_unstable(&self, unstable: bool) {
        self.unstable.store(unstable, Ordering::Relaxed);
    }

    /// The bytes at `offset`.
    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.lock().data[offset..offset + len].to_vec()
    }

    async fn pass(&self) {
        let mut counted = false;
        poll_fn(|cx| {
            let mut state = self.lock();
            if !state.closed {
                state.held -= usize::from(counted);
                return Poll::Ready(());
            }
            if !counted {
                state.held += 1;
                counted = true;
                self.changed.notify_all();
            }
            state.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    async fn serve(&self, op: Op<'_>) -> std::result::Result<(), Errno> {
        let asked = match op {
            Op::Read { offset, to } => Asked::Read(offset, to.len() as u64),
            Op::Write { offset, from, flags } => {
                Asked::Write(offset, from.len() as u64, flags.contains(WriteFlags::FUA))
            }
            Op::WriteZeroes { offset, len, .. } => Asked::Zeroes(offset, len),
            Op::Discard { offset, len } => Asked::Discard(offset, len),
            Op::Flush => Asked::Flush,
        };
        self.lock().log.push(asked);
        self.pass().await;
        let mut state = self.lock();
        let range = |offset: u64, len: u64| {
            let at = usize::try_from(offset).unwrap();
            at..at + usize::try_from(len).unwrap()
        };
        match op {
            Op::Read { offset, to } => {
                to.copy_from(&state.data[range(offset, to.len() as u64)]);
            }
            Op::Write { offset, from, .. } => {
                from.copy_to(&mut state.data[range(offset, from.len() as u64)]);
            }
            Op::WriteZeroes { offset, len, .. } | Op::Discard { offset, len } => {
                state.data[range(offset, len)].fill(0);
            }
            Op::Flush => return state.flush_error.map_or(Ok(()), Err),
        }
        Ok(())
    }
}

/// Lets everything through when it is dropped: a test that fails must not leave a device that can never drain.
pub struct Opener(pub Arc<Probe>);

impl Drop for Opener {
    fn drop(&mut self) {
        self.0.release();
        drop(self.0.pipe.lock().map(|mut pipe| pipe.take()));
        drop(self.0.jam.lock().map(|mut jam| jam.take()));
    }
}

struct Node {
    probe: Arc<Probe>,
    pipe: Option<rt::File>,
    /// Where writes are located, with `in-place` or `jammed`.
    scratch: Option<rt::File>,
}

static DRIVERS: &[&DriverDef] = &[&PROBE];

static PROBE: DriverDef = DriverDef {
    name: "probe",
    kind: DriverKind::Protocol,
    options: &[
        OptionSpec::required("key", Kind::Str),
        OptionSpec::optional("fast", Kind::Bool),
        OptionSpec::optional("in-place", Kind::Bool),
        OptionSpec::optional("jammed", Kind::Bool),
    ],
    open,
    recognises: vhost_user_blk::block::Recognises::Nothing,
    child_perms: default_child_perms,
};

fn open(args: &mut OpenArgs<'_>) -> Result<Box<dyn Driver>> {
    let key = args.take_str("key")?.unwrap_or_default();
    let probe = PROBES.lock().unwrap().remove(&key).expect("the test made it");
    let pipe = args.take_bool("fast")?.unwrap_or(false).then(|| {
        let (reader, writer) = std::io::pipe().unwrap();
        *probe.pipe.lock().unwrap() = Some(writer);
        rt::File::new(OwnedFd::from(reader), rt::Engine::IoUring, 1, 1)
    });
    let scratch = args.take_bool("in-place")?.unwrap_or(false).then(|| {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        rt::File::new(file, rt::Engine::Threads, 1, 1)
    });
    let jam = args.take_bool("jammed")?.unwrap_or(false).then(|| {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&[0; JAM]).unwrap();
        *probe.jam.lock().unwrap() = Some(reader);
        // Not on the spot: requests must be whole blocks.
        rt::File::new(OwnedFd::from(writer), rt::Engine::IoUring, 512, 1)
    });
    Ok(Box::new(Node { probe, pipe, scratch: scratch.or(jam) }))
}

impl Driver for Node {
    fn len(&self) -> u64 {
        self.probe.lock().data.len() as u64
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn map(&self, dir: Dir, offset: u64, _len: u64) -> Map<'_> {
        match (dir, &self.pipe, &self.scratch) {
            (Dir::Read, Some(file), _) | (Dir::Write, _, Some(file)) => Map::File { file, offset },
            _ => Map::Slow,
        }
    }

    fn is_stable(&self) -> bool {
        !self.probe.unstable.load(Ordering::Relaxed)
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        Box::pin(self.probe.serve(op))
    }

    fn options_in_force(&self) -> Options {
        Options::new()
    }
}
