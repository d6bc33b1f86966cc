//! Messages of a front end that may be right, and descriptors of all kinds to come with them.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

use vhost_user_blk::vhost_user::message::*;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::driver::{AVAIL_RING, TABLE, USED_RING};
use super::entropy::Entropy;
use super::memory::{EDGES, Memory, user};

/// Requests that are served.
const KNOWN: [u32; 30] = [
    GET_FEATURES,
    SET_FEATURES,
    SET_OWNER,
    RESET_OWNER,
    SET_MEM_TABLE,
    SET_LOG_BASE,
    SET_LOG_FD,
    SET_VRING_NUM,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    GET_VRING_BASE,
    SET_VRING_KICK,
    SET_VRING_CALL,
    SET_VRING_ERR,
    GET_PROTOCOL_FEATURES,
    SET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    SET_VRING_ENABLE,
    SET_BACKEND_REQ_FD,
    GET_CONFIG,
    SET_CONFIG,
    GET_INFLIGHT_FD,
    SET_INFLIGHT_FD,
    RESET_DEVICE,
    GET_MAX_MEM_SLOTS,
    ADD_MEM_REG,
    REM_MEM_REG,
    SET_STATUS,
    SET_DEVICE_STATE_FD,
    CHECK_DEVICE_STATE,
];
/// VERSION_1, protocol features, indirect descriptors, event indices.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 28 | 1 << 29;
const PACKED: u64 = 1 << 34;
const LOG_ALL: u64 = 1 << 26;

/// A message, and what comes with it.
pub struct Parcel {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Parcel {
    fn new(request: u32, payload: &[u8], fds: Vec<OwnedFd>) -> Parcel {
        Parcel { bytes: encode(request, 0, payload), fds }
    }

    /// Sends it, or as much of it as the other end still takes.
    pub fn send(&self, stream: &UnixStream) {
        let raw: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = match self.bytes.as_slice() {
            [] => return,
            bytes => stream.send_with_fds(&[bytes], &raw),
        };
        if let Ok(sent) = sent {
            (&mut &*stream).write_all(&self.bytes[sent..]).unwrap_or_default();
        }
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

fn region(r: &MemRegion) -> Vec<u8> {
    longs(&[r.guest_addr, r.size, r.user_addr, r.mmap_offset])
}

fn dup(file: &File) -> OwnedFd {
    file.try_clone().unwrap().into()
}

/// A descriptor of any kind.
pub fn descriptor(e: &mut Entropy<'_>, memory: &Memory) -> OwnedFd {
    let lens = [0, 1, 4095, 4096, 8192, 0xd000, 1 << 20, 1 << 40];
    match e.below(9) {
        0 | 1 => EventFd::new(libc::EFD_NONBLOCK).map(own).unwrap(),
        2 => EventFd::new(0).map(own).unwrap(),
        3 => vhost_user_blk::sys::memfd(c"messages-fd", e.pick(&lens)).unwrap().into(),
        4 => dup(memory.spare()),
        5 => UnixStream::pair().unwrap().0.into(),
        6 => std::io::pipe().unwrap().0.into(),
        7 => {
            // With something to read, then the end.
            let (reader, mut writer) = std::io::pipe().unwrap();
            let len = e.below(64) as usize;
            writer.write_all(&b"vub-blk\n\x01\0\0\0\x08\0\0\0\x01".repeat(4)[..len]).unwrap();
            reader.into()
        }
        _ => shrinking(e.pick(&lens[..6])).into(),
    }
}

/// A file that can be cut short at any time, as a sealed one cannot.
pub fn shrinking(len: u64) -> File {
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(libc::O_TMPFILE).open("/tmp").unwrap();
    file.set_len(len).unwrap();
    file
}

fn own(event: EventFd) -> OwnedFd {
    // SAFETY: `into_raw_fd` has given it up, so nobody else has it.
    unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) }
}

/// What a sound front end says until ring `queue` runs, `packed` or not; the kick.
pub fn beginning(
    memory: &Memory,
    queue: u32,
    packed: bool,
    size: u16,
) -> (Vec<Parcel>, Vec<EventFd>) {
    let features = FEATURES | if packed { PACKED } else { 0 };
    let protocol = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;
    let table = memory.table();
    let mut payload = words(&[3, 0]);
    table.iter().for_each(|r| payload.extend(region(r)));
    let fds = table.iter().map(|_| dup(memory.file())).collect();
    let mut parcels = vec![
        Parcel::new(SET_PROTOCOL_FEATURES, &longs(&[protocol | 1 << 16 | 1 << 19]), vec![]),
        Parcel::new(SET_FEATURES, &longs(&[features]), vec![]),
        Parcel::new(SET_MEM_TABLE, &payload, fds),
    ];
    let (offset, len) = memory.area_place();
    if !packed {
        let area = [longs(&[len, offset]), words(&[1 | u32::from(size) << 16])].concat();
        parcels.push(Parcel::new(SET_INFLIGHT_FD, &area, vec![dup(memory.file())]));
    }
    let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let call = EventFd::new(libc::EFD_NONBLOCK).map(own).unwrap();
    parcels.extend([
        Parcel::new(SET_VRING_NUM, &words(&[queue, size.into()]), vec![]),
        Parcel::new(SET_VRING_ADDR, &address(queue, 0), vec![]),
        Parcel::new(SET_VRING_CALL, &longs(&[queue.into()]), vec![call]),
        Parcel::new(SET_VRING_KICK, &longs(&[queue.into()]), vec![own(kick.try_clone().unwrap())]),
        Parcel::new(SET_VRING_ENABLE, &words(&[queue, 1]), vec![]),
    ]);
    (parcels, vec![kick])
}

fn address(queue: u32, skew: u64) -> Vec<u8> {
    let at = |part: u64| user(part).wrapping_add(skew);
    let log = u64::from(queue) * 8;
    [words(&[queue, 0]), longs(&[at(TABLE), at(USED_RING), at(AVAIL_RING), log])].concat()
}

/// One that may be right.
pub fn message(e: &mut Entropy<'_>, memory: &mut Memory) -> Parcel {
    let request = if e.one_in(16) { e.word() as u32 } else { e.pick(&KNOWN) };
    let queue = if e.one_in(8) { e.word() as u32 } else { e.below(3) as u32 };
    let table = memory.table();
    let mut fds = Vec::new();
    let mut payload = match request {
        SET_FEATURES => {
            longs(&[FEATURES ^ e.pick(&[0, 0, PACKED, LOG_ALL, 1 << 30, 1 << 28, 1 << 63])])
        }
        SET_PROTOCOL_FEATURES => longs(&[e.word() & 0x9b22b]),
        SET_MEM_TABLE => {
            let count = e.below(5);
            let mut payload = words(&[count as u32, 0]);
            for i in 0..count as usize {
                let (r, file) = bent(e, memory, table[i % 3]);
                payload.extend(region(&r));
                fds.push(dup(file));
            }
            payload
        }
        ADD_MEM_REG | REM_MEM_REG => {
            let which = e.pick(&[0, 1, 2]);
            let (r, file) = bent(e, memory, table[which]);
            fds.push(dup(file));
            [longs(&[0]), region(&r)].concat()
        }
        SET_LOG_BASE => {
            fds.push(dup(memory.spare()));
            longs(&[e.pick(&[0, 1, 8, 4096, 0xd000, 1 << 40]), e.pick(&[0, 1, 4096, u64::MAX])])
        }
        GET_INFLIGHT_FD | SET_INFLIGHT_FD => {
            let (offset, len) = memory.area_place();
            let shape = e.pick(&[0x0040_0001, 0x0010_0001, 0x0100_0002, 0x0001_ffff, 0, u32::MAX]);
            let place = [e.pick(&[len, len, 0, 16, u64::MAX]), e.pick(&[offset, offset, 0, 4])];
            let sound = place == [len, offset] && shape < 0x100_0000;
            fds.push(dup(if sound { memory.file() } else { memory.spare() }));
            [longs(&place), words(&[shape])].concat()
        }
        SET_VRING_NUM => words(&[queue, e.pick(&[16, 8, 64, 0, 3, 1024, 0x8000, 0x1_0010])]),
        SET_VRING_BASE => {
            words(&[queue, e.pick(&[0, 1, 0xffff, 0x8000_8000, 0x8001_8000, u32::MAX])])
        }
        SET_VRING_ADDR => {
            let skew = e.pick(&[0, 0, 16, 1, 0x5000, u64::MAX - 15, 0x6000]);
            let mut payload = address(queue, skew);
            payload[4] = e.byte() & 1;
            payload
        }
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
            let no_fd = e.one_in(4);
            if !no_fd {
                fds.push(descriptor(e, memory));
            }
            longs(&[u64::from(queue) | if no_fd { 1 << 8 } else { 0 }])
        }
        SET_VRING_ENABLE => words(&[queue, e.pick(&[1, 0, 1, 2])]),
        GET_CONFIG | SET_CONFIG => {
            let range =
                [e.pick(&[0, 32, 59, 60, 256, u32::MAX]), e.pick(&[60, 1, 0, 256, u32::MAX])];
            [words(&range), words(&[0]), vec![e.byte(); 60]].concat()
        }
        SET_STATUS => longs(&[e.pick(&[0, 1, 15, 256])]),
        SET_DEVICE_STATE_FD => {
            let (reader, mut writer) = std::io::pipe().unwrap();
            writer.write_all(&b"vub-blk\n\x01\0\0\0\x08\0\0\0\x01\0\0\0\0\0\0\0"[..]).unwrap();
            let direction = e.pick(&[1, 0, 2]);
            fds.push(if direction == 1 { reader.into() } else { OwnedFd::from(writer) });
            words(&[direction, u32::from(e.one_in(8))])
        }
        SET_BACKEND_REQ_FD => {
            fds.push(descriptor(e, memory));
            vec![]
        }
        _ => words(&[queue, e.word() as u32]),
    };
    // Now something else is wrong.
    match e.below(12) {
        0 => payload.truncate(e.below(40) as usize),
        1 => payload.extend(vec![e.byte(); e.below(300) as usize]),
        2 if !payload.is_empty() => {
            let at = e.below(payload.len() as u64) as usize;
            payload[at] = e.byte();
            // Perhaps a place in the file.
            let spare = |fd: &mut OwnedFd| *fd = dup(memory.spare());
            if request != SET_DEVICE_STATE_FD {
                fds.iter_mut().for_each(spare);
            }
        }
        3 => fds.push(descriptor(e, memory)),
        4 => drop(fds.pop()),
        5 => (0..e.below(64)).for_each(|_| fds.push(dup(memory.spare()))),
        6 if !fds.is_empty() && request != SET_DEVICE_STATE_FD => fds[0] = descriptor(e, memory),
        _ => {}
    }
    let flags = [0, NEED_REPLY, NEED_REPLY, if e.one_in(8) { REPLY } else { 0 }];
    let mut bytes = encode(request, e.pick(&flags), &payload);
    let garble = e.below(40);
    match garble {
        0 => bytes.truncate(e.below(bytes.len() as u64) as usize),
        1 => bytes[e.below(12) as usize] = e.byte(),
        2 => bytes = (0..e.below(200)).map(|_| e.byte()).collect(),
        _ => return Parcel { bytes, fds },
    }
    memory.garble();
    if request != SET_DEVICE_STATE_FD {
        fds.iter_mut().for_each(|fd| *fd = dup(memory.spare()));
    }
    Parcel { bytes, fds }
}

/// A region that may be another, and its file.
fn bent<'a>(e: &mut Entropy<'_>, memory: &'a Memory, mut r: MemRegion) -> (MemRegion, &'a File) {
    let value = if e.one_in(2) { e.pick(&EDGES) } else { e.below(0x9000) };
    match e.below(12) {
        0 => r.guest_addr = value,
        1 => r.user_addr = value,
        2 => r.size = value,
        3 => r.mmap_offset = value,
        _ => return (r, memory.file()),
    }
    (r, memory.spare())
}

/// All that the other end has to say, until it closes.
///
/// # Panics
/// If it does not.
pub fn read_to_end(mut stream: &UnixStream) {
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => return,
            // libFuzzer has a timer.
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => panic!("the session does not end: {e}"),
        }
    }
}
