//! Repairs on a disk whose power fails: at every write, with any of the writes since the last flush lost.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use vhost_user_blk::block::driver::Recognises;
use vhost_user_blk::block::drivers::qcow2::check::{self, Fix, Report};
use vhost_user_blk::block::perm::{Perm, Perms, default_child_perms};
use vhost_user_blk::block::{
    Driver, DriverDef, DriverKind, Graph, IoFuture, Limits, Node, Op, OpenArgs,
};
use vhost_user_blk::error::Errno;
use vhost_user_blk::qapi::Options;
use vhost_user_blk::rt;

use super::{Image, MUTATIONS, Quiet, base, class};

/// What happened to the disk.
enum Event {
    Write(usize, Vec<u8>),
    Flush,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    log: Vec<Event>,
}

impl State {
    fn write(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
        if bytes.len() < at + data.len() {
            bytes.resize(at + data.len(), 0);
        }
        bytes[at..at + data.len()].copy_from_slice(data);
    }
}

struct Disk(Arc<Mutex<State>>);

/// The disk that the next node is for.
static NEXT: Mutex<Option<Arc<Mutex<State>>>> = Mutex::new(None);

static DISK: DriverDef = DriverDef {
    name: "disk",
    kind: DriverKind::Protocol,
    options: &[],
    open: |_: &mut OpenArgs<'_>| Ok(Box::new(Disk(NEXT.lock().unwrap().take().unwrap()))),
    recognises: Recognises::Nothing,
    child_perms: default_child_perms,
};
static DRIVERS: &[&DriverDef] = &[&DISK];

impl Disk {
    fn act(&self, op: Op<'_>) -> Result<(), Errno> {
        let mut guard = self.0.lock().unwrap();
        let State { bytes, log } = &mut *guard;
        let event = match op {
            Op::Read { offset, to } => {
                let (at, mut part) = (offset as usize, vec![0; to.len()]);
                let end = bytes.len().min(at + part.len());
                part[..end.saturating_sub(at)].copy_from_slice(&bytes[at.min(end)..end]);
                to.copy_from(&part);
                return Ok(());
            }
            Op::Write { offset, from, .. } => {
                let mut part = vec![0; from.len()];
                from.copy_to(&mut part);
                Event::Write(offset as usize, part)
            }
            Op::WriteZeroes { offset, len, .. } | Op::Discard { offset, len } => {
                Event::Write(offset as usize, vec![0; len as usize])
            }
            Op::Flush => Event::Flush,
        };
        if let Event::Write(at, data) = &event {
            State::write(bytes, *at, data);
        }
        log.push(event);
        Ok(())
    }
}

impl Driver for Disk {
    fn len(&self) -> u64 {
        self.0.lock().unwrap().bytes.len() as u64
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        Box::pin(std::future::ready(self.act(op)))
    }

    fn options_in_force(&self) -> Options {
        Options::new()
    }
}

fn on_disk<T>(state: &Arc<Mutex<State>>, f: impl AsyncFnOnce(&Node) -> T) -> T {
    static ONE: Mutex<()> = Mutex::new(());
    let graph = Graph::with_drivers(DRIVERS);
    let node = {
        let _one = ONE.lock().unwrap();
        *NEXT.lock().unwrap() = Some(Arc::clone(state));
        let Value::Object(options) =
            json!({ "driver": "disk", "node-name": "d", "discard": "unmap" })
        else {
            unreachable!()
        };
        graph.add(options).unwrap()
    };
    let perms = Perms { used: Perm::WRITE | Perm::RESIZE, shared: Perm::all() };
    let user = graph.attach_root(&node, "a test", perms).unwrap();
    let value = rt::block_on(f(&node));
    graph.detach(user);
    value
}

fn report(state: &Arc<Mutex<State>>, fix: Fix) -> Option<Report> {
    on_disk(state, async |node| {
        let header = check::read_header(node).await.ok()?;
        check::check(node, &header, fix, &mut Quiet).await.ok()
    })
}

fn run(state: &Arc<Mutex<State>>, fix: Fix) -> i32 {
    class(report(state, fix).as_ref())
}

/// How bad it is, leaks aside. What cannot be looked at at all counts as one.
fn harm(state: &Arc<Mutex<State>>) -> u64 {
    report(state, Fix::Nothing).map_or(u64::MAX, |r| r.corruptions + r.check_errors.min(1))
}

/// What the guest sees of standard clusters.
fn guest(image: &Image) -> Vec<(u64, Vec<u8>)> {
    let cluster = image.cluster();
    let l2 = image.l2();
    let data = |i: u64| {
        let entry = image.get(l2 + 8 * i);
        let at = (entry & 0x00ff_ffff_ffff_fe00) as usize;
        let bytes = image.0.get(at..at + cluster as usize).unwrap_or_default().to_vec();
        let holds_data = at != 0 && entry & 1 == 0;
        (entry & !super::COPIED, if holds_data { bytes } else { Vec::new() })
    };
    (0..16).map(data).collect()
}

#[test]
fn a_power_cut_in_a_repair_can_be_repaired() {
    let temp = tempfile::tempdir().unwrap();
    let mut random = 1u64;
    for name in ["plain", "small", "snapshots"] {
        let (_, create) = super::BASES.iter().find(|(n, _)| *n == name).unwrap();
        let bytes = base(temp.path(), name, create);
        for mutation in [
            "refcounts too high",
            "refcounts too low",
            "no refblock",
            "refblock twice",
            "refblock unaligned",
            "L1 not copied",
            "dirty",
        ] {
            let (_, mutate) = MUTATIONS.iter().find(|(n, _)| *n == mutation).unwrap();
            let mut image = Image(bytes.clone());
            mutate(&mut image);
            let state = Arc::new(Mutex::new(State { bytes: image.0.clone(), log: Vec::new() }));
            let before = harm(&state);
            if run(&state, Fix::All) == 1 {
                continue;
            }
            assert_eq!(run(&state, Fix::Nothing), 0, "{name}, {mutation}");
            let log = std::mem::take(&mut state.lock().unwrap().log);
            for cut in 0..=log.len() {
                for _ in 0..4 {
                    let mut bytes = image.0.clone();
                    let stable =
                        log[..cut].iter().rposition(|e| matches!(e, Event::Flush)).unwrap_or(0);
                    for (i, event) in log[..cut].iter().enumerate() {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        if let Event::Write(at, data) = event
                            && (i < stable || random >> 63 != 0)
                        {
                            State::write(&mut bytes, *at, data);
                        }
                    }
                    let what = format!("{name}, {mutation}, cut at {cut} of {}", log.len());
                    let after = Arc::new(Mutex::new(State { bytes, log: Vec::new() }));
                    assert!(harm(&after) <= before, "{what}: worse than before");
                    assert_eq!(run(&after, Fix::All), 0, "{what}");
                    assert_eq!(run(&after, Fix::Nothing), 0, "{what}");
                    let now = Image(std::mem::take(&mut after.lock().unwrap().bytes));
                    assert!(guest(&now) == guest(&image), "{what}");
                }
            }
        }
    }
}
