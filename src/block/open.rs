//! Opening one node: the generic options are absorbed, children inherit, the driver takes its own, the rest is an
//! error. QEMU's `bdrv_open_inherit` flow.
#![forbid(unsafe_code)]

use std::sync::Arc;

use serde_json::Value;

use super::driver::{DriverDef, DriverKind, Lineage, OpenArgs, take_bool, take_str, wrong_type};
use super::graph::{Graph, MAX_DEPTH, too_deep};
use super::node::{DetectZeroes, Edge, InForce, Node, Role};
use super::perm::{ChildPermQuery, Perms};
use crate::err;
use crate::error::Result;
use crate::qapi::Options;

/// What an inline child takes over where its own definition is silent.
#[derive(Clone, Copy)]
pub(super) struct Inherit {
    from: InForce,
    role: Role,
}

/// What is above a node that is being opened.
#[derive(Clone, Copy)]
pub(super) struct Above<'a> {
    /// What it takes over from its parent, if it is an inline child.
    inherit: Option<Inherit>,
    /// How many inline parents it has.
    depth: usize,
    /// The files of the overlays above.
    lineage: Option<&'a Lineage<'a>>,
}

impl Above<'_> {
    /// A node that the user defines on its own.
    pub(super) const NONE: Above<'static> = Above { inherit: None, depth: 0, lineage: None };
}

/// Opens a node.
///
/// # Errors
/// In QEMU's words; nothing is left behind.
pub(super) fn open(graph: &Graph, mut options: Options, above: Above<'_>) -> Result<Arc<Node>> {
    let Above { inherit, depth, lineage } = above;
    if depth >= MAX_DEPTH {
        return Err(too_deep());
    }
    let def = take_driver(graph, &mut options)?;
    let name = take_str(&mut options, "node-name")?;
    let in_force = take_generic(&mut options, inherit)?;
    let place = graph.reserve(name)?;
    // From here on, whatever fails: the driver's edges, then the place, go with their variables.
    let mut args = OpenArgs {
        graph,
        options,
        in_force,
        node_name: place.name(),
        depth,
        def,
        id: place.id(),
        lineage,
        file_id: None,
        inherit: in_force,
    };
    let driver = (def.open)(&mut args)?;
    refuse_leftovers(def, &args.options)?;
    let in_force = args.in_force;
    let node = Arc::new(Node::new(place, def, in_force, driver));
    graph.publish(&node);
    Ok(node)
}

fn take_driver(graph: &Graph, options: &mut Options) -> Result<&'static DriverDef> {
    let name = take_str(options, "driver")?.ok_or_else(|| err!("Parameter 'driver' is missing"))?;
    graph.driver(&name).ok_or_else(|| err!("Unknown driver '{name}'"))
}

/// Takes the options of the generic layer out of `options`, and fills in what is inherited.
fn take_generic(options: &mut Options, inherit: Option<Inherit>) -> Result<InForce> {
    let mut base = InForce::default();
    if let Some(Inherit { from, role }) = inherit {
        let cow = role == Role::Backing;
        base = InForce {
            read_only: cow || from.read_only,
            auto_read_only: !cow && from.auto_read_only,
            force_share: from.force_share,
            cache_direct: from.cache_direct,
            cache_no_flush: from.cache_no_flush,
            // Parents send discards only where their own options allow it.
            discard_unmap: true,
            detect_zeroes: DetectZeroes::Off,
        };
    }
    let (cache_direct, cache_no_flush) = take_cache(options)?;
    let in_force = InForce {
        read_only: take_bool(options, "read-only")?.unwrap_or(base.read_only),
        auto_read_only: take_bool(options, "auto-read-only")?.unwrap_or(base.auto_read_only),
        force_share: take_bool(options, "force-share")?.unwrap_or(base.force_share),
        cache_direct: cache_direct.unwrap_or(base.cache_direct),
        cache_no_flush: cache_no_flush.unwrap_or(base.cache_no_flush),
        discard_unmap: take_discard(options)?.unwrap_or(base.discard_unmap),
        detect_zeroes: take_detect_zeroes(options)?,
    };
    // An inactive node takes no locks until it has a user. None of the drivers so far holds any before that.
    let _ = take_bool(options, "active")?;
    if in_force.force_share && !in_force.read_only {
        return Err(err!("force-share=on can only be used with read-only images"));
    }
    if in_force.detect_zeroes == DetectZeroes::Unmap && !in_force.discard_unmap {
        return Err(err!(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
        ));
    }
    Ok(in_force)
}

fn take_cache(options: &mut Options) -> Result<(Option<bool>, Option<bool>)> {
    let Some(value) = options.shift_remove("cache") else { return Ok((None, None)) };
    let Value::Object(mut cache) = value else { return Err(wrong_type("cache", "object")) };
    let pair = (take_bool(&mut cache, "direct")?, take_bool(&mut cache, "no-flush")?);
    match cache.keys().next() {
        Some(key) => Err(err!("Parameter 'cache.{key}' is unexpected")),
        None => Ok(pair),
    }
}

fn take_discard(options: &mut Options) -> Result<Option<bool>> {
    match take_str(options, "discard")?.as_deref() {
        None => Ok(None),
        Some("ignore" | "off") => Ok(Some(false)),
        Some("unmap" | "on") => Ok(Some(true)),
        Some(_) => Err(err!("Invalid discard option")),
    }
}

fn take_detect_zeroes(options: &mut Options) -> Result<DetectZeroes> {
    match take_str(options, "detect-zeroes")?.as_deref() {
        None | Some("off") => Ok(DetectZeroes::Off),
        Some("on") => Ok(DetectZeroes::On),
        Some("unmap") => Ok(DetectZeroes::Unmap),
        Some(word) => Err(err!("Parameter 'detect-zeroes' does not accept value '{word}'")),
    }
}

fn refuse_leftovers(def: &DriverDef, options: &Options) -> Result<()> {
    match (options.keys().next(), def.kind, def.name) {
        (None, ..) => Ok(()),
        (Some(key), DriverKind::Protocol, name) => {
            Err(err!("Block protocol '{name}' doesn't support the option '{key}'"))
        }
        (Some(key), _, name) => {
            Err(err!("Block format '{name}' does not support the option '{key}'"))
        }
    }
}

impl Graph {
    /// Opens or looks up the child that `reference` stands for, and makes it a child of the node that `args` opens.
    pub(super) fn open_child(
        &self,
        args: &OpenArgs<'_>,
        name: &'static str,
        role: Role,
        reference: Value,
    ) -> Result<Edge> {
        let node = match reference {
            Value::String(name) => self
                .find(&name)
                .ok_or_else(|| err!("Cannot find device='{name}' nor node-name='{name}'"))?,
            Value::Object(options) => {
                let overlay = args.file_id.filter(|_| role == Role::Backing);
                let entered = overlay.map(|file| Lineage { file, above: args.lineage });
                let above = Above {
                    inherit: Some(Inherit { from: args.inherit, role }),
                    depth: args.depth + 1,
                    lineage: entered.as_ref().or(args.lineage),
                };
                open(self, options, above)?
            }
            _ => return Err(wrong_type(name, "BlockdevRef")),
        };
        let query = ChildPermQuery { role, node: Perms::NONE, read_only: args.in_force.read_only };
        let perms = (args.def.child_perms)(&query);
        let link = self.link_child(args.id, &node, (name, role), perms)?;
        Ok(Edge { name, role, _link: link, node })
    }
}
