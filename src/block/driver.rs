//! What a driver is: its entry in the table, its options, how it opens, and what it does with requests.
#![forbid(unsafe_code)]

use super::graph::Graph;
use super::node::{Edge, InForce, Role};
use super::perm::Perms;
use super::{Dir, IoFuture, Limits, Map, Op};
use crate::error::Result;
use crate::qapi::{OptionSpec, Options};

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
    /// Opens a node of this driver.
    pub open: fn(&mut OpenArgs<'_>) -> Result<Box<dyn Driver>>,
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
}

/// What a node asks of a child and leaves to others, given what its own users ask and leave.
pub type ChildPerm = Perms;

#[expect(clippy::len_without_is_empty, reason = "a length in bytes, not a collection")]
/// The driver of one open node. Called from several threads at once.
pub trait Driver: Send + Sync {
    /// The children, with their roles.
    fn edges(&self) -> &[Edge] {
        &[]
    }

    /// The length of the node in bytes, now.
    fn len(&self) -> u64;

    /// What the node can take in one request.
    fn limits(&self) -> Limits;

    /// Fast lane: where `[offset, offset + len)` lives. Never blocks, locks or allocates. `len` is not 0, the range is
    /// inside the node.
    fn map(&self, dir: Dir, offset: u64, len: u64) -> Map<'_> {
        let _ = (dir, offset, len);
        Map::Slow
    }

    /// Slow lane: any operation.
    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a>;

    /// What this node asks of the child behind `edge`, given what its own users ask (`perms`), and whether the node
    /// is open read-only.
    fn child_perms(&self, edge: &Edge, perms: Perms, read_only: bool) -> Perms {
        let _ = edge;
        perms.for_format_child(edge.role == Role::File, read_only)
    }

    /// Prepares for a new set of permissions of the node's users: takes image locks, reopens a file for writing. On
    /// an error nothing has changed.
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
