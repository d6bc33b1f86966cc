//! A virtqueue of either kind, and what both have in common: where they lie and how their positions are told.
#![forbid(unsafe_code)]

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use super::feature;
use super::packed::Packed;
use super::ring::{Broken, Chain, Ring};
use crate::error::Errno;
use crate::mem::{GuestMap, IoVec, RingLog};

/// Whether the driver's `features` make its virtqueues packed ones.
pub fn is_packed(features: u64) -> bool {
    features & feature(VIRTIO_F_RING_PACKED) != 0
}

/// Whether a virtqueue can have `size` entries: a split one a power of two (VIRTIO 1.3, 2.7), a packed one any number up
/// to 2^15 (2.8.10.1).
pub fn is_size(size: u16, packed: bool) -> bool {
    if packed { (1..=1 << 15).contains(&size) } else { size.is_power_of_two() }
}

/// Where a fresh virtqueue begins, as [`Virtqueue::base`] has it: a packed one's wrap counters begin with 1.
pub fn first_base(packed: bool) -> u32 {
    if packed { 0x8000_8000 } else { 0 }
}

/// Where a virtqueue lies: user addresses of the front end (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddrs {
    /// The descriptor table; of a packed one the descriptor ring.
    pub desc: u64,
    /// The available ring; of a packed one the driver's event suppression.
    pub avail: u64,
    /// The used ring; of a packed one the device's event suppression.
    pub used: u64,
}

impl RingAddrs {
    /// The three parts of a virtqueue of `size` entries on the host.
    ///
    /// # Errors
    /// EINVAL if one is not in the map, or not aligned.
    pub fn resolve(&self, map: &GuestMap, size: u16, packed: bool) -> Result<[*mut u8; 3], Errno> {
        let n = u64::from(size);
        let at = |addr, len, align| map.translate_user(addr, len, align).ok_or(Errno::EINVAL);
        let desc = at(self.desc, 16 * n, 16)?;
        if packed {
            // VIRTIO 1.3, 2.8.10.1 and 2.8.14.
            return Ok([desc, at(self.avail, 4, 4)?, at(self.used, 4, 4)?]);
        }
        // VIRTIO 1.3, 2.7, with the two event fields.
        Ok([desc, at(self.avail, 6 + 2 * n, 2)?, at(self.used, 6 + 8 * n, 4)?])
    }
}

/// The device's side of one virtqueue. A chain's number is its head (split) or its buffer id (packed): less than the
/// size, and of one chain at a time.
#[expect(missing_docs, reason = "the names say it")]
pub enum Virtqueue {
    Split(Ring),
    Packed(Packed),
}

/// The same call of either kind.
macro_rules! either {
    ($queue:expr, $ring:ident => $call:expr) => {
        match $queue {
            Virtqueue::Split($ring) => $call,
            Virtqueue::Packed($ring) => $call,
        }
    };
}

impl Virtqueue {
    /// A virtqueue of `size` entries at `addrs`, that goes on at `base`. `features` are the driver's.
    ///
    /// # Errors
    /// EINVAL if the size or the base cannot be, or an address is not in the map or not aligned.
    pub fn new(
        map: Arc<GuestMap>,
        addrs: RingAddrs,
        size: u16,
        base: u32,
        features: u64,
    ) -> Result<Virtqueue, Errno> {
        if is_packed(features) {
            return Ok(Virtqueue::Packed(Packed::new(map, addrs, size, base, features)?));
        }
        let base = u16::try_from(base).map_err(|_| Errno::EINVAL)?;
        Ok(Virtqueue::Split(Ring::new(map, addrs, size, base, features)?))
    }

    /// Resolves its addresses in another map. On an error it is unchanged.
    ///
    /// # Errors
    /// EINVAL as for [`Virtqueue::new`].
    pub fn remap(&mut self, map: Arc<GuestMap>) -> Result<(), Errno> {
        either!(self, ring => ring.remap(map))
    }

    /// Logs our writes to the guest's memory there from now on.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        either!(self, ring => ring.set_log(log));
    }

    /// Whether the log that is in force was cut short, see [`crate::mem::Region::is_lost`].
    pub fn log_is_lost(&self) -> bool {
        either!(self, ring => ring.log()).is_some_and(|log| log.log.region().is_lost())
    }

    /// The device has written `iov`, memory of a chain that is about to be given back.
    #[inline]
    pub fn log_written(&self, iov: &[IoVec]) {
        either!(self, ring => ring.log_written(iov));
    }

    /// The guest's memory.
    pub fn map(&self) -> &Arc<GuestMap> {
        either!(self, ring => ring.map())
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    /// Where it would go on, as GET_VRING_BASE tells it: the next available index; of a packed one the next available
    /// position and wrap counter (bits 0-15) and the next used ones (bits 16-31).
    pub fn base(&self) -> u32 {
        match self {
            Virtqueue::Split(ring) => ring.next_avail().into(),
            Virtqueue::Packed(ring) => ring.base(),
        }
    }

    /// Whether the guest has made more available.
    #[inline]
    pub fn has_avail(&self) -> bool {
        either!(self, ring => ring.has_avail())
    }

    /// How many chains are available; of a packed one, which cannot know, as many as may be.
    ///
    /// # Errors
    /// [`Broken`] if the guest claims more than fits.
    #[inline]
    pub fn available(&self) -> Result<u16, Broken> {
        match self {
            Virtqueue::Split(ring) => ring.available(),
            Virtqueue::Packed(ring) => Ok(if ring.has_avail() { ring.size() } else { 0 }),
        }
    }

    /// Takes the next available chain's number. Only after [`Virtqueue::available`] said so; `None`: there is none after all.
    ///
    /// # Errors
    /// [`Broken`] if the guest lies about it.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, Broken> {
        match self {
            Virtqueue::Split(ring) => ring.pop().map(Some),
            Virtqueue::Packed(ring) => ring.pop(),
        }
    }

    /// Reads the chain that was popped last, `number`, into `chain`.
    ///
    /// # Errors
    /// [`Broken`] if its structure is a lie. A chain that is merely unserviceable says so in [`Chain::bad`].
    #[inline]
    pub fn read_chain(&self, number: u16, chain: &mut Chain) -> Result<(), Broken> {
        match self {
            Virtqueue::Split(ring) => ring.read_chain(number, chain),
            Virtqueue::Packed(ring) => ring.read_chain(chain),
        }
    }

    /// Gives chain `number` back with `len` bytes written. The guest sees it after [`Virtqueue::publish`].
    #[inline]
    pub fn push_used(&mut self, number: u16, len: u32) {
        either!(self, ring => ring.push_used(number, len));
    }

    /// Makes all chains given back visible to the guest. Whether it wants to be notified.
    #[inline]
    pub fn publish(&mut self, nothing_in_flight: bool) -> bool {
        match self {
            Virtqueue::Split(ring) => ring.publish(nothing_in_flight),
            Virtqueue::Packed(ring) => ring.publish(),
        }
    }

    /// Asks the guest to notify us of the next available chain. The caller looks at [`Virtqueue::has_avail`] again
    /// afterwards.
    pub fn arm_kick(&mut self) {
        either!(self, ring => ring.arm_kick());
    }

    /// Tells the guest that we are looking anyway.
    pub fn disarm_kick(&mut self) {
        either!(self, ring => ring.disarm_kick());
    }
}
