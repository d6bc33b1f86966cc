//! The driver's half of a packed virtqueue.
//!
//! A well-behaved driver, as `Ring` is one of a split ring, with the same calls. `desc` is open to
//! tests which write there what a hostile guest would.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring as vr;

use crate::error::{Error, Result};
use crate::mem::{Buf, GuestMem};
use crate::ring::{DESC_LEN, F_INDIRECT, F_NEXT, F_WRITE, Seg, Used, write_desc};

/// The driver made the descriptor available, if this is its wrap counter.
pub const F_AVAIL: u16 = 1 << vr::VRING_PACKED_DESC_F_AVAIL;
/// The device used the descriptor, if this is its wrap counter.
pub const F_USED: u16 = 1 << vr::VRING_PACKED_DESC_F_USED;
/// The wrap counter beside a position.
pub const WRAP: u16 = 1 << vr::VRING_PACKED_EVENT_F_WRAP_CTR;
/// The id in descriptors which need none.
const NO_ID: u16 = 0xdead;

/// A position and its wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    at: u16,
    wrap: bool,
}

impl Position {
    fn parse(bits: u16) -> Self {
        Self { at: bits & !WRAP, wrap: bits & WRAP != 0 }
    }

    fn bits(self) -> u16 {
        self.at | if self.wrap { WRAP } else { 0 }
    }

    fn step(&mut self, n: u16, size: u16) {
        for _ in 0..n {
            self.at += 1;
            if self.at == size {
                *self = Self { at: 0, wrap: !self.wrap };
            }
        }
    }

    /// Whether a walk from here to `end` comes by `event`.
    fn passes(mut self, end: Self, event: Self, size: u16) -> bool {
        while self != end {
            if self == event {
                return true;
            }
            self.step(1, size);
        }
        false
    }
}

/// A well-behaved driver of one packed ring.
#[derive(Debug)]
pub struct Packed {
    /// The descriptor ring.
    pub desc: Buf,
    /// What the driver wants to be told.
    pub driver: Buf,
    /// What the device wants to be told.
    pub device: Buf,
    size: u16,
    event_idx: bool,
    next_avail: Position,
    kicked: Position,
    next_used: Position,
    /// Where the first chain that is not published begins, and its flags.
    hidden: Option<(u16, u16)>,
    free: u16,
    ids: Vec<u16>,
    /// Entries of the chain in flight with this id; 0: not in flight.
    chain_len: Box<[u16]>,
    in_flight: u16,
}

impl Packed {
    /// A driver of a fresh ring of `size` entries.
    ///
    /// # Errors
    /// `OutOfMemory`
    pub fn new(mem: &Arc<GuestMem>, size: u16, event_idx: bool) -> Result<Self> {
        let start = Position::parse(WRAP);
        let mut ring = Self {
            desc: mem.alloc(usize::from(size) * DESC_LEN, 4096)?,
            driver: mem.alloc(4, 4096)?,
            device: mem.alloc(4, 4096)?,
            size,
            event_idx,
            next_avail: start,
            kicked: start,
            next_used: start,
            hidden: None,
            free: size,
            ids: Vec::new(),
            chain_len: vec![0; size.into()].into(),
            in_flight: 0,
        };
        ring.reset(WRAP);
        Ok(ring)
    }

    /// Forgets everything in flight and goes on at the position and wrap counter `base`, as if all
    /// before had been used.
    pub fn reset(&mut self, base: u16) {
        let start = Position::parse(base);
        for i in 0..self.size {
            // What was last done with the entry was done in this round, or the one before.
            let wrap = if i < start.at { start.wrap } else { !start.wrap };
            let flags = if wrap { F_AVAIL | F_USED } else { 0 };
            self.set_desc(i, Seg::out(0, 0), 0, flags);
        }
        self.driver.fill(0);
        self.device.fill(0);
        (self.next_avail, self.kicked, self.next_used) = (start, start, start);
        (self.hidden, self.free, self.in_flight) = (None, self.size, 0);
        self.ids = (0..self.size).collect();
        self.chain_len.fill(0);
    }

    /// Number of entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Chains added and not taken back.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// The position and wrap counter of the next used descriptor.
    #[must_use]
    pub fn last_used(&self) -> u16 {
        self.next_used.bits()
    }

    /// The position and wrap counter of the next descriptor to make available.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        self.next_avail.bits()
    }

    /// Ids in flight, for oracles.
    #[must_use]
    pub fn ids_in_flight(&self) -> Vec<u16> {
        (0..self.size).filter(|id| self.chain_len[usize::from(*id)] != 0).collect()
    }

    /// Sets an entry, its flags last.
    pub fn set_desc(&self, at: u16, seg: Seg, id: u16, flags: u16) {
        let i = usize::from(at) * DESC_LEN;
        self.desc.u64_at(i).store(seg.addr.to_le(), Ordering::Relaxed);
        self.desc.u32_at(i + 8).store(seg.len.to_le(), Ordering::Relaxed);
        self.desc.u16_at(i + 12).store(id.to_le(), Ordering::Relaxed);
        self.set_flags(at, flags);
    }

    /// Sets an entry's flags: everything written before is visible to who sees them.
    pub fn set_flags(&self, at: u16, flags: u16) {
        let i = usize::from(at) * DESC_LEN;
        self.desc.u16_at(i + 14).store(flags.to_le(), Ordering::Release);
    }

    fn flags(&self, at: u16) -> u16 {
        u16::from_le(self.desc.u16_at(usize::from(at) * DESC_LEN + 14).load(Ordering::Acquire))
    }

    /// The flags of a descriptor made available now.
    #[must_use]
    pub fn avail_flags(&self) -> u16 {
        if self.next_avail.wrap { F_AVAIL } else { F_USED }
    }

    /// Puts a chain in the ring; not visible before `publish`. Its id.
    ///
    /// # Errors
    /// `RingFull`
    pub fn add(&mut self, segs: &[Seg]) -> Result<u16> {
        self.put(segs, 0)
    }

    /// Puts a chain in `table` (of at least `segs.len()` entries) and one indirect descriptor in the
    /// ring.
    ///
    /// # Errors
    /// `RingFull`
    pub fn add_indirect(&mut self, table: &Buf, segs: &[Seg]) -> Result<u16> {
        if segs.is_empty() || table.len() < segs.len() * DESC_LEN {
            return Err(Error::RingFull);
        }
        let mut len = 0_u32;
        for (i, seg) in (0_u16..).zip(segs) {
            // The last two fields are id and flags here, flags and next there.
            let (flags, next) = (NO_ID, if seg.device_writes { F_WRITE } else { 0 });
            write_desc(table, i, crate::ring::Desc { addr: seg.addr, len: seg.len, flags, next });
            len += DESC_LEN as u32;
        }
        self.put(&[Seg::out(table.gpa(), len)], F_INDIRECT)
    }

    fn put(&mut self, segs: &[Seg], more: u16) -> Result<u16> {
        let n = u16::try_from(segs.len()).unwrap_or(u16::MAX);
        if n == 0 || n > self.free {
            return Err(Error::RingFull);
        }
        // Some id, not the next one: ids are no positions.
        let pick = usize::from(self.next_avail.at) * 7 % self.ids.len();
        let id = self.ids.swap_remove(pick);
        let first = self.next_avail.at;
        let mut head = 0;
        for (i, seg) in segs.iter().enumerate() {
            let last = i + 1 == segs.len();
            let mut flags = self.avail_flags() | more;
            flags |= if last { 0 } else { F_NEXT };
            flags |= if seg.device_writes { F_WRITE } else { 0 };
            if i == 0 {
                head = flags;
                // Not available yet: as it was.
                flags = self.flags(first);
            }
            self.set_desc(self.next_avail.at, *seg, if last { id } else { NO_ID }, flags);
            self.next_avail.step(1, self.size);
        }
        if self.hidden.is_some() {
            self.set_flags(first, head);
        } else {
            self.hidden = Some((first, head));
        }
        self.free -= n;
        self.chain_len[usize::from(id)] = n;
        self.in_flight += 1;
        Ok(id)
    }

    /// Makes every added chain visible.
    pub fn publish(&mut self) {
        if let Some((at, flags)) = self.hidden.take() {
            self.set_flags(at, flags);
        }
    }

    /// After `publish`: does the device want a kick for what was published since the last question?
    pub fn needs_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.kicked, self.next_avail);
        let wish = u32::from_le(self.device.u32_at(0).load(Ordering::Relaxed));
        match wish >> 16 {
            _ if old == self.next_avail => false,
            vr::VRING_PACKED_EVENT_FLAG_DISABLE => false,
            vr::VRING_PACKED_EVENT_FLAG_DESC => {
                let event = Position::parse(wish as u16);
                old.passes(self.next_avail, event, self.size)
            }
            _ => true,
        }
    }

    /// True when a completion waits.
    #[must_use]
    pub fn has_used(&self) -> bool {
        let both = if self.next_used.wrap { F_AVAIL | F_USED } else { 0 };
        self.flags(self.next_used.at) & (F_AVAIL | F_USED) == both
    }

    /// Takes one completion, if there is one.
    ///
    /// # Errors
    /// `UnexpectedUsed` when it names an id not in flight.
    pub fn pop_used(&mut self) -> Result<Option<Used>> {
        if !self.has_used() {
            return Ok(None);
        }
        let at = usize::from(self.next_used.at) * DESC_LEN;
        let id = u16::from_le(self.desc.u16_at(at + 12).load(Ordering::Relaxed));
        let mut len = u32::from_le(self.desc.u32_at(at + 8).load(Ordering::Relaxed));
        if self.flags(self.next_used.at) & F_WRITE == 0 {
            len = 0;
        }
        let n = self.chain_len.get_mut(usize::from(id)).map_or(0, std::mem::take);
        if n == 0 {
            return Err(Error::UnexpectedUsed(id.into()));
        }
        self.next_used.step(n, self.size);
        self.ids.push(id);
        self.free += n;
        self.in_flight -= 1;
        Ok(Some(Used { id: id.into(), len }))
    }

    /// Asks for an interrupt on the next completion. True when one has come meanwhile.
    pub fn arm(&mut self) -> bool {
        let wish = if self.event_idx {
            vr::VRING_PACKED_EVENT_FLAG_DESC << 16 | u32::from(self.next_used.bits())
        } else {
            vr::VRING_PACKED_EVENT_FLAG_ENABLE << 16
        };
        self.driver.u32_at(0).store(wish.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Asks for no interrupts.
    pub fn disarm(&mut self) {
        let wish = vr::VRING_PACKED_EVENT_FLAG_DISABLE << 16;
        self.driver.u32_at(0).store(wish.to_le(), Ordering::Relaxed);
    }
}
