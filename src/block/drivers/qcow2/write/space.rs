//! What the allocator needs from the world: its blocks, room in its cache, free clusters, a longer file.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::limbo::Freed;
use super::{LONGER_FILE, ROOM_FOR_TABLES, Writing};
use crate::block::Event;
use crate::block::drivers::qcow2::Image;
use crate::block::drivers::qcow2::check::disk::Disk;
use crate::block::drivers::qcow2::flight::Turn;
use crate::block::drivers::qcow2::layout::{HostOffset, OFFSET_MASK};
use crate::block::drivers::qcow2::options::Overlap;
use crate::block::drivers::qcow2::refcount::{Blocked, Damage};
use crate::error::Errno;
use crate::rt;
use crate::rt::sync::give_way;

/// By how much the file grows at a time: an eighth of its length between these, in bytes.
const WINDOW_MIN: u64 = 1 << 20;
const WINDOW_MAX: u64 = 64 << 20;
/// So many clusters are released before others get their turn on the thread.
const RELEASES_PER_TURN: u32 = 256;
/// A file system's block.
const BLOCK: u64 = 4096;
/// Who finds no space while others still use clusters that were freed looks again after this time, this many times.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
const LOOKS: u32 = 500;
/// How often a table that found no room looks for another place.
pub const TRIES: u32 = 3;

impl Image {
    /// Does what the allocator waits for.
    ///
    /// # Errors
    /// ENOSPC; a block cannot be read; EIO for an image that contradicts itself.
    pub async fn unblock(&self, w: &Writing, blocked: Blocked) -> Result<(), Errno> {
        match blocked {
            Blocked::Load { index, offset } => self.load_block(w, index, offset).await,
            Blocked::CacheFull => self.flush_tables().await,
            Blocked::Room { first, count } => self.room_for_tables(w, first, count).await,
            Blocked::NoSpace => self.make_room(w).await,
            Blocked::Corrupt(damage) => Err(self.fence(w, damage).await),
        }
    }

    async fn load_block(&self, w: &Writing, index: u64, offset: HostOffset) -> Result<(), Errno> {
        loop {
            match self.load_block_once(w, index, offset).await {
                Ok(()) => return Ok(()),
                Err(LoadError::CacheFull) => self.flush_tables().await?,
                Err(LoadError::Corrupt(damage)) => return Err(self.fence(w, damage).await),
                Err(LoadError::File(e)) => return Err(e),
            }
        }
    }

    /// Reads a refcount block into the cache; never waits for a flush: this may be the end of one.
    pub async fn load_block_once(
        &self,
        w: &Writing,
        index: u64,
        offset: HostOffset,
    ) -> Result<(), LoadError> {
        // One at a time, or old bytes could be read before, and come in after, somebody else's use of the block. Nobody can say
        // whether it has come meanwhile but the allocator, who will be asked again: who has waited asks.
        let mut asked = false;
        let look = || std::mem::replace(&mut asked, true).then_some(());
        let _flight = match w.blocks.turn(index, look).await {
            Turn::Found(()) => return Ok(()),
            Turn::Mine(flight) => flight,
        };
        self.meter.refcount_misses.count();
        let disk = Disk::new(self.file());
        self.file().event(Event::RefblockLoad);
        let buffer = disk.fetch(offset.0, self.geometry.cluster_size()).await?;
        match w.lock().refcounts.load(index, buffer.bytes()) {
            Ok(()) => Ok(()),
            Err(Blocked::Corrupt(damage)) => Err(LoadError::Corrupt(damage)),
            Err(_) => Err(LoadError::CacheFull),
        }
    }

    /// No cluster is free: gets back what is set aside or on its way to be free.
    ///
    /// # Errors
    /// ENOSPC: there is nothing of the kind.
    pub async fn make_room(&self, w: &Writing) -> Result<(), Errno> {
        let released = {
            let mut meta = w.lock();
            let meta = &mut *meta;
            if meta.streams.close(&mut meta.refcounts) {
                return Ok(());
            }
            meta.released
        };
        for _ in 0..LOOKS {
            {
                let meta = w.lock();
                if meta.limbo.is_empty() && meta.releasing == 0 {
                    break;
                }
            }
            self.flush_tables().await?;
            if w.lock().released != released {
                return Ok(());
            }
            // Requests in flight still use them; their ends need no help from here.
            rt::sleep(LOOK_AGAIN).await;
        }
        if w.lock().released != released { Ok(()) } else { Err(Errno::ENOSPC) }
    }

    /// Releases clusters whose time has come. What cannot be released now stays for the next time.
    pub async fn reap(&self, w: &Writing) {
        self.free_old_tables(w).await;
        let freed = {
            let mut meta = w.lock();
            let mut freed = meta.limbo.take(&w.grace);
            meta.releasing += freed.len();
            // One refcount block after the other.
            freed.sort_unstable_by_key(|f| f.cluster);
            freed
        };
        if freed.is_empty() {
            return;
        }
        let count = freed.len();
        self.discard_freed(w, &freed).await;
        let left = self.release(w, freed).await;
        let mut meta = w.lock();
        meta.releasing -= count;
        meta.limbo.push_ready(left);
    }

    /// Releases clusters; answers those that cannot be now: the next flush makes room for their refcount blocks.
    async fn release(&self, w: &Writing, freed: Vec<Freed>) -> impl Iterator<Item = Freed> + use<> {
        let (mut steps, mut left) = (0, freed.into_iter().peekable());
        while let Some(next) = left.peek().copied() {
            steps += 1;
            if steps % RELEASES_PER_TURN == 0 {
                give_way().await;
            }
            let end = next.cluster + 1;
            let bits = self.geometry.cluster_bits;
            self.compressed.forget(next.cluster << bits..end << bits);
            let result = {
                let mut meta = w.lock();
                let result = meta.refcounts.release(next.cluster);
                if let Ok(count) = &result {
                    meta.released += 1;
                    // The look through the L1 table last: it is long.
                    if *count == 0
                        && next.table
                        && !self.is_active_l1(next.cluster)
                        && !self.is_active_l2(next.cluster)
                    {
                        w.tables.remove(next.cluster, 1);
                    }
                    self.touch_refcounts(w);
                }
                self.note_tables(w, &mut meta);
                result
            };
            let again = match result {
                Ok(_) => {
                    left.next();
                    continue;
                }
                Err(Blocked::Load { index, offset }) => {
                    self.load_block_once(w, index, offset).await.is_ok()
                }
                Err(Blocked::Corrupt(damage)) => {
                    log::error!("qcow2: cannot free cluster {:#x}: {damage}", next.cluster << bits);
                    left.next();
                    continue;
                }
                Err(Blocked::CacheFull | Blocked::NoSpace | Blocked::Room { .. }) => false,
            };
            if !again {
                w.refcounts_too.store(true, Ordering::Relaxed);
                break;
            }
        }
        left
    }

    /// Whether the L1 table is in `cluster`.
    fn is_active_l1(&self, cluster: u64) -> bool {
        let (l1, len) = self.l1_place();
        let first = self.geometry.host_cluster(l1);
        (first..first + len.div_ceil(self.geometry.cluster_size())).contains(&cluster)
    }

    /// Whether the L1 table leads to `cluster`: in a broken image two entries may do.
    fn is_active_l2(&self, cluster: u64) -> bool {
        let at = cluster << self.geometry.cluster_bits;
        (0..self.l1.len()).any(|i| self.l1.get(i) & OFFSET_MASK == at)
    }

    /// Old refcount tables that the header no longer points to.
    async fn free_old_tables(&self, w: &Writing) {
        loop {
            let settled = {
                let mut meta = w.lock();
                let settled = meta.refcounts.settle();
                self.note_tables(w, &mut meta);
                settled
            };
            match settled {
                Err(Blocked::Load { index, offset }) => {
                    if self.load_block_once(w, index, offset).await.is_err() {
                        return;
                    }
                }
                // What cannot be done now is a leak until the next time.
                _ => return,
            }
        }
    }

    /// Lets the file forget the content of clusters, in order, that nobody uses any more.
    async fn discard_freed(&self, w: &Writing, freed: &[Freed]) {
        let mut clusters: Vec<u64> =
            freed.iter().filter(|f| f.discard).map(|f| f.cluster).collect();
        clusters.dedup();
        let bits = self.geometry.cluster_bits;
        let mut at = 0;
        while at < clusters.len() {
            let first = clusters[at];
            let mut count = 0;
            // Only what nobody else refers to.
            while clusters.get(at) == Some(&(first + count))
                && self.refcount(w, clusters[at]).await == Ok(1)
            {
                at += 1;
                count += 1;
            }
            self.file().event(Event::ClusterFree);
            Disk::new(self.file()).discard(first << bits, count << bits).await;
            at += usize::from(count == 0);
        }
    }

    async fn refcount(&self, w: &Writing, cluster: u64) -> Result<u64, Errno> {
        loop {
            let count = w.lock().refcounts.get(cluster);
            match count {
                Ok(count) => return Ok(count),
                Err(Blocked::Load { index, offset }) => {
                    self.load_block_once(w, index, offset).await.map_err(|_| Errno::EIO)?;
                }
                Err(_) => return Err(Errno::EIO),
            }
        }
    }

    /// Sees to it that writing tables to clusters that nobody uses yet will not fail for lack of room.
    ///
    /// # Errors
    /// ENOSPC and others.
    async fn room_for_tables(&self, w: &Writing, first: u64, count: u64) -> Result<(), Errno> {
        let end = first + count;
        let enough = || (w.lock().refcounts.room() >= end).then_some(());
        let _flight = match w.growth.turn(ROOM_FOR_TABLES, enough).await {
            Turn::Found(()) => return Ok(()),
            Turn::Mine(flight) => flight,
        };
        let bits = self.geometry.cluster_bits;
        let known = self.room_for(w, first << bits, count << bits).await?;
        w.lock().refcounts.set_room(if known { end } else { u64::MAX });
        Ok(())
    }

    /// Room on the medium for `[offset, offset + len)` of the file, which is at least so long then. Whether the file can tell.
    ///
    /// # Errors
    /// ENOSPC and others.
    pub async fn room_for(&self, w: &Writing, offset: u64, len: u64) -> Result<bool, Errno> {
        self.grow_to(w, offset + len).await?;
        match self.file().driver().preallocate(offset, len).await {
            Ok(()) => Ok(true),
            Err(Errno::ENOTSUP) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Makes the file at least `end` bytes long, in large steps: writes inside of a file do not wait for each other.
    ///
    /// # Errors
    /// ENOSPC and others.
    pub async fn grow_to(&self, w: &Writing, end: u64) -> Result<(), Errno> {
        let file = self.file();
        let enough = || (end <= file.len()).then_some(());
        let not_here = !file.driver().grows() || w.no_windows.load(Ordering::Relaxed);
        if enough().is_some() || not_here {
            return Ok(());
        }
        let _flight = match w.growth.turn(LONGER_FILE, enough).await {
            Turn::Found(()) => return Ok(()),
            Turn::Mine(flight) => flight,
        };
        let len = file.len();
        let window = (len / 8).clamp(WINDOW_MIN, WINDOW_MAX);
        let mut result = Ok(());
        let large = end.max((len + window).next_multiple_of(WINDOW_MIN));
        for (to, tight) in [(large, false), (end, true)] {
            // Through the page cache the length is enough: the file system finds places when it writes, and better ones. Past
            // the cache every write would look for a place itself. What is there stays: tables may be written past the
            // end meanwhile.
            let from =
                if file.in_force().cache_direct { len } else { len.max(to.saturating_sub(BLOCK)) };
            result = file.driver().preallocate(from, to - from).await;
            match result {
                Ok(()) => {
                    w.grown_from.fetch_min(len, Ordering::Relaxed);
                    w.tight.store(tight, Ordering::Relaxed);
                    break;
                }
                Err(e) if is_no_space(e) => {}
                Err(_) => break,
            }
        }
        match result {
            Err(Errno::ENOTSUP) => {
                w.no_windows.store(true, Ordering::Relaxed);
                Ok(())
            }
            result => result,
        }
    }

    /// Somebody's tables are where data, or another table, should go: the image is corrupt. QEMU's text.
    pub async fn overlap(&self, w: &Writing, host: HostOffset) -> Errno {
        let kind = self.kind_of_metadata(w, self.geometry.host_cluster(host));
        let what = format!("Preventing invalid write on metadata (overlaps with {kind})");
        self.fence(w, what).await
    }

    fn kind_of_metadata(&self, w: &Writing, cluster: u64) -> &'static str {
        let (g, h) = (&self.geometry, &self.header);
        if cluster == 0 {
            return Overlap::MAIN_HEADER.words();
        }
        if self.is_active_l1(cluster) {
            return Overlap::ACTIVE_L1.words();
        }
        if self.is_active_l2(cluster) {
            return Overlap::ACTIVE_L2.words();
        }
        match w.lock().refcounts.is_table(cluster) {
            Some(true) => return Overlap::REFCOUNT_TABLE.words(),
            Some(false) => return Overlap::REFCOUNT_BLOCK.words(),
            None => {}
        }
        if h.nb_snapshots > 0 && cluster == g.host_cluster(h.snapshots_offset) {
            return Overlap::SNAPSHOT_TABLE.words();
        }
        w.other_tables
            .iter()
            .find(|(range, _)| range.contains(&cluster))
            .map_or("metadata", |(_, kind)| kind.words())
    }
}

/// Why a refcount block is not in the cache.
pub enum LoadError {
    /// Only a flush makes room for it.
    CacheFull,
    /// It contradicts what is known.
    Corrupt(Damage),
    /// It could not be read.
    File(Errno),
}

impl From<Errno> for LoadError {
    fn from(e: Errno) -> Self {
        LoadError::File(e)
    }
}

/// Whether the host says that there is no room.
pub fn is_no_space(e: Errno) -> bool {
    matches!(e, Errno(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}
