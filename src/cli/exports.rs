//! `--export`: what it means, and the exports that run.
#![forbid(unsafe_code)]

use std::sync::Arc;

use serde_json::Value;

use super::dormant::Dormant;
use super::listen::{self, Place};
use super::objects::{Objects, POLL_MAX_NS_DEFAULT, check_not_negative, id_is_well_formed};
use crate::block::{Graph, Node, Opener};
use crate::err;
use crate::error::Result;
use crate::export::{Export, ExportConfig, OnError, OnErrors};
use crate::qapi::{Input, Options, schema};
use crate::vhost_user::{Endpoint, Server};

/// Queues that an export offers unless told otherwise: front ends fail when they want more than are there (QEMU wants
/// one for each virtual processor), and one that is not used costs next to nothing.
const NUM_QUEUES_DEFAULT: u16 = 16;
/// Ring entries that an export accepts unless told otherwise.
const QUEUE_SIZE_DEFAULT: u16 = 256;
/// The bounds of `queue-size`: firmware uses rings of 16; 1024 is QEMU's limit.
const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 16..=1024;
/// The bounds of `logical-block-size`, in bytes.
const BLOCK_SIZES: std::ops::RangeInclusive<u64> = 512..=2 << 20;
/// The serial number of QEMU's export: names in /dev/disk/by-id stay what they were.
const SERIAL_DEFAULT: &str = "vhost_user_blk";
/// The longest serial number, in bytes (VIRTIO_BLK_ID_BYTES).
const SERIAL_MAX: usize = 20;

/// An export, not served yet: the command line is processed to its end first.
struct Running {
    id: String,
    export: Arc<Export>,
    endpoint: Option<Endpoint>,
    server: Option<Server>,
    place: Option<Place>,
}

impl Running {
    /// Ends its connection, then the export. Whether everything is stable.
    fn stop(&mut self) -> bool {
        self.endpoint = None;
        if let Some(server) = self.server.take() {
            server.stop();
        }
        self.export.close()
    }
}

/// All exports.
#[derive(Default)]
pub struct Exports {
    list: Vec<Running>,
}

/// What the command line says about all exports.
#[derive(Clone, Copy, Debug, Default)]
pub struct Defaults {
    /// Permissions of the sockets, if not left to the umask.
    pub socket_mode: Option<u32>,
    /// There are several exports: each needs an id.
    pub several: bool,
}

/// The options of one export, after the schema: what the checks below and [`Export::new`] need.
pub struct Wanted {
    options: Options,
}

impl Wanted {
    /// Parses `text`, the argument of `--export`.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn parse(text: &str, defaults: Defaults) -> Result<Wanted> {
        let mut input = Input::parse(text, "type")?;
        let kind = input.take_word("type")?;
        if schema::QEMUS_EXPORTS.contains(&kind.as_str()) {
            return Err(err!("Export type '{kind}' is not supported by vhost-user-blk yet"));
        }
        if kind != "vhost-user-blk" {
            return Err(err!("Parameter 'type' does not accept value '{kind}'"));
        }
        let mut options = input.visit(&[schema::EXPORT, schema::VHOST_USER_BLK])?;
        if !options.contains_key("id") {
            if defaults.several {
                return Err(err!("Parameter 'id' is missing"));
            }
            // Node names follow the rules of ids.
            let id = options["node-name"].clone();
            options.insert("id".to_string(), id);
        }
        Ok(Wanted { options })
    }

    /// The export of `node` that QEMU's conventions for back ends describe: writable, if `node` is and `read_only` does
    /// not forbid it.
    pub fn convention(node: &Node, read_only: bool) -> Wanted {
        let mut options = Options::new();
        options.insert("id".to_string(), node.name().into());
        options.insert("node-name".to_string(), node.name().into());
        options.insert("writable".to_string(), (!read_only && !node.read_only()).into());
        Wanted { options }
    }

    fn text(&self, name: &str) -> &str {
        self.options.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    fn flag(&self, name: &str) -> bool {
        self.options.get(name).and_then(Value::as_bool).unwrap_or_default()
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.options.get(name).and_then(Value::as_u64)
    }

    fn number16(&self, name: &str, default: u16) -> u16 {
        // The schema has checked the range.
        self.number(name).and_then(|n| u16::try_from(n).ok()).unwrap_or(default)
    }

    /// The name of the node to export.
    pub fn node(&self) -> &str {
        self.text("node-name")
    }

    /// Whether the nodes are to be open only while rings run.
    pub fn activates_by_itself(&self) -> bool {
        self.text("activate") == "auto"
    }

    /// Whether the node may be inactive.
    pub fn allows_inactive(&self) -> bool {
        self.flag("allow-inactive")
    }

    /// The configuration of the export, checked.
    fn config(&self, poll_max_ns: Option<u64>) -> Result<ExportConfig> {
        let block_size = self.number("logical-block-size").unwrap_or(512);
        if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
            return Err(err!(
                "parameter logical-block-size must be a power of 2 between {} and {}",
                BLOCK_SIZES.start(),
                BLOCK_SIZES.end()
            ));
        }
        let num_queues = self.number16("num-queues", NUM_QUEUES_DEFAULT);
        if num_queues == 0 {
            return Err(err!("num-queues must be greater than 0"));
        }
        let queue_size = self.number16("queue-size", QUEUE_SIZE_DEFAULT);
        if !queue_size.is_power_of_two() || !QUEUE_SIZES.contains(&queue_size) {
            let (min, max) = (QUEUE_SIZES.start(), QUEUE_SIZES.end());
            return Err(err!("queue-size must be a power of 2 between {min} and {max}"));
        }
        let serial =
            if self.options.contains_key("serial") { self.text("serial") } else { SERIAL_DEFAULT };
        if serial.len() > SERIAL_MAX {
            return Err(err!("serial must be at most {SERIAL_MAX} bytes"));
        }
        let cores = crate::sys::processors();
        let threads = match self.number("threads") {
            Some(0) => return Err(err!("threads must be greater than 0")),
            Some(n) => usize::try_from(n).unwrap_or(usize::MAX),
            None => cores,
        };
        check_not_negative(&self.options, &["poll-max-ns"])?;
        // The schema has checked the words.
        let on_error = |name, write| OnError::parse(self.text(name), write).unwrap_or_default();
        Ok(ExportConfig {
            id: self.text("id").to_string(),
            writable: self.flag("writable"),
            writethrough: self.flag("writethrough"),
            num_queues,
            queue_size,
            logical_block_size: u32::try_from(block_size).expect("at most 2 MiB"),
            serial: serial.to_string(),
            threads: threads.min(usize::from(num_queues)),
            poll_max_ns: self.number("poll-max-ns").or(poll_max_ns).unwrap_or(POLL_MAX_NS_DEFAULT),
            on_error: OnErrors { read: on_error("rerror", false), write: on_error("werror", true) },
        })
    }

    /// Where front ends connect.
    fn endpoint(&self, defaults: Defaults) -> Result<(Endpoint, Option<Place>)> {
        let address = self.options.get("addr").and_then(Value::as_object);
        let text = |name: &str| {
            address.and_then(|a| a.get(name)).and_then(Value::as_str).unwrap_or_default()
        };
        let flag = |name: &str| address.and_then(|a| a.get(name)).and_then(Value::as_bool);
        match text("type") {
            "unix" if flag("abstract") == Some(true) => {
                let listener = listen::at_abstract(text("path"), flag("tight").unwrap_or(true))?;
                Ok((Endpoint::Listener(listener), None))
            }
            "unix" => {
                let (listener, place) = listen::at_path(text("path"), defaults.socket_mode)?;
                Ok((Endpoint::Listener(listener), Some(place)))
            }
            "fd" => Ok((Endpoint::Listener(listen::inherited(text("str"))?), None)),
            _ => Err(err!("Only socket address types 'unix' and 'fd' are supported")),
        }
    }
}

impl Exports {
    /// Makes an export whose socket listens, but has no name before [`Exports::publish`] and is not served before
    /// [`Exports::serve`].
    ///
    /// # Errors
    /// In QEMU's words and order.
    pub fn add(
        &mut self,
        (graph, dormant): (&Arc<Graph>, &Dormant),
        objects: &Objects,
        wanted: &Wanted,
        defaults: Defaults,
    ) -> Result<()> {
        self.add_at((graph, dormant), objects, wanted, |wanted| wanted.endpoint(defaults))
    }

    /// As [`Exports::add`], with the socket that `endpoint` makes.
    ///
    /// # Errors
    /// In QEMU's words and order.
    pub fn add_at(
        &mut self,
        (graph, dormant): (&Arc<Graph>, &Dormant),
        objects: &Objects,
        wanted: &Wanted,
        endpoint: impl FnOnce(&Wanted) -> Result<(Endpoint, Option<Place>)>,
    ) -> Result<()> {
        let id = wanted.text("id");
        if !id_is_well_formed(id) {
            return Err(err!("Invalid block export id"));
        }
        if self.list.iter().any(|running| running.id == id) {
            return Err(err!("Block export id '{id}' is already in use"));
        }
        let name = wanted.node();
        let asleep = dormant.find(name);
        let node = asleep.as_ref().map(|asleep| Arc::clone(&asleep.probe));
        let node = node.or_else(|| graph.find(name));
        let node = node.ok_or_else(|| err!("Cannot find device='' nor node-name='{name}'"))?;
        let read_only = asleep.as_ref().map_or(node.read_only(), |asleep| asleep.read_only);
        if wanted.flag("writable") && read_only {
            return Err(err!("Cannot export read-only node as writable"));
        }
        let poll_max_ns = match wanted.options.get("iothread").and_then(Value::as_str) {
            None => None,
            Some(thread) => Some(
                objects
                    .iothread_poll_max_ns(thread)
                    .ok_or_else(|| err!("iothread \"{thread}\" not found"))?,
            ),
        };
        let config = wanted.config(poll_max_ns)?;
        let export = match asleep {
            Some(asleep) => {
                let opener = Opener::new(graph, asleep.definitions, name);
                let auto = wanted.activates_by_itself();
                if !auto {
                    log::info!("export '{id}': inactive; only activate=auto would activate it");
                }
                Export::inactive(opener, &asleep.probe, config, auto)
            }
            None => Export::new(graph, &node, config)?,
        };
        match endpoint(wanted) {
            Ok((endpoint, place)) => {
                let endpoint = Some(endpoint);
                self.list.push(Running {
                    id: id.to_string(),
                    export,
                    endpoint,
                    server: None,
                    place,
                });
                Ok(())
            }
            Err(e) => {
                export.close();
                Err(e)
            }
        }
    }

    /// The sockets that are in the file system.
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.list.iter().filter_map(|running| running.place.as_ref())
    }

    /// Gives the sockets their names.
    ///
    /// # Errors
    /// If one cannot be moved there.
    pub fn publish(&mut self) -> Result<()> {
        self.list
            .iter_mut()
            .filter_map(|running| running.place.as_mut())
            .try_for_each(Place::publish)
    }

    /// Starts to serve all exports.
    ///
    /// # Errors
    /// If there are no threads or descriptors left.
    pub fn serve(&mut self) -> Result<()> {
        for running in &mut self.list {
            let Some(endpoint) = running.endpoint.take() else { continue };
            // The end of the only connection there will ever be is the end of the program.
            let on_finish: Box<dyn FnOnce() + Send> = match &endpoint {
                Endpoint::Listener(_) => Box::new(|| {}),
                Endpoint::Connected(_) => Box::new(crate::sys::stop_process),
            };
            let device = Arc::clone(&running.export);
            let server = Server::start(endpoint, device, running.id.clone(), on_finish)
                .map_err(|e| err!("Cannot serve export '{}': {e}", running.id))?;
            running.export.set_config_change(server.config_change());
            running.server = Some(server);
            log::info!("export '{}': ready", running.id);
        }
        Ok(())
    }

    /// Looks whether disks have become longer, and tells their guests.
    pub fn look_at_sizes(&self) {
        self.list.iter().for_each(|running| running.export.look_at_size());
    }

    /// Has all exports try again what failed and waits (`rerror=stop`, `werror=stop`).
    pub fn resume(&self) {
        self.list.iter().for_each(|running| running.export.resume());
    }

    /// Ends all connections, then all exports: requests in flight are finished and everything is flushed. The sockets
    /// stay where they are until the exports are dropped.
    ///
    /// All at the same time: a disk that hangs keeps no other from being flushed. Whether all were.
    pub fn stop(&mut self) -> bool {
        std::thread::scope(|scope| {
            let stopping: Vec<_> = self.list.iter_mut().map(|r| scope.spawn(|| r.stop())).collect();
            // All are joined before the answer is looked at.
            let flushed: Vec<bool> =
                stopping.into_iter().map(|t| t.join().unwrap_or(false)).collect();
            flushed.into_iter().all(|f| f)
        })
    }

    /// Removes the sockets, as far as they are ours, and forgets the exports.
    pub fn remove_sockets(&mut self) {
        self.list.drain(..).for_each(|running| drop(running.place));
    }
}
