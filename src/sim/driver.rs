//! The driver `sim-disk`: a leaf whose bytes are those of a disk of the current simulation, found by name.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use serde_json::Value;

use super::disk::State;
use super::request::Work;
use crate::block::perm::default_child_perms;
use crate::block::{Driver, DriverDef, DriverKind, IoFuture, Limits, Op, OpenArgs};
use crate::err;
use crate::error::{Errno, Result};
use crate::qapi::{Kind, OptionSpec, Options};

/// `sim-disk`: option `disk` is the name of a disk that [`super::Sim::add_disk`] made, on this thread.
pub static SIM_DISK: DriverDef = DriverDef {
    name: "sim-disk",
    kind: DriverKind::Protocol,
    options: &[OptionSpec::required("disk", Kind::Str)],
    open,
    recognises: crate::block::Recognises::Nothing,
    child_perms: default_child_perms,
};

/// The disks of a world, shared by the scheduler and the nodes. The lock is never contended: all is one thread; drivers
/// must be `Sync`.
pub(super) type Shared = Arc<Mutex<State>>;

pub(super) fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    static DISKS: RefCell<Vec<(String, Shared, usize)>> = const { RefCell::new(Vec::new()) };
}

/// Makes disk `index` of `world` known as `name`; a disk of an older world with that name is forgotten.
pub(super) fn register(name: &str, world: &Shared, index: usize) {
    DISKS.with_borrow_mut(|disks| {
        disks.retain(|(other, ..)| other != name);
        disks.push((name.to_owned(), Arc::clone(world), index));
    });
}

/// Forgets the disks of `world`.
pub(super) fn unregister(world: &Shared) {
    DISKS.with_borrow_mut(|disks| disks.retain(|(_, other, _)| !Arc::ptr_eq(other, world)));
}

struct SimDisk {
    name: String,
    world: Shared,
    index: usize,
    /// There was room beyond the end when it was opened. A file still grows when the disk is full, and fails: ENOSPC.
    is_file: bool,
}

fn open(args: &mut OpenArgs<'_>) -> Result<Box<dyn Driver>> {
    let name = args.take_str("disk")?.ok_or_else(|| err!("Parameter 'disk' is missing"))?;
    let found = DISKS.with_borrow(|disks| {
        let found = disks.iter().find(|(other, ..)| *other == name);
        found.map(|(_, world, index)| (Arc::clone(world), *index))
    });
    let (world, index) = found.ok_or_else(|| err!("There is no simulated disk '{name}'"))?;
    let is_file = {
        let disk = &lock(&world).disks[index];
        disk.options.capacity > disk.image.len()
    };
    Ok(Box::new(SimDisk { name, world, index, is_file }))
}

impl Driver for SimDisk {
    fn len(&self) -> u64 {
        lock(&self.world).disks[self.index].image.len()
    }

    fn grows(&self) -> bool {
        let disk = &lock(&self.world).disks[self.index];
        self.is_file || disk.options.capacity > disk.image.len()
    }

    fn limits(&self) -> Limits {
        let request_align = lock(&self.world).disks[self.index].options.request_align;
        Limits { request_align, ..Limits::default() }
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        Box::pin(Io { disk: self, work: Work::Op(op), id: None, done: false })
    }

    fn preallocate(&self, offset: u64, len: u64) -> IoFuture<'_> {
        let work = Work::Grow(offset.saturating_add(len));
        Box::pin(Io { disk: self, work, id: None, done: false })
    }

    fn truncate(&self, len: u64) -> IoFuture<'_> {
        Box::pin(Io { disk: self, work: Work::Truncate(len), id: None, done: false })
    }

    fn options_in_force(&self) -> Options {
        [("disk".to_owned(), Value::from(self.name.clone()))].into_iter().collect()
    }
}

/// One request on its way.
struct Io<'a> {
    disk: &'a SimDisk,
    work: Work<'a>,
    id: Option<u64>,
    done: bool,
}

impl Future for Io<'_> {
    type Output = std::result::Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = lock(&self.disk.world);
        let Some(id) = self.id else {
            let id = state.issue(self.disk.index, &self.work, cx.waker());
            drop(state);
            self.id = Some(id);
            return Poll::Pending;
        };
        if !state.is_chosen(id, cx.waker()) {
            return Poll::Pending;
        }
        let result = state.complete(id, &self.work);
        drop(state);
        self.done = true;
        Poll::Ready(result)
    }
}

impl Drop for Io<'_> {
    /// A request in flight cannot be taken back; see [`crate::rt`].
    fn drop(&mut self) {
        let Some(id) = self.id.filter(|_| !self.done) else { return };
        let mut state = lock(&self.disk.world);
        state.abandoned(id);
        let over = state.over || std::thread::panicking();
        drop(state);
        assert!(over, "an operation in flight was abandoned");
    }
}
