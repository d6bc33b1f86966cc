//! Tests of the requests of `file`, on every engine, and of its errors.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use super::*;
use crate::block::perm::{Perm, Perms};
use crate::block::{Dir, Graph, Map, Node, Op, WriteFlags, ZeroFlags};
use crate::mem::Sg;
use crate::rt::Buffer;

/// Aligned for any direct I/O.
const PAGE: usize = 4096;

fn add(graph: &Graph, options: Value) -> Result<Arc<Node>> {
    let Value::Object(options) = options else { panic!("options are an object") };
    graph.add(options)
}

fn refused(options: Value) -> String {
    add(&Graph::new(), options).map(|_| ()).unwrap_err().to_string()
}

/// A directory on a disk's file system: a tmpfs tells nothing of direct I/O.
fn disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
}

fn image(dir: &Path, len: usize) -> PathBuf {
    let path = dir.join("image");
    std::fs::write(&path, vec![7u8; len]).unwrap();
    path
}

fn run(node: &Node, op: Op<'_>) -> std::result::Result<(), Errno> {
    rt::block_on(node.driver().submit(op))
}

fn read(node: &Node, offset: u64, len: usize) -> Vec<u8> {
    let mut memory = Buffer::new(len, PAGE);
    memory.bytes_mut().fill(0xee);
    let iov = [memory.iovec()];
    run(node, Op::Read { offset, to: Sg::new(&iov) }).unwrap();
    memory.bytes().to_vec()
}

fn write(node: &Node, offset: u64, len: usize, fill: u8, flags: WriteFlags) {
    let mut memory = Buffer::new(len, PAGE);
    memory.bytes_mut().fill(fill);
    let iov = [memory.iovec()];
    run(node, Op::Write { offset, from: Sg::new(&iov), flags }).unwrap();
}

fn exercise(path: &Path, aio: &str, direct: bool) {
    let graph = Graph::new();
    let options = json!({
        "driver": "file", "node-name": "f", "filename": path, "aio": aio,
        "cache": { "direct": direct }, "auto-read-only": true,
    });
    let node = add(&graph, options).unwrap();
    let user = graph.attach_root(&node, "the test", Perms::device(true)).unwrap();
    assert_eq!(node.len(), 16 * PAGE as u64);
    write(&node, 4096, PAGE, 1, WriteFlags::empty());
    write(&node, 8192, PAGE, 2, WriteFlags::FUA);
    run(&node, Op::Flush).unwrap();
    assert_eq!(read(&node, 4096, 2 * PAGE), [vec![1; PAGE], vec![2; PAGE]].concat());
    for (offset, flags) in [
        (4096, ZeroFlags::empty()),
        (8192, ZeroFlags::MAY_UNMAP),
        (12288, ZeroFlags::FUA | ZeroFlags::MAY_UNMAP),
    ] {
        match run(&node, Op::WriteZeroes { offset, len: 4096, flags }) {
            Ok(()) => assert_eq!(read(&node, offset, PAGE), vec![0; PAGE]),
            Err(errno) => assert_eq!(errno, Errno::ENOTSUP),
        }
    }
    run(&node, Op::Discard { offset: 0, len: 4096 }).unwrap();
    assert_eq!(read(&node, 0, PAGE), vec![0; PAGE]);
    assert!(matches!(node.driver().map(Dir::Read, 4096, 512), Map::File { offset: 4096, .. }));
    assert_eq!(std::fs::metadata(path).unwrap().len(), 16 * PAGE as u64);
    graph.detach(user);
}

#[test]
fn every_engine_serves_every_request() {
    let disk = disk();
    for (aio, direct) in [
        ("threads", false),
        ("threads", true),
        ("io_uring", false),
        ("io_uring", true),
        ("native", true),
    ] {
        exercise(&image(disk.path(), 16 * PAGE), aio, direct);
    }
}

#[test]
fn tmpfs_too() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    exercise(&image(dir.path(), 16 * PAGE), "threads", false);
}

#[test]
fn the_odd_end_reads_as_zeroes_and_grows_when_written() {
    let disk = disk();
    for direct in [false, true] {
        let path = image(disk.path(), 1000);
        let graph = Graph::new();
        let options = json!({
            "driver": "file", "node-name": "f", "filename": path, "aio": "threads",
            "cache": { "direct": direct },
        });
        let node = add(&graph, options).unwrap();
        assert_eq!((node.len(), node.driver().len()), (1024, 1000));
        if node.driver().limits().request_align > 512 {
            continue; // Sectors are the generic layer's business then.
        }
        assert_eq!(read(&node, 512, 512), [vec![7; 488], vec![0; 24]].concat());
        assert!(matches!(node.driver().map(Dir::Read, 512, 512), Map::Slow));
        write(&node, 512, 512, 9, WriteFlags::empty());
        assert_eq!(node.driver().len(), 1024);
        assert_eq!(std::fs::read(&path).unwrap()[512..], [9; 512]);
    }
}

/// On machines without devices, too: what a block device's requests make of an end that moves, with a file in its place.
#[test]
fn a_device_that_changes_its_size() {
    let disk = disk();
    let path = image(disk.path(), 2 * PAGE);
    let how = How {
        filename: path.to_str().unwrap().to_owned(),
        read_only: false,
        auto_read_only: false,
        direct: false,
    };
    let file = how.open().unwrap();
    let cut = file.try_clone().unwrap();
    let fd = file.as_raw_fd();
    let file = Arc::new(rt::File::new(file.into(), Engine::Threads, 1, 1));
    let (access, len) = (Access::new(how, fd, false, Duration::ZERO), 2 * PAGE as u64);
    let medium = Medium::new(file, Kind::Block, access, Limits::default(), len);
    let read = |offset, len| {
        let memory = Buffer::new(len, PAGE);
        rt::block_on(medium.submit(Op::Read { offset, to: Sg::new(&[memory.iovec()]) }))
    };
    assert!(medium.follows_medium());
    cut.set_len(3 * len).unwrap();
    assert_eq!((medium.look_at_len(), medium.len()), (None, 3 * len));
    cut.set_len(len).unwrap();
    assert_eq!((medium.look_at_len(), medium.len()), (Some(len), 3 * len));
    assert_eq!(read(0, 2 * PAGE), Ok(()));
    assert_eq!(read(PAGE as u64, 2 * PAGE), Err(Errno::EIO));
    assert_eq!(read(len, PAGE), Err(Errno::EIO));
    assert_eq!(read(3 * len, PAGE), Ok(()), "behind what there ever was");
}

/// features.md: refused as QSD refuses it, for a file that is all hole.
#[test]
fn an_odd_hole_is_not_writable_directly() {
    let disk = disk();
    let path = disk.path().join("hole");
    File::create(&path).unwrap().set_len(1000).unwrap();
    let graph = Graph::new();
    let options = json!({
        "driver": "file", "node-name": "f", "filename": path, "aio": "threads",
        "cache": { "direct": true },
    });
    let node = add(&graph, options).unwrap();
    let coarse = node.driver().limits().request_align > 1024;
    match graph.attach_root(&node, "the test", Perms::device(true)) {
        Ok(_) => assert!(!coarse),
        Err(e) => {
            let text = "Cannot get 'write' permission without 'resize': Image size is not a \
                        multiple of request alignment";
            assert_eq!((e.message(), coarse), (text, true));
        }
    }
}

#[test]
fn a_window_at_an_odd_offset_is_served_by_read_modify_write() {
    let disk = disk();
    let path = image(disk.path(), 4 * PAGE);
    let graph = Graph::new();
    let options = json!({
        "driver": "raw", "node-name": "r", "offset": 256, "cache": { "direct": true },
        "file": { "driver": "file", "filename": path, "aio": "threads" },
    });
    let node = add(&graph, options).unwrap();
    assert_eq!(node.len(), 4 * PAGE as u64 - 512);
    assert!(matches!(node.locate(Dir::Write, 0, 512).map, Map::Slow));
    let mut memory = Buffer::new(1024, PAGE);
    memory.bytes_mut().fill(3);
    let iov = [memory.iovec()];
    let op = Op::Write { offset: 512, from: Sg::new(&iov), flags: WriteFlags::empty() };
    rt::block_on(node.submit(op)).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes[..768], [7; 768]);
    assert_eq!(bytes[768..1792], [3; 1024]);
    assert_eq!(bytes[1792..], vec![7; 4 * PAGE - 1792]);
}

#[test]
fn zeroes_past_the_end_grow_the_file() {
    let disk = disk();
    let path = image(disk.path(), PAGE);
    let graph = Graph::new();
    let options = json!({ "driver": "file", "node-name": "f", "filename": path, "aio": "threads" });
    let node = add(&graph, options).unwrap();
    let op = Op::WriteZeroes { offset: 2048, len: 4096, flags: ZeroFlags::MAY_UNMAP };
    run(&node, op).unwrap();
    assert_eq!((node.len(), std::fs::metadata(&path).unwrap().len()), (6144, 6144));
}

#[test]
fn the_length_is_set_both_ways() {
    let disk = disk();
    for direct in [false, true] {
        let path = image(disk.path(), 4 * PAGE);
        let graph = Graph::new();
        let options = json!({
            "driver": "raw", "node-name": "r", "offset": PAGE, "auto-read-only": true,
            "file": {
                "driver": "file", "node-name": "f", "filename": path, "aio": "threads",
                "cache": { "direct": direct },
            },
        });
        let node = add(&graph, options).unwrap();
        let file = graph.find("f").unwrap();
        let truncate = |len| rt::block_on(node.truncate(len));
        assert!(!node.driver().grows());
        assert_eq!(truncate(0), Err(Errno::EPERM), "nobody writes");
        let user = graph.attach_root(&node, "the test", Perms::device(true)).unwrap();
        assert!(node.driver().grows());
        let lens = || (node.len(), file.len(), std::fs::metadata(&path).unwrap().len());
        assert_eq!(truncate(PAGE as u64), Ok(()));
        assert_eq!(lens(), (4096, 8192, 8192));
        assert_eq!(truncate(1 << 20), Ok(()));
        assert_eq!(lens(), (1 << 20, (1 << 20) + 4096, (1 << 20) + 4096));
        assert_eq!(read(&file, 0, 3 * PAGE), [vec![7; 2 * PAGE], vec![0; PAGE]].concat());
        assert!(matches!(file.driver().map(Dir::Read, 1 << 20, 512), Map::File { .. }));
        assert_eq!(truncate(u64::MAX), Err(Errno(libc::EFBIG)));
        assert_eq!(truncate(1 << 62), Err(Errno(libc::EFBIG)), "what the file system says");
        assert_eq!(lens().0, 1 << 20);
        graph.detach(user);
        assert_eq!(truncate(0), Err(Errno::EPERM));
    }
}

#[test]
fn a_length_that_is_given_stays() {
    let disk = disk();
    let path = image(disk.path(), 4 * PAGE);
    let graph = Graph::new();
    let file = json!({ "driver": "file", "filename": path, "aio": "threads" });
    let raw = json!({ "driver": "raw", "node-name": "r", "size": PAGE, "file": file });
    let null = json!({ "driver": "null-co", "node-name": "n" });
    for options in [raw, null] {
        let node = add(&graph, options).unwrap();
        assert!(!node.driver().grows());
        assert_eq!(rt::block_on(node.truncate(0)), Err(Errno::ENOTSUP));
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 4 * PAGE as u64);
}

#[test]
fn a_failed_sync_is_never_forgotten() {
    let medium = |direct| {
        // fdatasync of a pipe fails.
        let (pipe, _) = std::io::pipe().unwrap();
        let fd = std::os::fd::OwnedFd::from(pipe);
        let how = How { filename: "x".into(), read_only: true, auto_read_only: false, direct };
        let access = Access::new(how, fd.as_raw_fd(), false, Duration::ZERO);
        let file = Arc::new(rt::File::new(fd, Engine::Threads, 1, 1));
        let medium = Medium::new(file.clone(), Kind::Regular, access, Limits::default(), 0);
        let flush = || rt::block_on(medium.submit(Op::Flush));
        let first = flush();
        // Now it would succeed.
        let good = tempfile::tempfile().unwrap().as_fd().try_clone_to_owned().unwrap();
        crate::block::drivers::posix::replace_fd(&good, file.fd()).unwrap();
        (first, flush())
    };
    assert_eq!(medium(false), (Err(Errno::EINVAL), Err(Errno::EINVAL)));
    assert_eq!(medium(true), (Err(Errno::EINVAL), Ok(())));
}

#[test]
fn errors_are_qsds() {
    let disk = disk();
    let path = image(disk.path(), PAGE);
    let path = path.to_str().unwrap();
    let file = |filename: &str| json!({ "driver": "file", "node-name": "f", "filename": filename });
    let with = |name: &str, value: Value| {
        let mut options = file(path);
        options[name] = value;
        options
    };
    for (options, text) in [
        (file(""), "The 'file' block driver requires a file name".to_owned()),
        (file("/nope"), "Could not open '/nope': No such file or directory".to_owned()),
        (file("/tmp"), "Could not open '/tmp': Is a directory".to_owned()),
        (file("/dev/null"), "'file' driver requires '/dev/null' to be a regular file".to_owned()),
        (
            with("aio", json!("native")),
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
                .to_owned(),
        ),
        (
            with("pr-manager", json!("x")),
            "No persistent reservation manager with id 'x'".to_owned(),
        ),
        (
            json!({ "driver": "host_device", "node-name": "f", "filename": path }),
            format!(
                "'host_device' driver requires '{path}' to be either a character or block device"
            ),
        ),
        (
            json!({
                "driver": "file", "node-name": "f", "filename": "/proc/version",
                "read-only": true, "cache": { "direct": true },
            }),
            "Could not open '/proc/version': filesystem does not support O_DIRECT".to_owned(),
        ),
        (
            json!({
                "driver": "file", "node-name": "f", "filename": "/proc/version",
                "read-only": true,
            }),
            "Could not refresh total sector count: Invalid argument".to_owned(),
        ),
    ] {
        assert_eq!(refused(options), text);
    }
}

/// A running program cannot be opened for writing, not even by root.
#[test]
fn auto_read_only_tells_why_it_cannot_write() {
    let program = std::env::current_exe().unwrap();
    let graph = Graph::new();
    let options = json!({
        "driver": "file", "node-name": "f", "filename": program, "auto-read-only": true,
    });
    let node = add(&graph, options).unwrap();
    let result = graph.attach_root(&node, "the test", Perms::device(true));
    let error = result.map(|_| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("Could not open '{}': Text file busy", program.display())
    );
    graph.attach_root(&node, "the test", Perms::device(false)).unwrap();
}

#[test]
fn engines_fall_back() {
    let no = || Err(Errno::EPERM);
    assert_eq!(engine(None, || Ok(())), Engine::IoUring);
    assert_eq!(engine(None, no), Engine::Threads);
    assert_eq!(engine(Some(Engine::IoUring), no), Engine::Threads);
    assert_eq!(engine(Some(Engine::Native), no), Engine::Native);
    assert_eq!(engine(Some(Engine::Threads), || Ok(())), Engine::Threads);
}

/// A killed process keeps its locks until its last request has ended.
#[test]
fn locks_are_waited_for_but_not_for_ever() {
    let temp = tempfile::NamedTempFile::new().unwrap();
    temp.as_file().set_len(4096).unwrap();
    let open = |patience| {
        let graph = Graph::new();
        graph.set_lock_patience(patience);
        let options = json!({"driver": "file", "node-name": "n", "filename": temp.path()});
        let Value::Object(options) = options else { unreachable!() };
        let node = graph.add(options).unwrap();
        let alone = Perms { shared: Perm::CONSISTENT_READ, ..Perms::device(true) };
        let user = graph.attach_root(&node, "a guest", alone);
        user.map(|user| (graph, user))
    };
    let (graph, user) = open(Duration::ZERO).unwrap();
    let patience = Duration::from_millis(80);
    let begun = Instant::now();
    let error = open(patience).map(drop).unwrap_err().to_string();
    assert!(error.contains("Failed to get"), "{error}");
    assert!(begun.elapsed() >= patience);
    let (waiting, waits) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let successor = scope.spawn(|| {
            waiting.send(()).unwrap();
            open(Duration::from_secs(60)).map(drop)
        });
        waits.recv().unwrap();
        // Whether it looks before or after this: it gets them.
        graph.detach(user);
        graph.close();
        drop(graph);
        successor.join().unwrap().unwrap();
    });
}
