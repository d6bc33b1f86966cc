//! crosvm.

use vhost_user_blk::vhost_user::message::*;

use crate::client::*;
use crate::fixture::Fixture;
use crate::mock::Mock;
use crate::script::play;

#[test]
fn x1_x2_x4_x7_start_sleep_wake_shutdown() {
    play(&Fixture::new(), include_str!("scripts/crosvm"));
}

#[test]
fn x1_as_many_queues_as_the_device_has() {
    for queues in [1, 7, 256] {
        let f = Fixture::with_queues(queues);
        assert_eq!(f.connect().get_u64(GET_QUEUE_NUM), u64::from(queues));
    }
}

#[test]
fn x2_any_slice_of_the_configuration_space() {
    let f = Fixture::new();
    let client = f.connect();
    for offset in (0..=256).step_by(5) {
        for size in [0, 1, 2, 4, 8, 57, 60, 96, 256] {
            // Whether room for the contents comes with the request or not.
            for room in [0, usize::try_from(size).unwrap()] {
                let request = config_bytes(offset, size, 1, &vec![0; room]);
                let reply = client.get(GET_CONFIG, &request);
                let from = usize::try_from(offset % 256).unwrap();
                let contents: Vec<u8> = (from..from + usize::try_from(size).unwrap())
                    .map(|i| if i < 256 { Mock::config_byte(i) } else { 0 })
                    .collect();
                if from + contents.len() <= 256 {
                    assert_eq!(reply, config_bytes(offset, size, 1, &contents));
                } else {
                    assert!(reply.is_empty(), "outside: an error is a reply without payload");
                }
            }
        }
    }
    client.sync();
}

#[test]
fn x3_any_slice_is_written() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    f.device.expect(&["features 0x130007a44"]);
    assert!(client.ask(SET_CONFIG, &config_bytes(30, 4, 0, &[1, 2, 3, 4]), &[]));
    f.device.expect(&["config 30 01020304"]);
    assert!(!client.ask(SET_CONFIG, &config_bytes(30, 4, 0, &[1, 2, 3]), &[]), "cut short");
    assert!(!client.ask(SET_CONFIG, &config_bytes(254, 4, 0, &[0; 4]), &[]), "outside");
    client.sync();
    assert!(f.device.rest().is_empty());
}
