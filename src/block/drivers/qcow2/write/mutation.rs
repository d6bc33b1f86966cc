//! Deliberate mistakes, one at a time, to prove that the simulation finds them. In the program that is shipped [`broken`] is
//! `false` at compile time.
#![forbid(unsafe_code)]

/// A mistake: what is left out or done too early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// L2 entries are written without waiting for refcounts and data to be stable.
    NoFlushBeforeL2,
    /// Refcounts are written after the entries that rely on them.
    RefcountsLast,
    /// The refcount table is written without waiting for its blocks to be stable.
    NoFlushBeforeReftable,
    /// The header is switched to a moved refcount table that is not stable.
    NoFlushBeforeHeader,
    /// A flush ends without waiting for what it wrote last.
    NoLastFlush,
    /// L2 slices are written as they are when their turn comes, not as they were when the flush began.
    LiveSlices,
    /// A failed flush counts as successful for what it should have written.
    FailedFlushForgets,
    /// A flush shares the round that is running already.
    JoinRunningFlush,
    /// Freed clusters are used again before the entry without them is on disk.
    ReuseBeforeFlush,
    /// Freed clusters are used again while earlier requests may still touch them.
    ReuseInUse,
    /// Writers do not wait for others who are about to change the same entry.
    IgnoreBusy,
    /// Entries are linked before the data is written.
    LinkBeforeData,
    /// The rest of a new cluster is not filled up.
    NoCopyOnWrite,
    /// A new L2 table is not zeroed where the file holds something else.
    NoZeroedTable,
    /// A shared L2 table is changed in place.
    NoTableCopy,
    /// Writes that must be stable do not write their entries back.
    NoFlushForFua,
    /// With lazy refcounts the dirty bit is not set before entries are written.
    NoDirtyBit,
    /// A write that fails keeps its clusters linked.
    LinkFailedWrites,
    /// A flush does not make the external data file stable.
    NoDataFileFlush,
    /// A stable write in place does not look whether the entry that leads there is on disk.
    FuaOfDataOnly,
    /// What loses its entry while a flush is running counts as written by that flush.
    FreedByRunningFlush,
    /// The journal does not learn of discards and zeroes.
    UnloggedDiscards,
    /// The journal forgets what a flush is about to write.
    ForgetFirst,
    /// Records of the journal count before they are there.
    TailFirst,
}

#[cfg(any(test, feature = "sim"))]
mod switch {
    use std::cell::Cell;

    use super::Mutation;

    thread_local! {
        static BROKEN: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    impl Mutation {
        /// All of them.
        pub const ALL: [Mutation; 24] = [
            Mutation::NoFlushBeforeL2,
            Mutation::RefcountsLast,
            Mutation::NoFlushBeforeReftable,
            Mutation::NoFlushBeforeHeader,
            Mutation::NoLastFlush,
            Mutation::LiveSlices,
            Mutation::FailedFlushForgets,
            Mutation::JoinRunningFlush,
            Mutation::ReuseBeforeFlush,
            Mutation::ReuseInUse,
            Mutation::IgnoreBusy,
            Mutation::LinkBeforeData,
            Mutation::NoCopyOnWrite,
            Mutation::NoZeroedTable,
            Mutation::NoTableCopy,
            Mutation::NoFlushForFua,
            Mutation::NoDirtyBit,
            Mutation::LinkFailedWrites,
            Mutation::NoDataFileFlush,
            Mutation::FuaOfDataOnly,
            Mutation::FreedByRunningFlush,
            Mutation::UnloggedDiscards,
            Mutation::ForgetFirst,
            Mutation::TailFirst,
        ];
    }

    /// Makes the mistake from now on, on this thread; `None`: none.
    pub fn set(mutation: Option<Mutation>) {
        BROKEN.set(mutation);
    }

    /// Whether the mistake is to be made.
    pub fn broken(mutation: Mutation) -> bool {
        BROKEN.get() == Some(mutation)
    }
}

#[cfg(any(test, feature = "sim"))]
pub use switch::{broken, set};

/// Whether the mistake is to be made.
#[cfg(not(any(test, feature = "sim")))]
#[inline]
pub const fn broken(_: Mutation) -> bool {
    false
}
