//! Bad images: our words against QEMU's, and what stays readable.

use serde_json::json;
use vhost_user_blk::error::Errno;
use vhost_user_blk::rt;

use super::tools::{Dirs, open};

/// What QEMU says of opening `a`, without the tool's own prefix.
fn qemu(dirs: &Dirs) -> Result<(), String> {
    match dirs.try_run("qemu-io", &["-r", "-f", "qcow2", "-c", "quit", "a"]) {
        Ok(_) => Ok(()),
        Err(text) => {
            let text = text.trim().strip_prefix("qemu-io: can't open device a: ");
            Err(text.unwrap_or("?").to_owned())
        }
    }
}

fn ours(dirs: &Dirs) -> Result<(), String> {
    open(&dirs.path("a"), json!({})).map(|_| ()).map_err(|e| e.to_string())
}

/// Every 32-bit field of the header, with values at its limits: the same answer as QEMU's.
#[test]
fn headers_are_judged_as_qemu_does() {
    let dirs = Dirs::new();
    dirs.create("good", "", &["-u", "-b", "x", "-F", "raw", "10M"]);
    let good = std::fs::read(dirs.path("good")).unwrap();
    std::fs::write(dirs.path("x"), [0; 512]).unwrap();
    for (at, values) in [
        (0, &[0u32][..]),
        (4, &[0, 1, 4, u32::MAX]),
        (8, &[1]),
        (12, &[65536, 65537, 0]),
        (16, &[0, 1024, 65535]),
        (20, &[8, 22, 63]),
        (24, &[1 << 10, 1 << 31]),
        (32, &[3]),
        (36, &[0, (4 << 20) + 1]),
        // (A table beyond the end of the file is ours to refuse: see `tables_beyond_the_end`.)
        (40, &[u32::MAX]),
        (44, &[1, 512]),
        (48, &[u32::MAX]),
        (52, &[512]),
        (56, &[0, 129]),
        (60, &[65537]),
        (68, &[512]),
        (72, &[0x100]),
        (76, &[0x20, 0x400, 8, 2, 4]),
        (96, &[7, 32]),
        (100, &[0, 103, 65544]),
        (104, &[1 << 24, 2 << 24]),
        (116, &[16, 65536, u32::MAX]),
    ] {
        for value in values {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            std::fs::write(dirs.path("a"), bytes).unwrap();
            let dir = format!("{}/", dirs.0.path().display());
            let ours = ours(&dirs).map_err(|e| e.replace(&dir, ""));
            assert_eq!(ours, qemu(&dirs), "byte {at} = {value:#x}");
        }
    }
}

/// An image with one bad entry: the requests that meet it fail, the others do not.
#[test]
fn bad_entries_fail_their_own_requests() {
    for (entry, bitmap) in [
        (0x8000_0000_0005_0200u64, None),
        (0x8000_0000_0005_0002, None),
        (0x4000_00ff_ffff_ffff, None),
        (0x8000_0000_0005_0000, Some(1u64 << 32 | 1)),
        (0, Some(1)),
    ] {
        let dirs = Dirs::new();
        let options = if bitmap.is_some() { "extended_l2=on" } else { "" };
        dirs.create("a", options, &["1M"]);
        dirs.io("a", &["write -P 1 0 1M".to_owned()]);
        let mut bytes = std::fs::read(dirs.path("a")).unwrap();
        let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
        let l2 = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
        let size = if bitmap.is_some() { 16 } else { 8 };
        let at = l2 as usize + 3 * size;
        bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
        if let Some(bitmap) = bitmap {
            bytes[at + 8..at + 16].copy_from_slice(&bitmap.to_be_bytes());
        }
        std::fs::write(dirs.path("a"), bytes).unwrap();
        let image = open(&dirs.path("a"), json!({})).unwrap();
        rt::block_on(async {
            assert_eq!(image.read(3 * 65536 + 512, 512, 1).await, Err(Errno::EIO), "{entry:#x}");
            assert_eq!(image.read(0, 1 << 20, 1).await, Err(Errno::EIO));
            for cluster in [0, 2, 4, 15] {
                let got = image.read(cluster * 65536, 65536, 1).await.unwrap();
                assert!(got.iter().all(|b| *b == 1), "{entry:#x}");
            }
        });
    }
}

#[test]
fn tables_beyond_the_end() {
    let dirs = Dirs::new();
    dirs.create("a", "", &["1G"]);
    dirs.io("a", &["write -P 1 0 64k".to_owned(), "write -P 2 512M 64k".to_owned()]);
    let mut bytes = std::fs::read(dirs.path("a")).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    for (entry, readable) in [
        (0x8000_0000_7fff_0000u64, false),
        (0x8000_0000_0000_0200, false),
        (0x80ff_ffff_ffff_0000, false),
        (0xc000_0000_0000_0000, false),
        (0, true),
        (1 << 63, true),
    ] {
        bytes[l1..l1 + 8].copy_from_slice(&entry.to_be_bytes());
        std::fs::write(dirs.path("a"), &bytes).unwrap();
        let image = open(&dirs.path("a"), json!({})).unwrap();
        rt::block_on(async {
            assert_eq!(image.read(0, 512, 1).await.is_ok(), readable, "{entry:#x}");
            let got = image.read(512 << 20, 65536, 1).await.unwrap();
            assert!(got.iter().all(|b| *b == 2));
        });
    }
    // The L1 table itself.
    bytes.truncate(l1 + 8);
    std::fs::write(dirs.path("a"), &bytes[..l1]).unwrap();
    assert!(ours(&dirs).unwrap_err().starts_with("Could not read L1 table"));
}

#[test]
fn corrupt_compressed_data() {
    for kind in ["zlib", "zstd"] {
        let dirs = Dirs::new();
        let options = format!("compression_type={kind}");
        dirs.create("a", &options, &["256k"]);
        dirs.io("a", &["write -c -P 1 0 64k".to_owned(), "write -c -P 2 64k 64k".to_owned()]);
        let mut bytes = std::fs::read(dirs.path("a")).unwrap();
        let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
        let l2 = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
        let entry = u64::from_be_bytes(bytes[l2 as usize..][..8].try_into().unwrap());
        let data = (entry & ((1 << 54) - 1)) as usize;
        bytes[data..data + 8].fill(0xff);
        std::fs::write(dirs.path("a"), bytes).unwrap();
        let image = open(&dirs.path("a"), json!({})).unwrap();
        rt::block_on(async {
            assert_eq!(image.read(0, 512, 1).await, Err(Errno::EIO));
            assert!(image.read(65536, 65536, 1).await.unwrap().iter().all(|b| *b == 2));
        });
    }
}

#[test]
fn options_in_qemus_words() {
    let dirs = Dirs::new();
    dirs.create("a", "", &["10M"]);
    dirs.create("old", "compat=0.10", &["10M"]);
    let text = |name: &str, more| {
        open(&dirs.path(name), more).map(|_| ()).map_err(|e| e.to_string()).unwrap_err()
    };
    assert_eq!(
        text("a", json!({ "l2-cache-entry-size": 1000 })),
        "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"
    );
    assert_eq!(
        text("old", json!({ "lazy-refcounts": true })),
        "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
    );
    assert_eq!(
        text("a", json!({ "data-file": { "driver": "null-co" } })),
        "'data-file' can only be set for images with an external data file"
    );
    assert_eq!(
        text("a", json!({ "encrypt": { "format": "luks", "key-secret": "s" } })),
        "No encryption in image header, but options specified format 'luks'"
    );
    assert_eq!(
        text("a", json!({ "x": 1 })),
        "Block format 'qcow2' does not support the option 'x'"
    );
    for auto in [false, true] {
        let options = json!({ "read-only": false, "auto-read-only": auto });
        assert!(!open(&dirs.path("a"), options).unwrap().node().read_only());
    }
}
