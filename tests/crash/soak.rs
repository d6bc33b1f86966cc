//! A guest that never stops while program after program is killed under it: writes, reads, flushes, discards against
//! a model. Every acknowledged byte is there, flushed or not: the guest has not crashed.

use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use vub_client::{Base, Client};

use crate::common::{Engine, Image, LIMIT, Random};
use crate::model::{Load, Model, Stop};
use crate::options;
use crate::place::{Place, in_flight};

/// Kills between two looks at the whole disk.
const ROUND: u64 = 5;
const SIZE: u64 = 4 << 20;

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

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |n| n.parse().expect("a number"))
}

fn soak(engine: Engine, queues: u16) {
    let image = Image::new(SIZE);
    let mut place = Place::new(image.options(engine, "unmap").to_string());
    let mut client = Client::connect(place.socket(), options(queues)).unwrap();
    let model = Model::new(SIZE / 512, 0);
    let mut random = Random(number("VUB_SEED", 1));
    let mut sum = Sum::default();
    while sum.kills < number("VUB_KILLS", 20) {
        let load =
            Load { seed: random.next(), depth: 64, cluster: 128, flush_one_in: 20, gentle: false };
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
                kill_once(&mut place, &mut client, &mut random, &ended, &mut sum);
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
        assert!(std::fs::read(image.path()).unwrap() == disk, "the file is what the guest sees");
        assert_eq!(std::fs::metadata(image.path()).unwrap().size(), SIZE);
    }
    println!("{engine:?} {queues} queues: {sum:?}");
    assert!(sum.amid > 0 && sum.resubmitted > 0, "{sum:?}");
}

/// Waits for some completions, kills at some moment, and has a successor serve the guest.
fn kill_once(
    place: &mut Place,
    client: &mut Client,
    random: &mut Random,
    ended: &Receiver<usize>,
    sum: &mut Sum,
) {
    let most = [8, 300][usize::from(random.below(3) > 0)];
    let wanted = usize::try_from(random.below(most)).unwrap();
    let mut wait = |n: usize| {
        let mut seen = 0;
        while seen < n {
            // Nothing comes any more if a thread has failed: the scope says so.
            let Ok(some) = ended.recv_timeout(LIMIT) else { return };
            seen += some;
        }
        sum.requests += seen;
    };
    wait(wanted);
    let pause = Instant::now();
    // Not only when something has just ended.
    while pause.elapsed() < Duration::from_micros(random.below(3000)) {
        std::hint::spin_loop();
    }
    place.kill();
    let killed = Instant::now();
    let left: usize = (0..4.min(queues(client))).map(|q| in_flight(client, q)).sum();
    ended.try_iter().for_each(drop);
    place.restart();
    let base = [Base::Used, Base::Avail][usize::from(random.below(2) == 0)];
    client.reconnect(place.socket(), base).unwrap();
    sum.slowest = sum.slowest.max(killed.elapsed());
    wait(1);
    sum.kills += 1;
    sum.amid += u64::from(left > 0);
    sum.resubmitted += left;
}

fn queues(client: &Client) -> u64 {
    client.inflight.as_ref().map_or(0, |(desc, _)| u64::from(desc.num_queues))
}

const THREADS: Engine = Engine { aio: "threads", direct: false };
const URING: Engine = Engine { aio: "io_uring", direct: true };
const NATIVE: Engine = Engine { aio: "native", direct: true };

#[test]
fn one_queue() {
    soak(URING, 1);
}

#[test]
fn four_queues() {
    soak(URING, 4);
}

#[test]
fn four_queues_through_the_page_cache() {
    soak(THREADS, 4);
}

#[test]
fn one_queue_with_native_aio() {
    soak(NATIVE, 1);
}
