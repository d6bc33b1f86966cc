//! How an open file follows the permissions of its node: which access mode it is open with, and which image locks it
//! holds.
//!
//! With `auto-read-only=on` a file is open for reading until its node has a writer. The other access mode needs
//! another open file, which takes the old one's place under the same descriptor number (`dup3`): requests and fast
//! lanes that know the number notice nothing. Lock held: `state`, on the control thread only.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::locks::{self, Bytes};
use crate::block::drivers::posix;
use crate::block::perm::{Perm, Perms};
use crate::err;
use crate::error::{Errno, Error, Result};
use crate::sandbox;

/// How a file is opened.
#[derive(Clone, Debug)]
pub(super) struct How {
    /// As the user wrote it.
    pub(super) filename: String,
    /// Never for writing.
    pub(super) read_only: bool,
    /// For writing only while there is a writer.
    pub(super) auto_read_only: bool,
    /// Past the page cache.
    pub(super) direct: bool,
}

impl How {
    /// Whether the file is to be open for writing when its users do `used`.
    fn writable(&self, used: Perm) -> bool {
        !self.read_only && (!self.auto_read_only || used.intersects(Perm::WRITERS))
    }

    /// Opens the file as for a node without users.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn open(&self) -> Result<File> {
        self.open_path(&self.filename, self.writable(Perm::empty()))
    }

    /// Opens the file that `fd` is again, in another access mode: the same file even if its name means another by
    /// now. Without /proc, by name.
    fn open_again(&self, fd: RawFd, writable: bool) -> Result<File> {
        match self.try_open(&format!("/proc/self/fd/{fd}"), writable) {
            Ok(file) => self.check(file, writable),
            Err(e) if e.kind() == ErrorKind::NotFound => self.open_path(&self.filename, writable),
            Err(e) => Err(self.cannot_open(Errno::from(e))),
        }
    }

    fn open_path(&self, path: &str, writable: bool) -> Result<File> {
        match self.try_open(path, writable) {
            Ok(file) => self.check(file, writable),
            Err(e) if self.direct && e.raw_os_error() == Some(libc::EINVAL) => Err(err!(
                "Could not open '{}': filesystem does not support O_DIRECT",
                self.filename
            )),
            Err(e) => Err(self.cannot_open(Errno::from(e))),
        }
    }

    /// O_NONBLOCK first: opening a FIFO by mistake must not wait for ever. A file under a lease wants to be waited for.
    fn try_open(&self, path: &str, writable: bool) -> std::io::Result<File> {
        let direct = if self.direct { libc::O_DIRECT } else { 0 };
        let open = |more| {
            let flags = libc::O_NOCTTY | direct | more;
            File::options().read(true).write(writable).custom_flags(flags).open(path)
        };
        match open(libc::O_NONBLOCK) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => open(0),
            result => result,
        }
    }

    fn check(&self, file: File, writable: bool) -> Result<File> {
        posix::clear_nonblock(file.as_fd()).map_err(|e| self.cannot_open(e))?;
        let is_block = file.metadata().is_ok_and(|m| m.file_type().is_block_device());
        if writable && is_block {
            let refused = match posix::is_read_only(file.as_fd()) {
                Ok(read_only) => read_only.then_some(Errno(libc::EACCES)),
                Err(errno) => Some(errno),
            };
            if let Some(errno) = refused {
                return Err(Error::from_errno("The device is not writable", errno));
            }
        }
        Ok(file)
    }

    fn cannot_open(&self, errno: Errno) -> Error {
        let error = Error::from_errno(format_args!("Could not open '{}'", self.filename), errno);
        match sandbox::refuses_files() && errno == Errno(libc::EACCES) {
            true => error.with_hint(
                "the sandbox knows only files that were there when it began: see --allow-path",
            ),
            false => error,
        }
    }
}

/// Between two looks at locks that somebody holds: restarting is to take less than a second.
const RETRY: Duration = Duration::from_millis(5);

/// The part of an open file that follows permissions.
pub(super) struct Access {
    how: How,
    /// The descriptor's number: the same for the life of the file.
    fd: RawFd,
    locking: bool,
    /// For how long locks that others hold are waited for.
    patience: Duration,
    /// Changes under the lock of `state` only.
    writable: AtomicBool,
    state: Mutex<State>,
}

struct State {
    held: Bytes,
    /// What is to take the place of the open file, if the permissions being prepared come into force.
    next: Option<Next>,
}

struct Next {
    fd: OwnedFd,
    writable: bool,
    held: Bytes,
}

impl Access {
    /// For a file just opened by [`How::open`], whose descriptor is `fd`.
    pub(super) fn new(how: How, fd: RawFd, locking: bool, patience: Duration) -> Access {
        let writable = AtomicBool::new(how.writable(Perm::empty()));
        let state = Mutex::new(State { held: Bytes::NONE, next: None });
        Access { how, fd, locking, patience, writable, state }
    }

    /// Whether image locks are taken.
    pub(super) fn locking(&self) -> bool {
        self.locking
    }

    /// Whether the file is open for writing, now.
    pub(super) fn writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed)
    }

    /// How the file is opened.
    pub(super) fn how(&self) -> &How {
        &self.how
    }

    /// Gets whatever `perms` need beyond what there is; gives up nothing yet.
    ///
    /// # Errors
    /// The file cannot be opened for writing; another process's locks forbid it.
    pub(super) fn prepare(&self, perms: Perms) -> Result<()> {
        let mut state = self.lock();
        let want = Bytes::of(perms);
        let mut next = self.reopen(perms.used)?;
        if self.locking
            && !state.held.covers(want)
            && let Err(e) = self.take(&mut state.held, want)
        {
            let hint = "Is another process using the image";
            return Err(e.with_hint(format!("{hint} [{}]?", self.how.filename)));
        }
        if let Some(Next { fd, held, .. }) = next.as_mut().filter(|_| self.locking) {
            locks::add(fd.as_raw_fd(), held, want)?;
        }
        state.next = next;
        Ok(())
    }

    /// Takes locks; while others hold some against them, again and again for a while.
    fn take(&self, held: &mut Bytes, want: Bytes) -> Result<()> {
        let (before, begun) = (*held, Instant::now());
        loop {
            locks::add(self.fd, held, want)?;
            let Err(e) = locks::check(self.fd, want) else { return Ok(()) };
            locks::shrink(self.fd, held, before);
            if begun.elapsed() >= self.patience {
                return Err(e);
            }
            std::thread::sleep(RETRY);
        }
    }

    /// Opens the file for reading or for writing, if it is not open that way. A file that could be closed for writing
    /// but cannot be opened for reading stays as it is: loosening never fails.
    fn reopen(&self, used: Perm) -> Result<Option<Next>> {
        let writable = self.how.writable(used);
        if writable == self.writable() {
            return Ok(None);
        }
        match self.how.open_again(self.fd, writable) {
            Ok(file) => Ok(Some(Next { fd: file.into(), writable, held: Bytes::NONE })),
            Err(e) if writable => Err(e),
            Err(e) => {
                log::debug!("stays open for writing: {e}");
                Ok(None)
            }
        }
    }

    /// The permissions of the last [`Access::prepare`] are in force.
    pub(super) fn commit(&self, perms: Perms) {
        let mut state = self.lock();
        match state.next.take() {
            None if self.locking => locks::shrink(self.fd, &mut state.held, Bytes::of(perms)),
            None => {}
            Some(Next { fd, writable, held }) => match posix::replace_fd(&fd, self.fd) {
                Ok(()) => {
                    self.writable.store(writable, Ordering::Relaxed);
                    state.held = held;
                }
                // Both numbers are open: dup3 has no reason to fail.
                Err(errno) => log::error!("'{}' was not reopened: {errno}", self.how.filename),
            },
        }
    }

    /// The permissions of the last [`Access::prepare`] will not come into force: `perms` stay.
    pub(super) fn abort(&self, perms: Perms) {
        let mut state = self.lock();
        state.next = None;
        if self.locking {
            locks::shrink(self.fd, &mut state.held, Bytes::of(perms));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
