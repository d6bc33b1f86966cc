//! Opening images for writing, beside qemu-storage-daemon.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use serde_json::json;
use tempfile::TempDir;

use super::super::extension::{be32, be64};
use super::*;
use crate::block::perm::Perms;
use crate::block::{Graph, Op, WriteFlags};
use crate::mem::Sg;
use crate::qapi::Options;
use crate::rt::Buffer;

fn run(dir: &TempDir, program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).current_dir(dir.path()).output().unwrap()
}

/// Runs `lines` in a new directory: they make an image called `x`.
fn made(lines: &str) -> (TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let out = run(&dir, "sh", &["-ec", lines]);
    assert!(out.status.success(), "{lines}: {}", String::from_utf8_lossy(&out.stderr));
    let bytes = std::fs::read(dir.path().join("x")).unwrap();
    (dir, bytes)
}

const PLAIN: &str = "qemu-img create -q -f qcow2 x 10M; qemu-io -c 'write -P 1 0 1M' x";

fn add(path: &Path, read_only: bool) -> Result<Arc<Graph>> {
    let graph = Graph::new();
    let file = json!({ "driver": "file", "filename": path });
    let options =
        json!({ "driver": "qcow2", "node-name": "n", "read-only": read_only, "file": file });
    let options: Options = serde_json::from_value(options).unwrap();
    graph.add(options).map(|_| Arc::clone(&graph)).inspect_err(|_| graph.close())
}

/// Opens `x` and closes it; what we say.
fn ours(dir: &TempDir, read_only: bool) -> std::result::Result<(), String> {
    match add(&dir.path().join("x"), read_only) {
        Ok(graph) => {
            graph.close();
            Ok(())
        }
        Err(e) => {
            let hint = e.hint().map(|hint| format!("\n{hint}")).unwrap_or_default();
            Err(format!("{}{hint}", e.message()))
        }
    }
}

/// What qemu-storage-daemon says of the same.
fn theirs(dir: &TempDir, read_only: bool) -> std::result::Result<(), String> {
    let node =
        format!("driver=qcow2,node-name=n,read-only={read_only},file.driver=file,file.filename=x")
            .replace("=true", "=on")
            .replace("=false", "=off");
    // The second option ends the program.
    let args = ["--blockdev", &node, "--blockdev", "driver=nope"];
    let out = run(dir, "qemu-storage-daemon", &args);
    let text = String::from_utf8_lossy(&out.stderr).trim().to_owned();
    let prefix = format!("qemu-storage-daemon: --blockdev {node}: ");
    match text.find(&prefix) {
        Some(at) => Err(text[at + prefix.len()..].to_owned()),
        None => {
            assert!(text.contains("'nope'"), "{text}");
            Ok(())
        }
    }
}

/// Writes `x` with `edits`: offsets and bytes.
fn write(dir: &TempDir, image: &[u8], edits: &[(u64, &[u8])]) {
    let mut bytes = image.to_vec();
    for (at, edit) in edits {
        bytes[*at as usize..][..edit.len()].copy_from_slice(edit);
    }
    std::fs::write(dir.path().join("x"), bytes).unwrap();
}

/// The same answer as QEMU's, whether it is opened for writing or not; and reading changes nothing.
fn judged_alike(dir: &TempDir, image: &[u8], edits: &[(u64, &[u8])]) -> String {
    for read_only in [true, false] {
        write(dir, image, edits);
        let theirs = theirs(dir, read_only);
        write(dir, image, edits);
        let before = std::fs::read(dir.path().join("x")).unwrap();
        let ours = ours(dir, read_only);
        assert_eq!(ours, theirs, "{edits:?}, read-only: {read_only}");
        if read_only || ours.is_err() {
            assert!(before == std::fs::read(dir.path().join("x")).unwrap(), "{edits:?}: changed");
        }
        if !read_only {
            return ours.err().unwrap_or_default();
        }
    }
    unreachable!("the loop returns")
}

fn check(dir: &TempDir) -> (Option<i32>, String) {
    let out = run(dir, "qemu-img", &["check", "x"]);
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}

fn bytes_of(dir: &TempDir) -> Vec<u8> {
    std::fs::read(dir.path().join("x")).unwrap()
}

#[test]
fn headers_are_judged_as_qemu_does() {
    let (dir, image) = made(PLAIN);
    let text = judged_alike(&dir, &image, &[(79, &[2])]);
    assert_eq!(text, "qcow2: Image is corrupt; cannot be opened read/write");
    assert_eq!(judged_alike(&dir, &image, &[]), "");
    let unaligned = judged_alike(&dir, &image, &[(48, &0x10200u64.to_be_bytes())]);
    assert_eq!(unaligned, "Reference count table offset invalid");
    // QEMU would write to an image whose refcounts are not there.
    write(&dir, &image, &[(48, &0x7fff_0000u64.to_be_bytes())]);
    assert_eq!((ours(&dir, true), theirs(&dir, false)), (Ok(()), Ok(())));
    write(&dir, &image, &[(48, &0x7fff_0000u64.to_be_bytes())]);
    assert!(ours(&dir, false).unwrap_err().starts_with("Could not initialize refcount handling"));
}

#[test]
fn snapshot_tables_are_judged_as_qemu_does() {
    let (dir, image) =
        made(&format!("{PLAIN}; qemu-img snapshot -c a x; qemu-img snapshot -c b x"));
    let table = be64(&image, 64);
    assert_eq!(judged_alike(&dir, &image, &[]), "");
    let text = judged_alike(&dir, &image, &[(table + 36, &2000u32.to_be_bytes())]);
    assert!(
        text.starts_with("Too much extra metadata in snapshot table entry 0\nYou can"),
        "{text}"
    );
    for offset in [0u64, 512, 0x7fff_0000, 1 << 63] {
        judged_alike(&dir, &image, &[(64, &offset.to_be_bytes())]);
    }
    for count in [3u32, 65536, 65537] {
        judged_alike(&dir, &image, &[(60, &count.to_be_bytes())]);
    }
    judged_alike(&dir, &image, &[(table, &0x30200u64.to_be_bytes())]);
    // More than 64 MiB: 600 snapshots with the longest names.
    let mut big = vec![0; 40 + 2 * 65535];
    big[12..16].fill(0xff);
    big.resize(big.len().next_multiple_of(8), 0);
    let end = image.len().next_multiple_of(65536) as u64;
    let mut image = image;
    image.resize(end as usize, 0);
    image.extend(big.repeat(600));
    let edits: [(u64, &[u8]); 2] = [(60, &600u32.to_be_bytes()), (64, &end.to_be_bytes())];
    let text = judged_alike(&dir, &image, &edits);
    assert!(text.starts_with("Snapshot table is too big\nYou can force-remove all"), "{text}");
}

/// Where the data of the bitmaps extension is.
fn bitmaps_extension(image: &[u8]) -> u64 {
    let mut at = be32(image, 100) as usize;
    while be32(image, at) != 0x2385_2875 {
        at += 8 + (be32(image, at + 4) as usize).next_multiple_of(8);
    }
    at as u64 + 8
}

#[test]
fn bitmap_directories_are_judged_as_qemu_does() {
    let (dir, image) = made(&format!("{PLAIN}; qemu-img bitmap --add x b1"));
    let at = bitmaps_extension(&image);
    let directory = be64(&image, at as usize + 16);
    let size = be64(&image, at as usize + 8);
    let text = |edits: &[(u64, &[u8])]| judged_alike(&dir, &image, edits);
    assert_eq!(text(&[]), "");
    let put = |n: u64| n.to_be_bytes();
    assert_eq!(text(&[(at + 16, &put(0))]), "Broken bitmap directory");
    assert_eq!(text(&[(at + 8, &put(0))]), "Requested bitmap directory size is zero");
    assert_eq!(text(&[(at + 8, &put(8))]), "Broken bitmap directory");
    text(&[(at + 16, &put(0x7fff_0000))]);
    text(&[(at + 8, &put(2 * size))]);
    text(&[(at, &2u32.to_be_bytes())]);
    text(&[(directory + 20, &8u32.to_be_bytes()), (at + 8, &put(size + 8))]);
    text(&[(directory + 18, &[0x05, 0])]);
    text(&[(directory + 18, &[0, 0]), (at + 8, &put(24))]);
    let unfit = "Bitmap 'b1' doesn't satisfy the constraints";
    assert_eq!(text(&[(directory + 12, &8u32.to_be_bytes())]), unfit);
    assert_eq!(text(&[(directory + 16, &[2])]), unfit);
    assert_eq!(text(&[(directory + 17, &[5])]), unfit);
    assert_eq!(text(&[(directory, &put(0x30200))]), unfit);
    assert_eq!(text(&[(directory + 8, &0u32.to_be_bytes())]), unfit);
    assert_eq!(text(&[(directory + 12, &1u32.to_be_bytes())]), "");
}

/// Refcounts that are behind, in an image that says so: right afterwards, and the guest's data is what it was. To read it,
/// nothing is repaired.
#[test]
fn dirty_images_are_repaired() {
    for options in ["", "-o lazy_refcounts=on", "-o extended_l2=on", "-o refcount_bits=1"] {
        let (dir, image) = made(&format!(
            "qemu-img create -q -f qcow2 {options} x 10M; qemu-io -c 'write -P 1 0 1M' x; \
             cp x before"
        ));
        // Two thirds of the refcount block are lost.
        let block = be64(&image, be64(&image, 48) as usize);
        let width = 1usize << be32(&image, 96);
        let zeroes = vec![0; 12 * width / 8 + 1];
        let dirty = [image[79] | 1];
        let edits: [(u64, &[u8]); 2] = [(79, &dirty), (block + 6 * width as u64 / 8, &zeroes)];
        write(&dir, &image, &edits);
        let broken = bytes_of(&dir);
        assert_eq!(ours(&dir, true), Ok(()));
        assert!(bytes_of(&dir) == broken, "{options}: opened to be read");
        assert_eq!(ours(&dir, false), Ok(()));
        assert_eq!(be64(&bytes_of(&dir), 72) & 1, 0, "{options}: still dirty");
        assert_eq!(check(&dir), (Some(0), String::new()), "{options}");
        let same = run(&dir, "qemu-img", &["compare", "x", "before"]);
        assert!(same.status.success(), "{options}: {same:?}");
    }
}

/// A dirty image whose refcounts are right: only the bit changes.
#[test]
fn only_the_bit_of_a_sound_image_changes() {
    let (dir, image) = made(PLAIN);
    write(&dir, &image, &[(79, &[1])]);
    assert_eq!(ours(&dir, false), Ok(()));
    assert!(bytes_of(&dir) == image);
}

/// New refcount structures: what the write path gets is the new ones.
#[test]
fn after_a_repair_everything_is_read_again() {
    let (dir, image) = made(PLAIN);
    let table = be64(&image, 48);
    // A refcount block that is no block: all are made anew.
    write(&dir, &image, &[(79, &[1]), (table, &0x10200u64.to_be_bytes())]);
    let (header, _, all) = writable(&dir, Overlap::REFCOUNT_TABLE);
    assert_ne!(header.refcount_table_offset.0, table);
    assert_eq!(header.incompatible, Incompatible::empty());
    let now = bytes_of(&dir);
    assert_eq!(be64(&now, 48), header.refcount_table_offset.0);
    assert_eq!(all.reftable[0], be64(&now, header.refcount_table_offset.0 as usize));
    assert_eq!(all.tables, [clusters(header.refcount_table_offset.0, 1, Overlap::REFCOUNT_TABLE)]);
    assert_eq!(check(&dir), (Some(0), String::new()));
}

#[test]
fn what_cannot_be_repaired_is_not_opened() {
    let (dir, image) = made(&format!("{PLAIN}; qemu-img bitmap --add x b1"));
    let directory = be64(&image, bitmaps_extension(&image) as usize + 16) as usize;
    let table = be64(&image, directory);
    // What this bitmap occupies cannot be told, so neither can what is free.
    write(&dir, &image, &[(79, &[1]), (table, &0x200u64.to_be_bytes())]);
    let text = ours(&dir, false).unwrap_err();
    assert_eq!(text, "Could not repair dirty image: Invalid argument");
    assert_eq!(be64(&bytes_of(&dir), 72) & 1, 1);
}

/// Unknown autoclear bits go; those of bitmaps and of a raw data file stay. Everything else stays as it is but for the flags of
/// bitmaps.
#[test]
fn autoclear_bits_are_cleared_by_writers_only() {
    let bitmaps = format!("{PLAIN}; qemu-img bitmap --add x b1");
    let data_file = "qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on x 10M";
    for (lines, bits, kept) in [
        (PLAIN, 0xf000_0000_0000_0000u64, 0u64),
        // Nothing is there that the bit could vouch for.
        (PLAIN, 1, 0),
        (bitmaps.as_str(), 1, 1),
        (bitmaps.as_str(), 0x1_0001, 1),
        (data_file, 2, 2),
        (data_file, 0x102, 2),
    ] {
        let (dir, image) = made(lines);
        write(&dir, &image, &[(88, &bits.to_be_bytes())]);
        let before = bytes_of(&dir);
        // A relative name is relative to where the tests run.
        let data = dir.path().join("data");
        let open = |read_only| {
            let graph = Graph::new();
            let file = json!({ "driver": "file", "filename": dir.path().join("x") });
            let mut options = json!({
                "driver": "qcow2", "node-name": "n", "read-only": read_only, "file": file
            });
            if data.exists() {
                options["data-file"] = json!({ "driver": "file", "filename": data });
            }
            let node = graph.add(serde_json::from_value(options).unwrap()).unwrap();
            drop(node);
            graph.close();
        };
        open(true);
        assert!(bytes_of(&dir) == before, "{lines}: opened to be read");
        open(false);
        let mut want = before;
        want[88..96].copy_from_slice(&kept.to_be_bytes());
        if lines == bitmaps {
            want[flags_of_bitmap(&image)] |= 1;
        }
        assert!(bytes_of(&dir) == want, "{lines}: {bits:#x}");
    }
}

/// Where the flag "in use" of the first bitmap is.
fn flags_of_bitmap(image: &[u8]) -> usize {
    be64(image, bitmaps_extension(image) as usize + 16) as usize + 15
}

fn info(dir: &TempDir) -> serde_json::Value {
    let out = run(dir, "qemu-img", &["info", "--output=json", "x"]);
    assert!(out.status.success(), "{out:?}");
    let info: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// The names of the bitmaps that QEMU calls inconsistent, and of the others.
fn bitmaps(dir: &TempDir) -> (Vec<String>, Vec<String>) {
    let info = info(dir);
    let all = info.as_array().cloned().unwrap_or_default();
    let stale =
        |bitmap: &serde_json::Value| bitmap["flags"].as_array().unwrap().contains(&json!("in-use"));
    let names = |bitmap: serde_json::Value| bitmap["name"].as_str().unwrap().to_owned();
    let (stale, fresh): (Vec<_>, Vec<_>) = all.into_iter().partition(stale);
    (stale.into_iter().map(names).collect(), fresh.into_iter().map(names).collect())
}

/// As while QEMU has the image open: bitmaps are inconsistent, nothing is leaked, and they can be removed. With enough of them
/// for a directory of many sectors, one of them marked already, and one disabled.
#[test]
fn bitmaps_are_inconsistent_from_then_on() {
    let many = "for n in $(seq 24); do qemu-img bitmap --add x a-bitmap-with-a-long-name-$n; done";
    let lines = format!("{PLAIN}; {many}; qemu-img bitmap --add --disable x off; cp x fresh");
    let (dir, image) = made(&lines);
    let (stale, fresh) = bitmaps(&dir);
    assert_eq!((stale.len(), fresh.len()), (0, 25));
    let flags = flags_of_bitmap(&image);
    write(&dir, &image, &[(flags as u64, &[image[flags] | 1])]);
    assert_eq!(bitmaps(&dir).0.len(), 1);
    assert_eq!(ours(&dir, true), Ok(()));
    assert_eq!(bitmaps(&dir).0.len(), 1, "opened to be read");

    write_with_ours(&dir);
    let (stale, fresh) = bitmaps(&dir);
    assert_eq!((stale.len(), fresh.len()), (25, 0));
    assert_eq!(check(&dir), (Some(0), String::new()));
    let written = run(&dir, "qemu-io", &["-r", "-c", "read -P 9 5M 1M", "x"]);
    assert!(!String::from_utf8_lossy(&written.stdout).contains("failed"), "{written:?}");
    // Once more: nothing to do.
    let before = bytes_of(&dir);
    assert_eq!(ours(&dir, false), Ok(()));
    assert!(bytes_of(&dir) == before);
    for name in &stale {
        let out = run(&dir, "qemu-img", &["bitmap", "--remove", "x", name]);
        assert!(out.status.success(), "{out:?}");
    }
    assert_eq!(info(&dir), serde_json::Value::Null);
    assert_eq!(check(&dir), (Some(0), String::new()));
}

/// Also when the image is repaired first.
#[test]
fn bitmaps_of_a_dirty_image_are_marked_too() {
    let (dir, image) = made(&format!("{PLAIN}; qemu-img bitmap --add x b1"));
    write(&dir, &image, &[(79, &[1])]);
    write_with_ours(&dir);
    assert_eq!(bitmaps(&dir), (vec!["b1".to_owned()], vec![]));
    assert_eq!(check(&dir), (Some(0), String::new()));
}

/// Writes a mebibyte through the driver.
fn write_with_ours(dir: &TempDir) {
    let graph = add(&dir.path().join("x"), false).unwrap();
    let node = graph.find("n").unwrap();
    let user = graph.attach_root(&node, "the test", Perms::device(true)).unwrap();
    let mut buffer = Buffer::new(1 << 20, 4096);
    buffer.bytes_mut().fill(9);
    let iov = [buffer.iovec()];
    let op = Op::Write { offset: 5 << 20, from: Sg::new(&iov), flags: WriteFlags::empty() };
    rt::block_on(node.submit(op)).unwrap();
    drop(node);
    graph.detach(user);
    assert!(graph.close_all());
}

/// What the write path gets of `x`.
fn writable(dir: &TempDir, overlap: Overlap) -> (Header, L1Table, ForWriting) {
    let graph = Graph::new();
    let options = json!({ "driver": "file", "node-name": "f", "filename": dir.path().join("x") });
    let node = graph.add(serde_json::from_value(options).unwrap()).unwrap();
    let user = graph.attach_root(&node, "the test", Perms::device(true)).unwrap();
    let header = Header::read(&read_header(&node).unwrap(), Purpose::Write).unwrap();
    let found = Found {
        l1: read_l1(&node, &header).unwrap(),
        reftable: read_reftable(&node, &header).unwrap(),
        snapshots: judge(&node, &header).unwrap(),
        header,
    };
    let all = found.into_writable(&node, overlap, &replay::Opened::default()).unwrap();
    drop(node);
    graph.detach(user);
    graph.close();
    all
}

fn clusters(offset: u64, count: u64, kind: Overlap) -> (Range<u64>, Overlap) {
    (offset >> 16..(offset >> 16) + count, kind)
}

#[test]
fn metadata_is_found_by_kind() {
    let (dir, image) = made(
        "qemu-img create -q -f qcow2 x 2G; qemu-io -c 'write 0 1M' -c 'write 600M 64k' x; \
         qemu-img snapshot -c a x; qemu-io -c 'write 600M 64k' -c 'write 1100M 64k' x; \
         qemu-img bitmap --add x b1",
    );
    let word = |at: u64| be64(&image, at as usize);
    let offset = |at| word(at) & OFFSET_MASK;
    let (l1, reftable, snapshots) = (word(40), word(48), word(64));
    let inactive = word(snapshots);
    let directory = word(bitmaps_extension(&image) + 16);
    let sorted = |mut list: Vec<u64>, kind| {
        list.sort_unstable();
        list.into_iter().map(|at| clusters(at, 1, kind)).collect::<Vec<_>>()
    };
    let l2 = [0, 1, 2].map(|index| offset(l1 + 8 * index)).to_vec();
    let inactive_l2 = [0, 1].map(|index| offset(inactive + 8 * index)).to_vec();
    assert_ne!(l2[1], inactive_l2[1]);
    let mut want = vec![
        clusters(0, 1, Overlap::MAIN_HEADER),
        clusters(l1, 1, Overlap::ACTIVE_L1),
        clusters(word(reftable), 1, Overlap::REFCOUNT_BLOCK),
        clusters(reftable, 1, Overlap::REFCOUNT_TABLE),
        clusters(snapshots, 1, Overlap::SNAPSHOT_TABLE),
        clusters(inactive, 1, Overlap::INACTIVE_L1),
        clusters(directory, 1, Overlap::BITMAP_DIRECTORY),
    ];
    want.extend(sorted(l2, Overlap::ACTIVE_L2));
    want.extend(sorted(inactive_l2, Overlap::INACTIVE_L2));
    let order = |list: &mut Vec<(Range<u64>, Overlap)>| {
        list.sort_by_key(|(range, kind)| (kind.bits(), range.start));
    };
    let (_, l1, all) = writable(&dir, Overlap::all());
    let mut tables = all.tables;
    order(&mut want);
    order(&mut tables);
    assert_eq!(tables, want);
    assert_eq!((all.reftable.len(), all.reftable[0], l1.len()), (8192, word(reftable), 4));
    // Only the kinds that are asked for.
    let some = Overlap::MAIN_HEADER | Overlap::INACTIVE_L2;
    let mut tables = writable(&dir, some).2.tables;
    order(&mut tables);
    want.retain(|(_, kind)| some.contains(*kind));
    assert_eq!(tables, want);
    assert!(writable(&dir, Overlap::empty()).2.tables.is_empty());
}

#[test]
fn neighbours_are_one_range() {
    let mut tables = Tables { cluster: 512, overlap: Overlap::ACTIVE_L2, list: Vec::new() };
    tables.add(Overlap::ACTIVE_L2, [(1024, 512), (512, 512), (700, 512), (4096, 1), (0, 0)]);
    tables.add(Overlap::ACTIVE_L1, [(0, 512)]);
    assert_eq!(tables.list, [(1..3, Overlap::ACTIVE_L2), (8..9, Overlap::ACTIVE_L2)]);
}
