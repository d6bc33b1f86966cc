//! Where guest data is, and reading what is not simply somewhere.
//!
//! Both lanes look a guest offset up in the same way: the L1 entry and the cached slice give a [`Mapping`], its run of
//! equal subclusters is extended over the following entries as long as they continue it, and the result is a
//! [`Place`]. The fast lane gives up where the slice is not cached; the slow lane reads it.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

use super::Image;
use super::check::disk::Disk;
use super::flight::Turn;
use super::layout::{
    BadEntry, CompressedData, GuestOffset, Hex, HostOffset, L1Entry, L2Entry, Mapping, Subcluster,
    subcluster,
};
use crate::block::driver::{ResolveFuture, Resolver};
use crate::block::{Event, IoFuture, Map, Node};
use crate::error::Errno;
use crate::mem::Sg;
use crate::rt::{Buffer, grace};

/// Says once that the image is corrupt, as QEMU does.
#[derive(Default)]
pub struct Corruption {
    said: AtomicBool,
}

impl Corruption {
    /// Reports what a request has met; the request fails with the error returned.
    pub fn met(&self, what: impl std::fmt::Display) -> Errno {
        if !self.said.swap(true, Ordering::Relaxed) {
            log::error!(
                "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
            );
        }
        Errno::EIO
    }
}

/// Where the first bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the data file.
    Data(HostOffset),
    /// Nowhere: zeroes.
    Zero,
    /// Where the backing file has them, if there is one.
    Backing,
    /// In compressed data.
    Compressed(CompressedData),
}

impl Place {
    /// Whether `next` is what follows after `len` bytes.
    fn continues_with(self, len: u64, next: Place) -> bool {
        match (self, next) {
            (Place::Data(here), Place::Data(there)) => here.plus(len) == there,
            (Place::Zero, Place::Zero) | (Place::Backing, Place::Backing) => true,
            _ => false,
        }
    }
}

impl Image {
    /// The slice of `guest` and the index of its entry there.
    pub fn slice_of(&self, guest: GuestOffset) -> (u64, u32) {
        let cluster = guest.0 >> self.geometry.cluster_bits;
        let entries = self.cache.shape().entries;
        (cluster >> entries.trailing_zeros(), (cluster & u64::from(entries - 1)) as u32)
    }

    /// Where `len` bytes at `guest` are, if they are data of one cluster that is [plain](L2Entry::plain).
    #[inline]
    pub fn plain(&self, guest: GuestOffset, len: u64, copied: bool) -> Option<HostOffset> {
        let inside = self.geometry.in_cluster(guest);
        if len > self.geometry.cluster_size() - inside {
            return None;
        }
        let (slice, index) = self.slice_of(guest);
        let host = self.cache.get(slice, index)?.plain(&self.geometry, copied)?;
        Some(host.plus(inside))
    }

    /// The entry of `guest`'s cluster will soon be looked at.
    pub fn prefetch(&self, guest: GuestOffset) {
        let (slice, index) = self.slice_of(guest);
        self.cache.prefetch(slice, index);
    }

    /// The mapping of `guest`'s cluster as far as it can be told without waiting. Takes no lock.
    pub fn look_up(&self, guest: GuestOffset) -> Option<Result<Mapping, BadEntry>> {
        let (slice, index) = self.slice_of(guest);
        self.by_entry(guest, self.cache.get(slice, index))
    }

    /// As [`Image::look_up`]; `None` says that the slice is not cached, rather than that an entry is being stored.
    fn look_up_surely(&self, guest: GuestOffset) -> Option<Result<Mapping, BadEntry>> {
        let (slice, index) = self.slice_of(guest);
        self.by_entry(guest, self.cache.get_surely(slice, index))
    }

    fn by_entry(
        &self,
        guest: GuestOffset,
        entry: Option<L2Entry>,
    ) -> Option<Result<Mapping, BadEntry>> {
        match entry {
            Some(entry) => Some(entry.decode(&self.geometry, self.geometry.cluster_start(guest))),
            None => {
                let l1 = self.l1.get(self.geometry.l1_index(guest));
                let none =
                    matches!(L1Entry::decode(l1, &self.geometry), Ok(e) if e.table.is_none());
                none.then_some(Ok(Mapping::UNALLOCATED))
            }
        }
    }

    /// The run of equal subclusters that starts at `guest`: at most to the end of its cluster, at most `len`.
    pub fn run(&self, mapping: Mapping, guest: GuestOffset, len: u64) -> (Place, u64) {
        let g = &self.geometry;
        let inside = g.in_cluster(guest);
        let to_end = (g.cluster_size() - inside).min(len);
        let (host, allocated, zero) = match mapping {
            Mapping::Compressed(data) => return (Place::Compressed(data), to_end),
            Mapping::Standard { host, allocated, zero, .. } => (host, allocated, zero),
        };
        let first = g.subcluster_index(guest);
        let state = subcluster(allocated, zero, first);
        let mut end = first + 1;
        while end < g.subclusters() && subcluster(allocated, zero, end) == state {
            end += 1;
        }
        let run = (u64::from(end) << g.subcluster_bits()) - inside;
        let place = match (state, host) {
            (Subcluster::Data, Some(host)) => Place::Data(host.plus(inside)),
            (Subcluster::Zero, _) => Place::Zero,
            // Decoding has seen to it that data has a host cluster.
            (Subcluster::Unallocated, _) | (Subcluster::Data, None) => Place::Backing,
        };
        (place, run.min(to_end))
    }

    /// The place of `guest` by its cluster's `mapping`, and how far it goes on, over cached entries, up to `len`.
    fn extent(&self, mapping: Mapping, guest: GuestOffset, len: u64) -> (Place, u64) {
        self.extent_of(mapping, guest, len, |_| true)
    }

    /// As [`Image::extent`], as far as the clusters that follow are such as `goes_on` wants them.
    #[inline]
    pub fn extent_of(
        &self,
        mapping: Mapping,
        guest: GuestOffset,
        len: u64,
        goes_on: impl Fn(Mapping) -> bool,
    ) -> (Place, u64) {
        let (place, mut n) = self.run(mapping, guest, len);
        while n < len {
            let next = guest.plus(n);
            let Some(Ok(mapping)) = self.look_up(next) else { break };
            let (more, m) = self.run(mapping, next, len - n);
            if !goes_on(mapping) || !place.continues_with(n, more) {
                break;
            }
            n += m;
        }
        (place, n)
    }

    /// Fast lane for reads.
    pub fn map_read(&self, offset: u64, len: u64) -> Map<'_> {
        let guest = GuestOffset(offset);
        if let Some(HostOffset(at)) = self.plain(guest, len, false) {
            return within(self.data(), at, len);
        }
        let Some(Ok(mapping)) = self.look_up(guest) else { return Map::Slow };
        let (place, n) = self.extent(mapping, guest, len);
        if n < len {
            return Map::Slow;
        }
        match place {
            Place::Zero => Map::Zero,
            Place::Data(HostOffset(at)) => within(self.data(), at, len),
            Place::Backing => match self.backing() {
                None => Map::Zero,
                Some(backing) if offset >= backing.len() => Map::Zero,
                Some(backing) => within(backing, offset, len),
            },
            Place::Compressed(_) => Map::Slow,
        }
    }

    /// Fast lane for writes: what may be overwritten where it is.
    pub fn map_write(&self, offset: u64, len: u64) -> Map<'_> {
        let Some(w) = &self.writing else { return Map::Slow };
        if w.entangled().is_some() {
            return Map::Slow;
        }
        match self.in_place(w, GuestOffset(offset), len) {
            Some((HostOffset(at), n)) if n == len => within(self.data(), at, len),
            _ => Map::Slow,
        }
    }

    /// The mapping of `guest`'s cluster, reading its slice if it must.
    async fn mapping(&self, guest: GuestOffset) -> Result<Mapping, Errno> {
        let start = self.geometry.cluster_start(guest);
        let (slice, index) = self.slice_of(guest);
        let turn = match self.look_up(guest) {
            Some(found) => Turn::Found(found),
            None => self.flights.turn(slice, || self.look_up_surely(guest)).await,
        };
        let found = match turn {
            Turn::Found(found) => {
                self.meter.l2_hits.count();
                found
            }
            Turn::Mine(_flight) => {
                self.meter.l2_misses.count();
                let bytes = self.read_slice(slice, guest).await?;
                // All slots waiting to be written back: then this request does without the cache.
                let _ = self.cache.fill(slice, bytes.bytes());
                // Not from the cache: with few slots it may be evicted again already, and so on for ever.
                self.entry_in(bytes.bytes(), index).decode(&self.geometry, start)
            }
        };
        found.map_err(|bad| self.corrupt_entry(bad, start))
    }

    fn entry_in(&self, slice: &[u8], index: u32) -> L2Entry {
        let size = self.cache.shape().entry_words as usize * 8;
        let mut words = slice[index as usize * size..][..size].chunks_exact(8).map(|bytes| {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            u64::from_be_bytes(word)
        });
        let word = words.next().unwrap_or(0);
        L2Entry { word, bitmap: words.next().unwrap_or(0) }
    }

    /// The L2 table that entry `l1_index` of the L1 table leads to.
    ///
    /// # Errors
    /// EIO: the entry is bad.
    pub fn table_of(&self, l1_index: u64) -> Result<Option<HostOffset>, Errno> {
        let entry = L1Entry::decode(self.l1.get(l1_index), &self.geometry);
        entry.map(|e| e.table).map_err(|bad| self.corrupt_table(bad, l1_index))
    }

    /// Where a slice is in the file: its table, and how far into that, in bytes.
    ///
    /// # Errors
    /// EIO: there is no table, or a bad one.
    pub fn place_of(&self, slice: u64) -> Result<(HostOffset, u64), Errno> {
        let bytes = self.cache.shape().slice_bytes();
        let per_table = self.geometry.cluster_size() / bytes;
        // None: somebody has freed the table since the look-up.
        let table = self.table_of(slice / per_table)?.ok_or(Errno::EIO)?;
        Ok((table, slice % per_table * bytes))
    }

    /// Reads the slice of `guest`'s L2 table from the file: one transfer.
    pub async fn read_slice(&self, slice: u64, guest: GuestOffset) -> Result<Buffer, Errno> {
        let bytes = self.cache.shape().slice_bytes();
        let (table, inside) = self.place_of(slice)?;
        let at = table.plus(inside);
        if at.0 + bytes > self.file().len() {
            return Err(self.table_beyond_end(table, self.geometry.l1_index(guest)));
        }
        self.file().event(Event::L2Load);
        Disk::new(self.file()).fetch(at.0, bytes).await
    }

    /// QEMU would read zeroes there: silent loss.
    pub fn table_beyond_end(&self, table: HostOffset, l1_index: u64) -> Errno {
        let (table, l1_index) = (Hex(table.0), Hex(l1_index));
        self.corruption.met(format_args!(
            "L2 table offset {table} beyond the end of the image file (L1 index: {l1_index})"
        ))
    }

    pub fn corrupt_table(&self, bad: BadEntry, l1_index: u64) -> Errno {
        let index = Hex(l1_index);
        match bad {
            BadEntry::Unaligned(HostOffset(offset)) => self
                .corruption
                .met(format_args!("L2 table offset {} unaligned (L1 index: {index})", Hex(offset))),
            bad => self.corruption.met(format_args!("L1 entry {index} invalid ({bad:?})")),
        }
    }

    /// QEMU's words for a bad entry of the cluster that starts at `guest`.
    pub fn corrupt_entry(&self, bad: BadEntry, guest: GuestOffset) -> Errno {
        let l1 = L1Entry::decode(self.l1.get(self.geometry.l1_index(guest)), &self.geometry);
        let table = l1.ok().and_then(|e| e.table).map_or(0, |t| t.0);
        let index = Hex(self.geometry.l2_index(guest));
        let place = format!("(L2 offset: {}, L2 index: {index})", Hex(table));
        let text = match bad {
            BadEntry::Unaligned(HostOffset(offset)) => {
                format!("Cluster allocation offset {} unaligned {place}", Hex(offset))
            }
            BadEntry::ZeroInV2 => format!("Zero cluster entry found in pre-v3 image {place}"),
            BadEntry::CompressedInDataFile => {
                format!("Compressed cluster entry found in image with external data file {place}")
            }
            BadEntry::Displaced { host, guest } => format!(
                "External data file host cluster offset {} does not match guest cluster offset: \
                 {}, L2 index: {index})",
                Hex(host.0),
                Hex(guest.0)
            ),
            BadEntry::Subclusters(_) => format!("Invalid cluster entry found  {place}"),
            BadEntry::Reserved(bits) => {
                format!("L2 entry with reserved bits set: {} {place}", Hex(bits))
            }
            BadEntry::CompressedTooFar(HostOffset(offset)) => {
                format!("Compressed cluster offset {} too large {place}", Hex(offset))
            }
        };
        self.corruption.met(text)
    }

    /// Reads a part of a compressed cluster.
    async fn read_compressed(&self, guest: GuestOffset, to: Sg<'_>) -> Result<(), Errno> {
        let Mapping::Compressed(data) = self.mapping(guest).await? else {
            // Rewritten since: ask again where it is.
            return crate::block::walk::read(self, guest.0, to).await;
        };
        let cluster = self.compressed.get(data, async || self.read_packed(data).await).await?;
        let inside = usize::try_from(self.geometry.in_cluster(guest)).map_err(|_| Errno::EIO)?;
        let part = cluster.get(inside..).and_then(|rest| rest.get(..to.len()));
        to.copy_from(part.ok_or(Errno::EIO)?);
        Ok(())
    }

    /// The packed bytes; the last sector may hang over the end of the file.
    async fn read_packed(&self, data: CompressedData) -> Result<Vec<u8>, Errno> {
        let CompressedData { offset: HostOffset(at), len } = data;
        let len = len.min(self.file().len().saturating_sub(at));
        if len == 0 {
            return Err(self.corruption.met(format_args!(
                "Compressed cluster offset {} beyond the end of the image file",
                Hex(at)
            )));
        }
        self.file().event(Event::ReadCompressed);
        let buffer = Disk::new(self.file()).fetch(at, len).await?;
        Ok(buffer.bytes().to_vec())
    }

    async fn find(&self, offset: u64, len: u64) -> Result<(Map<'_>, u64), Errno> {
        let guest = GuestOffset(offset);
        let mapping = self.mapping(guest).await?;
        let (place, n) = self.extent(mapping, guest, len);
        let map = match place {
            Place::Zero => Map::Zero,
            Place::Data(HostOffset(offset)) => {
                self.data().event(Event::ReadAio);
                Map::Child { child: self.data(), offset }
            }
            Place::Backing => match self.backing() {
                None => Map::Zero,
                Some(child) => {
                    self.file().event(Event::ReadBackingAio);
                    Map::Child { child, offset }
                }
            },
            Place::Compressed(_) => Map::Slow,
        };
        Ok((map, n))
    }
}

/// The range of `child`, if it is inside.
fn within(child: &Node, offset: u64, len: u64) -> Map<'_> {
    match offset.checked_add(len) {
        Some(end) if end <= child.len() => Map::Child { child, offset },
        _ => Map::Slow,
    }
}

impl Resolver for Image {
    fn enter(&self) -> Option<grace::Pin> {
        self.writing.as_ref().map(|w| grace::enter(&w.grace))
    }

    fn resolve(&self, offset: u64, len: u64) -> ResolveFuture<'_> {
        Box::pin(self.find(offset, len))
    }

    fn fetch<'a>(&'a self, offset: u64, to: Sg<'a>) -> IoFuture<'a> {
        Box::pin(self.read_compressed(GuestOffset(offset), to))
    }
}
