//! The ring driver and the queue against the fake device, in one thread: fully deterministic.

use super::*;
use crate::fake::FakeDevice;
use crate::ring::{RingMem, SIZE_MAX, need_event};

fn pair(size: u16, event_idx: bool, indirect: bool, base: u16) -> (Queue, FakeDevice) {
    let mem = GuestMem::new(1, 4 << 20).unwrap();
    let mut ring = Ring::new(RingMem::new(&mem, size).unwrap(), event_idx);
    ring.reset(base);
    let fake = FakeDevice::new(&mem, ring.mem(), event_idx, Some(vec![0; 1 << 20]));
    let mut queue = Queue::new(0, &mem, ring, false).unwrap();
    queue.indirect = indirect;
    (queue, fake)
}

#[test]
fn data_goes_round_in_every_shape_and_across_the_index_wrap() {
    for (event_idx, indirect) in [(false, false), (true, false), (false, true), (true, true)] {
        let (mut q, mut dev) = pair(16, event_idx, indirect, 65530);
        q.layout = Layout { align: 64, skew: 3, segment: 1000 };
        for i in 0..40_u8 {
            let data = vec![i; 4096];
            let write = q.write_request(u64::from(i), &data).unwrap();
            let tag = q.submit(write).unwrap();
            dev.step();
            let done = q.poll().unwrap().unwrap();
            assert_eq!((done.tag, done.status, done.used_len), (tag, Status::Ok, 1));
            let read = q.read_request(u64::from(i), 4096).unwrap();
            q.submit(read).unwrap();
            dev.step();
            let done = q.poll().unwrap().unwrap();
            assert_eq!((done.status, done.used_len), (Status::Ok, 4097));
            assert!(done.data() == data);
        }
        assert_eq!((q.in_flight(), q.ring().free()), (0, 16));
    }
}

#[test]
fn ring_refuses_more_than_it_has_and_recovers() {
    let (mut q, mut dev) = pair(8, true, false, 0);
    let mut sent = 0;
    while q.push(Request::flush()).is_ok() {
        sent += 1;
    }
    assert_eq!(sent, 4);
    assert_eq!(dev.step().0, 0, "nothing is visible before the publish");
    q.kick().unwrap();
    assert_eq!(dev.step().0, 4);
    assert_eq!(q.wait_all().unwrap().len(), 4);
    assert_eq!(q.ring().free(), 8);
    assert!(matches!(q.ring().add(&[]), Err(Error::RingFull)));
}

#[test]
fn notifications_are_asked_for_and_suppressed_on_both_sides() {
    for event_idx in [false, true] {
        let (mut q, mut dev) = pair(64, event_idx, true, 100);
        dev.arm(true);
        q.push(Request::flush()).unwrap();
        assert!(q.kick().unwrap(), "an armed device is kicked");
        assert!(!q.ring().arm());
        assert!(dev.step().1, "an armed driver is interrupted");
        q.ring().disarm();
        dev.arm(false);
        for _ in 0..3 {
            q.push(Request::flush()).unwrap();
            assert!(!q.kick().unwrap(), "a busy device is not kicked");
        }
        assert!(!dev.step().1, "a polling driver is not interrupted");
        assert!(q.ring().arm(), "arming finds what has come");
        assert_eq!(q.wait_all().unwrap().len(), 4);
        q.push(Request::flush()).unwrap();
        q.kick().unwrap();
        assert!(dev.arm(true), "the device finds what came before it armed");
    }
}

#[test]
fn the_device_cannot_confuse_the_driver() {
    let (mut q, _dev) = pair(8, true, false, 0);
    q.submit(Request::flush()).unwrap();
    let head = q.ring().heads_in_flight()[0];
    for (i, id) in (0_u16..).zip([7, u32::from(u16::MAX), 1 << 20]) {
        q.ring().mem().set_used_elem(i, crate::ring::Used { id, len: 0 });
        q.ring().mem().set_used_idx(i + 1);
        assert!(matches!(q.poll(), Err(Error::UnexpectedUsed(bad)) if bad == id));
    }
    let used = crate::ring::Used { id: u32::from(head), len: 1 };
    q.ring().mem().set_used_elem(3, used);
    q.ring().mem().set_used_idx(4);
    assert_eq!(q.poll().unwrap().unwrap().status, Status::NotWritten);
    q.ring().mem().set_used_elem(4, used);
    q.ring().mem().set_used_idx(5);
    assert!(matches!(q.poll(), Err(Error::UnexpectedUsed(_))), "a head completes once");
}

#[test]
fn errors_carry_the_status_and_waits_end() {
    let (mut q, mut dev) = pair(8, true, false, 0);
    let read = q.read_request(1 << 40, 512).unwrap();
    q.submit(read).unwrap();
    q.submit(Request::bare(77, 0)).unwrap();
    dev.step();
    assert_eq!(q.wait().unwrap().status.ok().unwrap_err().status(), Some(Status::IoErr));
    assert_eq!(q.wait().unwrap().status, Status::Unsupp);
    for polling in [false, true] {
        (q.polling, q.timeout) = (polling, Duration::from_millis(20));
        assert!(q.flush().unwrap_err().is_timeout());
    }
}

#[test]
fn event_index_arithmetic() {
    assert!(need_event(5, 6, 5));
    assert!(!need_event(6, 6, 5));
    assert!(need_event(65535, 0, 65535));
    assert!(need_event(65535, 3, 65530));
    assert!(!need_event(4, 4, 4));
    assert!(
        std::panic::catch_unwind(|| {
            let mem = GuestMem::new(1, 1 << 20).unwrap();
            Ring::new(RingMem::new(&mem, 24).unwrap(), false)
        })
        .is_err()
    );
    const { assert!(SIZE_MAX.is_power_of_two()) };
}
