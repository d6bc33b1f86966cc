//! A device of our own, in this process: for the ring driver's unit tests, and to show what the
//! load generator can drive when the back end costs next to nothing. It trusts its driver.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_blk as vb;

use crate::mem::{Buf, GuestMem};
use crate::ring::{
    DESC_LEN, Desc, F_INDIRECT, F_NEXT, F_WRITE, RingMem, Used, need_event, read_desc,
};

/// Longest chain the device follows.
const CHAIN_MAX: usize = 256;

/// The device side of one ring.
#[derive(Debug)]
pub struct FakeDevice {
    mem: Arc<GuestMem>,
    /// Views of the areas; the driver owns them.
    ring: RingMem,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// The disk, or nothing: then reads and writes move no data.
    disk: Option<Vec<u8>>,
    /// Last whole-memory view, so that translation is one comparison.
    window: Buf,
}

impl FakeDevice {
    /// A device over the driver's ring, continuing where its indices stand.
    ///
    /// # Panics
    /// When the ring is outside the memory.
    pub fn new(
        mem: &Arc<GuestMem>,
        ring: &RingMem,
        event_idx: bool,
        disk: Option<Vec<u8>>,
    ) -> Self {
        let view = |b: &Buf| mem.view(b.gpa(), b.len()).expect("the ring lies in its memory");
        let areas = RingMem::over(view(&ring.desc), view(&ring.avail), view(&ring.used));
        let first = mem.regions()[0].0.clone();
        let len = usize::try_from(first.len).expect("a mapping fits the address space");
        let window = mem.view(first.gpa, len).expect("a region views itself");
        let (next_avail, next_used) = (areas.used_idx(), areas.used_idx());
        Self { mem: Arc::clone(mem), ring: areas, event_idx, next_avail, next_used, disk, window }
    }

    /// Serves everything available; the number served, and whether the driver wants an interrupt.
    pub fn step(&mut self) -> (u16, bool) {
        let (avail, old) = (self.ring.avail_idx(), self.next_used);
        while self.next_avail != avail {
            let head = self.ring.avail_elem(self.next_avail);
            self.next_avail = self.next_avail.wrapping_add(1);
            let len = self.serve(head);
            self.ring.set_used_elem(self.next_used, Used { id: u32::from(head), len });
            self.next_used = self.next_used.wrapping_add(1);
        }
        if old == self.next_used {
            return (0, false);
        }
        self.ring.set_used_idx(self.next_used);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            need_event(self.ring.used_event(), self.next_used, old)
        } else {
            self.ring.avail_flags() == 0
        };
        (self.next_used.wrapping_sub(old), wanted)
    }

    /// Asks for a kick on the next chain (true: there is one already), or for none.
    pub fn arm(&mut self, on: bool) -> bool {
        if self.event_idx {
            let event = if on { self.next_avail } else { self.next_avail.wrapping_sub(1) };
            self.ring.set_avail_event(event);
        } else {
            self.ring.set_used_flags(u16::from(!on));
        }
        fence(Ordering::SeqCst);
        self.ring.avail_idx() != self.next_avail
    }

    fn view(&self, gpa: u64, len: usize) -> Buf {
        self.mem.view(gpa, len).expect("the fake device's driver gives good addresses")
    }

    /// Runs one chain; the bytes written.
    fn serve(&mut self, head: u16) -> u32 {
        let mut descs = [Desc::default(); CHAIN_MAX];
        let n = self.walk(head, &mut descs);
        let (first, last) = (descs[0], descs[n - 1]);
        if self.disk.is_none() {
            let at = usize::try_from(last.addr - self.window.gpa()).expect("in the first region");
            self.window.u8_at(at).store(vb::VIRTIO_BLK_S_OK as u8, Ordering::Relaxed);
            return 1;
        }
        let header = self.view(first.addr, 16);
        let kind = header.u32_at(0).load(Ordering::Relaxed);
        let sector = header.u64_at(8).load(Ordering::Relaxed);
        let (status, len) = self.transfer(kind, sector, &descs[1..n - 1]);
        self.view(last.addr, 1).u8_at(0).store(status as u8, Ordering::Relaxed);
        len + 1
    }

    fn walk(&self, head: u16, descs: &mut [Desc; CHAIN_MAX]) -> usize {
        let mut desc = self.ring.desc(head);
        if desc.flags & F_INDIRECT == 0 {
            return follow(desc, |next| self.ring.desc(next), descs);
        }
        let base = desc.addr;
        if let Some(at) = base.checked_sub(self.window.gpa()).and_then(|a| usize::try_from(a).ok())
        {
            let entry = |i: u16| read_desc_in(&self.window, at + usize::from(i) * DESC_LEN);
            return follow(entry(0), entry, descs);
        }
        let table = self.view(base, desc.len as usize);
        desc = read_desc(&table, 0);
        follow(desc, |next| read_desc(&table, next), descs)
    }

    fn transfer(&mut self, kind: u32, sector: u64, data: &[Desc]) -> (u32, u32) {
        let mut at = usize::try_from(sector).unwrap_or(usize::MAX / 512).saturating_mul(512);
        let bufs: Vec<Buf> = data.iter().map(|d| self.view(d.addr, d.len as usize)).collect();
        let Some(disk) = &mut self.disk else { return (vb::VIRTIO_BLK_S_OK, 0) };
        let mut written = 0;
        for (desc, buf) in data.iter().zip(&bufs) {
            match kind {
                vb::VIRTIO_BLK_T_IN if desc.flags & F_WRITE != 0 => {
                    let Some(bytes) = disk.get(at..at + buf.len()) else {
                        return (vb::VIRTIO_BLK_S_IOERR, 0);
                    };
                    buf.write(0, bytes);
                    written += desc.len;
                }
                vb::VIRTIO_BLK_T_OUT => {
                    let Some(bytes) = disk.get_mut(at..at + buf.len()) else {
                        return (vb::VIRTIO_BLK_S_IOERR, 0);
                    };
                    buf.read(0, bytes);
                }
                vb::VIRTIO_BLK_T_GET_ID => buf.write(0, b"fake"),
                _ => return (vb::VIRTIO_BLK_S_UNSUPP, 0),
            }
            at += buf.len();
        }
        let known = [vb::VIRTIO_BLK_T_IN, vb::VIRTIO_BLK_T_OUT, vb::VIRTIO_BLK_T_GET_ID];
        let ok = known.contains(&kind) || kind == vb::VIRTIO_BLK_T_FLUSH;
        (if ok { vb::VIRTIO_BLK_S_OK } else { vb::VIRTIO_BLK_S_UNSUPP }, written)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the word is taken apart")]
fn read_desc_in(buf: &Buf, at: usize) -> Desc {
    let rest = u64::from_le(buf.u64_at(at + 8).load(Ordering::Relaxed));
    Desc {
        addr: u64::from_le(buf.u64_at(at).load(Ordering::Relaxed)),
        len: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}

fn follow(first: Desc, get: impl Fn(u16) -> Desc, descs: &mut [Desc; CHAIN_MAX]) -> usize {
    let (mut desc, mut n) = (first, 0);
    loop {
        descs[n] = desc;
        n += 1;
        if desc.flags & F_NEXT == 0 || n == CHAIN_MAX {
            return n;
        }
        desc = get(desc.next);
    }
}
