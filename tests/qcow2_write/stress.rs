//! Four queues, 32 requests each, all kinds of requests, on ranges that overlap: each read sees what it may, and the image
//! is clean afterwards.

use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::common::ENGINES;
use crate::tools::Dirs;

use super::bed::{How, assert_clean, assert_same, connect, gentle, number, read_all, seed, start};
use super::model::{BASE, Load, Model, stamps};

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

/// A time that passes, during which other threads work: not a wait for something to happen.
pub fn let_work(time: Duration) {
    std::thread::sleep(time);
}

fn stress(image: Image, how: How) {
    let dirs = Dirs::new();
    let model = image.make(&dirs);
    let program = start(&dirs.path("a"), how);
    let mut client = connect(&program, 4);
    let seconds = number("VUB_QCOW2_SECONDS", 1);
    // The model forgets the past every now and then: looks get slow else.
    for round in 0..(2 * seconds).max(1) {
        let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let ended: usize = std::thread::scope(|scope| {
            let (model, stop) = (&model, &stop);
            let drive = |(q, n): (&'_ mut vub_client::Queue, u64)| {
                let seed = seed() * 1000 + round * 4 + n;
                let load = Load {
                    seed,
                    depth: 32,
                    cluster: image.cluster / 512,
                    flush_one_in: 40,
                    gentle: gentle(),
                };
                model.drive(q, load, stop, false)
            };
            let threads: Vec<_> = (client.queues_mut().iter_mut())
                .zip(0..)
                .map(|one| scope.spawn(move || drive(one)))
                .collect();
            let_work(Duration::from_millis(500));
            stop.write(1).unwrap();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        println!("{image:?} {how:?}: {ended} requests");
        assert!(ended > 100, "{ended} requests in half a second");
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
