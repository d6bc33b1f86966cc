//! Reads what the driver `blklogwrites` has logged (of ours or of QEMU), and builds the disk as it may be after the host has
//! lost power at any moment.
//!
//! A moment is a length of the log. A write is there for sure after it if it was done before a flush was sent that was done by
//! then, or is stable by itself; otherwise all of it, none of it, or any of its sectors are. With `log-completions=on` the
//! log tells when each was sent and done; without, everything was done when it was logged, and a flush sent then, too.

use std::collections::HashMap;

use crate::common::Random;

/// The unit of everything in the log, in bytes.
const SECTOR: usize = 512;
/// What it begins with.
const MAGIC: u64 = 0x006a_7366_7773_6872;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// One request.
struct Request {
    /// Of the disk, in bytes.
    offset: usize,
    len: usize,
    /// Of the log; none: the range reads as zeroes.
    data: Option<usize>,
    flags: u64,
    /// Moments.
    sent: usize,
    done: Option<usize>,
}

/// A log.
pub struct Log {
    bytes: Vec<u8>,
    requests: Vec<Request>,
}

/// Which of the flushes count.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Flushes {
    Count,
    /// As if the disk had lied.
    AreIgnored,
}

impl Log {
    /// Takes the log apart.
    ///
    /// # Panics
    /// If it is none.
    pub fn read(bytes: Vec<u8>) -> Log {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let size = |at: usize| usize::try_from(word(at)).unwrap();
        assert_eq!((word(0), word(8), word(24)), (MAGIC, 1, SECTOR as u64), "no log");
        let (mut requests, mut numbers): (Vec<Request>, _) = (Vec::new(), HashMap::new());
        let (mut at, mut completions) = (SECTOR, false);
        for entry in 0..size(16) {
            let (offset, len, flags) = (size(at) * SECTOR, size(at + 8) * SECTOR, word(at + 16));
            at += SECTOR;
            if flags & MARK != 0 {
                let text = &bytes[at - SECTOR + 32..][..size(at - SECTOR + 24)];
                let text = std::str::from_utf8(text).unwrap();
                let number: usize = text.strip_prefix("done ").unwrap().parse().unwrap();
                let request: usize = numbers[&number];
                requests[request].done = Some(at);
                completions = true;
                continue;
            }
            let data = (flags & DISCARD == 0).then_some(at);
            at += if data.is_some() { len } else { 0 };
            numbers.insert(entry, requests.len());
            requests.push(Request { offset, len, data, flags, sent: at, done: None });
        }
        assert_eq!(at, bytes.len(), "the log says how long it is");
        for r in requests.iter_mut().filter(|_| !completions) {
            r.done = Some(r.sent);
        }
        Log { bytes, requests }
    }

    /// The last moment.
    pub fn end(&self) -> usize {
        self.bytes.len()
    }

    /// How many flushes were done.
    pub fn flushes(&self) -> usize {
        self.requests.iter().filter(|r| r.flags & FLUSH != 0 && r.done.is_some()).count()
    }

    /// What was `start` in the beginning, after a power loss at `cut`.
    pub fn cut(&self, start: &[u8], cut: usize, flushes: Flushes, random: &mut Random) -> Vec<u8> {
        let honest = flushes == Flushes::Count;
        let before = |time: Option<usize>| time.is_some_and(|t| t <= cut);
        let done = self.requests.iter().filter(|r| r.flags & FLUSH != 0 && before(r.done));
        let stable_since = done.filter(|_| honest).map(|r| r.sent).max().unwrap_or(0);
        let mut disk = start.to_vec();
        for r in self.requests.iter().filter(|r| r.len > 0 && r.sent <= cut) {
            let stable = r.done.is_some_and(|t| t <= stable_since)
                || honest && r.flags & FUA != 0 && before(r.done);
            let fate = if stable { 0 } else { random.below(3) };
            let end = r.offset + r.len;
            disk.resize(disk.len().max(if fate == 1 { 0 } else { end }), 0);
            for at in (0..r.len).step_by(SECTOR).filter(|_| fate != 1) {
                if fate == 0 || random.below(2) == 0 {
                    let place = &mut disk[r.offset + at..][..SECTOR];
                    match r.data {
                        Some(data) => place.copy_from_slice(&self.bytes[data + at..][..SECTOR]),
                        None => place.fill(0),
                    }
                }
            }
        }
        disk
    }
}
