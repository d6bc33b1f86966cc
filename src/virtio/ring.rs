//! The split virtqueue (VIRTIO 1.3, 2.7), the device's side, on cached host pointers.
//!
//! The guest may write every byte of the rings at any time, so each field is read once, by a volatile or atomic
//! access, and checked after the read. Structural lies (an avail.idx that jumps, a head or link outside the table, a loop,
//! an indirect table in an indirect table) are [`Broken`]: the queue cannot go on. A chain whose descriptors point
//! outside of guest memory, or come in the wrong order, is only [`Chain::bad`]: its status byte may still be reachable.
//!
//! Invariant: the pointers point into the regions of `map`, which the ring keeps alive; they were checked for size and
//! alignment when they were resolved.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_config::VIRTIO_F_NOTIFY_ON_EMPTY;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
    VRING_USED_F_NO_NOTIFY,
};

pub use super::chain::{Broken, CHAIN_MAX, Chain};
use super::chain::{Desc, Words};
use super::feature;
use super::queue::{RingAddrs, is_size};
use crate::error::Errno;
use crate::mem::{GuestMap, IoVec, RingLog};

/// The device's side of one split virtqueue.
pub struct Ring {
    map: Arc<GuestMap>,
    addrs: RingAddrs,
    size: u16,
    event_idx: bool,
    indirect: bool,
    notify_on_empty: bool,
    desc: *const Words,
    avail: *mut u16,
    used: *mut u16,
    /// The next available entry to take.
    next_avail: u16,
    /// The next used entry to write; what the guest sees is `published`.
    next_used: u16,
    published: u16,
    /// Where our writes are logged, while the guest migrates.
    log: Option<RingLog>,
}

// SAFETY: the pointers point into `map`, which moves along; a ring has one owner at a time.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring of `size` entries at `addrs`, whose next available index is `base`. `features` are the driver's.
    ///
    /// # Errors
    /// EINVAL if the size is no power of two, or an address is not in the map or not aligned.
    pub fn new(
        map: Arc<GuestMap>,
        addrs: RingAddrs,
        size: u16,
        base: u16,
        features: u64,
    ) -> Result<Ring, Errno> {
        let has = |bit| features & feature(bit) != 0;
        let mut ring = Ring {
            map: Arc::default(),
            addrs,
            size,
            event_idx: has(VIRTIO_RING_F_EVENT_IDX),
            indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
            notify_on_empty: has(VIRTIO_F_NOTIFY_ON_EMPTY),
            desc: std::ptr::null(),
            avail: std::ptr::null_mut(),
            used: std::ptr::null_mut(),
            next_avail: base,
            next_used: 0,
            published: 0,
            log: None,
        };
        ring.remap(map)?;
        // SAFETY: `used` was just resolved; index 1 of it is used.idx, 2-aligned.
        ring.published = unsafe { AtomicU16::from_ptr(ring.used.add(1)) }.load(Ordering::Acquire);
        ring.next_used = ring.published;
        Ok(ring)
    }

    /// Resolves the ring's addresses in another map. On an error the ring is unchanged.
    ///
    /// # Errors
    /// EINVAL as for [`Ring::new`].
    pub fn remap(&mut self, map: Arc<GuestMap>) -> Result<(), Errno> {
        if !is_size(self.size, false) {
            return Err(Errno::EINVAL);
        }
        let [desc, avail, used] = self.addrs.resolve(&map, self.size, false)?;
        self.desc = desc.cast_const().cast();
        self.avail = avail.cast();
        self.used = used.cast();
        self.map = map;
        Ok(())
    }

    /// Logs our writes there from now on.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        self.log = log;
    }

    /// Where it logs.
    pub fn log(&self) -> Option<&RingLog> {
        self.log.as_ref()
    }

    /// The device has written `iov`, memory of a chain that is about to be given back.
    ///
    /// The kernel may have written parts of it long before. That is early enough: a front end that has taken their bits
    /// away meanwhile (there were none) looks at the log a last time after GET_VRING_BASE, which waits for this.
    #[inline]
    pub fn log_written(&self, iov: &[IoVec]) {
        if let Some(log) = &self.log {
            log.mark_data(&self.map, iov);
        }
    }

    /// `len` bytes at `offset` of the used ring have been written.
    #[inline]
    fn log_used(&self, offset: usize, len: u64) {
        if let Some(log) = &self.log {
            log.mark_used(offset as u64, len);
        }
    }

    /// The used ring's entries of the chains from `old` up to `new` have been written. Once for all of them: a bit is set by an
    /// instruction that locks the bus, and a ring's entries mostly share a page.
    #[inline]
    fn log_entries(&self, old: u16, new: u16) {
        if self.log.is_none() {
            return;
        }
        let (first, count) = (old & (self.size - 1), new.wrapping_sub(old).min(self.size));
        let behind = count.saturating_sub(self.size - first);
        self.log_used(4 + 8 * usize::from(first), 8 * u64::from(count - behind));
        self.log_used(4, 8 * u64::from(behind));
    }

    /// The guest's memory.
    pub fn map(&self) -> &Arc<GuestMap> {
        &self.map
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The next available index to take.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The next used index to write; [`Ring::used_idx`] catches up with it.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Goes on at another available index.
    pub fn set_next_avail(&mut self, next: u16) {
        self.next_avail = next;
    }

    /// The used index as the guest sees it.
    pub fn used_idx(&self) -> u16 {
        self.published
    }

    fn atomic(&self, base: *mut u16, index: usize) -> &AtomicU16 {
        // SAFETY: callers pass `avail` or `used` with an index inside of the part checked in `remap`; all are 2-aligned, and
        // the guest's own accesses are those of another CPU.
        unsafe { AtomicU16::from_ptr(base.add(index)) }
    }

    #[inline]
    fn avail_idx(&self) -> u16 {
        self.atomic(self.avail, 1).load(Ordering::Acquire)
    }

    /// Whether the guest has made more available. One load.
    #[inline]
    pub fn has_avail(&self) -> bool {
        self.avail_idx() != self.next_avail
    }

    /// How many chains are available.
    ///
    /// # Errors
    /// [`Broken`] if the guest claims more than the ring holds.
    #[inline]
    pub fn available(&self) -> Result<u16, Broken> {
        let n = self.avail_idx().wrapping_sub(self.next_avail);
        if n > self.size {
            Err(Broken("avail.idx is ahead by more than the ring's size"))
        } else {
            Ok(n)
        }
    }

    /// Takes the next available chain's head. Only after [`Ring::available`] said so.
    ///
    /// # Errors
    /// [`Broken`] if the head is outside of the table.
    #[inline]
    pub fn pop(&mut self) -> Result<u16, Broken> {
        let slot = usize::from(self.next_avail & (self.size - 1));
        let head = self.atomic(self.avail, 2 + slot).load(Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        if head < self.size {
            Ok(head)
        } else {
            Err(Broken("a head outside of the descriptor table"))
        }
    }

    /// Reads the chain at `head` into `chain`.
    ///
    /// # Errors
    /// [`Broken`] if its structure is a lie. A chain that is merely unserviceable says so in [`Chain::bad`].
    pub fn read_chain(&self, head: u16, chain: &mut Chain) -> Result<(), Broken> {
        chain.clear();
        let mut walk = Walk { table: self.desc, size: self.size.into(), left: self.size.into() };
        let mut next = Some(head);
        while let Some(index) = next {
            let desc = walk.read(index)?;
            next = desc.has_next().then_some(desc.link);
            if !desc.is_indirect() {
                chain.add(&self.map, &desc);
                continue;
            }
            if !self.indirect {
                return Err(Broken("an indirect descriptor without VIRTIO_F_INDIRECT_DESC"));
            }
            if next.is_some() {
                // VIRTIO 1.3, 2.7.5.3.1 forbids both flags.
                return Err(Broken("an indirect descriptor with a next one"));
            }
            self.read_indirect(&desc, chain)?;
        }
        Ok(())
    }

    fn read_indirect(&self, desc: &Desc, chain: &mut Chain) -> Result<(), Broken> {
        let (table, size) = desc.table(&self.map)?;
        let mut walk = Walk { table, size, left: size.min(CHAIN_MAX) };
        let mut next = Some(0);
        while let Some(index) = next {
            let desc = walk.read(index)?;
            if desc.is_indirect() {
                return Err(Broken("an indirect descriptor in an indirect table"));
            }
            next = desc.has_next().then_some(desc.link);
            chain.add(&self.map, &desc);
        }
        Ok(())
    }

    /// Gives the chain at `head` back with `len` bytes written. The guest sees it after [`Ring::publish`].
    #[inline]
    pub fn push_used(&mut self, head: u16, len: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        // SAFETY: entry `slot` of the used ring (four u16 each, behind flags and idx) is inside of the part checked in
        // `remap`, 4-aligned; plain volatile stores, made visible by `publish`.
        unsafe {
            let entry = self.used.add(2 + 4 * slot).cast::<u32>();
            entry.write_volatile(u32::from(head).to_le());
            entry.add(1).write_volatile(len.to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Makes all chains given back visible to the guest. Whether it wants to be notified.
    #[inline]
    pub fn publish(&mut self, nothing_in_flight: bool) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        self.published = new;
        self.log_entries(old, new);
        self.atomic(self.used, 1).store(new.to_le(), Ordering::Release);
        self.log_used(2, 2);
        // The store of used.idx must be visible before the guest's wish is read (VIRTIO 1.3, 2.7.7.2).
        fence(Ordering::SeqCst);
        if self.notify_on_empty && nothing_in_flight && !self.has_avail() {
            return true;
        }
        if self.event_idx {
            let event = self.atomic(self.avail, 2 + usize::from(self.size)).load(Ordering::Relaxed);
            // VIRTIO 1.3, 2.7.7.2: has `event` been passed by this batch?
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        let flags = self.atomic(self.avail, 0).load(Ordering::Relaxed);
        u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
    }

    /// Asks the guest to notify us of the next available chain. The caller looks at [`Ring::has_avail`] again afterwards.
    pub fn arm_kick(&mut self) {
        if self.event_idx {
            // avail_event lies behind the used ring's entries.
            let at = 2 + 4 * usize::from(self.size);
            self.atomic(self.used, at).store(self.next_avail.to_le(), Ordering::Relaxed);
            self.log_used(2 * at, 2);
        } else {
            self.atomic(self.used, 0).store(0, Ordering::Relaxed);
            self.log_used(0, 2);
        }
        // The wish must be visible before we look at avail.idx a last time.
        fence(Ordering::SeqCst);
    }

    /// Tells the guest that we are looking anyway. With EVENT_IDX nothing need be said: the event index stays behind.
    pub fn disarm_kick(&mut self) {
        if !self.event_idx {
            let flag = (VRING_USED_F_NO_NOTIFY as u16).to_le();
            self.atomic(self.used, 0).store(flag, Ordering::Relaxed);
            self.log_used(0, 2);
        }
    }
}

/// One descriptor table being followed; `left` descriptors may still come, else it loops.
struct Walk {
    table: *const Words,
    size: usize,
    left: usize,
}

impl Walk {
    #[inline]
    fn read(&mut self, index: u16) -> Result<Desc, Broken> {
        if usize::from(index) >= self.size {
            return Err(Broken("a link outside of the descriptor table"));
        }
        self.left = self.left.checked_sub(1).ok_or(Broken("a chain that is too long or loops"))?;
        // SAFETY: `index < size`, and `size` descriptors from `table` on were checked to be in guest memory. An indirect
        // table may be unaligned. Volatile, because the guest may write it meanwhile: one copy, checked afterwards.
        let words = unsafe { self.table.add(usize::from(index)).read_volatile() };
        Ok(words.split())
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
pub(super) mod tests;
