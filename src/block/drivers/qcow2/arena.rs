//! Memory for cached tables: one mapping of zeroed atomics, which costs nothing until it is touched.
//!
//! All slices of an image live in one [`Arena`], never in boxes of their own; a journal is one in a file that outlives the
//! process. This is the only file of the driver with unsafe code.

#[cfg(not(loom))]
pub use std::sync::atomic::AtomicU64;

#[cfg(loom)]
pub use loom::sync::atomic::AtomicU64;

use crate::error::Errno;

/// `len` words, all 0 at first.
#[cfg(not(loom))]
pub struct Arena {
    base: std::ptr::NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the mapping is owned, and all access to it is atomic.
#[cfg(not(loom))]
unsafe impl Send for Arena {}
// SAFETY: as above.
#[cfg(not(loom))]
unsafe impl Sync for Arena {}

#[cfg(not(loom))]
impl Arena {
    /// An arena of `len` words.
    ///
    /// # Errors
    /// ENOMEM: more than the address space or the machine's policy allows.
    pub fn new(len: usize) -> Result<Arena, Errno> {
        let bytes = len.max(1).checked_mul(8).ok_or(Errno(libc::ENOMEM))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping touches no memory that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let base = std::ptr::NonNull::new(base.cast()).ok_or(Errno(libc::ENOMEM))?;
        Ok(Arena { base, len })
    }

    /// The first `len` words of `file`, shared with whoever maps it later. The file is that long and fully allocated, and is
    /// never cut: whoever does so kills the process, as in all shared mappings.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn shared(file: &std::fs::File, len: usize) -> Result<Arena, Errno> {
        use std::os::fd::AsRawFd;
        let bytes = len.max(1).checked_mul(8).ok_or(Errno(libc::ENOMEM))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.as_raw_fd();
        // SAFETY: a new mapping of an open file, at a place that the kernel chooses, touches no memory that exists.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        // Without this, the first store may read as much of the file as is read ahead. If it fails, no harm is done.
        // SAFETY: advice about the mapping just made, which changes no byte of it.
        unsafe { libc::madvise(base, bytes, libc::MADV_RANDOM) };
        let base = std::ptr::NonNull::new(base.cast()).ok_or(Errno(libc::ENOMEM))?;
        Ok(Arena { base, len })
    }

    /// The words.
    #[inline]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds `len` words until drop, page-aligned and zeroed, which is a value of AtomicU64.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// Asks the processor to have word `at` at hand.
    #[inline]
    pub fn prefetch(&self, at: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some(word) = self.words().get(at) {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let word = std::ptr::from_ref(word).cast();
            // SAFETY: a hint; it changes nothing that the program sees, wherever it points to.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(word) };
        }
    }

    /// Gives the memory of words `[from, from + len)` back to the machine as far as whole pages are concerned. They
    /// may read as 0 afterwards, or as before.
    pub fn release(&self, from: usize, len: usize) {
        const PAGE: usize = 4096;
        let part = &self.words()[from..from + len];
        let start = part.as_ptr().addr().next_multiple_of(PAGE);
        let end = (part.as_ptr().addr() + len * 8) / PAGE * PAGE;
        if start < end {
            let base = self.base.as_ptr().with_addr(start).cast();
            // SAFETY: whole pages inside of our own private anonymous mapping, only accessed atomically; a failure
            // leaves them as they are.
            unsafe { libc::madvise(base, end - start, libc::MADV_DONTNEED) };
        }
    }
}

#[cfg(not(loom))]
impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; no reference outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len.max(1) * 8) };
    }
}

/// As above for the model checker.
#[cfg(loom)]
pub struct Arena(Vec<AtomicU64>);

#[cfg(loom)]
#[allow(missing_docs, reason = "as above")]
impl Arena {
    pub fn new(len: usize) -> Result<Arena, Errno> {
        Ok(Arena((0..len).map(|_| AtomicU64::new(0)).collect()))
    }

    pub fn shared(_file: &std::fs::File, _len: usize) -> Result<Arena, Errno> {
        Err(Errno(libc::ENOTSUP))
    }

    pub fn words(&self) -> &[AtomicU64] {
        &self.0
    }

    pub fn prefetch(&self, _at: usize) {}

    pub fn release(&self, _from: usize, _len: usize) {}
}
