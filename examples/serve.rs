//! temporary
use std::sync::Arc;
use vhost_user_blk::block::Graph;
use vhost_user_blk::export::{Export, ExportConfig};
use vhost_user_blk::vhost_user::{server::Server, Device};
fn main() {
    env_logger::init();
    let a: Vec<String> = std::env::args().collect();
    let graph = Graph::new();
    let mut node = None;
    for j in &a[2..] {
        let v: serde_json::Value = serde_json::from_str(j).unwrap();
        node = Some(graph.add(v.as_object().unwrap().clone()).map_err(|e| e.to_string()).unwrap());
    }
    let e = Export::new(&graph, &node.unwrap(), ExportConfig { id: "e".into(), writable: true, writethrough: false, num_queues: 4, queue_size: 256, logical_block_size: 512, serial: "x".into(), threads: 2, poll_max_ns: 32768 }).unwrap();
    let _ = std::fs::remove_file(&a[1]);
    let l = std::os::unix::net::UnixListener::bind(&a[1]).unwrap();
    let d: Arc<dyn Device> = e.clone();
    let _s = Server::start(vhost_user_blk::vhost_user::server::Endpoint::Listener(l), d, "e".into(), Box::new(|| {})).unwrap();
    loop { std::thread::park(); }
}
