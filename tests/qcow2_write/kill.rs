//! The program is killed under load, again and again on the same image: all that was acknowledged stays, the image has leaks at
//! most, and the next program opens it and goes on.

use std::fs::OpenOptions;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use vub_client::Client;

use crate::common::program::Program;
use crate::common::{Engine, LIMIT, Random};
use crate::tools::Dirs;

use super::bed::{
    How, assert_clean, assert_same, check, connect, gentle, is_dirty, number, read_all, seed, start,
};
use super::full::SmallFs;
use super::model::{Load, Model, Stop};
use super::stress::Image;

/// Rounds between two looks at an image whose program was allowed to end.
const CALM: u64 = 10;

/// What the rounds came to.
#[derive(Debug, Default)]
struct Sum {
    requests: usize,
    /// Programs killed with requests in flight.
    amid: usize,
    /// Changes of sectors that a flush covered.
    certain: usize,
    leaky: usize,
}

/// Whether the program promises that a write survives its own death, flushed or not. (QEMU's does not.)
fn keeps_all() -> bool {
    std::env::var_os("VUB_TEST_BACKEND").is_none()
}

fn kill_often(image: Image, engine: Engine) {
    let dirs = Dirs::new();
    let path = dirs.path("a");
    let model = image.make(&dirs);
    let mut random = Random(seed());
    let how = How { engine, ..How::default() };
    let (mut sum, begun) = (Sum::default(), Instant::now());
    for round in 0..number("VUB_QCOW2_ROUNDS", 25) {
        let program = start(&path, how);
        let mut client = connect(&program, if round % 2 == 0 { 1 } else { 4 });
        let disk = read_all(&mut client);
        sum.certain += if keeps_all() { model.survive_all(&disk) } else { model.survive(&disk) };
        // One request after the other, every now and then: nothing excuses what is wrong then.
        let alone = round % 4 == 0;
        let load = Load {
            seed: random.next(),
            depth: if alone { 1 } else { 16 },
            cluster: image.cluster / 512,
            flush_one_in: if alone { 6 } else { 12 },
            gentle: gentle(),
        };
        // Any moment, some of them early.
        let most = [10, 240][usize::try_from(random.below(4).min(1)).unwrap()];
        let requests = usize::try_from(random.below(if alone { most / 8 } else { most })).unwrap();
        sum.requests += kill_amid(&model, &mut client, load, program, requests);
        sum.amid += usize::from(client.queues_mut().iter().any(|q| q.in_flight() > 0));
        let (code, text) = check(&dirs, "a");
        sum.leaky += usize::from(code == 3);
        // Refcounts of a dirty image are known to be wrong: the next open makes them anew.
        let good = [0, 3].contains(&code) || (code == 2 && is_dirty(&path));
        assert!(good, "round {round}: {code}: {text}");
        if round % CALM == CALM - 1 {
            let_it_end(image, &dirs, how);
        }
    }
    let_it_end(image, &dirs, how);
    sum.certain += model.survive(&dirs.expected("a"));
    println!("{image:?}: {sum:?} in {:?}", begun.elapsed());
    assert!(sum.amid > 0 && sum.certain > 100, "{sum:?}");
}

/// Kills the program after so many requests of a load.
fn kill_amid(
    model: &Model,
    client: &mut Client,
    load: Load,
    program: Program,
    requests: usize,
) -> usize {
    let (stop, (sender, receiver)) = (Stop::new(true), mpsc::channel());
    let mut ended = 0;
    std::thread::scope(|scope| {
        for (n, q) in (0..).zip(client.queues_mut()) {
            let load = Load { seed: load.seed.wrapping_add(n), ..load };
            let (stop, sender) = (&stop, sender.clone());
            scope.spawn(move || model.drive(q, load, stop, &sender));
        }
        while ended < requests {
            // Nothing comes any more if a thread has failed: the scope says so.
            let Ok(some) = receiver.recv_timeout(LIMIT) else { break };
            ended += some;
        }
        program.kill();
        stop.now();
    });
    ended + receiver.try_iter().sum::<usize>()
}

/// A program opens the image, which is what the guest may see then, and ends as it should; leaks are mended: the image is clean
/// and has not changed.
///
/// Nobody else writes to the image before that: whoever mends leaks of an image with a journal takes the clusters away that
/// entries in the journal lead to ([`who_mends_leaks_first_gets_what_was_flushed`]).
fn let_it_end(image: Image, dirs: &Dirs, how: How) {
    let path = dirs.path("a");
    let program = start(&path, how);
    let mut client = connect(&program, 1);
    let disk = read_all(&mut client);
    client.queue(0).flush().unwrap();
    drop(client);
    assert!(program.terminate().success());
    assert!(!is_dirty(&path));
    let (code, text) = check(dirs, "a");
    assert!([0, 3].contains(&code), "{image:?}: {code}: {text}");
    if keeps_all() {
        assert_eq!(state_files(dirs), [] as [String; 0], "nothing is left of an orderly end");
    }
    dirs.run("qemu-img", &["check", "-q", "-f", "qcow2", "-r", "leaks", "a"]);
    assert_clean(dirs, "a", &format!("{image:?}"));
    assert_same(&dirs.expected("a"), &disk, "as QEMU reads it");
}

/// What programs have left for their successors.
fn state_files(dirs: &Dirs) -> Vec<String> {
    let dirs = std::fs::read_dir(dirs.0.path()).unwrap().map(|entry| entry.unwrap().path());
    let state =
        dirs.filter(|dir| dir.is_dir() && dir.to_str().unwrap().contains("/vhost-user-blk"));
    let files = state.flat_map(|dir| std::fs::read_dir(dir).unwrap());
    let names = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains(".journal") || name.contains(".rejected")).collect()
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

/// Where the journal is, there is no memory for more than its beginning: the image is flushed more often, and nothing is lost.
#[test]
fn a_journal_that_cannot_grow() {
    const CHUNK: usize = 1 << 20;
    const SIZE: u64 = 48 << 20;
    let dirs = Dirs::new();
    dirs.create("a", "cluster_size=4k,refcount_bits=1", &["48M"]);
    let state = SmallFs::new("tmpfs", 256 << 10);
    let log = tempfile::NamedTempFile::new().unwrap();
    let said = || std::fs::read_to_string(log.path()).unwrap();
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
        command.stderr(OpenOptions::new().append(true).open(log.path()).unwrap());
        let node = serde_json::json!({
            "driver": "qcow2", "node-name": "root",
            "file": {"driver": "file", "filename": dirs.path("a")},
        });
        let exports = [("root", ",writable=on")];
        Program::run(command, &[node.to_string()], &exports, Some(state.path()))
    };
    let program = start();
    let mut client = connect(&program, 1);
    let chunk = |n: usize| vec![u8::try_from(n + 1).unwrap(); CHUNK];
    let places = || (0..).zip((0..SIZE).step_by(CHUNK));
    for (n, at) in places() {
        client.queue(0).write(at / 512, &chunk(n)).unwrap();
    }
    let growth = said();
    assert_eq!(growth.matches("cannot grow: No space left").count(), 1, "{growth}");
    program.kill();
    drop(client);
    let program = start();
    let mut client = connect(&program, 1);
    for (n, at) in places() {
        let mut got = vec![0; CHUNK];
        client.queue(0).read(at / 512, &mut got).unwrap();
        assert!(got == chunk(n), "the chunk at {at}");
    }
    assert!(said().contains("entries are restored"), "{}", said());
    drop(client);
    assert!(program.terminate().success());
    assert_clean(&dirs, "a", "after the end");
}

/// Counting the refcounts of such an image takes seconds: a successor makes do with what the journal speaks of.
#[test]
fn a_large_image_is_back_soon() {
    let dirs = Dirs::new();
    dirs.create("a", "preallocation=metadata", &["1T"]);
    let path = dirs.path("a");
    let program = start(&path, How::default());
    let mut client = connect(&program, 1);
    let q = client.queue(0);
    let place = |n: u64| n << 24;
    for n in 0..100 {
        q.discard(place(n), 8 << 11).unwrap();
        q.write(place(n), &[7; 4096]).unwrap();
    }
    program.kill();
    drop(client);
    let begun = Instant::now();
    let program = start(&path, How::default());
    let mut client = connect(&program, 1);
    let mut read = [0; 4096];
    client.queue(0).read(0, &mut read).unwrap();
    let took = begun.elapsed();
    println!("from the start to the first read: {took:?}");
    assert!(took < Duration::from_secs(3), "{took:?}");
    for n in 0..100 {
        client.queue(0).read(place(n), &mut read).unwrap();
        assert!(read == [7; 4096], "{n}");
        client.queue(0).read(place(n) + 128, &mut read).unwrap();
        assert!(read == [0; 4096], "{n}");
    }
}
