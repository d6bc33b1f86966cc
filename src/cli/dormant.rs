//! Nodes that the command line defines and nobody may open yet: those of exports that begin inactive.
//!
//! Which they are must be known before the first is opened: opening an image for writing takes its locks, and the migration's
//! source has them. While the command line is processed they are open in a graph of their own, without locks and not for
//! writing: mistakes are found where they were made, and the size is known. The export opens them when its time comes.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use super::exports::Wanted;
use super::getopt::Opt;
use super::plan::Settings;
use crate::block::drivers::TABLE;
use crate::block::{Graph, Node};
use crate::err;
use crate::error::Result;
use crate::qapi::{Input, Kind, Options};

/// The nodes, and what is known of them.
pub struct Dormant {
    names: BTreeSet<String>,
    definitions: Vec<Options>,
    probes: Arc<Graph>,
}

impl Default for Dormant {
    fn default() -> Self {
        Dormant { names: BTreeSet::new(), definitions: Vec::new(), probes: Graph::new() }
    }
}

/// The root of an export that begins inactive.
pub struct Asleep {
    /// How it looks, without locks and not for writing.
    pub probe: Arc<Node>,
    /// What opens it: see [`crate::block::Opener`].
    pub definitions: Vec<Options>,
    /// It is defined so.
    pub read_only: bool,
}

/// A node's definition, as far as it matters here.
struct Defined {
    inactive: bool,
    refers_to: Vec<String>,
}

/// All definitions by name.
type Defs = BTreeMap<String, Defined>;

impl Dormant {
    /// Finds out which nodes must not be opened. Options with mistakes are skipped: they are complained about in their turn.
    ///
    /// # Errors
    /// Another export or node uses a node of an export that may become inactive.
    pub fn plan(settings: &Settings) -> Result<Dormant> {
        let items = |opt| settings.items.iter().filter(move |item| item.opt == Some(opt));
        let mut defs = Defs::new();
        for item in items(Opt::Blockdev) {
            let parsed = Input::parse(item.argument(), "driver").and_then(Input::visit_blockdev);
            let Ok(options) = parsed else { continue };
            let Some(name) = options.get("node-name").and_then(Value::as_str) else { continue };
            let mut refers_to = Vec::new();
            references(&options, &mut refers_to);
            let inactive = options.get("active") == Some(&Value::Bool(false));
            defs.insert(name.to_owned(), Defined { inactive, refers_to });
        }
        let exports = items(Opt::Export).filter_map(|item| {
            let wanted = Wanted::parse(item.argument(), settings.exports).ok()?;
            Some((item, reach(&defs, wanted.node()), wanted))
        });
        let exports: Vec<_> = exports.collect();
        let mut dormant = Dormant::default();
        for (at, (item, nodes, wanted)) in exports.iter().enumerate() {
            let inactive = defs.get(wanted.node()).is_some_and(|def| def.inactive);
            if !(wanted.activates_by_itself() || wanted.allows_inactive() && inactive) {
                continue;
            }
            let mut others = exports.iter().enumerate().filter(|(other, _)| *other != at);
            let shared = others.find_map(|(_, (_, other, _))| other.intersection(nodes).next());
            let parents = defs.iter().filter(|(name, _)| !nodes.contains(*name));
            let used = parents.flat_map(|(_, def)| &def.refers_to).find(|n| nodes.contains(*n));
            if let Some(node) = shared.or(used) {
                return Err(err!(
                    "{}: node '{node}' has other users: what can become inactive must have none",
                    item.text
                ));
            }
            dormant.names.extend(nodes.iter().cloned());
        }
        Ok(dormant)
    }

    /// See [`Graph::set_strict_formats`].
    pub fn set_strict_formats(&self, strict: bool) {
        self.probes.set_strict_formats(strict);
    }

    /// Whether the node of this definition must not be opened.
    pub fn takes(&self, options: &Options) -> bool {
        let name = options.get("node-name").and_then(Value::as_str);
        name.is_some_and(|name| self.names.contains(name))
    }

    /// Notes a definition, and looks at what it defines.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn add(&mut self, graph: &Graph, options: Options) -> Result<()> {
        if let Some(name) = options.get("node-name").and_then(Value::as_str)
            && graph.find(name).is_some()
        {
            return Err(err!("Duplicate nodes with node-name='{name}'"));
        }
        self.probes.add(as_probe(options.clone(), true))?;
        self.definitions.push(options);
        Ok(())
    }

    /// The node `name`, if it is one of these.
    pub fn find(&self, name: &str) -> Option<Asleep> {
        let probe = self.probes.find(name)?;
        let name_of =
            |options: &Options| options.get("node-name").and_then(Value::as_str).map(str::to_owned);
        let mut defs = Defs::new();
        for options in &self.definitions {
            let mut refers_to = Vec::new();
            references(options, &mut refers_to);
            defs.insert(name_of(options)?, Defined { inactive: true, refers_to });
        }
        let nodes = reach(&defs, name);
        let ours = |options: &&Options| name_of(options).is_some_and(|n| nodes.contains(&n));
        let definitions: Vec<Options> = self.definitions.iter().filter(ours).cloned().collect();
        let read_only = definitions.last()?.get("read-only") == Some(&Value::Bool(true));
        Some(Asleep { probe, definitions, read_only })
    }

    /// All files that the nodes are made of, backing files that only images' headers name included; and whether they will
    /// be opened for writing.
    pub fn files(&self) -> Vec<(PathBuf, bool)> {
        let mut named = Vec::new();
        self.definitions.iter().for_each(|options| files(options, false, &mut named));
        let found = self.probes.nodes().into_iter().filter_map(|node| node.driver().filename());
        named.extend(found.map(|path| (path.into(), false)));
        named
    }
}

/// The node `root` and the defined nodes that it refers to.
fn reach(defs: &Defs, root: &str) -> BTreeSet<String> {
    let (mut seen, mut todo) = (BTreeSet::new(), vec![root.to_owned()]);
    while let Some(name) = todo.pop() {
        if let Some(def) = defs.get(&name)
            && seen.insert(name)
        {
            todo.extend(def.refers_to.iter().cloned());
        }
    }
    seen
}

/// The options of a driver that stand for other nodes.
fn child_options(options: &Options) -> impl Iterator<Item = &'static str> + use<> {
    let driver = options.get("driver").and_then(Value::as_str).unwrap_or_default();
    let def = TABLE.iter().find(|def| def.name == driver);
    let specs = def.map_or(&[][..], |def| def.options).iter();
    specs
        .filter(|spec| matches!(spec.kind, Kind::BlockdevRef | Kind::BlockdevRefOrNull))
        .map(|spec| spec.name)
}

/// Adds the names of the nodes that `options` refers to, also from nodes defined inside.
fn references(options: &Options, names: &mut Vec<String>) {
    for child in child_options(options) {
        match options.get(child) {
            Some(Value::String(name)) => names.push(name.clone()),
            Some(Value::Object(inside)) => references(inside, names),
            _ => {}
        }
    }
}

/// Adds the files that `options` names, also in nodes defined inside. `read_only` is what they inherit.
fn files(options: &Options, read_only: bool, named: &mut Vec<(PathBuf, bool)>) {
    let read_only = options.get("read-only").map_or(read_only, |value| value == &Value::Bool(true));
    if let Some(Value::String(path)) = options.get("filename") {
        named.push((path.into(), !read_only));
    }
    // What `blkdebug` reads its rules from.
    if let Some(Value::String(path)) = options.get("config") {
        named.push((path.into(), false));
    }
    for child in child_options(options) {
        if let Some(Value::Object(inside)) = options.get(child) {
            files(inside, read_only || child == "backing", named);
        }
    }
}

/// The same node without locks and not for writing. Nodes defined inside inherit that from the `top`.
fn as_probe(mut options: Options, top: bool) -> Options {
    for name in ["read-only", "auto-read-only", "force-share"] {
        options.shift_remove(name);
    }
    if top {
        options.insert("read-only".into(), true.into());
        options.insert("force-share".into(), true.into());
    }
    for child in child_options(&options) {
        if let Some(Value::Object(inside)) = options.get_mut(child) {
            *inside = as_probe(std::mem::take(inside), false);
        }
    }
    options
}
