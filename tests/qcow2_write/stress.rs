//! Four queues, 32 requests each, all kinds of requests, on ranges that overlap: each read sees what it may, and the image
//! is clean afterwards.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::common::{ENGINES, LIMIT};
use crate::tools::Dirs;

use super::bed::{How, assert_clean, assert_same, connect, gentle, number, read_all, seed, start};
use super::model::{BASE, Load, Model, Stop, stamps};

/// An image of stamps or of zeroes.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// For `qemu-img create -o`.
    pub options: &'static str,
    pub cluster: u64,
    /// Over a raw file of stamps that ends before the overlay does.
    pub overlay: bool,
    pub size: u64,
}

impl Image {
    /// The image `a`, and what is in it.
    pub fn make(self, dirs: &Dirs) -> Model {
        let sectors = self.size / 512;
        let length = self.size.to_string();
        if !self.overlay {
            dirs.create("a", self.options, &[&length]);
            return Model::new(sectors, 0);
        }
        std::fs::write(dirs.path("base"), stamps(0, sectors, BASE)).unwrap();
        dirs.create("a", self.options, &["-b", "base", "-F", "raw", &length]);
        Model::new(sectors, BASE)
    }
}

/// The model forgets the past after such a time: looks get slow else.
const ROUND: Duration = Duration::from_millis(500);
/// Requests of a round, however long they take.
const LEAST: usize = 500;

fn stress(image: Image, how: How) {
    let dirs = Dirs::new();
    let model = image.make(&dirs);
    let program = start(&dirs.path("a"), how);
    let mut client = connect(&program, 4);
    let rounds = 2 * number("VUB_QCOW2_SECONDS", 1);
    for round in 0..rounds {
        let (stop, (sender, receiver)) = (Stop::new(false), mpsc::channel());
        let (mut ended, begun) = (0, Instant::now());
        std::thread::scope(|scope| {
            for (n, q) in (0..).zip(client.queues_mut()) {
                let seed = seed() * 1000 + round * 4 + n;
                let cluster = image.cluster / 512;
                let load = Load { seed, depth: 32, cluster, flush_one_in: 40, gentle: gentle() };
                let (model, stop, sender) = (&model, &stop, sender.clone());
                scope.spawn(move || model.drive(q, load, stop, &sender));
            }
            while begun.elapsed() < ROUND || ended < LEAST {
                // Nothing comes any more if a thread has failed: the scope says so.
                let Ok(some) = receiver.recv_timeout(LIMIT) else { break };
                ended += some;
            }
            stop.now();
        });
        println!("{image:?} {how:?}: {ended} requests");
        model.settle(&read_all(&mut client));
    }
    let last = read_all(&mut client);
    drop(client);
    assert!(program.terminate().success());
    assert_clean(&dirs, "a", &format!("{image:?}"));
    assert_same(&dirs.expected("a"), &last, "as QEMU reads it");
    if image.overlay {
        let base = std::fs::read(dirs.path("base")).unwrap();
        assert_same(&base, &stamps(0, image.size / 512, BASE), "the base");
    }
}

const SIZE: u64 = 8 << 20;

#[test]
fn clusters_of_64k() {
    let image = Image { options: "", cluster: 65536, overlay: false, size: SIZE };
    stress(image, How { engine: ENGINES[2], ..How::default() });
}

#[test]
fn clusters_of_4k_in_a_tiny_cache() {
    let options = "cluster_size=4k,refcount_bits=8";
    let image = Image { options, cluster: 4096, overlay: false, size: SIZE };
    stress(image, How { tiny_cache: true, ..How::default() });
}

#[test]
fn clusters_of_512_bytes() {
    let image = Image { options: "cluster_size=512", cluster: 512, overlay: false, size: 2 << 20 };
    stress(image, How { engine: ENGINES[3], ..How::default() });
}

#[test]
fn subclusters_over_a_base() {
    let options = "extended_l2=on";
    let image = Image { options, cluster: 65536, overlay: true, size: SIZE };
    stress(image, How { engine: ENGINES[1], ..How::default() });
}

#[test]
fn an_overlay() {
    let image = Image { options: "", cluster: 65536, overlay: true, size: SIZE };
    stress(image, How { engine: ENGINES[3], ..How::default() });
}

#[test]
fn an_overlay_with_lazy_refcounts() {
    let options = "cluster_size=4k,lazy_refcounts=on";
    let image = Image { options, cluster: 4096, overlay: true, size: SIZE };
    stress(image, How::default());
}

/// More refcount blocks change with the last discard than the cache of them holds: they are written before the end.
#[test]
fn all_is_discarded_before_the_end() {
    const SECTORS: u32 = 8192;
    let dirs = Dirs::new();
    dirs.create("a", "cluster_size=512", &["4M"]);
    let program = start(&dirs.path("a"), How::default());
    let mut client = connect(&program, 1);
    let q = client.queue(0);
    for at in (0..SECTORS.into()).step_by(128) {
        q.write(at, &stamps(at, 128, BASE)).unwrap();
    }
    q.flush().unwrap();
    q.discard(0, SECTORS).unwrap();
    assert!(read_all(&mut client).iter().all(|b| *b == 0));
    drop(client);
    assert!(program.terminate().success());
    assert_clean(&dirs, "a", "all is discarded");
}
