//! A node: the generic block layer around one driver. What the layer does with requests is in `io.rs`.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::driver::FileId;
use super::graph::{NodeId, Place};
use super::io::IoState;
use super::links::Link;
use super::{Driver, DriverDef, Event};

/// The unit of a disk's length: drivers may have odd lengths, guests see whole sectors.
pub const SECTOR: u64 = 512;

/// The longest that a node may become, in bytes: whatever it is rounded up to, it stays below the kernel's `loff_t`
/// (QEMU's BDRV_MAX_LENGTH).
pub const LEN_MAX: u64 = i64::MAX as u64 & !((1 << 30) - 1);

/// What a child is to its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Holds the bytes that the parent interprets (`file`).
    File,
    /// What is seen where the parent has nothing (`backing`).
    Backing,
    /// The one child of a filter (`file`), or of a format that shows its bytes unchanged.
    Filtered,
    /// Guest data only (`data-file`).
    Data,
}

impl Role {
    /// The word for it in `--print-graph`.
    pub fn name(self) -> &'static str {
        match self {
            Role::File => "storage",
            Role::Backing => "backing",
            Role::Filtered => "filtered",
            Role::Data => "data",
        }
    }
}

/// An edge of the graph: a child in its role. Made by [`super::OpenArgs::open_child`]; dropping it gives up the
/// permissions on the child.
pub struct Edge {
    /// The name of the option that defined it (`file`, `backing`, ...).
    pub name: &'static str,
    /// What the child is to the parent.
    pub role: Role,
    /// Declared before the child: permissions go first.
    pub(super) _link: Link,
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

impl DetectZeroes {
    /// The word that the user writes.
    pub fn name(self) -> &'static str {
        match self {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        }
    }
}

/// The generic options in force at a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
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
    def: &'static DriverDef,
    in_force: InForce,
    read_only: AtomicBool,
    /// Dropped first: the driver's edges give up their permissions while the node still has its place.
    driver: Box<dyn Driver>,
    place: Place,
    io: IoState,
}

impl Node {
    pub(super) fn new(
        place: Place,
        def: &'static DriverDef,
        in_force: InForce,
        driver: Box<dyn Driver>,
    ) -> Node {
        let read_only = AtomicBool::new(in_force.read_only);
        Node { def, in_force, read_only, driver, place, io: IoState::default() }
    }

    /// Its node-name.
    pub fn name(&self) -> &str {
        self.place.name()
    }

    /// Its place in the graph.
    pub(super) fn id(&self) -> NodeId {
        self.place.id()
    }

    /// Its driver's entry in the table.
    pub fn def(&self) -> &'static DriverDef {
        self.def
    }

    /// Its driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// The generic options in force, now.
    pub fn in_force(&self) -> InForce {
        InForce { read_only: self.read_only(), ..self.in_force }
    }

    /// Whether writes are refused, now. A node with `auto-read-only=on` that can still become writable is not
    /// read-only: who wants to write must get the permission first, and that opens it for writing.
    pub fn read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    /// `detect-zeroes=`.
    pub fn detect_zeroes(&self) -> DetectZeroes {
        self.in_force.detect_zeroes
    }

    /// `cache.no-flush=on`.
    pub fn ignores_flushes(&self) -> bool {
        self.in_force.cache_no_flush
    }

    /// What the generic layer keeps for requests.
    pub(super) fn io(&self) -> &IoState {
        &self.io
    }

    /// Tells the node that its parent is about to do something in it: see [`super::event`].
    pub fn event(&self, event: Event) {
        self.driver.event(event);
    }

    /// The nearest node whose driver has an answer to `ask`: this one, or along its storage.
    fn along_storage<T>(&self, ask: impl Fn(&dyn Driver) -> Option<T>) -> Option<T> {
        let mut node = self;
        loop {
            if let Some(answer) = ask(node.driver()) {
                return Some(answer);
            }
            let mut edges = node.driver().edges().iter();
            node = &edges.find(|e| e.name == "file" || e.role == Role::Filtered)?.node;
        }
    }

    /// The name of the host file that the node's bytes come from, directly or through its storage: what relative names
    /// in an image are relative to.
    pub fn base_filename(&self) -> Option<String> {
        self.along_storage(|driver| driver.filename())
    }

    /// The identity of that file.
    pub(super) fn file_id(&self) -> Option<FileId> {
        self.along_storage(|driver| driver.file_id())
    }

    /// Its length in bytes, rounded up to whole sectors.
    pub fn len(&self) -> u64 {
        self.driver.len().next_multiple_of(SECTOR)
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
