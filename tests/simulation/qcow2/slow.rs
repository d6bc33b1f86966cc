//! A request that is slow while its cluster is discarded, flushed away and wanted by others.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use vhost_user_blk::block::drivers::qcow2::create::{self, CreateOptions};
use vhost_user_blk::block::drivers::qcow2::write::mutation::{self, Mutation};
use vhost_user_blk::block::{Dir, Graph, Node, Op, WriteFlags};
use vhost_user_blk::error::Errno;
use vhost_user_blk::mem::Sg;
use vhost_user_blk::rt::grace::{self, Domain};
use vhost_user_blk::rt::{self, Buffer};
use vhost_user_blk::sim::{DiskSpec, Pages, SIM_DISK, Sim, Stuck, Tag, fill, tag_of};

use super::image::graph_of;

const CLUSTER: u64 = 4096;
/// Far from each other: who writes one after the other gets a window of new clusters.
const OTHERS: [u64; 6] = [200, 40, 120, 80, 240, 160];
const SECTORS: u64 = CLUSTER / 512;

/// What is slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slow {
    Read,
    FastRead,
    Write,
    FastWrite,
}

struct Bed {
    sim: Rc<Sim>,
    graph: Arc<Graph>,
    node: Arc<Node>,
}

fn bed(seed: u64) -> Bed {
    let sim = Rc::new(Sim::new(seed));
    sim.add_disk(DiskSpec::file("image", Pages::default()));
    let file = json!({"driver": "sim-disk", "disk": "image", "discard": "unmap"});
    let (format, leaf) = graph_of(file.clone()).unwrap();
    let options =
        CreateOptions { size: 2 << 20, cluster_size: CLUSTER, ..CreateOptions::default() };
    sim.run(create::create(&leaf, &options)).unwrap().unwrap();
    drop(leaf);
    format.close();
    let node = json!({"driver": "qcow2", "discard": "unmap", "file": file});
    let (graph, node) = graph_of(node).unwrap();
    Bed { sim, graph, node }
}

async fn write(node: &Node, cluster: u64, tag: Tag) -> Result<(), Errno> {
    let mut buffer = Buffer::new(CLUSTER as usize, 4096);
    fill(tag, cluster * SECTORS, buffer.bytes_mut());
    let iov = [buffer.iovec()];
    let (from, flags) = (Sg::new(&iov), WriteFlags::empty());
    node.submit(Op::Write { offset: cluster * CLUSTER, from, flags }).await
}

async fn read(node: &Node, cluster: u64) -> Result<Tag, String> {
    let buffer = Buffer::new(CLUSTER as usize, 4096);
    let iov = [buffer.iovec()];
    let op = Op::Read { offset: cluster * CLUSTER, to: Sg::new(&iov) };
    node.submit(op).await.map_err(|e| e.to_string())?;
    one_tag(cluster, buffer.bytes())
}

fn one_tag(cluster: u64, bytes: &[u8]) -> Result<Tag, String> {
    let tags = (cluster * SECTORS..).zip(bytes.chunks(512)).map(|(s, b)| tag_of(s, b));
    let tags: Vec<Tag> = tags.collect::<Result<_, _>>()?;
    tags.iter().all(|t| *t == tags[0]).then_some(tags[0]).ok_or(format!("{tags:?}"))
}

/// The slow request: cluster 0, as a guest's task, in either lane. Answers what a read has seen.
async fn slow(node: Arc<Node>, grace: Arc<Domain>, how: Slow) -> Result<Tag, String> {
    let mut buffer = Buffer::new(CLUSTER as usize, 4096);
    let writes = matches!(how, Slow::Write | Slow::FastWrite);
    if writes {
        fill(Tag(2), 0, buffer.bytes_mut());
    }
    let iov = [buffer.iovec()];
    let sg = Sg::new(&iov);
    let op = |offset| match writes {
        true => Op::Write { offset, from: sg, flags: WriteFlags::empty() },
        false => Op::Read { offset, to: sg },
    };
    let dir = if writes { Dir::Write } else { Dir::Read };
    let _pin = grace::enter(&grace);
    let result = match how {
        Slow::Read | Slow::Write => {
            drop(_pin);
            node.submit(op(0)).await
        }
        Slow::FastRead | Slow::FastWrite => {
            let (leaf, at, _) =
                node.locate_leaf(dir, 0, CLUSTER, &SIM_DISK).ok_or("no fast lane")?;
            leaf.driver().submit(op(at)).await
        }
    };
    result.map_err(|e| e.to_string())?;
    one_tag(0, buffer.bytes())
}

/// `Err(Deadlock)`: somebody waits for the cluster that the slow request holds: it was given away.
fn scenario(seed: u64, how: Slow) -> Result<(), Stuck> {
    let Bed { sim, graph, node } = bed(seed);
    let host = sim.run(async {
        write(&node, 0, Tag(1)).await.unwrap();
        node.submit(Op::Flush).await.unwrap();
        node.locate_leaf(Dir::Read, 0, CLUSTER, &SIM_DISK).map(|(_, at, _)| at).unwrap()
    })?;
    sim.hold("image", host..host + CLUSTER);
    let (world, slow_node, grace) = (Rc::clone(&sim), Arc::clone(&node), Arc::clone(graph.grace()));
    let seen = sim.run(async {
        let answer = Rc::new(RefCell::new(None));
        let said = Rc::clone(&answer);
        rt::current().spawn(async move {
            said.replace(Some(slow(slow_node, grace, how).await));
        });
        while world.held() == 0 {
            rt::sleep(Duration::from_micros(1)).await;
        }
        node.submit(Op::Discard { offset: 0, len: CLUSTER }).await.unwrap();
        for round in 0..3 {
            node.submit(Op::Flush).await.unwrap();
            for cluster in OTHERS {
                write(&node, cluster + round, Tag(cluster)).await.unwrap();
            }
        }
        assert_eq!(world.held(), 1, "others use the cluster");
        world.hold("image", 0..0);
        loop {
            if let Some(seen) = answer.take() {
                break seen;
            }
            rt::sleep(Duration::from_micros(1)).await;
        }
    })?;
    let expected = if matches!(how, Slow::Write | Slow::FastWrite) { Tag(2) } else { Tag(1) };
    assert_eq!(seen, Ok(expected), "what the slow request has seen");
    // Nobody uses it any more: now it is used again, and the slow write is not to be seen.
    sim.run(async {
        node.submit(Op::Flush).await.unwrap();
        node.submit(Op::Flush).await.unwrap();
        let later = OTHERS.map(|cluster| cluster + 20);
        for cluster in later {
            write(&node, cluster, Tag(cluster)).await.unwrap();
        }
        let place = |cluster| node.locate_leaf(Dir::Read, cluster * CLUSTER, CLUSTER, &SIM_DISK);
        assert!(
            later.iter().any(|c| place(*c).is_some_and(|(_, at, _)| at == host)),
            "never used again"
        );
        assert_eq!(read(&node, 0).await, Ok(Tag::ZERO));
        for cluster in OTHERS {
            assert_eq!(read(&node, cluster + 2).await, Ok(Tag(cluster)));
        }
        node.close().await.unwrap();
    })
}

const ALL: [Slow; 4] = [Slow::Read, Slow::FastRead, Slow::Write, Slow::FastWrite];

#[test]
fn a_cluster_in_use_is_not_used_again() {
    for seed in 1..6 {
        for how in ALL {
            assert_eq!(scenario(seed, how), Ok(()), "seed {seed}, {how:?}");
        }
    }
}

#[test]
fn a_cluster_in_use_that_is_used_again_is_noticed() {
    for how in ALL {
        let work = move || {
            mutation::set(Some(Mutation::ReuseInUse));
            scenario(1, how)
        };
        let outcome = std::thread::spawn(work).join();
        assert!(!matches!(outcome, Ok(Ok(()))), "{how:?} is not noticed");
    }
}
