//! qcow2 under power cuts, faults, full disks, and with deliberate mistakes.
#![forbid(unsafe_code)]

mod image;
mod resize;
mod slow;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use image::{DRIVERS, Frozen, Image, Lines, Setup, frozen_content};
use serde_json::Value;
use vhost_user_blk::block::drivers::qcow2::check::{self, Fix};
use vhost_user_blk::block::drivers::qcow2::header::Incompatible;
use vhost_user_blk::block::drivers::qcow2::write::mutation::{self, Mutation};
use vhost_user_blk::block::{Node, Op};
use vhost_user_blk::error::Errno;
use vhost_user_blk::mem::Sg;
use vhost_user_blk::rt::Buffer;
use vhost_user_blk::sim::harness::{
    self, CheckFuture, Cuts, Drivers, Failure, Plan, Report, Stage, Subject,
};
use vhost_user_blk::sim::{DiskSpec, Mix, Request, Rng, Tag, Workload};

/// An image of one seed.
struct Qcow2 {
    setup: Setup,
    specs: Vec<DiskSpec>,
    content: HashMap<u64, Tag>,
    frozen: Option<Arc<Frozen>>,
    /// A raw data file must show what the guest sees: not while requests overlap, whose order need not be the same in both.
    same_bytes: bool,
}

impl Qcow2 {
    fn new(setup: Setup, plan: &Plan) -> Result<Qcow2, String> {
        let Image { specs, content, frozen } = setup.build(plan.seed)?;
        let alone = plan.workload.queues * plan.workload.depth == 1;
        let same_bytes = setup.data_file == Some(true) && alone;
        Ok(Qcow2 { setup, specs, content, frozen: frozen.map(Arc::new), same_bytes })
    }
}

impl Subject for Qcow2 {
    fn drivers(&self) -> Drivers {
        DRIVERS
    }

    fn disks(&self, _: &mut Rng) -> Vec<DiskSpec> {
        self.specs.clone()
    }

    fn options(&self) -> Value {
        self.setup.node()
    }

    fn initial(&self, sector: u64) -> Tag {
        self.content.get(&sector).copied().unwrap_or(Tag::ZERO)
    }

    fn check(&self, node: Arc<Node>, stage: Stage) -> CheckFuture {
        let raw = self.same_bytes && stage == Stage::Closed;
        let frozen = self.frozen.clone();
        Box::pin(async move {
            judge(&node, stage).await?;
            if let Some(frozen) = frozen {
                let now = frozen_content(Arc::clone(&node.driver().edges()[0].node)).await?;
                if now != *frozen {
                    let differs = frozen.iter().find(|(k, v)| now.get(k) != Some(v));
                    return Err(format!("the snapshot has changed: {differs:?}, or has grown"));
                }
            }
            if raw {
                same_bytes(&node, &node.driver().edges()[1].node).await?;
            }
            Ok(())
        })
    }

    /// The tables are in memory only until a flush; their journal outlives the process.
    fn has_memory(&self) -> bool {
        true
    }
}

/// What the format's own check says.
async fn judge(node: &Node, stage: Stage) -> Result<(), String> {
    let file = &node.driver().edges()[0].node;
    let header = check::read_header(file).await.map_err(|e| e.to_string())?;
    if header.incompatible.contains(Incompatible::CORRUPT) {
        return Err("the image is marked as corrupt".to_owned());
    }
    let dirty = header.incompatible.contains(Incompatible::DIRTY);
    if dirty && stage == Stage::Running {
        // Refcounts are written at the end.
        return Ok(());
    }
    let mut lines = Lines::default();
    let report = check::check(file, &header, Fix::Nothing, &mut lines).await;
    let report = report.map_err(|e| format!("{e}: {:?}", lines.0))?;
    let bad = report.corruptions + report.check_errors > 0 || dirty;
    if bad || (stage == Stage::Closed && report.leaks > 0) {
        return Err(format!("dirty: {dirty}, {report:?}: {:#?}", lines.0));
    }
    Ok(())
}

/// A raw data file alone shows what the guest sees.
async fn same_bytes(a: &Node, b: &Node) -> Result<(), String> {
    let mut both = [a, b].map(|_| Buffer::new(a.len() as usize, 4096));
    for (node, buffer) in [a, b].into_iter().zip(&mut both) {
        let iov = [buffer.iovec()];
        let read = node.submit(Op::Read { offset: 0, to: Sg::new(&iov) }).await;
        read.map_err(|e| e.to_string())?;
    }
    let differs = both[0].bytes().iter().zip(both[1].bytes()).position(|(a, b)| a != b);
    differs.map_or(Ok(()), |at| Err(format!("the raw data file differs at byte {at}")))
}

/// How one seed is to be: an image and a guest.
type Shape = fn(&mut Setup, &mut Plan, &mut Rng);

fn anything(_: &mut Setup, _: &mut Plan, _: &mut Rng) {}

fn prepared(seed: u64, shape: Shape) -> (Setup, Plan) {
    let mut rng = Rng::new(seed).fork(99);
    let mut setup = Setup::random(&mut rng);
    let cluster = setup.cluster() / 512;
    let mut plan = Plan::new(seed);
    plan.workload = Workload {
        queues: 1 + rng.index(4),
        depth: 1 + rng.index(4),
        operations: 80,
        cluster,
        longest: (cluster * 4).clamp(16, 300),
        hot_spots: 1 + rng.index(4),
        fast: [0, 8, 16][rng.index(3)],
        ..Workload::default()
    };
    plan.cuts = Cuts::Random(6);
    shape(&mut setup, &mut plan, &mut rng);
    let setup = setup.consistent();
    plan.workload.cluster = setup.cluster() / 512;
    plan.workload.sectors = setup.sectors;
    plan.workload.discard_zeroes = setup.discard_zeroes();
    (setup, plan)
}

type Run = fn(&Qcow2, &Plan) -> Result<Report, Failure>;

/// One seed, on a thread of its own: what it leaves behind in a panic goes with it.
fn one(seed: u64, shape: Shape, mistake: Option<Mutation>, run: Run) -> Result<Report, Failure> {
    let work = move || {
        let (setup, plan) = prepared(seed, shape);
        let subject = Qcow2::new(setup.clone(), &plan);
        let fail = |what| Failure { seed, what: format!("{what}\n{setup:?}\n{:?}", plan.workload) };
        let subject = subject.map_err(|e| fail(format!("building: {e}")))?;
        mutation::set(mistake);
        run(&subject, &plan).map_err(|e| fail(e.what))
    };
    std::thread::spawn(work).join().unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        let (setup, plan) = prepared(seed, shape);
        let what = format!("panic: {}\n{setup:?}\n{:?}", text.unwrap_or_default(), plan.workload);
        Err(Failure { seed, what })
    })
}

fn cut(subject: &Qcow2, plan: &Plan) -> Result<Report, Failure> {
    harness::run(subject, plan)
}

#[test]
fn qcow2_keeps_every_promise() {
    harness::seeds("qcow2", Duration::from_secs(6), |seed| one(seed, anything, None, cut));
}

/// Any request fails, once; with room for the flush to be tried again.
fn faults(subject: &Qcow2, plan: &Plan) -> Result<Report, Failure> {
    let plan = &Plan { cuts: Cuts::Random(1), outcomes: 2, lives: 1, ..*plan };
    let errno = if plan.seed.is_multiple_of(2) { Errno::EIO } else { Errno::ENOSPC };
    let mut report = harness::run_faults(subject, plan, ("image", &Request::ALL, errno), 3)?;
    if subject.setup.data_file.is_some() {
        report += harness::run_faults(subject, plan, ("data", &Request::ALL, errno), 2)?;
    }
    Ok(report)
}

fn small(_: &mut Setup, plan: &mut Plan, _: &mut Rng) {
    plan.workload.operations = 50;
}

#[test]
fn faults_lose_nothing_else() {
    harness::seeds("qcow2 with faults", Duration::from_secs(5), |seed| {
        one(seed, small, None, faults)
    });
}

/// Every boundary of a short run.
fn boundaries(subject: &Qcow2, plan: &Plan) -> Result<Report, Failure> {
    harness::run(subject, &Plan { cuts: Cuts::Every(1), outcomes: 4, lives: 1, ..*plan })
}

#[test]
fn every_boundary() {
    let short: Shape = |_, plan, _| plan.workload.operations = 30;
    harness::seeds("qcow2 at every boundary", Duration::from_secs(4), |seed| {
        one(seed, short, None, boundaries)
    });
}

/// Little room: writes fail, discards make room, writes go on.
fn full(setup: &mut Setup, plan: &mut Plan, rng: &mut Rng) {
    setup.room = Some(setup.cluster() * rng.below(30) + (rng.below(3) << 12));
    setup.data_file = None;
    setup.preallocated = false;
    // A repair may need room for new refcount blocks.
    setup.lazy = false;
    setup.options.retain(|(name, _)| *name != "discard-no-unref");
    if setup.device {
        // The image is built in this room, too.
        (setup.aged, setup.snapshot) = (0, false);
    }
    plan.workload.full = true;
    plan.workload.mix.discard = 30;
    plan.workload.operations = 120;
}

#[test]
fn a_full_disk() {
    harness::seeds("qcow2 on a full disk", Duration::from_secs(4), |seed| {
        one(seed, full, None, cut)
    });
}

/// A refcount block for every 64 clusters of 512 bytes: there is a new one with nearly every flush.
fn growing(setup: &mut Setup, plan: &mut Plan, rng: &mut Rng) {
    (setup.version, setup.cluster_bits, setup.refcount_bits) = (3, 9, 64);
    (setup.extended_l2, setup.lazy, setup.preallocated) = (false, false, false);
    (setup.data_file, setup.backing, setup.snapshot) = (None, None, false);
    (setup.aged, setup.sectors, setup.device, setup.room) = (rng.below(3), 1024, false, None);
    let mix = Mix { read: 5, write: 80, write_fua: 5, zeroes: 2, discard: 2, flush: 20 };
    plan.workload.mix = mix;
    (plan.workload.operations, plan.workload.longest) = (40, 100);
    plan.cuts = Cuts::Random(15);
}

/// So much data that the refcount table, 64 entries for 64 clusters each, becomes too short and moves.
fn moving(setup: &mut Setup, plan: &mut Plan, rng: &mut Rng) {
    growing(setup, plan, rng);
    // 4096 clusters, less those of refcount blocks and L2 tables.
    (setup.sectors, setup.aged, setup.filled) = (6000, 500, Some(3900 - rng.below(50)));
    setup.options.clear();
    (plan.workload.operations, plan.workload.longest, plan.lives) = (6, 200, 1);
    plan.workload.hot_spots = 8;
    (plan.cuts, plan.outcomes) = (Cuts::Every(2), 5);
    (plan.workload.queues, plan.workload.depth) = (1, 2);
    plan.workload.mix = Mix { read: 0, write: 50, write_fua: 0, zeroes: 0, discard: 0, flush: 40 };
}

/// With an external data file.
fn external(setup: &mut Setup, _: &mut Plan, rng: &mut Rng) {
    (setup.version, setup.data_file) = (3, Some(rng.chance(1, 2)));
}

/// Many writes that must be stable.
fn stable(_: &mut Setup, plan: &mut Plan, _: &mut Rng) {
    plan.workload.mix = Mix { write_fua: 50, flush: 3, ..Mix::default() };
    plan.workload.hot_spots = 1;
}

/// What is freed is soon used again.
fn crowded(setup: &mut Setup, plan: &mut Plan, rng: &mut Rng) {
    full(setup, plan, rng);
    setup.device = false;
    setup.room = Some(setup.cluster() * (20 + rng.below(20)) + (64 << 10));
    plan.workload.mix.flush = 25;
}

/// Much is zeroed, and little flushed.
fn discarding(setup: &mut Setup, plan: &mut Plan, _: &mut Rng) {
    setup.version = 3;
    plan.workload.mix = Mix { zeroes: 60, discard: 20, flush: 2, ..Mix::default() };
}

/// Where each deliberate mistake is looked for.
const PLANS: [(Mutation, Shape, Run); 23] = [
    (Mutation::NoFlushBeforeL2, anything, cut),
    (Mutation::RefcountsLast, anything, cut),
    (Mutation::NoFlushBeforeReftable, growing, cut),
    (Mutation::NoFlushBeforeHeader, moving, cut),
    (Mutation::NoLastFlush, anything, cut),
    (Mutation::LiveSlices, anything, cut),
    (Mutation::FailedFlushForgets, anything, faults),
    (Mutation::JoinRunningFlush, anything, cut),
    (Mutation::ReuseBeforeFlush, anything, cut),
    (Mutation::ReuseInUse, anything, cut),
    (Mutation::IgnoreBusy, anything, cut),
    (Mutation::LinkBeforeData, anything, cut),
    (Mutation::NoCopyOnWrite, anything, cut),
    (Mutation::NoZeroedTable, anything, cut),
    (Mutation::NoTableCopy, anything, cut),
    (Mutation::NoFlushForFua, anything, cut),
    (Mutation::NoDirtyBit, anything, cut),
    (Mutation::LinkFailedWrites, anything, faults),
    (Mutation::NoDataFileFlush, external, cut),
    (Mutation::FuaOfDataOnly, stable, cut),
    (Mutation::FreedByRunningFlush, crowded, cut),
    (Mutation::UnloggedDiscards, discarding, cut),
    (Mutation::ForgetFirst, anything, cut),
];

/// Each mistake is found within this many seeds.
const SEEDS: u64 = 200;

#[test]
fn every_mistake_is_found() {
    // Nobody dies between two instructions here: the journal's own tests find the last one.
    let here = Mutation::ALL.into_iter().filter(|mistake| *mistake != Mutation::TailFirst);
    assert!(PLANS.iter().map(|(mistake, ..)| *mistake).eq(here), "each has a plan");
    // For whoever works on one of them.
    let only = std::env::var("VUB_MISTAKE").ok();
    let (next, missed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let search = || {
        while let Some((mistake, shape, run)) = PLANS.get(next.fetch_add(1, Ordering::Relaxed)) {
            if only.as_ref().is_some_and(|name| *name != format!("{mistake:?}")) {
                continue;
            }
            let found = (1..=SEEDS)
                .find_map(|seed| Some((seed, one(seed, *shape, Some(*mistake), *run).err()?)));
            match found {
                Some((seed, failure)) => {
                    let what = failure.what.lines().next().unwrap_or_default();
                    println!("{mistake:?}: seed {seed}: {what}");
                }
                None => missed.lock().unwrap().push(*mistake),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(search);
        }
    });
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "not found in {SEEDS} seeds: {missed:?}");
}

/// Without a mistake the same plans pass.
#[test]
fn the_same_plans_without_mistakes() {
    let shapes: [(&str, Shape, Run); 5] = [
        ("growing", growing, cut),
        ("moving", moving, cut),
        ("external", external, cut),
        ("stable", stable, cut),
        ("crowded", crowded, cut),
    ];
    for (name, shape, run) in shapes {
        harness::seeds(name, Duration::from_secs(2), |seed| one(seed, shape, None, run));
    }
}
