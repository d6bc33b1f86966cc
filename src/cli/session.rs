//! The second pass over the command line: nodes, objects and exports, in order; and their end.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::dormant::{self, Dormant};
use super::exports::{Exports, Wanted};
use super::getopt::{Item, Opt};
use super::listen;
use super::objects::{Objects, Outcome};
use super::plan::Settings;
use super::state;
use crate::block::{Graph, Node, print};
use crate::err;
use crate::error::Result;
use crate::qapi::{Input, Options};
use crate::rt::pool::pool;
use crate::sandbox::{self, Allow};
use crate::sys;
use crate::vhost_user::Endpoint;

/// The name of the node that `--blk-file` defines.
const BLK_FILE_NODE: &str = "blk-file";

/// A disk that takes longer than this to end a killed predecessor's requests is a supervisor's matter: it starts us again.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);

/// Everything that the command line made.
pub struct Session {
    pub(super) graph: Arc<Graph>,
    objects: Objects,
    pub(super) exports: Exports,
    /// What a predecessor has open now.
    pub(super) to_open: Vec<Options>,
    /// Nodes of exports that begin inactive, as long as the command line is processed.
    dormant: Dormant,
    /// The files that they will open, and whether for writing.
    later: Vec<(PathBuf, bool)>,
}

/// What comes after the command line.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Serving.
    Serve,
    /// Printing this, and the end.
    Print(String),
}

impl Session {
    /// With no nodes, objects and exports.
    pub fn new() -> Self {
        Session {
            graph: Graph::new(),
            objects: Objects::default(),
            exports: Exports::default(),
            to_open: Vec::new(),
            dormant: Dormant::default(),
            later: Vec::new(),
        }
    }

    /// Processes all options. What was made before an error stays until [`Session::close`]. If there is a `predecessor`,
    /// nodes are only looked at, and nobody listens: it will give all that.
    ///
    /// # Errors
    /// The first, with the option's text in front.
    pub fn process(&mut self, settings: &Settings, predecessor: bool) -> Result<Next> {
        let strict = settings.items.iter().any(|item| item.opt == Some(Opt::StrictFormats));
        self.graph.set_strict_formats(strict);
        self.graph.set_lock_patience(LOCK_PATIENCE);
        match state::dir(settings.state_dir.as_deref(), settings.identity.numbers().0) {
            Some(dir) => self.graph.set_state_dir(dir),
            None => log::warn!("no state directory: {}", state::WEAKER),
        }
        // A graph that is only looked at is open.
        if settings.print_graph.is_none() {
            self.dormant = Dormant::plan(settings)?;
        }
        if predecessor {
            self.dormant.take_all();
        }
        self.dormant.set_strict_formats(strict);
        for item in &settings.items {
            let next = self.option(item, settings);
            if let Next::Print(text) = next.map_err(|e| e.prepend(format!("{}: ", item.text)))? {
                return Ok(Next::Print(text));
            }
        }
        if let Some(item) = &settings.blk_file {
            self.blk_file(item.argument(), settings)
                .map_err(|e| e.prepend(format!("{}: ", item.text)))?;
        }
        if let Some(format) = settings.print_graph {
            return Ok(Next::Print(print::print(&self.graph, format)));
        }
        if let Some(item) = settings.socket_path.as_ref().or(settings.fd.as_ref()) {
            self.convention(item, settings).map_err(|e| e.prepend(format!("{}: ", item.text)))?;
        }
        // What the nodes look like is known; nothing of them stays open.
        self.later = self.dormant.files();
        self.to_open = self.dormant.to_open();
        self.dormant = Dormant::default();
        Ok(Next::Serve)
    }

    fn option(&mut self, item: &Item, settings: &Settings) -> Result<Next> {
        let text = item.argument();
        match item.opt {
            None => return Err(err!("Unexpected argument")),
            Some(Opt::Blockdev) => self.blockdev(Input::parse(text, "driver")?)?,
            Some(Opt::Export) => {
                let wanted = Wanted::parse(text, settings.exports)?;
                // A graph that is only looked at is not served.
                if settings.print_graph.is_none() {
                    let nodes = (&self.graph, &self.dormant);
                    self.exports.add(nodes, &self.objects, &wanted, settings.exports)?;
                }
            }
            Some(Opt::Object) => {
                if let Outcome::Help(help) = self.objects.add(text)? {
                    return Ok(Next::Print(help));
                }
            }
            Some(Opt::Trace) => log::info!("{} is ignored: see --log-level", item.text),
            Some(Opt::Chardev) => return Err(unsupported("--chardev")),
            Some(Opt::Monitor) => return Err(unsupported("--monitor")),
            Some(Opt::NbdServer) => return Err(unsupported("--nbd-server")),
            // The first pass has seen to the rest.
            Some(_) => {}
        }
        Ok(Next::Serve)
    }

    fn blockdev(&mut self, input: Input) -> Result<()> {
        let options = input.visit_blockdev()?;
        if !options.contains_key("node-name") {
            return Err(err!("'node-name' must be specified for the root node"));
        }
        if self.dormant.takes(&options) {
            return self.dormant.add(&self.graph, options);
        }
        self.graph.add(options).map(drop)
    }

    /// Defines the node of `--blk-file`: a format on a file, or on a block device.
    fn blk_file(&mut self, path: &str, settings: &Settings) -> Result<()> {
        let device = fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device());
        let definition = json!({
            "driver": settings.format.as_deref().unwrap_or("raw"),
            "node-name": BLK_FILE_NODE,
            "read-only": settings.read_only,
            "discard": "unmap",
            "file": {
                "driver": if device { "host_device" } else { "file" },
                "filename": path,
            },
        });
        let Value::Object(definition) = definition else { return Ok(()) };
        self.blockdev(Input::from_json(definition))
    }

    /// Exports the node that `--socket-path` or `--fd` (`item`) is for.
    fn convention(&mut self, item: &Item, settings: &Settings) -> Result<()> {
        let node = self.node_to_export(settings)?;
        let read_only = match self.dormant.find(node.name()) {
            Some(asleep) => asleep.read_only,
            None => node.read_only(),
        };
        let wanted = Wanted::convention(&node, !settings.read_only && !read_only);
        let mode = settings.exports.socket_mode;
        let nodes = (&self.graph, &self.dormant);
        self.exports.add_at(nodes, &self.objects, &wanted, |_| match item.opt {
            Some(Opt::Fd) => Ok((Some(listen::inherited_endpoint(item.argument())?), None)),
            _ => listen::at_path(item.argument(), mode)
                .map(|(listener, place)| (Some(Endpoint::Listener(listener)), Some(place))),
        })
    }

    /// The node of `--node-name` or `--blk-file`, or else the one root of the graph.
    fn node_to_export(&self, settings: &Settings) -> Result<Arc<Node>> {
        let name = match (&settings.node_name, &settings.blk_file) {
            (Some(item), _) => Some(item.argument()),
            (None, Some(_)) => Some(BLK_FILE_NODE),
            (None, None) => None,
        };
        if let Some(name) = name {
            let asleep = self.dormant.find(name).map(|asleep| asleep.probe);
            let node = asleep.or_else(|| self.graph.find(name));
            return node.ok_or_else(|| err!("Cannot find device='' nor node-name='{name}'"));
        }
        let mut roots = self.graph.roots();
        if self.dormant.takes_all() {
            roots.append(&mut self.dormant.roots());
        }
        match roots.as_slice() {
            [root] => Ok(Arc::clone(root)),
            [] => Err(err!("nothing to export: define a node with --blk-file or --blockdev")),
            several => {
                let names: Vec<_> = several.iter().map(|node| node.name()).collect();
                Err(err!(
                    "several nodes could be exported ({}): choose with --node-name",
                    names.join(", ")
                ))
            }
        }
    }

    /// Gives the sockets their names.
    ///
    /// # Errors
    /// If one cannot be moved there.
    pub fn publish(&mut self) -> Result<()> {
        self.exports.publish()
    }

    /// Gives the sockets to another user and group, before they have their names.
    ///
    /// # Errors
    /// Without the right to.
    pub fn give_to(&self, numbers: (Option<u32>, Option<u32>)) -> Result<()> {
        self.exports.places().try_for_each(|place| place.give_to(numbers))
    }

    /// Enters the sandbox, with what the end of the session will take, and all files if they may be opened anew: when a successor
    /// failed that they were closed for (`may_reopen`).
    ///
    /// # Errors
    /// If the kernel refuses what it should allow.
    pub fn confine(&self, mut allow: Allow, may_reopen: bool) -> Result<()> {
        let dirs = self.exports.places().filter_map(listen::Place::dir);
        dirs.for_each(|dir| allow.remove_in(dir));
        let later = self.openable(may_reopen);
        let none = later.is_empty();
        later.into_iter().for_each(|(path, writable)| allow.file(path, writable));
        // Journals go with the nodes that are written to, and come with those that are opened later. A directory that is not
        // there was complained about by who needed it.
        match self.graph.state_dir().filter(|dir| dir.is_dir()) {
            Some(dir) if none => allow.remove_in(dir),
            Some(dir) => {
                allow.directory(dir);
                allow.file(sys::BOOT_ID, false);
            }
            None => {}
        }
        // Threads made before are not restricted; these have nothing to do yet.
        self.graph.upkeep().pause();
        pool().retire();
        let entered = sandbox::enter(&allow);
        self.graph.upkeep().resume();
        entered
    }

    /// The files that may be opened from here on, and whether for writing; all that are open now, if they `may_reopen`.
    fn openable(&self, may_reopen: bool) -> Vec<(PathBuf, bool)> {
        let mut files = self.later.clone();
        if may_reopen {
            files.extend(dormant::files_of(&self.graph, &self.graph.all_definitions()));
        }
        files
    }

    /// Whether the working directory is where names begin that may be needed from here on: see [`Session::confine`].
    pub fn needs_directory(&self, may_reopen: bool) -> bool {
        self.openable(may_reopen).iter().any(|(path, _)| path.is_relative())
    }

    /// Starts to serve.
    ///
    /// # Errors
    /// If there are no threads or descriptors left.
    pub fn serve(&mut self) -> Result<()> {
        self.exports.serve()
    }

    /// What SIGUSR1 means, somebody has seen to the storage: media that have become longer are offered to the guests, and
    /// requests that failed and wait are tried again.
    pub fn look_at_storage(&self) {
        self.exports.look_at_sizes();
        self.exports.resume();
    }

    /// Ends everything in order: connections, exports, nodes, and then the sockets' names.
    ///
    /// Whether everything that guests wrote is stable, and all nodes were closed in order.
    pub fn close(mut self) -> bool {
        let flushed = self.exports.stop();
        let closed = self.graph.close_all();
        self.exports.remove_sockets();
        flushed && closed
    }
}

impl Default for Session {
    fn default() -> Self {
        Session::new()
    }
}

fn unsupported(option: &str) -> crate::error::Error {
    err!("'{option}' is not supported by vhost-user-blk yet")
}
