//! A sparse image in memory. Copies share their pages until one of them is written, so a snapshot costs a list of pointers.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::rng::mix;

/// The granularity of sharing in bytes.
const PAGE: usize = 4096;
const PAGE_LEN: u64 = PAGE as u64;

/// The bytes of a disk; what was never written is zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    pages: BTreeMap<u64, Arc<[u8; PAGE]>>,
    len: u64,
}

/// The parts `(page, start, end)` of pages that `[offset, offset + len)` covers, with what is before each of them.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let start = (at % PAGE_LEN) as usize;
        let n = (PAGE - start).min(len - done);
        let part = (at / PAGE_LEN, start, start + n, done);
        done += n;
        (n > 0).then_some(part)
    })
}

impl Pages {
    /// `len` zero bytes.
    pub fn zeroed(len: u64) -> Pages {
        Pages { pages: BTreeMap::new(), len }
    }

    /// An image of these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Pages {
        let mut image = Pages::default();
        image.write(0, bytes);
        image
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sets its length; what is cut off is gone, what is added is zero.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    /// Fills `to` with the bytes at `offset`; zeroes past the end.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        for (page, start, end, done) in parts(offset, to.len()) {
            let to = &mut to[done..done + (end - start)];
            match self.pages.get(&page) {
                Some(bytes) => to.copy_from_slice(&bytes[start..end]),
                None => to.fill(0),
            }
        }
    }

    /// Stores `from` at `offset`; the image grows as needed.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        for (page, start, end, done) in parts(offset, from.len()) {
            let bytes = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE]));
            let from = &from[done..done + (end - start)];
            Arc::make_mut(bytes)[start..end].copy_from_slice(from);
        }
        self.len = self.len.max(offset + from.len() as u64);
    }

    /// Makes a range zero; the image does not grow.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        if offset >= end {
            return;
        }
        let (first, last) = (offset / PAGE_LEN, (end - 1) / PAGE_LEN);
        let touched: Vec<u64> = self.pages.range(first..=last).map(|(page, _)| *page).collect();
        for page in touched {
            let base = page * PAGE_LEN;
            let start = offset.saturating_sub(base).min(PAGE_LEN) as usize;
            let stop = (end - base).min(PAGE_LEN) as usize;
            if (start, stop) == (0, PAGE) {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                Arc::make_mut(bytes)[start..stop].fill(0);
            }
        }
    }

    /// All its bytes.
    ///
    /// # Panics
    /// If they do not fit into memory.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.len).expect("an image that fits")];
        self.read(0, &mut bytes);
        bytes
    }

    /// A number that differs for different contents (as far as 64 bits can).
    pub fn digest(&self) -> u64 {
        let mut digest = mix(self.len);
        for (page, bytes) in self.pages.iter().filter(|(_, bytes)| bytes.iter().any(|b| *b != 0)) {
            digest = mix(digest ^ page);
            for word in bytes.as_chunks::<8>().0 {
                digest = mix(digest ^ u64::from_le_bytes(*word));
            }
        }
        digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_plain_bytes() {
        let mut rng = super::super::Rng::new(1);
        let (mut image, mut plain) = (Pages::zeroed(40_000), vec![0u8; 40_000]);
        for i in 0..400u32 {
            let (at, len) = (rng.index(39_000), 1 + rng.index(9000));
            if rng.chance(1, 3) {
                image.zero(at as u64, len as u64);
                let end = plain.len().min(at + len);
                plain[at..end].fill(0);
            } else {
                let bytes = vec![i.to_le_bytes()[0] | 1; len];
                image.write(at as u64, &bytes);
                plain.resize(plain.len().max(at + len), 0);
                plain[at..at + len].copy_from_slice(&bytes);
            }
            assert_eq!(image.len(), plain.len() as u64);
        }
        let before = image.clone();
        assert!(image.to_vec() == plain);
        assert_eq!(image.digest(), Pages::from_bytes(&plain).digest());
        image.set_len(10_000);
        image.set_len(20_000);
        plain.truncate(10_000);
        plain.resize(20_000, 0);
        assert!(image.to_vec() == plain);
        assert!(before.digest() != image.digest());
    }
}
