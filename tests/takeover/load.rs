//! A guest that never stops while one program after the other serves it. Every byte is looked at.

use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use vub_client::{Client, Options};

use crate::common::{LIMIT, MIB};
use crate::model::{Load, Model, Stop};
use crate::place::{Place, assert_clean};

const SIZE: u64 = 8 * MIB;
const TAKE_OVERS: usize = 20;

/// One served disk, `s`, on the image `image` of the directory.
pub fn disk(format: &str, queues: u16) -> Place {
    let dir = Place::dir();
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", format, "image", &SIZE.to_string()]);
    assert!(create.current_dir(dir.path()).status().unwrap().success());
    let node = format!(
        "driver={format},node-name=d,discard=unmap,file.driver=file,file.filename=image,file.discard=unmap"
    );
    let export = format!(
        "vhost-user-blk,id=e,node-name=d,writable=on,num-queues={queues},addr.type=unix,addr.path=s"
    );
    Place::start(dir, &["--blockdev", &node, "--export", &export])
}

pub fn options(queues: u16) -> Options {
    Options {
        queues,
        inflight: true,
        backend_channel: true,
        mem_size: 64 << 20,
        mem_regions: 2,
        timeout: LIMIT,
        ..Options::default()
    }
}

/// Stops the load.
struct AtLast<'a>(&'a Stop);

impl Drop for AtLast<'_> {
    fn drop(&mut self) {
        self.0.now();
    }
}

/// Waits until so many requests have ended.
pub fn wait(ended: &Receiver<usize>, n: usize) {
    // What has ended before does not count.
    ended.try_iter().for_each(drop);
    let mut seen = 0;
    while seen < n {
        seen += ended.recv_timeout(LIMIT).expect("requests end");
    }
}

/// Runs a load on all queues of `client` while `during` happens, and then looks at the whole disk.
pub fn under_load(client: &mut Client, model: &Model, during: impl FnOnce(&Receiver<usize>)) {
    let load = Load { seed: 7, depth: 16, cluster: 128, flush_one_in: 20, gentle: false };
    let (stop, (sender, ended)) = (Stop::new(false), channel());
    let mut taken = client.take_queues();
    std::thread::scope(|scope| {
        for (n, q) in (0..).zip(&mut taken) {
            let load = Load { seed: load.seed + n, ..load };
            let (stop, sender) = (&stop, sender.clone());
            scope.spawn(move || model.drive(q, load, stop, &sender));
        }
        drop(sender);
        // Also if that panics: threads are waited for.
        let _stop = AtLast(&stop);
        during(&ended);
    });
    client.put_queues(taken);
    let mut disk = vec![0; usize::try_from(SIZE).unwrap()];
    for (at, part) in (0..).step_by(2048).zip(disk.chunks_mut(1 << 20)) {
        client.queue(0).read(at, part).unwrap();
    }
    model.settle(&disk);
}

/// The longest time without a completion while something `happens`, in milliseconds.
fn silence_during(ended: &Receiver<usize>, happens: impl FnOnce() + Send) -> f64 {
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    std::thread::scope(|scope| {
        let happening = scope.spawn(happens);
        while !happening.is_finished() {
            // A pause that has not ended when the predecessor has is still one.
            if ended.recv_timeout(LIMIT).is_ok() {
                longest = longest.max(last.elapsed());
                last = Instant::now();
            }
        }
    });
    longest.as_secs_f64() * 1e3
}

pub fn new_model() -> Model {
    Model::new(SIZE / 512, 0)
}

fn soak(format: &str, options: Options) {
    let packed = options.packed;
    let mut place = disk(format, options.queues);
    let mut client = Client::connect(place.path("s"), options).unwrap();
    let model = new_model();
    let socket = std::fs::metadata(place.path("s")).unwrap();
    let mut silences = Vec::new();
    for _ in 0..TAKE_OVERS / 5 {
        under_load(&mut client, &model, |ended| {
            for _ in 0..5 {
                wait(ended, 200);
                silences.push(silence_during(ended, || place.take_over()));
            }
            wait(ended, 200);
        });
    }
    // The connection is the one of the beginning, and the socket has never been another.
    client.read_config().unwrap();
    let now = std::fs::metadata(place.path("s")).unwrap();
    assert_eq!(
        std::os::unix::fs::MetadataExt::ino(&now),
        std::os::unix::fs::MetadataExt::ino(&socket)
    );
    let seen = ("silence seen by the guest", silences);
    let told = ["paused", "handed over"].map(|what| (what, place.pauses(what)));
    for (what, mut times) in told.into_iter().chain([seen]) {
        assert_eq!(times.len(), TAKE_OVERS, "{}", place.log());
        times.sort_by(f64::total_cmp);
        let (median, longest) = (times[TAKE_OVERS / 2], times[TAKE_OVERS - 1]);
        println!("{format}, packed {packed}: {what}: {median:.1} ms, at most {longest:.1} ms");
    }
    let log = place.log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    drop(client);
    let dir = place.stop();
    if format == "qcow2" {
        assert_clean(&dir.path().join("image"));
    }
}

#[test]
fn raw_with_one_queue() {
    soak("raw", options(1));
}

#[test]
fn raw_with_packed_rings() {
    soak("raw", Options { packed: true, inflight: false, ..options(4) });
}

#[test]
fn qcow2_with_four_queues() {
    soak("qcow2", options(4));
}

#[test]
fn qcow2_with_packed_rings() {
    soak("qcow2", Options { packed: true, inflight: false, ..options(2) });
}
