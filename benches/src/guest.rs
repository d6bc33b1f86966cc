//! A guest's side of a queue: shared memory that it writes through the file, a ring of either kind in it, and the same 64
//! requests again and again: reads of 4 KiB, of three descriptors each.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vhost_user_blk::mem::{GuestMap, Region};
use vhost_user_blk::virtio::queue::{RingAddrs, Virtqueue, first_base};

/// What the driver accepted: VERSION_1, EVENT_IDX, INDIRECT_DESC, FLUSH.
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 9;
/// RING_PACKED.
const PACKED: u64 = 1 << 34;
/// Different requests.
const REQUESTS: u16 = 64;
/// Bytes of data in a request.
const DATA: u32 = 4096;

/// The front end's addresses differ from the guest's.
const USER: u64 = 0x7000_0000_0000;
const MEMORY: u64 = 1 << 20;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x4000;
const STATUS: u64 = 0x5000;
const TABLES: u64 = 0x6000;
const BUFFERS: u64 = 0x1_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A packed ring's two flags; as the driver writes them, they differ.
const AVAIL_FLAG: u16 = 1 << 7;
const USED_FLAG: u16 = 1 << 15;

/// The request that comes when `offered` have been offered, and the wrap counter of its round through a packed ring.
fn place(offered: u64) -> (u16, bool) {
    let (round, n) = (offered / u64::from(REQUESTS), offered % u64::from(REQUESTS));
    (u16::try_from(n).expect("below 64"), round.is_multiple_of(2))
}

/// How requests are told.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Chains in a split ring.
    Split,
    /// Indirect tables in a split ring, as Linux has it.
    Indirect,
    /// Chains in a packed ring.
    Packed,
}

/// A queue, as the guest has it.
pub struct Guest {
    file: File,
    map: Arc<GuestMap>,
    kind: Kind,
    /// Requests offered at once; divides [`REQUESTS`].
    batch: u16,
    /// Requests offered so far.
    offered: u64,
}

impl Guest {
    /// An empty ring.
    pub fn new(kind: Kind, batch: u16) -> Guest {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(MEMORY).expect("its length");
        let region = Region::map(&file, 0, USER, MEMORY, 0).expect("a mapping");
        let map = Arc::new(GuestMap::new(vec![Arc::new(region)]).expect("one region"));
        let guest = Guest { file, map, kind, batch, offered: 0 };
        for n in 0..REQUESTS {
            let at = u64::from(n);
            // A read (0) of sector 8 * n.
            guest.write(HEADERS + 16 * at, [0, 8 * at].map(u64::to_le_bytes).as_flattened());
            match kind {
                Kind::Split => guest.write(48 * at, &guest.chain(n, 0)),
                Kind::Indirect => {
                    guest.write(TABLES + 48 * at, &guest.chain(n, 0));
                    let table = [TABLES + 48 * at, 48 | u64::from(INDIRECT) << 32];
                    guest.write(48 * at, table.map(u64::to_le_bytes).as_flattened());
                }
                Kind::Packed => {}
            }
        }
        // The available ring's entries stay as they are: 64 heads, four times.
        let heads = (0..guest.size()).flat_map(|at| (3 * (at % REQUESTS)).to_le_bytes());
        if !guest.is_packed() {
            guest.write(AVAIL + 4, &heads.collect::<Vec<u8>>());
        }
        guest
    }

    fn is_packed(&self) -> bool {
        self.kind == Kind::Packed
    }

    /// Where a fresh ring begins.
    pub fn base(&self) -> u32 {
        first_base(self.is_packed())
    }

    /// Its entries.
    pub fn size(&self) -> u16 {
        if self.is_packed() { 3 * REQUESTS } else { 4 * REQUESTS }
    }

    /// The features that the driver accepted.
    pub fn features(&self) -> u64 {
        if self.is_packed() { FEATURES | PACKED } else { FEATURES }
    }

    /// The guest's memory.
    pub fn map(&self) -> Arc<GuestMap> {
        Arc::clone(&self.map)
    }

    /// Where the ring is.
    pub fn addrs(&self) -> RingAddrs {
        RingAddrs { desc: USER, avail: USER + AVAIL, used: USER + USED }
    }

    /// The device's side of it.
    pub fn ring(&self) -> Virtqueue {
        let (size, base) = (self.size(), self.base());
        Virtqueue::new(self.map(), self.addrs(), size, base, self.features()).expect("a ring")
    }

    /// Makes another batch available, and wants to be notified of its first request.
    pub fn offer(&mut self) {
        if self.is_packed() {
            let (first, wrap) = place(self.offered);
            let flags = if wrap { AVAIL_FLAG } else { USED_FLAG };
            let chains = (first..first + self.batch).flat_map(|n| self.chain(n, flags));
            self.write(48 * u64::from(first), &chains.collect::<Vec<u8>>());
        } else {
            let (old, new) = (self.offered, self.offered + u64::from(self.batch));
            self.write(AVAIL + 4 + 2 * u64::from(self.size()), &old.to_le_bytes()[..2]);
            self.write(AVAIL + 2, &new.to_le_bytes()[..2]);
        }
        self.offered += u64::from(self.batch);
    }

    /// Whether nothing was offered yet.
    pub fn is_fresh(&self) -> bool {
        self.offered == 0
    }

    /// Whether all that was offered has been answered.
    pub fn is_answered(&self) -> bool {
        if !self.is_packed() {
            return self.read(USED + 2) == self.offered.to_le_bytes()[..2];
        }
        let Some(before) = self.offered.checked_sub(self.batch.into()) else { return true };
        // The flags of the last batch's first descriptor are written last.
        let (first, wrap) = place(before);
        let flags = u16::from_le_bytes(self.read(48 * u64::from(first) + 14));
        flags & (AVAIL_FLAG | USED_FLAG) == if wrap { AVAIL_FLAG | USED_FLAG } else { 0 }
    }

    /// The three descriptors of request `n`, as its kind of ring has them; `flags` are a packed one's.
    fn chain(&self, n: u16, flags: u16) -> Vec<u8> {
        let at = u64::from(n);
        let parts = [
            (HEADERS + 16 * at, 16, NEXT),
            (BUFFERS + u64::from(DATA) * at, DATA, NEXT | WRITE),
            (STATUS + at, 1, WRITE),
        ];
        let mut bytes = Vec::with_capacity(48);
        // A table's entries are numbered by themselves.
        let first = if self.kind == Kind::Indirect { 0 } else { 3 * n };
        for ((addr, len, kind), next) in parts.into_iter().zip(first + 1..) {
            bytes.extend(addr.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            let last = if self.is_packed() { [n, flags | kind] } else { [kind, next] };
            bytes.extend(last.map(u16::to_le_bytes).as_flattened());
        }
        bytes
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).expect("guest memory");
    }

    fn read(&self, at: u64) -> [u8; 2] {
        let mut bytes = [0; 2];
        self.file.read_exact_at(&mut bytes, at).expect("guest memory");
        bytes
    }
}
