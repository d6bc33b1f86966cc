//! OpenMetrics text, version 1.0: what a scraper gets.
#![forbid(unsafe_code)]

use std::fmt::{Display, Write};

use super::counter::Counter;
use super::histogram::{BOUNDS, Histogram, bound};
use super::meter::{ExportMeter, KINDS, LATENCIES, NodeMeter, QueueMeter, WorkerMeter};
use super::registry::Registry;

/// In front of every name.
const PREFIX: &str = "vhost_user_blk_";

/// The kinds of metrics.
#[derive(Clone, Copy)]
enum Type {
    Counter,
    Gauge,
    Histogram,
    Info,
}

/// A metric family's head, and its samples so far.
struct Text(String);

impl Text {
    /// Begins a family. The unit, if there is one, is the end of the name.
    fn family(&mut self, name: &str, kind: Type, unit: Option<&str>, help: &str) {
        let word = match kind {
            Type::Counter => "counter",
            Type::Gauge => "gauge",
            Type::Histogram => "histogram",
            Type::Info => "info",
        };
        self.line(format_args!("# TYPE {PREFIX}{name} {word}"));
        if let Some(unit) = unit {
            self.line(format_args!("# UNIT {PREFIX}{name} {unit}"));
        }
        self.line(format_args!("# HELP {PREFIX}{name} {help}"));
    }

    /// One sample; `labels` as they stand in the text.
    fn sample(&mut self, name: &str, labels: &str, value: impl Display) {
        self.line(format_args!("{PREFIX}{name}{{{labels}}} {value}"));
    }

    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        // Strings take everything.
        self.0.write_fmt(text).unwrap_or_default();
        self.0.push('\n');
    }
}

/// A label's value: backslash, quotation mark and line feed are escaped.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Everything that `registry` shows, now.
pub fn render(registry: &Registry) -> String {
    let (exports, nodes) = (registry.exports(), registry.nodes());
    let mut text = Text(String::with_capacity(16 << 10));
    text.family("build", Type::Info, None, "The program.");
    text.sample("build_info", concat!("version=\"", env!("CARGO_PKG_VERSION"), "\""), 1);
    let queues: Vec<_> = exports.iter().flat_map(|export| of_queues(export)).collect();
    exports_and_queues(&mut text, &exports);
    requests(&mut text, &queues);
    latency(&mut text, &queues);
    rings(&mut text, &queues);
    let workers: Vec<_> = exports.iter().flat_map(|export| of_workers(export)).collect();
    let polls: [Family<WorkerMeter>; 2] = [
        ("worker_poll_hits", "Times that something came while the worker looked for it.", |w| {
            &w.poll_hits
        }),
        (
            "worker_poll_misses",
            "Times that the worker went to sleep, having looked in vain (or not: an idle disk).",
            |w| &w.poll_misses,
        ),
    ];
    counters(&mut text, &workers, &polls);
    caches(&mut text, &nodes);
    text.0.push_str("# EOF\n");
    text.0
}

/// A counter's name, its description and its place.
type Family<T> = (&'static str, &'static str, fn(&T) -> &Counter);

fn counters<T>(text: &mut Text, all: &[(String, &T)], families: &[Family<T>]) {
    for (name, help, get) in families {
        text.family(name, Type::Counter, None, help);
        for (labels, meter) in all {
            text.sample(&format!("{name}_total"), labels, get(meter).get());
        }
    }
}

fn of_queues(export: &ExportMeter) -> Vec<(String, &QueueMeter)> {
    let id = escape(&export.id);
    export.queues().map(|(i, _, q)| (format!("export=\"{id}\",queue=\"{i}\""), q)).collect()
}

fn of_workers(export: &ExportMeter) -> Vec<(String, &WorkerMeter)> {
    let id = escape(&export.id);
    export.workers().map(|(i, w)| (format!("export=\"{id}\",worker=\"{i}\""), w)).collect()
}

fn exports_and_queues(text: &mut Text, exports: &[std::sync::Arc<ExportMeter>]) {
    text.family("export", Type::Info, None, "Exports, and the nodes that they offer.");
    for export in exports {
        let (id, node) = (escape(&export.id), escape(&export.node));
        text.sample("export_info", &format!("export=\"{id}\",node=\"{node}\""), 1);
    }
    text.family("queue", Type::Info, None, "Queues that have run, and who serves them.");
    for export in exports {
        let id = escape(&export.id);
        for (i, worker, _) in export.queues() {
            let labels = format!("export=\"{id}\",queue=\"{i}\",worker=\"{worker}\"");
            text.sample("queue_info", &labels, 1);
        }
    }
}

/// What is counted for each kind of request.
fn requests(text: &mut Text, queues: &[(String, &QueueMeter)]) {
    type ByKind = fn(&QueueMeter) -> &[Counter; KINDS.len()];
    let families: [(&str, Option<&str>, &str, ByKind); 3] = [
        ("requests", None, "Requests answered.", |q| &q.requests),
        ("request_errors", None, "Requests answered with an error.", |q| &q.errors),
        (
            "request_bytes",
            Some("bytes"),
            "Bytes read, written, discarded or zeroed by requests that succeeded.",
            |q| &q.bytes,
        ),
    ];
    for (name, unit, help, get) in families {
        text.family(name, Type::Counter, unit, help);
        for (labels, q) in queues {
            for (kind, counter) in KINDS.iter().zip(get(q)) {
                let labels = format!("{labels},op=\"{kind}\"");
                text.sample(&format!("{name}_total"), &labels, counter.get());
            }
        }
    }
}

/// Of kinds that have occurred only: most queues never see a flush, and a histogram is long.
fn latency(text: &mut Text, queues: &[(String, &QueueMeter)]) {
    text.family(
        "request_latency_seconds",
        Type::Histogram,
        Some("seconds"),
        "From the turn of the worker's loop that took a request to the turn that answered it.",
    );
    for (labels, q) in queues {
        for (kind, histogram) in KINDS[..LATENCIES].iter().zip(&q.latency) {
            one_histogram(text, &format!("{labels},op=\"{kind}\""), histogram);
        }
    }
}

fn one_histogram(text: &mut Text, labels: &str, histogram: &Histogram) {
    let (buckets, sum) = histogram.read();
    let count: u64 = buckets.iter().sum();
    if count == 0 {
        return;
    }
    let mut below = 0;
    for (i, n) in buckets[..BOUNDS].iter().enumerate() {
        below += n;
        let labels = format!("{labels},le=\"{}\"", seconds(bound(i)));
        text.sample("request_latency_seconds_bucket", &labels, below);
    }
    let all = format!("{labels},le=\"+Inf\"");
    text.sample("request_latency_seconds_bucket", &all, count);
    text.sample("request_latency_seconds_count", labels, count);
    text.sample("request_latency_seconds_sum", labels, seconds(sum));
}

#[expect(clippy::cast_precision_loss, reason = "a double's 53 bits are months of nanoseconds")]
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// What is counted for each queue.
fn rings(text: &mut Text, queues: &[(String, &QueueMeter)]) {
    text.family(
        "in_flight_requests",
        Type::Gauge,
        None,
        "Requests taken and not answered, when the worker's last turn ended.",
    );
    for (labels, q) in queues {
        text.sample("in_flight_requests", labels, q.in_flight.get());
    }
    let families: [Family<QueueMeter>; 4] = [
        ("kicks", "Times that a guest's kick was noticed.", |q| &q.kicks),
        ("notifications", "Notifications sent to the guest.", |q| &q.calls),
        (
            "notifications_suppressed",
            "Batches of answers of which the guest did not want to be notified.",
            |q| &q.suppressed,
        ),
        (
            "slow_lane_tasks",
            "Tasks begun for what the fast lane could not serve: flushes, discards, allocating writes, cache misses, retries.",
            |q| &q.slow,
        ),
    ];
    counters(text, queues, &families);
}

/// What is counted for each node that keeps tables in memory.
fn caches(text: &mut Text, nodes: &[std::sync::Arc<NodeMeter>]) {
    type Get = fn(&NodeMeter) -> u64;
    let families: [(&str, Type, &str, Get); 6] = [
        (
            "node_l2_cache_hits",
            Type::Counter,
            "Look-ups for reads of the slow lane that found the L2 slice in memory; a request of the fast lane is a hit that is not counted here.",
            |n| n.l2_hits.get(),
        ),
        (
            "node_l2_cache_misses",
            Type::Counter,
            "Look-ups that read the L2 slice from the image.",
            |n| n.l2_misses.get(),
        ),
        (
            "node_refcount_cache_hits",
            Type::Counter,
            "Allocations that found their refcount blocks in memory.",
            |n| n.refcount_hits.get(),
        ),
        (
            "node_refcount_cache_misses",
            Type::Counter,
            "Refcount blocks read from the image.",
            |n| n.refcount_misses.get(),
        ),
        (
            "node_journal_records",
            Type::Gauge,
            "Changes of entries in the journal that no flush has written yet.",
            |n| n.journal.get(),
        ),
        (
            "node_journal_capacity_records",
            Type::Gauge,
            "Changes that the journal has room for; 0: there is no journal.",
            |n| n.journal_room.get(),
        ),
    ];
    for (name, kind, help, get) in families {
        text.family(name, kind, None, help);
        let suffix = if matches!(kind, Type::Counter) { "_total" } else { "" };
        for node in nodes {
            let labels = format!("node=\"{}\",driver=\"{}\"", escape(&node.node), node.driver);
            text.sample(&format!("{name}{suffix}"), &labels, get(node));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn names_labels_and_histograms() {
        let registry = Registry::default();
        let export = Arc::new(ExportMeter::new("a\"b\\c\nd", "root", 4, 4));
        registry.add_export(&export);
        let q = export.queue(1);
        q.requests[0].add(3);
        q.latency[0].record(300, 2);
        q.latency[0].record(1 << 40, 1);
        let text = render(&registry);
        let id = "export=\"a\\\"b\\\\c\\nd\",queue=\"1\"";
        for line in [
            format!("vhost_user_blk_requests_total{{{id},op=\"read\"}} 3\n"),
            format!(
                "vhost_user_blk_request_latency_seconds_bucket{{{id},op=\"read\",le=\"0.000000256\"}} 0\n"
            ),
            format!(
                "vhost_user_blk_request_latency_seconds_bucket{{{id},op=\"read\",le=\"0.000000384\"}} 2\n"
            ),
            format!(
                "vhost_user_blk_request_latency_seconds_bucket{{{id},op=\"read\",le=\"+Inf\"}} 3\n"
            ),
            format!(
                "vhost_user_blk_request_latency_seconds_sum{{{id},op=\"read\"}} 1099.511628376\n"
            ),
        ] {
            assert!(text.contains(&line), "{line}in {text}");
        }
        assert!(!text.contains(
            "latency_seconds_bucket{export=\"a\\\"b\\\\c\\nd\",queue=\"1\",op=\"flush\""
        ));
        assert!(text.ends_with("\n# EOF\n"));
    }
}
