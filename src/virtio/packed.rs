//! The packed virtqueue (VIRTIO 1.3, 2.8), the device's side, on cached host pointers.
//!
//! The guest may write every byte of the ring at any time, so each field is read once, by a volatile or atomic access,
//! and checked after the read; what was read of a chain is kept here until the next chain is taken. Nothing that the
//! guest writes later changes where used descriptors go: that hangs on the number of ring entries counted when the
//! chain was taken.
//!
//! Invariants: the pointers point into the regions of `map`, which the ring keeps alive; they were checked for size and
//! alignment when they were resolved. `held` never exceeds the size, so used descriptors never overtake available ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_WRITE,
    VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_F_WRAP_CTR,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::chain::{Broken, CHAIN_MAX, Chain, Desc};
use super::feature;
use super::queue::{RingAddrs, is_size};
use crate::error::Errno;
use crate::mem::{GuestMap, IoVec, RingLog};

const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED: u16 = 1 << VRING_PACKED_DESC_F_USED;
/// Both flags together: a used descriptor has them as the wrap counter.
const BOTH: u16 = AVAIL | USED;
/// The wrap counter beside a position, in events and bases.
const WRAP: u16 = 1 << VRING_PACKED_EVENT_F_WRAP_CTR;

/// A place in the ring, and how often it was gone round, modulo 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub at: u16,
    pub wrap: bool,
}

impl Position {
    /// From its 16 bits, as events and bases have it; `None`: beyond the ring's end.
    fn parse(bits: u16, size: u16) -> Option<Position> {
        let at = bits & !WRAP;
        (at < size).then_some(Position { at, wrap: bits & WRAP != 0 })
    }

    pub(super) fn bits(self) -> u16 {
        self.at | if self.wrap { WRAP } else { 0 }
    }

    /// Entries from `start` to here, less than two rounds.
    fn since(self, start: Position, size: u16) -> u32 {
        let line = |p: Position| u32::from(p.at) + if p.wrap { 0 } else { u32::from(size) };
        let round = 2 * u32::from(size);
        (line(self) + round - line(start)) % round
    }

    /// `n` entries further, at most one round.
    #[inline]
    pub(super) fn advance(&mut self, n: u16, size: u16) {
        let at = u32::from(self.at) + u32::from(n);
        let over = at >= u32::from(size);
        self.wrap ^= over;
        // Less than the size, which has 16 bits.
        #[expect(clippy::cast_possible_truncation, reason = "less than the size")]
        let place = (at - if over { u32::from(size) } else { 0 }) as u16;
        self.at = place;
    }
}

/// The two flags of a descriptor that the driver made available at `at`.
fn avail_mark(at: Position) -> u16 {
    if at.wrap { AVAIL } else { USED }
}

/// Used descriptors that the guest does not see yet, for their first one's flags are missing.
#[derive(Clone, Copy)]
struct Hidden {
    start: Position,
    flags: u16,
}

/// The device's side of one packed virtqueue.
pub struct Packed {
    map: Arc<GuestMap>,
    addrs: RingAddrs,
    size: u16,
    event_idx: bool,
    indirect: bool,
    ring: *mut u8,
    driver_event: *mut u32,
    device_event: *mut u32,
    /// The next descriptor to take.
    next_avail: Position,
    /// The next used descriptor to write.
    next_used: Position,
    hidden: Option<Hidden>,
    /// Ring entries taken, and not given back and shown to the guest.
    held: u16,
    /// The ring entries of each buffer id's chain; 0: it is the guest's.
    entries: Box<[u16]>,
    /// Chains given back that the guest has not been shown yet.
    given_back: Vec<u16>,
    /// The descriptors of the chain taken last.
    taken: Vec<Desc>,
    /// Where our writes are logged, while the guest migrates.
    log: Option<RingLog>,
}

// SAFETY: the pointers point into `map`, which moves along; a ring has one owner at a time.
unsafe impl Send for Packed {}

impl Packed {
    /// A ring of `size` entries at `addrs`, that goes on at `base` ([`Packed::base`]). `features` are the driver's.
    ///
    /// # Errors
    /// EINVAL if the size or the base cannot be, or an address is not in the map or not aligned.
    pub fn new(
        map: Arc<GuestMap>,
        addrs: RingAddrs,
        size: u16,
        base: u32,
        features: u64,
    ) -> Result<Packed, Errno> {
        let [avail, used] = [base & 0xffff, base >> 16].map(|half| {
            let bits = u16::try_from(half).expect("16 bits");
            Position::parse(bits, size).ok_or(Errno::EINVAL)
        });
        let (next_avail, next_used) = (avail?, used?);
        // Chains between the two are not ours to answer, but their entries are still the driver's.
        let held = u16::try_from(next_avail.since(next_used, size)).map_err(|_| Errno::EINVAL)?;
        if held > size {
            return Err(Errno::EINVAL);
        }
        let mut ring = Packed {
            map: Arc::default(),
            addrs,
            size,
            event_idx: features & feature(VIRTIO_RING_F_EVENT_IDX) != 0,
            indirect: features & feature(VIRTIO_RING_F_INDIRECT_DESC) != 0,
            ring: std::ptr::null_mut(),
            driver_event: std::ptr::null_mut(),
            device_event: std::ptr::null_mut(),
            next_avail,
            next_used,
            hidden: None,
            held,
            entries: vec![0; size.into()].into(),
            given_back: Vec::with_capacity(size.into()),
            taken: Vec::with_capacity(size.into()),
            log: None,
        };
        ring.remap(map)?;
        Ok(ring)
    }

    /// Resolves the ring's addresses in another map. On an error the ring is unchanged.
    ///
    /// # Errors
    /// EINVAL as for [`Packed::new`].
    pub fn remap(&mut self, map: Arc<GuestMap>) -> Result<(), Errno> {
        if !is_size(self.size, true) {
            return Err(Errno::EINVAL);
        }
        let [ring, driver, device] = self.addrs.resolve(&map, self.size, true)?;
        (self.ring, self.driver_event, self.device_event) = (ring, driver.cast(), device.cast());
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

    /// The device has written `iov`, memory of a chain that is about to be given back; when that is early enough
    /// [`Ring::log_written`](super::ring::Ring::log_written) says.
    #[inline]
    pub fn log_written(&self, iov: &[IoVec]) {
        if let Some(log) = &self.log {
            log.mark_data(&self.map, iov);
        }
    }

    /// Descriptors or the device's event suppression have been written: all of the ring counts as written, wherever the front
    /// end says that a used ring is to be logged, for a packed one has none of its own.
    #[inline]
    fn log_ring(&self) {
        let Some(log) = &self.log else { return };
        // SAFETY: both were checked in `remap` to lie in the map, which lives.
        let parts = unsafe {
            [
                IoVec::new(self.ring, 16 * usize::from(self.size)),
                IoVec::new(self.device_event.cast(), 4),
            ]
        };
        log.log.mark_host(&self.map, &parts);
    }

    /// The guest's memory.
    pub fn map(&self) -> &Arc<GuestMap> {
        &self.map
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where it would go on: the next available position and wrap counter (bit 15), the next used ones from bit 16 on
    /// ("Vhost-user Protocol", "A vring state description" of packed virtqueues).
    pub fn base(&self) -> u32 {
        u32::from(self.next_avail.bits()) | u32::from(self.next_used.bits()) << 16
    }

    fn desc(&self, at: u16) -> *mut u8 {
        debug_assert!(at < self.size);
        self.ring.wrapping_add(16 * usize::from(at))
    }

    #[inline]
    fn flags(&self, at: u16) -> &AtomicU16 {
        // SAFETY: callers pass positions, which are inside of the ring checked in `remap`; entries are 16-aligned and the
        // flags are their last two bytes. The guest's own accesses are those of another CPU.
        unsafe { AtomicU16::from_ptr(self.desc(at).add(14).cast()) }
    }

    fn event(&self, of: *mut u32) -> &AtomicU32 {
        // SAFETY: callers pass one of the two event structures, checked in `remap`: four bytes, 4-aligned.
        unsafe { AtomicU32::from_ptr(of) }
    }

    fn is_avail(&self, flags: u16) -> bool {
        flags & BOTH == avail_mark(self.next_avail)
    }

    /// Whether the guest has made more available. One load.
    #[inline]
    pub fn has_avail(&self) -> bool {
        self.is_avail(u16::from_le(self.flags(self.next_avail.at).load(Ordering::Acquire)))
    }

    /// Takes the next available chain, if there is one: its buffer id.
    ///
    /// # Errors
    /// [`Broken`] if the chain, or all that is taken, would be longer than the ring, or the id is not the guest's to use.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, Broken> {
        let flags = u16::from_le(self.flags(self.next_avail.at).load(Ordering::Acquire));
        if !self.is_avail(flags) {
            return Ok(None);
        }
        // The first descriptor's flags were written last: what follows them is there.
        let mut desc = self.read(self.next_avail.at, flags);
        self.taken.clear();
        loop {
            if self.held == self.size {
                return Err(Broken("more descriptors than the ring has entries"));
            }
            self.held += 1;
            self.next_avail.advance(1, self.size);
            self.taken.push(desc);
            if !desc.has_next() {
                break;
            }
            let at = self.next_avail.at;
            desc = self.read(at, u16::from_le(self.flags(at).load(Ordering::Relaxed)));
        }
        let entries = self.entries.get_mut(usize::from(desc.link));
        let entries = entries.ok_or(Broken("a buffer id that is not below the ring's size"))?;
        if *entries != 0 {
            return Err(Broken("a buffer id that is in use already"));
        }
        *entries = u16::try_from(self.taken.len()).expect("at most the ring's size");
        Ok(Some(desc.link))
    }

    /// The descriptors of the chain taken last, as the driver wrote them.
    pub(super) fn taken(&self) -> &[Desc] {
        &self.taken
    }

    /// Where the next used descriptor goes.
    pub(super) fn next_used(&self) -> Position {
        self.next_used
    }

    /// Whether every chain taken has been given back.
    pub(super) fn is_even(&self) -> bool {
        self.held == 0
    }

    /// Whether the descriptor at `at` is the driver's still: no used one has been written over it for the driver to see.
    pub(super) fn is_unused(&self, at: Position) -> bool {
        let flags = u16::from_le(self.flags(at.at).load(Ordering::Acquire));
        flags & BOTH == avail_mark(at)
    }

    /// Goes on where a predecessor was killed: the next used descriptor goes to `used`, and the chains taken and not given
    /// back are these: buffer id and number of entries, together not more than the ring's, no id twice.
    ///
    /// Used descriptors of a batch that was not published are marked as available again. Else the driver would see
    /// them as soon as it has seen what we write before them.
    pub(super) fn restore(&mut self, used: Position, chains: impl Iterator<Item = (u16, u16)>) {
        (self.next_used, self.next_avail, self.held) = (used, used, 0);
        for (id, entries) in chains {
            self.entries[usize::from(id)] = entries;
            self.held += entries;
            for _ in 0..entries {
                let at = self.next_avail;
                let flags = u16::from_le(self.flags(at.at).load(Ordering::Relaxed));
                self.set_flags(at.at, flags & !BOTH | avail_mark(at), Ordering::Release);
                self.next_avail.advance(1, self.size);
            }
        }
        self.log_ring();
    }

    /// Makes `descs` the chain taken last: one that [`Packed::restore`] was told of.
    pub(super) fn retake(&mut self, descs: &[Desc]) {
        self.taken.clear();
        self.taken.extend_from_slice(descs);
    }

    #[inline]
    fn set_flags(&self, at: u16, flags: u16, ordering: Ordering) {
        self.flags(at).store(flags.to_le(), ordering);
        #[cfg(test)]
        super::inflight::tests::killed_here();
    }

    /// The descriptor at `at`, with its flags as they were read.
    #[inline]
    fn read(&self, at: u16, flags: u16) -> Desc {
        let p = self.desc(at);
        // SAFETY: `at` is a position, inside of the ring checked in `remap`; address, length and id are aligned to their sizes
        // in an entry, which is 16-aligned. Volatile, because the guest may write it meanwhile: one copy, checked
        // afterwards.
        unsafe {
            Desc {
                addr: u64::from_le(p.cast::<u64>().read_volatile()),
                len: u32::from_le(p.add(8).cast::<u32>().read_volatile()),
                link: u16::from_le(p.add(12).cast::<u16>().read_volatile()),
                flags,
            }
        }
    }

    /// Reads the chain that was taken last into `chain`.
    ///
    /// # Errors
    /// [`Broken`] if its structure is a lie. A chain that is merely unserviceable says so in [`Chain::bad`].
    pub fn read_chain(&self, chain: &mut Chain) -> Result<(), Broken> {
        chain.clear();
        for desc in &self.taken {
            if !desc.is_indirect() {
                chain.add(&self.map, desc);
            } else if !self.indirect {
                return Err(Broken("an indirect descriptor without VIRTIO_F_INDIRECT_DESC"));
            } else if self.taken.len() > 1 {
                // As in split rings: the table is the whole of the chain.
                return Err(Broken("an indirect descriptor in a chain"));
            } else {
                self.read_indirect(desc, chain)?;
            }
        }
        Ok(())
    }

    /// The entries of a table follow one another; of their flags only WRITE means something (VIRTIO 1.3, 2.8.7).
    fn read_indirect(&self, desc: &Desc, chain: &mut Chain) -> Result<(), Broken> {
        let (table, entries) = desc.table(&self.map)?;
        if entries > CHAIN_MAX {
            return Err(Broken("a chain that is too long"));
        }
        for i in 0..entries {
            // SAFETY: `entries` descriptors from `table` on are in guest memory, maybe unaligned. Volatile, because the guest
            // may write them meanwhile: one copy, checked afterwards.
            let desc = unsafe { table.add(i).read_volatile() }.packed();
            if desc.is_indirect() {
                return Err(Broken("an indirect descriptor in an indirect table"));
            }
            chain.add(&self.map, &desc);
        }
        Ok(())
    }

    /// Gives the chain `id` back with `len` bytes written. The guest sees it after [`Packed::publish`]: it looks at used
    /// descriptors in order, and the first one's flags are held back.
    #[inline]
    pub fn push_used(&mut self, id: u16, len: u32) {
        let entries = self.entries[usize::from(id)];
        debug_assert!(entries > 0, "a chain that was not taken");
        self.given_back.push(id);
        let start = self.next_used;
        let p = self.desc(start.at);
        // SAFETY: as in `read`; made visible by `publish`.
        unsafe {
            p.add(8).cast::<u32>().write_volatile(len.to_le());
            p.add(12).cast::<u16>().write_volatile(id.to_le());
        }
        let wrap = if start.wrap { BOTH } else { 0 };
        // The length counts only with this flag (VIRTIO 1.3, 2.8.4).
        let flags = wrap | if len > 0 { WRITE } else { 0 };
        if self.hidden.is_some() {
            self.set_flags(start.at, flags, Ordering::Relaxed);
        } else {
            self.hidden = Some(Hidden { start, flags });
        }
        self.next_used.advance(entries, self.size);
    }

    /// Makes all chains given back visible to the guest. Whether it wants to be notified.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let Some(Hidden { start, flags }) = self.hidden.take() else { return false };
        self.set_flags(start.at, flags, Ordering::Release);
        // Not earlier: a guest that uses what it has not been shown would have us hold more than the ring has.
        for id in self.given_back.drain(..) {
            self.held -= std::mem::take(&mut self.entries[usize::from(id)]);
        }
        self.log_ring();
        // The flags must be visible before the guest's wish is read, or both sides sleep.
        fence(Ordering::SeqCst);
        let wish = u32::from_le(self.event(self.driver_event).load(Ordering::Relaxed));
        match wish >> 16 & 3 {
            VRING_PACKED_EVENT_FLAG_ENABLE => true,
            VRING_PACKED_EVENT_FLAG_DISABLE => false,
            VRING_PACKED_EVENT_FLAG_DESC if self.event_idx => {
                let bits = u16::try_from(wish & 0xffff).expect("16 bits");
                // Has the event been passed by this batch? One that is nowhere is no reason to be silent.
                Position::parse(bits, self.size).is_none_or(|event| {
                    event.since(start, self.size) < self.next_used.since(start, self.size)
                })
            }
            _ => true,
        }
    }

    /// Asks the guest to notify us of the next available chain. The caller looks at [`Packed::has_avail`] again
    /// afterwards.
    pub fn arm_kick(&mut self) {
        let wish = if self.event_idx {
            VRING_PACKED_EVENT_FLAG_DESC << 16 | u32::from(self.next_avail.bits())
        } else {
            VRING_PACKED_EVENT_FLAG_ENABLE << 16
        };
        self.event(self.device_event).store(wish.to_le(), Ordering::Relaxed);
        self.log_ring();
        // The wish must be visible before we look at the next descriptor a last time.
        fence(Ordering::SeqCst);
    }

    /// Tells the guest that we are looking anyway.
    pub fn disarm_kick(&mut self) {
        let wish = VRING_PACKED_EVENT_FLAG_DISABLE << 16;
        self.event(self.device_event).store(wish.to_le(), Ordering::Relaxed);
        self.log_ring();
    }
}

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
