//! What can go wrong on the guest's side, and the status byte of a request.

use std::time::Duration;
use std::{fmt, io};

use virtio_bindings::virtio_blk as vb;

/// The status byte a device wrote at the end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok,
    /// `VIRTIO_BLK_S_IOERR`
    IoErr,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupp,
    /// The device completed the chain and never wrote the status byte.
    NotWritten,
    /// A value the specification does not know.
    Other(u8),
}

impl Status {
    /// What the driver puts in the status byte before it offers the chain.
    pub const POISON: u8 = 0xff;

    /// Decodes the byte found in memory.
    #[must_use]
    pub fn from_byte(byte: u8) -> Self {
        match u32::from(byte) {
            vb::VIRTIO_BLK_S_OK => Self::Ok,
            vb::VIRTIO_BLK_S_IOERR => Self::IoErr,
            vb::VIRTIO_BLK_S_UNSUPP => Self::Unsupp,
            _ if byte == Self::POISON => Self::NotWritten,
            _ => Self::Other(byte),
        }
    }

    /// `Ok(())` for `Status::Ok`, the status as an error otherwise.
    ///
    /// # Errors
    /// `Error::Status` for every other value.
    pub fn ok(self) -> Result<()> {
        if self == Self::Ok { Ok(()) } else { Err(Error::Status(self)) }
    }
}

/// Everything a call of this crate may end with.
#[derive(Debug)]
pub enum Error {
    /// The request completed with a status other than OK.
    Status(Status),
    /// The device answered a message with a nonzero u64.
    Nack {
        /// Number of the message.
        request: u32,
        /// The value of the answer.
        value: u64,
    },
    /// Nothing happened in time.
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        after: Duration,
    },
    /// The back end closed the connection.
    Disconnected,
    /// The back end answered something that cannot be.
    Protocol(String),
    /// The ring has not enough free descriptors.
    RingFull,
    /// The guest memory has no room for the buffer.
    OutOfMemory(usize),
    /// A used element names a head which is not in flight.
    UnexpectedUsed(u32),
    /// A system call failed.
    Io(&'static str, io::Error),
}

/// `Result` with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The status byte, when that is what went wrong.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        if let Self::Status(status) = self { Some(*status) } else { None }
    }

    /// True when the wait ran out of time.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout { .. })
    }

    /// True when the connection is gone, by whatever system call it was noticed.
    #[must_use]
    pub fn is_disconnected(&self) -> bool {
        match self {
            Self::Disconnected => true,
            Self::Io(_, e) => {
                matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
            }
            _ => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "request ended with status {status:?}"),
            Self::Nack { request, value } => {
                write!(f, "back end answered {value:#x} to message {request}")
            }
            Self::Timeout { what, after } => write!(f, "no {what} after {after:?}"),
            Self::Disconnected => write!(f, "back end closed the connection"),
            Self::Protocol(text) => write!(f, "protocol: {text}"),
            Self::RingFull => write!(f, "ring has no free descriptors"),
            Self::OutOfMemory(len) => write!(f, "guest memory has no room for {len} bytes"),
            Self::UnexpectedUsed(id) => write!(f, "used element names head {id}, not in flight"),
            Self::Io(what, e) => write!(f, "{what}: {e}"),
        }
    }
}

impl std::error::Error for Error {}

/// Turns a system call's error into ours, with the call's name.
pub(crate) fn io_err(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |e| Error::Io(what, e)
}
