//! The program is killed while a guest's requests are in flight, and another takes its place: with the in-flight region, the
//! guest notices nothing but a pause. `VUB_KILLS` is the number of kills of each soak.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;
mod format;
#[path = "../qcow2_write/model.rs"]
#[allow(dead_code, reason = "power losses are qcow2_write's")]
mod model;
mod place;
mod soak;

/// What the model asks its bed.
mod bed {
    /// Nothing is too hard for us.
    pub fn gentle() -> bool {
        false
    }
}

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use vub_client::blk::Request;
use vub_client::{Base, Client, MemStyle, Options, Status};

use common::{LIMIT, eventually};
use place::{Place, in_flight, shown, used_idx};

/// Requests in flight in the tests of one kill.
const DEPTH: usize = 64;

fn options(queues: u16, packed: bool) -> Options {
    let limits = Options { timeout: LIMIT, ..Options::default() };
    Options { queues, packed, inflight: true, mem_size: 128 << 20, ..limits }
}

/// What front ends may say of where a ring goes on after a crash. Of a packed one they do not know it.
fn bases(packed: bool) -> [Base; 3] {
    if packed {
        [0x8000_8000, 0x0007_8070, 12345].map(Base::At)
    } else {
        [Base::Used, Base::Avail, Base::At(12345)]
    }
}

/// A disk on which every request takes so long.
fn slow(latency: Duration) -> String {
    let ns = latency.as_nanos();
    format!("driver=null-co,node-name=root,size=1048576,read-zeroes=on,latency-ns={ns}")
}

fn submit_reads(client: &mut Client, n: usize) -> Vec<u64> {
    let q = client.queue(0);
    let tags = (0..n)
        .map(|_| {
            let request = q.read_request(0, 512).unwrap();
            q.push(request).unwrap()
        })
        .collect();
    q.kick().unwrap();
    tags
}

/// Killed with all of its requests in flight; whatever base the front end gives, all end, each once.
#[test]
fn what_was_in_flight_is_done_by_the_successor() {
    killed_with_all_in_flight(&options(1, false));
}

#[test]
fn what_was_in_flight_on_a_packed_ring_is_done_by_the_successor() {
    killed_with_all_in_flight(&options(1, true));
    // Chains in the ring itself, and a ring that is no power of two: rounds end amid chains.
    let direct = Options { indirect: false, queue_size: 223, ..options(1, true) };
    killed_with_all_in_flight(&direct);
}

fn killed_with_all_in_flight(options: &Options) {
    let mut place = Place::new(slow(Duration::from_millis(300)));
    let mut client = Client::connect(place.socket(), options.clone()).unwrap();
    assert_eq!(client.has_feature(34), options.packed);
    for base in bases(options.packed) {
        let mut tags = submit_reads(&mut client, DEPTH);
        eventually("all are in flight", || in_flight(&client, 0) == DEPTH);
        place.kill();
        // These the successor finds in the available ring.
        tags.extend(submit_reads(&mut client, 10));
        place.restart();
        client.reconnect(place.socket(), base).unwrap();
        let mut done: Vec<u64> = Vec::new();
        for d in client.queue(0).wait_all().unwrap() {
            assert_eq!((d.status, d.data()), (Status::Ok, vec![0; 512]));
            done.push(d.tag);
        }
        done.sort_unstable();
        assert_eq!(done, tags, "each once, {base:?}");
        eventually("nothing is in flight", || in_flight(&client, 0) == 0);
        // The region follows the ring, it does not run ahead.
        let shown = shown(&mut client);
        eventually("the last batch is closed", || used_idx(&client, 0) == shown);
        assert_eq!(client.queue(0).run(Request::flush()).unwrap().status, Status::Ok);
        assert_eq!(client.queue(0).poll().unwrap().map(|d| d.tag), None);
    }
}

/// A successor that is killed before it has done anything has a successor in turn.
#[test]
fn successors_are_killed_too() {
    successors_are_killed(false);
}

#[test]
fn successors_of_a_packed_ring_are_killed_too() {
    successors_are_killed(true);
}

fn successors_are_killed(packed: bool) {
    let mut place = Place::new(slow(Duration::from_millis(300)));
    let mut client = Client::connect(place.socket(), options(1, packed)).unwrap();
    let tags = submit_reads(&mut client, DEPTH);
    eventually("all are in flight", || in_flight(&client, 0) == DEPTH);
    for _ in 0..5 {
        place.kill();
        place.restart();
        client.reconnect(place.socket(), bases(packed)[1]).unwrap();
    }
    let mut done: Vec<u64> =
        client.queue(0).wait_all().unwrap().into_iter().map(|d| d.tag).collect();
    done.sort_unstable();
    assert_eq!(done, tags);
}

/// A front end that stops a ring at once gets everything that was in flight done first: it may forget the region. Here one
/// worker succeeds four, and cannot take all that they had at once.
#[test]
fn a_stop_waits_for_what_is_resubmitted() {
    const EACH: usize = 30;
    let mut place = Place::new(slow(Duration::from_millis(500)));
    let options = Options { mem_size: 256 << 20, ..options(4, false) };
    let mut client = Client::connect(place.socket(), options).unwrap();
    for q in client.queues_mut() {
        for _ in 0..EACH {
            let request = q.read_request(0, 1 << 20).unwrap();
            q.push(request).unwrap();
        }
        q.kick().unwrap();
    }
    eventually("all are in flight", || (0..4).all(|q| in_flight(&client, q) == EACH));
    place.kill();
    place.threads = 1;
    place.restart();
    client.reconnect(place.socket(), Base::Used).unwrap();
    let base = client.stop_queue(3).unwrap();
    assert_eq!((usize::try_from(base).unwrap(), in_flight(&client, 3)), (EACH, 0));
    for q in client.queues_mut().iter_mut().rev() {
        assert_eq!(q.wait_all().unwrap().len(), EACH);
    }
}

/// A region of another ring, or of other rules: the ring does not run, and the log says why. Nothing is lost by it: with a
/// region of its own, the ring goes on.
#[test]
fn a_region_that_is_not_the_rings_is_refused() {
    let mut place = Place::new(slow(Duration::ZERO));
    place.keep_log();
    // A table may be sent again.
    let options = Options { mem_style: MemStyle::Table, ..options(1, true) };
    let mut client = Client::connect(place.socket(), options).unwrap();
    let spoil = |client: &Client, at: u64, bytes: &[u8]| {
        let file = File::from(client.inflight.as_ref().unwrap().1.try_clone().unwrap());
        file.write_all_at(bytes, at).unwrap();
    };
    for (at, value, why) in [
        (8, 2u16, "its version is not known"),
        (10, 64, "it is of a ring of another size"),
        (16, 128, "a used position that the ring has not"),
    ] {
        submit_reads(&mut client, 7);
        assert_eq!(client.queue(0).wait_all().unwrap().len(), 7);
        client.stop().unwrap();
        let mut was = [0; 2];
        let file = File::from(client.inflight.as_ref().unwrap().1.try_clone().unwrap());
        file.read_exact_at(&mut was, at).unwrap();
        spoil(&client, at, &value.to_ne_bytes());
        assert!(client.start().is_err(), "{why}");
        let line = format!("export 'e': queue 0: the in-flight region: {why}");
        eventually(why, || place.log().contains(&line));
        client.stop().unwrap();
        spoil(&client, at, &was);
        client.start().unwrap();
    }
    submit_reads(&mut client, 7);
    assert_eq!(client.queue(0).wait_all().unwrap().len(), 7);
}

/// Stopped and continued with the same region: the base may be anything, and the guest is signalled, as a predecessor may
/// have been killed before it could.
#[test]
fn a_ring_goes_on_where_the_region_says() {
    let place = Place::new(slow(Duration::ZERO));
    let options = Options { mem_style: MemStyle::Table, ..options(1, false) };
    let mut client = Client::connect(place.socket(), options).unwrap();
    for _ in 0..3 {
        submit_reads(&mut client, 7);
        assert_eq!(client.queue(0).wait_all().unwrap().len(), 7);
        client.stop().unwrap();
        client.queue(0).calls().unwrap();
        client.set_base(0, Base::At(777));
        client.start().unwrap();
        client.queue(0).wait_call().unwrap();
    }
    // A guest that boots anew has a region that nobody has used, and the base is the front end's again.
    client.reset_device().unwrap();
    client.inflight = None;
    client.queue(0).reset(40_000);
    client.set_base(0, Base::At(40_000));
    client.queue(0).ring().mem().set_used_idx(40_000);
    client.start().unwrap();
    submit_reads(&mut client, 7);
    assert_eq!(client.queue(0).wait_all().unwrap().len(), 7);
}
