//! L2 tables: a slice in the cache, a table where there is none, a table of one's own where it is shared.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::Writing;
use super::limbo::Freed;
use super::mutation::{Mutation, broken};
use super::space::{TRIES, is_no_space};
use crate::block::drivers::qcow2::Image;
use crate::block::drivers::qcow2::check::disk::Disk;
use crate::block::drivers::qcow2::flight::Turn;
use crate::block::drivers::qcow2::journal::{IN_L1, Record};
use crate::block::drivers::qcow2::layout::{GuestOffset, HostOffset, L1Entry};
use crate::block::drivers::qcow2::options::Overlap;
use crate::block::{Event, Op, ZeroFlags};
use crate::error::Errno;
use crate::rt::grace;

impl Image {
    /// Sees to it that the slice of `guest` is in the cache, now.
    ///
    /// # Errors
    /// Reading it, or writing others back to make room, fails.
    pub async fn cached_slice(&self, guest: GuestOffset) -> Result<(), Errno> {
        let (slice, index) = self.slice_of(guest);
        loop {
            let look = || self.cache.get_surely(slice, index).map(drop);
            let flight = match self.flights.turn(slice, look).await {
                Turn::Found(()) => return Ok(()),
                Turn::Mine(flight) => flight,
            };
            self.meter.l2_misses.count();
            let bytes = {
                let _pin = self.writing.as_ref().map(|w| grace::enter(&w.grace));
                self.read_slice(slice, guest).await?
            };
            if self.cache.fill(slice, bytes.bytes()).is_ok() {
                return Ok(());
            }
            drop(flight);
            self.flush_tables().await?;
        }
    }

    /// Sees to it that entry `l1_index` of the L1 table, `guest`'s, is an L2 table that nobody shares.
    ///
    /// A new table is all zeroes, on disk too, before the entry leads there. A shared one is copied: its entries stay as they
    /// are (those of shared clusters have no COPIED flag), and so do the slices of it in the cache.
    ///
    /// # Errors
    /// Reading or writing it fails, no space, a corrupt entry.
    pub async fn own_table(
        &self,
        w: &Writing,
        l1_index: u64,
        guest: GuestOffset,
    ) -> Result<(), Errno> {
        let own = || match L1Entry::decode(self.l1.get(l1_index), &self.geometry) {
            Ok(L1Entry { table: Some(_), copied: true }) => Some(Ok(())),
            Ok(_) => None,
            Err(bad) => Some(Err(bad)),
        };
        let _flight = match w.l2_tables.turn(l1_index, own).await {
            Turn::Found(found) => return found.map_err(|bad| self.corrupt_table(bad, l1_index)),
            Turn::Mine(flight) => flight,
        };
        let old = self.table_of(l1_index)?;
        let (table, fresh) = self.allocate_table(w).await?;
        let made = match old {
            None => self.zero_table(table, fresh).await,
            Some(old) => self.copy_table(old, table, l1_index).await,
        };
        if let Err(e) = made {
            w.lock().limbo.push_ready([self.freed_table(table)]);
            return Err(e);
        }
        if old.is_none() {
            self.cache_zeroes(guest);
        }
        let mut meta = loop {
            let meta = w.lock();
            if self.can_record(w, 1) {
                break meta;
            }
            drop(meta);
            if let Err(e) = self.flush().await {
                w.lock().limbo.push_ready([self.freed_table(table)]);
                return Err(e);
            }
        };
        self.touch(w);
        if self.choices.overlap_check.contains(Overlap::ACTIVE_L2) {
            w.tables.add(self.geometry.host_cluster(table), 1);
        }
        let entry = L1Entry { table: Some(table), copied: true };
        if let Some(log) = &w.journal {
            let (old, new) = (self.l1.get(l1_index), entry.encode());
            log.journal.append([Record { place: IN_L1 | l1_index, old, new }].into_iter());
            self.count_journal();
        }
        self.l1.set(l1_index, entry.encode());
        if let Some(old) = old {
            self.let_go(w, &mut meta, &[self.freed_table(old)]);
        }
        Ok(())
    }

    fn freed_table(&self, table: HostOffset) -> Freed {
        let cluster = self.geometry.host_cluster(table);
        Freed { cluster, discard: self.choices.pass_discard_other, table: true }
    }

    /// A cluster for a table, and whether the file reads as zeroes there.
    async fn allocate_table(&self, w: &Writing) -> Result<(HostOffset, bool), Errno> {
        let mut tries = 0;
        loop {
            let run = {
                let mut meta = w.lock();
                let run = meta.refcounts.allocate(1, None);
                self.note_tables(w, &mut meta);
                run
            };
            let run = match run {
                Ok(run) => run,
                Err(blocked) => {
                    self.unblock(w, blocked).await?;
                    continue;
                }
            };
            let table = HostOffset(run.first << self.geometry.cluster_bits);
            if w.tables.holds(run.first, 1) {
                return Err(self.overlap(w, table).await);
            }
            let end = table.plus(self.geometry.cluster_size()).0;
            if let Err(e) = self.room_for(w, table.0, end - table.0).await {
                w.lock().limbo.push_ready([self.freed_table(table)]);
                tries += 1;
                w.tight.store(true, Ordering::Relaxed);
                if is_no_space(e) && tries < TRIES && self.make_room(w).await.is_ok() {
                    continue;
                }
                return Err(e);
            }
            return Ok((table, run.fresh && self.file().len() >= end));
        }
    }

    async fn zero_table(&self, table: HostOffset, fresh: bool) -> Result<(), Errno> {
        if fresh || broken(Mutation::NoZeroedTable) {
            return Ok(());
        }
        let (offset, len) = (table.0, self.geometry.cluster_size());
        self.file().event(Event::L2AllocWrite);
        let flags = ZeroFlags::empty();
        self.file().submit(Op::WriteZeroes { offset, len, flags }).await
    }

    async fn copy_table(
        &self,
        from: HostOffset,
        to: HostOffset,
        l1_index: u64,
    ) -> Result<(), Errno> {
        let len = self.geometry.cluster_size();
        if from.0 + len > self.file().len() {
            return Err(self.table_beyond_end(from, l1_index));
        }
        let disk = Disk::new(self.file());
        self.file().event(Event::L2AllocCowRead);
        let bytes = disk.fetch(from.0, len).await?;
        self.file().event(Event::L2AllocWrite);
        disk.store(to.0, bytes.bytes()).await
    }

    /// The first slice of a new table need not be read. Before the L1 entry is set: nobody can have changed an entry of it yet.
    fn cache_zeroes(&self, guest: GuestOffset) {
        let bytes = vec![0; self.cache.shape().slice_bytes() as usize];
        // With all slots waiting to be written back it is read like any other.
        let _ = self.cache.fill(self.slice_of(guest).0, &bytes);
    }
}
