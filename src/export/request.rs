//! One request: from the chain to what is to be done, and the slow lane's ways of doing it.
//!
//! A slot belongs to one head of one ring; its index *is* the head, so a guest that offers a head twice is caught by
//! the slot's state. What the guest controls (header, segments) is copied once and checked on the copy.
#![forbid(unsafe_code)]

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::block::io::BOUNCE_MAX;
use crate::block::{Node, Op, WriteFlags, ZeroFlags};
use crate::error::Errno;
use crate::mem::{GuestMap, IoVec, Sg};
use crate::metrics::{Kind, Stamp};
use crate::rt::grace::Entry;
use crate::virtio::blk::{
    self, DISCARD_SECTORS_MAX, DISCARD_SEGMENTS_MAX, HEADER_LEN, Header, SECTOR, SEGMENT_LEN,
    Segment, Status, ZEROES_SECTORS_MAX, ZEROES_SEGMENTS_MAX,
};
use crate::virtio::ring::Chain;

/// What a request asks for, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Move data; byte offset on the disk.
    Transfer {
        /// To the disk.
        write: bool,
        /// First byte.
        offset: u64,
    },
    /// Make everything stable.
    Flush,
    /// Deallocate or zero ranges.
    Ranges {
        /// Zero them (else discard).
        zero: bool,
        /// The ranges.
        segments: Vec<Segment>,
    },
    /// Done already, with this status.
    Finished(Status),
}

/// A request, for messages.
#[derive(Clone, Copy, Debug, Default)]
pub struct Doing {
    /// What is done.
    pub what: &'static str,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// It is a read.
    pub reads: bool,
    /// A device that cannot do it says so (VIRTIO_BLK_S_UNSUPP) rather than failing.
    pub optional: bool,
}

impl Action {
    /// Whether it changes the disk.
    pub fn changes(&self) -> bool {
        matches!(self, Action::Transfer { write: true, .. } | Action::Ranges { .. })
    }

    /// What it does; a transfer is of `len` bytes.
    pub fn describe(&self, len: u64) -> Doing {
        match self {
            Action::Transfer { write, offset } => {
                let what = if *write { "write" } else { "read" };
                Doing { what, offset: *offset, len, reads: !write, optional: false }
            }
            Action::Ranges { zero, segments } => Doing {
                what: if *zero { "write zeroes" } else { "discard" },
                offset: segments.first().map_or(0, |s| s.sector * SECTOR),
                len: segments.iter().map(|s| u64::from(s.sectors) * SECTOR).sum(),
                reads: false,
                optional: true,
            },
            Action::Flush | Action::Finished(_) => Doing { what: "flush", ..Doing::default() },
        }
    }
}

/// What requests are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Disk<'a> {
    /// Sectors.
    pub capacity: u64,
    /// Logical block size in bytes.
    pub block: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// For GET_ID.
    pub serial: &'a [u8],
}

/// The state of one head of a ring.
#[derive(Default)]
pub struct Slot {
    /// The guest has given us the chain and not got it back.
    pub busy: bool,
    /// The chain; after [`Slot::parse`] without header and status.
    pub chain: Chain,
    /// First data range in `chain.iov`.
    first: usize,
    /// The status byte.
    status: Option<IoVec>,
    /// What the used element says: bytes that may have been written, with the status byte.
    pub used_len: u32,
    /// What the header asks for.
    pub kind: Kind,
    /// The bytes that are read, written or given up, if all goes well.
    pub len: u64,
    /// When it was taken.
    pub since: Stamp,
    /// What the slow lane is doing for it.
    pub doing: Doing,
    /// It failed, and is kept or being tried again.
    pub held: bool,
    /// The transfer in the kernel.
    pub transfer: Option<Transfer>,
}

/// A transfer in the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// To the disk.
    pub write: bool,
    /// First byte on the disk.
    pub offset: u64,
    /// Length in bytes: what the kernel answers if all went well.
    pub len: i32,
    /// A write that need not be stable, as far as was known when it began.
    pub volatile: bool,
    /// Since when its place must not be given to somebody else.
    pub entry: Entry,
}

impl Slot {
    /// The request's data ranges: of an OUT the readable, else the writable ones.
    pub fn data(&self, write: bool) -> &[IoVec] {
        if write {
            &self.chain.iov[self.first..self.chain.readable]
        } else {
            &self.chain.iov[self.chain.readable..]
        }
    }

    /// Their length together, in bytes.
    pub fn data_len(&self, write: bool) -> u64 {
        if write { self.chain.readable_len } else { self.chain.writable_len }
    }

    /// Splits the chain into header, data and status, reads the header and checks the request. One that cannot be served
    /// for its shape is finished, and `chain.bad` says why.
    ///
    /// # Errors
    /// A reason, if there is no status byte to answer with.
    #[inline]
    pub fn parse(&mut self, disk: &Disk<'_>) -> Result<Action, &'static str> {
        self.first = 0;
        let total = self.chain.readable_len + self.chain.writable_len;
        self.used_len = u32::try_from(self.chain.writable_len).unwrap_or(u32::MAX);
        self.status = self.cut_status();
        if self.status.is_none() {
            return Err(self.chain.bad.unwrap_or("a chain without a status byte"));
        }
        let header = self.cut_header();
        if total > u64::from(u32::MAX) {
            self.chain.bad = Some("a chain of more than 4 GiB (VIRTIO 1.3, 2.7.13)");
        }
        match (self.chain.bad, header) {
            (None, Some(header)) => Ok(self.check(header, disk)),
            (bad, _) => {
                self.chain.bad = bad.or(Some("no complete header"));
                (self.kind, self.len) = (Kind::Other, 0);
                Ok(Action::Finished(Status::IoErr))
            }
        }
    }

    fn cut_status(&mut self) -> Option<IoVec> {
        if self.chain.cut {
            return None;
        }
        let n = self.chain.iov.len();
        let last = *self.chain.iov[self.chain.readable..].last()?;
        let (data, status) = (last.part(0, last.len() - 1), last.part(last.len() - 1, 1));
        if data.is_empty() {
            self.chain.iov.pop();
        } else {
            self.chain.iov[n - 1] = data;
        }
        self.chain.writable_len -= 1;
        Some(status)
    }

    #[inline]
    fn cut_header(&mut self) -> Option<Header> {
        let readable = &self.chain.iov[..self.chain.readable];
        // As all drivers have it: a descriptor of its own.
        if let Some(v) = readable.first().filter(|v| v.len() == HEADER_LEN) {
            self.first = 1;
            self.chain.readable_len -= HEADER_LEN as u64;
            return v.first().map(|bytes| Header::parse(&bytes));
        }
        self.gather_header()
    }

    /// The header, in pieces or with data behind it.
    #[cold]
    fn gather_header(&mut self) -> Option<Header> {
        let mut bytes = [0; HEADER_LEN];
        let mut have = 0;
        while have < HEADER_LEN {
            let v = *self.chain.iov[..self.chain.readable].get(self.first)?;
            let n = v.len().min(HEADER_LEN - have);
            Sg::new(&[v.part(0, n)]).copy_to(&mut bytes[have..have + n]);
            have += n;
            self.chain.readable_len -= n as u64;
            if n == v.len() {
                self.first += 1;
            } else {
                self.chain.iov[self.first] = v.part(n, v.len() - n);
            }
        }
        Some(Header::parse(&bytes))
    }

    #[inline]
    fn check(&mut self, header: Header, disk: &Disk<'_>) -> Action {
        let write = match header.kind {
            VIRTIO_BLK_T_IN => false,
            VIRTIO_BLK_T_OUT => true,
            _ => return self.check_other(header, disk),
        };
        self.kind = if write { Kind::Write } else { Kind::Read };
        match write && disk.read_only {
            true => Action::Finished(Status::IoErr),
            false => self.check_transfer(header, disk, write),
        }
    }

    #[cold]
    fn check_other(&mut self, header: Header, disk: &Disk<'_>) -> Action {
        self.len = 0;
        self.kind = match header.kind {
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::GetId,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            _ => Kind::Other,
        };
        match self.kind {
            Kind::Flush => Action::Flush,
            Kind::GetId => self.get_id(disk),
            Kind::Discard | Kind::WriteZeroes if disk.read_only => Action::Finished(Status::IoErr),
            Kind::Discard => self.check_ranges(disk, false),
            Kind::WriteZeroes => self.check_ranges(disk, true),
            _ => Action::Finished(Status::Unsupp),
        }
    }

    fn check_transfer(&mut self, header: Header, disk: &Disk<'_>, write: bool) -> Action {
        let len = self.data_len(write);
        self.len = len;
        match blk::byte_range(header.sector, len, disk.capacity, disk.block) {
            Some(_) if len == 0 => Action::Finished(Status::Ok),
            Some(offset) => Action::Transfer { write, offset },
            None => Action::Finished(Status::IoErr),
        }
    }

    fn get_id(&mut self, disk: &Disk<'_>) -> Action {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let n = disk.serial.len().min(id.len());
        id[..n].copy_from_slice(&disk.serial[..n]);
        let to = Sg::new(self.data(false));
        let n = to.len().min(id.len());
        to.slice(0, n).copy_from(&id[..n]);
        self.len = n as u64;
        Action::Finished(Status::Ok)
    }

    fn check_ranges(&mut self, disk: &Disk<'_>, zero: bool) -> Action {
        let data = Sg::new(self.data(true));
        let count = data.len() / SEGMENT_LEN;
        if count == 0 || !data.len().is_multiple_of(SEGMENT_LEN) {
            return Action::Finished(Status::IoErr);
        }
        let (count_max, sectors_max) = if zero {
            (ZEROES_SEGMENTS_MAX, ZEROES_SECTORS_MAX)
        } else {
            (DISCARD_SEGMENTS_MAX, DISCARD_SECTORS_MAX)
        };
        if count > count_max {
            return Action::Finished(Status::Unsupp);
        }
        let mut bytes = vec![0; data.len()];
        data.copy_to(&mut bytes);
        let segments: Vec<Segment> = bytes.chunks_exact(SEGMENT_LEN).map(Segment::parse).collect();
        let allowed = if zero { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        if segments.iter().any(|s| s.flags & !allowed != 0) {
            return Action::Finished(Status::Unsupp);
        }
        let fits = |s: &Segment| {
            let len = u64::from(s.sectors) * SECTOR;
            s.sectors <= sectors_max
                && blk::byte_range(s.sector, len, disk.capacity, disk.block).is_some()
        };
        self.len = segments.iter().map(|s| u64::from(s.sectors) * SECTOR).sum();
        if segments.iter().all(fits) {
            Action::Ranges { zero, segments }
        } else {
            Action::Finished(Status::IoErr)
        }
    }

    /// The status byte's place.
    pub fn status(&self) -> &[IoVec] {
        self.status.as_slice()
    }

    /// Writes the status byte.
    pub fn answer(&self, status: Status) {
        if let Some(at) = self.status {
            at.set_first(status.byte());
        }
    }
}

/// The length of all ranges together, in bytes.
pub fn bytes(iov: &[IoVec]) -> u64 {
    iov.iter().map(|v| v.len() as u64).sum()
}

/// A request for the slow lane: owns what it needs, the guest's memory map above all.
pub struct Slow {
    /// The root node.
    pub root: Arc<Node>,
    /// Keeps the ranges mapped.
    pub map: Arc<GuestMap>,
    /// The data ranges of a transfer.
    pub iov: Vec<IoVec>,
    /// What to do.
    pub action: Action,
    /// Stable before it completes.
    pub fua: bool,
}

impl Slow {
    /// The memory it may need for bounce buffers and the like, in bytes: workers bound the sum.
    pub fn weight(&self) -> u64 {
        match self.action {
            // What is around the data in a format's cluster may have to be copied.
            Action::Transfer { write, .. } => {
                let cluster = u64::from(self.root.driver().limits().opt_transfer);
                bytes(&self.iov).min(BOUNCE_MAX) + if write { 2 * cluster } else { 0 }
            }
            Action::Ranges { .. } => BOUNCE_MAX,
            Action::Flush | Action::Finished(_) => 0,
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// The first error met.
    pub async fn run(&self) -> Result<(), Errno> {
        let root = &self.root;
        match &self.action {
            Action::Transfer { write: false, offset } => {
                root.submit(Op::Read { offset: *offset, to: Sg::new(&self.iov) }).await
            }
            Action::Transfer { write: true, offset } => {
                let flags = if self.fua { WriteFlags::FUA } else { WriteFlags::empty() };
                root.submit(Op::Write { offset: *offset, from: Sg::new(&self.iov), flags }).await
            }
            Action::Flush => root.submit(Op::Flush).await,
            Action::Ranges { zero, segments } => {
                for s in segments {
                    self.range(*zero, s).await?;
                }
                if self.fua { root.submit(Op::Flush).await } else { Ok(()) }
            }
            Action::Finished(_) => Ok(()),
        }
    }

    async fn range(&self, zero: bool, s: &Segment) -> Result<(), Errno> {
        let (offset, len) = (s.sector * SECTOR, u64::from(s.sectors) * SECTOR);
        if len == 0 {
            return Ok(());
        }
        if !zero {
            return self.root.submit(Op::Discard { offset, len }).await;
        }
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::MAY_UNMAP, s.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0);
        self.root.submit(Op::WriteZeroes { offset, len, flags }).await
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
