//! Snapshots of cloud-hypervisor and crosvm: the device's state through a pipe.

use std::fs::File;
use std::io::{Read, Write, pipe};
use std::os::fd::OwnedFd;

use vhost_user_blk::vhost_user::message::*;

use crate::client::*;
use crate::fixture::Fixture;

/// No descriptor comes back; it worked.
const GOOD: u64 = 1 << 8;
const BAD: u64 = 1 << 8 | 1;

fn transfer(client: &Client, direction: u32, phase: u32, fd: impl Into<OwnedFd>) -> u64 {
    let payload = [direction, phase].map(u32::to_ne_bytes).concat();
    client.set(SET_DEVICE_STATE_FD, &payload, &[fd.into()]);
    u64::from_ne_bytes(client.reply(SET_DEVICE_STATE_FD).try_into().unwrap())
}

fn save(client: &Client) -> Vec<u8> {
    let (mut reader, writer) = pipe().unwrap();
    assert_eq!(transfer(client, STATE_SAVE, 0, writer), GOOD);
    // To the end: the back end has closed its end.
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    assert_eq!(client.get_u64(CHECK_DEVICE_STATE), 0);
    state
}

/// What CHECK_DEVICE_STATE says to `state`.
fn load(client: &Client, state: &[u8]) -> u64 {
    let (reader, mut writer) = pipe().unwrap();
    assert_eq!(transfer(client, STATE_LOAD, 0, reader), GOOD);
    // It may be refused before all is written.
    writer.write_all(state).unwrap_or_default();
    drop(writer);
    client.get_u64(CHECK_DEVICE_STATE)
}

#[test]
fn c5_x5_a_state_is_saved_and_loaded() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    assert_eq!(client.get_base(0), 0);
    let state = save(&client);
    assert!(!state.is_empty() && state.len() < 512);
    f.device.rest();
    // The same connection goes on after a snapshot.
    client.set_up_ring(0, 128, 3);
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]));
    f.device.expect(&["start 0 base=3 size=128 kick call"]);
    drop(client);
    f.device.until_gone();

    // Restored before the features are negotiated, in pieces.
    let client = f.connect();
    let protocol = client.get_u64(GET_PROTOCOL_FEATURES);
    client.set(SET_PROTOCOL_FEATURES, &u64_bytes(protocol), &[]);
    let (reader, mut writer) = pipe().unwrap();
    assert_eq!(transfer(&client, STATE_LOAD, 0, reader), GOOD);
    for byte in &state {
        writer.write_all(&[*byte]).unwrap();
        client.sync();
    }
    drop(writer);
    assert_eq!(client.get_u64(CHECK_DEVICE_STATE), 0);
    f.device.expect(&["config 32 01"]);
    assert_eq!(client.get_u64(CHECK_DEVICE_STATE), 1, "checked once");
}

#[test]
fn c5_states_that_are_none_change_nothing() {
    let f = Fixture::new();
    let client = f.connect();
    let good = save(&client);
    let longer = [&good[..], &[0]].concat();
    let mut newer = good.clone();
    newer[8] += 1;
    let huge = vec![0x55; 200_000];
    for bad in [&[][..], b"QEMU", &good[..good.len() - 1], &longer, &newer, &huge] {
        assert_eq!(load(&client, bad), 1, "{} bytes", bad.len());
        client.sync();
    }
    assert!(f.device.rest().is_empty());
    assert_eq!(load(&client, &good), 0);
    f.device.expect(&["config 32 01"]);
}

#[test]
fn c5_transfers_that_go_wrong() {
    let f = Fixture::new();
    let client = f.connect();
    assert_eq!(client.get_u64(CHECK_DEVICE_STATE), 1, "there was none");
    for (direction, phase) in [(2, 0), (STATE_SAVE, 1), (STATE_LOAD, 1)] {
        // Both ends are there: nothing else is wrong.
        let (reader, writer) = pipe().unwrap();
        let fd: OwnedFd = if direction == STATE_LOAD {
            reader.try_clone().unwrap().into()
        } else {
            writer.into()
        };
        assert_eq!(transfer(&client, direction, phase, fd), BAD, "{direction} {phase}");
    }
    let writer = || pipe().unwrap().1;
    // Nobody reads, nobody can read, nobody ever will.
    assert_eq!(transfer(&client, STATE_SAVE, 0, writer()), BAD);
    let (reader, mut full) = pipe().unwrap();
    full.write_all(&[0; 65536]).unwrap();
    assert_eq!(transfer(&client, STATE_SAVE, 0, full), BAD);
    assert_eq!(transfer(&client, STATE_SAVE, 0, File::open("/dev/null").unwrap()), BAD);
    assert_eq!(client.get_u64(CHECK_DEVICE_STATE), 1);
    drop(reader);
    // No descriptor at all.
    client.set(SET_DEVICE_STATE_FD, &[0; 8], &[]);
    assert_eq!(client.reply(SET_DEVICE_STATE_FD), u64_bytes(BAD));
    // A sender that goes to sleep: the check says so, and the connection goes on.
    let (reader, writer) = pipe().unwrap();
    assert_eq!(transfer(&client, STATE_LOAD, 0, reader), GOOD);
    assert_eq!(client.get_u64(CHECK_DEVICE_STATE), 1);
    // One that another takes the place of, and one that the end of the connection ends.
    let kept: Vec<_> = (0..20)
        .map(|_| {
            let (reader, writer) = pipe().unwrap();
            assert_eq!(transfer(&client, STATE_LOAD, 0, reader), GOOD);
            writer
        })
        .collect();
    drop(client);
    f.device.until_gone();
    for mut writer in kept.into_iter().chain([writer]) {
        assert!(writer.write(&[0]).is_err(), "nobody reads any more");
    }
    // While a ring runs there is no state to be had.
    let client = f.connect();
    client.start();
    assert_eq!(transfer(&client, STATE_SAVE, 0, pipe().unwrap().1), BAD);
}
