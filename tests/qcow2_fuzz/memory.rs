//! How much memory a run takes, at most at any moment.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The most that a run may take, in bytes: the tables of QEMU's limits, with copies, and the simulated disk.
const MOST: isize = 256 << 20;

thread_local! {
    /// Bytes taken on this thread and not given back; the most at any time.
    static TAKEN: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn count(bytes: isize) {
    // At the end of a thread there is nothing to count with.
    let taken = TAKEN.try_with(|taken| {
        taken.set(taken.get() + bytes);
        taken.get()
    });
    if let Ok(taken) = taken {
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(taken)));
    }
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Runs `f`.
///
/// # Panics
/// If it takes too much memory.
pub fn assert_bounded(f: impl FnOnce()) {
    let before = TAKEN.get();
    PEAK.set(before);
    f();
    let peak = PEAK.get() - before;
    assert!(peak < MOST, "{peak} bytes of memory");
}
