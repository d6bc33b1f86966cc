//! The requests of `file` and `host_device`.
//!
//! Reads past the end give zeroes; where the file had bytes when it was opened, or got them from us, its end is an
//! error: somebody has cut it short, and zeroes would be taken for data (a qcow2 refcount, say). A failed sync through the page cache is never forgotten: the kernel marks the lost
//! pages clean, so a later sync would succeed without the data; every later flush fails with the first error.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use serde_json::Value;

use super::access::Access;
use crate::block::driver::FileId;
use crate::block::drivers::posix;
use crate::block::perm::Perms;
use crate::block::{Dir, Driver, IoFuture, Limits, Map, Op, WriteFlags, ZeroFlags};
use crate::error::{Errno, Result as ControlResult};
use crate::mem::Sg;
use crate::qapi::Options;
use crate::rt::{self, Engine, File};

type Result<T> = std::result::Result<T, Errno>;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
const GROW: i32 = 0;

/// What is behind the file name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    Block,
    Char,
}

/// An open file or device.
pub(super) struct Medium {
    file: Arc<File>,
    kind: Kind,
    access: Access,
    limits: Limits,
    /// The length in bytes; grows with writes past the end, changes with `truncate`.
    len: AtomicU64,
    /// The error of the first failed sync through the page cache; 0 = none.
    lost: AtomicI32,
    can: Can,
}

/// What the file has not refused yet.
struct Can {
    punch: AtomicBool,
    zero: AtomicBool,
    grow: AtomicBool,
    discard_blocks: AtomicBool,
    zero_blocks: AtomicBool,
}

/// Whether the error means "this kind of request is not for this file", for now and for ever.
fn unsupported(errno: Errno) -> bool {
    let (Errno(n), list) =
        (errno, [libc::ENOTSUP, libc::EINVAL, libc::ENOSYS, libc::ENODEV, libc::ENOTTY]);
    list.contains(&n)
}

/// Runs `request` unless `can` says that it was refused before; a refusal is noted and becomes ENOTSUP.
async fn try_once(can: &AtomicBool, request: impl Future<Output = Result<()>>) -> Result<()> {
    if !can.load(Ordering::Relaxed) {
        return Err(Errno::ENOTSUP);
    }
    match request.await {
        Err(errno) if unsupported(errno) => {
            can.store(false, Ordering::Relaxed);
            Err(Errno::ENOTSUP)
        }
        result => result,
    }
}

impl Medium {
    pub(super) fn new(
        file: Arc<File>,
        kind: Kind,
        access: Access,
        limits: Limits,
        len: u64,
    ) -> Medium {
        let regular = kind == Kind::Regular;
        let block = kind == Kind::Block;
        let direct = access.how().direct;
        let can = Can {
            punch: AtomicBool::new(kind != Kind::Char),
            zero: AtomicBool::new(regular),
            grow: AtomicBool::new(regular),
            discard_blocks: AtomicBool::new(block),
            // Goes past the page cache, which would keep the old bytes.
            zero_blocks: AtomicBool::new(block && direct),
        };
        let (len, lost) = (AtomicU64::new(len), AtomicI32::new(0));
        Medium { file, kind, access, limits, len, lost, can }
    }

    async fn read(&self, offset: u64, to: Sg<'_>) -> Result<()> {
        // Before: a write of our own past the end may come in between.
        let known = self.len();
        let mut done = 0;
        while done < to.len() {
            let rest = to.slice(done, to.len() - done);
            let n = rt::read(&self.file, rest, offset + done as u64).await?;
            done += n;
            // Only the end of the file cuts a direct read at an odd place.
            if n == 0 || !(n as u64).is_multiple_of(u64::from(self.file.request_align)) {
                let there = known.min(offset + to.len() as u64);
                if self.kind != Kind::Char && offset + (done as u64) < there {
                    return Err(Errno::EIO);
                }
                to.slice(done, to.len() - done).zero();
                break;
            }
        }
        Ok(())
    }

    async fn write(&self, offset: u64, from: Sg<'_>, flags: WriteFlags) -> Result<()> {
        let dsync = flags.contains(WriteFlags::FUA);
        let mut done = 0;
        while done < from.len() {
            let rest = from.slice(done, from.len() - done);
            match rt::write(&self.file, rest, offset + done as u64, dsync).await {
                Ok(0) | Err(Errno::ENOSPC) if self.ends_before(offset + from.len() as u64) => {
                    return Err(Errno::EIO);
                }
                Ok(0) => return Err(Errno::ENOSPC),
                Ok(n) => done += n,
                Err(errno) => {
                    // The write, or the sync that belongs to it: the sync's error would not be told again.
                    if dsync && matches!(errno.0, libc::EIO | libc::ENOSPC | libc::EDQUOT) {
                        self.note_lost(errno);
                    }
                    return Err(errno);
                }
            }
        }
        self.grown_to(offset + from.len() as u64);
        Ok(())
    }

    /// Whether this is a device that has become shorter: its "no space left" is not worth waiting for (`werror=enospc`).
    fn ends_before(&self, end: u64) -> bool {
        self.kind == Kind::Block && posix::end(self.file.fd()).is_ok_and(|found| found < end)
    }

    async fn set_len(&self, len: u64) -> Result<()> {
        if self.kind != Kind::Regular {
            return Err(Errno::ENOTSUP);
        }
        if !self.access.writable() {
            return Err(Errno::EPERM);
        }
        rt::blocking_on(&self.file, move |fd| posix::set_len(fd, len)).await?;
        self.len.store(len, Ordering::Relaxed);
        Ok(())
    }

    fn grown_to(&self, end: u64) {
        if self.kind == Kind::Regular {
            self.len.fetch_max(end, Ordering::Relaxed);
        }
    }

    fn note_lost(&self, errno: Errno) {
        if !self.access.how().direct {
            let _ = self.lost.compare_exchange(0, errno.0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    async fn flush(&self) -> Result<()> {
        match self.lost.load(Ordering::Relaxed) {
            0 => {}
            errno => return Err(Errno(errno)),
        }
        let result = rt::fdatasync(&self.file).await;
        if let Err(errno) = result {
            self.note_lost(errno);
        }
        // The kernel tells only one of several concurrent callers.
        match self.lost.load(Ordering::Relaxed) {
            0 => result,
            errno => Err(Errno(errno)),
        }
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        match self.kind {
            Kind::Regular => try_once(&self.can.punch, self.allocate(PUNCH, offset, len)).await,
            Kind::Block => {
                let request = self.on_blocks(posix::discard_blocks, offset, len);
                try_once(&self.can.discard_blocks, request).await
            }
            Kind::Char => Err(Errno::ENOTSUP),
        }
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let end = offset + len;
        let inside = self.kind == Kind::Block || end <= self.len.load(Ordering::Relaxed);
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP) && inside;
        let mut result = Err(Errno::ENOTSUP);
        if unmap {
            result = try_once(&self.can.punch, self.allocate(PUNCH, offset, len)).await;
        }
        if result == Err(Errno::ENOTSUP) {
            result = match self.kind {
                Kind::Regular => self.zero_range(offset, len).await,
                Kind::Block => {
                    let request = self.on_blocks(posix::zero_blocks, offset, len);
                    try_once(&self.can.zero_blocks, request).await
                }
                Kind::Char => Err(Errno::ENOTSUP),
            };
        }
        result?;
        self.grown_to(end);
        if flags.contains(ZeroFlags::FUA) { self.flush().await } else { Ok(()) }
    }

    /// Zeroes that stay allocated: at once, or (tmpfs) as a hole that is filled again.
    async fn zero_range(&self, offset: u64, len: u64) -> Result<()> {
        match try_once(&self.can.zero, self.allocate(ZERO, offset, len)).await {
            Err(Errno::ENOTSUP) => {}
            result => return result,
        }
        if !self.can.grow.load(Ordering::Relaxed) {
            return Err(Errno::ENOTSUP);
        }
        try_once(&self.can.punch, self.allocate(PUNCH, offset, len)).await?;
        try_once(&self.can.grow, self.allocate(GROW, offset, len)).await
    }

    async fn make_room(&self, offset: u64, len: u64) -> Result<()> {
        let can = self.kind == Kind::Regular && self.access.writable();
        if !can || !self.can.grow.load(Ordering::Relaxed) {
            return Err(Errno::ENOTSUP);
        }
        try_once(&self.can.grow, self.allocate(GROW, offset, len)).await?;
        self.grown_to(offset + len);
        Ok(())
    }

    async fn allocate(&self, mode: i32, offset: u64, len: u64) -> Result<()> {
        rt::fallocate(&self.file, mode, offset, len).await
    }

    async fn on_blocks(
        &self,
        ioctl: fn(std::os::fd::RawFd, u64, u64) -> Result<()>,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        rt::blocking_on(&self.file, move |fd| ioctl(fd, offset, len)).await
    }
}

impl Driver for Medium {
    fn filename(&self) -> Option<String> {
        Some(self.access.how().filename.clone())
    }

    fn file_id(&self) -> Option<FileId> {
        let stat = posix::file_id(self.file.fd()).ok()?;
        Some(FileId { device: stat.0, inode: stat.1 })
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    fn grows(&self) -> bool {
        self.kind == Kind::Regular && self.access.writable()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn map(&self, _dir: Dir, offset: u64, len: u64) -> Map<'_> {
        // The odd end of a file is not for one plain request.
        if self.kind == Kind::Char || offset + len > self.len() {
            return Map::Slow;
        }
        Map::File { file: &self.file, offset }
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        match op {
            Op::Read { offset, to } => Box::pin(self.read(offset, to)),
            Op::Write { offset, from, flags } => Box::pin(self.write(offset, from, flags)),
            Op::WriteZeroes { offset, len, flags } => {
                Box::pin(self.write_zeroes(offset, len, flags))
            }
            Op::Discard { offset, len } => Box::pin(self.discard(offset, len)),
            Op::Flush => Box::pin(self.flush()),
        }
    }

    fn follows_medium(&self) -> bool {
        self.kind != Kind::Char
    }

    fn look_at_len(&self) -> Option<u64> {
        // Before: a write of our own past the end may come in between.
        let known = self.len();
        let found = posix::end(self.file.fd()).ok()?;
        self.len.fetch_max(found, Ordering::Relaxed);
        (found < known).then_some(found)
    }

    fn preallocate(&self, offset: u64, len: u64) -> IoFuture<'_> {
        Box::pin(self.make_room(offset, len))
    }

    fn truncate(&self, len: u64) -> IoFuture<'_> {
        Box::pin(self.set_len(len))
    }

    fn prepare_perms(&self, perms: Perms) -> ControlResult<()> {
        self.access.prepare(perms)
    }

    fn commit_perms(&self, perms: Perms) {
        self.access.commit(perms);
    }

    fn abort_perms(&self, perms: Perms) {
        self.access.abort(perms);
    }

    fn options_in_force(&self) -> Options {
        let aio = match self.file.engine {
            Engine::Threads => "threads",
            Engine::Native => "native",
            Engine::IoUring => "io_uring",
        };
        let locking = if self.access.locking() { "on" } else { "off" };
        [("filename", self.access.how().filename.as_str()), ("locking", locking), ("aio", aio)]
            .map(|(name, value)| (name.to_owned(), Value::from(value)))
            .into_iter()
            .collect()
    }
}
