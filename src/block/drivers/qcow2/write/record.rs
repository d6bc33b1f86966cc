//! Changes of entries, recorded for whoever opens the image after this process was killed; see [`super::super::journal`].
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::Writing;
use super::mutation::{Mutation, broken};
use crate::block::IoFuture;
use crate::block::drivers::qcow2::Image;
use crate::block::drivers::qcow2::journal::{Journal, RECORDS, Record};
use crate::block::drivers::qcow2::layout::L2Entry;
use crate::block::upkeep::{Tend, Upkeep};
use crate::error::Errno;

/// How often the journal hears that the process is alive, while there is something in it.
const BEAT: Duration = Duration::from_secs(1);

/// A journal with its sign of life.
pub struct Log {
    me: Weak<Log>,
    pub journal: Arc<Journal>,
    upkeep: Arc<Upkeep>,
    /// The orderly end has come.
    over: AtomicBool,
}

impl Log {
    pub fn new(journal: Arc<Journal>, upkeep: &Arc<Upkeep>) -> Arc<Log> {
        let upkeep = Arc::clone(upkeep);
        Arc::new_cyclic(|me| Log { me: me.clone(), journal, upkeep, over: false.into() })
    }

    /// The end of what is recorded now, which a flush that begins now writes.
    pub fn mark(&self) -> u64 {
        let mark = self.journal.mark();
        if broken(Mutation::ForgetFirst) {
            self.journal.forget(mark);
        }
        mark
    }

    pub fn beat_later(&self) {
        self.upkeep.at(Instant::now() + BEAT, self.me.clone());
    }
}

impl Tend for Log {
    fn tend(&self) -> IoFuture<'_> {
        self.journal.beat();
        if !self.over.load(Ordering::Relaxed) && !self.journal.is_empty() {
            self.beat_later();
        }
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Image {
    /// After the last flush: nothing is left for a successor, and the image says so.
    pub async fn release_journal(&self, w: &Writing) -> Result<(), Errno> {
        let Some(log) = &w.journal else { return Ok(()) };
        if !log.journal.is_empty() || log.over.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let done = w.header.set_autoclear(self.file(), self.header.autoclear).await;
        log.journal.remove();
        done
    }

    /// The journal has more or fewer records than before.
    pub fn count_journal(&self) {
        let log = self.writing.as_ref().and_then(|w| w.journal.as_ref());
        if let Some(log) = log {
            self.meter.journal.set(log.journal.len());
            self.meter.journal_room.set(RECORDS);
        }
    }

    /// Whether a change of so many entries can be recorded; only a flush makes room. With the `Meta` lock held.
    pub fn can_record(&self, w: &Writing, entries: usize) -> bool {
        let Some(log) = &w.journal else { return true };
        if log.journal.len() > RECORDS / 2 && !w.hurry.swap(true, Ordering::Relaxed) {
            self.tend_at(w, Instant::now());
        }
        log.journal.has_room(2 * entries as u64)
    }

    /// Changes entries of a cached slice, recorded before anybody sees them. Whether the slice is cached. With the `Meta` lock
    /// held, after [`Image::can_record`].
    ///
    /// # Errors
    /// There is no such table.
    pub fn store(
        &self,
        w: &Writing,
        slice: u64,
        index: u32,
        entries: &[L2Entry],
    ) -> Result<bool, Errno> {
        let Some(log) = &w.journal else { return Ok(self.cache.store(slice, index, entries)) };
        let (table, inside) = self.place_of(slice)?;
        let start = table.plus(inside).0;
        Ok(self.cache.store_logged(slice, index, entries, |words| {
            let record = |(at, old, new)| Record { place: start + at * 8, old, new };
            log.journal.append(words.map(record));
            self.count_journal();
        }))
    }
}
