//! A split ring's bytes, all of them; not a driver. Tests write here what a broken or hostile guest would.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{DESC_LEN, Desc, Used, read_desc, write_desc};
use crate::error::Result;
use crate::mem::{Buf, GuestMem};

/// The three areas of a split ring, and every field of them.
#[derive(Debug)]
pub struct RingMem {
    /// Descriptor table.
    pub desc: Buf,
    /// Driver area.
    pub avail: Buf,
    /// Device area.
    pub used: Buf,
    size: u16,
}

impl RingMem {
    /// Areas for a ring of `size` entries, zeroed.
    ///
    /// # Errors
    /// `OutOfMemory`
    pub fn new(mem: &Arc<GuestMem>, size: u16) -> Result<Self> {
        let n = usize::from(size);
        // Each area on pages of its own, so that neither side's writes share a line by accident.
        let ring = Self {
            desc: mem.alloc(n * DESC_LEN, 4096)?,
            avail: mem.alloc(6 + 2 * n, 4096)?,
            used: mem.alloc(6 + 8 * n, 4096)?,
            size,
        };
        ring.clear();
        Ok(ring)
    }

    /// The same for areas which already exist, as they are.
    ///
    /// # Panics
    /// When they are not those of one ring.
    #[must_use]
    pub fn over(desc: Buf, avail: Buf, used: Buf) -> Self {
        let size = u16::try_from(desc.len() / DESC_LEN).expect("a ring has at most 32768 entries");
        let n = usize::from(size);
        assert!(avail.len() >= 6 + 2 * n && used.len() >= 6 + 8 * n, "areas of different rings");
        Self { desc, avail, used, size }
    }

    /// Zeroes all three areas.
    pub fn clear(&self) {
        self.desc.fill(0);
        self.avail.fill(0);
        self.used.fill(0);
    }

    /// Number of entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// Sets a descriptor.
    #[inline]
    pub fn set_desc(&self, index: u16, desc: Desc) {
        write_desc(&self.desc, index, desc);
    }

    /// Reads a descriptor back.
    #[must_use]
    pub fn desc(&self, index: u16) -> Desc {
        read_desc(&self.desc, index)
    }

    /// `avail.flags`
    #[must_use]
    pub fn avail_flags(&self) -> u16 {
        u16::from_le(self.avail.u16_at(0).load(Ordering::Acquire))
    }

    /// Sets `avail.flags`.
    pub fn set_avail_flags(&self, flags: u16) {
        self.avail.u16_at(0).store(flags.to_le(), Ordering::Release);
    }

    /// `avail.idx`
    #[must_use]
    #[inline]
    pub fn avail_idx(&self) -> u16 {
        u16::from_le(self.avail.u16_at(2).load(Ordering::Acquire))
    }

    /// Publishes `avail.idx`.
    #[inline]
    pub fn set_avail_idx(&self, idx: u16) {
        self.avail.u16_at(2).store(idx.to_le(), Ordering::Release);
    }

    /// The head in the entry for running index `idx`.
    #[must_use]
    #[inline]
    pub fn avail_elem(&self, idx: u16) -> u16 {
        u16::from_le(self.avail.u16_at(4 + 2 * self.slot(idx)).load(Ordering::Relaxed))
    }

    /// Sets the head in the entry for running index `idx`.
    #[inline]
    pub fn set_avail_elem(&self, idx: u16, head: u16) {
        self.avail.u16_at(4 + 2 * self.slot(idx)).store(head.to_le(), Ordering::Relaxed);
    }

    /// `used_event`: the driver asks for an interrupt once the used index passes it.
    #[must_use]
    #[inline]
    pub fn used_event(&self) -> u16 {
        let at = 4 + 2 * usize::from(self.size);
        u16::from_le(self.avail.u16_at(at).load(Ordering::Acquire))
    }

    /// Sets `used_event`.
    #[inline]
    pub fn set_used_event(&self, idx: u16) {
        let at = 4 + 2 * usize::from(self.size);
        self.avail.u16_at(at).store(idx.to_le(), Ordering::Release);
    }

    /// `used.flags`
    #[must_use]
    #[inline]
    pub fn used_flags(&self) -> u16 {
        u16::from_le(self.used.u16_at(0).load(Ordering::Acquire))
    }

    /// Sets `used.flags`; the device's business.
    pub fn set_used_flags(&self, flags: u16) {
        self.used.u16_at(0).store(flags.to_le(), Ordering::Release);
    }

    /// `used.idx`
    #[must_use]
    #[inline]
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.used.u16_at(2).load(Ordering::Acquire))
    }

    /// Sets `used.idx`; the device's business, or a ring that does not begin at 0.
    pub fn set_used_idx(&self, idx: u16) {
        self.used.u16_at(2).store(idx.to_le(), Ordering::Release);
    }

    /// The used element for running index `idx`.
    #[must_use]
    #[inline]
    pub fn used_elem(&self, idx: u16) -> Used {
        let at = 4 + 8 * self.slot(idx);
        Used {
            id: u32::from_le(self.used.u32_at(at).load(Ordering::Relaxed)),
            len: u32::from_le(self.used.u32_at(at + 4).load(Ordering::Relaxed)),
        }
    }

    /// Sets the used element for running index `idx`; the device's business.
    #[inline]
    pub fn set_used_elem(&self, idx: u16, used: Used) {
        let at = 4 + 8 * self.slot(idx);
        self.used.u32_at(at).store(used.id.to_le(), Ordering::Relaxed);
        self.used.u32_at(at + 4).store(used.len.to_le(), Ordering::Relaxed);
    }

    /// `avail_event`: the device asks for a kick once the avail index passes it.
    #[must_use]
    #[inline]
    pub fn avail_event(&self) -> u16 {
        let at = 4 + 8 * usize::from(self.size);
        u16::from_le(self.used.u16_at(at).load(Ordering::Acquire))
    }

    /// Sets `avail_event`; the device's business.
    #[inline]
    pub fn set_avail_event(&self, idx: u16) {
        let at = 4 + 8 * usize::from(self.size);
        self.used.u16_at(at).store(idx.to_le(), Ordering::Release);
    }
}
