//! Descriptor chains, as both kinds of virtqueue have them: a descriptor, and the memory that a chain of them names.

use crate::mem::{GuestMap, IoVec};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// The most descriptors in one chain, whatever the ring's size: an indirect table may be longer than the ring (Windows
/// sends more than seg_max), and this is QEMU's VIRTQUEUE_MAX_SIZE.
pub const CHAIN_MAX: usize = 1024;

/// The most ranges of one chain: a descriptor over regions that touch each other is several. A front end with hundreds of
/// small regions could make its chains take any amount of our memory.
pub const RANGES_MAX: usize = 4 * CHAIN_MAX;
/// As many ranges have their place kept between chains.
const RANGES_KEPT: usize = CHAIN_MAX;

/// A ring that cannot go on, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken(pub &'static str);

/// One descriptor, as the guest wrote it. The two kinds of ring order the last two fields differently.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    /// The next descriptor (split), the buffer id (packed).
    pub link: u16,
}

pub(super) const DESC_SIZE: u64 = size_of::<Desc>() as u64;

/// A descriptor where it lies: two little-endian words, so that one volatile read is two loads and not sixteen. It may be
/// unaligned, in an indirect table.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub(super) struct Words {
    addr: u64,
    rest: u64,
}

#[expect(clippy::cast_possible_truncation, reason = "parts of a word")]
impl Words {
    /// As a split ring has it.
    #[inline]
    pub fn split(self) -> Desc {
        let [addr, rest] = [self.addr, self.rest].map(u64::from_le);
        Desc { addr, len: rest as u32, flags: (rest >> 32) as u16, link: (rest >> 48) as u16 }
    }

    /// As a packed ring has it.
    #[inline]
    pub fn packed(self) -> Desc {
        let desc = self.split();
        Desc { flags: desc.link, link: desc.flags, ..desc }
    }
}

impl Desc {
    fn has(&self, bit: u32) -> bool {
        u32::from(self.flags) & bit != 0
    }

    pub fn has_next(&self) -> bool {
        self.has(VRING_DESC_F_NEXT)
    }

    pub fn is_indirect(&self) -> bool {
        self.has(VRING_DESC_F_INDIRECT)
    }

    /// The table of an indirect descriptor: where it lies and its entries, at least one. It may be unaligned.
    ///
    /// # Errors
    /// [`Broken`] if it is no table.
    pub fn table(&self, map: &GuestMap) -> Result<(*const Words, usize), Broken> {
        let len = u64::from(self.len);
        if len == 0 || !len.is_multiple_of(DESC_SIZE) {
            return Err(Broken("an indirect table of a bad length"));
        }
        let table = map.translate(self.addr, len).filter(|t| t.len() as u64 == len);
        let Some(table) = table else {
            return Err(Broken("an indirect table outside of guest memory"));
        };
        let entries = usize::try_from(len / DESC_SIZE).expect("a 32-bit number");
        Ok((table.base().cast_const().cast(), entries))
    }
}

/// The memory of one chain: first what the device may read, then what it may write.
#[derive(Default)]
pub struct Chain {
    /// The ranges, in order.
    pub iov: Vec<IoVec>,
    /// How many of them are for reading.
    pub readable: usize,
    /// Bytes for reading.
    pub readable_len: u64,
    /// Bytes for writing.
    pub writable_len: u64,
    /// Why the chain cannot be served as a request, if so.
    pub bad: Option<&'static str>,
    /// The last descriptor that is not empty reaches out of guest memory, or was one too many: the chain's last byte is not
    /// there.
    pub cut: bool,
}

impl Chain {
    pub(super) fn clear(&mut self) {
        self.iov.clear();
        self.iov.shrink_to(RANGES_KEPT);
        self.readable = 0;
        (self.readable_len, self.writable_len) = (0, 0);
        self.bad = None;
        self.cut = false;
    }

    /// Adds one descriptor's memory; a range over several regions becomes several.
    #[inline(always)]
    pub(super) fn add(&mut self, map: &GuestMap, desc: &Desc) {
        let writable = desc.has(VRING_DESC_F_WRITE);
        if !writable && self.iov.len() != self.readable {
            self.bad = Some("a descriptor to read after one to write");
            return;
        }
        let (mut addr, mut left) = (desc.addr, u64::from(desc.len));
        if left == 0 {
            return;
        }
        self.cut = false;
        while left > 0 {
            let Some(v) = map.translate(addr, left) else {
                return self.spoil("a descriptor outside of guest memory");
            };
            if self.iov.len() == RANGES_MAX {
                return self.spoil("a chain of too many ranges of memory");
            }
            let n = v.len() as u64;
            if writable {
                self.writable_len += n;
            } else {
                self.readable += 1;
                self.readable_len += n;
            }
            self.iov.push(v);
            left -= n;
            addr = addr.wrapping_add(n);
        }
    }

    /// Its last byte is not there.
    #[cold]
    fn spoil(&mut self, why: &'static str) {
        (self.bad, self.cut) = (Some(why), true);
    }
}
