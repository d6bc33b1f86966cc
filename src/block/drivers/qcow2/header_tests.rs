use std::process::Command;

use proptest::prelude::*;

use super::*;

/// The first cluster of an image that `qemu-img create` makes.
fn created(options: &str, more: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", options]).args(more).arg(&path).arg("10M");
    assert!(create.status().unwrap().success());
    let mut bytes = std::fs::read(&path).unwrap();
    let extent = Header::extent(&bytes);
    bytes.resize(extent, 0);
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn error(bytes: &[u8]) -> String {
    Header::read(bytes, Purpose::Read).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn what_qemu_writes_comes_back() {
    for options in [
        "compat=0.10",
        "compat=1.1,cluster_size=512",
        "lazy_refcounts=on,refcount_bits=1",
        "extended_l2=on,compression_type=zstd",
        "cluster_size=2M",
    ] {
        let bytes = created(options, &["-u", "-b", "base.raw", "-F", "raw"]);
        let header = Header::read(&bytes, Purpose::Write).unwrap();
        assert_eq!(header.size, 10 << 20, "{options}");
        assert_eq!(header.backing_file_name().as_deref(), Some("base.raw"));
        assert_eq!(header.backing_format().as_deref(), Some("raw"));
        let out = header.serialise().unwrap();
        let again = Header::read(&padded(&out, bytes.len()), Purpose::Write).unwrap();
        // QEMU leaves a gap before the name; otherwise the bytes are the same.
        let same = Header { backing_file_offset: header.backing_file_offset, ..again };
        assert_eq!(same, header, "{options}");
    }
}

fn padded(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(len, 0);
    bytes
}

#[test]
fn unknown_things_are_kept() {
    let mut header = Header::read(&created("compat=1.1", &[]), Purpose::Read).unwrap();
    header.extensions.push(Extension::Unknown { magic: 0x1234_5678, data: vec![1, 2, 3] });
    header.compatible |= Compatible::from_bits_retain(1 << 40);
    header.autoclear |= Autoclear::from_bits_retain(1 << 41);
    header.header_length = 128;
    header.unknown_fields = vec![0; 7];
    header.unknown_fields.extend([9; 16]);
    let bytes = padded(&header.serialise().unwrap(), 65536);
    assert_eq!(Header::read(&bytes, Purpose::Write).unwrap(), header);
}

#[test]
fn limits_in_qemus_words() {
    let good = created("compat=1.1", &[]);
    let with = |at: usize, value: u32| {
        let mut bytes = good.clone();
        put(&mut bytes, at, value);
        bytes.resize(Header::extent(&bytes).max(bytes.len()), 0);
        error(&bytes)
    };
    assert_eq!(with(0, 0), "Image is not in qcow2 format");
    assert_eq!(with(4, 4), "Unsupported qcow2 version 4");
    assert_eq!(with(20, 8), "Unsupported cluster size: 2^8");
    assert_eq!(with(20, 22), "Unsupported cluster size: 2^22");
    assert_eq!(with(100, 103), "qcow2 header too short");
    assert_eq!(with(100, 65544), "qcow2 header exceeds cluster size");
    assert_eq!(with(8, 1), "Invalid backing file offset");
    assert_eq!(with(96, 7), "Reference count entry width too large; may not exceed 64 bits");
    assert_eq!(with(56, 0), "Image does not contain a reference count table");
    assert_eq!(with(56, 129), "Reference count table too large");
    assert_eq!(with(52, 1), "Reference count table offset invalid");
    assert_eq!(with(60, 65537), "Snapshot table too large");
    assert_eq!(with(68, 1), "Snapshot table offset invalid");
    assert_eq!(with(36, (4 << 20) + 1), "Active L1 table too large");
    assert_eq!(with(44, 1), "Active L1 table offset invalid");
    assert_eq!(with(36, 0), "L1 table is too small");
    assert_eq!(with(24, 1 << 31), "Image is too big");
    assert_eq!(with(104, 2 << 24), "qcow2: unknown compression type: 2");
    let bit = "qcow2: Compression type incompatible feature bit must";
    assert_eq!(with(104, 1 << 24), format!("{bit} be set"));
    assert_eq!(with(76, 8), format!("{bit} not be set"));
    let unknown = "Unsupported qcow2 feature(s): Unknown incompatible feature: 400";
    assert_eq!(with(76, 0x400), unknown);
    assert_eq!(with(116, 65536), "Header extension too large");
}

#[test]
fn unknown_features_have_names() {
    let mut header = Header::read(&created("compat=1.1", &[]), Purpose::Read).unwrap();
    let mut entry = vec![0, 50];
    entry.extend(b"time travel");
    entry.resize(48, 0);
    header.extensions = vec![Extension::FeatureNames(entry)];
    header.incompatible = Incompatible::from_bits_retain(1 << 50 | 1 << 51);
    let bytes = padded(&header.serialise().unwrap(), 65536);
    assert_eq!(
        error(&bytes),
        "Unsupported qcow2 feature(s): time travel, Unknown incompatible feature: 8000000000000"
    );
}

#[test]
fn corrupt_images_can_be_read_and_repaired() {
    let mut bytes = created("compat=1.1", &[]);
    bytes[79] |= 2;
    assert!(Header::read(&bytes, Purpose::Read).is_ok());
    assert!(Header::read(&bytes, Purpose::Check).is_ok());
    let error = Header::read(&bytes, Purpose::Write).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "qcow2: Image is corrupt; cannot be opened read/write");
}

proptest! {
    /// Any header: an answer, and if it is one, it can be written.
    #[test]
    fn never_panics(
        changes in proptest::collection::vec((0usize..512, any::<u8>()), 1..20),
        small: bool,
    ) {
        static IMAGES: std::sync::OnceLock<[Vec<u8>; 2]> = std::sync::OnceLock::new();
        let images = IMAGES.get_or_init(|| {
            let backing = ["-u", "-b", "base.raw", "-F", "raw"];
            [created("compat=1.1", &backing), created("compat=0.10,cluster_size=512", &backing)]
        });
        let mut bytes = images[usize::from(small)].clone();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        let extent = Header::extent(&bytes);
        bytes.resize(extent.max(512), 0);
        for purpose in [Purpose::Read, Purpose::Write, Purpose::Check] {
            if let Ok(header) = Header::read(&bytes, purpose) {
                let _ = header.serialise();
            }
        }
    }
}
