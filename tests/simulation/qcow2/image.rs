//! Images to begin with: random features, some data in random places, a snapshot.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde_json::{Value, json};
use vhost_user_blk::block::drivers::qcow2::QCOW2;
use vhost_user_blk::block::drivers::qcow2::check::{self, Fix, Watch};
use vhost_user_blk::block::drivers::qcow2::create::{self, CreateOptions, Preallocation};
use vhost_user_blk::block::drivers::qcow2::layout::Geometry;
use vhost_user_blk::block::drivers::raw::RAW;
use vhost_user_blk::block::perm::{Perm, Perms};
use vhost_user_blk::block::{Graph, Node, Op, WriteFlags, ZeroFlags};
use vhost_user_blk::mem::Sg;
use vhost_user_blk::rt::Buffer;
use vhost_user_blk::sim::harness::Drivers;
use vhost_user_blk::sim::{
    Discarded, DiskOptions, DiskSpec, FlushFailure, Pages, Rng, SIM_DISK, Sim, Tag, fill,
};

pub static DRIVERS: Drivers = &[&QCOW2, &RAW, &SIM_DISK];

const SECTOR: u64 = 512;

/// What is behind the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    pub qcow2: bool,
    pub sectors: u64,
}

/// Everything that a seed chooses about an image and how it is opened.
#[derive(Clone, Debug)]
pub struct Setup {
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_bits: u32,
    pub extended_l2: bool,
    pub lazy: bool,
    pub preallocated: bool,
    /// An external data file, and whether it is raw.
    pub data_file: Option<bool>,
    pub backing: Option<Backing>,
    pub snapshot: bool,
    /// So many writes are in it from the start.
    pub aged: u64,
    /// But no more, once so many sectors hold data.
    pub filled: Option<u64>,
    pub sectors: u64,
    /// The disk with the image: an odd size is a device.
    pub disk: DiskOptions,
    /// The image's disk has so much room beyond what is used, in bytes.
    pub room: Option<u64>,
    /// A device: has its length, `room` included, from the start, and holds anything there.
    pub device: bool,
    /// More options of the node.
    pub options: Vec<(&'static str, Value)>,
}

impl Setup {
    /// Any of them.
    pub fn random(rng: &mut Rng) -> Setup {
        let cluster_bits = [9, 9, 10, 12, 12, 14, 16][rng.index(7)];
        let cluster = 1u64 << cluster_bits;
        let version = if rng.chance(1, 6) { 2 } else { 3 };
        let v3 = version == 3;
        let size = (cluster * (20 + rng.below(60))).clamp(128 << 10, 2 << 20);
        let mut setup = Setup {
            version,
            cluster_bits,
            refcount_bits: if v3 { 1 << rng.below(7) } else { 16 },
            extended_l2: v3 && cluster_bits >= 14 && rng.chance(1, 2),
            lazy: v3 && rng.chance(1, 4),
            preallocated: rng.chance(1, 8),
            data_file: (v3 && rng.chance(1, 6)).then(|| rng.chance(1, 2)),
            backing: None,
            snapshot: false,
            aged: if rng.chance(2, 3) { rng.below(40) } else { 0 },
            filled: None,
            sectors: size / SECTOR + if rng.chance(1, 3) { rng.below(64) } else { 0 },
            disk: DiskOptions {
                request_align: [1, 512, 4096][rng.index(3)],
                zeroes: rng.chance(2, 3),
                discarded: [Discarded::Zero, Discarded::Old, Discarded::Garbage][rng.index(3)],
                flush_failure: FlushFailure::Retry,
                ..DiskOptions::default()
            },
            room: None,
            device: rng.chance(1, 4),
            options: Vec::new(),
        };
        if rng.chance(1, 3) {
            let sectors = setup.sectors;
            let sectors = [sectors / 2, sectors, sectors + 100][rng.index(3)];
            setup.backing = Some(Backing { qcow2: rng.chance(1, 2), sectors });
        }
        setup.snapshot = setup.refcount_bits > 1 && rng.chance(1, 4);
        let tiny = 2 << cluster_bits;
        let mut options: Vec<(&str, Value)> = vec![
            ("pass-discard-request", rng.chance(1, 2).into()),
            ("pass-discard-other", rng.chance(1, 2).into()),
        ];
        if rng.chance(1, 2) {
            options.push(("l2-cache-entry-size", 512.into()));
            options.push(("l2-cache-size", 1024.into()));
        }
        if rng.chance(1, 2) {
            options.push(("refcount-cache-size", tiny.into()));
        }
        if v3 && rng.chance(1, 4) {
            options.push(("discard-no-unref", true.into()));
        }
        if rng.chance(1, 8) {
            options.push(("detect-zeroes", ["on", "unmap"][rng.index(2)].into()));
        }
        setup.options = options;
        setup.consistent()
    }

    /// Without features that exclude each other.
    pub fn consistent(mut self) -> Setup {
        let raw = self.data_file == Some(true);
        if self.data_file.is_some() {
            self.snapshot = false;
        }
        if raw || (self.preallocated && !self.extended_l2) {
            self.backing = None;
        }
        if self.cluster_bits == 9 && (self.backing.is_some() || self.data_file.is_some()) {
            // The header with a name does not fit.
            self.cluster_bits = 10;
        }
        if self.device {
            // Preallocated clusters show what the device holds.
            self.preallocated = false;
        }
        let kept = |(name, value): &(&str, Value)| *name == "discard-no-unref" && *value == true;
        let kept = self.data_file.is_some() || self.options.iter().any(kept);
        if self.disk.discarded == Discarded::Garbage && kept {
            // The guest's own clusters hold garbage from the discard to the new entry: it has asked for that.
            self.disk.discarded = Discarded::Old;
        }
        if self.device && self.room.is_none() {
            self.room = Some((self.sectors * SECTOR) / 2 + (1 << 20));
        }
        self
    }

    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether whole clusters that are discarded read as zeroes.
    pub fn discard_zeroes(&self) -> bool {
        self.version > 2 || self.backing.is_none()
    }

    /// The options of the root node.
    pub fn node(&self) -> Value {
        let disk = |name: &str| json!({"driver": "sim-disk", "disk": name, "discard": "unmap"});
        let mut node = json!({"driver": "qcow2", "discard": "unmap", "file": disk("image")});
        if self.data_file.is_some() {
            node["data-file"] = disk("data");
        }
        node["backing"] = match self.backing {
            None => Value::Null,
            Some(Backing { qcow2, .. }) => json!({
                "driver": if qcow2 { "qcow2" } else { "raw" }, "read-only": true,
                "file": {"driver": "sim-disk", "disk": "backing", "read-only": true},
            }),
        };
        for (name, value) in &self.options {
            node[*name] = value.clone();
        }
        node
    }

    fn create_options(&self) -> CreateOptions {
        CreateOptions {
            size: self.sectors * SECTOR,
            version: self.version,
            cluster_size: self.cluster(),
            refcount_bits: self.refcount_bits,
            extended_l2: self.extended_l2,
            lazy_refcounts: self.lazy,
            data_file: self.data_file.map(|_| "data".to_owned()),
            data_file_raw: self.data_file == Some(true),
            backing_file: self.backing.map(|_| "backing".to_owned()),
            backing_format: None,
            preallocation: match self.preallocated {
                true => Preallocation::Metadata,
                false => Preallocation::Off,
            },
            ..CreateOptions::default()
        }
    }

    /// Builds it.
    ///
    /// # Errors
    /// The driver fails on disks without faults.
    pub fn build(&self, seed: u64) -> Result<Image, String> {
        let mut rng = Rng::new(seed).fork(77);
        let sim = Sim::new(seed ^ 0xb111d);
        let mut content = HashMap::new();
        let mut specs = Vec::new();
        let plenty = DiskOptions { capacity: 1 << 40, ..self.disk };
        let spec = |name: &str, len| DiskSpec {
            options: plenty,
            ..DiskSpec::file(name, Pages::zeroed(len))
        };
        if let Some(Backing { qcow2, sectors }) = self.backing {
            sim.add_disk(spec("backing", if qcow2 { 0 } else { sectors * SECTOR }));
            let mut behind = HashMap::new();
            if qcow2 {
                let options = CreateOptions {
                    size: sectors * SECTOR,
                    cluster_size: 4096,
                    ..CreateOptions::default()
                };
                format(&sim, "backing", &options)?;
                let node =
                    json!({"driver": "qcow2", "file": {"driver": "sim-disk", "disk": "backing"}});
                age(&sim, &node, (sectors, 60, None), &mut rng, &mut behind, false)?;
            } else {
                let node = json!({"driver": "sim-disk", "disk": "backing"});
                age(&sim, &node, (sectors, 60, None), &mut rng, &mut behind, false)?;
            }
            content.extend(behind.into_iter().filter(|(sector, _)| *sector < self.sectors));
            specs.push(DiskSpec { image: sim.image("backing"), ..spec("backing", 0) });
        }
        if self.data_file.is_some() {
            sim.add_disk(spec("data", self.sectors * SECTOR));
        }
        // A device keeps its length, so that nothing beyond it is ever known to be zeroes.
        let device = if self.device {
            (self.sectors * SECTOR + self.room.unwrap_or(0)) / 4096 * 4096
        } else {
            0
        };
        let mut image = spec("image", 0);
        if self.device {
            let mut old = vec![0; usize::try_from(device).map_err(|e| e.to_string())?];
            fill(Tag::before(1 << 40), 0, &mut old);
            image.image = Pages::from_bytes(&old);
            image.options.capacity = device;
        }
        sim.add_disk(image.clone());
        format(&sim, "image", &self.create_options())?;
        age(
            &sim,
            &self.node(),
            (self.sectors, self.aged, self.filled),
            &mut rng,
            &mut content,
            true,
        )?;
        let mut frozen = None;
        if self.snapshot {
            snapshot(&sim)?;
            frozen = Some(
                sim.run(frozen_content(file_node(&sim, "image")?)).map_err(|e| e.to_string())??,
            );
            age(
                &sim,
                &self.node(),
                (self.sectors, self.aged / 4, None),
                &mut rng,
                &mut content,
                true,
            )?;
        }
        image.image = sim.image("image");
        if !self.device {
            image.options.capacity = self.room.map_or(1 << 40, |room| image.image.len() + room);
        }
        specs.push(image);
        if self.data_file.is_some() {
            specs.push(DiskSpec { image: sim.image("data"), ..spec("data", 0) });
        }
        Ok(Image { specs, content, frozen })
    }
}

/// A built image: its disks, what the guest finds, what its snapshot holds.
pub struct Image {
    pub specs: Vec<DiskSpec>,
    pub content: HashMap<u64, Tag>,
    pub frozen: Option<Frozen>,
}

/// The clusters of a snapshot by guest cluster: its entry's flags, and a digest of the data.
pub type Frozen = BTreeMap<u64, (u64, u64)>;

pub fn graph_of(options: Value) -> Result<(Arc<Graph>, Arc<Node>), String> {
    let graph = Graph::with_drivers(DRIVERS);
    let Value::Object(mut options) = options else { unreachable!() };
    options.insert("node-name".to_owned(), Value::from("n"));
    let node = graph.add(options).map_err(|e| e.to_string())?;
    let mut perms = Perms::device(true);
    perms.used |= Perm::RESIZE;
    graph.detach(graph.attach_root(&node, "test", perms).map_err(|e| e.to_string())?);
    node.expect_ragged_writes(512);
    Ok((graph, node))
}

fn file_node(_: &Sim, disk: &str) -> Result<Arc<Node>, String> {
    let (graph, node) = graph_of(json!({"driver": "sim-disk", "disk": disk, "discard": "unmap"}))?;
    std::mem::forget(graph);
    Ok(node)
}

fn format(sim: &Sim, disk: &str, options: &CreateOptions) -> Result<(), String> {
    let node = file_node(sim, disk)?;
    let created = sim.run(async { create::create(&node, options).await.map(drop) });
    created.map_err(|e| e.to_string())?.map_err(|e| format!("formatting: {e}"))
}

/// Random writes and zeroes, one after the other: data here and there, in a random order on the disk.
fn age(
    sim: &Sim,
    node: &Value,
    (sectors, operations, filled): (u64, u64, Option<u64>),
    rng: &mut Rng,
    content: &mut HashMap<u64, Tag>,
    zeroes: bool,
) -> Result<(), String> {
    if operations == 0 {
        return Ok(());
    }
    let (graph, node) = graph_of(node.clone())?;
    let work = async {
        for n in 0..operations {
            let start = rng.below(sectors);
            let len = (1 + rng.below(100)).min(sectors - start);
            let zero = zeroes && rng.chance(1, 6);
            let tag = if zero { Tag::ZERO } else { Tag::before(rng.below(1 << 20) << 8 | n) };
            let mut buffer = Buffer::new((len * SECTOR) as usize, 4096);
            fill(tag, start, buffer.bytes_mut());
            let iov = [buffer.iovec()];
            let (offset, from) = (start * SECTOR, Sg::new(&iov));
            let op = match zero {
                true => Op::WriteZeroes { offset, len: len * SECTOR, flags: ZeroFlags::MAY_UNMAP },
                false => Op::Write { offset, from, flags: WriteFlags::empty() },
            };
            node.submit(op)
                .await
                .map_err(|e| format!("ageing, operation {n}, {start}+{len}: {e}"))?;
            content.extend((start..start + len).map(|sector| (sector, tag)));
            let data = content.values().filter(|tag| **tag != Tag::ZERO).count() as u64;
            if filled.is_some_and(|most| data >= most) {
                break;
            }
        }
        node.close().await.map_err(|e| format!("closing after ageing: {e}"))
    };
    sim.run(work).map_err(|e| format!("ageing: {e}"))??;
    drop(node);
    graph.close();
    Ok(())
}

/// The findings of a check.
#[derive(Default)]
pub struct Lines(pub Vec<String>);

impl Watch for Lines {
    fn line(&mut self, text: &str) {
        if self.0.len() < 8 {
            self.0.push(text.to_owned());
        }
    }
}

async fn write(node: &Node, offset: u64, bytes: &[u8]) -> Result<(), String> {
    let len = bytes.len().next_multiple_of(4096);
    let mut buffer = Buffer::new(len, 4096);
    buffer.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
    let iov = [buffer.iovec()];
    let op = Op::Write { offset, from: Sg::new(&iov), flags: WriteFlags::empty() };
    node.driver().submit(op).await.map_err(|e| e.to_string())
}

/// The whole file; also what a last block has beyond its end.
async fn all(node: &Node) -> Result<Vec<u8>, String> {
    let buffer = Buffer::new(node.len() as usize, 4096);
    let iov = [buffer.iovec()];
    let read = node.submit(Op::Read { offset: 0, to: Sg::new(&iov) }).await;
    read.map_err(|e| e.to_string())?;
    let mut bytes = buffer.bytes().to_vec();
    bytes.resize(bytes.len() + (64 << 10), 0);
    Ok(bytes)
}

fn be64(bytes: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap_or_default())
}

fn be32(bytes: &[u8], at: u64) -> u32 {
    (be64(bytes, at) >> 32) as u32
}

/// Adds an internal snapshot by hand: a copy of the L1 table, a snapshot table, the header; a repair counts the references
/// and takes the COPIED flags off.
fn snapshot(sim: &Sim) -> Result<(), String> {
    let node = file_node(sim, "image")?;
    let work = async {
        let header = check::read_header(&node).await.map_err(|e| e.to_string())?;
        let cluster = header.geometry().cluster_size();
        let report = check::check(&node, &header, Fix::Nothing, &mut Lines::default()).await;
        let end =
            report.map_err(|e| e.to_string())?.image_end_offset.next_multiple_of(cluster.max(4096));
        let bytes = all(&node).await?;
        let (l1, n) = (header.l1_table_offset.0 as usize, header.l1_size as usize * 8);
        write(&node, end, &bytes[l1..l1 + n]).await?;
        let table = end + (n as u64).next_multiple_of(cluster.max(4096));
        let mut entry = Vec::new();
        entry.extend(end.to_be_bytes());
        entry.extend(header.l1_size.to_be_bytes());
        entry.extend([0, 1, 0, 1]);
        entry.extend([0; 20]);
        entry.extend(16u32.to_be_bytes());
        entry.extend(0u64.to_be_bytes());
        entry.extend(header.size.to_be_bytes());
        entry.extend(*b"1s");
        entry.resize(entry.len().next_multiple_of(8), 0);
        write(&node, table, &entry).await?;
        let mut first = bytes[..4096].to_vec();
        first[60..64].copy_from_slice(&1u32.to_be_bytes());
        first[64..72].copy_from_slice(&table.to_be_bytes());
        write(&node, 0, &first).await?;
        for round in 0..3 {
            let header = check::read_header(&node).await.map_err(|e| e.to_string())?;
            let mut lines = Lines::default();
            let fix = if round == 2 { Fix::Nothing } else { Fix::All };
            let report = check::check(&node, &header, fix, &mut lines).await;
            let report = report.map_err(|e| format!("making a snapshot: {e}: {:?}", lines.0))?;
            if round == 2 && !report.is_clean() {
                return Err(format!("making a snapshot: {report:?}: {:?}", lines.0));
            }
        }
        node.submit(Op::Flush).await.map_err(|e| e.to_string())
    };
    sim.run(work).map_err(|e| e.to_string())?
}

/// What the snapshot of the image in `node` holds, read by hand.
///
/// # Errors
/// It leads out of the file.
pub async fn frozen_content(node: Arc<Node>) -> Result<Frozen, String> {
    let bytes = all(&node).await?;
    let header = check::read_header(&node).await.map_err(|e| e.to_string())?;
    let g: Geometry = header.geometry();
    let table = header.snapshots_offset.0;
    let (l1, n) = (be64(&bytes, table), u64::from(be32(&bytes, table + 8)));
    let (cluster, mask) = (g.cluster_size(), 0x00ff_ffff_ffff_fe00);
    let entry_size = if g.extended_l2 { 16 } else { 8 };
    let inside = |at: u64| match at + cluster <= bytes.len() as u64 {
        true => Ok(at),
        false => Err(format!("the snapshot leads to {at:#x}, beyond the end")),
    };
    let mut frozen = Frozen::new();
    for i in 0..n {
        let l2 = inside(be64(&bytes, l1 + 8 * i) & mask)?;
        if l2 == 0 {
            continue;
        }
        for k in 0..g.l2_entries() {
            let entry = be64(&bytes, l2 + k * entry_size);
            let bitmap = if g.extended_l2 { be64(&bytes, l2 + k * 16 + 8) } else { 0 };
            let host = inside(entry & mask)?;
            let flags = entry & !mask & !(1 << 63) | bitmap;
            let digest = match host {
                0 => 0,
                host => {
                    Pages::from_bytes(&bytes[host as usize..(host + cluster) as usize]).digest()
                }
            };
            if flags != 0 || host != 0 {
                frozen.insert(i * g.l2_entries() + k, (flags, digest));
            }
        }
    }
    Ok(frozen)
}
