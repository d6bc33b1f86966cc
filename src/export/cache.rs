//! Whether writes may stay volatile until the guest flushes.
//!
//! The driver chooses (CONFIG_WCE), and tells the front end, which tells the process that serves the disk at that moment. A process
//! that takes over a running guest, after a crash or a migration, hears nothing: QEMU reads the configuration when its device is
//! made, writes it when the driver does, and never again. The guest may rely on write-through and send no flushes. So a ring
//! that goes on where another process left it makes all writes stable, until it is known what the guest thinks: the driver
//! sets the mode, a device state brings it, or a flush comes that was sent to this process: who relies on write-through sends none.
#![forbid(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use super::lock;
use crate::virtio::feature;

/// What is known of the front end that is connected.
#[derive(Default)]
struct Peer {
    /// It has read the configuration, and no ring has gone on where another process left it.
    told: bool,
    /// The rings that it has started.
    started: Vec<u16>,
}

struct State {
    /// The mode that was configured, or set by the driver.
    writeback: bool,
    /// The guest knows it.
    known: bool,
    peer: Peer,
}

/// The cache mode of an export.
pub struct Cache {
    state: Mutex<State>,
    /// Writes need not be stable: changes under the lock of `state`.
    volatile: AtomicBool,
    /// Writes are stable only because of what is not known: likewise.
    unsure: AtomicBool,
}

impl Cache {
    pub fn new(writeback: bool) -> Cache {
        // Until a ring goes on, there is nothing to doubt.
        let state = State { writeback, known: false, peer: Peer::default() };
        let (volatile, unsure) = (AtomicBool::new(writeback), AtomicBool::new(false));
        Cache { state: Mutex::new(state), volatile, unsure }
    }

    /// Whether the mode in force is write-back.
    #[inline]
    pub fn writeback(&self) -> bool {
        self.volatile.load(Ordering::Relaxed)
    }

    fn apply(&self, state: &State, sure: bool) {
        self.volatile.store(state.writeback && sure, Ordering::SeqCst);
        self.unsure.store(state.writeback && !sure, Ordering::SeqCst);
    }

    /// The front end reads the configuration.
    pub fn told(&self) {
        let mut state = lock(&self.state);
        state.peer.told |= state.peer.started.is_empty();
    }

    /// The driver sets the mode. Whether it was write-back before.
    pub fn set(&self, writeback: bool) -> bool {
        let mut state = lock(&self.state);
        state.known = true;
        state.writeback = writeback;
        let before = self.writeback();
        self.apply(&state, true);
        before
    }

    /// Queue `index` starts, for a driver that can set the mode; `resumed`: not from its ring's beginning. Whether writes are made
    /// stable from now on because it is not known what the guest thinks.
    pub fn start(&self, index: u16, resumed: bool) -> bool {
        let mut state = lock(&self.state);
        let first = !state.peer.started.contains(&index);
        if first {
            state.peer.started.push(index);
        }
        if resumed && first && (state.peer.told || !state.known) {
            // A guest that ran elsewhere: what its front end has just been told, it has not.
            (state.known, state.peer.told) = (false, false);
        } else if state.peer.told {
            state.known = true;
        }
        // A driver that begins was told the mode by its front end, which may know it from somebody else.
        let was_sure = !self.unsure.load(Ordering::Relaxed);
        self.apply(&state, state.known);
        was_sure && self.unsure.load(Ordering::Relaxed)
    }

    /// The guest flushes, and does so knowing this process. Whether that shows what was not known.
    #[inline]
    pub fn flushed(&self) -> bool {
        self.unsure.load(Ordering::Relaxed) && self.learn()
    }

    #[cold]
    fn learn(&self) -> bool {
        let mut state = lock(&self.state);
        let news = !std::mem::replace(&mut state.known, true);
        self.apply(&state, true);
        news
    }

    /// The front end is gone. The mode stays: a guest that comes back, or reads the configuration anew, sees what is true.
    pub fn disconnected(&self) {
        lock(&self.state).peer = Peer::default();
    }
}

/// [`QueueSetup::base`](crate::vhost_user::QueueSetup) of a ring that nobody has used, with these features.
pub fn beginning(features: u64) -> u32 {
    // Packed: position 0 and wrap counter 1, of both sides.
    if features & feature(VIRTIO_F_RING_PACKED) == 0 { 0 } else { 0x8000_8000 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest whose driver begins here.
    fn fresh() -> Cache {
        let cache = Cache::new(true);
        cache.told();
        assert!(!cache.start(0, false) && !cache.start(1, false));
        assert!(cache.writeback());
        cache
    }

    #[test]
    fn a_guest_that_begins_here_knows() {
        let cache = fresh();
        assert!(!cache.start(0, true) && cache.writeback(), "a ring that was stopped a while");
        cache.disconnected();
        assert!(!cache.start(0, true) && cache.writeback(), "a front end that lost its socket");
        assert!(cache.set(false));
        cache.disconnected();
        assert!(!cache.start(0, true) && !cache.writeback() && !cache.flushed());
    }

    #[test]
    fn a_guest_that_comes_from_elsewhere_does_not() {
        // After a crash of ours; after a migration; into a process that another guest used before.
        let (crash, migration, reused) = (Cache::new(true), Cache::new(true), fresh());
        migration.told();
        reused.disconnected();
        reused.told();
        for cache in [&crash, &migration, &reused] {
            assert!(!cache.start(1, false) || std::ptr::eq(cache, &raw const crash));
            assert!(cache.start(0, true) || std::ptr::eq(cache, &raw const crash));
            assert!(!cache.start(2, false), "a queue that was never used tells nothing");
            assert!(!cache.writeback());
            cache.told();
            assert!(!cache.start(0, false) && !cache.writeback(), "a driver that begins anew");
            assert!(cache.flushed() && cache.writeback() && !cache.flushed());
        }
    }

    #[test]
    fn what_the_driver_sets_is_known() {
        for writeback in [true, false] {
            let cache = Cache::new(true);
            assert!(cache.start(0, true));
            cache.set(writeback);
            assert!(!cache.start(1, true));
            assert_eq!(cache.writeback(), writeback);
        }
        let through = Cache::new(false);
        assert!(!through.start(0, true) && !through.writeback() && !through.flushed());
    }
}
