//! Random bytes in small images: an error or some data, never a panic or a hang.

use std::sync::OnceLock;

use proptest::prelude::*;
use serde_json::json;
use vhost_user_blk::rt;

use super::tools::{Dirs, open};

/// Small images of several kinds, and where their metadata is.
fn seeds() -> &'static Vec<Vec<u8>> {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let dirs = Dirs::new();
        let images = [
            "cluster_size=512",
            "cluster_size=512,compat=0.10",
            "cluster_size=16k,extended_l2=on",
            "cluster_size=4k,compression_type=zstd",
        ];
        let make = |options: &&str| {
            dirs.create("a", options, &["256k"]);
            let writes = ["write -P 1 0 40k", "write -c -P 2 64k 16k", "write -P 3 128k 512"];
            dirs.io("a", &writes.map(str::to_owned));
            std::fs::read(dirs.path("a")).unwrap()
        };
        images.iter().map(make).collect()
    })
}

/// The places of all metadata: the header, and blocks that a pointer leads to.
fn metadata(bytes: &[u8]) -> Vec<usize> {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let mut places: Vec<usize> = (0..200).collect();
    let l1 = word(40) as usize;
    let entries = u32::from_be_bytes(bytes[36..40].try_into().unwrap()) as usize;
    for i in 0..entries {
        places.extend(l1 + i * 8..l1 + i * 8 + 8);
        let l2 = (word(l1 + i * 8) & 0x00ff_ffff_ffff_fe00) as usize;
        if l2 != 0 {
            places.extend(l2..(l2 + 512).min(bytes.len()));
        }
    }
    places
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn mutated_metadata(
        seed in 0usize..4,
        changes in proptest::collection::vec((any::<u32>(), any::<u8>()), 1..12),
        cut in proptest::option::of(0.0f64..1.0),
    ) {
        let mut bytes = seeds()[seed].clone();
        let places = metadata(&bytes);
        for (at, byte) in changes {
            bytes[places[at as usize % places.len()]] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate((bytes.len() as f64 * cut) as usize);
        }
        let dirs = Dirs::new();
        std::fs::write(dirs.path("a"), bytes).unwrap();
        if let Ok(image) = open(&dirs.path("a"), json!({ "backing": null })) {
            rt::block_on(async {
                let len = image.node().len();
                for offset in (0..len.min(512 << 10)).step_by(8192) {
                    let n = (len - offset).min(8192) as usize;
                    let _ = image.read(offset, n, 1).await;
                }
                let n = len.min(1 << 20) as usize;
                if n > 0 {
                    let _ = image.read(0, n, 1).await;
                    let _ = image.read(len - n as u64, n, 1).await;
                }
            });
        }
    }
}
