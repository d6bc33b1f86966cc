//! Messages over a socket: file descriptors, short reads, the end.
//!
//! All waiting is one `poll` of the socket and of the server's stop event, and the calls themselves never block: a
//! front end that stalls in the middle of a message can hold up nobody who wants to stop. The crate `vmm-sys-util`
//! receives descriptors without MSG_CMSG_CLOEXEC, so the `recvmsg` is ours. Every descriptor is an `OwnedFd` from the
//! moment it exists; whatever path is taken, it is closed.

use std::fmt;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::message::{Header, MAX_FDS, MAX_PAYLOAD, Message, VERSION, VERSION_MASK};

/// The most descriptors that the kernel passes with one `sendmsg` (SCM_MAX_FD).
const SCM_MAX_FD: usize = 253;
/// Eight-byte words for the control message of as many: a `cmsghdr` of 16 bytes, then four bytes each.
const CONTROL_WORDS: usize = 2 + (SCM_MAX_FD * size_of::<i32>()).div_ceil(8);

/// Why a connection ended.
#[derive(Debug)]
pub enum End {
    /// The front end closed it between two messages.
    Closed,
    /// The front end closed it in the middle of a message.
    Cut,
    /// We were told to stop.
    Stopped,
    /// A header that cannot be one: what follows it cannot be found.
    Malformed(Header),
    /// The socket failed.
    Io(io::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Closed => f.write_str("closed by the front end"),
            End::Cut => f.write_str("closed by the front end in the middle of a message"),
            End::Stopped => f.write_str("stopped"),
            End::Malformed(h) => write!(
                f,
                "malformed message: request {}, flags {:#x}, {} bytes",
                h.request, h.flags, h.size
            ),
            End::Io(e) => write!(f, "{e}"),
        }
    }
}

impl From<io::Error> for End {
    fn from(e: io::Error) -> Self {
        End::Io(e)
    }
}

/// One connection, and the event that ends it.
pub struct Channel<'a> {
    stream: UnixStream,
    stop: &'a EventFd,
}

/// What came for one message so far.
#[derive(Default)]
struct Incoming {
    fds: Vec<OwnedFd>,
    lost: bool,
}

impl Incoming {
    /// A sender that spreads descriptors over the bytes of its message must not fill our table.
    fn limit(&mut self) {
        if self.lost || self.fds.len() > MAX_FDS {
            self.lost = true;
            self.fds.clear();
        }
    }
}

impl<'a> Channel<'a> {
    /// A channel over `stream` that ends when `stop` becomes readable.
    pub fn new(stream: UnixStream, stop: &'a EventFd) -> Self {
        Channel { stream, stop }
    }

    /// Receives one message: waits for it for as long as it takes.
    ///
    /// # Errors
    /// The connection's end; it is of no use afterwards.
    pub fn receive(&mut self) -> Result<Message, End> {
        let mut incoming = Incoming::default();
        let mut header = [0; Header::LEN];
        self.fill(&mut header, &mut incoming, true)?;
        let header = Header::parse(&header);
        if header.flags & VERSION_MASK != VERSION || header.size > MAX_PAYLOAD {
            return Err(End::Malformed(header));
        }
        let mut payload = vec![0; usize::try_from(header.size).expect("64-bit hosts only")];
        self.fill(&mut payload, &mut incoming, false)?;
        Ok(Message { header, payload, fds: incoming.fds, fds_lost: incoming.lost })
    }

    fn fill(&self, buf: &mut [u8], incoming: &mut Incoming, first: bool) -> Result<(), End> {
        let mut done = 0;
        while done < buf.len() {
            self.wait(libc::POLLIN)?;
            match receive_some(self.stream.as_fd(), &mut buf[done..], incoming) {
                Ok(0) if first && done == 0 => return Err(End::Closed),
                Ok(0) => return Err(End::Cut),
                Ok(n) => done += n,
                Err(e) if is_retry(&e) => {}
                Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => return Err(End::Cut),
                Err(e) => return Err(End::Io(e)),
            }
            incoming.limit();
        }
        Ok(())
    }

    /// Sends all of `bytes`.
    ///
    /// # Errors
    /// The connection's end.
    pub fn send(&mut self, mut bytes: &[u8]) -> Result<(), End> {
        while !bytes.is_empty() {
            match send_now(self.stream.as_fd(), bytes) {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(libc::POLLOUT)?,
                Err(e) if is_retry(&e) => {}
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => return Err(End::Closed),
                Err(e) => return Err(End::Io(e)),
            }
        }
        Ok(())
    }

    /// Sends all of `bytes`, and a descriptor with the first of them.
    ///
    /// # Errors
    /// The connection's end.
    pub fn send_with(&mut self, bytes: &[u8], fd: &OwnedFd) -> Result<(), End> {
        // A socket that is ready to be written has room for a short message: the call does not wait.
        self.wait(libc::POLLOUT)?;
        let sent = self.stream.send_with_fd(bytes, fd.as_raw_fd());
        let sent = sent.map_err(|e| End::Io(io::Error::from_raw_os_error(e.errno())))?;
        self.send(bytes.get(sent..).unwrap_or_default())
    }

    fn wait(&self, events: libc::c_short) -> Result<(), End> {
        match wait(Some(self.stream.as_fd()), events, self.stop, None)? {
            Woken::Stop => Err(End::Stopped),
            Woken::Ready | Woken::Timeout => Ok(()),
        }
    }
}

fn is_retry(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// What ended a [`wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The stop event; it comes first.
    Stop,
    /// The descriptor (or its error or end, which the next call on it tells).
    Ready,
    /// Neither, in the time given.
    Timeout,
}

/// Waits for `events` (as `poll` has them) on `fd`, if there is one, or for `stop`, at most `timeout_ms` milliseconds.
///
/// # Errors
/// What `poll` says, except EINTR.
pub fn wait(
    fd: Option<BorrowedFd<'_>>,
    events: libc::c_short,
    stop: &EventFd,
    timeout_ms: Option<u16>,
) -> io::Result<Woken> {
    let mut polled = [
        libc::pollfd { fd: stop.as_raw_fd(), events: libc::POLLIN, revents: 0 },
        // A negative descriptor is skipped.
        libc::pollfd { fd: fd.map_or(-1, |fd| fd.as_raw_fd()), events, revents: 0 },
    ];
    loop {
        // SAFETY: the array has two elements and outlives the call.
        let rc = unsafe { libc::poll(polled.as_mut_ptr(), 2, timeout_ms.map_or(-1, i32::from)) };
        match rc {
            0 => return Ok(Woken::Timeout),
            1.. if polled[0].revents != 0 => return Ok(Woken::Stop),
            1.. => return Ok(Woken::Ready),
            _ => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
}

/// Sends as much of `bytes` as goes without waiting; answers how much. Never raises SIGPIPE.
///
/// # Errors
/// What `send` says; EAGAIN if nothing goes now.
pub fn send_now(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the pointer and the length are those of one slice, which is only read.
    let n = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// How often [`discard_input`] receives: thousands of replies, less than a full socket.
const DISCARDS_MAX: usize = 256;

/// Throws away what can be received without waiting.
///
/// # Errors
/// What `recv` says, except EAGAIN; `UnexpectedEof` if the peer is gone, `QuotaExceeded` if it says more and more.
pub fn discard_input(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut buf = [0; 256];
    for _ in 0..DISCARDS_MAX {
        match receive_some(fd, &mut buf, &mut Incoming::default()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::ErrorKind::QuotaExceeded.into())
}

/// The process at the other end of the connection, where the kernel knows it.
pub fn peer_pid(stream: &UnixStream) -> Option<i32> {
    let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).ok()?;
    // SAFETY: the kernel writes at most `len` bytes of plain data into `cred`, and `len` is its size.
    let rc = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    };
    (rc == 0 && cred.pid > 0).then_some(cred.pid)
}

/// Receives what is there, at most `buf`'s length, without waiting; 0 is the end.
fn receive_some(fd: BorrowedFd<'_>, buf: &mut [u8], incoming: &mut Incoming) -> io::Result<usize> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: `msghdr` is plain data, for which all zeroes is a value.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: `msg` names one buffer and one control area with their true lengths; both outlive the call and are
    // borrowed by nobody else.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut msg, flags) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: `recvmsg` has just filled `msg` and the control area that it names, which is still alive.
    unsafe { collect_fds(&msg, &mut incoming.fds) };
    incoming.lost |= msg.msg_flags & libc::MSG_CTRUNC != 0;
    Ok(n)
}

/// Takes over the descriptors that came with `msg`.
///
/// # Safety
/// `msg` must have been filled by a successful `recvmsg`, its control area be alive, and nobody else have taken its
/// descriptors.
unsafe fn collect_fds(msg: &libc::msghdr, fds: &mut Vec<OwnedFd>) {
    // SAFETY: the caller's promise; so for the other blocks below.
    let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(msg) };
    while !cmsg.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR answer headers inside the control area, aligned as it is.
        let header = unsafe { &*cmsg };
        if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: arithmetic only.
            let lead = unsafe { libc::CMSG_LEN(0) };
            let bytes = header.cmsg_len.saturating_sub(usize::try_from(lead).unwrap_or(usize::MAX));
            for i in 0..bytes / size_of::<i32>() {
                // SAFETY: the kernel wrote `bytes` bytes of descriptors from CMSG_DATA on, each new and ours.
                let fd = unsafe {
                    let at = libc::CMSG_DATA(cmsg).cast::<i32>().add(i);
                    OwnedFd::from_raw_fd(at.read_unaligned())
                };
                fds.push(fd);
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR; `cmsg` is a header of this area.
        cmsg = unsafe { libc::CMSG_NXTHDR(msg, cmsg) };
    }
}
