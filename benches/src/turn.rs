//! A worker's turn on a null-co disk: from requests in the ring to their used elements and the notification. It waits in
//! epoll, so that the same is measured wherever it is measured; null-co needs no waiting.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use serde_json::{Value, json};
use vhost_user_blk::block::Graph;
use vhost_user_blk::export::{Export, ExportConfig, HandTurned};
use vhost_user_blk::rt::WaitKind;
use vhost_user_blk::vhost_user::{Device, QueueSetup};

use crate::Case;
use crate::guest::{Guest, Kind};

pub struct Turn {
    guest: Guest,
    batch: u16,
    #[expect(dead_code, reason = "nobody kicks: the worker does not sleep")]
    kick: UnixDatagram,
    /// The notification of the last run.
    call: UnixDatagram,
    /// Before its export: its queue uses the disk.
    worker: HandTurned,
    #[expect(dead_code, reason = "alive as long as its queue")]
    export: Arc<Export>,
}

/// A notification's way: our end, and the worker's. It writes eight bytes there, to an event descriptor or this.
fn way() -> (UnixDatagram, Option<OwnedFd>) {
    let (ours, theirs) = UnixDatagram::pair().expect("a pair of sockets");
    ours.set_nonblocking(true).expect("a socket");
    (ours, Some(theirs.into()))
}

impl Turn {
    pub fn new(kind: Kind, batch: u16) -> Turn {
        let node = json!({ "driver": "null-co", "node-name": "n", "size": 1 << 30 });
        let Value::Object(options) = node else { unreachable!("an object") };
        let graph = Graph::new();
        let node = graph.add(options).expect("a node");
        let config = ExportConfig {
            id: "e".into(),
            writable: true,
            writethrough: false,
            num_queues: 1,
            queue_size: 256,
            logical_block_size: 512,
            serial: String::new(),
            threads: 1,
            poll_max_ns: 0,
            on_error: Default::default(),
        };
        let export = Export::new(&graph, &node, config).expect("an export");
        let guest = Guest::new(kind, batch);
        let ((kick, kicked), (call, caller)) = (way(), way());
        let addrs = guest.addrs();
        export.set_features(guest.features());
        let setup = QueueSetup {
            map: guest.map(),
            size: guest.size(),
            desc: addrs.desc,
            avail: addrs.avail,
            used: addrs.used,
            base: guest.base(),
            inflight: None,
            log: None,
            features: guest.features(),
            kick: kicked,
            call: caller,
            err: None,
        };
        let worker = HandTurned::new(&export, WaitKind::Epoll, setup).expect("a worker");
        Turn { guest, batch, kick, call, worker, export }
    }
}

impl Case for Turn {
    fn ops(&self) -> u32 {
        self.batch.into()
    }

    fn prepare(&mut self) {
        assert!(self.guest.is_answered());
        let notified = self.call.recv(&mut [0; 8]).is_ok_and(|n| n == 8);
        assert!(notified || self.guest.is_fresh(), "the guest was not notified");
        self.guest.offer();
    }

    fn run(&mut self) {
        self.worker.turn();
    }
}
