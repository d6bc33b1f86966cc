//! `blklogwrites`: its child's bytes; every change of them is written to a log, in the format of Linux's dm-log-writes.
//!
//! For tests of what is left after a power loss: the disk of any moment can be built from the log, by the tools for
//! dm-log-writes or by `tests/survival`. As QEMU's, the log has a request when it is done; changes of the length are not
//! logged. With `log-completions=on` (QEMU has no such thing) it has a request when it is sent, and a mark `done N` when the
//! log's entry N, counted from 0, is done: so a reader knows what was in flight when a flush was sent.
//!
//! The log (Documentation/admin-guide/device-mapper/log-writes.rst): sector 0 says how many entries follow; each is a sector
//! with a header, then the data. What the guest is told to be done is in the log before.
#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use crate::block::perm::{ChildPermQuery, Perm, Perms, default_child_perms};
use crate::block::{
    Driver, DriverDef, DriverKind, Edge, Event, IoFuture, Limits, Node, Op, OpenArgs, Recognises,
    Role, WriteFlags, ZeroFlags,
};
use crate::err;
use crate::error::{Errno, Result};
use crate::mem::Sg;
use crate::qapi::{Kind, OptionSpec, Options};
use crate::rt::Buffer;
use crate::rt::sync::RangeLock;

/// `blklogwrites`.
pub static BLKLOGWRITES: DriverDef = DriverDef {
    name: "blklogwrites",
    kind: DriverKind::Filter,
    options: &[
        OptionSpec::required("file", Kind::BlockdevRef),
        OptionSpec::required("log", Kind::BlockdevRef),
        OptionSpec::optional("log-sector-size", Kind::Int { bits: 32, signed: false }),
        OptionSpec::optional("log-append", Kind::Bool),
        OptionSpec::optional("log-super-update-interval", Kind::Int { bits: 64, signed: false }),
        OptionSpec::optional("log-completions", Kind::Bool),
    ],
    open,
    recognises: Recognises::Nothing,
    child_perms,
};

/// What a log begins with: the magic, the version.
const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
/// The bytes of a header: sector, sectors, flags, and the length of a mark's text.
const HEADER: u64 = 32;
/// The first sector size that is too large, in bytes (QEMU's).
const SECTOR_END: u64 = 1 << 24;
/// Entries after which the log's first sector is written without a flush (QEMU's).
const INTERVAL: u64 = 4096;
/// Fits the memory of any log that is opened with O_DIRECT.
const MEM_ALIGN: usize = 4096;

// The flags of an entry.
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

struct LogWrites {
    /// The file, then the log.
    edges: [Edge; 2],
    /// Bytes.
    sector: u64,
    interval: u64,
    completions: bool,
    end: Mutex<End>,
    /// Held by who writes the first sector, so that an older count never replaces a newer.
    first_sector: RangeLock,
}

/// Where the log ends: what is before may still be on its way there.
struct End {
    entries: u64,
    sectors: u64,
}

/// What an entry says besides its header.
enum Body<'a> {
    Nothing,
    Data(Sg<'a>),
    Zeroes,
    Text(String),
}

fn open(args: &mut OpenArgs<'_>) -> Result<Box<dyn Driver>> {
    let sector = args.take_size("log-sector-size")?;
    let interval = args.take_size("log-super-update-interval")?;
    let completions = args.take_bool("log-completions")?.unwrap_or(false);
    if args.take_bool("log-append")?.unwrap_or(false) {
        return Err(err!("'log-append' is not supported by vhost-user-blk yet"));
    }
    let file = args.open_child("file", Role::Filtered)?;
    let log = args.open_child("log", Role::Data)?;
    let sector = sector.unwrap_or(u64::from(file.node.driver().limits().request_align).max(512));
    if !sector.is_power_of_two() || !(HEADER..SECTOR_END).contains(&sector) {
        return Err(err!("Invalid log sector size {sector}"));
    }
    let interval = interval.unwrap_or(INTERVAL);
    if interval == 0 {
        return Err(err!("Invalid log superblock update interval 0"));
    }
    log.node.expect_ragged_writes(u32::try_from(sector).expect("it is below 16 MiB"));
    Ok(Box::new(LogWrites {
        edges: [file, log],
        sector,
        interval,
        completions,
        end: Mutex::new(End { entries: 0, sectors: 1 }),
        first_sector: RangeLock::default(),
    }))
}

/// The log is this node's alone, and grows.
fn child_perms(query: &ChildPermQuery) -> Perms {
    match query.role {
        Role::Data => {
            let changes = Perm::WRITE | Perm::RESIZE;
            Perms { used: changes, shared: Perm::all() - changes }
        }
        _ => default_child_perms(query),
    }
}

impl LogWrites {
    fn child(&self) -> &Node {
        &self.edges[0].node
    }

    fn log(&self) -> &Node {
        &self.edges[1].node
    }

    async fn serve(&self, op: Op<'_>) -> std::result::Result<(), Errno> {
        let (offset, len, flags, body) = match op {
            Op::Read { .. } => return self.child().submit(op).await,
            Op::Write { offset, from, flags } => {
                let fua = if flags.contains(WriteFlags::FUA) { FUA } else { 0 };
                (offset, from.len() as u64, fua, Body::Data(from))
            }
            Op::WriteZeroes { offset, len, flags } => {
                let fua = if flags.contains(ZeroFlags::FUA) { FUA } else { 0 };
                (offset, len, fua, Body::Zeroes)
            }
            Op::Discard { offset, len } => (offset, len, DISCARD, Body::Nothing),
            Op::Flush => (0, 0, FLUSH, Body::Nothing),
        };
        if self.completions {
            let entry = self.append(offset, len, flags, body).await?;
            self.child().submit(op).await?;
            self.append(0, 0, MARK, Body::Text(format!("done {entry}"))).await?;
        } else {
            self.child().submit(op).await?;
            self.append(offset, len, flags, body).await?;
        }
        Ok(())
    }

    /// Appends an entry on `[offset, offset + len)` of the file; its number.
    async fn append(
        &self,
        offset: u64,
        len: u64,
        flags: u64,
        body: Body<'_>,
    ) -> std::result::Result<u64, Errno> {
        let text = if let Body::Text(text) = &body { text.as_bytes() } else { &[] };
        let data = if let Body::Data(sg) = &body { sg.len() } else { 0 };
        let zeroes = if let Body::Zeroes = body { len } else { 0 };
        let header = usize::try_from(self.sector).expect("it is below 16 MiB");
        let mut buffer = Buffer::new(header + data, MEM_ALIGN);
        let bytes = buffer.bytes_mut();
        let words = [offset / self.sector, len / self.sector, flags, text.len() as u64];
        put(bytes, &words);
        bytes[HEADER as usize..][..text.len()].copy_from_slice(text);
        if let Body::Data(sg) = &body {
            sg.copy_to(&mut bytes[header..]);
        }
        let (entry, at) = {
            let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            let place = (end.entries, end.sectors * self.sector);
            end.entries += 1;
            end.sectors += (buffer.len() as u64 + zeroes) / self.sector;
            place
        };
        self.write_log(at, &buffer).await?;
        if zeroes > 0 {
            let (offset, flags) = (at + self.sector, ZeroFlags::MAY_UNMAP);
            self.log().submit(Op::WriteZeroes { offset, len: zeroes, flags }).await?;
        }
        if flags & FLUSH != 0 || (entry + 1).is_multiple_of(self.interval) {
            self.count().await?;
        }
        Ok(entry)
    }

    /// Writes the first sector, and makes the log stable.
    async fn count(&self) -> std::result::Result<(), Errno> {
        let guard = self.first_sector.lock(0..1, true).await;
        let entries = self.end.lock().unwrap_or_else(PoisonError::into_inner).entries;
        let mut buffer =
            Buffer::new(usize::try_from(self.sector).expect("it is below 16 MiB"), MEM_ALIGN);
        // The sector size has 32 bits there; what follows is 0.
        put(buffer.bytes_mut(), &[MAGIC, VERSION, entries, self.sector]);
        let written = self.write_log(0, &buffer).await;
        drop(guard);
        written?;
        self.log().submit(Op::Flush).await
    }

    async fn write_log(&self, offset: u64, buffer: &Buffer) -> std::result::Result<(), Errno> {
        let iov = [buffer.iovec()];
        let flags = WriteFlags::empty();
        self.log().submit(Op::Write { offset, from: Sg::new(&iov), flags }).await
    }
}

/// Writes words in little endian to the beginning of `bytes`.
fn put(bytes: &mut [u8], words: &[u64]) {
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
}

impl Driver for LogWrites {
    fn edges(&self) -> &[Edge] {
        &self.edges
    }

    fn len(&self) -> u64 {
        self.child().driver().len()
    }

    fn grows(&self) -> bool {
        self.child().driver().grows()
    }

    fn limits(&self) -> Limits {
        let child = self.child().driver().limits();
        let sector = u32::try_from(self.sector).expect("it is below 16 MiB");
        Limits { request_align: child.request_align.max(sector), mem_align: 1, ..child }
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        Box::pin(self.serve(op))
    }

    fn event(&self, event: Event) {
        self.child().event(event);
    }

    fn truncate(&self, len: u64) -> IoFuture<'_> {
        Box::pin(self.child().truncate(len))
    }

    fn follows_medium(&self) -> bool {
        self.child().driver().follows_medium()
    }

    fn look_at_len(&self) -> Option<u64> {
        self.child().driver().look_at_len()
    }

    fn preallocate(&self, offset: u64, len: u64) -> IoFuture<'_> {
        self.child().driver().preallocate(offset, len)
    }

    fn close(&self) -> IoFuture<'_> {
        if self.end.lock().unwrap_or_else(PoisonError::into_inner).entries == 0 {
            return Box::pin(std::future::ready(Ok(())));
        }
        Box::pin(self.count())
    }

    fn options_in_force(&self) -> Options {
        [
            ("log-sector-size", Value::from(self.sector)),
            ("log-super-update-interval", Value::from(self.interval)),
            ("log-completions", Value::from(self.completions)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .collect()
    }
}
