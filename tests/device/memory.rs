//! Memory that is taken away while requests write into it, and memory in as many pieces as there may be.

use serde_json::json;
use vub_client::blk::Request;
use vub_client::{MemStyle, Options, Status};

use crate::common::{Disk, ENGINES, FileDisk, MIB, Random, config, eventually, small};

/// Reads that a slow disk has not answered are under way into a region that goes: the reply comes after the last byte.
#[test]
fn nothing_is_written_into_memory_that_was_taken_away() {
    for mem_style in [MemStyle::Slots, MemStyle::Table] {
        let disk = Disk::of(
            json!({
                "driver": "null-co", "node-name": "root", "read-zeroes": true,
                "latency-ns": 200_000_000u64,
            }),
            config(),
        );
        let mut client = disk.connect(Options { queues: 4, mem_style, ..small() });
        let region = client.plug_memory(1 << 20).unwrap();
        let gpa = client.mem().regions()[region].0.gpa;
        let whole = client.mem().view(gpa, 1 << 20).unwrap();
        whole.fill(0xee);
        for q in client.queues_mut() {
            for _ in 0..8 {
                let buf = q.mem().alloc_in(region, 16 << 10, 4096).unwrap();
                q.submit(Request::read(0, vec![buf])).unwrap();
            }
        }
        // All are taken, none is done.
        eventually("the requests are taken", || {
            client.queues_mut().iter_mut().all(|q| {
                let ring = q.ring();
                ring.mem().avail_event() == ring.next_avail()
            })
        });
        assert!(whole.to_vec().iter().all(|b| *b == 0xee), "the disk is too fast for this test");
        client.unplug_memory(region).unwrap();
        let then = whole.to_vec();
        for q in client.queues_mut() {
            assert!(q.wait_all().unwrap().iter().all(|done| done.status == Status::Ok));
            q.read(0, &mut [0; 512]).unwrap();
        }
        client.stop().unwrap();
        assert_eq!(then.iter().filter(|b| **b == 0).count(), 4 * 8 * (16 << 10));
        assert!(whole.to_vec() == then, "written after the reply");
    }
}

/// All 509 slots, each read into; then every other one goes, from the middle of things.
#[test]
fn as_many_regions_as_there_may_be() {
    let file = FileDisk::new(MIB, ENGINES[2], config());
    let mut client = file.disk.connect(Options { mem_style: MemStyle::Slots, ..small() });
    let content = Random(3).bytes(8192);
    client.queue(0).write(0, &content).unwrap();
    while client.mem().regions().len() < 509 {
        client.plug_memory(8192).unwrap();
    }
    client.plug_memory(8192).expect_err("one more than there may be");
    assert!(client.mem().remove_region(509).is_some());
    let check = |client: &mut vub_client::Client| {
        for region in 1..client.mem().regions().len() {
            let buf = client.mem().alloc_in(region, 8192, 4096).unwrap();
            let done = client.queue(0).run(Request::read(0, vec![buf])).unwrap();
            assert!(done.status == Status::Ok && done.data() == content, "region {region}");
        }
    };
    check(&mut client);
    for region in (1..509).rev().step_by(2) {
        client.unplug_memory(region).unwrap();
    }
    check(&mut client);
}
