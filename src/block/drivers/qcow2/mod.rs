//! `qcow2`: QEMU's image format.
#![deny(unsafe_code)]

#[allow(dead_code, reason = "`release` is for cache-clean-interval and discarded tables")]
#[allow(unsafe_code, reason = "one mapping of atomics")]
mod arena;
// Dirty slices and changed entries are the write path's side of the cache; its tests use them already.
#[allow(dead_code)]
mod cache;
pub mod check;
mod compressed;
pub mod create;
mod extension;
mod features;
mod flight;
pub mod header;
#[allow(dead_code, reason = "for the write path")]
mod header_io;
mod header_write;
#[allow(dead_code, reason = "changes are the write path's side")]
mod l1;
pub mod layout;
mod limits;
mod open;
#[allow(dead_code, reason = "what is found is for the write path")]
mod opened;
mod options;
mod read;

use serde_json::Value;

use cache::SliceCache;
use compressed::Decompressor;
use flight::Flights;
use header::Header;
use l1::L1Table;
use layout::Geometry;
use options::Choices;
use read::Corruption;

use crate::block::driver::Resolver;
use crate::block::perm::default_child_perms;
use crate::block::{
    Dir, Driver, DriverDef, DriverKind, Edge, IoFuture, Limits, Map, Node, Op, Recognises, walk,
};
use crate::error::Errno;
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
/// Who owns what: the header and the choices do not change; `l1` and `cache` are the tables as far as they are in
/// memory, read by everyone without a lock; `flights` sees to it that a slice is read by one request at a time;
/// `compressed` unpacks clusters and remembers the last ones; `corruption` says once that something is wrong.
struct Qcow2 {
    /// `file` first; then `data-file` and `backing`, if there are any.
    edges: Vec<Edge>,
    /// The index in `edges` of where guest data is.
    data: usize,
    /// The index in `edges` of what is seen where nothing is allocated.
    backing: Option<usize>,
    header: Header,
    geometry: Geometry,
    choices: Choices,
    l1: L1Table,
    cache: SliceCache,
    flights: Flights,
    compressed: Decompressor,
    corruption: Corruption,
}

impl Qcow2 {
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
}

impl Driver for Qcow2 {
    fn edges(&self) -> &[Edge] {
        &self.edges
    }

    /// QEMU counts whole sectors: an odd end is cut off.
    fn len(&self) -> u64 {
        self.header.size / 512 * 512
    }

    fn limits(&self) -> Limits {
        let cluster = u32::try_from(self.geometry.cluster_size()).unwrap_or(u32::MAX);
        let subcluster = u32::try_from(self.geometry.subcluster_size()).unwrap_or(u32::MAX);
        Limits {
            zeroes_align: subcluster,
            discard_align: cluster,
            opt_transfer: cluster,
            ..Limits::default()
        }
    }

    fn map(&self, dir: Dir, offset: u64, len: u64) -> Map<'_> {
        match dir {
            Dir::Read => self.map_read(offset, len),
            Dir::Write => Map::Slow,
        }
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        match op {
            Op::Read { offset, to } => Box::pin(walk::read(self, offset, to)),
            // Nothing is ever written: there is nothing to make stable.
            Op::Flush => Box::pin(std::future::ready(Ok(()))),
            // The generic layer lets nobody change a read-only node.
            _ => Box::pin(std::future::ready(Err(Errno::EPERM))),
        }
    }

    fn resolver(&self) -> Option<&dyn Resolver> {
        Some(self)
    }

    fn options_in_force(&self) -> Options {
        let mut options = self.choices.in_force();
        let shape = self.cache.shape();
        let slice = u64::from(shape.entries) * u64::from(shape.entry_words) * 8;
        options.insert("l2-cache-size".into(), (u64::from(shape.slots) * slice).into());
        options.insert("l2-cache-entry-size".into(), slice.into());
        options.insert("l2-cache-used".into(), Value::from(self.cache.bytes_used()));
        options
    }
}
