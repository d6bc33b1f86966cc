//! The vocabulary of the wire: numbers, headers, payloads.
//!
//! Everything here is from QEMU's "Vhost-user Protocol" document (docs/interop/vhost-user); the section is named where a
//! group of numbers stands. Numbers are in the machine's byte order. Nothing here does I/O, and no parser panics:
//! what is too short is an error, and bytes after a complete payload are ignored.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use crate::err;
use crate::error::Result;

/// "Header": the version, in the lowest two bits of the flags.
pub const VERSION: u32 = 1;
/// "Header": the bits of the flags that hold the version.
pub const VERSION_MASK: u32 = 3;
/// "Header": set in every reply.
pub const REPLY: u32 = 1 << 2;
/// "Header": the sender wants to know how it went (see REPLY_ACK).
pub const NEED_REPLY: u32 = 1 << 3;

/// "Communication": the bit of the virtio features that says that protocol features can be negotiated.
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// "Migration": the bit of the virtio features that switches the dirty log on for the requests' memory.
pub const VHOST_F_LOG_ALL: u64 = 1 << 26;
/// "A vring address description": the flag that switches the dirty log on for the used ring.
pub const VRING_F_LOG: u32 = 1 << 0;

/// "VHOST_USER_SET_VRING_KICK" and its sisters: the queue's index in the payload.
pub const VRING_INDEX_MASK: u64 = 0xff;
/// SET_DEVICE_STATE_FD: from us to the front end.
pub const STATE_SAVE: u32 = 0;
/// SET_DEVICE_STATE_FD: from the front end to us.
pub const STATE_LOAD: u32 = 1;
/// SET_DEVICE_STATE_FD: the only phase, "the device and all its vrings are stopped".
pub const STATE_PHASE_STOPPED: u32 = 0;
/// "VHOST_USER_SET_VRING_KICK" and its sisters: no file descriptor comes with the message.
pub const VRING_NOFD: u64 = 1 << 8;

/// The most queues that SET_VRING_KICK can name.
pub const MAX_QUEUES: u16 = 256;
/// The largest configuration space; what QEMU and libvhost-user limit themselves to.
pub const MAX_CONFIG_SIZE: usize = 256;
/// The largest payload that is read at all. Real ones end at about 1 KiB (a table of [`MAX_TABLE_REGIONS`]);
/// the rest is room for messages that are not known yet and can be skipped.
pub const MAX_PAYLOAD: u32 = 64 << 10;
/// The most file descriptors that a message may bring: a table of regions has one each.
pub const MAX_FDS: usize = MAX_TABLE_REGIONS;
/// The most regions of a SET_MEM_TABLE. The specification says 8; rust-vmm's front end sends up to 32.
pub const MAX_TABLE_REGIONS: usize = 32;

bitflags::bitflags! {
    /// "Protocol features": what this program knows of them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Protocol: u64 {
        /// GET_QUEUE_NUM and more than one queue.
        const MQ = 1 << 0;
        /// The migration log comes as a file descriptor.
        const LOG_SHMFD = 1 << 1;
        /// need_reply is honoured.
        const REPLY_ACK = 1 << 3;
        /// SET_BACKEND_REQ_FD.
        const BACKEND_REQ = 1 << 5;
        /// GET_CONFIG, SET_CONFIG.
        const CONFIG = 1 << 9;
        /// GET_INFLIGHT_FD, SET_INFLIGHT_FD.
        const INFLIGHT_SHMFD = 1 << 12;
        /// RESET_DEVICE.
        const RESET_DEVICE = 1 << 13;
        /// GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// GET_STATUS, SET_STATUS.
        const STATUS = 1 << 16;
        /// SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE.
        const DEVICE_STATE = 1 << 19;
        /// GET_VRING_BASE leaves requests in flight rather than waiting for them.
        const GET_VRING_BASE_INFLIGHT = 1 << 20;
    }
}

macro_rules! requests {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        $($(#[$doc])* pub const $name: u32 = $code;)*

        /// The specification's name of a request, without its VHOST_USER_.
        pub fn request_name(code: u32) -> &'static str {
            match code {
                $($code => stringify!($name),)*
                _ => "unknown request",
            }
        }
    };
}

requests! {
    /// "Front-end message types": the features of the device and the rings.
    GET_FEATURES = 1,
    /// The features that the driver accepted.
    SET_FEATURES = 2,
    /// A front end takes the session.
    SET_OWNER = 3,
    /// Deprecated: disables all rings.
    RESET_OWNER = 4,
    /// All memory regions anew.
    SET_MEM_TABLE = 5,
    /// Where to log writes while migrating.
    SET_LOG_BASE = 6,
    /// Who is told of logged writes.
    SET_LOG_FD = 7,
    /// A ring's size.
    SET_VRING_NUM = 8,
    /// A ring's addresses.
    SET_VRING_ADDR = 9,
    /// A ring's next index.
    SET_VRING_BASE = 10,
    /// Stops a ring, asks for its next index.
    GET_VRING_BASE = 11,
    /// How the driver notifies; starts the ring.
    SET_VRING_KICK = 12,
    /// How the driver is notified.
    SET_VRING_CALL = 13,
    /// How the front end is told of a broken ring.
    SET_VRING_ERR = 14,
    /// The protocol features offered.
    GET_PROTOCOL_FEATURES = 15,
    /// The protocol features accepted.
    SET_PROTOCOL_FEATURES = 16,
    /// The number of queues offered.
    GET_QUEUE_NUM = 17,
    /// Enables or disables a ring.
    SET_VRING_ENABLE = 18,
    /// The back end's own channel.
    SET_BACKEND_REQ_FD = 21,
    /// Reads the configuration space.
    GET_CONFIG = 24,
    /// Writes the configuration space.
    SET_CONFIG = 25,
    /// Asks for a region that tracks requests in flight.
    GET_INFLIGHT_FD = 31,
    /// Gives a region that tracks requests in flight.
    SET_INFLIGHT_FD = 32,
    /// Stops all rings, resets the device.
    RESET_DEVICE = 34,
    /// The number of memory regions accepted.
    GET_MAX_MEM_SLOTS = 36,
    /// One more memory region.
    ADD_MEM_REG = 37,
    /// One memory region less.
    REM_MEM_REG = 38,
    /// The virtio status.
    SET_STATUS = 39,
    /// The virtio status.
    GET_STATUS = 40,
    /// Transfers the device's state.
    SET_DEVICE_STATE_FD = 42,
    /// Whether that worked.
    CHECK_DEVICE_STATE = 43,
}

/// "Back-end message types": the configuration space has changed.
pub const BACKEND_CONFIG_CHANGE_MSG: u32 = 2;

/// "Header": what precedes every payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What is asked: one of this module's numbers.
    pub request: u32,
    /// Version and [`REPLY`], [`NEED_REPLY`].
    pub flags: u32,
    /// The payload's size in bytes.
    pub size: u32,
}

impl Header {
    /// Its size on the wire, in bytes.
    pub const LEN: usize = 12;

    /// The header in `bytes`.
    pub fn parse(bytes: &[u8; Self::LEN]) -> Header {
        let at = |i: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|k| bytes[i + k]));
        Header { request: at(0), flags: at(4), size: at(8) }
    }

    /// Its bytes on the wire.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let words = [self.request, self.flags, self.size].map(u32::to_ne_bytes);
        let mut bytes = [0; Self::LEN];
        bytes.copy_from_slice(words.as_flattened());
        bytes
    }

    /// The specification's name of the request.
    pub fn name(&self) -> &'static str {
        request_name(self.request)
    }
}

/// A whole message: `flags` and the header's size are made from `payload`.
pub fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("our payloads are small");
    let mut bytes = Header { request, flags: flags | VERSION, size }.to_bytes().to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

/// One message from a front end, as it came. What it does not understand to take is closed with it.
#[derive(Debug)]
pub struct Message {
    /// The header; `size` is the payload's length.
    pub header: Header,
    /// The payload.
    pub payload: Vec<u8>,
    /// The file descriptors that came with it, in order.
    pub fds: Vec<OwnedFd>,
    /// Whether file descriptors got lost: too many of them, or no room in our table. `fds` is empty then.
    pub fds_lost: bool,
}

/// Takes fields off the front of a payload.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) =
            self.0.split_first_chunk::<N>().ok_or_else(|| err!("the payload is too short"))?;
        self.0 = rest;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_ne_bytes)
    }

    fn region(&mut self) -> Result<MemRegion> {
        Ok(MemRegion {
            guest_addr: self.u64()?,
            size: self.u64()?,
            user_addr: self.u64()?,
            mmap_offset: self.u64()?,
        })
    }
}

impl Message {
    /// "A single 64-bit integer".
    ///
    /// # Errors
    /// If the payload is too short; so for all parsers below.
    pub fn u64(&self) -> Result<u64> {
        Fields(&self.payload).u64()
    }

    /// "Device state transfer parameters": the direction and the phase of SET_DEVICE_STATE_FD.
    ///
    /// # Errors
    /// If the payload is too short.
    pub fn device_state(&self) -> Result<(u32, u32)> {
        let mut f = Fields(&self.payload);
        Ok((f.u32()?, f.u32()?))
    }

    /// "A vring state description".
    pub fn vring_state(&self) -> Result<VringState> {
        let mut f = Fields(&self.payload);
        Ok(VringState { index: f.u32()?, num: f.u32()? })
    }

    /// "A vring address description".
    pub fn vring_addr(&self) -> Result<(u32, VringAddr)> {
        let mut f = Fields(&self.payload);
        let (index, flags) = (f.u32()?, f.u32()?);
        let (desc, used, avail, log) = (f.u64()?, f.u64()?, f.u64()?, f.u64()?);
        Ok((index, VringAddr { flags, desc, used, avail, log }))
    }

    /// "Single memory region description".
    pub fn region(&self) -> Result<MemRegion> {
        let mut f = Fields(&self.payload);
        f.u64()?;
        f.region()
    }

    /// "Multiple Memory regions description".
    ///
    /// # Errors
    /// If the payload is too short or there are more than [`MAX_TABLE_REGIONS`].
    pub fn regions(&self) -> Result<Vec<MemRegion>> {
        let mut f = Fields(&self.payload);
        let (count, _padding) = (f.u32()?, f.u32()?);
        if usize::try_from(count).is_ok_and(|n| n <= MAX_TABLE_REGIONS) {
            (0..count).map(|_| f.region()).collect()
        } else {
            Err(err!("{count} memory regions are more than {MAX_TABLE_REGIONS}"))
        }
    }

    /// "Log description".
    pub fn log_place(&self) -> Result<LogPlace> {
        let mut f = Fields(&self.payload);
        Ok(LogPlace { size: f.u64()?, mmap_offset: f.u64()? })
    }

    /// "Virtio device config space": the fields, and what follows them.
    pub fn config(&self) -> Result<(ConfigRange, &[u8])> {
        let mut f = Fields(&self.payload);
        let range = ConfigRange { offset: f.u32()?, size: f.u32()?, flags: f.u32()? };
        Ok((range, f.0))
    }

    /// "Inflight description".
    pub fn inflight(&self) -> Result<InflightDesc> {
        let mut f = Fields(&self.payload);
        Ok(InflightDesc {
            mmap_size: f.u64()?,
            mmap_offset: f.u64()?,
            num_queues: f.u16()?,
            queue_size: f.u16()?,
        })
    }

    /// The file descriptors that came with the message.
    ///
    /// # Errors
    /// If some got lost.
    pub fn take_fds(&mut self) -> Result<Vec<OwnedFd>> {
        if self.fds_lost {
            return Err(err!("file descriptors got lost: too many, or no room in this process"));
        }
        Ok(std::mem::take(&mut self.fds))
    }

    /// The one file descriptor that the message must bring.
    ///
    /// # Errors
    /// If there is none, or more than one.
    pub fn take_fd(&mut self) -> Result<OwnedFd> {
        let mut fds = self.take_fds()?;
        match (fds.len(), fds.pop()) {
            (1, Some(fd)) => Ok(fd),
            (n, _) => Err(err!("{n} file descriptors instead of one")),
        }
    }

    /// The payload and file descriptor of SET_VRING_KICK, _CALL and _ERR: the queue's index and, unless the payload
    /// says that there is none, the descriptor.
    ///
    /// # Errors
    /// If the payload is too short, or not exactly one descriptor came where one must.
    pub fn vring_fd(&mut self) -> Result<(u32, Option<OwnedFd>)> {
        let value = self.u64()?;
        let fd = if value & VRING_NOFD != 0 { None } else { Some(self.take_fd()?) };
        let index = u32::try_from(value & VRING_INDEX_MASK).expect("eight bits");
        Ok((index, fd))
    }
}

/// "A vring state description".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringState {
    /// The queue.
    pub index: u32,
    /// Size, next index, or whether it is enabled.
    pub num: u32,
}

impl VringState {
    /// Its bytes on the wire.
    pub fn to_bytes(self) -> Vec<u8> {
        [self.index, self.num].map(u32::to_ne_bytes).concat()
    }
}

/// "A vring address description", without its index. Addresses are the front end's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringAddr {
    /// Bit 0: writes to the used ring are logged.
    pub flags: u32,
    /// The descriptor table.
    pub desc: u64,
    /// The used ring.
    pub used: u64,
    /// The available ring.
    pub avail: u64,
    /// The guest address under which the used ring is logged.
    pub log: u64,
}

/// "Memory region description".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemRegion {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Size in bytes.
    pub size: u64,
    /// The front end's address.
    pub user_addr: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
}

/// "Inflight description".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InflightDesc {
    /// Bytes of the whole region; 0: there is none.
    pub mmap_size: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
    /// Queues that it has room for.
    pub num_queues: u16,
    /// Entries of each.
    pub queue_size: u16,
}

impl InflightDesc {
    /// Its bytes on the wire: 20, and the padding that QEMU's struct has at its end.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = [self.mmap_size, self.mmap_offset].map(u64::to_ne_bytes).concat();
        bytes.extend([self.num_queues, self.queue_size, 0, 0].map(u16::to_ne_bytes).as_flattened());
        bytes
    }
}

/// "Log description".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPlace {
    /// Size in bytes.
    pub size: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
}

impl LogPlace {
    /// Its bytes on the wire.
    pub fn to_bytes(self) -> Vec<u8> {
        [self.size, self.mmap_offset].map(u64::to_ne_bytes).concat()
    }
}

/// "Virtio device config space", without the contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigRange {
    /// The first byte.
    pub offset: u32,
    /// The number of bytes.
    pub size: u32,
    /// 0: the driver's access; 1: migration. Front ends do not agree on it: ignored.
    pub flags: u32,
}

impl ConfigRange {
    /// Where the range lies in a configuration space of [`MAX_CONFIG_SIZE`] bytes; an offset of 0x100 counts as 0.
    ///
    /// (cloud-hypervisor added 0x100, virtio-mmio's offset of that space, until 2026.)
    ///
    /// # Errors
    /// If it does not lie inside.
    pub fn resolve(&self) -> Result<std::ops::Range<usize>> {
        let whole = u32::try_from(MAX_CONFIG_SIZE).expect("a small number");
        let start = self.offset.checked_sub(whole).unwrap_or(self.offset);
        match start.checked_add(self.size) {
            Some(end) if end <= whole => Ok(to_usize(start)..to_usize(end)),
            _ => Err(err!("{} bytes at {} are outside of the space", self.size, self.offset)),
        }
    }

    /// Its bytes on the wire.
    pub fn to_bytes(self) -> Vec<u8> {
        [self.offset, self.size, self.flags].map(u32::to_ne_bytes).concat()
    }
}

fn to_usize(n: u32) -> usize {
    usize::try_from(n).expect("64-bit hosts only")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(payload: Vec<u8>) -> Message {
        let size = u32::try_from(payload.len()).unwrap();
        let header = Header { request: 0, flags: VERSION, size };
        Message { header, payload, fds: Vec::new(), fds_lost: false }
    }

    proptest! {
        #[test]
        fn no_payload_makes_a_parser_panic(payload in proptest::collection::vec(any::<u8>(), 0..1200)) {
            let mut m = message(payload);
            let len = m.payload.len();
            prop_assert_eq!(m.u64().is_ok(), len >= 8);
            prop_assert_eq!(m.vring_state().is_ok(), len >= 8);
            prop_assert_eq!(m.device_state().is_ok(), len >= 8);
            prop_assert_eq!(m.vring_addr().is_ok(), len >= 40);
            prop_assert_eq!(m.region().is_ok(), len >= 40);
            let _ = m.regions();
            if let Ok((range, rest)) = m.config() {
                prop_assert_eq!(rest.len(), len - 12);
                if let Ok(r) = range.resolve() {
                    prop_assert!(r.end <= MAX_CONFIG_SIZE && r.len() == to_usize(range.size));
                }
            }
            let _ = m.vring_fd();
        }

        #[test]
        fn headers_survive_the_wire(request: u32, flags: u32, size: u32) {
            let h = Header { request, flags, size };
            prop_assert_eq!(Header::parse(&h.to_bytes()), h);
        }
    }

    #[test]
    fn the_legacy_config_offset_counts_as_nothing() {
        let at = |offset, size| ConfigRange { offset, size, flags: 0 }.resolve().ok();
        assert_eq!(at(0x100, 60), Some(0..60));
        assert_eq!(at(0x120, 1), Some(32..33));
        assert_eq!(at(0, 256), Some(0..256));
        assert_eq!(at(255, 2), None);
        assert_eq!(at(0x200, 1), None);
        assert_eq!(at(u32::MAX, u32::MAX), None);
    }

    #[test]
    fn a_table_of_more_regions_than_its_payload_is_an_error() {
        let mut payload = [9u32, 0].map(u32::to_ne_bytes).concat();
        payload.resize(8 + 8 * 32, 0);
        assert!(message(payload.clone()).regions().is_err());
        payload.resize(8 + 9 * 32, 0);
        assert_eq!(message(payload.clone()).regions().unwrap().len(), 9);
        payload[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(message(payload).regions().is_err());
    }
}
