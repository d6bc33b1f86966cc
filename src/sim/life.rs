//! One life of an image: a guest works on it, then every way in which it may have ended is opened and compared.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::Value;

use super::harness::{Cuts, Plan, Report, Stage, Subject};
use super::history::{Crash, History, Replay, Survivors, Time};
use super::memory::{Kept, Memory};
use super::model::{Model, Tag, tag_of};
use super::request::{DiskSpec, KINDS};
use super::workload::{Guest, read};
use super::{Pages, Rng, Sim};
use crate::block::node::SECTOR;
use crate::block::perm::Perms;
use crate::block::{Graph, Node, Op, RootUser};

/// Sectors that are compared around each one that was touched.
const AROUND: u64 = 16;
/// The largest read of a comparison, in sectors.
const READ_MAX: u64 = 2048;

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

/// One life of an image: a guest's work, then all the ways in which it may have ended.
pub(super) struct Life<'a> {
    pub(super) subject: &'a dyn Subject,
    pub(super) plan: &'a Plan,
    /// What the guest finds, where it is not the subject's first content.
    pub(super) content: &'a Option<HashMap<u64, Tag>>,
    /// Its number, from 0.
    pub(super) life: usize,
    pub(super) seed: u64,
    pub(super) memory: Option<&'a Memory>,
}

/// What was read: first sectors and bytes.
type Found = Vec<(u64, Vec<u8>)>;

/// The disks after the last crash, and what the guest finds on them.
pub(super) type Legacy = (Vec<(String, Pages)>, HashMap<u64, Tag>);

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
    pub(super) fn count(&self, disks: &[DiskSpec], disk: &str) -> Result<[u64; KINDS], String> {
        let plan = Plan { fault: None, ..*self.plan };
        let quiet = Life { plan: &plan, ..*self };
        let sim = quiet.world(disks);
        quiet.work(&sim).map(drop)?;
        Ok(sim.counts(disk))
    }

    /// The guest at work, to the end.
    pub(super) fn live(
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
    pub(super) fn crashes(
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
    fn world(&self, images: &[(String, Pages)], time: Time) -> Rc<Sim> {
        let sim = Rc::new(Sim::new(self.life.seed ^ time));
        for (disk, (_, image)) in self.disks.iter().zip(images.iter()) {
            sim.add_disk(DiskSpec { image: image.clone(), ..disk.clone() });
        }
        sim
    }

    /// What is there when the image is opened: what the process has left beside the disks is lost with the machine only. Another
    /// process may have been killed while it opened the image.
    fn before_opening(&self, crash: Crash, time: Time) -> Result<Vec<(String, Pages)>, String> {
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
    fn examine(&self, model: &Model, crash: Crash, time: Time) -> Result<Found, String> {
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
