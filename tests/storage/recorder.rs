//! A filter that records what reaches the disk and what is made stable, and builds the disk as it may be after the host has
//! lost power at any moment.
//!
//! What the record knows of each write is when it was sent and when it was done. After a cut it is there for sure if it was
//! done before a flush was sent that was done before the cut; otherwise all of it, none of it, or any of its sectors are.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};

use vhost_user_blk::block::drivers::file::FILE;
use vhost_user_blk::block::drivers::qcow2::QCOW2;
use vhost_user_blk::block::drivers::raw::RAW;
use vhost_user_blk::block::perm::default_child_perms;
use vhost_user_blk::block::{
    Driver, DriverDef, DriverKind, Edge, IoFuture, Limits, Node, Op, OpenArgs, Recognises, Role,
    WriteFlags, ZeroFlags,
};
use vhost_user_blk::error::{Errno, Result};
use vhost_user_blk::qapi::{Kind, OptionSpec, Options};

use crate::common::Random;

/// The drivers of a graph that is recorded.
pub static DRIVERS: &[&DriverDef] = &[&FILE, &QCOW2, &RAW, &RECORDER];

/// One request. Times are numbers of events.
struct Sent {
    /// Without data it only makes the file reach to `offset`.
    offset: usize,
    data: Vec<u8>,
    flush: bool,
    fua: bool,
    sent: usize,
    done: Option<usize>,
}

#[derive(Default)]
struct Record {
    events: usize,
    requests: Vec<Sent>,
}

/// What was recorded.
#[derive(Default)]
pub struct Recorder(Mutex<Record>);

static RECORDERS: LazyLock<Mutex<HashMap<String, Arc<Recorder>>>> = LazyLock::new(Mutex::default);

impl Recorder {
    /// For the node whose option `key` is this.
    pub fn new(key: &str) -> Arc<Recorder> {
        let recorder = Arc::new(Recorder::default());
        RECORDERS.lock().unwrap().insert(key.into(), Arc::clone(&recorder));
        recorder
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap()
    }

    /// The time.
    pub fn now(&self) -> usize {
        self.lock().events
    }

    /// How many flushes were done.
    pub fn flushes(&self) -> usize {
        self.lock().requests.iter().filter(|r| r.flush && r.done.is_some()).count()
    }

    fn send(&self, offset: u64, data: Vec<u8>, flush: bool, fua: bool) -> usize {
        let mut record = self.lock();
        record.events += 1;
        let (sent, offset) = (record.events, usize::try_from(offset).unwrap());
        record.requests.push(Sent { offset, data, flush, fua, sent, done: None });
        record.requests.len() - 1
    }

    fn done(&self, index: usize) {
        let mut record = self.lock();
        record.events += 1;
        record.requests[index].done = Some(record.events);
    }

    /// What was `start` in the beginning, after a power cut at `cut`.
    pub fn cut(&self, start: &[u8], cut: usize, random: &mut Random) -> Vec<u8> {
        let record = self.lock();
        let before = |time: Option<usize>| time.is_some_and(|t| t <= cut);
        let flushes = record.requests.iter().filter(|r| r.flush && before(r.done));
        let stable_since = flushes.map(|r| r.sent).max().unwrap_or(0);
        let mut disk = start.to_vec();
        for r in record.requests.iter().filter(|r| !r.flush && r.sent <= cut) {
            let stable = r.done.is_some_and(|t| t < stable_since) || r.fua && before(r.done);
            let fate = if stable { 0 } else { random.below(3) };
            let mut put = |at: usize, data: &[u8]| {
                let end = at + data.len();
                disk.resize(disk.len().max(end), 0);
                disk[at..end].copy_from_slice(data);
            };
            match fate {
                0 => put(r.offset, &r.data),
                1 => {}
                _ => {
                    for (n, sector) in r.data.chunks(512).enumerate() {
                        if random.below(2) == 0 {
                            put(r.offset + n * 512, sector);
                        }
                    }
                }
            }
        }
        disk
    }
}

struct Filter {
    edges: [Edge; 1],
    recorder: Arc<Recorder>,
}

static RECORDER: DriverDef = DriverDef {
    name: "recorder",
    kind: DriverKind::Filter,
    options: &[
        OptionSpec::required("file", Kind::BlockdevRef),
        OptionSpec::required("key", Kind::Str),
    ],
    open,
    recognises: Recognises::Nothing,
    child_perms: default_child_perms,
};

fn open(args: &mut OpenArgs<'_>) -> Result<Box<dyn Driver>> {
    let key = args.take_str("key")?.unwrap_or_default();
    let recorder = RECORDERS.lock().unwrap().remove(&key).expect("the test made it");
    Ok(Box::new(Filter { edges: [args.open_child("file", Role::Filtered)?], recorder }))
}

impl Filter {
    fn child(&self) -> &Node {
        &self.edges[0].node
    }

    async fn serve(&self, op: Op<'_>) -> std::result::Result<(), Errno> {
        let zeroes = |len: u64| vec![0; usize::try_from(len).unwrap()];
        let index = match op {
            Op::Read { .. } => return self.child().submit(op).await,
            Op::Write { offset, from, flags } => {
                let mut data = vec![0; from.len()];
                from.copy_to(&mut data);
                self.recorder.send(offset, data, false, flags.contains(WriteFlags::FUA))
            }
            Op::WriteZeroes { offset, len, flags } => {
                self.recorder.send(offset, zeroes(len), false, flags.contains(ZeroFlags::FUA))
            }
            // A file forgets at once what it is told to forget.
            Op::Discard { offset, len } => self.recorder.send(offset, zeroes(len), false, false),
            Op::Flush => self.recorder.send(0, Vec::new(), true, false),
        };
        // Who sent it may go on only when it is recorded as done.
        let result = self.child().submit(op).await;
        result.inspect(|()| self.recorder.done(index))
    }

    /// The file gets longer, which is as stable as a write.
    async fn grow(&self, end: u64, growing: IoFuture<'_>) -> std::result::Result<(), Errno> {
        let index = self.recorder.send(end, Vec::new(), false, false);
        let result = growing.await;
        result.inspect(|()| self.recorder.done(index))
    }
}

impl Driver for Filter {
    fn edges(&self) -> &[Edge] {
        &self.edges
    }

    fn len(&self) -> u64 {
        self.child().driver().len()
    }

    fn grows(&self) -> bool {
        self.child().driver().grows()
    }

    fn limits(&self) -> Limits {
        Limits { request_align: 1, mem_align: 1, ..self.child().driver().limits() }
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        Box::pin(self.serve(op))
    }

    fn truncate(&self, len: u64) -> IoFuture<'_> {
        assert!(len >= self.len(), "only the orderly end cuts a file, and that is not recorded");
        Box::pin(self.grow(len, Box::pin(self.child().truncate(len))))
    }

    fn preallocate(&self, offset: u64, len: u64) -> IoFuture<'_> {
        let end = self.len().max(offset + len);
        Box::pin(self.grow(end, self.child().driver().preallocate(offset, len)))
    }

    fn options_in_force(&self) -> Options {
        Options::new()
    }
}
