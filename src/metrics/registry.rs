//! Everything that counts in one graph.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::meter::{ExportMeter, NodeMeter};

/// The meters of a graph's nodes and exports. It keeps none of them alive.
#[derive(Debug, Default)]
pub struct Registry(Mutex<Lists>);

#[derive(Debug, Default)]
struct Lists {
    exports: Vec<Weak<ExportMeter>>,
    nodes: Vec<Weak<NodeMeter>>,
}

impl Registry {
    /// Shows `export` as long as it lives.
    pub fn add_export(&self, export: &Arc<ExportMeter>) {
        self.with(|lists| add(&mut lists.exports, export));
    }

    /// Shows `node` as long as it lives.
    pub fn add_node(&self, node: &Arc<NodeMeter>) {
        self.with(|lists| add(&mut lists.nodes, node));
    }

    /// The exports that there are, in the order in which they were made.
    pub fn exports(&self) -> Vec<Arc<ExportMeter>> {
        self.with(|lists| lists.exports.iter().filter_map(Weak::upgrade).collect())
    }

    /// The nodes, likewise. Of two with one name, of which one is about to go, the later.
    pub fn nodes(&self) -> Vec<Arc<NodeMeter>> {
        let mut nodes: Vec<Arc<NodeMeter>> =
            self.with(|lists| lists.nodes.iter().filter_map(Weak::upgrade).collect());
        for i in (0..nodes.len()).rev() {
            if nodes[i + 1..].iter().any(|later| later.node == nodes[i].node) {
                nodes.remove(i);
            }
        }
        nodes
    }

    fn with<T>(&self, f: impl FnOnce(&mut Lists) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn add<T>(list: &mut Vec<Weak<T>>, one: &Arc<T>) {
    list.retain(|there| there.strong_count() > 0);
    list.push(Arc::downgrade(one));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_kept_alive_or_shown_twice() {
        let registry = Registry::default();
        let (old, new) = (NodeMeter::new("n", "qcow2"), NodeMeter::new("n", "qcow2"));
        registry.add_node(&old);
        registry.add_node(&new);
        new.l2_hits.count();
        assert_eq!(registry.nodes().iter().map(|n| n.l2_hits.get()).collect::<Vec<_>>(), [1]);
        drop((old, new));
        assert!(registry.nodes().is_empty());
    }
}
