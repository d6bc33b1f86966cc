//! The two kinds of error of this program.
//!
//! * [`Error`] belongs to the control plane: options, opening nodes, the command line. It is a sentence in
//!   QEMU's words, with an optional hint printed on a line of its own (QEMU's `error_append_hint`).
//! * [`Errno`] belongs to the data plane: it is `Copy`, one kernel error number, and travels with every request.
#![forbid(unsafe_code)]

use std::fmt;

/// A control-plane error: one sentence, and perhaps a hint for the user on the next line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    message: String,
    hint: Option<String>,
}

/// The result of control-plane work.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error that says `message`.
    pub fn new(message: impl Into<String>) -> Self {
        Error { message: message.into(), hint: None }
    }

    /// The same error with `hint` printed on the line after the message.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error with `prefix` in front of its message (QEMU's `error_prepend`; the caller writes the `: `).
    pub fn prepend(mut self, prefix: impl AsRef<str>) -> Self {
        self.message.insert_str(0, prefix.as_ref());
        self
    }

    /// An error that says `message: strerror(errno)` (QEMU's `error_setg_errno`).
    pub fn from_errno(message: impl fmt::Display, errno: Errno) -> Self {
        Error::new(format!("{message}: {errno}"))
    }

    /// The sentence, without the hint.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The hint, if there is one.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Builds a control-plane [`Error`] with `format!`'s syntax.
#[macro_export]
macro_rules! err {
    ($($arg:tt)*) => { $crate::error::Error::new(format!($($arg)*)) };
}

/// A data-plane error: a positive kernel error number (`libc::EIO`, ...).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// Input/output error.
    pub const EIO: Errno = Errno(libc::EIO);
    /// No space left on device.
    pub const ENOSPC: Errno = Errno(libc::ENOSPC);
    /// Operation not supported.
    pub const ENOTSUP: Errno = Errno(libc::ENOTSUP);
    /// Invalid argument.
    pub const EINVAL: Errno = Errno(libc::EINVAL);
    /// Operation not permitted.
    pub const EPERM: Errno = Errno(libc::EPERM);
    /// Nobody waits for it any more.
    pub const ECANCELED: Errno = Errno(libc::ECANCELED);

    /// The error of the last failed system call of this thread.
    pub fn last() -> Self {
        Self::from(std::io::Error::last_os_error())
    }

    /// A system call's return value in the kernel's own convention: negative is an error number.
    pub fn from_result(res: i32) -> std::result::Result<usize, Errno> {
        usize::try_from(res).map_err(|_| Errno(-res))
    }
}

impl From<std::io::Error> for Errno {
    fn from(e: std::io::Error) -> Self {
        Errno(e.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<Errno> for std::io::Error {
    fn from(e: Errno) -> Self {
        std::io::Error::from_raw_os_error(e.0)
    }
}

impl fmt::Display for Errno {
    /// `strerror`'s text, as QEMU prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = std::io::Error::from_raw_os_error(self.0).to_string();
        // The standard library appends " (os error N)", which strerror does not.
        f.write_str(text.split(" (os error").next().unwrap_or(&text))
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}
