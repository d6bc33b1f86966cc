//! Longer disks: `Node::truncate` on qcow2 nodes over real files, judged by QEMU's tools.
#![allow(clippy::unwrap_used, reason = "tests")]

#[allow(dead_code, reason = "the tests of reading use the rest")]
#[path = "qcow2/tools.rs"]
mod tools;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tools::{Dirs, Open, Random};
use vhost_user_blk::block::perm::{Perm, Perms};
use vhost_user_blk::block::{Graph, Node, Op, WriteFlags};
use vhost_user_blk::error::Errno;
use vhost_user_blk::mem::Sg;
use vhost_user_blk::rt::{self, Buffer};

/// What one L2 table describes, with entries of 8 bytes.
fn cover(cluster: u64) -> u64 {
    cluster * cluster / 8
}

/// The image `a`, open for writing.
fn open(dirs: &Dirs) -> Open {
    let graph = Graph::new();
    let more = json!({"read-only": false, "discard": "unmap"});
    let node = graph.add(tools::options(&dirs.path("a"), more)).unwrap();
    let mut perms = Perms::device(true);
    perms.used |= Perm::RESIZE;
    let user = graph.attach_root(&node, "the test", perms).unwrap();
    Open { user, graph }
}

fn close(open: Open) {
    rt::block_on(open.node().close()).unwrap();
    drop(open);
}

async fn write(node: &Node, offset: u64, bytes: &[u8]) {
    let mut buffer = Buffer::new(bytes.len(), 4096);
    buffer.bytes_mut().copy_from_slice(bytes);
    let iov = [buffer.iovec()];
    let flags = WriteFlags::empty();
    node.submit(Op::Write { offset, from: Sg::new(&iov), flags }).await.unwrap();
}

/// What the guest's disk should hold, and writes to both.
struct Guest {
    want: Vec<u8>,
    random: Random,
}

impl Guest {
    fn new(want: Vec<u8>) -> Guest {
        Guest { want, random: Random(7) }
    }

    /// The disk is longer; what is added reads as zeroes.
    fn grow(&mut self, node: &Node, len: u64) {
        rt::block_on(node.truncate(len)).unwrap();
        assert_eq!(node.len(), len);
        self.want.resize(len as usize, 0);
    }

    /// Writes at random places, with the last sectors among them.
    fn scribble(&mut self, node: &Node, count: u64) {
        let sectors = self.want.len() as u64 / 512;
        rt::block_on(async {
            for n in 0..count {
                let at = if n == 0 { sectors - 1 } else { self.random.below(sectors) };
                let len = (1 + self.random.below(40)).min(sectors - at) * 512;
                let bytes = vec![1 + self.random.below(255) as u8; len as usize];
                write(node, at * 512, &bytes).await;
                self.want[(at * 512) as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
        });
    }

    fn compare(&self, node: &Node, what: &str) {
        let got = rt::block_on(tools::read(node, 0, self.want.len(), 1)).unwrap();
        same(&got, &self.want, what);
    }

    /// The image, closed, is as QEMU would have it.
    fn judge(&self, dirs: &Dirs, what: &str) {
        judge(dirs, self.want.len() as u64, what);
        same(&dirs.expected("a"), &self.want, what);
    }
}

fn same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let wrong = got.chunks(512).zip(want.chunks(512)).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{what}: the first sector that is wrong");
}

/// No errors, no leaks, the length.
fn judge(dirs: &Dirs, len: u64, what: &str) {
    dirs.try_run("qemu-img", &["check", "-q", "-f", "qcow2", "a"])
        .unwrap_or_else(|e| panic!("{what}: {e}"));
    let info = dirs.run("qemu-img", &["info", "--output=json", "-f", "qcow2", "a"]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], len, "{what}");
}

/// Where the L1 table is, and its entries.
fn l1(dirs: &Dirs) -> (u64, u32) {
    let mut field = [0; 12];
    File::open(dirs.path("a")).unwrap().read_exact_at(&mut field, 36).unwrap();
    let (entries, offset) = field.split_at(4);
    (
        u64::from_be_bytes(offset.try_into().unwrap()),
        u32::from_be_bytes(entries.try_into().unwrap()),
    )
}

/// The image `a` of `size` bytes, once longer: the rest of its last cluster holds old data. What it shows.
fn shortened(dirs: &Dirs, options: &str, cluster: u64, size: u64) -> Vec<u8> {
    let longer = size.next_multiple_of(cluster);
    dirs.create("a", options, &[&longer.to_string()]);
    dirs.io("a", &[format!("write -P 221 0 {longer}")]);
    if longer > size {
        let resize = ["resize", "-q", "-f", "qcow2", "--shrink", "a", &size.to_string()];
        dirs.run("qemu-img", &resize);
    }
    vec![221; size as usize]
}

/// Grows through `sizes`, with writes and comparisons; then again as QEMU sees it, and once more after reopening.
fn grow_through(dirs: &Dirs, guest: &mut Guest, sizes: &[u64], what: &str) {
    let image = open(dirs);
    for size in sizes {
        guest.grow(image.node(), *size);
        guest.compare(image.node(), &format!("{what}, grown to {size}"));
        guest.scribble(image.node(), 3);
    }
    guest.compare(image.node(), what);
    close(image);
    guest.judge(dirs, what);
    let image = open(dirs);
    guest.compare(image.node(), &format!("{what}, opened again"));
    guest.scribble(image.node(), 5);
    let longer = guest.want.len() as u64 + 7 * 512;
    guest.grow(image.node(), longer);
    guest.compare(image.node(), &format!("{what}, grown again"));
    close(image);
    guest.judge(dirs, &format!("{what}, used again"));
}

#[test]
fn every_cluster_size() {
    for bits in 9..=21 {
        for odd in [0, 3 * 512] {
            let (dirs, cluster) = (Dirs::new(), 1u64 << bits);
            let size = 3 * cluster + odd % cluster;
            let options = format!("cluster_size={cluster}");
            let mut guest = Guest::new(shortened(&dirs, &options, cluster, size));
            // In the same cluster, if there is room; in the next; so far that the table moves, if that is not too far.
            let mut sizes = vec![size + 512, size + cluster + 512];
            if bits <= 13 {
                sizes.extend([cover(cluster) + 512, 2 * cover(cluster)]);
            }
            grow_through(&dirs, &mut guest, &sizes, &format!("{cluster} + {odd}"));
        }
    }
}

/// Large clusters: a disk too long to read as a whole.
#[test]
fn huge_disks() {
    for (bits, more) in [(16, "extended_l2=off"), (16, "extended_l2=on"), (21, "lazy_refcounts=on")]
    {
        let (dirs, cluster) = (Dirs::new(), 1u64 << bits);
        dirs.create("a", &format!("cluster_size={cluster},{more}"), &["1M"]);
        let mut before = l1(&dirs);
        for n in [1, 3, 4] {
            let len = n * cover(cluster) + 512;
            let image = open(&dirs);
            let node = image.node();
            rt::block_on(async {
                node.truncate(len).await.unwrap();
                let zeroes = tools::read(node, len - (1 << 20), 1 << 20, 3).await.unwrap();
                assert!(zeroes.iter().all(|b| *b == 0));
                write(node, len - 512, &[n as u8; 512]).await;
            });
            close(image);
            judge(&dirs, len, more);
            let after = l1(&dirs);
            assert!(after.0 != before.0 && after.1 > before.1, "{before:?} {after:?}");
            before = after;
        }
        let read = |n: u64| format!("read -P {n} {} 512", n * cover(cluster));
        dirs.io("a", &[read(1), read(3), read(4)]);
    }
}

/// 512-byte clusters have room for 2 MiB in each cluster of the table.
#[test]
fn a_table_that_moves_and_moves() {
    let dirs = Dirs::new();
    dirs.create("a", "cluster_size=512", &["600K"]);
    let mut guest = Guest::new(vec![0; 600 << 10]);
    let mut places = vec![l1(&dirs)];
    for size in [1u64 << 20, 3 << 20, 4 << 20, 9 << 20, 20 << 20, 34 << 20] {
        let image = open(&dirs);
        guest.scribble(image.node(), 20);
        guest.grow(image.node(), size - 512);
        guest.scribble(image.node(), 20);
        guest.grow(image.node(), size);
        close(image);
        guest.judge(&dirs, &format!("grown to {size}"));
        places.push(l1(&dirs));
    }
    places.dedup();
    assert!(places.len() > 5, "{places:?}");
}

#[test]
fn a_table_with_room_stays() {
    let dirs = Dirs::new();
    dirs.create("a", "cluster_size=512", &["2M"]);
    dirs.run("qemu-img", &["resize", "-q", "-f", "qcow2", "--shrink", "a", "100K"]);
    let before = l1(&dirs);
    let mut guest = Guest::new(vec![0; 100 << 10]);
    let image = open(&dirs);
    guest.scribble(image.node(), 4);
    guest.grow(image.node(), u64::from(before.1) * cover(512));
    guest.scribble(image.node(), 9);
    close(image);
    guest.judge(&dirs, "within the table");
    assert_eq!(l1(&dirs), before);
    let image = open(&dirs);
    let longer = guest.want.len() as u64 + 512;
    guest.grow(image.node(), longer);
    close(image);
    guest.judge(&dirs, "one sector more");
    assert_ne!(l1(&dirs).0, before.0);
}

/// A gap that is too small for the table is no reason to give up.
#[test]
fn a_table_of_three_clusters_passes_a_gap_of_two() {
    let dirs = Dirs::new();
    dirs.create("a", "cluster_size=512", &["64K"]);
    let mut guest = Guest::new(vec![0; 64 << 10]);
    let image = open(&dirs);
    rt::block_on(async {
        write(image.node(), 0, &vec![7; 64 << 10]).await;
        image.node().submit(Op::Flush).await.unwrap();
        image.node().submit(Op::Discard { offset: 10 << 10, len: 1 << 10 }).await.unwrap();
    });
    guest.want.fill(7);
    guest.want[10 << 10..11 << 10].fill(0);
    close(image);
    guest.judge(&dirs, "with a gap");
    let image = open(&dirs);
    guest.grow(image.node(), 5 << 20);
    guest.scribble(image.node(), 5);
    close(image);
    guest.judge(&dirs, "grown past the gap");
}

#[test]
fn kinds_of_images() {
    for (options, cluster) in [
        ("extended_l2=on,cluster_size=16384", 16384),
        ("extended_l2=on,cluster_size=65536", 65536),
        ("compat=0.10,cluster_size=1024", 1024),
        ("cluster_size=1024,refcount_bits=1", 1024),
        ("cluster_size=512,refcount_bits=64", 512),
        ("cluster_size=4096,lazy_refcounts=on", 4096),
        ("cluster_size=4096,preallocation=metadata", 4096),
    ] {
        for size in [0, 512, 5 * cluster, 5 * cluster + 512] {
            let dirs = Dirs::new();
            let content = if size == 0 || options.contains("preallocation") {
                dirs.create("a", options, &[&size.to_string()]);
                vec![0; size as usize]
            } else {
                shortened(&dirs, options, cluster, size)
            };
            let mut guest = Guest::new(content);
            let sizes = [size + 512, size + cluster + 1024, (2 << 20) + 512];
            grow_through(&dirs, &mut guest, &sizes, &format!("{options}, {size}"));
        }
    }
}

/// The last cluster is compressed: what is beyond the end of the disk is in it, too.
#[test]
fn a_compressed_end() {
    let dirs = Dirs::new();
    dirs.create("a", "", &["128K"]);
    dirs.io("a", &["write -c -P 9 0 64K".into(), "write -c -P 9 64K 64K".into()]);
    dirs.run("qemu-img", &["resize", "-q", "-f", "qcow2", "--shrink", "a", "100K"]);
    let mut guest = Guest::new(vec![9; 100 << 10]);
    grow_through(&dirs, &mut guest, &[110 << 10, 1 << 20], "compressed");
}

/// An external data file: raw ones show what the guest sees, and may hold old data behind the end.
#[test]
fn data_files() {
    for raw in [false, true] {
        for (size, old) in
            [(65536, 0), (100 << 10, 0), (100 << 10, 300 << 10), (128 << 10, 300 << 10)]
        {
            let (dirs, what) = (Dirs::new(), format!("raw: {raw}, {size}, {old}"));
            let data = dirs.path("data");
            let raw_option = if raw { "on" } else { "off" };
            let options = format!("data_file={},data_file_raw={raw_option}", data.display());
            dirs.create("a", &options, &[&size.to_string()]);
            dirs.io("a", &[format!("write -P 5 0 {size}")]);
            if old > size {
                let file = File::options().write(true).open(&data).unwrap();
                file.write_all_at(&vec![0xee; (old - size) as usize], size).unwrap();
            }
            let mut guest = Guest::new(vec![5; size as usize]);
            grow_through(&dirs, &mut guest, &[size + 512, 192 << 10, 1 << 20], &what);
            if raw {
                same(&fs::read(&data).unwrap(), &guest.want, &what);
            }
        }
    }
}

/// A backing file that is longer than the overlay does not show through.
#[test]
fn what_is_behind_stays_hidden() {
    for options in ["cluster_size=4096", "compat=0.10,cluster_size=4096", "extended_l2=on"] {
        for (base, size) in
            [(300 << 10, 200 << 10), (300 << 10, (70 << 10) + 512), ((300 << 10) + 512, 1 << 10)]
        {
            let (dirs, what) = (Dirs::new(), format!("{options}, {size} over {base}"));
            fs::write(dirs.path("base"), vec![0x77; base]).unwrap();
            dirs.create("a", options, &["-b", "base", "-F", "raw", &size.to_string()]);
            let mut guest = Guest::new(vec![0x77; size]);
            let size = size as u64;
            let sizes = [size + 512, size + (66 << 10), 300 << 10, (300 << 10) + 4096, 3 << 20];
            grow_through(&dirs, &mut guest, &sizes, &what);
        }
    }
}

#[test]
fn snapshots_keep_their_length() {
    let dirs = Dirs::new();
    dirs.create("a", "cluster_size=512", &["1M"]);
    dirs.io("a", &["write -P 3 0 1M".into()]);
    dirs.run("qemu-img", &["snapshot", "-c", "s", "a"]);
    let mut guest = Guest::new(vec![3; 1 << 20]);
    grow_through(&dirs, &mut guest, &[3 << 20, 9 << 20], "with a snapshot");
    dirs.run("qemu-img", &["convert", "-l", "s", "-f", "qcow2", "-O", "raw", "a", "s.raw"]);
    let old = fs::read(dirs.path("s.raw")).unwrap();
    assert!(old[..1 << 20].iter().all(|b| *b == 3));
}

#[test]
fn what_cannot_be() {
    let refused = |dirs: &Dirs, len: u64, why: Errno| {
        let before = fs::read(dirs.path("a")).unwrap();
        let image = open(dirs);
        let old = image.node().len();
        assert_eq!(rt::block_on(image.node().truncate(len)), Err(why), "{len}");
        assert_eq!(image.node().len(), old);
        close(image);
        assert!(fs::read(dirs.path("a")).unwrap() == before, "{len}: the image has changed");
    };
    let dirs = Dirs::new();
    dirs.create("a", "compat=0.10", &["1M"]);
    for (len, why) in [
        (512, Errno::ENOTSUP),
        ((1 << 20) + 511, Errno::EINVAL),
        (1 << 62, Errno(libc::EFBIG)),
        (i64::MAX as u64 + 1, Errno(libc::EFBIG)),
    ] {
        refused(&dirs, len, why);
    }
    let image = open(&dirs);
    rt::block_on(image.node().truncate(1 << 20)).unwrap();
    close(image);
    dirs.run("qemu-img", &["snapshot", "-c", "s", "a"]);
    refused(&dirs, 2 << 20, Errno::ENOTSUP);
    // Longer than the longest table of 512-byte clusters, than a refcount block of them can describe.
    let dirs = Dirs::new();
    dirs.create("a", "cluster_size=512", &["1M"]);
    refused(&dirs, (128 << 30) + 512, Errno(libc::EFBIG));
    refused(&dirs, 64 << 30, Errno(libc::EFBIG));
    let dirs = Dirs::new();
    dirs.create("a", "", &["1M"]);
    dirs.run("qemu-img", &["bitmap", "-f", "qcow2", "--add", "a", "b"]);
    // The bitmap is marked as not kept up to date.
    close(open(&dirs));
    refused(&dirs, 2 << 20, Errno::ENOTSUP);
    let read_only = tools::open(&dirs.path("a"), json!({})).unwrap();
    assert_eq!(rt::block_on(read_only.node().truncate(2 << 20)), Err(Errno::EPERM));
}

/// Also after a panic.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Requests go on meanwhile, old and new parts of the disk alike.
#[test]
fn while_others_work() {
    const PART: u64 = 512 << 10;
    const STEPS: u64 = 30;
    for options in ["cluster_size=512", "cluster_size=4096,lazy_refcounts=on", "cluster_size=65536"]
    {
        let dirs = Dirs::new();
        dirs.create("a", options, &[&(4 * PART).to_string()]);
        let image = open(&dirs);
        let node = image.node();
        let mut want = vec![0; (4 * PART) as usize];
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (n, part) in want.chunks_mut(PART as usize).enumerate() {
                let done = &done;
                scope.spawn(move || {
                    let (start, mut random) = (n as u64 * PART, Random(n as u64));
                    rt::block_on(async {
                        while !done.load(Ordering::Relaxed) {
                            let at = random.below(PART / 512 - 40) * 512;
                            let len = (1 + random.below(40)) * 512;
                            let byte = 1 + random.below(255) as u8;
                            write(node, start + at, &vec![byte; len as usize]).await;
                            part[at as usize..][..len as usize].fill(byte);
                            if random.below(8) == 0 {
                                node.submit(Op::Flush).await.unwrap();
                            }
                            let got = tools::read(node, start + at, len as usize, 1).await;
                            assert!(got.unwrap().iter().all(|b| *b == byte), "{options}");
                        }
                    });
                });
            }
            scope.spawn(|| {
                let _done = SetAtEnd(&done);
                rt::block_on(async {
                    for _ in 0..STEPS {
                        let old = node.len();
                        node.truncate(old + 1000 * 512).await.unwrap();
                        let added = tools::read(node, old, 1000 * 512, 1).await.unwrap();
                        assert!(added.iter().all(|b| *b == 0), "{options}");
                        write(node, old + 999 * 512, &[0xaa; 512]).await;
                    }
                });
            });
        });
        for _ in 0..STEPS {
            want.resize(want.len() + 999 * 512, 0);
            want.resize(want.len() + 512, 0xaa);
        }
        let guest = Guest::new(want);
        guest.compare(node, options);
        close(image);
        guest.judge(&dirs, options);
    }
}
