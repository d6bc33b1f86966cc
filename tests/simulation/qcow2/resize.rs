//! Disks that become longer at random moments of a guest's work, under power cuts and faults.
//!
//! A filter above the image makes it longer before every so many requests, and writes what it was told is done to a log of its own,
//! stably: so after a crash the image may not be shorter than the log says.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use vhost_user_blk::block::drivers::qcow2::QCOW2;
use vhost_user_blk::block::drivers::raw::RAW;
use vhost_user_blk::block::perm::{ChildPermQuery, Perm, Perms, default_child_perms};
use vhost_user_blk::block::{
    Driver, DriverDef, DriverKind, Edge, IoFuture, Limits, Node, Op, OpenArgs, Recognises, Role,
    WriteFlags,
};
use vhost_user_blk::error::{Errno, Result as ControlResult};
use vhost_user_blk::mem::Sg;
use vhost_user_blk::rt::Buffer;
use vhost_user_blk::rt::sync::RangeLock;
use vhost_user_blk::sim::harness::{
    self, CheckFuture, Cuts, Drivers, Failure, Plan, Report, Stage, Subject,
};
use vhost_user_blk::sim::{DiskSpec, Pages, Request, Rng, SIM_DISK, Tag};

use super::image::Setup;
use super::{Qcow2, judge, prepared};

static GROWS: DriverDef = DriverDef {
    name: "grows",
    kind: DriverKind::Filter,
    options: &[],
    open,
    recognises: Recognises::Nothing,
    child_perms,
};

fn child_perms(query: &ChildPermQuery) -> Perms {
    let mut perms = default_child_perms(query);
    if !query.read_only {
        perms.used |= Perm::RESIZE | Perm::WRITE;
    }
    perms
}

/// Of all threads.
static TOTAL: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

thread_local! {
    /// How often disks of this thread have become longer, and failed to.
    static GROWN: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

struct Grows {
    /// The image; the log.
    edges: [Edge; 2],
    every: u64,
    step: u64,
    requests: std::sync::atomic::AtomicU64,
    one: RangeLock,
}

fn open(args: &mut OpenArgs<'_>) -> ControlResult<Box<dyn Driver>> {
    let number = |text: Option<String>| text.and_then(|n| n.parse().ok()).unwrap_or(1);
    let every = number(args.take_str("every")?);
    let step = number(args.take_str("step")?);
    let edges = [args.open_child("file", Role::Filtered)?, args.open_child("log", Role::File)?];
    let (requests, one) = (Default::default(), RangeLock::default());
    Ok(Box::new(Grows { edges, every, step, requests, one }))
}

impl Grows {
    async fn grow(&self) {
        let _one = self.one.lock(0..1, true).await;
        let [image, log] = [0, 1].map(|n| &*self.edges[n].node);
        let (old, len) = (image.len(), image.len() + self.step);
        let (done, failed) = GROWN.get();
        if image.truncate(len).await.is_err() {
            assert_eq!(image.len(), old, "a failed resize");
            GROWN.set((done, failed + 1));
            return;
        }
        assert_eq!(image.len(), len);
        GROWN.set((done + 1, failed));
        let mut buffer = Buffer::new(512, 4096);
        buffer.bytes_mut()[..8].copy_from_slice(&len.to_be_bytes());
        let iov = [buffer.iovec()];
        let op = Op::Write { offset: 0, from: Sg::new(&iov), flags: WriteFlags::FUA };
        log.submit(op).await.expect("the log has no faults");
    }
}

impl Driver for Grows {
    fn edges(&self) -> &[Edge] {
        &self.edges
    }

    fn len(&self) -> u64 {
        self.edges[0].node.len()
    }

    fn limits(&self) -> Limits {
        self.edges[0].node.driver().limits()
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        let n = self.requests.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let changes = !matches!(op, Op::Read { .. });
        Box::pin(async move {
            if changes && n % self.every == 1 % self.every {
                self.grow().await;
            }
            self.edges[0].node.submit(op).await
        })
    }

    fn is_stable(&self) -> bool {
        false
    }

    fn options_in_force(&self) -> vhost_user_blk::qapi::Options {
        Default::default()
    }

    fn close(&self) -> IoFuture<'_> {
        self.edges[0].node.driver().close()
    }
}

/// An image that grows.
struct Growing {
    image: Qcow2,
    every: u64,
    step: u64,
    size: u64,
}

impl Subject for Growing {
    fn drivers(&self) -> Drivers {
        static DRIVERS: Drivers = &[&GROWS, &QCOW2, &RAW, &SIM_DISK];
        DRIVERS
    }

    fn disks(&self, rng: &mut Rng) -> Vec<DiskSpec> {
        let mut disks = self.image.disks(rng);
        disks.push(DiskSpec::file("log", Pages::zeroed(4096)));
        disks
    }

    fn options(&self) -> Value {
        json!({
            "driver": "grows", "every": self.every.to_string(), "step": self.step.to_string(),
            "discard": "unmap", "file": self.image.options(),
            "log": {"driver": "sim-disk", "disk": "log"},
        })
    }

    fn initial(&self, sector: u64) -> Tag {
        self.image.initial(sector)
    }

    fn check(&self, node: Arc<Node>, stage: Stage) -> CheckFuture {
        let (size, step) = (self.size, self.step);
        Box::pin(async move {
            let [image, log] = [0, 1].map(|n| Arc::clone(&node.driver().edges()[n].node));
            judge(&image, stage).await?;
            let told = read(&log, 0, 512).await?;
            let told = told.first_chunk().map_or(0, |b| u64::from_be_bytes(*b));
            let len = image.len();
            if len < told.max(size) || !(len - size).is_multiple_of(step) {
                return Err(format!("{len} bytes long, {told} was promised, began with {size}"));
            }
            let added = read(&image, size, (len - size) as usize).await?;
            match added.iter().position(|b| *b != 0) {
                Some(at) => Err(format!("not zero at {at} of {} bytes behind {size}", len - size)),
                None => Ok(()),
            }
        })
    }

    fn has_memory(&self) -> bool {
        true
    }
}

async fn read(node: &Node, offset: u64, len: usize) -> Result<Vec<u8>, String> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let buffer = Buffer::new(len, 4096);
    let iov = [buffer.iovec()];
    let read = node.submit(Op::Read { offset, to: Sg::new(&iov) }).await;
    read.map_err(|e| format!("reading {len} bytes at {offset}: {e}"))?;
    Ok(buffer.bytes().to_vec())
}

/// One seed, with small clusters so that the table moves.
fn one(seed: u64, run: fn(&Growing, &Plan) -> Result<Report, Failure>) -> Result<Report, Failure> {
    let work = move || {
        let (mut setup, mut plan) = prepared(seed, |setup, plan, rng| {
            setup.cluster_bits = [9, 9, 10, 12][rng.index(4)];
            setup.extended_l2 = false;
            // Its own tests know when there is room, and which requests may fail.
            (setup.device, setup.room) = (false, None);
            plan.workload.operations = 60;
            plan.workload.fast = 0;
            plan.cuts = Cuts::Random(10);
        });
        if setup.version < 3 {
            setup.snapshot = false;
        }
        let mut rng = Rng::new(seed).fork(5);
        let step = 512 * [1, 9, 200, 4000][rng.index(4)];
        let growing = |setup: Setup, plan: &Plan| -> Result<Growing, String> {
            let size = setup.sectors * 512;
            let image = Qcow2::new(setup, plan)?;
            Ok(Growing { image, every: 8, step, size })
        };
        plan.workload.cluster = setup.cluster() / 512;
        let subject = growing(setup.clone(), &plan);
        let fail = |what| Failure { seed, what: format!("{what}\n{setup:?}\nstep {step}") };
        let subject = subject.map_err(|e| fail(format!("building: {e}")))?;
        let report = run(&subject, &plan).map_err(|e| fail(e.what))?;
        Ok((report, GROWN.get()))
    };
    let joined = std::thread::spawn(work).join();
    let (report, (done, failed)) = joined.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        let text = text.unwrap_or_default();
        Err(Failure { seed, what: format!("panic: {text}") })
    })?;
    TOTAL.fetch_add(done, std::sync::atomic::Ordering::Relaxed);
    println!("seed {seed}: longer {done} times, {failed} failed");
    Ok(report)
}

#[test]
fn longer_at_any_moment() {
    harness::seeds("qcow2 that grows", Duration::from_secs(3), |seed| {
        one(seed, |subject, plan| harness::run(subject, plan))
    });
    assert_ne!(TOTAL.load(std::sync::atomic::Ordering::Relaxed), 0, "nothing has become longer");
}

/// Any request fails, once: the disk goes on with its old length, and nothing is lost.
#[test]
fn longer_with_faults() {
    harness::seeds("qcow2 that grows with faults", Duration::from_secs(4), |seed| {
        one(seed, |subject, plan| {
            let plan = &Plan { cuts: Cuts::Random(1), outcomes: 2, lives: 1, ..*plan };
            let errno = if plan.seed.is_multiple_of(2) { Errno::EIO } else { Errno::ENOSPC };
            harness::run_faults(subject, plan, ("image", &Request::ALL, errno), 4)
        })
    });
}

/// Every boundary of a short run.
#[test]
fn longer_at_every_boundary() {
    harness::seeds("qcow2 that grows at every boundary", Duration::from_secs(3), |seed| {
        one(seed, |subject, plan| {
            let mut plan = Plan { cuts: Cuts::Every(1), outcomes: 4, lives: 1, ..*plan };
            plan.workload.operations = 16;
            harness::run(subject, &plan)
        })
    });
}
