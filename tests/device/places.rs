//! What a worker owes to drivers that move guest data about: it says which places are in use, and does not take the bytes'
//! stability for the tables'.

use serde_json::json;
use vhost_user_blk::export::ExportConfig;
use vub_client::{Client, Status};

use crate::common::probe::{Asked, Opener, Probe};
use crate::common::{Disk, MIB, SILENCE, config, eventually, small};

/// Whether what was taken away before this call could be given to somebody else now.
fn free_now(disk: &Disk) -> bool {
    let grace = disk.graph.grace();
    grace.passed(grace.tag())
}

/// A read that is in the kernel.
fn begin(client: &mut Client, n: u16) {
    let q = client.queue(0);
    let read = q.read_request(0, 512).unwrap();
    q.submit(read).unwrap();
    eventually("the request is taken", || q.ring().mem().avail_event() == n);
}

#[test]
fn the_place_of_a_fast_lane_request_is_in_use_until_its_completion() {
    let (disk, probe) = Probe::piped(config());
    let _open = Opener(probe.clone());
    let mut client = disk.connect(small());
    assert!(free_now(&disk));
    begin(&mut client, 1);
    let tag = disk.graph.grace().tag();
    begin(&mut client, 2);
    client.conn.expect_silence(SILENCE).unwrap();
    assert!(!disk.graph.grace().passed(tag));
    probe.pour(&[1; 1024]);
    for done in client.queue(0).wait_all().unwrap() {
        assert_eq!((done.status, done.data()), (Status::Ok, vec![1; 512]));
    }
    assert!(disk.graph.grace().passed(tag));
    // Cut short by the kernel, and done again in the slow lane.
    begin(&mut client, 3);
    assert!(!free_now(&disk));
    probe.hold();
    probe.pour(&[1; 100]);
    probe.wait_held(1);
    eventually("the fast lane has let go of it", || free_now(&disk));
    probe.release();
    let done = client.queue(0).wait().unwrap();
    assert_eq!((done.status, done.data()), (Status::Ok, vec![0; 512]));
    assert!(probe.take_log().contains(&Asked::Read(0, 512)));
    assert!(free_now(&disk));
}

#[test]
fn what_is_done_at_once_leaves_nothing_behind() {
    let disk = Disk::null(MIB, config());
    let mut client = disk.connect(small());
    for _ in 0..50 {
        let q = client.queue(0);
        q.read(0, &mut [0; 512]).unwrap();
        q.write(0, &[0; 512]).unwrap();
        q.read(0, &mut vec![0; 1 << 19]).unwrap();
        q.flush().unwrap();
        assert!(free_now(&disk));
    }
}

/// As soon as tables wait in memory, a stable write in place must make them stable: the driver does that.
#[test]
fn a_stable_write_to_an_unstable_place_is_for_the_driver() {
    for writethrough in [false, true] {
        let (graph, probe) = Probe::graph(1 << 20, json!({"in-place": true}));
        let disk = Disk::serve(graph, "root", ExportConfig { writethrough, ..config() });
        let mut client = disk.connect(small());
        for unstable in [false, true, false, true] {
            probe.set_unstable(unstable);
            client.queue(0).write(0, &[1; 512]).unwrap();
            let asked =
                if writethrough && unstable { vec![Asked::Write(0, 512, true)] } else { vec![] };
            assert_eq!(probe.take_log(), asked, "write-through {writethrough}, {unstable}");
        }
        // Readers do not care.
        client.queue(0).read(0, &mut [0; 512]).unwrap();
    }
}

/// Where stability is never asked for, there is nothing to wait for.
#[test]
fn no_flush_makes_unstable_places_good_enough() {
    let options = json!({"in-place": true, "cache": {"no-flush": true}});
    let (graph, probe) = Probe::graph(1 << 20, options);
    let disk = Disk::serve(graph, "root", ExportConfig { writethrough: true, ..config() });
    probe.set_unstable(true);
    disk.connect(small()).queue(0).write(0, &[1; 512]).unwrap();
    assert_eq!(probe.take_log(), []);
}
