//! What happens when memory that somebody else's file backs is no longer there.
//!
//! A front end may cut the file of its guest's memory short while we have it mapped; the next access raises SIGBUS, whose
//! default action would end the process and with it every other guest's disk. Whoever maps such a file keeps a
//! [`Guard`] for the mapping: an access that fails inside of it finds private zeroes from then on, and the guard says so.
//! A SIGBUS elsewhere (our own program on a broken disk) does what it did before.
//!
//! The whole mapping is replaced, not a page of it: with single pages a front end could make us need more mappings than
//! a process may have (`vm.max_map_count`), and a disk half of whose memory is gone is of no use to its guest.
//! Accesses by the kernel (reads into such memory) raise nothing, they fail with EFAULT.
//!
//! The handler takes no lock, allocates nothing and logs nothing: who uses the memory looks at [`count`] and
//! [`Guard::is_lost`] and says it.

use std::ptr::{null_mut, without_provenance_mut};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};

/// Places per chunk: one front end's most regions fit in one.
const CHUNK: usize = 512;

/// Mappings that were lost since the process began.
static LOST: AtomicU64 = AtomicU64::new(0);
/// The last chunk made; chunks are never freed.
static CHUNKS: AtomicPtr<Chunk> = AtomicPtr::new(null_mut());
/// What SIGBUS did before; written once, before our handler is installed.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(null_mut());

/// One guarded mapping, or a free place.
struct Place {
    taken: AtomicBool,
    /// Odd while `start` and `len` change: the handler may look at any moment.
    version: AtomicU64,
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

struct Chunk {
    places: [Place; CHUNK],
    next: *const Chunk,
}

/// A mapping that may lose its file. To be dropped before it is unmapped.
pub struct Guard {
    place: &'static Place,
}

impl Guard {
    /// Guards `len` bytes at `start`: whole pages (of the file's size) of a mapping of the caller's.
    ///
    /// # Safety
    /// Until the guard is dropped the range stays mapped, by one mapping for reading and writing that holds no Rust
    /// object and whose bytes may change at any time.
    pub unsafe fn new(start: *mut libc::c_void, len: usize) -> Guard {
        install();
        let place = take_place();
        place.lost.store(false, Ordering::Relaxed);
        place.set(start.addr(), len);
        Guard { place }
    }

    /// Whether the mapping has been replaced by zeroes.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.place.lost.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.place.set(0, 0);
        self.place.taken.store(false, Ordering::Release);
    }
}

/// How many mappings have been lost: cheap to look at, again and again.
#[inline]
pub fn count() -> u64 {
    LOST.load(Ordering::Relaxed)
}

impl Place {
    const fn free() -> Place {
        Place {
            taken: AtomicBool::new(false),
            version: AtomicU64::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            lost: AtomicBool::new(false),
        }
    }

    /// Only its owner does this.
    fn set(&self, start: usize, len: usize) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.start.store(start, Ordering::Release);
        self.len.store(len, Ordering::Release);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The range, if `at` is in it. One that is changing does not have it: who faulted uses its mapping, so that one's
    /// guard stays as it is.
    fn range_with(&self, at: usize) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let (start, len) = (self.start.load(Ordering::Acquire), self.len.load(Ordering::Acquire));
        fence(Ordering::Acquire);
        let stable = version & 1 == 0 && self.version.load(Ordering::Relaxed) == version;
        (stable && at.wrapping_sub(start) < len).then_some((start, len))
    }
}

fn chunks() -> impl Iterator<Item = &'static Chunk> {
    let mut next: *const Chunk = CHUNKS.load(Ordering::Acquire);
    std::iter::from_fn(move || {
        // SAFETY: null or a leaked chunk, complete before it was published.
        let chunk = unsafe { next.as_ref() }?;
        next = chunk.next;
        Some(chunk)
    })
}

/// A place for a new guard; a new chunk if there is none.
fn take_place() -> &'static Place {
    loop {
        let mut free = chunks().flat_map(|c| &c.places);
        if let Some(place) = free.find(|p| !p.taken.swap(true, Ordering::Acquire)) {
            return place;
        }
        let head = CHUNKS.load(Ordering::Acquire);
        let made =
            Box::into_raw(Box::new(Chunk { places: [const { Place::free() }; CHUNK], next: head }));
        if CHUNKS.compare_exchange(head, made, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: made above, and nobody else has seen it.
            drop(unsafe { Box::from_raw(made) });
        }
    }
}

/// Installs the handler, once.
fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: `sigaction` is a plain C struct, for which all zeroes is a value; both pointers are valid for the calls.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut before);
            BEFORE.store(Box::into_raw(Box::new(before)), Ordering::Release);
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = handle as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&raw mut ours.sa_mask);
            if libc::sigaction(libc::SIGBUS, &raw const ours, null_mut()) != 0 {
                log::warn!("no handler for SIGBUS: {}", crate::error::Errno::last());
            }
        }
    });
}

/// The handler. Only calls that a signal handler may make; errno is as before when it returns.
extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid `siginfo_t`, in which a SIGBUS of its own has an address. errno is
    // this thread's own.
    let (code, at, errno) =
        unsafe { ((*info).si_code, (*info).si_addr().addr(), libc::__errno_location()) };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // Not positive: somebody has sent the signal.
    let sent = code <= 0;
    let at = if sent { 0 } else { at };
    let found = chunks().flat_map(|c| &c.places).find_map(|p| Some((p, p.range_with(at)?)));
    if !found.is_some_and(|(place, range)| replace(place, range)) {
        // SAFETY: it was stored before this handler was installed, and is never freed. The access is repeated when we
        // return, and meets what SIGBUS did before us.
        unsafe { libc::sigaction(libc::SIGBUS, BEFORE.load(Ordering::Acquire), null_mut()) };
        if sent {
            // SAFETY: no memory involved; it arrives when this handler, which holds it back, returns.
            unsafe { libc::raise(libc::SIGBUS) };
        }
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

/// Puts zeroes in the place of the mapping. Whether the access may be tried again.
fn replace(place: &Place, (start, len): (usize, usize)) -> bool {
    if place.lost.swap(true, Ordering::AcqRel) {
        // Another thread is at it: ours faults again until it is done.
        return true;
    }
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the maker of the guard promised that this range is one mapping of bytes that may change at any time. It is
    // in use by the very access that failed, so it is not being unmapped.
    let made = unsafe { libc::mmap(without_provenance_mut(start), len, prot, flags, -1, 0) };
    LOST.fetch_add(1, Ordering::Release);
    made != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;
    use crate::mem::{GuestMap, Region, Sg};

    const SIZE: u64 = 1 << 20;

    fn region(file: &File) -> Region {
        file.set_len(SIZE).unwrap();
        Region::map(file, 0, 0, SIZE, 0).unwrap()
    }

    /// The byte at `at`, and whether the region is lost afterwards.
    fn byte(region: Region, at: u64) -> (u8, bool) {
        let map = GuestMap::new(vec![region.into()]).unwrap();
        let mut byte = [9];
        Sg::new(&[map.translate(at, 1).unwrap()]).copy_to(&mut byte);
        (byte[0], map.is_lost())
    }

    #[test]
    fn lost_memory_is_zeroes_and_told() {
        let (a, b) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let (lost, kept) = (region(&a), region(&b));
        std::os::unix::fs::FileExt::write_at(&b, &[7], 5000).unwrap();
        let before = count();
        a.set_len(4096).unwrap();
        assert!(!lost.is_lost());
        assert_eq!(byte(lost, 8192), (0, true));
        assert!(count() > before);
        assert_eq!(byte(kept, 5000), (7, false));
        // Who gets its place has lost nothing.
        let next = region(&a);
        assert!(!next.is_lost());
    }

    #[test]
    fn more_than_a_chunk() {
        let file = tempfile::tempfile().unwrap();
        let regions: Vec<Region> = (0..CHUNK + 10).map(|_| region(&file)).collect();
        file.set_len(0).unwrap();
        for region in regions {
            assert_eq!(byte(region, SIZE - 1), (0, true));
        }
    }

    /// In a process of its own, for it ends it.
    #[test]
    fn elsewhere_it_still_ends_the_process() {
        let alone = "VUB_TEST_ALONE";
        if std::env::var_os(alone).is_none() {
            let exe = std::env::current_exe().unwrap();
            let mut me = Command::new(exe);
            let me = me.args(["elsewhere_it_still", "--test-threads=1"]).env(alone, "1");
            let status = me.output().unwrap().status;
            return assert_eq!(status.signal(), Some(libc::SIGBUS), "{status:?}");
        }
        let file = tempfile::tempfile().unwrap();
        drop(region(&file));
        let stays = region(&file);
        let mut unguarded = region(&file);
        unguarded.unguard();
        file.set_len(0).unwrap();
        assert_eq!(byte(stays, 0), (0, true));
        byte(unguarded, 0);
    }
}
