//! Many queues at once, on overlapping ranges, against the model; engines, workers, ring positions.

use std::thread;

use vhost_user_blk::export::ExportConfig;
use vub_client::{Base, Client, Options};

use crate::common::{Disk, ENGINES, Engine, FileDisk, Image, LIMIT, config};
use crate::model::Model;

const SECTORS: u64 = 512;
const DEPTH: usize = 128;

/// Drives all queues of `client`, each in a thread.
fn drive(client: &mut Client, model: &Model, seed: u64, ops: usize) {
    thread::scope(|s| {
        for q in client.queues_mut() {
            let seed = seed * 1000 + u64::from(q.index());
            s.spawn(move || model.drive(q, seed, ops, DEPTH));
        }
    });
    model.check_all(client.queue(0));
}

fn options(queues: u16, way: u64) -> Options {
    Options {
        queues,
        // Direct chains of a request take up to six descriptors.
        queue_size: 1024,
        event_idx: way & 1 == 0,
        indirect: way & 2 == 0,
        base: if way & 4 == 0 { 0 } else { 65_000 },
        mem_size: 64 << 20,
        timeout: LIMIT,
        ..Options::default()
    }
}

fn round(engine: Engine, queues: u16, threads: usize, way: u64, ops: usize) {
    eprintln!("{engine:?}, {queues} queues, {threads} threads, way {way}");
    let config = ExportConfig { num_queues: 16, threads, ..config() };
    let file = FileDisk::new(SECTORS * 512, engine, config);
    let mut client = file.disk.connect(options(queues, way));
    let model = Model::new(SECTORS);
    drive(&mut client, &model, way, ops);
}

#[test]
fn one_queue() {
    for (engine, way) in ENGINES.into_iter().zip(0..) {
        round(engine, 1, 1, way, 1500);
    }
}

#[test]
fn two_queues_of_one_worker() {
    for (engine, way) in ENGINES.into_iter().zip(4..) {
        round(engine, 2, 1, way, 1000);
    }
}

#[test]
fn four_queues() {
    for (engine, way) in ENGINES.into_iter().zip(0..) {
        round(engine, 4, 4, 7 - way, 800);
    }
}

#[test]
fn sixteen_queues_of_two_workers() {
    for (engine, way) in ENGINES.into_iter().zip(0..) {
        round(engine, 16, 2, way, 150);
    }
}

#[test]
fn sixteen_queues_of_sixteen_workers() {
    round(ENGINES[2], 16, 16, 4, 200);
}

#[test]
fn more_queues_offered_than_used() {
    let file =
        FileDisk::new(SECTORS * 512, ENGINES[2], ExportConfig { num_queues: 16, ..config() });
    let mut client = file.disk.connect(options(3, 0));
    assert_eq!(client.queue_num(), 16);
    assert_eq!(client.config().num_queues(), 16);
    // QEMU enables all of them, configured or not.
    for unused in 3..16 {
        client.conn.set_vring(vub_client::proto::req::SET_VRING_ENABLE, unused, 1).unwrap();
    }
    let model = Model::new(SECTORS);
    drive(&mut client, &model, 1, 200);
    for unused in 3..16 {
        assert_eq!(client.conn.get_vring_base(unused).unwrap(), 0);
    }
    drive(&mut client, &model, 2, 200);
}

#[test]
fn rings_go_on_where_they_stopped() {
    let file = FileDisk::new(SECTORS * 512, ENGINES[2], config());
    let model = Model::new(SECTORS);
    let mut client = file.disk.connect(Options { base: 65_500, ..options(2, 0) });
    for seed in 0..10 {
        drive(&mut client, &model, seed, 60);
        let used: Vec<u32> =
            client.queues_mut().iter_mut().map(|q| q.ring().mem().used_idx().into()).collect();
        if seed % 3 == 0 {
            // Another connection: QEMU's way and cloud-hypervisor's, used_idx is not 0.
            client.hang_up().unwrap();
            let base = if seed % 2 == 0 { Base::Used } else { Base::Avail };
            client.reconnect(file.disk.path(), base).unwrap();
        } else if seed % 3 == 1 {
            assert_eq!(client.stop().unwrap(), used, "nothing was in flight");
            (0..2).for_each(|i| client.start_queue(i).unwrap());
        } else {
            (0..2).for_each(|i| client.enable_queue(i, false).unwrap());
            (0..2).for_each(|i| client.enable_queue(i, true).unwrap());
        }
    }
}

/// Requests made while the ring is stopped are found when it starts again, without a kick.
#[test]
fn requests_wait_for_a_stopped_ring() {
    let file = FileDisk::new(SECTORS * 512, ENGINES[2], config());
    let mut client = file.disk.connect(options(1, 0));
    for round in 0..20 {
        if round % 2 == 0 {
            client.enable_queue(0, false).unwrap();
        } else {
            client.stop_queue(0).unwrap();
        }
        let q = client.queue(0);
        for _ in 0..5 {
            let read = q.read_request(0, 512).unwrap();
            q.push(read).unwrap();
        }
        q.ring().publish();
        q.ring().needs_kick();
        if round % 2 == 0 {
            client.enable_queue(0, true).unwrap();
        } else {
            client.start_queue(0).unwrap();
        }
        assert_eq!(client.queue(0).wait_all().unwrap().len(), 5);
    }
}

/// Two exports of one process: two files, two guests, each sees its own.
#[test]
fn two_exports_of_one_graph() {
    let images = [Image::new(SECTORS * 512), Image::new(SECTORS * 512)];
    let disks: Vec<Disk> =
        images.iter().map(|image| Disk::of(image.options(ENGINES[2], "unmap"), config())).collect();
    let models = [Model::new(SECTORS), Model::new(SECTORS)];
    thread::scope(|s| {
        for (i, (disk, model)) in disks.iter().zip(&models).enumerate() {
            s.spawn(move || {
                let mut client = disk.connect(options(2, i as u64));
                drive(&mut client, model, i as u64, 300);
            });
        }
    });
}
