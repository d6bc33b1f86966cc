use std::sync::Arc;

use serde_json::json;

use super::super::header::{Purpose, V3_LENGTH_WRITTEN};
use super::*;
use crate::block::perm::Perms;
use crate::block::{Graph, RootUser};
use crate::qapi::Options;
use crate::sim::harness::Drivers;
use crate::sim::{
    Crash, DiskSpec, Fault, FlushFailure, History, Pages, Replay, Request, SIM_DISK, Sim, Survivors,
};

/// Where the tests have data that the header speaks about.
const DATA: u64 = 65536;

fn image(version: u32) -> Vec<u8> {
    let mut header = Header::new(version, 16, 1 << 20);
    header.l1_size = 1;
    header.l1_table_offset = HostOffset(3 << 16);
    header.refcount_table_offset = HostOffset(1 << 16);
    header.refcount_table_clusters = 1;
    let mut bytes = header.serialise().unwrap();
    bytes.resize(4 << 16, 0);
    bytes
}

fn parse(bytes: &[u8]) -> Header {
    Header::read(&bytes[..65536], Purpose::Check).unwrap()
}

/// A simulated disk with the image, and somebody who writes to it.
struct Bed {
    sim: Sim,
    header: Header,
    user: Arc<(RootUser, Arc<Graph>)>,
}

fn bed(version: u32) -> Bed {
    static DRIVERS: Drivers = &[&SIM_DISK];
    let (sim, bytes) = (Sim::new(1), image(version));
    let header = parse(&bytes);
    let mut pages = Pages::default();
    pages.set_len(bytes.len() as u64);
    pages.write(0, &bytes);
    let mut spec = DiskSpec::file("d", pages);
    spec.options.flush_failure = FlushFailure::Retry;
    sim.add_disk(spec);
    let graph = Graph::with_drivers(DRIVERS);
    let options = json!({ "driver": "sim-disk", "disk": "d", "node-name": "n" });
    let options: Options = serde_json::from_value(options).unwrap();
    let node = graph.add(options).unwrap();
    let user = graph.attach_root(&node, "test", Perms::device(true)).unwrap();
    Bed { sim, header, user: Arc::new((user, graph)) }
}

/// The images that a crash at any moment may leave.
fn crashes(history: &History) -> Vec<Vec<u8>> {
    let mut images = Vec::new();
    for cut in 0..=history.len() {
        let mut replay = Replay::new(history);
        replay.advance(history, cut);
        let seeds = (0..8).map(Survivors::Random);
        for survivors in seeds.chain([Survivors::None, Survivors::All]) {
            images.push(replay.crashed(Crash::Power, survivors)[0].1.to_vec());
        }
    }
    images
}

/// Every field that can be written is where the parser looks for it, and nothing else changes.
#[test]
fn fields_are_where_they_belong() {
    for version in [2, 3] {
        let Bed { sim, header, user } = bed(version);
        let io = HeaderIo::new(&header);
        let done = sim.run(async move {
            let file = user.0.node();
            io.set_size(file, 5 << 20).await?;
            io.set_l1(file, HostOffset(7 << 16), 9).await?;
            let field = [(8u64 << 16).to_be_bytes().as_slice(), &2u32.to_be_bytes()].concat();
            io.set_reftable(file, field.try_into().unwrap()).await?;
            io.mark_dirty(file).await?;
            io.mark_corrupt(file).await?;
            io.mark_clean(file).await?;
            io.set_autoclear(file, Autoclear::DATA_FILE_RAW).await
        });
        assert_eq!(done, Ok(Ok(())));
        let history = sim.take_history();
        let mut replay = Replay::new(&history);
        replay.advance(&history, history.len());
        let now = replay.crashed(Crash::Power, Survivors::None)[0].1.to_vec();
        let mut want = header;
        want.size = 5 << 20;
        (want.l1_table_offset, want.l1_size) = (HostOffset(7 << 16), 9);
        (want.refcount_table_offset, want.refcount_table_clusters) = (HostOffset(8 << 16), 2);
        if version == 3 {
            want.incompatible = Incompatible::CORRUPT;
            want.autoclear = Autoclear::DATA_FILE_RAW;
        }
        assert_eq!(parse(&now), want);
        let end = V3_LENGTH_WRITTEN as usize;
        assert_eq!(now[end..], image(version)[end..]);
    }
}

/// A clean image has what was written before; a dirty one is dirty from the moment of the answer on.
#[test]
fn the_dirty_bit_is_set_before_and_cleared_after() {
    let Bed { sim, header, user } = bed(3);
    let io = HeaderIo::new(&header);
    let done = sim.run(async move {
        let file = user.0.node();
        for byte in 1..4 {
            io.mark_dirty(file).await?;
            Disk::new(file).write(DATA, &[byte, 1]).await?;
            Disk::new(file).write(DATA + 4096, &[byte]).await?;
            io.mark_clean(file).await?;
        }
        Ok::<(), Errno>(())
    });
    assert_eq!(done, Ok(Ok(())));
    let mut seen = [0; 2];
    for bytes in crashes(&sim.take_history()) {
        let dirty = parse(&bytes).incompatible.contains(Incompatible::DIRTY);
        let (one, two) = (bytes[DATA as usize], bytes[DATA as usize + 4096]);
        seen[usize::from(dirty)] += 1;
        assert!(dirty || one == two, "clean with {one} and {two}");
    }
    assert!(seen[0] > 10 && seen[1] > 10, "{seen:?}");
}

/// The header points to a new table only when that is stable; each field changes as a whole.
#[test]
fn the_header_points_to_what_is_there() {
    let Bed { sim, header, user } = bed(3);
    let io = HeaderIo::new(&header);
    let done = sim.run(async move {
        let file = user.0.node();
        Disk::new(file).write(2 << 16, &[7; 1024]).await?;
        io.set_l1(file, HostOffset(2 << 16), 128).await
    });
    assert_eq!(done, Ok(Ok(())));
    let mut switched = 0;
    for bytes in crashes(&sim.take_history()) {
        let header = parse(&bytes);
        match (header.l1_table_offset, header.l1_size) {
            (HostOffset(0x30000), 1) => {}
            (HostOffset(0x20000), 128) => {
                switched += 1;
                assert_eq!(bytes[2 << 16..][..1024], [7; 1024]);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(switched > 5);
}

/// After a failure nobody can tell what is on disk: the next call writes, even if it wants what was there before.
#[test]
fn a_failed_write_is_not_taken_for_done() {
    let Bed { sim, header, user } = bed(3);
    let io = HeaderIo::new(&header);
    let sim = std::rc::Rc::new(sim);
    let world = std::rc::Rc::clone(&sim);
    let done = sim.run(async move {
        let file = user.0.node();
        io.mark_dirty(file).await.unwrap();
        // The second flush fails: the bit may be cleared on disk.
        let [.., flushes] = world.counts("d");
        let (request, nth) = (Request::Flush, flushes + 1);
        world.fail("d", Fault { request, nth, times: 1, errno: Errno::EIO, partial: false });
        assert_eq!(io.mark_clean(file).await, Err(Errno::EIO));
        assert!(io.incompatible().contains(Incompatible::DIRTY));
        io.mark_dirty(file).await.unwrap();
    });
    assert_eq!(done, Ok(()));
    let history = sim.take_history();
    let mut replay = Replay::new(&history);
    replay.advance(&history, history.len());
    let now = replay.crashed(Crash::Power, Survivors::None)[0].1.to_vec();
    assert_eq!(parse(&now).incompatible, Incompatible::DIRTY);
}
