//! A guest's side of a queue: memory, a split ring in it, and requests of one data descriptor.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vhost_user_blk::mem::{GuestMap, Region};
use vhost_user_blk::vhost_user::QueueSetup;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// VERSION_1, EVENT_IDX, INDIRECT_DESC, FLUSH.
pub const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 9;
/// Requests at once.
pub const SLOTS: u16 = 64;
/// Bytes of data in a request.
pub const DATA: u32 = 4096;

const SIZE: u16 = 256;
const USER: u64 = 0x7000_0000_0000;
const MEMORY: u64 = 4 << 20;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x4000;
const BUFFERS: u64 = 0x10_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Longer than any request takes; a notification that got lost ends the test.
const PATIENCE_MS: i32 = 20_000;

/// One queue, as the guest has it.
pub struct Guest {
    mem: GuestMemoryMmap,
    map: Arc<GuestMap>,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    avail: u16,
    kicked: u16,
    used: u16,
    base: u16,
}

fn owned(event: &EventFd) -> Option<OwnedFd> {
    let copy = event.try_clone().unwrap();
    // SAFETY: the descriptor is the copy's, which gives it up.
    Some(unsafe { OwnedFd::from_raw_fd(copy.into_raw_fd()) })
}

impl Guest {
    /// A ring whose next available index is `base`.
    pub fn new(base: u16) -> Guest {
        // SAFETY: the name is a C string; a returned descriptor is ours.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), 0)) };
        let file = std::fs::File::from(fd);
        file.set_len(MEMORY).unwrap();
        let region = Region::map(&file, 0, USER, MEMORY, 0).unwrap();
        let map = Arc::new(GuestMap::new(vec![Arc::new(region)]).unwrap());
        let place =
            (GuestAddress(0), usize::try_from(MEMORY).unwrap(), Some(FileOffset::new(file, 0)));
        let mem = GuestMemoryMmap::from_ranges_with_files([place]).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap();
        let (kick, call, err) = (event(), event(), event());
        let guest = Guest { mem, map, kick, call, err, avail: base, kicked: base, used: 0, base };
        guest.mem.store(base, GuestAddress(AVAIL + 2), Ordering::Release).unwrap();
        guest
    }

    /// What the front end would say of the ring.
    pub fn setup(&self) -> QueueSetup {
        QueueSetup {
            map: Arc::clone(&self.map),
            size: SIZE,
            desc: USER,
            avail: USER + AVAIL,
            used: USER + USED,
            base: self.base.into(),
            inflight: None,
            log: None,
            features: FEATURES,
            kick: owned(&self.kick),
            call: owned(&self.call),
            err: owned(&self.err),
        }
    }

    /// The next available index.
    pub fn avail(&self) -> u16 {
        self.avail
    }

    fn load(&self, at: u64) -> u16 {
        self.mem.load(GuestAddress(at), Ordering::Acquire).unwrap()
    }

    fn store(&self, at: u64, value: u16) {
        self.mem.store(value, GuestAddress(at), Ordering::Release).unwrap();
    }

    /// The memory of slot `slot`'s data.
    pub fn data(slot: u16) -> u64 {
        BUFFERS + 2 * u64::from(DATA) * u64::from(slot)
    }

    /// The first eight bytes of a slot's data.
    pub fn tag(&self, slot: u16) -> u64 {
        self.mem.read_obj(GuestAddress(Guest::data(slot))).unwrap()
    }

    /// Changes them.
    pub fn set_tag(&self, slot: u16, tag: u64) {
        self.mem.write_obj(tag, GuestAddress(Guest::data(slot))).unwrap();
    }

    /// Makes a read or write at `sector` available, in slot `slot`; the device need not see it before [`Guest::flush`].
    pub fn offer(&mut self, slot: u16, write: bool, sector: u64) {
        let (head, header) = (3 * slot, HEADERS + 64 * u64::from(slot));
        let mut bytes = [0; 33];
        bytes[0] = u8::from(write);
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        bytes[32] = 0xff;
        self.mem.write_slice(&bytes, GuestAddress(header)).unwrap();
        let data = if write { NEXT } else { NEXT | WRITE };
        for (i, d) in [
            (header, 16, NEXT, head + 1),
            (Guest::data(slot), DATA, data, head + 2),
            (header + 32, 1, WRITE, 0),
        ]
        .into_iter()
        .enumerate()
        {
            let raw = RawDescriptor::from(Descriptor::new(d.0, d.1, d.2, d.3));
            let at = 16 * (u64::from(head) + i as u64);
            self.mem.write_obj(raw, GuestAddress(at)).unwrap();
        }
        self.store(AVAIL + 4 + 2 * u64::from(self.avail % SIZE), head);
        self.avail = self.avail.wrapping_add(1);
    }

    /// Shows the device what is available; kicks it if it wants that.
    pub fn flush(&mut self) {
        self.store(AVAIL + 2, self.avail);
        fence(Ordering::SeqCst);
        let event = self.load(USED + 4 + 8 * u64::from(SIZE));
        let new = self.avail.wrapping_sub(self.kicked);
        if self.avail.wrapping_sub(event).wrapping_sub(1) < new {
            self.kick.write(1).unwrap();
        }
        self.kicked = self.avail;
    }

    /// Waits until the device has answered something, then takes the answers: slot, status, length.
    pub fn answers(&mut self, mut take: impl FnMut(&Guest, u16, u8, u32)) {
        let mut used = self.load(USED + 2);
        while used == self.used {
            // "Tell me of the next one"; then a last look.
            self.store(AVAIL + 4 + 2 * u64::from(SIZE), self.used);
            fence(Ordering::SeqCst);
            used = self.load(USED + 2);
            if used == self.used {
                wait(&self.call);
                used = self.load(USED + 2);
            }
        }
        while self.used != used {
            let at = USED + 4 + 8 * u64::from(self.used % SIZE);
            let [head, len]: [u32; 2] = self.mem.read_obj(GuestAddress(at)).unwrap();
            let slot = u16::try_from(head / 3).unwrap();
            let status = HEADERS + 64 * u64::from(slot) + 32;
            let status = self.mem.read_obj(GuestAddress(status)).unwrap();
            self.used = self.used.wrapping_add(1);
            take(self, slot, status, len);
        }
    }

    /// Claims more than a ring holds.
    pub fn lie(&mut self) {
        self.store(AVAIL + 2, self.avail.wrapping_add(SIZE + 1));
        self.kick.write(1).unwrap();
    }

    /// Waits until the device has called the ring broken.
    pub fn found_out(&self) {
        wait(&self.err);
    }
}

fn wait(event: &EventFd) {
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, ours.
    let n = unsafe { libc::poll(&raw mut poll, 1, PATIENCE_MS) };
    assert_eq!(n, 1, "no notification came");
    event.read().unwrap();
}
