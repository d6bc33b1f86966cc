//! The program is killed under load, again and again on the same image: what was flushed stays, the image has leaks at
//! most, and the next program opens it and goes on.

use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::common::{Engine, Random};
use crate::tools::Dirs;

use super::bed::{
    How, assert_clean, assert_same, check, connect, gentle, is_dirty, number, read_all, seed, start,
};
use super::model::Load;
use super::stress::{Image, let_work};

/// Rounds between two looks at an image whose program was allowed to end.
const CALM: u64 = 10;

fn kill_often(image: Image, engine: Engine) {
    let dirs = Dirs::new();
    let path = dirs.path("a");
    let model = image.make(&dirs);
    let mut random = Random(seed());
    let how = How { engine, ..How::default() };
    let (mut requests, mut kills_amid, mut leaky, begun) = (0, 0, 0, Instant::now());
    for round in 0..number("VUB_QCOW2_ROUNDS", 25) {
        let program = start(&path, how);
        let mut client = connect(&program, [1, 4, 1, 4][usize::try_from(round % 4).unwrap()]);
        // One request after the other, every now and then: nothing excuses what is wrong then.
        let alone = round % 4 == 0;
        model.survive(&read_all(&mut client));
        let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut program = Some(program);
        let ended: usize = std::thread::scope(|scope| {
            let (model, stop) = (&model, &stop);
            let mut threads = Vec::new();
            for (n, q) in (0..).zip(client.queues_mut()) {
                let load = Load {
                    seed: random.next() + n,
                    depth: if alone { 1 } else { 16 },
                    cluster: image.cluster / 512,
                    flush_one_in: if alone { 6 } else { 12 },
                    gentle: gentle() && !alone,
                };
                threads.push(scope.spawn(move || model.drive(q, load, stop, true)));
            }
            // Any moment, most of them early.
            let most = 1 + random.below(150_000);
            let_work(Duration::from_micros(random.below(most)));
            drop(program.take());
            stop.write(1).unwrap();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        requests += ended;
        kills_amid += u64::from(client.queues_mut().iter().any(|q| q.in_flight() > 0));
        let (code, text) = check(&dirs, "a");
        leaky += u64::from(code == 3);
        // Refcounts of a dirty image are known to be wrong: the next open makes them anew.
        let good = [0, 3].contains(&code) || (code == 2 && is_dirty(&path));
        assert!(good, "round {round}: {code}: {text}");
        if round % CALM == CALM - 1 {
            let_it_end(image, &dirs, how);
        }
    }
    let_it_end(image, &dirs, how);
    model.survive(&dirs.expected("a"));
    println!(
        "{image:?}: {requests} requests, {kills_amid} kills in the middle of some, {leaky} leaky \
         images, {:?}",
        begun.elapsed()
    );
    assert!(kills_amid > 0 && requests > 0);
}

/// Leaks are mended, a program opens the image and ends as it should: the image is clean and has not changed.
fn let_it_end(image: Image, dirs: &Dirs, how: How) {
    let path = dirs.path("a");
    if !is_dirty(&path) {
        let (code, text) = check(dirs, "a");
        assert!([0, 3].contains(&code), "{image:?}: {code}: {text}");
        dirs.run("qemu-img", &["check", "-q", "-f", "qcow2", "-r", "leaks", "a"]);
    }
    let program = start(&path, how);
    let mut client = connect(&program, 1);
    let disk = read_all(&mut client);
    client.queue(0).flush().unwrap();
    drop(client);
    assert!(program.terminate().success());
    assert!(!is_dirty(&path));
    assert_clean(dirs, "a", &format!("{image:?}"));
    assert_same(&dirs.expected("a"), &disk, "as QEMU reads it");
}

const THREADS: Engine = Engine { aio: "threads", direct: false };
const URING: Engine = Engine { aio: "io_uring", direct: true };
const SIZE: u64 = 4 << 20;

#[test]
fn clusters_of_64k() {
    kill_often(Image { options: "", cluster: 65536, overlay: false, size: SIZE }, URING);
}

#[test]
fn an_overlay_of_4k_clusters() {
    let options = "cluster_size=4k";
    kill_often(Image { options, cluster: 4096, overlay: true, size: SIZE }, THREADS);
}

#[test]
fn subclusters() {
    let options = "extended_l2=on,refcount_bits=64";
    kill_often(Image { options, cluster: 65536, overlay: true, size: SIZE }, URING);
}

#[test]
fn lazy_refcounts() {
    let options = "lazy_refcounts=on,cluster_size=4k";
    kill_often(Image { options, cluster: 4096, overlay: false, size: SIZE }, THREADS);
}
