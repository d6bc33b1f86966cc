//! A real Prometheus scrapes a back end while a guest works, and knows what was sent. `contrib/prometheus` fetches it.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use vub_client::Client;

use crate::common::{LIMIT, MIB, small};
use crate::place::{Place, wait_for};

struct Prometheus(Child, u16);

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended.
        self.0.kill().unwrap_or_default();
        self.0.wait().unwrap();
    }
}

/// A port that was free a moment ago.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Prometheus {
    /// The answer to a query of its API; none as long as it is not up.
    fn get(&self, path: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.1)).ok()?;
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        write!(stream, "GET /api/v1/{path} HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    }

    /// The value of an expression with one result.
    fn value(&self, query: &str) -> Option<f64> {
        let answer = self.get(&format!("query?query={query}"))?;
        answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
    }
}

#[test]
#[ignore = "needs Debian's prometheus: contrib/prometheus fetches it and runs this"]
fn a_real_prometheus_knows_what_was_sent() {
    let program = PathBuf::from(std::env::var_os("PROMETHEUS").expect("its program"));
    let (ours, its) = (port(), port());
    let address = format!("--metrics=127.0.0.1:{ours}");
    let dir = Place::dir();
    let config = format!(
        "global: {{ scrape_interval: 200ms, scrape_timeout: 200ms }}\n\
         scrape_configs: [ {{ job_name: vub, static_configs: [ {{ targets: ['127.0.0.1:{ours}'] }} ] }} ]\n"
    );
    fs::write(dir.path().join("prometheus.yml"), config).unwrap();
    let node = format!("--blockdev=driver=null-co,node-name=n,read-zeroes=on,size={MIB}");
    let export =
        "--export=vhost-user-blk,id=disk0,node-name=n,writable=on,addr.type=unix,addr.path=s";
    let place = Place::start(dir, &["--log-level=warn", &address, &node, export]);
    let child = Command::new(program)
        .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data"])
        .arg(format!("--web.listen-address=127.0.0.1:{its}"))
        .current_dir(place.dir.path())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let prometheus = Prometheus(child, its);
    let mut client = Client::connect_retry(place.path("s"), small()).unwrap();
    for _ in 0..37 {
        client.queue(0).write(0, &[1; 4096]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    client.queue(0).flush().unwrap();
    let selector = "%7Bexport%3D%22disk0%22,op%3D%22write%22%7D";
    let of = |name: &str| prometheus.value(&format!("vhost_user_blk_{name}{selector}"));
    wait_for("37 writes", || (of("requests_total") == Some(37.0)).then_some(()));
    wait_for("their bytes", || (of("request_bytes_total") == Some(37.0 * 4096.0)).then_some(()));
    wait_for("their latency", || {
        let quantile = "histogram_quantile(0.99,vhost_user_blk_request_latency_seconds_bucket";
        let p99 = prometheus.value(&format!("{quantile}{selector})"))?;
        (1e-7..60.0).contains(&p99).then_some(())
    });
    let metadata =
        prometheus.get("metadata?metric=vhost_user_blk_request_latency_seconds").unwrap();
    let known = &metadata["data"]["vhost_user_blk_request_latency_seconds"][0];
    assert_eq!(
        (known["type"].as_str(), known["unit"].as_str()),
        (Some("histogram"), Some("seconds"))
    );
    let targets = prometheus.get("targets").unwrap();
    assert_eq!(targets["data"]["activeTargets"][0]["health"], "up", "{targets}");
    drop((client, prometheus));
    place.stop();
}
