//! A node: the generic block layer around one driver.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{Driver, DriverDef, Map};

/// What a child is to its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Holds the bytes that the parent interprets (`file`).
    File,
    /// What is seen where the parent has nothing (`backing`).
    Backing,
    /// The one child of a filter (`file`).
    Filtered,
    /// Guest data only (`data-file`).
    Data,
}

/// An edge of the graph: a child in its role.
pub struct Edge {
    /// The name of the option that defined it (`file`, `backing`, ...).
    pub name: &'static str,
    /// What the child is to the parent.
    pub role: Role,
    /// The child.
    pub node: Arc<Node>,
}

/// `detect-zeroes=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// Writes are written.
    #[default]
    Off,
    /// Writes of zeroes become write-zeroes.
    On,
    /// Writes of zeroes become write-zeroes that may unmap.
    Unmap,
}

/// The generic options in force at a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InForce {
    /// No writes.
    pub read_only: bool,
    /// Read-only only as long as nobody wants to write.
    pub auto_read_only: bool,
    /// No image locks against other writers.
    pub force_share: bool,
    /// O_DIRECT at the protocol.
    pub cache_direct: bool,
    /// Flushes are ignored.
    pub cache_no_flush: bool,
    /// Discards are passed on.
    pub discard_unmap: bool,
    /// Writes of zeroes are looked for.
    pub detect_zeroes: DetectZeroes,
}

/// One node of the block graph: QEMU's BlockDriverState.
pub struct Node {
    name: String,
    def: &'static DriverDef,
    driver: Box<dyn Driver>,
    in_force: InForce,
}

impl Node {
    /// Its node-name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its driver's entry in the table.
    pub fn def(&self) -> &'static DriverDef {
        self.def
    }

    /// Its driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// The generic options in force.
    pub fn in_force(&self) -> &InForce {
        &self.in_force
    }
}

/// The leaf that [`Node::locate`] found.
pub type Leaf<'a> = Map<'a>;
