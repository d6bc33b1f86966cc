//! A guest that never stops while program after program is killed under it: writes, reads, flushes, discards against
//! a model. Every acknowledged byte is there, flushed or not: the guest has not crashed. And one whose rings are stopped
//! at once, and go on here or in the next program.

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use vub_client::proto::pf;
use vub_client::{Client, MemStyle, Options};

use crate::common::{Engine, LIMIT, Random};
use crate::format::Format;
use crate::model::{Load, Stop};
use crate::place::{Place, in_flight};
use crate::{bases, options};

/// Kills between two looks at the whole disk.
const ROUND: u64 = 5;
/// Of the disk, in bytes.
pub const SIZE: u64 = 4 << 20;

#[derive(Debug, Default)]
struct Sum {
    requests: usize,
    kills: u64,
    /// Kills that left requests in flight.
    amid: u64,
    /// Requests that were resubmitted.
    resubmitted: usize,
    /// The longest time from a kill until the successor runs the rings.
    slowest: Duration,
}

impl Sum {
    fn wait(&mut self, n: usize, ended: &Receiver<usize>) {
        let mut seen = 0;
        while seen < n {
            // Nothing comes any more if a thread has failed: the scope says so.
            let Ok(some) = ended.recv_timeout(LIMIT) else { return };
            seen += some;
        }
        self.requests += seen;
    }

    /// One more end of a program, or of its rings, that left so many requests in flight.
    fn count(&mut self, left: usize, ended: &Receiver<usize>) {
        self.wait(1, ended);
        self.kills += 1;
        self.amid += u64::from(left > 0);
        self.resubmitted += left;
    }
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |n| n.parse().expect("a number"))
}

fn soak(engine: Engine, options: Options) {
    soak_on(&Format::Raw, engine, options);
}

fn soak_on(format: &Format, engine: Engine, options: Options) {
    let (queues, packed) = (options.queues, options.packed);
    // Direct chains take up to twelve entries each.
    let depth = if options.indirect { 64 } else { 16 };
    let (image, model) = format.make();
    let mut place = Place::new(format.options(&image, engine).to_string());
    let mut client = Client::connect(place.socket(), options).unwrap();
    assert_eq!(client.has_feature(34), packed);
    let mut random = Random(number("VUB_SEED", 1));
    let mut sum = Sum::default();
    while sum.kills < number("VUB_KILLS", 20) {
        let (seed, cluster) = (random.next(), format.cluster() / 512);
        let load = Load { seed, depth, cluster, flush_one_in: 20, gentle: false };
        let (stop, (sender, ended)) = (Stop::new(false), channel());
        let mut taken = client.take_queues();
        std::thread::scope(|scope| {
            for (n, q) in (0..).zip(&mut taken) {
                let load = Load { seed: load.seed.wrapping_add(n), ..load };
                let (model, stop, sender) = (&model, &stop, sender.clone());
                scope.spawn(move || model.drive(q, load, stop, &sender));
            }
            drop(sender);
            for _ in 0..ROUND {
                let check = || format.check(&image, &[0, 3]);
                if client.has_protocol(pf::GET_VRING_BASE_INFLIGHT) {
                    suspend_once(&mut place, &mut client, &mut random, &ended, &mut sum);
                } else {
                    kill_once(&mut place, &mut client, &mut random, &ended, &mut sum, check);
                }
            }
            stop.now();
        });
        sum.requests += ended.try_iter().sum::<usize>();
        client.put_queues(taken);
        let mut disk = vec![0; usize::try_from(SIZE).unwrap()];
        for (at, part) in (0..).step_by(2048).zip(disk.chunks_mut(1 << 20)) {
            client.queue(0).read(at, part).unwrap();
        }
        model.settle(&disk);
        client.queue(0).flush().unwrap();
        assert!(format.content(&image) == disk, "the image is what the guest sees");
    }
    // What a thread or a format is at cannot be taken back: such stops may leave nothing.
    let back = engine == URING && matches!(format, Format::Raw);
    let awaited = client.has_protocol(pf::GET_VRING_BASE_INFLIGHT) && !back;
    drop(client);
    place.terminate();
    assert_eq!(place.state_files(), [] as [String; 0], "nothing is left of an orderly end");
    format.check(&image, &[0, 3]);
    println!("{format:?} {engine:?} {queues} queues, packed {packed}: {sum:?}");
    assert!(awaited || sum.amid > 0 && sum.resubmitted > 0, "{sum:?}");
}

/// Waits for some completions, kills at some moment, and has a successor serve the guest.
fn kill_once(
    place: &mut Place,
    client: &mut Client,
    random: &mut Random,
    ended: &Receiver<usize>,
    sum: &mut Sum,
    examine: impl Fn(),
) {
    wait_somewhat(random, ended, sum);
    place.kill();
    if random.below(4) == 0 {
        examine();
    }
    let killed = Instant::now();
    let left: usize = (0..4.min(queues(client))).map(|q| in_flight(client, q)).sum();
    ended.try_iter().for_each(drop);
    place.restart();
    let base = bases(client.has_feature(34))[usize::from(random.below(2) == 0)];
    client.reconnect(place.socket(), base).unwrap();
    sum.slowest = sum.slowest.max(killed.elapsed());
    sum.count(left, ended);
}

/// Stops the rings at some moment; every other time another program takes them over. Its region goes with it, as in a
/// migration.
fn suspend_once(
    place: &mut Place,
    client: &mut Client,
    random: &mut Random,
    ended: &Receiver<usize>,
    sum: &mut Sum,
) {
    wait_somewhat(random, ended, sum);
    let stopped = Instant::now();
    client.stop().unwrap();
    let left: usize = (0..4.min(queues(client))).map(|q| in_flight(client, q)).sum();
    ended.try_iter().for_each(drop);
    if random.below(2) == 0 {
        client.start().unwrap();
    } else {
        place.kill();
        place.restart();
        client.reconnect(place.socket(), bases(client.has_feature(34))[0]).unwrap();
    }
    sum.slowest = sum.slowest.max(stopped.elapsed());
    sum.count(left, ended);
}

/// Waits for some completions, and then for any moment.
fn wait_somewhat(random: &mut Random, ended: &Receiver<usize>, sum: &mut Sum) {
    let most = [8, 300][usize::from(random.below(3) > 0)];
    sum.wait(usize::try_from(random.below(most)).unwrap(), ended);
    let pause = Instant::now();
    // Not only when something has just ended.
    while pause.elapsed() < Duration::from_micros(random.below(3000)) {
        std::hint::spin_loop();
    }
}

fn queues(client: &Client) -> u64 {
    client.inflight.as_ref().map_or(0, |(desc, _)| u64::from(desc.num_queues))
}

const THREADS: Engine = Engine { aio: "threads", direct: false };
const URING: Engine = Engine { aio: "io_uring", direct: true };
const NATIVE: Engine = Engine { aio: "native", direct: true };

#[test]
fn one_queue() {
    soak(URING, options(1, false));
}

#[test]
fn four_queues() {
    soak(URING, options(4, false));
}

#[test]
fn four_queues_through_the_page_cache() {
    soak(THREADS, options(4, false));
}

#[test]
fn one_queue_with_native_aio() {
    soak(NATIVE, options(1, false));
}

#[test]
fn one_packed_queue() {
    soak(URING, options(1, true));
}

/// Chains of several entries, and a ring that is no power of two.
#[test]
fn four_packed_queues_of_direct_chains() {
    soak(URING, Options { indirect: false, queue_size: 255, ..options(4, true) });
}

#[test]
fn one_packed_queue_through_the_page_cache() {
    soak(THREADS, options(1, true));
}

fn suspending(queues: u16, packed: bool) -> Options {
    let options = options(queues, packed);
    let want_protocol = options.want_protocol | 1 << pf::GET_VRING_BASE_INFLIGHT;
    // A table may be sent again.
    Options { want_protocol, mem_style: MemStyle::Table, ..options }
}

#[test]
fn rings_are_stopped_at_once() {
    soak(URING, suspending(2, false));
}

#[test]
fn packed_rings_are_stopped_at_once() {
    soak(URING, suspending(2, true));
}

#[test]
fn packed_rings_are_stopped_at_once_through_the_page_cache() {
    soak(THREADS, suspending(4, true));
}

#[test]
fn packed_rings_of_a_qcow2_disk_are_stopped_at_once() {
    soak_on(&QCOW2, URING, suspending(2, true));
}

#[test]
fn qcow2_with_four_packed_queues() {
    soak_on(&QCOW2, URING, options(4, true));
}

const QCOW2: Format = Format::Qcow2 { options: "cluster_size=64k", cluster: 65536, overlay: false };
const SMALL: Format = Format::Qcow2 { options: "cluster_size=4k", cluster: 4096, overlay: true };
const SUBCLUSTERS: Format =
    Format::Qcow2 { options: "extended_l2=on,refcount_bits=64", cluster: 65536, overlay: true };
const OLD: Format =
    Format::Qcow2 { options: "compat=0.10,cluster_size=4k", cluster: 4096, overlay: false };

#[test]
fn qcow2_with_one_queue() {
    soak_on(&QCOW2, URING, options(1, false));
}

#[test]
fn qcow2_with_four_queues() {
    soak_on(&QCOW2, THREADS, options(4, false));
}

#[test]
fn an_overlay_with_one_queue() {
    soak_on(&SMALL, THREADS, options(1, false));
}

#[test]
fn an_overlay_with_four_queues() {
    soak_on(&SMALL, URING, options(4, false));
}

#[test]
fn subclusters_with_four_queues() {
    soak_on(&SUBCLUSTERS, URING, options(4, false));
}

#[test]
fn version_2_with_four_queues() {
    soak_on(&OLD, NATIVE, options(4, false));
}
