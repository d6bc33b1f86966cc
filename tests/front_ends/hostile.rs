//! Front ends that break the rules: nothing of it ends the server, leaks a descriptor or disturbs the next connection.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Barrier, PoisonError};
use std::time::Duration;

use vhost_user_blk::vhost_user::Told;
use vhost_user_blk::vhost_user::message::*;

use crate::client::*;
use crate::fixture::{ALONE, Fixture};

/// A descriptor to give away, and an end that tells when nobody holds it any more.
struct Tracked {
    reader: std::io::PipeReader,
}

fn tracked() -> (Tracked, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (Tracked { reader }, writer.into())
}

impl Tracked {
    /// Everybody has closed it, or does. (A leak hangs here until the test's time is up.)
    fn expect_closed(mut self) {
        assert_eq!(self.reader.read(&mut [0]).unwrap(), 0);
    }
}

/// The server still serves.
fn expect_service(f: &Fixture) {
    let client = f.connect();
    client.handshake(None);
    client.sync();
}

#[test]
fn a_message_cut_short_ends_the_connection_only() {
    let f = Fixture::new();
    let whole = encode(SET_VRING_KICK, 0, &u64_bytes(0));
    for len in 1..whole.len() {
        let client = f.connect();
        let (watch, fd) = tracked();
        client.send_raw(&whole[..len], &[fd]);
        client.stream.shutdown(Shutdown::Write).unwrap();
        client.expect_end();
        watch.expect_closed();
    }
    expect_service(&f);
}

#[test]
fn an_impossible_header_ends_the_connection_only() {
    let f = Fixture::new();
    let headers = [
        Header { request: GET_FEATURES, flags: 0, size: 0 },
        Header { request: GET_FEATURES, flags: 2, size: 0 },
        Header { request: GET_FEATURES, flags: VERSION, size: MAX_PAYLOAD + 1 },
        Header { request: SET_OWNER, flags: VERSION, size: u32::MAX },
    ];
    for header in headers {
        let client = f.connect();
        let (watch, fd) = tracked();
        client.send_raw(&header.to_bytes(), &[fd]);
        client.expect_end();
        watch.expect_closed();
    }
    expect_service(&f);
}

#[test]
fn a_payload_that_is_too_short_is_refused() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    for request in 0..64 {
        let has_payload = ![
            GET_FEATURES,
            SET_OWNER,
            RESET_OWNER,
            GET_PROTOCOL_FEATURES,
            GET_QUEUE_NUM,
            SET_BACKEND_REQ_FD,
            RESET_DEVICE,
            GET_MAX_MEM_SLOTS,
            GET_STATUS,
        ]
        .contains(&request);
        for len in [0, 1, 7].into_iter().filter(|_| has_payload) {
            let message = encode(request, NEED_REPLY, &vec![0; len]);
            client.send_raw(&message, &[]);
            let reply = client.reply(request);
            let empty = vec![0; 24];
            let refused = [u64_bytes(1), u64_bytes(VRING_NOFD | 1), Vec::new(), empty];
            assert!(refused.contains(&reply), "{}", request_name(request));
        }
    }
    client.sync();
}

#[test]
fn a_payload_that_is_too_long_is_read_to_its_end() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    assert!(client.ask(SET_OWNER, &[7; 1000], &[]));
    assert!(!client.ask(99, &vec![7; usize::try_from(MAX_PAYLOAD).unwrap()], &[]));
    assert!(client.ask(SET_STATUS, &[1, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9], &[]));
    assert_eq!(client.get_u64(GET_STATUS), 1);
    client.sync();
}

#[test]
fn a_reply_that_nobody_asked_for_is_ignored() {
    let f = Fixture::new();
    let client = f.connect();
    client.send_raw(&encode(GET_FEATURES, REPLY | NEED_REPLY, &u64_bytes(0)), &[]);
    client.sync();
}

#[test]
fn queues_that_do_not_exist() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    for queue in [2, 255, 256, 65_536, u32::MAX] {
        for request in [SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE] {
            assert!(!client.ask(request, &state_bytes(queue, 1), &[]));
        }
        assert!(!client.ask(SET_VRING_ADDR, &addr_bytes(queue, ring_addr(0)), &[]));
        assert!(client.get(GET_VRING_BASE, &state_bytes(queue, 0)).is_empty());
    }
    for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        assert!(!client.ask(request, &u64_bytes(2), &[event()]));
    }
    assert!(!client.ask(SET_VRING_ENABLE, &state_bytes(0, 2), &[]));
    client.sync();
}

#[test]
fn descriptors_that_no_request_takes_are_closed() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    for request in [SET_OWNER, SET_STATUS, SET_FEATURES, SET_VRING_NUM, REM_MEM_REG, 99] {
        let (watch, fd) = tracked();
        client.ask(request, &[0; 40], &[fd]);
        watch.expect_closed();
    }
    for request in [SET_VRING_KICK, ADD_MEM_REG, SET_BACKEND_REQ_FD, SET_MEM_TABLE] {
        let (watch, fd) = tracked();
        assert!(!client.ask(request, &[0; 40], &[fd, event()]));
        watch.expect_closed();
    }
}

#[test]
fn too_many_descriptors_are_closed_and_the_request_refused() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    for count in [MAX_FDS + 1, 100, 253] {
        let (watch, fd) = tracked();
        let fds: Vec<OwnedFd> = (0..count).map(|_| fd.try_clone().unwrap()).collect();
        assert!(!client.ask(SET_VRING_KICK, &u64_bytes(0), &fds));
        drop((fd, fds));
        watch.expect_closed();
    }
    // Spread over the bytes of one message.
    let (watch, fd) = tracked();
    let fds: Vec<OwnedFd> = (0..20).map(|_| fd.try_clone().unwrap()).collect();
    drop(fd);
    for byte in encode(SET_VRING_KICK, NEED_REPLY, &u64_bytes(0)) {
        client.send_raw(&[byte], &fds);
    }
    drop(fds);
    assert_eq!(client.reply(SET_VRING_KICK), u64_bytes(1));
    watch.expect_closed();
    client.sync();
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    f.device.expect(&["features 0x130007a44"]);
    let table = encode(SET_MEM_TABLE, NEED_REPLY, &table_bytes(&[region(0), region(1)]));
    // The descriptors come with whatever byte they were sent with.
    client.send_raw(&table[..1], &[memory_file(REGION_SIZE)]);
    client.send_raw(&table[1..13], &[memory_file(REGION_SIZE)]);
    for byte in &table[13..] {
        client.send_raw(&[*byte], &[]);
    }
    assert_eq!(client.reply(SET_MEM_TABLE), u64_bytes(0));
    client.set_up_ring(0, 128, 0);
    for byte in encode(SET_VRING_ENABLE, NEED_REPLY, &state_bytes(0, 1)) {
        client.send_raw(&[byte], &[]);
    }
    assert_eq!(client.reply(SET_VRING_ENABLE), u64_bytes(0));
    f.device.expect(&["start 0 base=0 size=128 kick call"]);
    // And many messages in one piece.
    client.send_raw(&encode(GET_QUEUE_NUM, 0, &[]).repeat(50), &[]);
    (0..50).for_each(|_| assert_eq!(client.reply(GET_QUEUE_NUM), u64_bytes(2)));
    client.sync();
}

/// A front end that asks and never reads fills its socket; the server waits for it, and can still be stopped.
#[test]
fn a_front_end_that_does_not_read_does_not_keep_the_server() {
    let mut f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    f.device.expect(&["features 0x130007a44"]);
    let request = encode(GET_CONFIG, 0, &config_bytes(0, 256, 0, &[]));
    // Until nobody takes anything for a while: then the server waits for room for a reply.
    client.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    while (&client.stream).write_all(&request).is_ok() {}
    f.stop();
    assert_eq!(f.device.until_gone(), ["gone"]);
}

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    fn word(&mut self) -> u32 {
        let small = self.next(3);
        let big = self.next(1 << 32);
        [u32::try_from(small).unwrap(), 128, u32::try_from(big).unwrap()]
            [usize::try_from(self.next(3)).unwrap()]
    }

    /// A request that is right, or nearly.
    fn message(&mut self) -> (Vec<u8>, Vec<OwnedFd>) {
        let queue = u32::try_from(self.next(3)).unwrap();
        let request = u32::try_from(self.next(45)).unwrap();
        let mut fds: Vec<OwnedFd> = (0..self.next(3)).map(|_| event()).collect();
        let slot = self.next(4);
        let mut payload = match request {
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => u64_bytes(queue.into()),
            SET_VRING_ADDR => addr_bytes(queue, ring_addr(queue)),
            SET_MEM_TABLE | ADD_MEM_REG | REM_MEM_REG => {
                fds = vec![memory_file(REGION_SIZE)];
                let single = single_region_bytes(region(slot));
                if request == SET_MEM_TABLE { table_bytes(&[region(0)]) } else { single }
            }
            SET_FEATURES | SET_PROTOCOL_FEATURES => {
                u64_bytes(1 << 30 | self.next(16) << 9 & 1 << 9)
            }
            GET_CONFIG | SET_CONFIG => config_bytes(self.word(), self.word(), 0, &[0; 60]),
            _ => state_bytes(queue, self.word()),
        };
        match self.next(8) {
            0 => payload.truncate(usize::try_from(self.next(40)).unwrap()),
            1 => payload.iter_mut().for_each(|b| *b = u8::try_from(self.next(256)).unwrap()),
            _ => {}
        }
        let flags = if self.next(2) == 0 { NEED_REPLY } else { 0 };
        (encode(request, flags, &payload), fds)
    }
}

/// Many connections of random requests; then everything is as before.
#[test]
fn random_conversations_leave_nothing_behind() {
    let _alone = ALONE.write().unwrap_or_else(PoisonError::into_inner);
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = || {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|l| l.contains("(deleted)")).count()
    };
    let f = Fixture::alone();
    // Counted while a connection is served: then the one before it is closed.
    let settled = || {
        let client = f.connect();
        client.sync();
        let counts = (count(), maps());
        drop(client);
        f.device.until_gone();
        counts
    };
    let before = settled();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..200 {
        let client = f.connect();
        if round % 2 == 0 {
            client.start();
        } else {
            client.handshake(None);
        }
        for _ in 0..100 {
            let (message, fds) = random.message();
            client.send_raw(&message, &fds);
        }
        client.stream.shutdown(Shutdown::Write).unwrap();
        (&client.stream).read_to_end(&mut Vec::new()).unwrap();
        f.device.until_gone();
    }
    assert_eq!(settled(), before);
}

/// What a front end must say before its rings run, in the wrong order and again and again: when all is said, they run.
#[test]
fn out_of_order_and_repeated() {
    let f = Fixture::new();
    let client = f.connect();
    let offered = client.get_u64(GET_FEATURES);
    client.set(SET_PROTOCOL_FEATURES, &u64_bytes(client.get_u64(GET_PROTOCOL_FEATURES)), &[]);
    for round in 0..3 {
        for _ in 0..2 {
            client.set(SET_VRING_ENABLE, &state_bytes(0, 1), &[]);
            client.set(SET_VRING_KICK, &u64_bytes(0), &[event()]);
            client.set(SET_VRING_ADDR, &addr_bytes(0, ring_addr(0)), &[]);
        }
        client.set(SET_VRING_BASE, &state_bytes(0, 7), &[]);
        client.set(SET_VRING_NUM, &state_bytes(0, 128), &[]);
        client.set(SET_VRING_KICK, &u64_bytes(0), &[event()]);
        client.give_memory();
        client.sync();
        if round == 0 {
            assert_eq!(f.device.rest(), Vec::<String>::new(), "without features nothing runs");
        }
        client.set(SET_FEATURES, &u64_bytes(offered), &[]);
        client.set(SET_FEATURES, &u64_bytes(offered), &[]);
        client.sync();
        let calls = f.device.rest();
        assert!(calls.iter().any(|c| c.starts_with("start 0 base=7 size=128")), "{calls:?}");
        assert_eq!(f.device.running(), 1, "{calls:?}");
        assert_eq!([0; 3].map(|_| client.get_base(0)), [7; 3]);
        assert_eq!(f.device.running(), 0);
        f.device.rest();
    }
}

/// Who has a resize to tell is not kept by a front end that says more and more on the channel for it.
#[test]
fn a_flooded_channel_keeps_nobody() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    let (theirs, ours) = UnixStream::pair().unwrap();
    assert!(client.ask(SET_BACKEND_REQ_FD, &[], &[ours.into()]));
    let (full, flood) = (Barrier::new(2), [7; 1 << 16]);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            (&theirs).write_all(&flood).unwrap_or_default();
            full.wait();
            // Until nobody listens any more.
            while (&theirs).write_all(&flood).is_ok() {}
        });
        full.wait();
        let change = f.server.as_ref().unwrap().config_change();
        while change.changed() != Told::NoChannel {}
    });
    client.sync();
}
