//! vhost-user messages, from the front end's side, with a time limit on every wait.
//!
//! Not built on the `vhost` crate: its front end has no time-outs, refuses to send what it finds wrong,
//! and would share its message parser with the program under test. `Conn` sends any bytes with any
//! fds and hands back whole messages; the typed helpers below are a thin layer over that.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, Result, io_err};
use crate::mem::RegionInfo;
use crate::sys;

/// Numbers of the front end's messages (docs/interop/vhost-user.rst, "Front-end message types").
#[expect(missing_docs, reason = "the names are the specification's")]
pub mod req {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// Bit numbers of the protocol features.
#[expect(missing_docs, reason = "the names are the specification's")]
pub mod pf {
    pub const MQ: u64 = 0;
    pub const LOG_SHMFD: u64 = 1;
    pub const REPLY_ACK: u64 = 3;
    pub const BACKEND_REQ: u64 = 5;
    pub const CONFIG: u64 = 9;
    pub const BACKEND_SEND_FD: u64 = 10;
    pub const INFLIGHT_SHMFD: u64 = 12;
    pub const RESET_DEVICE: u64 = 13;
    pub const INBAND_NOTIFICATIONS: u64 = 14;
    pub const CONFIGURE_MEM_SLOTS: u64 = 15;
    pub const STATUS: u64 = 16;
    pub const DEVICE_STATE: u64 = 19;
    pub const GET_VRING_BASE_INFLIGHT: u64 = 20;
}

/// The back end's own message: the configuration has changed.
pub const BACKEND_CONFIG_CHANGE: u32 = 2;
/// Feature bit 30: the connection knows protocol features (`VHOST_USER_F_PROTOCOL_FEATURES`).
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Feature bit 26: dirty logging (`VHOST_F_LOG_ALL`).
pub const F_LOG_ALL: u64 = 1 << 26;
/// Version bits of the flags.
pub const FLAG_VERSION: u32 = 1;
/// The message is a reply.
pub const FLAG_REPLY: u32 = 1 << 2;
/// The sender wants a reply.
pub const FLAG_NEED_REPLY: u32 = 1 << 3;
/// In the u64 of KICK, CALL, ERR: no fd comes with it.
pub const VRING_NOFD: u64 = 1 << 8;
/// Bytes of a message header.
pub const HEADER_LEN: usize = 12;
/// Longest body accepted: device state goes by fd, so nothing legal comes near it.
const BODY_MAX: usize = 64 << 10;

/// A message as received.
#[derive(Debug)]
pub struct Message {
    /// Number.
    pub request: u32,
    /// Version, reply, need-reply.
    pub flags: u32,
    /// The payload.
    pub body: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The u64 at a byte offset of the body.
    ///
    /// # Errors
    /// `Protocol` when the body is shorter.
    pub fn u64_at(&self, at: usize) -> Result<u64> {
        let bytes = self.body.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map(u64::from_ne_bytes).ok_or_else(|| self.short())
    }

    /// The u32 at a byte offset of the body.
    ///
    /// # Errors
    /// `Protocol` when the body is shorter.
    pub fn u32_at(&self, at: usize) -> Result<u32> {
        let bytes = self.body.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map(u32::from_ne_bytes).ok_or_else(|| self.short())
    }

    fn short(&self) -> Error {
        Error::Protocol(format!(
            "reply to message {} has only {} bytes",
            self.request,
            self.body.len()
        ))
    }
}

/// A header's bytes.
#[must_use]
pub fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[0..4].copy_from_slice(&request.to_ne_bytes());
    bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
    bytes[8..12].copy_from_slice(&size.to_ne_bytes());
    bytes
}

/// Body of the `vhost_vring_state` messages: NUM, BASE, ENABLE.
#[must_use]
pub fn vring_state(index: u32, num: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&index.to_ne_bytes());
    bytes[4..].copy_from_slice(&num.to_ne_bytes());
    bytes
}

/// Body of SET_VRING_ADDR; addresses are this process's.
#[must_use]
pub fn vring_addr(index: u32, flags: u32, desc: u64, used: u64, avail: u64, log: u64) -> Vec<u8> {
    let mut bytes = vring_state(index, flags).to_vec();
    for word in [desc, used, avail, log] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// One region as SET_MEM_TABLE lists it.
#[must_use]
pub fn mem_region(info: &RegionInfo) -> Vec<u8> {
    [info.gpa, info.len, info.user_addr, info.offset].iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// Body of SET_MEM_TABLE.
#[must_use]
pub fn mem_table(regions: &[RegionInfo]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
    let mut body = vring_state(count, 0).to_vec();
    body.extend(regions.iter().flat_map(mem_region));
    body
}

/// Body of ADD_MEM_REG and REM_MEM_REG.
#[must_use]
pub fn one_region(info: &RegionInfo) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(mem_region(info));
    body
}

/// Body of GET_CONFIG and SET_CONFIG.
#[must_use]
pub fn config_body(offset: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut body = Vec::new();
    for word in [offset, size, flags] {
        body.extend_from_slice(&word.to_ne_bytes());
    }
    body.extend_from_slice(payload);
    body
}

/// What GET_INFLIGHT_FD and SET_INFLIGHT_FD carry beside the fd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InflightDesc {
    /// Length of the area.
    pub mmap_size: u64,
    /// Where it begins in the file.
    pub mmap_offset: u64,
    /// Queues it has room for.
    pub num_queues: u16,
    /// Entries per queue.
    pub queue_size: u16,
}

impl InflightDesc {
    /// The 24 bytes QEMU sends (4 of them padding).
    #[must_use]
    pub fn to_body(self) -> Vec<u8> {
        let mut body = self.mmap_size.to_ne_bytes().to_vec();
        body.extend_from_slice(&self.mmap_offset.to_ne_bytes());
        body.extend_from_slice(&self.num_queues.to_ne_bytes());
        body.extend_from_slice(&self.queue_size.to_ne_bytes());
        body.extend_from_slice(&[0; 4]);
        body
    }

    #[expect(clippy::cast_possible_truncation, reason = "the word is taken apart")]
    fn from_message(msg: &Message) -> Result<Self> {
        let nums = msg.u32_at(16)?;
        Ok(Self {
            mmap_size: msg.u64_at(0)?,
            mmap_offset: msg.u64_at(8)?,
            num_queues: nums as u16,
            queue_size: (nums >> 16) as u16,
        })
    }
}

/// One vhost-user connection.
#[derive(Debug)]
pub struct Conn {
    stream: UnixStream,
    timeout: Duration,
    /// REPLY_ACK is acknowledged: `set` asks for a reply and checks it.
    pub reply_ack: bool,
}

impl Conn {
    /// Connects to a listening back end.
    ///
    /// # Errors
    /// `Io`
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        let stream = UnixStream::connect(path).map_err(io_err("connect"))?;
        Self::from_stream(stream)
    }

    /// Over an existing socket.
    ///
    /// # Errors
    /// `Io`
    pub fn from_stream(stream: UnixStream) -> Result<Self> {
        let mut conn = Self { stream, timeout: Duration::ZERO, reply_ack: false };
        conn.set_timeout(crate::TIMEOUT)?;
        Ok(conn)
    }

    /// Sets the limit for every wait.
    ///
    /// # Errors
    /// `Io`
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<()> {
        self.timeout = timeout;
        self.stream.set_write_timeout(Some(timeout)).map_err(io_err("set write timeout"))
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends any bytes at all.
    ///
    /// # Errors
    /// `Io`
    pub fn send_bytes(&self, bytes: &[u8], fds: &[RawFd]) -> Result<()> {
        sys::send_with_fds(&self.stream, bytes, fds).map_err(io_err("send"))
    }

    /// Sends a message with a true header; `flags` on top of the version.
    ///
    /// # Errors
    /// `Io`
    pub fn send(&self, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> Result<()> {
        let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut bytes = header(request, FLAG_VERSION | flags, size).to_vec();
        bytes.extend_from_slice(body);
        self.send_bytes(&bytes, fds)
    }

    /// Receives one whole message, whoever asked for it.
    ///
    /// # Errors
    /// `Timeout`, `Disconnected`, `Protocol`, `Io`
    pub fn recv(&self) -> Result<Message> {
        self.recv_within(self.timeout)
    }

    /// `recv` with a limit of its own.
    ///
    /// # Errors
    /// As `recv`.
    pub fn recv_within(&self, timeout: Duration) -> Result<Message> {
        let deadline = Instant::now() + timeout;
        let mut head = [0; HEADER_LEN];
        let mut fds = Vec::new();
        self.fill(&mut head, &mut fds, deadline, timeout)?;
        let word = |i: usize| {
            u32::from_ne_bytes([head[4 * i], head[4 * i + 1], head[4 * i + 2], head[4 * i + 3]])
        };
        let (request, flags, size) = (word(0), word(1), word(2) as usize);
        if size > BODY_MAX {
            return Err(Error::Protocol(format!("message {request} announces {size} bytes")));
        }
        let mut body = vec![0; size];
        self.fill(&mut body, &mut fds, deadline, timeout)?;
        Ok(Message { request, flags, body, fds })
    }

    fn fill(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: Instant,
        after: Duration,
    ) -> Result<()> {
        let mut at = 0;
        while at < buf.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            let fd = [self.stream.as_raw_fd()];
            if !sys::wait_readable(&fd, left).map_err(io_err("poll"))? {
                return Err(Error::Timeout { what: "message", after });
            }
            let (n, more) = match sys::recv_with_fds(&self.stream, &mut buf[at..]) {
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Err(Error::Disconnected);
                }
                other => other.map_err(io_err("receive"))?,
            };
            if n == 0 {
                return Err(Error::Disconnected);
            }
            fds.extend(more);
            at += n;
        }
        Ok(())
    }

    /// Sends a message and returns the reply, which must be one to this message.
    ///
    /// # Errors
    /// As `recv`.
    pub fn get(&self, request: u32, body: &[u8], fds: &[RawFd]) -> Result<Message> {
        self.send(request, 0, body, fds)?;
        self.reply_to(request)
    }

    fn reply_to(&self, request: u32) -> Result<Message> {
        let msg = self.recv()?;
        if msg.request != request || msg.flags & (FLAG_REPLY | 3) != FLAG_REPLY | FLAG_VERSION {
            return Err(Error::Protocol(format!(
                "message {} with flags {:#x} where a reply to {request} was due",
                msg.request, msg.flags
            )));
        }
        Ok(msg)
    }

    /// Sends a message that has no reply of its own. With REPLY_ACK negotiated asks for one, and a
    /// nonzero answer is `Nack`.
    ///
    /// # Errors
    /// `Nack`, or as `recv`.
    pub fn set(&self, request: u32, body: &[u8], fds: &[RawFd]) -> Result<()> {
        if !self.reply_ack {
            return self.send(request, 0, body, fds);
        }
        self.send(request, FLAG_NEED_REPLY, body, fds)?;
        match self.reply_to(request)?.u64_at(0)? {
            0 => Ok(()),
            value => Err(Error::Nack { request, value }),
        }
    }

    /// Waits until the back end closes the connection; anything else it sends is an error.
    ///
    /// # Errors
    /// `Timeout` while it stays open, `Protocol` when a message comes.
    pub fn wait_closed(&self) -> Result<()> {
        match self.recv() {
            Err(e) if e.is_disconnected() => Ok(()),
            Err(e) => Err(e),
            Ok(m) => Err(Error::Protocol(format!("message {} where EOF was due", m.request))),
        }
    }

    /// Checks that nothing comes for a while.
    ///
    /// # Errors
    /// `Protocol` when a message comes, `Disconnected` when the connection ends.
    pub fn expect_silence(&self, time: Duration) -> Result<()> {
        match self.recv_within(time) {
            Err(e) if e.is_timeout() => Ok(()),
            Err(e) => Err(e),
            Ok(m) => Err(Error::Protocol(format!("message {} where silence was due", m.request))),
        }
    }

    /// A `get` whose reply is one u64.
    ///
    /// # Errors
    /// As `recv`.
    pub fn get_u64(&self, request: u32) -> Result<u64> {
        self.get(request, &[], &[])?.u64_at(0)
    }

    /// A `set` whose body is one u64.
    ///
    /// # Errors
    /// As `set`.
    pub fn set_u64(&self, request: u32, value: u64) -> Result<()> {
        self.set(request, &value.to_ne_bytes(), &[])
    }

    /// A `set` of a `vhost_vring_state`.
    ///
    /// # Errors
    /// As `set`.
    pub fn set_vring(&self, request: u32, index: u32, num: u32) -> Result<()> {
        self.set(request, &vring_state(index, num), &[])
    }

    /// KICK, CALL or ERR, with an fd or with the no-fd bit.
    ///
    /// # Errors
    /// As `set`.
    pub fn set_vring_fd(&self, request: u32, index: u32, fd: Option<RawFd>) -> Result<()> {
        let value = u64::from(index) | if fd.is_none() { VRING_NOFD } else { 0 };
        self.set(request, &value.to_ne_bytes(), fd.as_slice())
    }

    /// GET_VRING_BASE: stops the ring; the next avail index.
    ///
    /// # Errors
    /// As `recv`.
    pub fn get_vring_base(&self, index: u32) -> Result<u32> {
        let msg = self.get(req::GET_VRING_BASE, &vring_state(index, 0), &[])?;
        if msg.u32_at(0)? != index {
            return Err(Error::Protocol("GET_VRING_BASE answered for another ring".into()));
        }
        msg.u32_at(4)
    }

    /// GET_CONFIG, the payload alone.
    ///
    /// # Errors
    /// `Protocol` when the reply has another size than asked; or as `recv`.
    pub fn get_config(&self, offset: u32, len: usize, flags: u32) -> Result<Vec<u8>> {
        let body = config_body(offset, flags, &vec![0; len]);
        let mut msg = self.get(req::GET_CONFIG, &body, &[])?;
        if msg.body.len() != body.len() || msg.u32_at(4)? as usize != len {
            return Err(Error::Protocol(format!(
                "GET_CONFIG of {len} bytes answered with a body of {}",
                msg.body.len()
            )));
        }
        Ok(msg.body.split_off(HEADER_LEN))
    }

    /// GET_INFLIGHT_FD: what the back end wants, and the area.
    ///
    /// # Errors
    /// `Protocol` when no fd comes; or as `recv`.
    pub fn get_inflight(&self, queues: u16, size: u16) -> Result<(InflightDesc, OwnedFd)> {
        let ask = InflightDesc { num_queues: queues, queue_size: size, ..Default::default() };
        let mut msg = self.get(req::GET_INFLIGHT_FD, &ask.to_body(), &[])?;
        let desc = InflightDesc::from_message(&msg)?;
        let fd = msg.fds.pop().ok_or_else(|| Error::Protocol("no inflight fd came".into()))?;
        Ok((desc, fd))
    }

    /// SET_LOG_BASE with the log's fd; the reply as it comes (its size differs between back ends).
    ///
    /// # Errors
    /// As `recv`.
    pub fn set_log_base(&self, size: u64, offset: u64, fd: RawFd) -> Result<Message> {
        let body: Vec<u8> = [size, offset].iter().flat_map(|w| w.to_ne_bytes()).collect();
        self.get(req::SET_LOG_BASE, &body, &[fd])
    }
}
