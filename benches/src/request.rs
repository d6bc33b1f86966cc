//! What is done with a chain of descriptors before anybody thinks of a disk: addresses are translated, the header is read,
//! the request is checked.

use std::hint::black_box;
use std::sync::Arc;

use vhost_user_blk::export::request::{Action, Disk, Slot};
use vhost_user_blk::mem::{GuestMap, Region};
use vhost_user_blk::virtio::queue::Virtqueue;

use crate::Case;
use crate::guest::{Guest, Kind};

const BATCH: u16 = 32;

/// Chains that have been read become requests.
pub struct Requests {
    guest: Guest,
    ring: Virtqueue,
    slots: Vec<Slot>,
    transfers: usize,
}

impl Requests {
    pub fn new() -> Requests {
        let guest = Guest::new(Kind::Split, BATCH);
        let slots = (0..BATCH).map(|_| Slot::default()).collect();
        Requests { ring: guest.ring(), guest, slots, transfers: BATCH.into() }
    }
}

impl Case for Requests {
    fn ops(&self) -> u32 {
        BATCH.into()
    }

    fn prepare(&mut self) {
        assert_eq!(self.transfers, self.slots.len());
        self.transfers = 0;
        self.guest.offer();
        for slot in &mut self.slots {
            let head = self.ring.pop().expect("a chain").expect("an honest guest");
            self.ring.read_chain(head, &mut slot.chain).expect("an honest guest");
        }
    }

    fn run(&mut self) {
        let disk = Disk { capacity: 1 << 21, block: 512, read_only: false, serial: b"" };
        let disk = black_box(disk);
        for slot in &mut self.slots {
            let action = slot.parse(&disk).expect("a status byte");
            self.transfers += usize::from(matches!(action, Action::Transfer { write: false, .. }));
        }
    }
}

/// Guest addresses become ours, in a machine with memory below and above 4 GiB and a little for its firmware.
pub struct Addresses {
    map: GuestMap,
    addrs: Vec<u64>,
    found: usize,
}

impl Addresses {
    pub fn new() -> Addresses {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(1 << 30).expect("its length");
        let region = |guest, offset, len| {
            let user = (1 << 40) + offset;
            Arc::new(Region::map(&file, guest, user, len, offset).expect("a mapping"))
        };
        let regions = vec![
            region(0, 0, 0xa_0000),
            region(0xc_0000, 0xc_0000, (256 << 20) - 0xc_0000),
            region(4 << 30, 512 << 20, 512 << 20),
        ];
        let map = GuestMap::new(regions).expect("three regions");
        let page = |n: u64| if n.is_multiple_of(4) { 1 << 20 } else { 4 << 30 } + 4096 * (n * 7919 % 65_000);
        Addresses { map, addrs: (0..BATCH.into()).map(page).collect(), found: BATCH.into() }
    }
}

impl Case for Addresses {
    fn ops(&self) -> u32 {
        BATCH.into()
    }

    fn prepare(&mut self) {
        assert_eq!(self.found, self.addrs.len());
        self.found = 0;
    }

    fn run(&mut self) {
        for addr in &self.addrs {
            let at = black_box(&self.map).translate(*addr, 4096);
            self.found += usize::from(at.is_some_and(|v| v.len() == 4096));
        }
    }
}
