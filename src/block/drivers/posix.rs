//! The few wrappers over libc that drivers of files need and the standard library does not have. Each is safe to
//! call with any arguments: a wrong descriptor is an error from the kernel.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use vmm_sys_util::ioctl_io_nr;

use crate::error::Errno;

/// The "type" of the block layer's ioctls in `linux/fs.h`.
const BLOCK: u32 = 0x12;

ioctl_io_nr!(BLKROGET, BLOCK, 94);
ioctl_io_nr!(BLKSSZGET, BLOCK, 104);
ioctl_io_nr!(BLKDISCARD, BLOCK, 119);
ioctl_io_nr!(BLKZEROOUT, BLOCK, 127);

type Result<T> = std::result::Result<T, Errno>;

fn check(result: libc::c_int) -> Result<()> {
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// A lock request for the byte at `byte`.
fn byte_lock(kind: libc::c_int, byte: u16) -> libc::flock {
    // SAFETY: `flock` is a plain C struct of integers, for which all zeroes is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).expect("lock kinds are 0, 1 and 2");
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).expect("SEEK_SET is 0");
    lock.l_start = libc::off_t::from(byte);
    lock.l_len = 1;
    lock
}

fn set_lock(fd: RawFd, kind: libc::c_int, byte: u16) -> Result<()> {
    let lock = byte_lock(kind, byte);
    // SAFETY: the kernel reads one `flock` through the pointer, which lives until the call returns.
    check(unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const lock) })
}

/// Where a regular file or a block device ends, now. Moves the file offset, which nobody here uses.
pub fn end(fd: RawFd) -> Result<u64> {
    // SAFETY: `lseek` touches no memory.
    let end = unsafe { libc::lseek64(fd, 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| Errno::last())
}

/// Takes a shared lock on one byte for the open file behind `fd` (not for the process). Does not wait.
pub fn lock_byte(fd: RawFd, byte: u16) -> Result<()> {
    set_lock(fd, libc::F_RDLCK, byte)
}

/// Gives up a lock of [`lock_byte`].
pub fn unlock_byte(fd: RawFd, byte: u16) -> Result<()> {
    set_lock(fd, libc::F_UNLCK, byte)
}

/// Whether another open file holds a lock on the byte.
pub fn byte_is_locked(fd: RawFd, byte: u16) -> Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    // SAFETY: the kernel reads and writes one `flock` through the pointer, which lives until the call returns.
    check(unsafe { libc::fcntl(fd, libc::F_OFD_GETLK, &raw mut lock) })?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

/// Makes the number `to` mean the open file of `from`, atomically; what `to` meant is closed.
pub fn replace_fd(from: &OwnedFd, to: RawFd) -> Result<()> {
    // SAFETY: no memory is passed. The caller owns `to` and keeps owning it: the number stays open throughout.
    check(unsafe { libc::dup3(from.as_raw_fd(), to, libc::O_CLOEXEC) })
}

/// Clears O_NONBLOCK: io_uring would take it as "never wait for the disk".
pub fn clear_nonblock(fd: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: no memory is passed.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) })
}

/// Sets the length of a file in bytes. Blocks.
pub fn set_len(fd: RawFd, len: u64) -> Result<()> {
    let len = libc::off_t::try_from(len).map_err(|_| Errno(libc::EFBIG))?;
    loop {
        // SAFETY: no memory is passed.
        match check(unsafe { libc::ftruncate(fd, len) }) {
            Err(Errno(libc::EINTR)) => {}
            result => return result,
        }
    }
}

/// What direct I/O demands of (memory, offsets and lengths), in bytes, as the file system tells; `None` if it does
/// not tell.
pub fn direct_io_alignment(fd: BorrowedFd<'_>) -> Option<(u32, u32)> {
    // SAFETY: `statx` is a plain C struct of integers, for which all zeroes is a value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let (path, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
    // SAFETY: the path is a C string, and the kernel writes one `statx` through the pointer.
    let result =
        unsafe { libc::statx(fd.as_raw_fd(), path, flags, libc::STATX_DIOALIGN, &raw mut stat) };
    let told = result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    let known = |n: u32| n.is_power_of_two();
    (told && known(stat.stx_dio_mem_align) && known(stat.stx_dio_offset_align))
        .then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// The device and inode of an open file. Of a device file: those of the device, whichever file names it.
pub fn file_id(fd: RawFd) -> Result<(u64, u64)> {
    // SAFETY: `stat` is a plain C struct of integers, for which all zeroes is a value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `stat` through the pointer.
    check(unsafe { libc::fstat(fd, &raw mut stat) })?;
    let device = matches!(stat.st_mode & libc::S_IFMT, libc::S_IFBLK | libc::S_IFCHR);
    Ok(if device { (stat.st_rdev, u64::MAX) } else { (stat.st_dev, stat.st_ino) })
}

/// An ioctl that answers with one C int.
fn get_int(fd: RawFd, request: libc::c_ulong) -> Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    // SAFETY: only called with requests that write one C int through the pointer.
    check(unsafe { libc::ioctl(fd, request, &raw mut value) })?;
    Ok(value)
}

/// A block device's logical block size in bytes.
pub fn logical_block_size(fd: BorrowedFd<'_>) -> Result<u32> {
    let size = get_int(fd.as_raw_fd(), BLKSSZGET())?;
    u32::try_from(size).map_err(|_| Errno::EINVAL)
}

/// Whether the kernel refuses writes to a block device.
pub fn is_read_only(fd: BorrowedFd<'_>) -> Result<bool> {
    Ok(get_int(fd.as_raw_fd(), BLKROGET())? != 0)
}

/// An ioctl on a byte range of a block device.
fn on_range(fd: RawFd, request: libc::c_ulong, offset: u64, len: u64) -> Result<()> {
    let range = [offset, len];
    // SAFETY: only called with requests that read two u64 through the pointer.
    check(unsafe { libc::ioctl(fd, request, range.as_ptr()) })
}

/// Discards a range of a block device. Blocks.
pub fn discard_blocks(fd: RawFd, offset: u64, len: u64) -> Result<()> {
    on_range(fd, BLKDISCARD(), offset, len)
}

/// Makes a range of a block device read as zeroes, behind the page cache's back. Blocks.
pub fn zero_blocks(fd: RawFd, offset: u64, len: u64) -> Result<()> {
    on_range(fd, BLKZEROOUT(), offset, len)
}
