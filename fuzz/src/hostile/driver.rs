//! The guest's driver: offers requests, sound ones and others, and changes its memory at bad moments.
#![forbid(unsafe_code)]

use super::entropy::Entropy;
use super::memory::{EDGES, Memory};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Packed rings' flags.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Where the ring's parts lie, if nobody thinks better of it, in guest addresses (and from the first user address on).
pub const TABLE: u64 = 0;
/// The available ring, or the driver's events.
pub const AVAIL_RING: u64 = 0x1000;
/// The used ring, or the device's events.
pub const USED_RING: u64 = 0x1400;
/// Headers, 16 bytes each.
const HEADERS: u64 = 0x1e00;
/// Indirect tables.
const TABLES: u64 = 0x2000;
/// Data, up to the end of the second region.
const DATA: u64 = 0x4000;

/// Request types that mean something, and others.
const KINDS: [u32; 9] = [0, 1, 4, 8, 11, 13, 2, 0xffff_ffff, 1 << 31];
const LENGTHS: [u32; 14] =
    [0, 1, 15, 16, 17, 20, 511, 512, 513, 4096, 0x1_0000, 0x7fff_ffff, 0xffff_fff0, u32::MAX];

/// One descriptor, before its link.
#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
}

/// A driver of one ring of `size` entries.
pub struct Driver {
    pub size: u16,
    pub packed: bool,
    /// Of the available ring.
    pub idx: u16,
    /// The next entry to use; of a packed ring its position.
    pub at: u16,
    pub wrap: bool,
    id: u16,
}

impl Driver {
    /// One that has offered nothing.
    pub fn new(size: u16, packed: bool) -> Driver {
        Driver { size, packed, idx: 0, at: 0, wrap: true, id: 0 }
    }

    /// Offers a request; one in four is a lie.
    pub fn offer(&mut self, e: &mut Entropy<'_>, memory: &mut Memory) {
        let mut chain = request(e, memory);
        if e.one_in(4) {
            spoil(e, &mut chain);
        }
        if e.one_in(3) {
            chain = vec![self.indirect(e, memory, &chain)];
            if e.one_in(8) {
                let other = chain[0];
                chain.push(other);
            }
        }
        chain.truncate(self.size.into());
        if self.packed {
            self.offer_packed(e, memory, &chain);
        } else {
            self.offer_split(e, memory, &chain);
        }
    }

    fn indirect(&self, e: &mut Entropy<'_>, memory: &mut Memory, chain: &[Desc]) -> Desc {
        let table = TABLES + e.below(0x100);
        for (i, d) in (0u16..).zip(chain) {
            let last = usize::from(i) + 1 == chain.len();
            let next = if last { 0 } else { i + 1 };
            let flags = d.flags | if last || self.packed { 0 } else { NEXT };
            let halves = if self.packed { [0, flags] } else { [flags, next] };
            memory.put(table + 16 * u64::from(i), &bytes(d, halves));
        }
        let len = 16 * u32::try_from(chain.len()).unwrap();
        let len = if e.one_in(8) { e.pick(&LENGTHS) } else { len };
        Desc { addr: if e.one_in(16) { place(e) } else { table }, len, flags: INDIRECT }
    }

    fn offer_split(&mut self, e: &mut Entropy<'_>, memory: &mut Memory, chain: &[Desc]) {
        let (head, size) = (self.at % self.size, self.size);
        for (i, d) in chain.iter().enumerate() {
            let (here, next) = (self.at % size, (self.at + 1) % size);
            self.at = next;
            let last = i + 1 == chain.len();
            let flags = d.flags | if last { 0 } else { NEXT };
            let link = if last { 0 } else { next };
            memory.put(TABLE + 16 * u64::from(here), &bytes(d, [flags, link]));
        }
        let slot = u64::from(self.idx % size);
        let head = if e.one_in(32) { e.word() as u16 } else { head };
        memory.put(AVAIL_RING + 4 + 2 * slot, &head.to_le_bytes());
        self.idx = self.idx.wrapping_add(1);
        memory.put(AVAIL_RING + 2, &self.idx.to_le_bytes());
    }

    fn offer_packed(&mut self, e: &mut Entropy<'_>, memory: &mut Memory, chain: &[Desc]) {
        let id = if e.one_in(32) { e.word() as u16 } else { self.id };
        self.id = (self.id + 1) % self.size;
        for (i, d) in chain.iter().enumerate() {
            let last = i + 1 == chain.len();
            let wrap = if self.wrap { AVAIL } else { USED };
            let flags = d.flags | wrap | if last { 0 } else { NEXT };
            memory.put(TABLE + 16 * u64::from(self.at), &bytes(d, [id, flags]));
            self.at += 1;
            if self.at == self.size {
                (self.at, self.wrap) = (0, !self.wrap);
            }
        }
    }
}

/// Some bytes of the guest's memory become others: preferably those that matter.
pub fn poke(e: &mut Entropy<'_>, memory: &mut Memory) {
    let at = match e.below(8) {
        0 | 1 => TABLE + e.below(0x200),
        2 => AVAIL_RING + e.below(0x20),
        3 => USED_RING + e.below(0x20),
        4 => HEADERS + e.below(0x100),
        5 => TABLES + e.below(0x200),
        6 => return area(e, memory),
        _ => place(e),
    };
    let value = e.word();
    match e.below(4) {
        0 => memory.put(at, &[value as u8]),
        1 => memory.put(at & !1, &(value as u16).to_le_bytes()),
        2 => memory.put(at & !3, &e.pick(&LENGTHS).to_le_bytes()),
        _ => memory.put(at & !7, &e.pick(&EDGES).wrapping_add(value & 15).to_le_bytes()),
    }
}

fn area(e: &mut Entropy<'_>, memory: &mut Memory) {
    // The header and the first elements, mostly.
    let at = if e.one_in(8) { e.word() & 0xffff } else { e.below(0x60) };
    let value = e.below(20) as u16;
    memory.put_area(at & !1, &value.to_le_bytes());
}

/// A sound request, its header written.
fn request(e: &mut Entropy<'_>, memory: &mut Memory) -> Vec<Desc> {
    let kind = e.pick(&KINDS);
    let header = HEADERS + 16 * e.below(16);
    let sector = match e.below(4) {
        0 | 1 => e.below(64),
        2 => e.pick(&EDGES),
        _ => u64::MAX / 512 - e.below(4),
    };
    memory.put(header, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    let mut chain = Vec::new();
    // The header in up to three pieces.
    let (mut at, mut left) = (header, 16);
    for _ in 0..e.below(3) {
        let len = e.below(u64::from(left) + 1) as u32;
        chain.push(Desc { addr: at, len, flags: 0 });
        (at, left) = (at + u64::from(len), left - len);
    }
    chain.push(Desc { addr: at, len: left, flags: 0 });
    let ranges = kind == 11 || kind == 13;
    let flags = if kind == 1 || ranges { 0 } else { WRITE };
    for _ in 0..e.below(6) {
        let addr = DATA + e.below(0x3000);
        let len = if ranges { 16 } else { 512 * (1 + e.below(8) as u32) };
        if ranges {
            let (sector, sectors) = (e.below(300), e.below(64) as u32);
            let sectors = if e.one_in(8) { e.pick(&LENGTHS) } else { sectors };
            let unmap = e.below(3) as u32;
            let segment = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &unmap.to_le_bytes()];
            memory.put(addr, &segment.concat());
        }
        chain.push(Desc { addr, len, flags });
    }
    chain.push(Desc { addr: DATA + 0x3100 + e.below(0x200), len: 1, flags: WRITE });
    chain
}

fn spoil(e: &mut Entropy<'_>, chain: &mut Vec<Desc>) {
    for _ in 0..=e.below(3) {
        let at = e.below(chain.len() as u64) as usize;
        match e.below(6) {
            0 => chain[at].addr = place(e),
            1 => chain[at].len = e.pick(&LENGTHS),
            2 => chain[at].flags ^= e.pick(&[WRITE, NEXT, INDIRECT, WRITE | INDIRECT, 8, AVAIL]),
            3 if chain.len() > 1 => drop(chain.remove(at)),
            4 => chain.insert(at, chain[at]),
            // Within the last byte of an edge.
            _ => {
                chain[at].addr = place(e);
                chain[at].len = e.pick(&LENGTHS[..6]);
            }
        }
    }
}

/// An address that may hurt.
fn place(e: &mut Entropy<'_>) -> u64 {
    match e.below(4) {
        0 => e.word(),
        1 => e.below(0x7a00),
        _ => e.pick(&EDGES).wrapping_sub(e.below(32)),
    }
}

fn bytes(d: &Desc, halves: [u16; 2]) -> Vec<u8> {
    let [a, b] = halves.map(u16::to_le_bytes);
    [&d.addr.to_le_bytes()[..], &d.len.to_le_bytes(), &a, &b].concat()
}
