//! What a driver is: its entry in the table, its options, how it opens, and what it does with requests.
#![forbid(unsafe_code)]

use std::future::Future;
use std::path::Path;
use std::pin::Pin;

use serde_json::Value;

use super::graph::{Graph, NodeId};
use super::node::{Edge, InForce, Role};
use super::perm::{ChildPermFn, Perms};
use super::{Dir, Event, IoFuture, Limits, Map, Op};
use crate::err;
use crate::error::{Errno, Result};
use crate::mem::Sg;
use crate::qapi::{OptionSpec, Options};
use crate::rt::grace;

/// How QEMU names a driver in its errors, and what its children default to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverKind {
    /// A leaf that stores bytes: file, host_device, null-co.
    Protocol,
    /// Interprets the bytes of a child: raw, qcow2.
    Format,
    /// Passes its child's bytes on.
    Filter,
}

/// A driver's entry in [`super::drivers::TABLE`].
pub struct DriverDef {
    /// The word of `driver=`.
    pub name: &'static str,
    /// Its kind.
    pub kind: DriverKind,
    /// Its own options, in the order of QEMU's schema, without those of the generic layer.
    pub options: &'static [OptionSpec],
    /// Opens a node of this driver. A failure needs no cleaning up: what was opened goes when it is dropped.
    pub open: fn(&mut OpenArgs<'_>) -> Result<Box<dyn Driver>>,
    /// What the driver recognises where the user names a file without saying which driver it is for.
    pub recognises: Recognises,
    /// What a node of this driver asks of its children; usually [`super::perm::default_child_perms`].
    pub child_perms: ChildPermFn,
}

/// What a driver recognises. The first driver of the table that does is taken.
#[derive(Clone, Copy)]
pub enum Recognises {
    /// Nothing: it must be named.
    Nothing,
    /// A file name, for drivers that open files.
    Path(fn(&Path) -> bool),
    /// A format by the first [`super::implicit::PROBE_LEN`] bytes of an image.
    Content(fn(&[u8]) -> bool),
}

/// What a driver gets to open itself: its options (it takes out what it understands; what is left is an error), the
/// generic options in force, and the way to open its children.
pub struct OpenArgs<'a> {
    /// The graph, for opening children.
    pub graph: &'a Graph,
    /// The driver's own options, typed. The driver removes what it understands.
    pub options: Options,
    /// The generic options in force; a driver may turn `read_only` on when `auto_read_only` allows it.
    pub in_force: InForce,
    /// The node's name, for errors.
    pub node_name: &'a str,
    /// Depth of this node below the one that the user defined, against unbounded recursion.
    pub depth: usize,
    /// The driver's entry in the table.
    pub(super) def: &'static DriverDef,
    /// The node's place in the graph, reserved before it is open.
    pub(super) id: NodeId,
    /// The files of the overlays above, against a backing chain that comes back to itself.
    pub(super) lineage: Option<&'a Lineage<'a>>,
    /// The file of this node, if it said so.
    pub(super) file_id: Option<FileId>,
    /// The options that inline children inherit: those in force before the driver had its say.
    pub(super) inherit: InForce,
}

impl OpenArgs<'_> {
    /// Opens the child that option `name` defines, and attaches it with the permissions that the driver asks for a
    /// child in `role`: from here on the driver may read it (and write it, if the node is open for writing).
    ///
    /// # Errors
    /// The option is missing; whatever opening the child or getting the permissions fails with.
    pub fn open_child(&mut self, name: &'static str, role: Role) -> Result<Edge> {
        self.open_child_if_given(name, role)?
            .ok_or_else(|| err!("A block device must be specified for \"{name}\""))
    }

    /// As [`OpenArgs::open_child`], for a child that may be left out (absent, or JSON `null`).
    ///
    /// # Errors
    /// Whatever opening the child or getting the permissions fails with.
    pub fn open_child_if_given(&mut self, name: &'static str, role: Role) -> Result<Option<Edge>> {
        match self.options.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(reference) => self.graph.open_child(self, name, role, reference).map(Some),
        }
    }

    /// Opens a child that the user did not define but the image did, from options as the user would have written them,
    /// and attaches it as [`OpenArgs::open_child`] does.
    ///
    /// # Errors
    /// Whatever opening the child or getting the permissions fails with.
    pub fn open_implicit_child(
        &mut self,
        name: &'static str,
        role: Role,
        options: Options,
    ) -> Result<Edge> {
        self.graph.open_child(self, name, role, Value::Object(options))
    }

    /// Says that the image being opened is in the file behind `child`; to be called before backing children are opened.
    ///
    /// # Errors
    /// One of the overlays above is in the same file: the chain loops.
    pub fn enter_file(&mut self, child: &Edge) -> Result<()> {
        let Some(id) = child.node.file_id() else { return Ok(()) };
        let mut above = self.lineage;
        while let Some(Lineage { file, above: next }) = above {
            if *file == id {
                let name = child.node.base_filename().unwrap_or_default();
                return Err(err!("The backing chain of '{name}' contains itself"));
            }
            above = *next;
        }
        self.file_id = Some(id);
        Ok(())
    }

    /// Takes out a text option.
    ///
    /// # Errors
    /// The value is of another type.
    pub fn take_str(&mut self, name: &str) -> Result<Option<String>> {
        take_str(&mut self.options, name)
    }

    /// Takes out a boolean option.
    ///
    /// # Errors
    /// The value is of another type.
    pub fn take_bool(&mut self, name: &str) -> Result<Option<bool>> {
        take_bool(&mut self.options, name)
    }

    /// Takes out an option that must not be negative: a size, an offset, a time.
    ///
    /// # Errors
    /// The value is of another type, or negative (in the words of QEMU's size options).
    pub fn take_size(&mut self, name: &str) -> Result<Option<u64>> {
        match self.options.shift_remove(name) {
            None => Ok(None),
            Some(Value::Number(n)) => match n.as_u64() {
                Some(value) => Ok(Some(value)),
                None => Err(err!("Value '{n}' is out of range for parameter '{name}'")),
            },
            Some(_) => Err(wrong_type(name, "integer")),
        }
    }
}

/// Takes a text option out of `options`.
pub(super) fn take_str(options: &mut Options, name: &str) -> Result<Option<String>> {
    match options.shift_remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(wrong_type(name, "string")),
    }
}

/// Takes a boolean option out of `options`.
pub(super) fn take_bool(options: &mut Options, name: &str) -> Result<Option<bool>> {
    match options.shift_remove(name) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(_) => Err(wrong_type(name, "boolean")),
    }
}

/// QEMU's error for a value of another JSON type.
pub(super) fn wrong_type(name: &str, expected: &str) -> crate::error::Error {
    err!("Invalid parameter type for '{name}', expected: {expected}")
}

/// A file of the host, whatever its names: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// The files of the overlays above a node that is being opened, the nearest first.
pub(super) struct Lineage<'a> {
    pub(super) file: FileId,
    pub(super) above: Option<&'a Lineage<'a>>,
}

/// Where a range lives, and how many bytes of it.
pub type ResolveFuture<'a> =
    Pin<Box<dyn Future<Output = std::result::Result<(Map<'a>, u64), Errno>> + 'a>>;

/// The slow lane's reads of a driver that composes its bytes from those of other nodes. `io` walks through such drivers
/// one after the other without recursion, so that a chain of hundreds needs no deep stack; see [`super::walk`].
pub trait Resolver: Send + Sync {
    /// A request comes in: before the first `resolve`, and held until all its transfers are done. A driver that gives
    /// places on the disk to somebody else needs it, to know when nobody reads there any more.
    fn enter(&self) -> Option<grace::Pin> {
        None
    }

    /// Where `[offset, offset + n)` lives, and n: at least 1, at most `len`. Unlike [`Driver::map`] it may wait. A child's
    /// range may hang over the child's end: zeroes there. [`Map::Slow`]: `fetch` reads that part.
    fn resolve(&self, offset: u64, len: u64) -> ResolveFuture<'_>;

    /// Reads a range for which `resolve` answered [`Map::Slow`].
    fn fetch<'a>(&'a self, offset: u64, to: Sg<'a>) -> IoFuture<'a>;
}

/// The driver of one open node. Called from several threads at once.
#[expect(clippy::len_without_is_empty, reason = "a length, not a container")]
pub trait Driver: Send + Sync {
    /// The children, with their roles.
    fn edges(&self) -> &[Edge] {
        &[]
    }

    /// The length of the node in bytes, now. [`super::Node::len`] rounds it up to whole sectors; a driver serves
    /// requests in the rounded tail too (reads as zeroes).
    fn len(&self) -> u64;

    /// Whether a write or write-zeroes past [`Driver::len`] makes the node longer, now. What is between the old end and
    /// the write reads as zeroes, and so does the part past the end of a read that begins or ends there: the generic
    /// layer fills up ragged blocks with such reads.
    fn grows(&self) -> bool {
        false
    }

    /// What the node can take in one request.
    fn limits(&self) -> Limits;

    /// Fast lane: where `[offset, offset + len)` lives. Never blocks, locks or allocates. `len` is not 0, the range is
    /// inside the node.
    fn map(&self, dir: Dir, offset: u64, len: u64) -> Map<'_> {
        let _ = (dir, offset, len);
        Map::Slow
    }

    /// Whether [`Driver::prefetch`] does something.
    fn prefetches(&self) -> bool {
        false
    }

    /// Fast lane: `map` will soon be asked for `offset`; the memory that it will look at may be brought to the processor
    /// meanwhile. Does not wait for that.
    fn prefetch(&self, offset: u64) {
        let _ = offset;
    }

    /// Whether no metadata that a reader of the disk would need waits in memory, now: a place that `map` answered before
    /// may be written stably by itself. Never blocks, locks or allocates.
    fn is_stable(&self) -> bool {
        true
    }

    /// Slow lane: any operation. `ENOTSUP` for a discard means "ignored", for write-zeroes "write zero bytes": the
    /// generic layer does so.
    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a>;

    /// A parent is about to do this here: see [`super::event`]. Never blocks.
    fn event(&self, event: Event) {
        let _ = event;
    }

    /// Sets the length of the node, both ways; what is added reads as zeroes. ENOTSUP where the length is given. It is as
    /// stable as a write: after the next flush. The caller has nothing in flight past the smaller of the two lengths.
    fn truncate(&self, len: u64) -> IoFuture<'_> {
        let _ = len;
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// Whether the node's length is that of something which others may make longer: [`Driver::look_at_len`] has a point.
    fn follows_medium(&self) -> bool {
        false
    }

    /// Looks whether the medium has become longer without us; then so does the node. Beside requests, from any thread; one
    /// system call. The medium's length in bytes, if it has become shorter: the node stays as it is.
    fn look_at_len(&self) -> Option<u64> {
        None
    }

    /// Makes the node reach to the end of `[offset, offset + len)`, with room on the medium for the range as far as that can
    /// be had beforehand. What is there stays as it is; what is added reads as zeroes. ENOTSUP where it cannot be.
    fn preallocate(&self, offset: u64, len: u64) -> IoFuture<'_> {
        let _ = (offset, len);
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    /// The orderly end, after the last request: a format writes back what only it knows and clears its dirty bit. Called
    /// for parents before their children, at most once by whoever ends the graph; a node that is merely dropped is not
    /// closed.
    fn close(&self) -> IoFuture<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// How reads are composed from other nodes, for drivers that answer `submit` of a read with [`super::walk::read`].
    fn resolver(&self) -> Option<&dyn Resolver> {
        None
    }

    /// The name of the host file whose bytes the node shows as they are, if there is one.
    fn filename(&self) -> Option<String> {
        None
    }

    /// The identity of that file.
    fn file_id(&self) -> Option<FileId> {
        None
    }

    /// Prepares for a new set of permissions of the node's users: takes image locks, opens a file for writing. On an
    /// error nothing has changed. Permissions that only loosen do not fail.
    ///
    /// # Errors
    /// In QEMU's words.
    fn prepare_perms(&self, perms: Perms) -> Result<()> {
        let _ = perms;
        Ok(())
    }

    /// The permissions of the last `prepare_perms` are in force: gives up what is no longer needed.
    fn commit_perms(&self, perms: Perms) {
        let _ = perms;
    }

    /// The permissions of the last `prepare_perms` will not come into force: `perms` stay.
    fn abort_perms(&self, perms: Perms) {
        let _ = perms;
    }

    /// The driver's own options in force, for `--print-graph`.
    fn options_in_force(&self) -> Options;
}
