//! The write path: what a writable image has besides its tables, and who does what.
//!
//! ```text
//!   Write ──► plan (Meta lock, microseconds) ──► in place ─────────────────► data file
//!                │                          └──► fill: old content + data ──► data file ──► link (Meta lock)
//!                ├─► busy: wait                                                               │
//!                ├─► no table, a shared table: tables.rs                         entries, dirty slices, limbo
//!                └─► refcount block, space: space.rs                                          │
//!   WriteZeroes, Discard ──► zero.rs: entries only ───────────────────────────────────────────┤
//!   Flush, upkeep, close ──► flush.rs: copies of all that is dirty, in the order of the rules ◄┘
//! ```
//!
//! Invariants:
//! * Who changes the entry of a cluster does so at once under the `Meta` lock, or holds the cluster in `busy` from the plan to
//!   the link. Overwriting data in place changes no entry and holds nothing.
//! * Between plan and link the clusters allocated have refcount 1 and no entry; if the write fails they go back.
//! * Entries change in memory first, after the journal has them (`record.rs`); `flush.rs` alone writes them to disk.
//! * `dirty` is set before an entry changes and cleared, under the lock, when all that is dirty has been written.
//! * No lock is held across `.await`.
#![forbid(unsafe_code)]

pub mod busy;
pub mod commit;
mod data;
mod flush;
pub mod limbo;
pub mod mutation;
mod plan;
mod record;
mod resize;
mod space;
pub mod streams;
mod table;
mod zero;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Image;
use super::flight::Flights;
use super::header::Header;
use super::header_io::HeaderIo;
use super::journal::Journal;
use super::layout::{HostOffset, MAX_HOST_OFFSET};
use super::opened::ForWriting;
use super::options::{Choices, Overlap};
use super::refcount::Refcounts;
use super::tables::Tables;
use crate::block::upkeep::Upkeep;
use crate::block::{Graph, Node};
use crate::err;
use crate::error::{Errno, Result};
use crate::rt::grace::Domain;
use busy::Busy;
use commit::Commit;
use limbo::{Freed, Limbo};
use record::Log;
use streams::Streams;

/// How long entries stay in memory only, at most, unless the guest flushes before.
pub const WRITE_BACK_AFTER: Duration = Duration::from_secs(5);

/// With more freed clusters than this on their way a flush does not wait for its time.
const LIMBO_MAX: usize = 1 << 16;
/// Keys of [`Writing::growth`]: the image file in advance; the guest's disk; the part of the file where tables may be made.
const LONGER_FILE: u64 = 0;
const LONGER_DISK: u64 = 1;
const ROOM_FOR_TABLES: u64 = 2;

/// The map of metadata has room for this many times the clusters of the file, or of the disk, at least for this many more; a bit
/// of address space for each.
const TABLES_FOR: u64 = 8;
const TABLES_MIN: u64 = 1 << 24;

/// What a writable image has besides its tables.
pub struct Writing {
    meta: Mutex<Meta>,
    /// Where metadata is: nobody writes data there.
    pub tables: Tables,
    commit: Commit,
    /// Refcount blocks being read, by their index in the refcount table.
    blocks: Flights,
    /// L2 tables being made, by their index in the L1 table.
    l2_tables: Flights,
    /// What is being made longer: [`LONGER_FILE`], [`LONGER_DISK`], [`ROOM_FOR_TABLES`].
    growth: Flights,
    /// The disk shall be so long: new clusters are filled up to there.
    growing_to: AtomicU64,
    /// The file cannot be made longer in advance: writes do so.
    no_windows: AtomicBool,
    /// When does nobody use a freed cluster any more.
    pub grace: Arc<Domain>,
    upkeep: Arc<Upkeep>,
    /// Something in memory must be written for the image on disk to be what the guest sees.
    dirty: AtomicBool,
    /// Metadata that is two things at once, if any: nothing may be changed.
    entangled: Option<HostOffset>,
    /// A flush was asked for because of the number of freed clusters.
    hurry: AtomicBool,
    /// The host has no room: no clusters are set aside, the lowest free ones are taken.
    tight: AtomicBool,
    /// The length of the file before it was made longer in advance for the first time: what is left over is cut off at the end.
    grown_from: AtomicU64,
    /// Metadata that never moves: snapshots, bitmaps.
    other_tables: Vec<(Range<u64>, Overlap)>,
    /// The next flush writes refcounts, lazy or not.
    refcounts_too: AtomicBool,
    /// The incompatible feature bit "dirty" is on disk.
    dirty_bit: AtomicBool,
    /// The image contradicts itself: nobody may use it any more.
    fenced: AtomicBool,
    /// Where changes of entries are recorded for a successor, if anywhere.
    journal: Option<Arc<Log>>,
    /// Writes fields of the header.
    pub header: HeaderIo,
}

/// What the lock protects.
pub struct Meta {
    refcounts: Refcounts,
    streams: Streams,
    busy: Busy,
    limbo: Limbo,
    /// References that somebody is releasing now.
    releasing: usize,
    /// References released so far: who waits for space looks whether it grows.
    released: u64,
}

impl Writing {
    /// For an image whose tables have been read.
    ///
    /// # Errors
    /// No memory; a refcount table that contradicts itself.
    pub fn new(
        file: &Node,
        header: &Header,
        choices: &Choices,
        found: ForWriting,
        graph: &Graph,
        journal: Option<Arc<Journal>>,
    ) -> Result<Writing> {
        let no_memory = |_| err!("Could not allocate metadata caches");
        let geometry = header.geometry();
        let (bits, cluster) = (geometry.cluster_bits, geometry.cluster_size());
        // A device cannot grow, and what it holds beyond our clusters is not known to be zeroes.
        let grows = file.driver().grows();
        let limit = if grows { MAX_HOST_OFFSET >> bits } else { file.len() >> bits };
        let in_use = file.len().div_ceil(cluster);
        let refcounts = Refcounts::new(
            geometry,
            found.reftable,
            header.refcount_table_offset,
            header.refcount_table_clusters,
            in_use,
            limit,
            usize::try_from(choices.refblocks).unwrap_or(usize::MAX),
        );
        let most = in_use.max(geometry.clusters_for(header.size)).saturating_mul(TABLES_FOR);
        let tables = Tables::new(most.saturating_add(TABLES_MIN).min(MAX_HOST_OFFSET >> bits));
        let tables = tables.map_err(no_memory)?;
        let mut entangled = None;
        for (Range { start, end }, kind) in &found.tables {
            // Snapshots share L2 tables with the active L1 table.
            if tables.holds(*start, end - start) && *kind != Overlap::INACTIVE_L2 {
                entangled = Some(HostOffset(start << bits));
            }
            tables.add(*start, end - start);
        }
        // Where blocks of the medium are larger than clusters, metadata and data share them.
        file.expect_ragged_writes(u32::try_from(cluster).unwrap_or(u32::MAX));
        let mut refcounts = refcounts.map_err(no_memory)?;
        if grows {
            refcounts.set_room(in_use);
        }
        let meta = Meta {
            refcounts,
            streams: Streams::new(bits),
            busy: Busy::default(),
            limbo: Limbo::default(),
            releasing: 0,
            released: 0,
        };
        Ok(Writing {
            meta: Mutex::new(meta),
            tables,
            other_tables: found.tables,
            commit: Commit::default(),
            blocks: Flights::default(),
            l2_tables: Flights::default(),
            growth: Flights::default(),
            growing_to: AtomicU64::new(0),
            no_windows: AtomicBool::new(false),
            entangled,
            hurry: AtomicBool::new(false),
            tight: AtomicBool::new(false),
            grown_from: AtomicU64::new(u64::MAX),
            grace: Arc::clone(graph.grace()),
            upkeep: Arc::clone(graph.upkeep()),
            dirty: AtomicBool::new(false),
            refcounts_too: AtomicBool::new(false),
            dirty_bit: AtomicBool::new(false),
            fenced: AtomicBool::new(false),
            journal: journal.map(|journal| Log::new(journal, graph.upkeep())),
            header: found.header,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the image on disk is what the guest sees, but for data in caches of the host.
    pub fn is_stable(&self) -> bool {
        !self.dirty.load(Ordering::Acquire)
    }

    /// A place that belongs to two tables.
    pub fn entangled(&self) -> Option<HostOffset> {
        self.entangled
    }

    /// Memory of cached refcount blocks, in bytes.
    pub fn refcount_memory(&self) -> u64 {
        self.lock().refcounts.memory()
    }

    /// Whether the image must not be used any more.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Relaxed)
    }
}

impl Image {
    /// To be called before an entry changes, under the lock.
    fn touch(&self, w: &Writing) {
        if !w.dirty.swap(true, Ordering::AcqRel) {
            self.tend_later(w);
            if let Some(log) = &w.journal {
                log.beat_later();
            }
        }
    }

    fn tend_later(&self, w: &Writing) {
        self.tend_at(w, Instant::now() + WRITE_BACK_AFTER);
    }

    fn tend_at(&self, w: &Writing, when: Instant) {
        w.upkeep.at(when, self.me.clone());
    }

    /// The image contradicts itself in a way that writing would make worse: marks it, once, and lets nobody use it any more.
    /// The text as QEMU's.
    async fn fence(&self, w: &Writing, what: impl std::fmt::Display) -> Errno {
        if !w.fenced.swap(true, Ordering::Relaxed) {
            log::error!(
                "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
            );
            if let Err(e) = w.header.mark_corrupt(self.file()).await {
                log::error!("qcow2: Could not mark the image as corrupt: {e}");
            }
        }
        Errno::EIO
    }

    /// Takes the table clusters that the allocator has made, or freed, since the last time.
    fn note_tables(&self, w: &Writing, meta: &mut Meta) {
        let protected = self.choices.overlap_check.contains(Overlap::REFCOUNT_BLOCK);
        for change in meta.refcounts.take_changes() {
            if change.added && protected {
                w.tables.add(change.first, change.count);
            } else if !change.added {
                w.tables.remove(change.first, change.count);
            }
        }
    }

    /// An entry in memory has just lost these references.
    fn let_go(&self, w: &Writing, meta: &mut Meta, freed: &[Freed]) {
        if freed.is_empty() {
            return;
        }
        let tag = w.grace.tag();
        freed.iter().for_each(|f| meta.limbo.push(*f, tag));
        // Whoever writes and discards and never flushes shall not fill memory, or the file.
        if meta.limbo.len() >= LIMBO_MAX && !w.hurry.swap(true, Ordering::Relaxed) {
            self.tend_at(w, Instant::now());
        }
    }
}
