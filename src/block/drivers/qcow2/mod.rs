//! `qcow2`: QEMU's image format, read and written by many threads at once. (Its specification: QEMU's docs/interop/qcow2.rst.)
//!
//! ```text
//!  open ── header (limits, features, extension) ── options ── replay: what a killed process has left in its journal
//!       ── opened: repair, bitmaps, autoclear bits ──► Image
//!
//!  fast lane: map                             slow lane: submit
//!     │ no lock, no allocation                   │
//!     ▼                                          ▼
//!  ┌─ read: guest offset ─► l1 ─► cache (L2 slices) ─► Mapping, run ─► Place ◄── a slice that is missing: flight, file
//!  │      │
//!  │      ├─ data, and for writes COPIED ──────────────────────────────► file or data-file, in place
//!  │      ├─ unallocated ──► backing, zeroes
//!  │      └─ compressed ───► compressed
//!  │
//!  └─ write::plan ── Meta lock ── refcount: clusters; write::streams: which ones; write::busy: who else waits
//!         │                            │
//!         ▼                            └─ write::space: refcount blocks, a longer file; write::table: L2 tables
//!     write::data: old content around new data ──► file ──► link: entries in cache and l1, old clusters to write::limbo
//!     write::zero: zeroes, discards: entries only ────────────────────────▲
//!                                                                         │ dirty
//!  FLUSH, 5 s later, close ──► write::commit: one at a time ──► write::flush: refcount blocks │ data │ slices, L1
//!                                                                         │ stable
//!                                                                         ▼
//!                                              write::limbo: refcounts drop when nobody uses the clusters any more
//! ```
//!
//! * **In memory**: the L1 table as a whole (`l1`), L2 tables in slices of 4 KiB (`cache`), refcount blocks as they are needed
//!   (`refcount`), a bit for each host cluster that holds metadata (`tables`). Entries are read without a lock.
//! * **On disk** only `write::flush` changes tables, and only `header_io` the header (before the image is open: `opened`). The
//!   order of all that is at the top of `write/flush.rs`, the rules of memory at the top of `write/mod.rs`.
//! * **Places** that a request got stay good until it ends: what it may still use is given to nobody else
//!   ([`grace`](crate::rt::grace)).
//! * **Beside the disk**: each change of an L1 or L2 entry is in the `journal`, in shared memory that outlives the process, before it
//!   is in the tables in memory, until a flush has written it. `journal.rs` says what must hold.
//! * [`check`] and [`create`] work on a file node alone, with no image open.
//!
//! Locks: `Meta` ([`mod@write`]) is the outer one; inside of it those of the cache, of the L1 table, of upkeep may be taken, one at a
//! time. All others (flights, commit, unpacked clusters) are taken alone. None is held across I/O.
//!
//! Not there: writing compressed clusters, encryption, taking or deleting snapshots, keeping bitmaps up to date, shrinking.
#![deny(unsafe_code)]

#[allow(unsafe_code, reason = "one mapping of atomics")]
mod arena;
mod cache;
pub mod check;
mod compressed;
pub mod create;
mod extension;
mod features;
mod flight;
pub mod header;
mod header_io;
mod header_write;
#[cfg(any(test, feature = "sim"))]
pub mod journal;
#[cfg(not(any(test, feature = "sim")))]
mod journal;
mod l1;
pub mod layout;
mod limits;
mod open;
mod opened;
mod options;
mod read;
mod refcount;
mod replay;
mod tables;
mod tidy;
pub mod write;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use serde_json::Value;

use cache::SliceCache;
use compressed::Decompressor;
use flight::Flights;
use header::Header;
use l1::L1Table;
use layout::{Geometry, GuestOffset, HostOffset};
use options::Choices;
use read::Corruption;
use tidy::Tidy;
use write::Writing;

use crate::block::driver::Resolver;
use crate::block::perm::default_child_perms;
use crate::block::upkeep::Tend;
use crate::block::{
    Dir, Driver, DriverDef, DriverKind, Edge, IoFuture, Limits, Map, Node, Op, Recognises, walk,
};
use crate::error::Errno;
use crate::metrics::NodeMeter;
use crate::qapi::Options;

/// `qcow2`.
pub static QCOW2: DriverDef = DriverDef {
    name: "qcow2",
    kind: DriverKind::Format,
    options: options::SPECS,
    open: open::open,
    recognises: Recognises::Content(is_qcow2),
    child_perms: default_child_perms,
};

/// Whether an image that starts with `first` is qcow2 (version 1, "qcow", is another format).
fn is_qcow2(first: &[u8]) -> bool {
    first.len() >= 72 && first.starts_with(b"QFI\xfb") && first[4..8] > [0, 0, 0, 1][..]
}

/// An open qcow2 image.
///
/// Who owns what: the header as read and the choices do not change; `l1` and `cache` are the tables as far as they are in
/// memory, read by everyone without a lock; `flights` sees to it that a slice is read by one request at a time;
/// `compressed` unpacks clusters and remembers the last ones; `corruption` says once that something is wrong; `writing` is
/// all that only a writable image has.
struct Image {
    /// For whoever shall look after the image later.
    me: Weak<Image>,
    /// `file` first; then `data-file` and `backing`, if there are any.
    edges: Vec<Edge>,
    /// The index in `edges` of where guest data is.
    data: usize,
    /// The index in `edges` of what is seen where nothing is allocated.
    backing: Option<usize>,
    header: Header,
    geometry: Geometry,
    choices: Choices,
    /// The guest's disk in bytes.
    size: AtomicU64,
    /// Where the active L1 table is.
    l1_offset: AtomicU64,
    l1: L1Table,
    cache: SliceCache,
    flights: Flights,
    compressed: Decompressor,
    corruption: Corruption,
    writing: Option<Writing>,
    meter: Arc<NodeMeter>,
}

impl Image {
    /// The image file.
    fn file(&self) -> &Node {
        &self.edges[0].node
    }

    /// Where guest data is: the image file, or the external data file.
    fn data(&self) -> &Node {
        &self.edges[self.data].node
    }

    /// What is seen where nothing is allocated.
    fn backing(&self) -> Option<&Node> {
        self.backing.map(|at| &*self.edges[at].node)
    }

    /// The guest's disk in bytes. QEMU counts whole sectors: an odd end is cut off.
    fn len(&self) -> u64 {
        self.size.load(Ordering::Relaxed) / 512 * 512
    }

    /// Where the active L1 table is, and its length in bytes.
    fn l1_place(&self) -> (HostOffset, u64) {
        (HostOffset(self.l1_offset.load(Ordering::Relaxed)), self.l1.len() * 8)
    }

    fn refuses(&self) -> bool {
        self.writing.as_ref().is_some_and(Writing::is_fenced)
    }

    async fn change(&self, op: Op<'_>) -> Result<(), Errno> {
        // The generic layer lets nobody change a read-only node.
        let Some(w) = &self.writing else { return Err(Errno::EPERM) };
        if let Some(host) = w.entangled() {
            return Err(self.overlap(w, host).await);
        }
        match op {
            Op::Write { offset, from, flags } => self.write(w, offset, from, flags).await,
            Op::WriteZeroes { offset, len, flags } => {
                self.write_zeroes(w, offset, len, flags).await
            }
            Op::Discard { offset, len } => self.discard(w, offset, len).await,
            Op::Flush | Op::Read { .. } => unreachable!("changes nothing"),
        }
    }
}

/// The driver of a node: the image, which the graph's upkeep may hold a little longer.
struct Qcow2(
    Arc<Image>,
    #[expect(dead_code, reason = "alive as long as the node")] Option<Arc<Tidy>>,
);

impl Driver for Qcow2 {
    fn edges(&self) -> &[Edge] {
        &self.0.edges
    }

    fn len(&self) -> u64 {
        self.0.len()
    }

    fn limits(&self) -> Limits {
        let geometry = &self.0.geometry;
        let cluster = u32::try_from(geometry.cluster_size()).unwrap_or(u32::MAX);
        let subcluster = u32::try_from(geometry.subcluster_size()).unwrap_or(u32::MAX);
        Limits {
            zeroes_align: subcluster,
            discard_align: cluster,
            opt_transfer: cluster,
            ..Limits::default()
        }
    }

    fn map(&self, dir: Dir, offset: u64, len: u64) -> Map<'_> {
        match dir {
            _ if self.0.refuses() => Map::Slow,
            Dir::Read => self.0.map_read(offset, len),
            Dir::Write => self.0.map_write(offset, len),
        }
    }

    fn prefetches(&self) -> bool {
        true
    }

    fn prefetch(&self, offset: u64) {
        self.0.prefetch(GuestOffset(offset));
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        let image = &*self.0;
        match op {
            _ if image.refuses() => Box::pin(std::future::ready(Err(Errno::EIO))),
            Op::Read { offset, to } => Box::pin(walk::read(image, offset, to)),
            Op::Flush => Box::pin(image.flush()),
            op => Box::pin(image.change(op)),
        }
    }

    fn is_stable(&self) -> bool {
        self.0.writing.as_ref().is_none_or(Writing::is_stable)
    }

    fn truncate(&self, len: u64) -> IoFuture<'_> {
        Box::pin(async move {
            let w = self.0.writing.as_ref().ok_or(Errno::EPERM)?;
            self.0.resize(w, len).await
        })
    }

    fn close(&self) -> IoFuture<'_> {
        Box::pin(self.0.close())
    }

    fn resolver(&self) -> Option<&dyn Resolver> {
        Some(&*self.0)
    }

    fn options_in_force(&self) -> Options {
        let mut options = self.0.choices.in_force();
        let cache = &self.0.cache;
        let shape = cache.shape();
        let slice = shape.slice_bytes();
        options.insert("l2-cache-size".into(), (u64::from(shape.slots) * slice).into());
        options.insert("l2-cache-entry-size".into(), slice.into());
        options.insert("l2-cache-used".into(), Value::from(cache.bytes_used()));
        if let Some(w) = &self.0.writing {
            options.insert("refcount-cache-used".into(), w.refcount_memory().into());
        }
        options
    }
}

impl Tend for Image {
    /// What changed goes to disk though nobody flushes.
    fn tend(&self) -> IoFuture<'_> {
        Box::pin(self.flush())
    }
}
