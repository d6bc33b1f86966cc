//! Tests of the graph as a whole: opening, inheritance, names, permissions. With drivers of their own where a format
//! is needed that owns its file as qcow2 does.

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::block::drivers::{file, null, raw};
use crate::block::perm::default_child_perms;
use crate::block::{Driver, DriverKind, Edge, IoFuture, Limits, Op};
use crate::error::Errno;

/// A format that owns its `file` child, and may have a `backing` one.
static FORMAT: DriverDef = DriverDef {
    name: "fmt",
    kind: DriverKind::Format,
    options: &[],
    open: |args| {
        let mut edges = vec![args.open_child("file", Role::File)?];
        edges.extend(args.open_child_if_given("backing", Role::Backing)?);
        let fails_to_close = args.take_bool("fail-close")?.unwrap_or(false);
        let name = args.node_name.to_owned();
        match args.take_bool("fail")? {
            Some(true) => Err(err!("broken header")),
            _ => Ok(Box::new(Format { edges, name, fails_to_close })),
        }
    },
    recognises: crate::block::Recognises::Nothing,
    child_perms: default_child_perms,
};

static DRIVERS: &[&DriverDef] = &[&FORMAT, &file::FILE, &null::NULL_CO, &raw::RAW];

thread_local! {
    /// The formats that were closed on this thread.
    static CLOSED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

struct Format {
    edges: Vec<Edge>,
    name: String,
    fails_to_close: bool,
}

impl Driver for Format {
    fn edges(&self) -> &[Edge] {
        &self.edges
    }
    fn len(&self) -> u64 {
        self.edges[0].node.len()
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        self.edges[0].node.submit(op)
    }
    fn close(&self) -> IoFuture<'_> {
        Box::pin(async {
            // The children still serve.
            self.edges[0].node.submit(Op::Flush).await?;
            CLOSED.with_borrow_mut(|closed| closed.push(self.name.clone()));
            if self.fails_to_close { Err(Errno::EIO) } else { Ok(()) }
        })
    }
    fn options_in_force(&self) -> Options {
        Options::new()
    }
}

#[test]
fn parents_are_closed_before_their_children() {
    for fails in [false, true] {
        CLOSED.take();
        let graph = graph();
        let disk = |name: &str| json!({"driver": "null-co", "node-name": name});
        add(&graph, disk("n")).unwrap();
        let base = json!({"driver": "fmt", "node-name": "base", "file": "n", "read-only": true});
        add(&graph, base).unwrap();
        let middle = json!({
            "driver": "fmt", "node-name": "middle", "file": disk("m"), "backing": "base",
            "fail-close": fails,
        });
        let top =
            json!({"driver": "fmt", "node-name": "top", "file": disk("t"), "backing": middle});
        add(&graph, top).unwrap();
        add(&graph, json!({"driver": "fmt", "node-name": "lone", "file": disk("l")})).unwrap();
        assert_eq!(graph.close_all(), !fails);
        let closed = CLOSED.take();
        let at = |name: &str| closed.iter().position(|c| c == name).unwrap();
        assert!(at("top") < at("middle") && at("middle") < at("base"), "{closed:?}");
        assert_eq!((closed.len(), at("lone") < 4, graph.nodes().len()), (4, true, 0));
        // Who merely forgets nodes does not close them.
        add(&graph, json!({"driver": "fmt", "node-name": "lone", "file": disk("l")})).unwrap();
        graph.close();
        assert_eq!((CLOSED.take().len(), graph.nodes().len()), (0, 0));
    }
}

const EXPORT: &str = "an unnamed block device";
const NO_LOCKS: [u16; 0] = [];

fn graph() -> Arc<Graph> {
    Graph::with_drivers(DRIVERS)
}

fn add(graph: &Graph, options: Value) -> Result<Arc<Node>> {
    let Value::Object(options) = options else { panic!("options are an object") };
    graph.add(options)
}

fn refused(graph: &Graph, options: Value) -> String {
    let before = graph.nodes().len();
    let error = add(graph, options).map(|node| node.name().to_owned()).unwrap_err();
    assert_eq!(graph.nodes().len(), before, "a failed open leaves nothing behind");
    assert_eq!(graph.lock().slots.len(), before);
    error.to_string()
}

fn image(len: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

fn file(image: &tempfile::NamedTempFile, name: &str) -> Value {
    json!({ "driver": "file", "node-name": name, "filename": image.path(), "aio": "threads" })
}

/// `extra`'s members in `options`.
fn with(mut options: Value, extra: Value) -> Value {
    let (Value::Object(all), Value::Object(mut extra)) = (&mut options, extra) else {
        panic!("options are objects")
    };
    all.append(&mut extra);
    options
}

/// The access mode of the one descriptor that this process has open for the file, except `own`.
fn access_mode(path: &Path, own: &std::fs::File) -> &'static str {
    let mut modes = vec![];
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let number: i32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target == path && number != own.as_raw_fd() {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
            let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap();
            modes.push(if flags.trim().ends_with('2') { "rw" } else { "ro" });
        }
    }
    assert_eq!(modes.len(), 1, "one descriptor is open: {modes:?}");
    modes[0]
}

/// The bytes of the image that are locked by others than `own`.
fn locked(own: &std::fs::File) -> Vec<u16> {
    let fd = own.as_raw_fd();
    (100..204).filter(|b| crate::block::drivers::posix::byte_is_locked(fd, *b).unwrap()).collect()
}

#[test]
fn names_follow_qemus_rules() {
    let graph = graph();
    let null_co = |name: &str| json!({ "driver": "null-co", "node-name": name });
    assert_eq!(
        refused(&graph, json!({ "driver": "null-co" })),
        "'node-name' must be specified for the root node"
    );
    assert_eq!(refused(&graph, null_co("1f")), "Invalid node-name: '1f'");
    assert_eq!(refused(&graph, null_co("")), "Invalid node-name: ''");
    assert_eq!(refused(&graph, null_co("#block1")), "Invalid node-name: '#block1'");
    assert_eq!(refused(&graph, null_co(&"a".repeat(32))), "Node name too long");
    add(&graph, null_co(&"a".repeat(31))).unwrap();
    add(&graph, null_co("a-b.c_9")).unwrap();
    assert_eq!(refused(&graph, null_co("a-b.c_9")), "Duplicate nodes with node-name='a-b.c_9'");
    let twice = json!({ "driver": "raw", "node-name": "r", "file": null_co("r") });
    assert_eq!(refused(&graph, twice), "Duplicate nodes with node-name='r'");
}

#[test]
fn inline_children_get_generated_names() {
    let graph = graph();
    let inline = json!({ "driver": "raw", "node-name": "r", "file": { "driver": "null-co" } });
    let node = add(&graph, inline).unwrap();
    let child = &node.driver().edges()[0].node;
    let digits = child.name().strip_prefix("#block").unwrap();
    assert!(digits.len() >= 3 && digits.bytes().all(|b| b.is_ascii_digit()), "{digits}");
    assert!(Arc::ptr_eq(&graph.find(child.name()).unwrap(), child));
    assert_eq!(graph.roots().iter().map(|n| n.name()).collect::<Vec<_>>(), ["r"]);
    assert_eq!(graph.nodes().len(), 2);
}

#[test]
fn references_must_exist_and_cannot_be_circular() {
    let graph = graph();
    let raw = |file: Value| json!({ "driver": "raw", "node-name": "r", "file": file });
    let text = |name| format!("Cannot find device='{name}' nor node-name='{name}'");
    assert_eq!(refused(&graph, raw(json!("zz"))), text("zz"));
    assert_eq!(refused(&graph, raw(json!("r"))), text("r"));
    assert_eq!(refused(&graph, raw(json!({ "driver": "raw", "file": "r" }))), text("r"));
    assert_eq!(
        refused(&graph, json!({ "driver": "raw", "node-name": "r" })),
        "A block device must be specified for \"file\""
    );
    assert_eq!(
        refused(&graph, raw(json!(1))),
        "Invalid parameter type for 'file', expected: BlockdevRef"
    );
    assert_eq!(refused(&graph, raw(json!({}))), "Parameter 'driver' is missing");
    assert_eq!(refused(&graph, raw(json!({ "driver": "x" }))), "Unknown driver 'x'");
}

#[test]
fn depth_is_bounded() {
    let graph = graph();
    add(&graph, json!({ "driver": "null-co", "node-name": "n1" })).unwrap();
    for i in 2..=MAX_DEPTH {
        let (name, below) = (format!("n{i}"), format!("n{}", i - 1));
        add(&graph, json!({ "driver": "raw", "node-name": name, "file": below })).unwrap();
    }
    let last = format!("n{MAX_DEPTH}");
    let user = graph.attach_root(&graph.find(&last).unwrap(), EXPORT, Perms::device(true)).unwrap();
    assert_eq!(
        refused(&graph, json!({ "driver": "raw", "node-name": "more", "file": last })),
        format!("The block graph is more than {MAX_DEPTH} nodes deep")
    );
    let mut inline = json!({ "driver": "null-co" });
    for _ in 0..MAX_DEPTH {
        inline = json!({ "driver": "raw", "file": inline });
    }
    inline["node-name"] = json!("top");
    assert_eq!(
        refused(&graph, inline),
        format!("The block graph is more than {MAX_DEPTH} nodes deep")
    );
    graph.detach(user);
}

#[test]
fn leftovers_are_refused() {
    let graph = graph();
    let null_co = json!({ "driver": "null-co", "node-name": "n" });
    assert_eq!(
        refused(&graph, with(null_co.clone(), json!({ "x": 1 }))),
        "Block protocol 'null-co' doesn't support the option 'x'"
    );
    let file = json!({ "driver": "null-co" });
    let raw = json!({ "driver": "raw", "node-name": "r", "x": 1, "file": file });
    assert_eq!(refused(&graph, raw), "Block format 'raw' does not support the option 'x'");
    assert_eq!(
        refused(&graph, with(null_co.clone(), json!({ "cache": { "direct": "on" } }))),
        "Invalid parameter type for 'direct', expected: boolean"
    );
    assert_eq!(
        refused(&graph, with(null_co.clone(), json!({ "force-share": true }))),
        "force-share=on can only be used with read-only images"
    );
    assert_eq!(
        refused(&graph, with(null_co, json!({ "detect-zeroes": "unmap" }))),
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
    );
}

/// features.md, section 2.
#[test]
fn inline_children_inherit() {
    let graph = graph();
    let top = json!({
        "driver": "fmt", "node-name": "top", "read-only": true, "auto-read-only": true,
        "force-share": true, "cache": { "direct": true, "no-flush": true },
        "discard": "unmap", "detect-zeroes": "unmap",
        "file": { "driver": "null-co" },
        "backing": { "driver": "raw", "file": { "driver": "null-co" } },
    });
    let top = add(&graph, top).unwrap();
    let edges = top.driver().edges();
    let own = top.in_force();
    let file = InForceOf { read_only: true, auto: true, force: true, direct: true, no_flush: true };
    assert_eq!(InForceOf::of(&edges[0].node), file);
    assert!(edges[0].node.in_force().discard_unmap);
    assert_eq!(edges[0].node.detect_zeroes(), crate::block::node::DetectZeroes::Off);
    assert_eq!(own.detect_zeroes, crate::block::node::DetectZeroes::Unmap);
    let backing = InForceOf { auto: false, ..file };
    assert_eq!(InForceOf::of(&edges[1].node), backing);
    assert_eq!(InForceOf::of(&edges[1].node.driver().edges()[0].node), backing);
}

#[test]
fn children_keep_what_they_say_and_references_keep_all() {
    let graph = graph();
    let other = json!({ "driver": "null-co", "node-name": "other" });
    add(&graph, other).unwrap();
    let top = json!({
        "driver": "fmt", "node-name": "top", "cache": { "direct": true, "no-flush": true },
        "file": {
            "driver": "null-co", "cache": { "direct": false }, "discard": "ignore",
            "read-only": false, "auto-read-only": true,
        },
        "backing": "other",
    });
    let top = add(&graph, top).unwrap();
    let edges = top.driver().edges();
    let file =
        InForceOf { read_only: false, auto: true, force: false, direct: false, no_flush: true };
    assert_eq!(InForceOf::of(&edges[0].node), file);
    assert!(!edges[0].node.in_force().discard_unmap);
    let untouched =
        InForceOf { read_only: false, auto: false, force: false, direct: false, no_flush: false };
    assert_eq!(InForceOf::of(&edges[1].node), untouched);
    assert!(!edges[1].node.in_force().discard_unmap);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct InForceOf {
    read_only: bool,
    auto: bool,
    force: bool,
    direct: bool,
    no_flush: bool,
}

impl InForceOf {
    fn of(node: &Node) -> InForceOf {
        let on = node.in_force();
        InForceOf {
            read_only: on.read_only,
            auto: on.auto_read_only,
            force: on.force_share,
            direct: on.cache_direct,
            no_flush: on.cache_no_flush,
        }
    }
}

#[test]
fn formats_exclude_each_other_and_writers() {
    let (graph, image) = (graph(), image(1 << 20));
    let f = add(&graph, file(&image, "f")).unwrap();
    add(&graph, json!({ "driver": "fmt", "node-name": "q", "file": "f" })).unwrap();
    let (held, own) = (locked(image.as_file()), image.as_file());
    assert_eq!(held, [100, 101, 103, 201, 203]);
    assert_eq!(
        refused(&graph, json!({ "driver": "fmt", "node-name": "q2", "file": "f" })),
        "Permission conflict on node 'f': permissions 'write, resize' are both required by node \
         'q' (uses node 'f' as 'file' child) and unshared by node 'q2' (uses node 'f' as 'file' \
         child)."
    );
    let error = graph.attach_root(&f, EXPORT, Perms::device(true)).map(|_| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Permission conflict on node 'f': permissions 'write' are both required by an unnamed \
         block device (uses node 'f' as 'root' child) and unshared by node 'q' (uses node 'f' as \
         'file' child)."
    );
    assert_eq!(locked(own), held);
    // A reader may come along.
    drop(graph.attach_root(&f, EXPORT, Perms::device(false)).unwrap());
    drop(f);
    graph.close();
    assert_eq!(locked(own), NO_LOCKS);
}

#[test]
fn two_raw_writers_share() {
    let (graph, image) = (graph(), image(1 << 20));
    add(&graph, file(&image, "f")).unwrap();
    for name in ["a", "b"] {
        add(&graph, json!({ "driver": "raw", "node-name": name, "file": "f" })).unwrap();
    }
    assert_eq!(locked(image.as_file()), NO_LOCKS);
    let users = ["a", "b"].map(|name| {
        graph.attach_root(&graph.find(name).unwrap(), EXPORT, Perms::device(true)).unwrap()
    });
    assert_eq!(locked(image.as_file()), [100, 101]);
    assert_eq!(graph.roots().len(), 2);
    drop(users);
    assert_eq!(locked(image.as_file()), NO_LOCKS);
    // A window of it does not let others resize.
    let window = json!({ "driver": "raw", "node-name": "w", "file": "f", "size": 512 });
    let user = graph.attach_root(&add(&graph, window).unwrap(), EXPORT, Perms::device(true));
    assert_eq!(locked(image.as_file()), [100, 101, 203]);
    drop(user);
}

#[test]
fn read_only_nodes_refuse_writers() {
    let (graph, image) = (graph(), image(1 << 20));
    let read_only = with(file(&image, "f"), json!({ "read-only": true, "auto-read-only": true }));
    add(&graph, read_only).unwrap();
    let raw = add(&graph, json!({ "driver": "raw", "node-name": "r", "file": "f" })).unwrap();
    let refused_by = |node| {
        let result = graph.attach_root(node, EXPORT, Perms::device(true));
        result.map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(refused_by(&raw), "Block node is read-only");
    let format = json!({ "driver": "fmt", "node-name": "q", "file": "f" });
    assert_eq!(refused(&graph, format), "Block node is read-only");
    graph.attach_root(&raw, EXPORT, Perms::device(false)).unwrap();
}

#[test]
fn auto_read_only_follows_the_writers() {
    let (graph, image) = (graph(), image(1 << 20));
    let (own, path) = (image.as_file(), image.path());
    let auto = with(file(&image, "f"), json!({ "auto-read-only": true }));
    let f = add(&graph, auto).unwrap();
    let raw = add(&graph, json!({ "driver": "raw", "node-name": "r", "file": "f" })).unwrap();
    assert_eq!((access_mode(path, own), f.read_only()), ("ro", false));
    let reader = graph.attach_root(&raw, EXPORT, Perms::device(false)).unwrap();
    assert_eq!((access_mode(path, own), locked(own)), ("ro", vec![100]));
    let writer = graph.attach_root(&raw, EXPORT, Perms::device(true)).unwrap();
    assert_eq!((access_mode(path, own), locked(own)), ("rw", vec![100, 101]));
    graph.detach(writer);
    assert_eq!((access_mode(path, own), locked(own)), ("ro", vec![100]));
    graph.detach(reader);
    assert_eq!(locked(own), NO_LOCKS);
}

#[test]
fn a_failed_format_gives_the_file_back() {
    let (graph, image) = (graph(), image(1 << 20));
    let auto = with(file(&image, "f"), json!({ "auto-read-only": true }));
    add(&graph, auto).unwrap();
    let broken = json!({ "driver": "fmt", "node-name": "q", "file": "f", "fail": true });
    assert_eq!(refused(&graph, broken), "broken header");
    assert_eq!(access_mode(image.path(), image.as_file()), "ro");
    assert_eq!(locked(image.as_file()), NO_LOCKS);
    let inline = json!({
        "driver": "fmt", "node-name": "q", "fail": true,
        "file": { "driver": "file", "filename": image.path(), "aio": "threads" },
    });
    assert_eq!(refused(&graph, inline), "broken header");
    access_mode(image.path(), image.as_file());
}

#[test]
fn locks_refuse_in_qemus_words() {
    let (graph, image) = (graph(), image(1 << 20));
    add(&graph, file(&image, "f")).unwrap();
    let auto = with(file(&image, "g"), json!({ "auto-read-only": true }));
    let g = add(&graph, auto).unwrap();
    let format = |file: &str| json!({ "driver": "fmt", "node-name": "q", "file": file });
    let user = graph.attach_root(&g, EXPORT, Perms::device(true)).unwrap();
    let error = add(&graph, format("f")).map(|_| ()).unwrap_err();
    assert_eq!(error.message(), "Failed to get shared \"write\" lock");
    let hint = format!("Is another process using the image [{}]?", image.path().display());
    assert_eq!(error.hint(), Some(hint.as_str()));
    graph.detach(user);
    add(&graph, format("f")).unwrap();
    let error = graph.attach_root(&g, EXPORT, Perms::device(true)).map(|_| ()).unwrap_err();
    assert_eq!(error.message(), "Failed to get \"write\" lock");
    assert_eq!(error.hint(), Some(hint.as_str()));
    graph.attach_root(&g, EXPORT, Perms::device(false)).unwrap();
    let held = locked(image.as_file());
    assert_eq!(held, [100, 101, 103, 201, 203]);
}

#[test]
fn locking_off_and_force_share_hold_back() {
    let (graph, image) = (graph(), image(1 << 20));
    let off = with(file(&image, "off"), json!({ "locking": "off" }));
    let user = graph.attach_root(&add(&graph, off).unwrap(), EXPORT, Perms::device(true)).unwrap();
    assert_eq!(locked(image.as_file()), NO_LOCKS);
    graph.detach(user);
    let shared = with(file(&image, "s"), json!({ "read-only": true, "force-share": true }));
    add(&graph, shared).unwrap();
    let format = json!({ "driver": "fmt", "node-name": "q", "file": "s", "read-only": true });
    add(&graph, format).unwrap();
    assert_eq!(locked(image.as_file()), [100]);
}
