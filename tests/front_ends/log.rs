//! The dirty log, as a front end asks for it.

use std::os::fd::OwnedFd;

use vhost_user_blk::vhost_user::message::*;

use crate::client::*;
use crate::fixture::Fixture;

const LOG_ALL: u64 = 1 << 26;

fn place(size: u64, mmap_offset: u64) -> Vec<u8> {
    LogPlace { size, mmap_offset }.to_bytes()
}

/// Gives a log; answers the reply.
fn give(client: &Client, payload: &[u8], fds: &[OwnedFd]) -> Vec<u8> {
    client.set(SET_LOG_BASE, payload, fds);
    client.reply(SET_LOG_BASE)
}

#[test]
fn q9_c6_logs_come_change_and_go_while_a_ring_runs() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    let features = client.get_u64(GET_FEATURES);
    let set_features = |bits| assert!(client.ask(SET_FEATURES, &u64_bytes(bits), &[]));
    let set_addr = |flags, log| {
        let addr = VringAddr { flags, log, ..ring_addr(0) };
        assert!(client.ask(SET_VRING_ADDR, &addr_bytes(0, addr), &[]));
    };
    // Without a log there is nothing to be said to the device.
    set_features(features & !LOG_ALL);
    assert_eq!(give(&client, &place(4096, 0), &[memory_file(4096)]), place(4096, 0));
    f.device.expect(&["log 0 off"]);
    set_features(features);
    f.device.expect(&["log 0 data=true used=none"]);
    set_addr(1, 0x1234);
    f.device.expect(&["log 0 data=true used=0x1234"]);
    set_addr(1, 0x1234);
    // Another one, at an odd place of its file, with need_reply: one reply.
    client.send_raw(&encode(SET_LOG_BASE, NEED_REPLY, &place(100, 5000)), &[memory_file(5100)]);
    assert_eq!(client.reply(SET_LOG_BASE), place(100, 5000));
    f.device.expect(&["log 0 data=true used=0x1234"]);
    // A ring that starts meanwhile logs, too.
    client.set_up_ring(1, 64, 0);
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(1, 1), &[]));
    f.device.expect(&["start 1 base=0 size=64 kick call log"]);
    set_features(features & !LOG_ALL);
    f.device.expect(&["log 0 data=false used=0x1234", "log 1 off"]);
    set_addr(0, 0);
    f.device.expect(&["log 0 off"]);
    assert!(client.ask(SET_LOG_FD, &[], &[event()]));
    assert!(!client.ask(SET_LOG_FD, &[], &[]));
    client.sync();
    assert!(f.device.rest().is_empty());
    assert!(f.device.violations().is_empty());
}

#[test]
fn q9_a_log_that_cannot_be_had_is_no_log() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    let features = client.get_u64(GET_FEATURES);
    assert_eq!(give(&client, &place(4096, 0), &[memory_file(4096)]).len(), 16);
    f.device.expect(&["log 0 data=true used=none"]);
    let file = || memory_file(4096);
    let bad: Vec<(Vec<u8>, Vec<OwnedFd>)> = vec![
        (place(0, 0), vec![file()]),
        (place(4097, 0), vec![file()]),
        (place(4096, 1), vec![file()]),
        (place(u64::MAX, 0), vec![file()]),
        (place(4096, u64::MAX), vec![file()]),
        (place(u64::MAX, u64::MAX), vec![file()]),
        (place(1 << 63, 1 << 63), vec![file()]),
        (place(4096, 0), vec![]),
        (place(4096, 0), vec![file(), file()]),
        (place(4096, 0), vec![event()]),
        (place(4096, 0), vec![std::fs::File::open("/dev/zero").unwrap().into()]),
    ];
    for (payload, fds) in bad {
        assert!(give(&client, &payload, &fds).is_empty());
        // The last good one is not written any more, for the front end has given it up: the ring must rest.
        f.device.expect(&["stop 0"]);
        assert!(!client.ask(SET_FEATURES, &u64_bytes(features), &[]), "LOG_ALL without a log");
        assert!(f.device.rest().is_empty());
        assert_eq!(give(&client, &place(4096, 0), &[file()]), place(4096, 0));
        f.device.expect(&["start 0 base=0 size=128 kick call log"]);
    }
    assert!(give(&client, &[0; 15], &[file()]).is_empty(), "a payload cut short");
    assert!(client.ask(SET_FEATURES, &u64_bytes(features), &[]));
    assert!(f.device.rest().is_empty());
    // Nor does it have to rest when there is nothing to be logged any more.
    assert!(give(&client, &place(0, 0), &[file()]).is_empty());
    assert!(client.ask(SET_FEATURES, &u64_bytes(features & !LOG_ALL), &[]));
    f.device.expect(&["stop 0", "start 0 base=0 size=128 kick call"]);
    client.sync();
}

/// Without LOG_SHMFD the reply is the ordinary one, if it is asked for.
#[test]
fn q9_no_reply_that_was_not_negotiated() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(Some(1 << 3));
    client.set(SET_LOG_BASE, &place(4096, 0), &[memory_file(4096)]);
    client.sync();
    assert!(client.ask(SET_LOG_BASE, &place(4096, 0), &[memory_file(4096)]));
    assert!(!client.ask(SET_LOG_BASE, &place(4097, 0), &[memory_file(4096)]));
    assert_eq!(f.device.next_call(), "features 0x130007a44");
    assert!(f.device.rest().is_empty());
}
