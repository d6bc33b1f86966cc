//! Images whose process dies: the graph is dropped with nothing closed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::block::drivers::qcow2::layout::OFFSET_MASK;
use crate::block::graph::RootUser;
use crate::block::perm::Perms;
use crate::block::{Graph, Op, WriteFlags, ZeroFlags};
use crate::mem::Sg;
use crate::rt::Buffer;

const CLUSTER: u64 = 65536;

/// An image `x` with a state directory beside it.
struct Bed(TempDir);

/// A process with the image open.
struct Process {
    user: RootUser,
    graph: Arc<Graph>,
}

impl Bed {
    fn new(lines: &str) -> Bed {
        let bed = Bed(tempfile::tempdir().unwrap());
        std::fs::create_dir(bed.0.path().join("state")).unwrap();
        bed.run(lines);
        bed
    }

    /// Runs shell commands; their exit code.
    fn run(&self, lines: &str) -> i32 {
        let done = Command::new("sh").args(["-c", lines]).current_dir(self.0.path()).output();
        done.unwrap().status.code().unwrap()
    }

    fn try_open(&self, more: &Value, state: bool) -> Result<Process> {
        let graph = Graph::new();
        // Another test's child may hold our descriptors, and so our locks, until it executes its program.
        graph.set_lock_patience(Duration::from_secs(3));
        if state {
            graph.set_state_dir(self.0.path().join("state"));
        }
        let path = self.0.path().join("x");
        let file = json!({"driver": "file", "filename": path, "discard": "unmap"});
        let mut options = json!({"driver": "qcow2", "node-name": "n", "file": file});
        for (name, value) in more.as_object().unwrap() {
            options[name] = value.clone();
        }
        let Value::Object(options) = options else { unreachable!() };
        let read_only = options.get("read-only") == Some(&json!(true));
        let node = graph.add(options).inspect_err(|_| graph.close())?;
        let user = graph.attach_root(&node, "a guest", Perms::device(!read_only))?;
        Ok(Process { user, graph })
    }

    fn open(&self) -> Process {
        self.try_open(&json!({}), true).unwrap()
    }

    /// What is in the state directory: the ends of the names.
    fn state(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.0.path().join("state")).unwrap();
        let end = |path: PathBuf| path.extension().unwrap().to_str().unwrap().to_owned();
        let mut ends: Vec<String> = names.map(|entry| end(entry.unwrap().path())).collect();
        ends.sort();
        ends
    }

    fn header(&self) -> Header {
        let mut bytes = vec![0; 512];
        File::open(self.0.path().join("x")).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        Header::parse(&bytes).unwrap()
    }
}

impl Process {
    fn write(&self, offset: u64, byte: u8) {
        let mut buffer = Buffer::new(4096, 4096);
        buffer.bytes_mut().fill(byte);
        let iov = [buffer.iovec()];
        let (from, flags) = (Sg::new(&iov), WriteFlags::empty());
        rt::block_on(self.user.node().submit(Op::Write { offset, from, flags })).unwrap();
    }

    fn read(&self, offset: u64) -> u8 {
        let buffer = Buffer::new(4096, 4096);
        let iov = [buffer.iovec()];
        rt::block_on(self.user.node().submit(Op::Read { offset, to: Sg::new(&iov) })).unwrap();
        let byte = buffer.bytes()[0];
        assert!(buffer.bytes().iter().all(|b| *b == byte), "at {offset}");
        byte
    }

    fn flush(&self) {
        rt::block_on(self.user.node().submit(Op::Flush)).unwrap();
    }

    fn end(self) {
        let Process { user, graph } = self;
        assert!(graph.close_all());
        graph.detach(user);
    }

    /// SIGKILL, as far as the image can tell.
    fn die(self) {}
}

const PLAIN: &str = "qemu-img create -q -f qcow2 x 64M";

#[test]
fn a_successor_has_it_and_leaves_nothing() {
    for create in [PLAIN, "qemu-img create -q -f qcow2 -o compat=0.10 x 64M"] {
        let bed = Bed::new(create);
        let first = bed.open();
        (0..9).for_each(|n| first.write(n * 3 * CLUSTER, n as u8 + 1));
        first.die();
        assert_eq!(bed.state(), ["journal"]);
        let v3 = bed.header().version == 3;
        assert_eq!(bed.header().autoclear.intersects(Autoclear::JOURNAL), v3);
        // Whoever comes next dies as soon as it has opened the image, and so on.
        (0..3).for_each(|_| bed.open().die());
        assert!([0, 3].contains(&bed.run("qemu-img check x")));
        let last = bed.open();
        (0..9).for_each(|n| assert_eq!(last.read(n * 3 * CLUSTER), n as u8 + 1));
        last.end();
        assert_eq!(bed.state(), [] as [&str; 0]);
        assert_eq!(bed.header().autoclear, Autoclear::empty());
        assert!([0, 3].contains(&bed.run("qemu-img check x")));
    }
}

#[test]
fn who_only_reads_is_told_what_waits() {
    let bed = Bed::new(PLAIN);
    let reader = json!({"read-only": true});
    bed.open().die();
    bed.try_open(&reader, true).unwrap().end();
    let first = bed.open();
    first.write(0, 1);
    first.die();
    let error = bed.try_open(&reader, true).map(drop).unwrap_err().to_string();
    assert!(error.contains("open the image for writing once"), "{error}");
    bed.open().end();
    let last = bed.try_open(&reader, true).unwrap();
    assert_eq!(last.read(0), 1);
    last.end();
}

/// What the kill test did once: clusters that entries in the journal lead to are given back.
#[test]
fn who_mends_leaks_first_gets_what_was_flushed() {
    let bin = std::env::current_exe().unwrap();
    let ours = bin.ancestors().nth(2).unwrap().join("vhost-user-blk");
    let mut mend = vec!["qemu-img check -q -r leaks x".to_owned()];
    if ours.exists() {
        mend.push(format!("{} check -q -r leaks x", ours.display()));
    }
    for mend in mend {
        let bed = Bed::new(PLAIN);
        let first = bed.open();
        first.write(0, 1);
        first.flush();
        first.write(CLUSTER, 2);
        first.die();
        assert_eq!(bed.run(&mend), 0, "{mend}");
        assert_eq!(bed.run("qemu-io -f qcow2 -c 'write -P 3 2M 64k' x"), 0);
        let last = bed.open();
        assert_eq!([0, CLUSTER, 2 << 20].map(|at| last.read(at)), [1, 0, 3], "{mend}");
        assert_eq!(bed.state(), ["journal", "rejected"], "for whoever wants to know");
        last.end();
        assert_eq!(bed.run("qemu-img check x"), 0, "{mend}");
    }
}

/// Version 2 has no autoclear bits.
#[test]
fn a_version_2_image_that_was_written_later_is_left_alone() {
    let bed = Bed::new("qemu-img create -q -f qcow2 -o compat=0.10 x 64M");
    let first = bed.open();
    first.write(0, 1);
    first.die();
    let later = SystemTime::now() + Duration::from_secs(GRACE + 2);
    File::options().write(true).open(bed.0.path().join("x")).unwrap().set_modified(later).unwrap();
    let last = bed.open();
    assert_eq!(last.read(0), 0);
    last.end();
    assert_eq!(bed.run("qemu-img check x"), 0);
}

/// Words on the disk that nobody here has written: nothing is changed.
#[test]
fn tables_that_say_something_else_stay_as_they_are() {
    let bed = Bed::new(PLAIN);
    let first = bed.open();
    first.write(0, 1);
    first.flush();
    first.write(CLUSTER, 2);
    first.die();
    let path = bed.0.path().join("x");
    let file = File::options().read(true).write(true).open(path).unwrap();
    let word = |at| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let table = word(bed.header().l1_table_offset.0) & OFFSET_MASK;
    // The zero flag.
    file.write_all_at(&1u64.to_be_bytes(), table + 8).unwrap();
    let last = bed.open();
    assert_eq!([last.read(0), last.read(CLUSTER)], [1, 0]);
    assert_eq!(word(table + 8), 1);
    assert_eq!(bed.state(), ["journal", "rejected"]);
    last.end();
}

/// More entries than there is room for, in slices of more entries than may be changed at once.
#[test]
fn a_full_journal_makes_room() {
    let bed = Bed::new(
        "truncate -s 1700G base; qemu-img create -q -f qcow2 -o cluster_size=2M -b base -F raw x",
    );
    let options = json!({
        "l2-cache-entry-size": 2 << 20, "l2-cache-size": 4 << 20,
        "backing": {"driver": "file", "filename": bed.0.path().join("base"), "read-only": true},
    });
    let first = bed.try_open(&options, true).unwrap();
    let len = first.user.node().len();
    assert!(len >> 21 > 3 * super::super::journal::RECORDS);
    first.write(0, 1);
    let (offset, flags) = (2 << 20, ZeroFlags::MAY_UNMAP);
    let zeroes = Op::WriteZeroes { offset, len: len - offset, flags };
    rt::block_on(first.user.node().submit(zeroes)).unwrap();
    first.die();
    // No base any more: what is not said to be zero cannot be read.
    std::fs::write(bed.0.path().join("base"), vec![9; 1 << 20]).unwrap();
    let last = bed.try_open(&options, true).unwrap();
    assert_eq!([0, 2 << 20, len / 2, len - 4096].map(|at| last.read(at)), [1, 0, 0, 0]);
    last.end();
    assert_eq!(bed.run("qemu-img map --output=json -f qcow2 x | grep -c '\"depth\": 0'"), 0);
}

/// The refcount table is too short for what was allocated last: the table that was in memory is gone.
#[test]
fn a_refcount_table_that_did_not_grow_in_time() {
    for create in ["-o cluster_size=512,refcount_bits=64", "-o compat=0.10,cluster_size=512"] {
        let bed = Bed::new(&format!("qemu-img create -q -f qcow2 {create} x 16M"));
        // 64 blocks of 64 clusters, or of 256.
        let first = bed.open();
        (0..(12 << 20) / 4096).for_each(|n| first.write(n * 4096, (n % 251) as u8 + 1));
        first.die();
        let last = bed.open();
        (0..(12 << 20) / 4096).for_each(|n| assert_eq!(last.read(n * 4096), (n % 251) as u8 + 1));
        last.end();
        assert!([0, 3].contains(&bed.run("qemu-img check x")));
    }
}

#[test]
fn what_nobody_can_need_goes() {
    let bed = Bed::new(PLAIN);
    bed.open().die();
    assert_eq!(bed.run("mv x y; cp y x; mv state/*.journal state/vhost-user-blk-0-0.journal"), 0);
    // The image's is still there, by another name; nobody has made a journal for the copy.
    let other = bed.open();
    assert_eq!(bed.state(), ["journal"], "only the new one");
    other.die();
    let name = std::fs::read_dir(bed.0.path().join("state")).unwrap().next().unwrap().unwrap();
    // Another boot.
    let copy = bed.0.path().join("state/vhost-user-blk-1-1.rejected");
    std::fs::copy(name.path(), &copy).unwrap();
    bed.open().die();
    assert_eq!(bed.state(), ["journal", "rejected"], "its image is there");
    File::options().write(true).open(copy).unwrap().write_all_at(&[7], 8).unwrap();
    bed.open().die();
    assert_eq!(bed.state(), ["journal"]);
    // Of a process that lives.
    let alive = bed.open();
    assert_eq!(bed.run("rm x; mv y x"), 0);
    bed.open().end();
    assert_eq!(bed.state(), ["journal"]);
    alive.die();
}

#[test]
fn a_directory_that_cannot_be_used_is_not_an_error() {
    let bed = Bed::new(PLAIN);
    std::fs::remove_dir(bed.0.path().join("state")).unwrap();
    bed.open().end();
    std::fs::write(Path::new(&bed.0.path().join("state")), b"x").unwrap();
    bed.open().end();
}
