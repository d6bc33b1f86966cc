//! A driver that checks what it is promised: every request inside of the node, aligned and limited as it asked. It keeps
//! its bytes in memory, and lets others run in the middle of each request.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use vhost_user_blk::block::drivers::TABLE;
use vhost_user_blk::block::perm::{Perms, default_child_perms};
use vhost_user_blk::block::{
    Driver, DriverDef, DriverKind, Graph, IoFuture, Limits, Node, Op, OpenArgs, ZeroFlags,
};
use vhost_user_blk::error::{Errno, Result};
use vhost_user_blk::mem::Sg;
use vhost_user_blk::qapi::Options;
use vhost_user_blk::rt::sync::give_way;

use super::bed::{Disk, Layout, Setup};

static STRICT: DriverDef = DriverDef {
    name: "strict",
    kind: DriverKind::Protocol,
    options: &[],
    open,
    recognises: vhost_user_blk::block::Recognises::Nothing,
    child_perms: default_child_perms,
};

static DRIVERS: &[&DriverDef] = &[&STRICT];

/// What a strict disk asks for; each row has a chance to be the first to find something.
pub const LIMITS: &[Limits] = &[
    // Nothing in particular.
    Limits { ..Limits::NONE },
    // Everything at once.
    Limits {
        request_align: 512,
        mem_align: 64,
        max_transfer: 64 << 10,
        max_iov: 4,
        discard_align: 4096,
        max_discard: 50_000,
        zeroes_align: 1024,
        max_zeroes: 70_000,
        ..Limits::NONE
    },
    // A medium with large blocks.
    Limits {
        request_align: 4096,
        mem_align: 4096,
        discard_align: 65536,
        max_zeroes: 1 << 20,
        ..Limits::NONE
    },
    // Zeroes finer than blocks; single blocks only.
    Limits { request_align: 2048, zeroes_align: 1, max_transfer: 2048, max_iov: 1, ..Limits::NONE },
];

struct Strict {
    bytes: Mutex<Vec<u8>>,
    limits: Limits,
    len: u64,
    /// Write-zeroes are ENOTSUP.
    no_zeroes: bool,
}

fn open(args: &mut OpenArgs<'_>) -> Result<Box<dyn Driver>> {
    let mut number = |name| args.take_size(name).map(|n| n.expect("given"));
    let (len, row) = (number("size")?, usize::try_from(number("row")?).expect("small"));
    let no_zeroes = args.take_bool("no-zeroes")?.expect("given");
    let bytes = Mutex::new(vec![0; usize::try_from(len).expect("small")]);
    Ok(Box::new(Strict { bytes, limits: LIMITS[row], len, no_zeroes }))
}

/// A zeroed strict disk of `len` bytes with the limits of row `row`.
pub fn disk(row: usize, len: u64, no_zeroes: bool) -> Disk {
    let graph = Graph::with_drivers(DRIVERS);
    let options = json!({
        "driver": "strict", "node-name": "s", "size": len, "row": row, "no-zeroes": no_zeroes,
        "discard": "unmap", "detect-zeroes": "unmap",
    });
    let Value::Object(options) = options else { unreachable!() };
    let node = graph.add(options).expect("it opens");
    let user = graph.attach_root(&node, "the test", Perms::device(true)).expect("nobody else");
    Disk::new(Setup::new(Layout::File, "none", false), 0, node, user, graph)
}

/// Two `raw` nodes, both writable, over one strict disk of `len` bytes with the limits of row `row`.
pub fn two_raws(row: usize, len: u64) -> (Arc<Graph>, [Arc<Node>; 2]) {
    let raw = TABLE.iter().find(|def| def.name == "raw").expect("there is raw");
    let graph = Graph::with_drivers(Box::leak(Box::new([&STRICT, *raw])));
    let add = |options: Value| {
        let Value::Object(options) = options else { unreachable!() };
        graph.add(options).expect("it opens")
    };
    add(json!({"driver": "strict", "node-name": "s", "size": len, "row": row, "no-zeroes": false}));
    let raws = ["a", "b"].map(|name| add(json!({"driver": "raw", "node-name": name, "file": "s"})));
    for raw in &raws {
        // The users live as long as the graph: nobody asks for them again.
        std::mem::forget(
            graph.attach_root(raw, "the test", Perms::device(true)).expect("they share"),
        );
        raw.expect_ragged_writes(512);
    }
    (graph, raws)
}

impl Strict {
    fn check(&self, what: &str, offset: u64, len: u64, align: u32, max: u64) {
        let (align, what) = (u64::from(align), format!("{what} of {len} at {offset}"));
        assert!(len > 0 && offset + len <= self.len, "{what}: outside");
        assert!(max == 0 || len <= max, "{what}: too long");
        let aligned = offset.is_multiple_of(align) && len.is_multiple_of(align);
        assert!(aligned, "{what}: not aligned to {align}");
    }

    fn check_memory(&self, what: &str, sg: &Sg<'_>) {
        let l = &self.limits;
        assert!(sg.iter().count() <= l.max_iov as usize, "{what}: too many ranges");
        for v in sg.iter() {
            let start = v.base().addr().is_multiple_of(l.mem_align as usize);
            let whole = v.len().is_multiple_of(l.request_align as usize);
            assert!(start && whole, "{what}: memory not aligned");
        }
    }

    async fn serve(&self, op: Op<'_>) -> std::result::Result<(), Errno> {
        let l = &self.limits;
        let max = u64::from(l.max_transfer);
        let place = |at: u64, len: u64| {
            let at = usize::try_from(at).expect("inside");
            at..at + usize::try_from(len).expect("inside")
        };
        match op {
            Op::Read { offset, to } => {
                self.check("read", offset, to.len() as u64, l.request_align, max);
                self.check_memory("read", &to);
                to.copy_from(&self.bytes.lock().expect("whole")[place(offset, to.len() as u64)]);
                give_way().await;
            }
            Op::Write { offset, from, .. } => {
                self.check("write", offset, from.len() as u64, l.request_align, max);
                self.check_memory("write", &from);
                give_way().await;
                let mut bytes = self.bytes.lock().expect("whole");
                from.copy_to(&mut bytes[place(offset, from.len() as u64)]);
            }
            Op::WriteZeroes { offset, len, flags } => {
                let align = l.zeroes_align.max(l.request_align);
                self.check("write-zeroes", offset, len, align, l.max_zeroes);
                give_way().await;
                if self.no_zeroes {
                    return Err(Errno::ENOTSUP);
                }
                assert!(ZeroFlags::all().contains(flags));
                self.bytes.lock().expect("whole")[place(offset, len)].fill(0);
            }
            Op::Discard { offset, len } => {
                let align = l.discard_align.max(l.request_align);
                let end = offset + len == self.len;
                self.check("discard", offset, len, if end { 1 } else { align }, l.max_discard);
                assert!(offset.is_multiple_of(align.into()), "discard at {offset}");
                give_way().await;
                self.bytes.lock().expect("whole")[place(offset, len)].fill(0);
            }
            Op::Flush => give_way().await,
        }
        Ok(())
    }
}

impl Driver for Strict {
    fn len(&self) -> u64 {
        self.len
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        Box::pin(self.serve(op))
    }

    fn options_in_force(&self) -> Options {
        Options::new()
    }
}
