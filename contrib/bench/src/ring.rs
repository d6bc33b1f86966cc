//! The driver's half of a split virtqueue.
//!
//! Two layers. `RingMem` is the three areas in guest memory and nothing else: tests write into it
//! what a broken or hostile guest would write. `Ring` is a well-behaved driver over it: free list,
//! chains direct or indirect, one publish per batch, both directions of EVENT_IDX. It trusts nothing
//! the device writes: the free list and chain lengths live in private memory.
//!
//! Nothing here allocates after `Ring::new`, takes a lock or makes a system call.

mod mem;

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring as vr;

use crate::error::{Error, Result};
use crate::mem::Buf;
pub use mem::RingMem;

/// The descriptor goes on in `next`.
pub const F_NEXT: u16 = vr::VRING_DESC_F_NEXT as u16;
/// The device writes here.
pub const F_WRITE: u16 = vr::VRING_DESC_F_WRITE as u16;
/// The descriptor names a table of descriptors.
pub const F_INDIRECT: u16 = vr::VRING_DESC_F_INDIRECT as u16;
/// Bytes of a descriptor.
pub const DESC_LEN: usize = size_of::<vr::vring_desc>();
/// Largest split ring the specification allows.
pub const SIZE_MAX: u16 = 32768;

/// A descriptor, by value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// `F_NEXT`, `F_WRITE`, `F_INDIRECT`.
    pub flags: u16,
    /// Next descriptor when `F_NEXT`.
    pub next: u16,
}

/// One segment of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seg {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// True when the device writes it.
    pub device_writes: bool,
}

impl Seg {
    /// A segment the device reads.
    #[must_use]
    pub fn out(addr: u64, len: u32) -> Self {
        Self { addr, len, device_writes: false }
    }

    /// A segment the device writes.
    #[must_use]
    pub fn inn(addr: u64, len: u32) -> Self {
        Self { addr, len, device_writes: true }
    }
}

/// A used element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub id: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// Writes a descriptor to entry `index` of a table anywhere in guest memory.
#[inline]
pub fn write_desc(table: &Buf, index: u16, desc: Desc) {
    let at = usize::from(index) * DESC_LEN;
    let rest = u64::from(desc.len) | u64::from(desc.flags) << 32 | u64::from(desc.next) << 48;
    table.u64_at(at).store(desc.addr.to_le(), Ordering::Relaxed);
    table.u64_at(at + 8).store(rest.to_le(), Ordering::Relaxed);
}

/// Reads entry `index` of a table.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the word is taken apart")]
pub fn read_desc(table: &Buf, index: u16) -> Desc {
    let at = usize::from(index) * DESC_LEN;
    let rest = u64::from_le(table.u64_at(at + 8).load(Ordering::Relaxed));
    Desc {
        addr: u64::from_le(table.u64_at(at).load(Ordering::Relaxed)),
        len: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}

/// True when moving an index from `old` to `new` passed `event`.
#[must_use]
#[inline]
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A well-behaved driver of one ring.
#[derive(Debug)]
pub struct Ring {
    mem: RingMem,
    event_idx: bool,
    /// Heads of free descriptors form a stack through `link`.
    free_head: u16,
    free: u16,
    link: Box<[u16]>,
    /// Descriptors of the chain in flight with this head; 0: not in flight.
    chain_len: Box<[u16]>,
    /// Next avail index to fill; published up to `published`, kick decided up to `kicked`.
    next_avail: u16,
    kicked: u16,
    last_used: u16,
    /// The used index as last read, so that one read serves a batch.
    used_seen: u16,
    in_flight: u16,
}

impl Ring {
    /// A driver over fresh areas, starting at index 0.
    ///
    /// # Panics
    /// When the size is not a power of two within 1..=32768.
    #[must_use]
    pub fn new(mem: RingMem, event_idx: bool) -> Self {
        let size = mem.size();
        assert!(size.is_power_of_two() && size <= SIZE_MAX, "ring size {size}");
        let mut ring = Self {
            mem,
            event_idx,
            free_head: 0,
            free: 0,
            link: vec![0; usize::from(size)].into(),
            chain_len: vec![0; usize::from(size)].into(),
            next_avail: 0,
            kicked: 0,
            last_used: 0,
            used_seen: 0,
            in_flight: 0,
        };
        ring.reset(0);
        ring
    }

    /// Forgets everything in flight, zeroes the areas, and continues at `base` in both indices.
    pub fn reset(&mut self, base: u16) {
        let size = self.mem.size();
        self.mem.clear();
        for i in 0..size {
            self.link[usize::from(i)] = i + 1;
        }
        self.chain_len.fill(0);
        (self.free_head, self.free, self.in_flight) = (0, size, 0);
        (self.next_avail, self.kicked, self.last_used, self.used_seen) = (base, base, base, base);
        self.mem.set_used_idx(base);
        self.mem.set_avail_idx(base);
        self.mem.set_used_event(base);
        self.mem.set_avail_event(base);
    }

    /// The areas.
    #[must_use]
    pub fn mem(&self) -> &RingMem {
        &self.mem
    }

    /// Free descriptors.
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Chains offered (published or not) and not yet taken back.
    #[must_use]
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// The avail index the next chain gets.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index up to which completions have been taken.
    #[must_use]
    #[inline]
    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    /// Heads in flight, for resubmission and for oracles.
    #[must_use]
    pub fn heads_in_flight(&self) -> Vec<u16> {
        let heads = (0..self.mem.size()).filter(|h| self.chain_len[usize::from(*h)] != 0);
        heads.collect()
    }

    /// Puts a chain in the table and its head in the avail ring; not visible before `publish`.
    ///
    /// # Errors
    /// `RingFull`
    #[inline]
    pub fn add(&mut self, segs: &[Seg]) -> Result<u16> {
        let n = u16::try_from(segs.len()).unwrap_or(u16::MAX);
        if n == 0 || n > self.free {
            return Err(Error::RingFull);
        }
        let head = self.free_head;
        let mut at = head;
        for (i, seg) in segs.iter().enumerate() {
            let next = self.link[usize::from(at)];
            let mut flags = if seg.device_writes { F_WRITE } else { 0 };
            if i + 1 < segs.len() {
                flags |= F_NEXT;
            }
            self.mem.set_desc(at, Desc { addr: seg.addr, len: seg.len, flags, next });
            at = next;
        }
        self.take(head, at, n);
        Ok(head)
    }

    /// Puts a chain in `table` (of at least `segs.len()` entries) and one indirect descriptor in the
    /// ring.
    ///
    /// # Errors
    /// `RingFull`
    #[inline]
    pub fn add_indirect(&mut self, table: &Buf, segs: &[Seg]) -> Result<u16> {
        if self.free == 0 || segs.is_empty() || table.len() < segs.len() * DESC_LEN {
            return Err(Error::RingFull);
        }
        let mut len = 0_u32;
        for (i, seg) in (0_u16..).zip(segs) {
            let mut flags = if seg.device_writes { F_WRITE } else { 0 };
            if usize::from(i) + 1 < segs.len() {
                flags |= F_NEXT;
            }
            write_desc(table, i, Desc { addr: seg.addr, len: seg.len, flags, next: i + 1 });
            len += DESC_LEN as u32;
        }
        let head = self.free_head;
        self.mem.set_desc(head, Desc { addr: table.gpa(), len, flags: F_INDIRECT, next: 0 });
        self.take(head, self.link[usize::from(head)], 1);
        Ok(head)
    }

    #[inline]
    fn take(&mut self, head: u16, new_free: u16, n: u16) {
        self.free_head = new_free;
        self.free -= n;
        self.chain_len[usize::from(head)] = n;
        self.offer(head);
        self.in_flight += 1;
    }

    /// Puts any number in the next avail entry, with no bookkeeping: for malformed tests, whose
    /// chains `pop_used` then reports as `UnexpectedUsed`.
    #[inline]
    pub fn offer(&mut self, head: u16) {
        self.mem.set_avail_elem(self.next_avail, head);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Makes every added chain visible.
    #[inline]
    pub fn publish(&mut self) {
        self.mem.set_avail_idx(self.next_avail);
    }

    /// After `publish`: does the device want a kick for what was published since the last question?
    #[inline]
    pub fn needs_kick(&mut self) -> bool {
        // The published index must be visible before the device's wish is read, or both sides sleep.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked, self.next_avail);
        if self.event_idx {
            need_event(self.mem.avail_event(), self.next_avail, old)
        } else {
            old != self.next_avail
                && u32::from(self.mem.used_flags()) & vr::VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// Takes one completion, if there is one.
    ///
    /// # Errors
    /// `UnexpectedUsed` when it names a head not in flight; the element is consumed all the same.
    #[inline]
    pub fn pop_used(&mut self) -> Result<Option<Used>> {
        if self.last_used == self.used_seen {
            self.used_seen = self.mem.used_idx();
            if self.last_used == self.used_seen {
                return Ok(None);
            }
        }
        let used = self.mem.used_elem(self.last_used);
        self.last_used = self.last_used.wrapping_add(1);
        let Some(head) = u16::try_from(used.id).ok().filter(|h| *h < self.mem.size()) else {
            return Err(Error::UnexpectedUsed(used.id));
        };
        let n = std::mem::take(&mut self.chain_len[usize::from(head)]);
        if n == 0 {
            return Err(Error::UnexpectedUsed(used.id));
        }
        let mut last = head;
        for _ in 1..n {
            last = self.link[usize::from(last)];
        }
        self.link[usize::from(last)] = self.free_head;
        self.free_head = head;
        self.free += n;
        self.in_flight -= 1;
        Ok(Some(used))
    }

    /// True when a completion waits.
    #[must_use]
    #[inline]
    pub fn has_used(&self) -> bool {
        self.last_used != self.used_seen || self.last_used != self.mem.used_idx()
    }

    /// Asks for an interrupt on the next completion. True when one has come meanwhile: then look again
    /// instead of waiting.
    #[inline]
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            self.mem.set_used_event(self.last_used);
        } else {
            self.mem.set_avail_flags(0);
        }
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Asks for no interrupts. With EVENT_IDX that is an index far behind, which the device passes
    /// once in 65536 completions; who polls for long calls this now and then.
    #[inline]
    pub fn disarm(&mut self) {
        if self.event_idx {
            self.mem.set_used_event(self.last_used.wrapping_sub(1));
        } else {
            self.mem.set_avail_flags(vr::VRING_AVAIL_F_NO_INTERRUPT as u16);
        }
    }
}
