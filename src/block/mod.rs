//! The vocabulary every driver author reads: operations, maps, limits, and what a driver must provide.
//!
//! A [`Node`] is QEMU's BlockDriverState: the generic block layer around one [`Driver`]. A request enters at the
//! root node and takes one of two lanes:
//!
//! * **fast**: [`Node::locate`] walks from the root to a leaf without waiting, locking or allocating, and answers
//!   "these bytes are at this offset of this file" ([`Map::File`]); the worker hands that to the kernel itself;
//! * **slow**: [`Node::submit`], plain `async` code, for everything else.
//!
//! Rules for a driver author:
//! 1. `map` never blocks, locks or allocates; when in doubt it answers [`Map::Slow`].
//! 2. `map` may only answer [`Map::File`] for a write when the bytes may be overwritten in place, now, without
//!    bookkeeping before or after.
//! 3. A future returned by `submit` is always driven to its end; it may borrow the operation's memory.
//! 4. `submit` sees requests already checked: inside the node's size (or past it, where the driver grows), aligned to
//!    its limits, not a write on a read-only node. It may be called from several threads at once.
//! 5. The descriptor number of a [`File`] is its identity for as long as the node lives: a file that is reopened in
//!    another access mode keeps it (`dup3`). Nobody may remember the open file behind it (io_uring's registered
//!    files would).
//! 6. No lock is held across `.await`, unless it is one of [`crate::rt::sync`].
//! 7. A place that `map` or a [`Resolver`](driver::Resolver) answered may be in use until its request is done. Who gives it
//!    to somebody else waits for that: [`Graph::grace`].
//! 8. A driver with metadata in memory says so ([`Driver::is_stable`]), writes it back in time ([`Graph::upkeep`]), on a
//!    flush, and in [`Driver::close`]. Nothing happens when it is dropped.
#![deny(unsafe_code)]

pub mod driver;
pub mod drivers;
pub mod event;
pub mod graph;
pub mod implicit;
pub mod io;
mod links;
pub mod node;
mod open;
pub mod opener;
pub mod perm;
pub mod print;
pub mod upkeep;
pub mod walk;

use std::future::Future;
use std::pin::Pin;

pub use driver::{Driver, DriverDef, DriverKind, OpenArgs, Recognises};
pub use event::Event;
pub use graph::{Graph, RootUser};
pub use node::{Edge, InForce, Node, Role};
pub use opener::Opener;

use crate::error::Errno;
use crate::mem::Sg;
use crate::rt::File;

/// The future of one operation. Boxed: the slow lane may allocate.
pub type IoFuture<'a> = Pin<Box<dyn Future<Output = Result<(), Errno>> + 'a>>;

bitflags::bitflags! {
    /// Modifiers of [`Op::Write`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct WriteFlags: u8 {
        /// The data must be stable when the write completes (QEMU's BDRV_REQ_FUA).
        const FUA = 1;
    }
}

bitflags::bitflags! {
    /// Modifiers of [`Op::WriteZeroes`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ZeroFlags: u8 {
        /// The range may be deallocated as long as it reads as zeroes (QEMU's BDRV_REQ_MAY_UNMAP).
        const MAY_UNMAP = 1;
        /// Fail with ENOTSUP rather than write zero bytes one by one (BDRV_REQ_NO_FALLBACK).
        const NO_FALLBACK = 2;
        /// The zeroes must be stable when the operation completes.
        const FUA = 4;
    }
}

/// One block operation. `Copy`, borrowed, no allocation: a filter forwards it by value. Offsets and lengths in bytes.
#[derive(Clone, Copy)]
pub enum Op<'a> {
    /// Fill `to` with the bytes at `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// Where the bytes go; its length is the request's.
        to: Sg<'a>,
    },
    /// Store the bytes of `from` at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// Where the bytes come from; its length is the request's.
        from: Sg<'a>,
        /// Modifiers.
        flags: WriteFlags,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Modifiers.
        flags: ZeroFlags,
    },
    /// The content of a range is no longer needed.
    Discard {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Everything completed before is made stable.
    Flush,
}

/// The direction of a data transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dir {
    /// From the disk to memory.
    Read,
    /// From memory to the disk.
    Write,
}

/// Where a byte range lives, as far as can be said without waiting.
pub enum Map<'a> {
    /// The same bytes, at `offset` of another node.
    Child {
        /// The child node.
        child: &'a Node,
        /// Offset in bytes in the child.
        offset: u64,
    },
    /// The bytes at `offset` of `file`: one kernel request does it.
    File {
        /// The open file.
        file: &'a File,
        /// Offset in bytes in the file.
        offset: u64,
    },
    /// Reads as zeroes.
    Zero,
    /// Nothing to do at all: a null device (reads leave the memory untouched, writes vanish).
    Null,
    /// Needs allocation, decoding, waiting: use [`Node::submit`].
    Slow,
}

/// What a node can take in one request; the generic layer splits and aligns so that a driver never sees more.
/// Lengths in bytes; 0 = no limit unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Reads and writes start and end at multiples of this (power of two, at least 1).
    pub request_align: u32,
    /// Memory must start at multiples of this (power of two, at least 1).
    pub mem_align: u32,
    /// The longest read or write.
    pub max_transfer: u32,
    /// The most memory ranges in one read or write.
    pub max_iov: u32,
    /// Discards start and end at multiples of this (at least 1); ragged ends are dropped.
    pub discard_align: u32,
    /// The longest discard.
    pub max_discard: u64,
    /// Write-zeroes start and end at multiples of this (at least 1); ragged ends are written as data.
    pub zeroes_align: u32,
    /// The longest write-zeroes.
    pub max_zeroes: u64,
    /// Preferred alignment and size of requests (0 = unknown): a cluster, a stripe.
    pub opt_transfer: u32,
    /// The medium's physical block size (0 = unknown).
    pub physical_block: u32,
}

impl Limits {
    /// No limits, nothing known: what a driver without any answers.
    pub const NONE: Limits = Limits {
        request_align: 1,
        mem_align: 1,
        max_transfer: 0,
        max_iov: 1024,
        discard_align: 1,
        max_discard: 0,
        zeroes_align: 1,
        max_zeroes: 0,
        opt_transfer: 0,
        physical_block: 0,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Limits::NONE
    }
}
