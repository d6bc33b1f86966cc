//! Parsing beside a straightforward model: a request is two strings of bytes, however they are cut into descriptors.

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::*;
use crate::rt::Buffer;

const T_IN: u32 = VIRTIO_BLK_T_IN;
const T_OUT: u32 = VIRTIO_BLK_T_OUT;
const UNMAP: u32 = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
const SERIAL: &[u8] = b"serial-0123456789-ab"; // As long as it can be.
const FILL: u8 = 0xa5;

const DISK: Disk<'static> = Disk { capacity: 1000, block: 512, read_only: false, serial: SERIAL };

/// Memory that a chain is cut from: what the device may read, then what it may write.
struct Memory {
    readable: Buffer,
    writable: Buffer,
    lens: [usize; 2],
}

impl Memory {
    fn new(readable: &[u8], writable: usize) -> Memory {
        let lens = [readable.len(), writable];
        let mut m = Memory {
            readable: Buffer::new(lens[0].max(1), 16),
            writable: Buffer::new(lens[1].max(1), 16),
            lens,
        };
        m.readable.bytes_mut()[..lens[0]].copy_from_slice(readable);
        m.writable.bytes_mut().fill(FILL);
        m
    }

    /// The chain with descriptors cut where `cuts` say (positions, modulo the length).
    fn chain(&self, cuts: &[usize]) -> Chain {
        let [readable_len, writable_len] = self.lens.map(|n| n as u64);
        let mut chain = Chain { readable_len, writable_len, ..Chain::default() };
        for (side, buffer) in [&self.readable, &self.writable].into_iter().enumerate() {
            let len = self.lens[side];
            let mut at: Vec<usize> = cuts.iter().map(|c| c % len.max(1)).chain([0, len]).collect();
            at.sort_unstable();
            at.dedup();
            chain.iov.extend(at.windows(2).map(|w| buffer.iovec().part(w[0], w[1] - w[0])));
            if side == 0 {
                chain.readable = chain.iov.len();
            }
        }
        chain
    }
}

/// What the ranges name, one address for each byte.
fn addresses(iov: &[IoVec]) -> Vec<usize> {
    iov.iter().flat_map(|v| v.base().addr()..v.base().addr() + v.len()).collect()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0xee; 4], &sector.to_le_bytes()].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Whether sectors `[sector, sector + n)` are inside the disk and on block boundaries, in numbers that cannot overflow.
fn range_ok(disk: &Disk<'_>, sector: u64, bytes: u128) -> bool {
    let start = u128::from(sector) * 512;
    let block = u128::from(disk.block);
    start.is_multiple_of(block)
        && bytes.is_multiple_of(block)
        && start + bytes <= u128::from(disk.capacity) * 512
}

/// features.md section 5, with our limits.
fn model(readable: &[u8], writable: usize, disk: &Disk<'_>) -> Result<Action, ()> {
    let done = |status| Ok(Action::Finished(status));
    if writable == 0 {
        return Err(());
    }
    let Some((h, data)) = readable.split_at_checked(16) else { return done(Status::IoErr) };
    let kind = u32::from_le_bytes(h[..4].try_into().unwrap());
    let sector = u64::from_le_bytes(h[8..].try_into().unwrap());
    let transfer = |write: bool, len: usize| match () {
        () if write && disk.read_only => done(Status::IoErr),
        () if !range_ok(disk, sector, len as u128) => done(Status::IoErr),
        () if len == 0 => done(Status::Ok),
        () => Ok(Action::Transfer { write, offset: sector * 512 }),
    };
    match kind {
        0 => transfer(false, writable - 1),
        1 => transfer(true, data.len()),
        4 => Ok(Action::Flush),
        8 => done(Status::Ok),
        11 | 13 if disk.read_only => done(Status::IoErr),
        11 | 13 => model_ranges(data, kind == 13, disk),
        _ => done(Status::Unsupp),
    }
}

fn model_ranges(data: &[u8], zero: bool, disk: &Disk<'_>) -> Result<Action, ()> {
    let done = |status| Ok(Action::Finished(status));
    if data.is_empty() || !data.len().is_multiple_of(16) {
        return done(Status::IoErr);
    }
    if data.len() / 16 > if zero { 16 } else { 256 } {
        return done(Status::Unsupp);
    }
    let segments: Vec<Segment> = data.chunks(16).map(Segment::parse).collect();
    if segments.iter().any(|s| s.flags > 1 || (s.flags == 1 && !zero)) {
        return done(Status::Unsupp);
    }
    let good = |s: &Segment| {
        s.sectors <= if zero { 0x8_0000 } else { 0x7fff_f800 }
            && range_ok(disk, s.sector, u128::from(s.sectors) * 512)
    };
    if segments.iter().all(good) {
        Ok(Action::Ranges { zero, segments })
    } else {
        done(Status::IoErr)
    }
}

fn check(readable: &[u8], writable: usize, cuts: &[usize], disk: &Disk<'_>) -> TestCaseResult {
    let memory = Memory::new(readable, writable);
    let mut slot = Slot { chain: memory.chain(cuts), ..Slot::default() };
    let all = addresses(&slot.chain.iov);
    let (ours, want) = (slot.parse(disk), model(readable, writable, disk));
    prop_assert_eq!(ours.as_ref().map_err(|_| ()), want.as_ref().map_err(|e| *e));
    if want.is_err() {
        return Ok(());
    }
    prop_assert_eq!(slot.used_len as usize, writable);
    // The data is what lies between header and status.
    if readable.len() >= 16 {
        prop_assert_eq!(addresses(slot.data(true)), &all[16..readable.len()]);
        prop_assert_eq!(addresses(slot.data(false)), &all[readable.len()..all.len() - 1]);
        for write in [false, true] {
            prop_assert_eq!(slot.data_len(write), bytes(slot.data(write)));
        }
    }
    // The serial number where it was asked for, the status in the last byte, nothing anywhere else.
    slot.answer(Status::Unsupp);
    let mut written = vec![FILL; writable];
    if readable.len() >= 16 && readable[..4] == VIRTIO_BLK_T_GET_ID.to_le_bytes() {
        let mut id = [0; 20];
        id[..disk.serial.len().min(20)].copy_from_slice(&disk.serial[..disk.serial.len().min(20)]);
        let n = (writable - 1).min(20);
        written[..n].copy_from_slice(&id[..n]);
    }
    written[writable - 1] = 2;
    prop_assert_eq!(&memory.writable.bytes()[..writable], &written[..]);
    prop_assert_eq!(&memory.readable.bytes()[..readable.len()], readable);
    Ok(())
}

/// Checks a request in one descriptor per part, and cut at every third byte.
fn status(readable: &[u8], writable: usize, disk: &Disk<'_>) -> Action {
    let thirds: Vec<usize> = (0..readable.len().max(writable)).step_by(3).collect();
    for cuts in [&[][..], &[16, writable - 1], &thirds] {
        check(readable, writable, cuts, disk).unwrap();
    }
    let memory = Memory::new(readable, writable);
    let mut slot = Slot { chain: memory.chain(&[]), ..Slot::default() };
    slot.parse(disk).unwrap()
}

fn kind() -> impl Strategy<Value = u32> {
    prop_oneof![12 => (0usize..6).prop_map(|i| [0, 1, 4, 8, 11, 13][i]), 1 => 0u32..32, 1 => any::<u32>()]
}

fn sector() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0u64..1010,
        4 => (0u64..130).prop_map(|n| n * 8),
        1 => u64::MAX - 8..=u64::MAX,
        1 => (0u64..8).prop_map(|n| u64::MAX / 512 - 3 + n),
        1 => any::<u64>(),
    ]
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    let sectors = prop_oneof![0u32..20, (0u32..8).prop_map(|n| n * 8), any::<u32>()];
    let flags = prop_oneof![6 => Just(0u32), 3 => Just(UNMAP), 1 => any::<u32>()];
    let one = (sector(), sectors, flags).prop_map(|(s, n, f)| segment(s, n, f));
    prop_oneof![
        prop::collection::vec(one, 0..6).prop_map(|s| s.concat()),
        (0usize..6).prop_map(|n| vec![7; n * 512]),
        (0usize..3000).prop_map(|n| vec![7; n]),
        (254usize..259).prop_map(|n| segment(1, 1, 0).repeat(n)),
    ]
}

fn disk() -> impl Strategy<Value = Disk<'static>> {
    let serials: [&'static [u8]; 4] = [b"", b"short", SERIAL, b"longer than 20 bytes!"];
    let capacities = [1000, 1000, 0, u64::MAX / 512];
    (0usize..4, prop::bool::weighted(0.2), 0u32..2, 0usize..4).prop_map(
        move |(i, read_only, big, n)| Disk {
            capacity: capacities[n],
            block: 512 << (3 * big),
            read_only,
            serial: serials[i],
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn requests_in_any_layout(
        kind in kind(),
        sector in sector(),
        data in data(),
        writable in prop_oneof![3 => Just(1usize), 3 => (0usize..6).prop_map(|n| n * 512 + 1), 1 => 0usize..40],
        cut_short in prop::option::weighted(0.1, 0usize..17),
        cuts in prop::collection::vec(any::<usize>(), 0..12),
        disk in disk(),
    ) {
        let mut readable = [header(kind, sector), data].concat();
        readable.truncate(cut_short.unwrap_or(usize::MAX));
        check(&readable, writable, &cuts, &disk)?;
    }

    #[test]
    fn any_bytes(
        readable in prop::collection::vec(prop_oneof![any::<u8>(), 0u8..14], 0..200),
        writable in 0usize..50,
        cuts in prop::collection::vec(any::<usize>(), 0..12),
    ) {
        check(&readable, writable, &cuts, &DISK)?;
    }
}

#[test]
fn status_rules() {
    use Status::{IoErr, Ok, Unsupp};
    let done = Action::Finished;
    let read_only = Disk { read_only: true, ..DISK };
    let block_4k = Disk { block: 4096, ..DISK };
    let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
    let ranges = |kind, list: &[Vec<u8>]| [header(kind, 0), list.concat()].concat();
    let one = |kind, sector, n, flags| ranges(kind, &[segment(sector, n, flags)]);
    for (what, readable, writable, disk, want) in [
        ("read", header(T_IN, 3), 513, DISK, Action::Transfer { write: false, offset: 1536 }),
        (
            "last sector",
            header(T_IN, 999),
            513,
            DISK,
            Action::Transfer { write: false, offset: 999 * 512 },
        ),
        ("read past the end", header(T_IN, 1000), 513, DISK, done(IoErr)),
        ("read over the end", header(T_IN, 999), 1025, DISK, done(IoErr)),
        ("read far past the end", header(T_IN, u64::MAX), 513, DISK, done(IoErr)),
        ("sector * 512 wraps to 0", header(T_IN, 1 << 55), 513, DISK, done(IoErr)),
        ("half a sector", header(T_IN, 0), 257, DISK, done(IoErr)),
        ("nothing", header(T_IN, 0), 1, DISK, done(Ok)),
        ("nothing, past the end", header(T_IN, 1001), 1, DISK, done(IoErr)),
        ("write, read-only", [header(T_OUT, 0), vec![0; 512]].concat(), 1, read_only, done(IoErr)),
        ("not on a block", header(T_IN, 1), 4097, block_4k, done(IoErr)),
        ("less than a block", header(T_IN, 8), 513, block_4k, done(IoErr)),
        ("flush", header(VIRTIO_BLK_T_FLUSH, 0), 1, DISK, Action::Flush),
        ("flush, read-only", header(VIRTIO_BLK_T_FLUSH, 0), 1, read_only, Action::Flush),
        ("unknown type", header(2, 0), 1, DISK, done(Unsupp)),
        ("legacy barrier bit", header(1 << 31, 0), 513, DISK, done(Unsupp)),
        ("discard, unmap flag", one(discard, 0, 8, 1), 1, DISK, done(Unsupp)),
        ("discard, unknown flag", one(discard, 0, 8, 2), 1, DISK, done(Unsupp)),
        ("zeroes, unknown flag", one(zeroes, 0, 8, 0x8000_0000), 1, DISK, done(Unsupp)),
        ("zeroes past the end", one(zeroes, 999, 2, 1), 1, DISK, done(IoErr)),
        ("discard past the end", one(discard, 1001, 0, 0), 1, DISK, done(IoErr)),
        ("discard, read-only", one(discard, 0, 8, 0), 1, read_only, done(IoErr)),
        ("zeroes, read-only", one(zeroes, 0, 8, 0), 1, read_only, done(IoErr)),
        ("no segment", ranges(discard, &[]), 1, DISK, done(IoErr)),
        ("half a segment", header(discard, 0).repeat(2)[..24].to_vec(), 1, DISK, done(IoErr)),
        ("257 segments", ranges(discard, &vec![segment(0, 1, 0); 257]), 1, DISK, done(Unsupp)),
        ("17 segments", ranges(zeroes, &vec![segment(0, 1, 0); 17]), 1, DISK, done(Unsupp)),
        (
            "one of two bad",
            ranges(zeroes, &[segment(0, 1, 1), segment(999, 2, 0)]),
            1,
            DISK,
            done(IoErr),
        ),
        ("no header", vec![], 1, DISK, done(IoErr)),
        ("short header", header(T_IN, 0)[..15].to_vec(), 513, DISK, done(IoErr)),
    ] {
        assert_eq!(status(&readable, writable, &disk), want, "{what}");
    }
    for (kind, count, flags) in [(zeroes, 16, UNMAP), (discard, 256, 0)] {
        let all = status(&ranges(kind, &vec![segment(4, 2, flags); count]), 1, &DISK);
        let segments = vec![Segment { sector: 4, sectors: 2, flags }; count];
        assert_eq!(all, Action::Ranges { zero: kind == zeroes, segments });
    }
    // The most sectors, on a disk that has them.
    let huge = Disk { capacity: u64::MAX / 512, ..DISK };
    for (kind, most) in [(discard, DISCARD_SECTORS_MAX), (zeroes, ZEROES_SECTORS_MAX)] {
        assert!(matches!(status(&one(kind, 0, most, 0), 1, &huge), Action::Ranges { .. }));
        assert_eq!(status(&one(kind, 0, most + 1, 0), 1, &huge), done(IoErr));
    }
}

#[test]
fn bad_chains_fail_where_they_can() {
    let reason = "a descriptor outside of guest memory";
    for (writable, want) in [(1, Ok(Action::Finished(Status::IoErr))), (0, Err(reason))] {
        let readable = [header(T_OUT, 0), vec![0; 512]].concat();
        let memory = Memory::new(&readable, writable);
        let mut slot = Slot { chain: memory.chain(&[]), ..Slot::default() };
        slot.chain.bad = Some(reason);
        assert_eq!(slot.parse(&DISK), want);
    }
    let memory = Memory::new(&header(T_IN, 0), 0);
    let mut slot = Slot { chain: memory.chain(&[]), ..Slot::default() };
    assert_eq!(slot.parse(&DISK), Err("a chain without a status byte"));
}

/// The state of an earlier request in the same slot does not show in the next.
#[test]
fn slots_are_used_again() {
    let mut slot = Slot::default();
    for (sector, cuts, len) in [(0, &[3, 10, 20][..], 512), (1, &[], 1024), (2, &[16], 0)] {
        let memory = Memory::new(&[header(T_OUT, sector), vec![1; len]].concat(), 1);
        slot.chain = memory.chain(cuts);
        let action = slot.parse(&DISK).unwrap();
        let transfer = Action::Transfer { write: true, offset: sector * 512 };
        assert_eq!(action, if len == 0 { Action::Finished(Status::Ok) } else { transfer });
        assert_eq!((addresses(slot.data(true)).len(), slot.used_len), (len, 1));
        slot.answer(Status::Ok);
        assert_eq!(memory.writable.bytes(), [0]);
    }
}
