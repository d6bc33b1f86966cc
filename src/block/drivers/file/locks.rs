//! Image locks: how processes that open one image tell each other what they do with it.
//!
//! QEMU's protocol, to the byte. For each permission `i` (bit number) that is used, a shared lock on byte 100 + i;
//! for each that is not shared, one on byte 200 + i. Before a permission is used, byte 200 + i must not be locked by
//! others; before it is unshared, byte 100 + i. The locks are "open file description" locks: they belong to the open
//! file, and conflict inside one process too.
#![forbid(unsafe_code)]

use std::os::fd::RawFd;

use crate::block::drivers::posix;
use crate::block::perm::{PERM_NAMES, Perm, Perms};
use crate::err;
use crate::error::{Errno, Error, Result};

/// The byte of the first permission in use.
const USED: u16 = 100;
/// The byte of the first permission not shared.
const UNSHARED: u16 = 200;

/// A set of lock bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bytes {
    used: Perm,
    unshared: Perm,
}

impl Bytes {
    pub(super) const NONE: Bytes = Bytes { used: Perm::empty(), unshared: Perm::empty() };

    /// The bytes that `perms` call for.
    pub(super) fn of(perms: Perms) -> Bytes {
        Bytes { used: perms.used, unshared: perms.shared.complement() }
    }

    /// Whether all bytes of `other` are among these.
    pub(super) fn covers(self, other: Bytes) -> bool {
        self.used.contains(other.used) && self.unshared.contains(other.unshared)
    }

    fn minus(self, other: Bytes) -> Bytes {
        Bytes { used: self.used - other.used, unshared: self.unshared - other.unshared }
    }

    fn each(self) -> impl Iterator<Item = u16> {
        bits(self.used).map(|i| USED + i).chain(bits(self.unshared).map(|i| UNSHARED + i))
    }
}

fn bits(perm: Perm) -> impl Iterator<Item = u16> {
    (0..4).filter(move |i| perm.bits() & (1 << i) != 0)
}

/// Whether the file system keeps such locks at all.
pub(super) fn supported(fd: RawFd) -> bool {
    posix::byte_is_locked(fd, USED).is_ok()
}

/// Locks the bytes of `want` that are not in `held`, and adds them to it; on an error `held` is as before.
///
/// # Errors
/// The kernel refuses a lock.
pub(super) fn add(fd: RawFd, held: &mut Bytes, want: Bytes) -> Result<()> {
    let new = want.minus(*held);
    for byte in new.each() {
        if let Err(errno) = posix::lock_byte(fd, byte) {
            release(fd, new);
            return Err(Error::from_errno(format_args!("Failed to lock byte {byte}"), errno));
        }
    }
    *held = Bytes { used: held.used | want.used, unshared: held.unshared | want.unshared };
    Ok(())
}

/// Unlocks the bytes of `held` that are not in `want`.
pub(super) fn shrink(fd: RawFd, held: &mut Bytes, want: Bytes) {
    let old = held.minus(want);
    release(fd, old);
    *held = held.minus(old);
}

fn release(fd: RawFd, bytes: Bytes) {
    for byte in bytes.each() {
        if let Err(errno) = posix::unlock_byte(fd, byte) {
            log::warn!("Failed to unlock byte {byte}: {errno}");
        }
    }
}

/// Whether nobody else holds a lock against the bytes of `want`.
///
/// # Errors
/// In QEMU's words, without the hint.
pub(super) fn check(fd: RawFd, want: Bytes) -> Result<()> {
    for i in bits(want.used) {
        check_byte(fd, UNSHARED + i, || format!("\"{}\" lock", PERM_NAMES[usize::from(i)]))?;
    }
    for i in bits(want.unshared) {
        check_byte(fd, USED + i, || format!("shared \"{}\" lock", PERM_NAMES[usize::from(i)]))?;
    }
    Ok(())
}

fn check_byte(fd: RawFd, byte: u16, what: impl Fn() -> String) -> Result<()> {
    match posix::byte_is_locked(fd, byte) {
        Ok(false) => Ok(()),
        Ok(true) | Err(Errno(libc::EAGAIN | libc::EACCES)) => Err(err!("Failed to get {}", what())),
        Err(errno) => Err(Error::from_errno(format_args!("Failed to get {}", what()), errno)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// The locked bytes of a file, seen from another open file.
    fn locked(path: &std::path::Path) -> Vec<u16> {
        let file = std::fs::File::open(path).unwrap();
        (100..204).filter(|b| posix::byte_is_locked(file.as_raw_fd(), *b).unwrap()).collect()
    }

    #[test]
    fn bytes_are_qemus() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let fd = temp.as_file().as_raw_fd();
        let format = Perms {
            used: Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE,
            shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        };
        let mut held = Bytes::NONE;
        add(fd, &mut held, Bytes::of(format)).unwrap();
        assert_eq!(locked(temp.path()), [100, 101, 103, 201, 203]);
        let other = std::fs::File::open(temp.path()).unwrap();
        let refused = |perms| check(other.as_raw_fd(), Bytes::of(perms)).unwrap_err().to_string();
        assert_eq!(refused(Perms::device(true)), "Failed to get \"write\" lock");
        let reader = Perms { used: Perm::CONSISTENT_READ, shared: Perm::CONSISTENT_READ };
        assert_eq!(refused(reader), "Failed to get shared \"write\" lock");
        check(other.as_raw_fd(), Bytes::of(Perms::device(false))).unwrap();
        check(fd, Bytes::of(format)).unwrap();
        shrink(fd, &mut held, Bytes::of(Perms::device(true)));
        assert_eq!(locked(temp.path()), [100, 101]);
        shrink(fd, &mut held, Bytes::NONE);
        assert_eq!((locked(temp.path()), held), (vec![], Bytes::NONE));
    }
}
