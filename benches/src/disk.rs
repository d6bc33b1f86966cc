//! Where the bytes of a qcow2 disk are: look-ups of allocated clusters in cached tables, down to the file.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use vhost_user_blk::block::{Dir, Graph, Map, Node, Op};
use vhost_user_blk::mem::Sg;
use vhost_user_blk::rt::{self, Buffer};

use crate::Case;

const CLUSTER: u64 = 1 << 16;
const CLUSTERS: u64 = CLUSTER / 8;
const DATA_AT: u64 = 4 * CLUSTER;
const LOOKUPS: u32 = 32;

pub struct Lookups {
    root: Arc<Node>,
    offsets: Vec<u64>,
    found: usize,
}

/// An image of one L2 table's length, all allocated: version 2, to be read only, so without refcounts that are right.
fn image(path: &Path) {
    let mut tables = vec![0; 4 * usize::try_from(CLUSTER).expect("64 KiB")];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = usize::try_from(at).expect("below 256 KiB");
        tables[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"QFI\xfb");
    put(4, &2u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(CLUSTERS * CLUSTER).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &CLUSTER.to_be_bytes());
    put(48, &(3 * CLUSTER).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    let entry = |at: u64| (1 << 63 | at).to_be_bytes();
    put(CLUSTER, &entry(2 * CLUSTER));
    for n in 0..CLUSTERS {
        put(2 * CLUSTER + 8 * n, &entry(DATA_AT + n * CLUSTER));
    }
    let file = File::create(path).expect("an image");
    file.write_all_at(&tables, 0).expect("its tables");
    file.set_len(DATA_AT + CLUSTERS * CLUSTER).expect("its length");
}

impl Lookups {
    pub fn new(dir: &Path) -> Lookups {
        let path = dir.join("image.qcow2");
        image(&path);
        let node = json!({
            "driver": "qcow2", "node-name": "n", "read-only": true,
            "file": { "driver": "file", "filename": path, "aio": "threads" },
        });
        let Value::Object(options) = node else { unreachable!("an object") };
        let root = Graph::new().add(options).expect("a node");
        // Each read has its slice of the table cached.
        let buffer = Buffer::new(512, 512);
        for offset in (0..CLUSTERS * CLUSTER).step_by(1 << 24) {
            let to = [buffer.iovec()];
            let read = Op::Read { offset, to: Sg::new(&to) };
            rt::block_on(root.submit(read)).expect("a read");
        }
        let offset = |n: u64| n * 7919 % CLUSTERS * CLUSTER + 4096 * (n % 16);
        let offsets = (0..LOOKUPS.into()).map(offset).collect();
        Lookups { root, offsets, found: LOOKUPS as usize }
    }
}

impl Case for Lookups {
    fn ops(&self) -> u32 {
        LOOKUPS
    }

    fn prepare(&mut self) {
        assert_eq!(self.found, self.offsets.len());
        self.found = 0;
    }

    fn run(&mut self) {
        for offset in &self.offsets {
            let located = black_box(&self.root).locate(Dir::Read, *offset, 4096);
            let place =
                matches!(located.map, Map::File { offset: at, .. } if at == offset + DATA_AT);
            self.found += usize::from(place);
        }
    }
}
