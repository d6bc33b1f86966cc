//! `blkdebug`: its child's bytes, with errors where the rules want them and limits that the child does not have.
//!
//! For tests of what is above it. Every request goes through the slow lane. Events come from the parent: see [`Event`].
//! Raised here are, by `qcow2` on its file: `l1_update`, `l1_grow_alloc_table`, `l1_grow_write_table`,
//! `l1_grow_activate_table`, `l2_load`, `l2_update`, `l2_alloc_cow_read`, `l2_alloc_write`, `read_aio`, `read_backing_aio`,
//! `read_compressed`, `write_aio`, `cow_read`, `cow_write`, `refblock_load`, `refblock_update_part`,
//! `refblock_alloc_hookup`, `refblock_alloc_write_table`, `refblock_alloc_switch_table`, `cluster_alloc`, `cluster_free`,
//! `flush_to_os`, `flush_to_disk`; by `raw`: `read_aio`, `write_aio`, `flush_to_disk`; by the generic layer on the node itself:
//! `pwritev`, `pwritev_zero`; and `none`, once, at the start. The others of QEMU's names are accepted and never
//! raised: what they stand for does not happen here, or not as a step of its own.
#![forbid(unsafe_code)]

use serde_json::Value;

use crate::block::event::NAMES;
use crate::block::perm::default_child_perms;
use crate::block::{
    Driver, DriverDef, DriverKind, Edge, Event, IoFuture, Limits, Node, Op, OpenArgs, Recognises,
    Role,
};
use crate::err;
use crate::error::{Errno, Result};
use crate::mem::Sg;
use crate::qapi::{Kind, OptionSpec, Options};
use crate::rt::sync::give_way;

mod config;
mod rules;

use rules::{Action, Fault, IoType, Rule, Rules};

/// `int`.
const INT: Kind = Kind::Int { bits: 64, signed: true };
/// The bytes of a rule's `sector`.
const SECTOR: u64 = 512;

static INJECT: Kind = Kind::Struct(&[
    OptionSpec::required("event", Kind::Enum(NAMES)),
    OptionSpec::optional("state", INT),
    OptionSpec::optional("iotype", Kind::Enum(IoType::NAMES)),
    OptionSpec::optional("errno", INT),
    OptionSpec::optional("sector", INT),
    OptionSpec::optional("once", Kind::Bool),
    OptionSpec::optional("immediately", Kind::Bool),
]);

static SET_STATE: Kind = Kind::Struct(&[
    OptionSpec::required("event", Kind::Enum(NAMES)),
    OptionSpec::optional("state", INT),
    OptionSpec::required("new_state", INT),
]);

static PERM: Kind = Kind::Enum(&["consistent-read", "write", "write-unchanged", "resize"]);

/// `blkdebug`.
pub static BLKDEBUG: DriverDef = DriverDef {
    name: "blkdebug",
    kind: DriverKind::Filter,
    options: &[
        OptionSpec::required("image", Kind::BlockdevRef),
        OptionSpec::optional("config", Kind::Str),
        OptionSpec::optional("align", INT),
        OptionSpec::optional("max-transfer", Kind::Int { bits: 32, signed: true }),
        OptionSpec::optional("opt-write-zero", Kind::Int { bits: 32, signed: true }),
        OptionSpec::optional("max-write-zero", Kind::Int { bits: 32, signed: true }),
        OptionSpec::optional("opt-discard", Kind::Int { bits: 32, signed: true }),
        OptionSpec::optional("max-discard", Kind::Int { bits: 32, signed: true }),
        OptionSpec::optional("inject-error", Kind::List(&INJECT)),
        OptionSpec::optional("set-state", Kind::List(&SET_STATE)),
        OptionSpec::optional("take-child-perms", Kind::List(&PERM)),
        OptionSpec::optional("unshare-child-perms", Kind::List(&PERM)),
    ],
    open,
    recognises: Recognises::Nothing,
    child_perms: default_child_perms,
};

/// The limits that the user gave; 0: the child's.
#[derive(Default)]
struct Given {
    align: u32,
    max_transfer: u32,
    opt_write_zero: u32,
    max_write_zero: u32,
    opt_discard: u32,
    max_discard: u32,
}

struct Blkdebug {
    edges: [Edge; 1],
    given: Given,
    rules: Rules,
    options: Options,
}

fn open(args: &mut OpenArgs<'_>) -> Result<Box<dyn Driver>> {
    let options = args.options.clone();
    let config = args.take_str("config")?;
    let mut rules = config.map_or(Ok(Vec::new()), |path| config::read(&path))?;
    for (name, parse) in
        [("inject-error", inject as fn(&Options) -> Result<Rule>), ("set-state", set_state)]
    {
        let list = args.options.shift_remove(name).unwrap_or(Value::Array(Vec::new()));
        for rule in list.as_array().into_iter().flatten() {
            rules.push(rule.as_object().map_or(Err(no_event()), parse)?);
        }
    }
    for name in ["take-child-perms", "unshare-child-perms"] {
        if let Some(Value::Array(list)) = args.options.shift_remove(name)
            && !list.is_empty()
        {
            return Err(err!("'{name}' is not supported by vhost-user-blk yet"));
        }
    }
    let edge = args.open_child("image", Role::Filtered)?;
    let given = limits(args, edge.node.driver().limits().request_align)?;
    let own = options
        .into_iter()
        .filter(|(name, _)| BLKDEBUG.options[1..].iter().any(|o| o.name == name));
    Ok(Box::new(Blkdebug {
        edges: [edge],
        given,
        rules: Rules::new(rules),
        options: own.collect(),
    }))
}

/// Takes the limits out, each a multiple of the one before it that matters; a child with `child_align` is below.
fn limits(args: &mut OpenArgs<'_>, child_align: u32) -> Result<Given> {
    let mut take = |name: &'static str, unit: u32| {
        let value = args.take_size(name)?.unwrap_or(0);
        let fits = u32::try_from(value)
            .ok()
            .filter(|v| i32::try_from(*v).is_ok_and(|v| v < i32::MAX) && v.is_multiple_of(unit));
        fits.ok_or_else(|| err!("Cannot meet constraints with {name} {value}"))
    };
    let align = take("align", 1)?;
    if align != 0 && !align.is_power_of_two() {
        return Err(err!("Cannot meet constraints with align {align}"));
    }
    let unit = align.max(child_align);
    let max_transfer = take("max-transfer", unit)?;
    let opt_write_zero = take("opt-write-zero", unit)?;
    let max_write_zero = take("max-write-zero", opt_write_zero.max(unit))?;
    let opt_discard = take("opt-discard", unit)?;
    let max_discard = take("max-discard", opt_discard.max(unit))?;
    Ok(Given { align, max_transfer, opt_write_zero, max_write_zero, opt_discard, max_discard })
}

fn no_event() -> crate::error::Error {
    err!("Missing event name for rule")
}

fn event(options: &Options) -> Result<Event> {
    let name = options.get("event").and_then(Value::as_str).ok_or_else(no_event)?;
    Event::parse(name).ok_or_else(|| err!("invalid parameter value: {name}"))
}

fn number(options: &Options, name: &str) -> Option<i64> {
    options.get(name).and_then(Value::as_i64)
}

fn flag(options: &Options, name: &str) -> bool {
    options.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// A rule of `inject-error`.
fn inject(options: &Options) -> Result<Rule> {
    let kinds = match options.get("iotype").and_then(Value::as_str) {
        None => IoType::all() - IoType::BLOCK_STATUS,
        Some(name) => IoType::parse(name).ok_or_else(|| err!("invalid parameter value: {name}"))?,
    };
    let errno = number(options, "errno").map_or(Some(libc::EIO), |n| i32::try_from(n).ok());
    let sector = number(options, "sector").and_then(|n| u64::try_from(n).ok());
    let action = Action::Inject {
        kinds,
        offset: sector.map(|n| n.saturating_mul(SECTOR)),
        errno: Errno(errno.unwrap_or(libc::EIO)),
        once: flag(options, "once"),
        immediately: flag(options, "immediately"),
    };
    Ok(Rule { event: event(options)?, state: number(options, "state").unwrap_or(0), action })
}

/// A rule of `set-state`.
fn set_state(options: &Options) -> Result<Rule> {
    let action = Action::SetState(number(options, "new_state").unwrap_or(0));
    Ok(Rule { event: event(options)?, state: number(options, "state").unwrap_or(0), action })
}

impl Fault {
    async fn strike(self) -> std::result::Result<(), Errno> {
        if !self.immediately {
            give_way().await;
        }
        Err(self.errno)
    }
}

impl Blkdebug {
    fn child(&self) -> &Node {
        &self.edges[0].node
    }

    /// A read of whole blocks may hang over the child's end: zeroes there.
    async fn read(&self, offset: u64, to: Sg<'_>) -> std::result::Result<(), Errno> {
        let inside = self.child().len().saturating_sub(offset);
        let inside = usize::try_from(inside).unwrap_or(usize::MAX).min(to.len());
        to.slice(inside, to.len() - inside).zero();
        match to.slice(0, inside) {
            to if to.is_empty() => Ok(()),
            to => self.child().submit(Op::Read { offset, to }).await,
        }
    }
}

impl Driver for Blkdebug {
    fn edges(&self) -> &[Edge] {
        &self.edges
    }

    fn len(&self) -> u64 {
        self.child().driver().len()
    }

    fn grows(&self) -> bool {
        self.child().driver().grows()
    }

    fn limits(&self) -> Limits {
        // What is not given is the child's business, which cuts requests itself.
        let (g, child) = (&self.given, self.child().driver().limits());
        let or = |given: u32, child: u32| if given == 0 { child } else { given };
        let or64 = |given: u32, child: u64| if given == 0 { child } else { given.into() };
        Limits {
            request_align: g.align.max(1),
            mem_align: 1,
            max_transfer: or(g.max_transfer, child.max_transfer),
            zeroes_align: or(g.opt_write_zero, child.zeroes_align),
            max_zeroes: or64(g.max_write_zero, child.max_zeroes),
            discard_align: or(g.opt_discard, child.discard_align),
            max_discard: or64(g.max_discard, child.max_discard),
            ..child
        }
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        let (kind, offset, len) = match op {
            Op::Read { offset, to } => (IoType::READ, offset, to.len() as u64),
            Op::Write { offset, from, .. } => (IoType::WRITE, offset, from.len() as u64),
            Op::WriteZeroes { offset, len, .. } => (IoType::WRITE_ZEROES, offset, len),
            Op::Discard { offset, len } => (IoType::DISCARD, offset, len),
            Op::Flush => (IoType::FLUSH, 0, 0),
        };
        match (self.rules.check(kind, offset, len), op) {
            (Some(fault), _) => Box::pin(fault.strike()),
            (None, Op::Read { offset, to }) => Box::pin(self.read(offset, to)),
            (None, op) => self.child().submit(op),
        }
    }

    fn event(&self, event: Event) {
        self.rules.raise(event);
    }

    fn truncate(&self, len: u64) -> IoFuture<'_> {
        Box::pin(self.child().truncate(len))
    }

    fn preallocate(&self, offset: u64, len: u64) -> IoFuture<'_> {
        self.child().driver().preallocate(offset, len)
    }

    fn options_in_force(&self) -> Options {
        self.options.clone()
    }
}
