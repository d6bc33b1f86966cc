//! Buffers with an alignment, for O_DIRECT.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;

use crate::mem::IoVec;

/// The most memory that a thread keeps for [`Buffer::recycled`], in bytes.
const KEEP_BYTES: usize = 4 << 20;

thread_local! {
    /// Buffers to be used again, the last first: it is in the processor's cache.
    static KEPT: RefCell<Vec<Buffer>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of its own, aligned as asked.
pub struct Buffer {
    base: *mut u8,
    layout: Layout,
    /// Kept by the thread that drops it.
    recycle: bool,
}

// SAFETY: the buffer owns its memory.
unsafe impl Send for Buffer {}
// SAFETY: shared access is read-only or through `IoVec`, whose users order their accesses.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zero bytes at a multiple of `align` (a power of two).
    ///
    /// # Panics
    /// If `len` is 0 or absurd.
    pub fn new(len: usize, align: usize) -> Buffer {
        assert!(len > 0, "an empty buffer");
        let layout =
            Layout::from_size_align(len, align.max(16)).expect("a sane size and alignment");
        // SAFETY: the layout's size is not 0.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        Buffer { base, layout, recycle: false }
    }

    /// As [`Buffer::new`], but with any content: for whoever overwrites all of it, or zeroes what it does not. Costs neither
    /// clearing nor page faults where the thread has dropped one of the same shape.
    ///
    /// # Panics
    /// As [`Buffer::new`].
    pub fn recycled(len: usize, align: usize) -> Buffer {
        let kept = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            let fits = |b: &Buffer| b.layout.size() == len && b.layout.align() >= align;
            kept.iter().rposition(fits).map(|at| kept.swap_remove(at))
        });
        let mut buffer = kept.ok().flatten().unwrap_or_else(|| Buffer::new(len, align));
        buffer.recycle = true;
        buffer
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.layout.size()
    }

    /// Always false: a buffer has bytes.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The buffer as a memory range, to be used only while the buffer lives.
    pub fn iovec(&self) -> IoVec {
        // SAFETY: the range is ours until drop; users keep the buffer alive across the operation (see rt).
        unsafe { IoVec::new(self.base, self.layout.size()) }
    }

    /// Its bytes, while no operation uses them.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: initialised (zeroed at first), ours; operations that write have completed.
        unsafe { std::slice::from_raw_parts(self.base, self.layout.size()) }
    }

    /// Its bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.layout.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.recycle {
            let mut kept = Some(Buffer { base: self.base, layout: self.layout, recycle: false });
            // A thread that is ending keeps nothing.
            let _ = KEPT.try_with(|list| {
                if let Ok(mut list) = list.try_borrow_mut()
                    && list.iter().map(Buffer::len).sum::<usize>() + self.layout.size()
                        <= KEEP_BYTES
                {
                    list.extend(kept.take());
                }
            });
            // If nobody took it, it is freed here; either way it is no longer ours.
            return drop(kept);
        }
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.base, self.layout) };
    }
}
