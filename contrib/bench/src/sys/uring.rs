//! A file read and written through io_uring by the calling thread: what the host itself can do, with
//! neither guest nor back end in between. The ceiling that back ends are measured against.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use io_uring::{IoUring, opcode, types};

/// Alignment of buffers: a page, which every O_DIRECT takes.
const ALIGN: usize = 4096;

#[repr(C, align(4096))]
struct Page([u8; ALIGN]);

/// An io_uring, a file, and a buffer for each request in flight.
///
/// Invariant: a slot's buffer is not touched while the slot is in flight, and the ring is empty
/// before the buffers are freed.
pub struct FileRing {
    ring: IoUring,
    file: File,
    /// `pages_per_slot` for each slot.
    buffers: Vec<Page>,
    pages_per_slot: usize,
    len: u32,
    busy: Vec<bool>,
    in_flight: usize,
}

/// Opens a file for reading and writing, past the page cache if `direct`.
///
/// # Errors
/// The system call's.
pub fn open_direct(path: &Path, direct: bool) -> io::Result<File> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}

impl FileRing {
    /// A ring of `depth` slots of `len` bytes; to be used by one thread, the one that makes it.
    ///
    /// # Errors
    /// Those of io_uring_setup; on kernels before 6.1 its newer flags are left out.
    pub fn new(file: File, depth: u16, len: u32) -> io::Result<Self> {
        let entries = u32::from(depth).next_power_of_two();
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .or_else(|_| IoUring::new(entries))?;
        let pages_per_slot = (len as usize).div_ceil(ALIGN);
        let slots = usize::from(depth);
        let buffers = (0..slots * pages_per_slot).map(|_| Page([0x5a; ALIGN])).collect();
        Ok(Self {
            ring,
            file,
            buffers,
            pages_per_slot,
            len,
            busy: vec![false; slots],
            in_flight: 0,
        })
    }

    /// Queues a request of a free slot.
    ///
    /// # Panics
    /// When the slot is in flight.
    pub fn push(&mut self, slot: u16, write: bool, offset: u64) {
        let index = usize::from(slot);
        assert!(!self.busy[index], "slot {slot} is in flight");
        let buffer = self.buffers[index * self.pages_per_slot..].as_mut_ptr().cast::<u8>();
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = if write {
            opcode::Write::new(fd, buffer, self.len).offset(offset).build()
        } else {
            opcode::Read::new(fd, buffer, self.len).offset(offset).build()
        };
        // SAFETY: the buffer is this slot's alone, `len` bytes long, and neither moved nor freed while
        // `busy`; the file is open as long as the ring.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(slot.into())) };
        pushed.expect("the ring has an entry for each slot");
        self.busy[index] = true;
        self.in_flight += 1;
    }

    /// Submits what was queued and waits for at least one completion.
    ///
    /// # Errors
    /// The system call's.
    pub fn submit_and_wait(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(drop),
            }
        }
    }

    /// The slot of a completed request, and whether it did all its bytes.
    ///
    /// # Panics
    /// When the kernel names a slot that it was not given.
    pub fn pop(&mut self) -> Option<(u16, bool)> {
        let entry = self.ring.completion().next()?;
        let slot = u16::try_from(entry.user_data()).expect("what `push` has stored");
        self.busy[usize::from(slot)] = false;
        self.in_flight -= 1;
        Some((slot, u32::try_from(entry.result()) == Ok(self.len)))
    }

    /// Requests not completed yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for FileRing {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if self.submit_and_wait().is_err() {
                // The kernel may still write to them: better lost than freed.
                std::mem::forget(std::mem::take(&mut self.buffers));
                return;
            }
            while self.pop().is_some() {}
        }
    }
}
