//! An image on simulated disks, opened and closed.

use std::sync::Arc;

use serde_json::{Value, json};
use vhost_user_blk::block::drivers::qcow2::QCOW2;
use vhost_user_blk::block::drivers::qcow2::check::{self, Fix, Report, Watch};
use vhost_user_blk::block::drivers::raw::RAW;
use vhost_user_blk::block::perm::{Perm, Perms};
use vhost_user_blk::block::{Graph, Node, RootUser};
use vhost_user_blk::error::{Errno, Result};
use vhost_user_blk::sim::harness::Drivers;
use vhost_user_blk::sim::{DiskSpec, FlushFailure, Pages, SIM_DISK, Sim};

use super::image::Made;

/// More requests than this to the image file are work without an end: a run needs some hundreds.
pub const REQUESTS_MAX: u64 = 100_000;
/// The longest that the image file can get, in bytes, unless it is to be full: what it is filled up to costs nothing.
const CAPACITY: u64 = 1 << 44;

/// The disks with an image on them.
pub struct Bed {
    pub sim: Sim,
    has_data: bool,
    has_backing: bool,
}

impl Bed {
    /// `capacity`: how long the image file can get.
    pub fn new(seed: u64, m: &Made, capacity: Option<u64>) -> Bed {
        let sim = Sim::new(seed);
        let mut spec = DiskSpec::file("image", image_of(m));
        spec.options.capacity = capacity.unwrap_or(CAPACITY);
        spec.options.flush_failure = FlushFailure::Retry;
        sim.add_disk(spec);
        sim.add_disk(DiskSpec::file("data", Pages::from_bytes(&m.data)));
        sim.add_disk(DiskSpec::file("backing", Pages::from_bytes(&m.backing)));
        Bed { sim, has_data: m.shape.data_file, has_backing: m.shape.backing.is_some() }
    }

    /// Opens the image; `more`: options of the node.
    pub fn open(&self, writable: bool, more: Value) -> Result<Opened> {
        let graph = graph();
        let mut options = json!({
            "driver": "qcow2", "node-name": "image", "read-only": !writable, "discard": "unmap",
            "file": disk("image"),
        });
        if self.has_data {
            options["data-file"] = disk("data");
        }
        if self.has_backing {
            options["backing"] = disk("backing");
        }
        let (Value::Object(mut options), Value::Object(mut more)) = (options, more) else {
            unreachable!("options are objects")
        };
        options.append(&mut more);
        let node = graph.add(options)?;
        let mut perms = Perms::device(writable);
        if writable {
            perms.used |= Perm::RESIZE;
        }
        let user = graph.attach_root(&node, "the guest", perms)?;
        Ok(Opened { user, graph })
    }

    /// Opens the image file alone and checks it, with the images's own check.
    pub fn check(&self, fix: Fix) -> Result<(Report, Told)> {
        let graph = graph();
        let mut options = disk("image");
        options["node-name"] = json!("file");
        let Value::Object(options) = options else { unreachable!("options are an object") };
        let node = graph.add(options)?;
        let user = graph.attach_root(&node, "a check", Perms::device(true))?;
        let mut told = Told::default();
        let report = self.run(async {
            let header = check::read_header(&node).await?;
            let report = check::check(&node, &header, fix, &mut told).await;
            report.map_err(|e| vhost_user_blk::error::Error::from_errno("check", e))
        });
        drop(node);
        graph.close_all();
        graph.detach(user);
        Ok((report?, told))
    }

    /// Drives something to its end.
    ///
    /// # Panics
    /// If there is no end.
    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.sim.run(future).unwrap_or_else(|stuck| panic!("{stuck}"))
    }

    /// # Panics
    /// If there were too many requests.
    pub fn assert_bounded(&self) {
        let requests: u64 = self.sim.counts("image").iter().sum();
        assert!(requests < REQUESTS_MAX, "{requests} requests to the image file");
    }
}

/// The image file.
pub fn image_of(m: &Made) -> Pages {
    let mut pages = Pages::from_bytes(&m.file);
    pages.set_len(m.len.max(m.file.len() as u64));
    pages
}

/// The first things that a check said.
#[derive(Debug, Default)]
pub struct Told(Vec<String>);

impl Watch for Told {
    fn line(&mut self, text: &str) {
        if self.0.len() < 20 {
            self.0.push(text.to_owned());
        }
    }
}

fn graph() -> Arc<Graph> {
    static DRIVERS: Drivers = &[&QCOW2, &RAW, &SIM_DISK];
    Graph::with_drivers(DRIVERS)
}

fn disk(name: &str) -> Value {
    json!({ "driver": "sim-disk", "disk": name, "discard": "unmap" })
}

/// An open image.
pub struct Opened {
    user: RootUser,
    pub graph: Arc<Graph>,
}

impl Opened {
    pub fn node(&self) -> Arc<Node> {
        Arc::clone(self.user.node())
    }

    /// The orderly end. Whether it succeeded.
    pub fn close(self) -> bool {
        let closed = self.graph.close_all();
        self.graph.detach(self.user);
        closed
    }
}

/// Whether a request may fail like this.
pub fn is_expected(e: Errno) -> bool {
    [Errno::EIO, Errno::EINVAL, Errno::ENOSPC, Errno::ENOTSUP, Errno(libc::EFBIG)].contains(&e)
}
