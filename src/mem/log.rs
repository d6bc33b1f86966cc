//! The dirty log: which pages of the guest's memory we have written while it migrates ("Vhost-user Protocol: Migration").

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::{GuestMap, IoVec, Region};

/// Bytes that one bit stands for, whatever the host's pages are (VHOST_LOG_PAGE).
pub const LOG_PAGE: u64 = 4096;

/// A bitmap shared with the front end: page `n` is bit `n % 8` of byte `n / 8`. The front end takes bits away at any time.
#[derive(Debug)]
pub struct DirtyLog {
    region: Arc<Region>,
    warned: AtomicBool,
}

impl DirtyLog {
    /// A log in `region`, whose addresses mean nothing.
    pub fn new(region: Arc<Region>) -> DirtyLog {
        DirtyLog { region, warned: AtomicBool::new(false) }
    }

    /// Marks the pages of `len` bytes at `guest_addr`. To be called after the bytes were written: the front end takes the bit
    /// first and then copies the page. What lies behind the log's end cannot be marked; the first time, that is logged.
    pub fn mark(&self, guest_addr: u64, len: u64) {
        let Some(beyond) = len.checked_sub(1) else { return };
        let mut page = guest_addr / LOG_PAGE;
        let mut last = guest_addr.saturating_add(beyond) / LOG_PAGE;
        let end = self.region.size.saturating_mul(8);
        if last >= end {
            if !self.warned.swap(true, Ordering::Relaxed) {
                let size = self.region.size;
                log::warn!("dirty log of {size} bytes: guest address {guest_addr:#x} is beyond it");
            }
            last = end - 1;
        }
        while page <= last {
            let upto = (page | 7).min(last);
            let mask = (0xff << (page % 8)) & (0xff >> (7 - upto % 8));
            self.byte(page / 8).fetch_or(mask, Ordering::Release);
            page = upto + 1;
        }
    }

    /// Marks what `iov`, ranges of `map`'s memory, covers.
    pub fn mark_host(&self, map: &GuestMap, iov: &[IoVec]) {
        for v in iov {
            map.guest_ranges(v, |guest_addr, len| self.mark(guest_addr, len));
        }
    }

    fn byte(&self, index: u64) -> &AtomicU8 {
        let at = usize::try_from(index).expect("64-bit hosts only");
        // SAFETY: `mark` passes indexes below the region's size; the mapping lives as long as `self`, and the front end's own
        // accesses are those of another CPU.
        unsafe { AtomicU8::from_ptr(self.region.host().add(at)) }
    }
}

/// What one ring logs.
#[derive(Clone, Debug)]
pub struct RingLog {
    /// Where.
    pub log: Arc<DirtyLog>,
    /// Writes to the requests' memory (VHOST_F_LOG_ALL).
    pub data: bool,
    /// Writes to the used ring, as if it were at this guest address (VHOST_VRING_F_LOG).
    pub used: Option<u64>,
}

impl RingLog {
    /// `len` bytes, `offset` bytes into the used ring, were written.
    pub fn mark_used(&self, offset: u64, len: u64) {
        if let Some(used) = self.used {
            self.log.mark(used.saturating_add(offset), len);
        }
    }

    /// `iov`, a request's memory, was written.
    pub fn mark_data(&self, map: &GuestMap, iov: &[IoVec]) {
        if self.data {
            self.log.mark_host(map, iov);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;

    /// A log of `size` bytes, `offset` bytes into its file.
    fn log(size: u64, offset: u64) -> (DirtyLog, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(offset + size).unwrap();
        let region = Region::map(&file, 0, 0, size, offset).unwrap();
        (DirtyLog::new(Arc::new(region)), file)
    }

    fn bits(file: &File) -> Vec<u64> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let set = |(i, b): (usize, &u8)| {
            let b = *b;
            (0..8).filter(move |k| b & 1 << k != 0).map(move |k| i as u64 * 8 + k)
        };
        bytes.iter().enumerate().flat_map(set).collect()
    }

    proptest! {
        #[test]
        fn exactly_the_pages_touched_are_marked(
            addr in 0..300 * LOG_PAGE, len in 0..80 * LOG_PAGE, size in 1..40u64, offset in 0..5000u64
        ) {
            let (log, file) = log(size, offset);
            log.mark(addr, len);
            let touched = (0..size * 8)
                .filter(|p| p * LOG_PAGE < addr + len && addr < (p + 1) * LOG_PAGE && len > 0)
                .map(|p| p + offset * 8);
            prop_assert_eq!(bits(&file), touched.collect::<Vec<_>>());
        }
    }

    #[test]
    fn no_address_leads_out_of_the_log() {
        let (log, file) = log(1, 4096);
        for (addr, len) in [(u64::MAX, u64::MAX), (u64::MAX, 1), (8 * LOG_PAGE, 1), (0, 0)] {
            log.mark(addr, len);
        }
        assert!(bits(&file).is_empty());
        log.mark(7 * LOG_PAGE, u64::MAX);
        assert_eq!(bits(&file), [4096 * 8 + 7]);
    }

    #[test]
    fn marks_add_up_from_many_threads() {
        let (log, file) = log(64, 0);
        std::thread::scope(|s| {
            for t in 0..4u64 {
                let log = &log;
                s.spawn(move || (0..128).for_each(|i| log.mark((i * 4 + t) * LOG_PAGE, 1)));
            }
        });
        assert_eq!(bits(&file), (0..512).collect::<Vec<_>>());
    }

    #[test]
    fn a_ring_logs_what_it_was_told_to() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * LOG_PAGE).unwrap();
        let region = Region::map(&file, 0, 0, 8 * LOG_PAGE, 0).unwrap();
        let map = GuestMap::new(vec![Arc::new(region)]).unwrap();
        let iov = [map.translate(2 * LOG_PAGE, 1).unwrap()];
        for (data, used, want) in [
            (false, None, vec![]),
            (true, None, vec![2]),
            (false, Some(5 * LOG_PAGE), vec![6]),
            (true, Some(u64::MAX), vec![2]),
        ] {
            let (log, bitmap) = log(1, 0);
            let ring = RingLog { log: Arc::new(log), data, used };
            ring.mark_data(&map, &iov);
            ring.mark_used(LOG_PAGE, 8);
            assert_eq!(bits(&bitmap), want, "{data} {used:?}");
        }
    }

    #[test]
    fn host_ranges_are_found_in_their_regions() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let region = |guest, offset| {
            Arc::new(Region::map(&file, guest, guest, 8 * LOG_PAGE, offset).unwrap())
        };
        let far = region(100 * LOG_PAGE, 0);
        let map = GuestMap::new(vec![region(0, 0x1_0000), Arc::clone(&far)]).unwrap();
        let (log, bitmap) = log(32, 0);
        let one = map.translate(103 * LOG_PAGE + 5, 2 * LOG_PAGE).unwrap();
        let two = map.translate(2 * LOG_PAGE - 1, 1).unwrap();
        log.mark_host(&map, &[one, two, IoVec::EMPTY]);
        assert_eq!(bits(&bitmap), [1, 103, 104, 105]);
        // Memory that is in no region of the map is not the guest's.
        let empty = GuestMap::default();
        log.mark_host(&empty, &[map.translate(0, 1).unwrap()]);
        assert_eq!(bits(&bitmap), [1, 103, 104, 105]);
    }
}
