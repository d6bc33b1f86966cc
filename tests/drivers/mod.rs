//! What the tests of drivers share: seeded randomness, scattered memory, disks of every kind to run on.
#![allow(dead_code, reason = "every test binary uses a part")]

pub mod bed;
pub mod guest;
pub mod sequence;
pub mod strict;

use vhost_user_blk::mem::{IoVec, Sg};
use vhost_user_blk::rt::{Buffer, WaitKind, uring_available};

/// SplitMix64: small, seeded, good enough to choose test cases.
pub struct Rng(pub u64);

impl Rng {
    /// From CONFORMANCE_SEED, or always the same; mixed with `salt`.
    pub fn new(salt: u64) -> Rng {
        let seed = std::env::var("CONFORMANCE_SEED").map_or(1, |s| s.parse().expect("a number"));
        Rng(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15) ^ salt)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 if that is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    pub fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).unwrap()
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
        out
    }

    /// Where an operation of at most `most` bytes on a disk of `size` bytes may lie: offset and length, at all alignments.
    pub fn range(&mut self, size: u64, most: u64) -> (u64, u64) {
        let most = most.min(size);
        let len = match self.below(6) {
            0 => 1 + self.below(16),
            1 => 1 + self.below(5000),
            2 => 512 * (1 + self.below(16)),
            3 => 4096 * (1 + self.below(64)),
            4 => 1 + self.below(128 << 10),
            _ => 1 + self.below(most),
        }
        .min(most);
        let room = size - len;
        let at = match self.below(5) {
            0 => self.below(room + 1),
            1 => room,
            2 => self.below(room / 512 + 1) * 512,
            _ => self.below(room / 4096 + 1) * 4096,
        };
        (at, len)
    }
}

const UNTOUCHED: u8 = 0xee;

/// Memory for `len` bytes in ranges of all kinds, with bytes between them that nobody may touch.
pub struct Scatter {
    buffer: Buffer,
    parts: Vec<(usize, usize)>,
    iov: Vec<IoVec>,
}

impl Scatter {
    pub fn new(rng: &mut Rng, len: usize) -> Scatter {
        let style = rng.below(5);
        let mut pos = if style == 4 { 0 } else { [0, 1, 3, 512, 4096][rng.index(5)] };
        let (mut left, mut parts) = (len, Vec::new());
        while left > 0 {
            let (n, gap) = match style {
                0 | 4 => (left, 0),
                1 => (1 + rng.index(left.min(20_000)), rng.index(70)),
                // More ranges than one system call takes.
                2 => (rng.index(len / 1000 + 2), rng.index(3)),
                _ => (4096 * (1 + rng.index(8)), 4096 * rng.index(2)),
            };
            let n = n.min(left);
            parts.push((pos, n));
            pos += n + gap;
            left -= n;
        }
        let mut buffer = Buffer::new(pos + 64, 4096);
        buffer.bytes_mut().fill(UNTOUCHED);
        let mut iov: Vec<IoVec> =
            parts.iter().map(|(at, n)| buffer.iovec().part(*at, *n)).collect();
        if rng.one_in(4) {
            // A range of nothing, at an address that nothing else may have.
            iov.insert(rng.index(iov.len() + 1), buffer.iovec().part(1, 0));
        }
        Scatter { buffer, parts, iov }
    }

    pub fn ranges(&self) -> usize {
        self.iov.len()
    }

    pub fn sg(&self) -> Sg<'_> {
        Sg::new(&self.iov)
    }

    pub fn fill(&mut self, mut bytes: &[u8]) {
        for (at, n) in &self.parts {
            let (now, rest) = bytes.split_at(*n);
            self.buffer.bytes_mut()[*at..at + n].copy_from_slice(now);
            bytes = rest;
        }
        assert!(bytes.is_empty());
    }

    /// What is in the ranges.
    ///
    /// # Panics
    /// If a byte between them has changed.
    pub fn gather(&self) -> Vec<u8> {
        let (mut out, mut at) = (Vec::new(), 0);
        let bytes = self.buffer.bytes();
        for (start, n) in &self.parts {
            assert!(bytes[at..*start].iter().all(|b| *b == UNTOUCHED), "written between ranges");
            out.extend_from_slice(&bytes[*start..start + n]);
            at = start + n;
        }
        assert!(bytes[at..].iter().all(|b| *b == UNTOUCHED), "written behind the last range");
        out
    }
}

/// The wait points of this machine: one if it is told to do without io_uring.
pub fn waits() -> Vec<WaitKind> {
    const WITHOUT: &str = "VHOST_USER_BLK_NO_IO_URING";
    match uring_available() {
        Ok(()) => vec![WaitKind::Uring, WaitKind::Epoll],
        Err(_) if std::env::var_os(WITHOUT).is_some() => vec![WaitKind::Epoll],
        Err(e) => panic!("io_uring does not work here: {e}; {WITHOUT}=1 tests without it"),
    }
}

/// Panics with the first difference.
pub fn assert_same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    if got == want {
        return;
    }
    let differ = |i: &usize| got[*i] != want[*i];
    let at = (0..got.len()).find(differ).expect("they differ");
    let n = (at..got.len()).take_while(differ).count();
    panic!("{what}: {n} bytes differ at {at}: {:#x}, not {:#x}", got[at], want[at]);
}
