//! A guest's memory with canaries around its regions, and a copy of it that tells what was written.
#![forbid(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vhost_user_blk::mem::{GuestMap, IoVec, Region};
use vhost_user_blk::vhost_user::message::MemRegion;

/// Bytes of the file that all regions lie in.
const FILE: usize = 0xd000;
/// What is written everywhere that no region is.
const CANARY: u8 = 0xa5;

/// Where a region lies for guest and front end, its length, and where in the file: neither begins nor ends with a page,
/// so that its neighbours are mapped with it.
struct Place {
    guest: u64,
    user: u64,
    len: u64,
    at: u64,
}

/// Two that touch each other for the guest, but not in the file, and one that ends where addresses do.
const PLACES: [Place; 3] = [
    Place { guest: 0, user: 0x7f00_0000_0000, len: 0x6200, at: 0x200 },
    Place { guest: 0x6200, user: 0xffff_ffff_ffff_e000, len: 0x1800, at: 0x7400 },
    Place { guest: 0xffff_ffff_ffff_f000, user: 0x1000, len: 0xfff, at: 0x9010 },
];
/// Where requests in flight are kept: no guest memory.
const AREA: Range<u64> = 0xb040..0xcf00;

/// The user address of the first region's byte `at`.
pub fn user(at: u64) -> u64 {
    PLACES[0].user + at
}

/// Addresses where something begins or ends.
pub const EDGES: [u64; 10] = [
    0,
    0x6200,
    0x7a00,
    0x61ff,
    0x79ff,
    0xffff_ffff_ffff_f000,
    0xffff_ffff_ffff_fffe,
    u64::MAX,
    1 << 63,
    0x7f00_0000_0000,
];

/// The memory.
pub struct Memory {
    file: File,
    /// As long, of no interest.
    spare: File,
    garbled: bool,
    map: Arc<GuestMap>,
    area: Arc<Region>,
    /// What the file must hold.
    shadow: Vec<u8>,
    found: Vec<u8>,
}

impl Memory {
    /// All zeroes. `name`: the file's, as /proc tells it.
    pub fn new(name: &CStr) -> Memory {
        let file = vhost_user_blk::sys::memfd(name, FILE as u64).unwrap();
        let spare = vhost_user_blk::sys::memfd(name, FILE as u64).unwrap();
        let map = Arc::new(GuestMap::new(regions(&file, PLACES.len())).unwrap());
        let len = AREA.end - AREA.start;
        let area = Arc::new(Region::map(&file, 0, 0, len, AREA.start).unwrap());
        let mut memory = Memory {
            file,
            spare,
            garbled: false,
            map,
            area,
            shadow: vec![0; FILE],
            found: vec![0; FILE],
        };
        memory.reset();
        memory
    }

    /// All zeroes again, the canaries alive.
    pub fn reset(&mut self) {
        self.garbled = false;
        self.shadow.fill(CANARY);
        let places = PLACES.iter().map(|p| p.at..p.at + p.len);
        for range in places.chain([AREA]) {
            self.shadow[index(range)].fill(0);
        }
        self.file.write_all_at(&self.shadow, 0).unwrap();
    }

    /// The file, for a front end to give away, as long as what it says of it is known.
    pub fn file(&self) -> &File {
        if self.garbled { &self.spare } else { &self.file }
    }

    /// From now on nobody knows where messages begin and end.
    pub fn garble(&mut self) {
        self.garbled = true;
    }

    /// Another file, for whatever would be written beside the regions.
    pub fn spare(&self) -> &File {
        &self.spare
    }

    /// The regions, as SET_MEM_TABLE describes them.
    pub fn table(&self) -> [MemRegion; 3] {
        PLACES.each_ref().map(|p| MemRegion {
            guest_addr: p.guest,
            size: p.len,
            user_addr: p.user,
            mmap_offset: p.at,
        })
    }

    /// Where requests in flight are kept: offset and length.
    pub fn area_place(&self) -> (u64, u64) {
        (AREA.start, AREA.end - AREA.start)
    }

    /// A device has had all of the guest's memory and the area.
    ///
    /// # Panics
    /// If it has written beside them.
    pub fn expect_canaries(&mut self) {
        let places = PLACES.iter().map(|p| p.at..p.at + p.len);
        self.expect_written(&places.chain([AREA]).collect::<Vec<_>>(), "a session");
    }

    /// The guest's memory.
    pub fn map(&self) -> Arc<GuestMap> {
        Arc::clone(&self.map)
    }

    /// Another map of the same memory, of which only the first `count` regions are left.
    pub fn smaller_map(&self, count: usize) -> Arc<GuestMap> {
        Arc::new(GuestMap::new(regions(&self.file, count)).unwrap())
    }

    /// Where requests in flight are kept.
    pub fn area(&self) -> Arc<Region> {
        Arc::clone(&self.area)
    }

    /// The guest writes; what is outside of its memory gets lost.
    pub fn put(&mut self, guest: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let addr = guest.wrapping_add(done as u64);
            let within = |p: &Place| addr.checked_sub(p.guest).filter(|at| *at < p.len);
            let place = PLACES.iter().find_map(|p| within(p).map(|at| (p, at)));
            let Some((place, at)) = place else {
                done += 1;
                continue;
            };
            let len = (bytes.len() - done).min(index(at..place.len).len());
            self.put_file(place.at + at, &bytes[done..done + len]);
            done += len;
        }
    }

    /// The front end, or our predecessor, writes into the area.
    pub fn put_area(&mut self, at: u64, bytes: &[u8]) {
        let room = AREA.end - AREA.start - bytes.len() as u64;
        self.put_file(AREA.start + at % (room + 1), bytes);
    }

    fn put_file(&mut self, at: u64, bytes: &[u8]) {
        self.shadow[index(at..at + bytes.len() as u64)].copy_from_slice(bytes);
        self.file.write_all_at(bytes, at).unwrap();
    }

    /// What lies at a place of the file.
    pub fn get(&self, range: Range<u64>) -> &[u8] {
        &self.shadow[index(range)]
    }

    /// The place in the file of `len` bytes at a user address, if it is in one region.
    pub fn file_of_user(&self, user: u64, len: u64) -> Option<Range<u64>> {
        PLACES.iter().find_map(|p| {
            let at = user.checked_sub(p.user)?;
            let fits = at.checked_add(len).is_some_and(|end| end <= p.len);
            fits.then(|| p.at + at..p.at + at + len)
        })
    }

    /// The place in the file of what the device wants to touch through `map`.
    ///
    /// # Panics
    /// If it is not within one region of the guest.
    pub fn file_of(&self, map: &GuestMap, v: &IoVec) -> Range<u64> {
        let from = v.base().addr();
        for p in &PLACES {
            let Some(first) = map.translate(p.guest, 1) else { continue };
            let host = first.base().addr();
            let end = from.checked_add(v.len()).expect("a range that wraps");
            if host <= from && end <= host + index(0..p.len).len() {
                let at = p.at + (from - host) as u64;
                return at..at + v.len() as u64;
            }
        }
        panic!("{} bytes at {from:#x} are not the guest's", v.len());
    }

    /// The place in the file of the area's first `len` bytes.
    pub fn file_of_area(&self, len: u64) -> Range<u64> {
        AREA.start..AREA.start + len
    }

    /// What was written since the last call is what the device may write.
    ///
    /// # Panics
    /// If it has written anything else.
    pub fn expect_written(&mut self, allowed: &[Range<u64>], what: &str) {
        self.file.read_exact_at(&mut self.found, 0).unwrap();
        if self.found == self.shadow {
            return;
        }
        for range in allowed.iter().cloned().map(index) {
            self.shadow[range.clone()].copy_from_slice(&self.found[range]);
        }
        if self.found != self.shadow {
            let at = (0..FILE).find(|at| self.found[*at] != self.shadow[*at]);
            panic!("{what}: byte {at:#x?} of the file was written");
        }
    }
}

fn regions(file: &File, count: usize) -> Vec<Arc<Region>> {
    let map = |p: &Place| Region::map(file, p.guest, p.user, p.len, p.at).map(Arc::new).unwrap();
    PLACES[..count].iter().map(map).collect()
}

fn index(range: Range<u64>) -> Range<usize> {
    let at = |n| usize::try_from(n).unwrap();
    at(range.start)..at(range.end)
}
