//! The front end's side of the wire, without any opinion on what may be sent when.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use vhost_user_blk::vhost_user::message::*;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::mock::PATIENCE;

/// The size of every memory region here, in bytes.
pub const REGION_SIZE: u64 = 1 << 20;

/// What a test's guest memory looks like: region `slot` is the `slot`-th gigabyte's first MiB.
pub fn region(slot: u64) -> MemRegion {
    MemRegion {
        guest_addr: slot << 30,
        size: REGION_SIZE,
        user_addr: 0x7f00_0000_0000 + (slot << 30),
        mmap_offset: 0,
    }
}

/// Where ring `queue` lies: in region 0, 64 KiB each.
pub fn ring_addr(queue: u32) -> VringAddr {
    let at = region(0).user_addr + u64::from(queue) * 0x1_0000;
    VringAddr { flags: 0, desc: at, avail: at + 0x4000, used: at + 0x8000, log: 0 }
}

/// A file of `len` bytes.
pub fn memory_file(len: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file.into()
}

/// A descriptor that can stand for an event: nobody here ever reads or writes it.
pub fn event() -> OwnedFd {
    std::io::pipe().unwrap().1.into()
}

pub fn u64_bytes(value: u64) -> Vec<u8> {
    value.to_ne_bytes().to_vec()
}

pub fn state_bytes(index: u32, num: u32) -> Vec<u8> {
    VringState { index, num }.to_bytes()
}

pub fn addr_bytes(index: u32, a: VringAddr) -> Vec<u8> {
    let mut bytes = [index, a.flags].map(u32::to_ne_bytes).concat();
    bytes.extend([a.desc, a.used, a.avail, a.log].map(u64::to_ne_bytes).concat());
    bytes
}

fn region_bytes(r: MemRegion) -> Vec<u8> {
    [r.guest_addr, r.size, r.user_addr, r.mmap_offset].map(u64::to_ne_bytes).concat()
}

pub fn single_region_bytes(r: MemRegion) -> Vec<u8> {
    [u64_bytes(0), region_bytes(r)].concat()
}

pub fn table_bytes(regions: &[MemRegion]) -> Vec<u8> {
    let mut bytes = [u32::try_from(regions.len()).unwrap(), 0].map(u32::to_ne_bytes).concat();
    regions.iter().for_each(|r| bytes.extend(region_bytes(*r)));
    bytes
}

pub fn config_bytes(offset: u32, size: u32, flags: u32, contents: &[u8]) -> Vec<u8> {
    let mut bytes = [offset, size, flags].map(u32::to_ne_bytes).concat();
    bytes.extend(contents);
    bytes
}

pub struct Client {
    pub stream: UnixStream,
}

impl Client {
    pub fn connect(path: &Path) -> Client {
        Client::over(UnixStream::connect(path).unwrap())
    }

    pub fn over(stream: UnixStream) -> Client {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Client { stream }
    }

    /// Sends bytes as they are, with descriptors.
    pub fn send_raw(&self, bytes: &[u8], fds: &[OwnedFd]) {
        let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = self.stream.send_with_fds(&[bytes], &raw).unwrap();
        (&self.stream).write_all(&bytes[sent..]).unwrap();
    }

    /// Sends a message that has no reply.
    pub fn set(&self, request: u32, payload: &[u8], fds: &[OwnedFd]) {
        self.send_raw(&encode(request, 0, payload), fds);
    }

    /// Sends a message with need_reply; answers whether it was accepted.
    pub fn ask(&self, request: u32, payload: &[u8], fds: &[OwnedFd]) -> bool {
        self.send_raw(&encode(request, NEED_REPLY, payload), fds);
        let reply = self.reply(request);
        u64::from_ne_bytes(reply.try_into().expect("an acknowledgement is a u64")) == 0
    }

    /// Sends a request that always has a reply; answers its payload.
    pub fn get(&self, request: u32, payload: &[u8]) -> Vec<u8> {
        self.set(request, payload, &[]);
        self.reply(request)
    }

    pub fn get_u64(&self, request: u32) -> u64 {
        u64::from_ne_bytes(self.get(request, &[]).try_into().expect("a u64"))
    }

    pub fn read_exactly(&self, bytes: &mut [u8]) {
        (&self.stream).read_exact(bytes).unwrap();
    }

    pub fn get_base(&self, queue: u32) -> u32 {
        let reply = self.get(GET_VRING_BASE, &state_bytes(queue, 0));
        assert_eq!(reply[..4], queue.to_ne_bytes());
        u32::from_ne_bytes(reply[4..].try_into().expect("a vring state"))
    }

    /// Receives the reply to `request`; answers its payload.
    #[track_caller]
    pub fn reply(&self, request: u32) -> Vec<u8> {
        let mut header = [0; Header::LEN];
        (&self.stream).read_exact(&mut header).expect("a reply");
        let header = Header::parse(&header);
        assert_eq!((header.request, header.flags), (request, REPLY | VERSION));
        let mut payload = vec![0; usize::try_from(header.size).unwrap()];
        (&self.stream).read_exact(&mut payload).unwrap();
        payload
    }

    /// Everything sent so far has been handled, and had no reply that nobody has read.
    #[track_caller]
    pub fn sync(&self) {
        self.get_u64(GET_QUEUE_NUM);
        self.expect_silence();
    }

    /// Nothing has come that nobody has read.
    #[track_caller]
    pub fn expect_silence(&self) {
        self.stream.set_nonblocking(true).unwrap();
        let read = (&self.stream).read(&mut [0]);
        self.stream.set_nonblocking(false).unwrap();
        assert_eq!(read.map_err(|e| e.kind()), Err(ErrorKind::WouldBlock));
    }

    /// The other side has closed, or closes, the connection.
    #[track_caller]
    pub fn expect_end(&self) {
        match (&self.stream).read(&mut [0; 64]) {
            Ok(0) => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("the connection goes on: {other:?}"),
        }
    }

    /// Negotiates `protocol` (all that is offered, if it is `None`, but what a front end wants on purpose only: rings that are
    /// not drained) and what the device offers.
    pub fn handshake(&self, protocol: Option<u64>) {
        let offered = self.get_u64(GET_FEATURES);
        let protocol = protocol.unwrap_or_else(|| {
            self.get_u64(GET_PROTOCOL_FEATURES) & !Protocol::GET_VRING_BASE_INFLIGHT.bits()
        });
        self.set(SET_PROTOCOL_FEATURES, &u64_bytes(protocol), &[]);
        self.set(SET_OWNER, &[], &[]);
        self.set(SET_FEATURES, &u64_bytes(offered), &[]);
    }

    /// Gives memory region 0 by SET_MEM_TABLE.
    pub fn give_memory(&self) {
        self.set(SET_MEM_TABLE, &table_bytes(&[region(0)]), &[memory_file(REGION_SIZE)]);
    }

    /// Describes ring `queue` and kicks it; does not enable it.
    pub fn set_up_ring(&self, queue: u32, size: u32, base: u32) {
        self.set(SET_VRING_NUM, &state_bytes(queue, size), &[]);
        self.set(SET_VRING_ADDR, &addr_bytes(queue, ring_addr(queue)), &[]);
        self.set(SET_VRING_BASE, &state_bytes(queue, base), &[]);
        self.set(SET_VRING_CALL, &u64_bytes(queue.into()), &[event()]);
        self.set(SET_VRING_KICK, &u64_bytes(queue.into()), &[event()]);
    }

    /// All of the above for ring 0 of 128 entries, enabled.
    pub fn start(&self) {
        self.handshake(None);
        self.give_memory();
        self.set_up_ring(0, 128, 0);
        assert!(self.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]));
    }
}
