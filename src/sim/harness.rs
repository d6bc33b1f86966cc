//! The whole proof in one call: a guest works on the real driver, the power fails at any moment, the driver opens what is
//! left, its own check says what it thinks, and every sector is compared with the model.
//!
//! A driver's tests implement [`Subject`] and call [`run`] for many seeds ([`seeds`]):
//!
//! ```text
//! struct Qcow2;
//! impl Subject for Qcow2 {
//!     fn drivers(&self) -> Drivers { &[&QCOW2, &SIM_DISK] }
//!     fn disks(&self, _: &mut Rng) -> Vec<DiskSpec> { vec![DiskSpec::file("image", formatted())] }
//!     fn options(&self) -> Value { json!({"driver": "qcow2", "file": {"driver": "sim-disk", "disk": "image"}}) }
//!     fn check(&self, node: Arc<Node>, _: Stage) -> CheckFuture { Box::pin(async move { check_image(&node).await }) }
//! }
//!
//! #[test]
//! fn qcow2_never_corrupts() {
//!     harness::seeds("qcow2", Duration::from_secs(5), |seed| harness::run(&Qcow2, &Plan::new(seed)));
//! }
//! ```
//!
//! [`run_faults`] repeats one seed with each single request failing in turn.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use serde_json::Value;

use super::Rng;
use super::history::Crash;
use super::life::Life;
use super::memory::Memory;
use super::model::Tag;
use super::request::{DiskSpec, Fault, Request};
pub use super::seeds::{Failure, Report, seeds};
use super::workload::Workload;
use crate::block::{DriverDef, Node};
use crate::error::Errno;

/// The drivers of a graph.
pub type Drivers = &'static [&'static DriverDef];

/// The answer of a [`Subject::check`]: what is wrong, if anything.
pub type CheckFuture = Pin<Box<dyn Future<Output = Result<(), String>>>>;

/// When a check happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The guest has finished and flushed; the node has not been closed.
    Running,
    /// The image has been opened again after an orderly end of its first life.
    Closed,
    /// The image has been opened again after a crash: leaks are allowed.
    Crashed(Crash),
}

/// What is tested: a driver, an image, how to open it, how to judge it.
pub trait Subject {
    /// The drivers; [`super::SIM_DISK`] among them.
    fn drivers(&self) -> Drivers;

    /// The disks at the start; random features of the image may come from `rng`.
    fn disks(&self, rng: &mut Rng) -> Vec<DiskSpec>;

    /// The options of the root node, without `node-name`.
    fn options(&self) -> Value;

    /// What the guest sees in `sector` at the start.
    fn initial(&self, sector: u64) -> Tag {
        let _ = sector;
        Tag::ZERO
    }

    /// The format's own check of an open image; nobody else uses the node meanwhile.
    fn check(&self, node: Arc<Node>, stage: Stage) -> CheckFuture {
        let _ = (node, stage);
        Box::pin(std::future::ready(Ok(())))
    }

    /// The format's orderly end, after the guest's last request and flush; then the node is dropped.
    fn close(&self, node: Arc<Node>) -> CheckFuture {
        Box::pin(async move { node.close().await.map_err(|e| e.to_string()) })
    }

    /// Whether a write that was complete must survive the death of the process, flushed or not.
    fn survives_kill(&self) -> bool {
        true
    }

    /// Whether there is a directory for what outlives the process ([`Graph::set_state_dir`]).
    fn has_memory(&self) -> bool {
        false
    }
}

/// At which moments the power is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cuts {
    /// Never.
    None,
    /// After each `n`th event, starting at a random one.
    Every(usize),
    /// At this many random moments.
    Random(usize),
}

/// How one seed is run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Everything random comes from it.
    pub seed: u64,
    /// What the guest does.
    pub workload: Workload,
    /// Where to cut.
    pub cuts: Cuts,
    /// How many different disks are judged for each cut: none, all, single writes, all but single ones, random subsets.
    pub outcomes: usize,
    /// How many lives the image has: each goes on with what a crash of the one before has left.
    pub lives: usize,
    /// What goes wrong, on which disk.
    pub fault: Option<(&'static str, Fault)>,
}

impl Plan {
    /// The default guest, ten cuts with four outcomes each, two lives, no faults.
    pub fn new(seed: u64) -> Plan {
        let (workload, cuts) = (Workload::default(), Cuts::Random(10));
        Plan { seed, workload, cuts, outcomes: 4, lives: 2, fault: None }
    }
}

/// Runs one seed.
///
/// # Errors
/// The first thing that is wrong.
pub fn run(subject: &dyn Subject, plan: &Plan) -> Result<Report, Failure> {
    let fail = |what: String| Failure { seed: plan.seed, what };
    let mut rng = Rng::new(plan.seed);
    let mut disks = subject.disks(&mut rng.fork(0));
    let mut report = Report { runs: 1, ..Report::default() };
    let mut content: Option<HashMap<u64, Tag>> = None;
    for life in 0..plan.lives.max(1) {
        let memory = subject.has_memory().then(Memory::new);
        let memory = memory.as_ref();
        let run = Life { subject, plan, content: &content, life, seed: rng.next_u64(), memory };
        let result = run.live(&disks, &mut report);
        let (history, model, kept) = result.map_err(|e| fail(format!("life {life}: {e}")))?;
        let last = run
            .crashes(&disks, (&history, &kept), &model, &mut report)
            .map_err(|e| fail(format!("life {life}: {e}")))?;
        let Some((images, found)) = last else { break };
        content = Some(found);
        for (disk, (_, image)) in disks.iter_mut().zip(images) {
            disk.image = image;
        }
    }
    Ok(report)
}

/// Runs one seed once for each single request of `kinds` on disk `disk`, which fails with `errno`, wholly or (every second
/// one) in part; at most `limit` of each kind, spread over the run.
///
/// # Errors
/// The first thing that is wrong.
///
/// # Panics
/// If there is no such disk.
pub fn run_faults(
    subject: &dyn Subject,
    plan: &Plan,
    (disk, kinds, errno): (&'static str, &[Request], Errno),
    limit: u64,
) -> Result<Report, Failure> {
    let mut report = Report::default();
    let fail = |what: String| Failure { seed: plan.seed, what };
    let mut rng = Rng::new(plan.seed);
    let disks = subject.disks(&mut rng.fork(0));
    let seed = rng.next_u64();
    let run_once = Life { subject, plan, content: &None, life: 0, seed, memory: None };
    let counts = run_once.count(&disks, disk).map_err(fail)?;
    for kind in kinds {
        let count = counts[*kind as usize];
        let stride = count.div_ceil(limit.max(1)).max(1);
        let mut nth = rng.below(stride);
        while nth < count {
            let fault = Fault { request: *kind, nth, times: 1, errno, partial: rng.chance(1, 2) };
            let plan = Plan { fault: Some((disk, fault)), ..*plan };
            report += run(subject, &plan).map_err(|e| Failure {
                what: format!("with {kind:?} number {nth} failing: {}", e.what),
                ..e
            })?;
            nth += stride;
        }
    }
    Ok(report)
}
