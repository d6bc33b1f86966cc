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

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::Value;

use super::disk::{DiskSpec, Fault, KINDS, Request};
use super::history::{Crash, History, Replay, Survivors};
use super::memory::{Kept, Memory};
use super::model::{Model, Tag, tag_of};
pub use super::seeds::{Failure, Report, seeds};
use super::workload::{Guest, Workload, read};
use super::{Pages, Rng, Sim};
use crate::block::node::SECTOR;
use crate::block::perm::Perms;
use crate::block::{DriverDef, Graph, Node, Op, RootUser};
use crate::error::Errno;

/// The drivers of a graph.
pub type Drivers = &'static [&'static DriverDef];

/// The answer of a [`Subject::check`]: what is wrong, if anything.
pub type CheckFuture = Pin<Box<dyn Future<Output = Result<(), String>>>>;

/// Sectors that are compared around each one that was touched.
const AROUND: u64 = 16;
/// The largest read of a comparison, in sectors.
const READ_MAX: u64 = 2048;

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

/// An open image, with the permissions that an export has.
struct Opened {
    graph: Arc<Graph>,
    user: RootUser,
}

impl Opened {
    fn new(subject: &dyn Subject, memory: Option<&Memory>) -> Result<Opened, String> {
        let graph = Graph::with_drivers(subject.drivers());
        if let Some(memory) = memory {
            graph.set_state_dir(memory.dir());
        }
        let Value::Object(mut options) = subject.options() else {
            return Err("the options are an object".to_owned());
        };
        options.insert("node-name".to_owned(), Value::from("root"));
        let node = graph.add(options).map_err(|e| format!("opening: {e}"))?;
        let user = graph.attach_root(&node, "the guest", Perms::device(true));
        let user = user.map_err(|e| format!("attaching: {e}"))?;
        node.expect_ragged_writes(SECTOR as u32);
        Ok(Opened { graph, user })
    }

    fn node(&self) -> Arc<Node> {
        Arc::clone(self.user.node())
    }

    fn close(self) {
        self.graph.close();
        self.graph.detach(self.user);
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

/// One life of an image: a guest's work, then all the ways in which it may have ended.
struct Life<'a> {
    subject: &'a dyn Subject,
    plan: &'a Plan,
    content: &'a Option<HashMap<u64, Tag>>,
    life: usize,
    seed: u64,
    memory: Option<&'a Memory>,
}

/// What was read: first sectors and bytes.
type Found = Vec<(u64, Vec<u8>)>;

/// The disks after the last crash, and what the guest finds on them.
type Legacy = (Vec<(String, Pages)>, HashMap<u64, Tag>);

impl Life<'_> {
    /// Whether requests may fail: only the first life has faults.
    fn faulty(&self) -> bool {
        self.plan.fault.is_some() && self.life == 0
    }

    fn world(&self, disks: &[DiskSpec]) -> Rc<Sim> {
        let sim = Rc::new(Sim::new(self.seed));
        disks.iter().for_each(|disk| sim.add_disk(disk.clone()));
        if let Some((disk, fault)) = self.plan.fault.filter(|_| self.faulty()) {
            sim.fail(disk, fault);
        }
        sim
    }

    fn model(&self) -> Model {
        let known = self.content.clone().unwrap_or_default();
        let mut initial = HashMap::new();
        // The model's first content must be known to a function that outlives this borrow of the subject.
        for sector in 0..self.plan.workload.sectors {
            let tag = known.get(&sector).copied();
            initial.insert(sector, tag.unwrap_or_else(|| self.subject.initial(sector)));
        }
        let initial = move |sector| initial.get(&sector).copied().unwrap_or(Tag::ZERO);
        Model::new(Box::new(initial), self.life as u64)
    }

    /// How many requests of each kind disk `disk` gets in a run without faults.
    fn count(&self, disks: &[DiskSpec], disk: &str) -> Result<[u64; KINDS], String> {
        let plan = Plan { fault: None, ..*self.plan };
        let quiet = Life { plan: &plan, ..*self };
        let sim = quiet.world(disks);
        quiet.work(&sim).map(drop)?;
        Ok(sim.counts(disk))
    }

    /// The guest at work, to the end.
    fn live(
        &self,
        disks: &[DiskSpec],
        report: &mut Report,
    ) -> Result<(History, Rc<RefCell<Model>>, Kept), String> {
        let sim = self.world(disks);
        let (model, kept) = self.work(&sim)?;
        let history = sim.take_history();
        report.operations += model.borrow().len() as u64;
        report.events += history.len() as u64;
        report.changed_in_flight += sim.changed_in_flight();
        report.trace ^= sim.trace();
        Ok((history, model, kept))
    }

    fn work(&self, sim: &Rc<Sim>) -> Result<(Rc<RefCell<Model>>, Kept), String> {
        let faults = self.faulty();
        if let Some(memory) = self.memory {
            memory.watch(sim);
        }
        let opened = match Opened::new(self.subject, self.memory) {
            Ok(opened) => opened,
            Err(_) if faults => return Ok((Rc::new(RefCell::new(self.model())), Kept::default())),
            Err(e) => return Err(e),
        };
        let node = opened.node();
        let model = Rc::new(RefCell::new(self.model()));
        let rng = Rng::new(self.seed).fork(3);
        let workload = self.plan.workload;
        let entrance = (node.clone(), Arc::clone(opened.graph.grace()));
        let guest = Guest::new(entrance, sim.clone(), model.clone(), workload, faults, rng);
        let done = sim.run(guest.run()).map_err(|e| e.to_string())?;
        done.map_err(|violation| format!("at work: {violation}"))?;
        self.last_flush(sim, &node, &model)?;
        if !faults {
            self.judge(sim, &node, Stage::Running)?;
        }
        // The end takes it away, and adds no records.
        let kept = self.memory.map(Memory::keep);
        let close = sim.run(self.subject.close(node.clone())).map_err(|e| e.to_string())?;
        drop(node);
        opened.close();
        let kept = self.memory.zip(kept).map(|(memory, kept)| memory.complete(kept));
        let done = (model, kept.unwrap_or_default());
        match close {
            Err(e) if !faults => Err(format!("closing: {e}")),
            Ok(()) if !faults => self.after_close(sim, &done.0).map(|()| done),
            _ => Ok(done),
        }
    }

    /// The image is opened again after its orderly end: nothing is lost, nothing is left over.
    fn after_close(&self, sim: &Sim, model: &Rc<RefCell<Model>>) -> Result<(), String> {
        let again = Sim::new(self.seed);
        sim.specs().into_iter().for_each(|disk| again.add_disk(disk));
        let opened = Opened::new(self.subject, self.memory);
        let opened = opened.map_err(|e| format!("after the end: {e}"))?;
        let node = opened.node();
        // Later lives begin with what a crash has left over.
        let stage = if self.life == 0 { Stage::Closed } else { Stage::Crashed(Crash::Power) };
        self.judge(&again, &node, stage)?;
        let found = self.read_all(&again, &node, &model.borrow())?;
        let (now, model) = (sim.tick(), model.borrow());
        let seen = found.iter().map(|(start, bytes)| model.check_read(*start, bytes, now, now));
        let seen = seen.collect::<Result<(), _>>();
        seen.map_err(|violation| format!("after the end: {violation}"))?;
        drop(node);
        opened.close();
        Ok(())
    }

    /// The guest flushes once more and reads everything.
    fn last_flush(
        &self,
        sim: &Rc<Sim>,
        node: &Arc<Node>,
        model: &Rc<RefCell<Model>>,
    ) -> Result<(), String> {
        let number = model.borrow_mut().begin_flush(sim.tick());
        let flushed = Arc::clone(node);
        let result = sim.run(async move { flushed.submit(Op::Flush).await });
        let result = result.map_err(|e| e.to_string())?;
        model.borrow_mut().end_flush(number, result.is_ok(), sim.tick());
        if let (Err(errno), false) = (result, self.faulty()) {
            return Err(format!("the last flush failed: {errno}"));
        }
        let found = self.read_all(sim, node, &model.borrow());
        let found = match found {
            // A fault that has not happened yet, or that fenced the node.
            Err(_) if self.faulty() => return Ok(()),
            found => found?,
        };
        let now = sim.tick();
        let model = model.borrow();
        let seen = found.iter().map(|(start, bytes)| model.check_read(*start, bytes, now, now));
        seen.collect::<Result<(), _>>().map_err(|violation| format!("at rest: {violation}"))
    }

    fn judge(&self, sim: &Sim, node: &Arc<Node>, stage: Stage) -> Result<(), String> {
        let verdict = sim.run(self.subject.check(Arc::clone(node), stage));
        let verdict = verdict.map_err(|e| format!("checking ({stage:?}): {e}"))?;
        verdict.map_err(|e| format!("check ({stage:?}): {e}"))
    }

    /// All that the guest has touched, and what is around it: (first sector, bytes).
    fn read_all(&self, sim: &Sim, node: &Arc<Node>, model: &Model) -> Result<Found, String> {
        let node = Arc::clone(node);
        let ranges = model.touched(AROUND, self.plan.workload.sectors);
        let reading = async move {
            let mut found = Vec::new();
            for range in ranges {
                let mut at = range.start;
                while at < range.end {
                    let n = READ_MAX.min(range.end - at);
                    let (buffer, result) = read(&node, at, n).await;
                    result.map_err(|e| format!("reading sectors {at}+{n}: {e}"))?;
                    found.push((at, buffer.bytes().to_vec()));
                    at += n;
                }
            }
            Ok(found)
        };
        sim.run(reading).map_err(|e| format!("reading: {e}"))?
    }

    /// Goes through the cuts. Answers one of the crashed disks for the next life.
    fn crashes(
        &self,
        disks: &[DiskSpec],
        (history, kept): (&History, &Kept),
        model: &Rc<RefCell<Model>>,
        report: &mut Report,
    ) -> Result<Option<Legacy>, String> {
        let mut rng = Rng::new(self.seed).fork(4);
        let cuts = self.cuts(&mut rng, history.len());
        // One of the cuts is where the next life begins.
        let heir = (!cuts.is_empty()).then(|| rng.index(cuts.len()));
        let mut replay = Replay::new(history);
        let mut legacy = None;
        for (number, cut) in cuts.iter().enumerate() {
            replay.advance(history, *cut);
            report.cuts += 1;
            for (crash, survivors) in self.outcomes(&mut rng, &replay) {
                report.outcomes += 1;
                let images = replay.crashed(crash, survivors);
                let time = history.time_of(*cut);
                let again = rng.chance(1, 2).then(|| rng.next_u64());
                let crashed = Crashed { life: self, disks, images: &images, kept, again };
                let found = crashed.examine(&model.borrow(), crash, time).map_err(|e| {
                    format!("{crash:?} at cut {cut} (time {time}), {survivors:?}: {e}")
                })?;
                // What the process has left beside its disks is not handed down.
                let whole = crash == Crash::Power || self.memory.is_none();
                if heir == Some(number) && whole {
                    legacy = Some((images, contents(&found, self.content)));
                }
            }
        }
        Ok(legacy)
    }

    fn cuts(&self, rng: &mut Rng, events: usize) -> Vec<usize> {
        let mut cuts: Vec<usize> = match self.plan.cuts {
            Cuts::None => return Vec::new(),
            Cuts::Every(n) => (rng.index(n.max(1))..events).step_by(n.max(1)).collect(),
            Cuts::Random(n) => (0..n).map(|_| rng.index(events + 1)).collect(),
        };
        cuts.push(events);
        cuts.sort_unstable();
        cuts.dedup();
        cuts
    }

    fn outcomes(&self, rng: &mut Rng, replay: &Replay) -> Vec<(Crash, Survivors)> {
        let volatile = replay.volatile(Crash::Power);
        let mut outcomes = vec![(Crash::Power, Survivors::None)];
        if self.subject.survives_kill() {
            outcomes.push((Crash::Kill, Survivors::Random(rng.next_u64())));
        }
        if volatile == 0 {
            return outcomes;
        }
        outcomes.push((Crash::Power, Survivors::All));
        while outcomes.len() < self.plan.outcomes {
            let survivors = match rng.below(4) {
                0 => Survivors::Only(rng.index(volatile)),
                1 => Survivors::AllBut(rng.index(volatile)),
                _ => Survivors::Random(rng.next_u64()),
            };
            outcomes.push((Crash::Power, survivors));
        }
        outcomes
    }
}

/// What a crash has left.
struct Crashed<'a> {
    life: &'a Life<'a>,
    disks: &'a [DiskSpec],
    images: &'a [(String, Pages)],
    kept: &'a Kept,
    /// The process that opens the image after a kill is killed, too, at such a moment.
    again: Option<u64>,
}

impl Crashed<'_> {
    fn world(&self, images: &[(String, Pages)], time: super::Time) -> Rc<Sim> {
        let sim = Rc::new(Sim::new(self.life.seed ^ time));
        for (disk, (_, image)) in self.disks.iter().zip(images.iter()) {
            sim.add_disk(DiskSpec { image: image.clone(), ..disk.clone() });
        }
        sim
    }

    /// What is there when the image is opened: what the process has left beside the disks is lost with the machine only. Another
    /// process may have been killed while it opened the image.
    fn before_opening(
        &self,
        crash: Crash,
        time: super::Time,
    ) -> Result<Vec<(String, Pages)>, String> {
        let images = self.images.to_vec();
        let Some(memory) = self.life.memory else { return Ok(images) };
        memory.restore((crash == Crash::Kill).then_some((self.kept, time)));
        let Some(seed) = self.again.filter(|_| crash == Crash::Kill) else { return Ok(images) };
        let mut rng = Rng::new(seed);
        let sim = self.world(&images, time);
        memory.watch(&sim);
        drop(Opened::new(self.life.subject, Some(memory))?);
        let history = sim.take_history();
        let mut replay = Replay::new(&history);
        let cut = rng.index(history.len() + 1);
        replay.advance(&history, cut);
        let (kept, then) = memory.later(self.kept, time, history.time_of(cut));
        memory.restore(Some((&kept, then)));
        Ok(replay.crashed(Crash::Kill, Survivors::Random(rng.next_u64())))
    }

    /// Opens the disks, checks, reads, compares. Answers what it has read.
    fn examine(&self, model: &Model, crash: Crash, time: super::Time) -> Result<Found, String> {
        let life = self.life;
        let images = self.before_opening(crash, time)?;
        let sim = self.world(&images, time);
        if let Some(memory) = life.memory {
            memory.watch(&sim);
        }
        let opened = Opened::new(life.subject, life.memory)?;
        let node = opened.node();
        life.judge(&sim, &node, Stage::Crashed(crash))?;
        let found = life.read_all(&sim, &node, model)?;
        let expected = model.after(crash, time);
        for (start, bytes) in &found {
            expected.check(*start, bytes).map_err(|violation| violation.to_string())?;
        }
        let close = sim.run(life.subject.close(node.clone())).map_err(|e| e.to_string())?;
        close.map_err(|e| format!("closing after the crash: {e}"))?;
        drop(node);
        opened.close();
        Ok(found)
    }
}

/// What each sector holds, over what was known before.
fn contents(found: &Found, before: &Option<HashMap<u64, Tag>>) -> HashMap<u64, Tag> {
    let mut known = before.clone().unwrap_or_default();
    for (start, bytes) in found {
        let sectors = bytes.chunks(SECTOR as usize);
        known.extend((*start..).zip(sectors).filter_map(|(sector, bytes)| {
            let tag = tag_of(sector, bytes).ok()?;
            Some((sector, tag))
        }));
    }
    known
}
