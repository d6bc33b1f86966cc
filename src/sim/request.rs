//! What a simulated disk is like, what is asked of it, and what shall go wrong.

use std::ops::Range;

use super::Pages;
use super::history::FlushFailure;
use crate::block::Op;
use crate::error::Errno;

/// The kinds of request, as faults and counts name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A write-zeroes.
    WriteZeroes,
    /// A discard.
    Discard,
    /// A flush.
    Flush,
    /// A change of the length.
    Truncate,
}

/// How many kinds of request there are.
pub(super) const KINDS: usize = Request::ALL.len();

/// A request as it comes from a driver.
#[derive(Clone, Copy)]
pub(super) enum Work<'a> {
    /// An operation.
    Op(Op<'a>),
    /// The length in bytes to be.
    Truncate(u64),
    /// The least length in bytes.
    Grow(u64),
}

impl Work<'_> {
    /// The bytes that it works on; flushes: none.
    pub(super) fn range(&self) -> Range<u64> {
        match *self {
            Work::Op(Op::Read { offset, to }) => offset..offset + to.len() as u64,
            Work::Op(Op::Write { offset, from, .. }) => offset..offset + from.len() as u64,
            Work::Op(Op::WriteZeroes { offset, len, .. } | Op::Discard { offset, len }) => {
                offset..offset.saturating_add(len)
            }
            Work::Op(Op::Flush) => 0..0,
            Work::Truncate(len) | Work::Grow(len) => len..u64::MAX,
        }
    }
}

impl Request {
    /// All kinds.
    pub const ALL: [Request; 6] = [
        Request::Read,
        Request::Write,
        Request::WriteZeroes,
        Request::Discard,
        Request::Flush,
        Request::Truncate,
    ];

    /// The kind of `work`.
    pub(super) fn of(work: &Work<'_>) -> Request {
        match work {
            Work::Op(Op::Read { .. }) => Request::Read,
            Work::Op(Op::Write { .. }) => Request::Write,
            Work::Op(Op::WriteZeroes { .. }) => Request::WriteZeroes,
            Work::Op(Op::Discard { .. }) => Request::Discard,
            Work::Op(Op::Flush) => Request::Flush,
            Work::Truncate(_) | Work::Grow(_) => Request::Truncate,
        }
    }
}

/// What reads see where a discard was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarded {
    /// Zeroes: a hole in a file.
    Zero,
    /// What was there: a device that ignores it.
    Old,
    /// Anything, fixed at the time of the discard: some devices.
    Garbage,
}

/// One thing that shall go wrong.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which kind of request fails.
    pub request: Request,
    /// Which one of that kind, in the order in which they are issued; from 0.
    pub nth: u64,
    /// How many of them fail, one after the other.
    pub times: u64,
    /// The error.
    pub errno: Errno,
    /// Whether a part of a write is stored all the same.
    pub partial: bool,
}

/// What a disk is like.
#[derive(Clone, Copy, Debug)]
pub struct DiskOptions {
    /// Requests start and end at multiples of this (bytes, power of two).
    pub request_align: u32,
    /// The length can never exceed this: a device (whose image has this length) or a full file system. Bytes.
    pub capacity: u64,
    /// Whether it can zero ranges; ENOTSUP if not.
    pub zeroes: bool,
    /// What discards do.
    pub discarded: Discarded,
    /// What failed flushes do.
    pub flush_failure: FlushFailure,
}

impl Default for DiskOptions {
    /// A file through the page cache of a file system with much room.
    fn default() -> Self {
        DiskOptions {
            request_align: 1,
            capacity: 1 << 50,
            zeroes: true,
            discarded: Discarded::Zero,
            flush_failure: FlushFailure::Sticky,
        }
    }
}

/// A disk to be: the argument of [`super::Sim::add_disk`].
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// The name by which nodes of driver `sim-disk` find it (option `disk`).
    pub name: String,
    /// What it holds.
    pub image: Pages,
    /// What it is like.
    pub options: DiskOptions,
}

impl DiskSpec {
    /// A well-behaved file called `name`.
    pub fn file(name: &str, image: Pages) -> DiskSpec {
        DiskSpec { name: name.to_owned(), image, options: DiskOptions::default() }
    }
}
