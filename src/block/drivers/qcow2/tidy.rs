//! `cache-clean-interval`: memory of cached L2 tables that nobody uses goes back to the machine.
//!
//! Every interval, what was not used since the last time is dropped; so it is gone after two intervals at the latest. (Dirty tables
//! stay; they are written back in seconds.) Refcount blocks are few, and stay. It has a date of its own at the graph's upkeep,
//! beside the image's, and never happens in a simulation.
#![forbid(unsafe_code)]

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::Image;
use crate::block::IoFuture;
use crate::block::upkeep::{Tend, Upkeep};

/// Tidies an image's cache as long as both are there.
pub struct Tidy {
    me: Weak<Tidy>,
    image: Weak<Image>,
    upkeep: Arc<Upkeep>,
    every: Duration,
}

impl Tidy {
    /// Starts with the image's interval; `None`: never.
    pub fn start(image: &Arc<Image>, upkeep: &Arc<Upkeep>) -> Option<Arc<Tidy>> {
        let every = Duration::from_secs(image.choices.clean_interval);
        if every.is_zero() {
            return None;
        }
        let (image, upkeep) = (Arc::downgrade(image), Arc::clone(upkeep));
        let tidy = Arc::new_cyclic(|me| Tidy { me: me.clone(), image, upkeep, every });
        tidy.later();
        Some(tidy)
    }

    fn later(&self) {
        self.upkeep.at(Instant::now() + self.every, self.me.clone());
    }
}

impl Tend for Tidy {
    fn tend(&self) -> IoFuture<'_> {
        Box::pin(async {
            if let Some(image) = self.image.upgrade() {
                image.cache.clean();
                self.later();
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::block::perm::Perms;
    use crate::block::{Graph, Node, Op, RootUser};
    use crate::mem::Sg;
    use crate::rt::{self, Buffer};

    const LIMIT: Duration = Duration::from_secs(60);

    fn used(node: &Node) -> u64 {
        node.driver().options_in_force()["l2-cache-used"].as_u64().unwrap()
    }

    /// A new image in `dir`, opened with this interval.
    fn open(graph: &Arc<Graph>, dir: &TempDir, interval: u64, read_only: bool) -> RootUser {
        let name = format!("n{interval}{read_only}");
        let path = dir.path().join(&name);
        let made = "qemu-img create -q -f qcow2 $0 10M && qemu-io -c 'write -P 7 1M 64k' $0";
        let made = Command::new("sh").args(["-c", made]).arg(&path).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let options = json!({
            "driver": "qcow2", "node-name": name, "read-only": read_only,
            "cache-clean-interval": interval, "file": { "driver": "file", "filename": path },
        });
        let node = graph.add(serde_json::from_value(options).unwrap()).unwrap();
        graph.attach_root(&node, "the test", Perms::device(!read_only)).unwrap()
    }

    /// Reads where the image has data: a slice is cached then.
    fn read(node: &Node) {
        let buffer = Buffer::new(4096, 4096);
        let iov = [buffer.iovec()];
        rt::block_on(node.submit(Op::Read { offset: 1 << 20, to: Sg::new(&iov) })).unwrap();
        assert_eq!(buffer.bytes(), [7; 4096]);
        assert_eq!(used(node), 4096);
    }

    #[test]
    fn unused_tables_go_away_and_come_back() {
        let (graph, dir) = (Graph::new(), tempfile::tempdir().unwrap());
        let never = open(&graph, &dir, 0, true);
        read(never.node());
        let users = [true, false].map(|read_only| open(&graph, &dir, 1, read_only));
        // More than once: it goes on.
        for _ in 0..2 {
            users.iter().for_each(|user| read(user.node()));
            let start = Instant::now();
            while users.iter().any(|user| used(user.node()) > 0) {
                assert!(start.elapsed() < LIMIT);
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        assert_eq!(used(never.node()), 4096);
        users.into_iter().chain([never]).for_each(|user| graph.detach(user));
        assert!(graph.close_all());
    }
}
