//! From two scrapes to a table.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use super::sample::Samples;

/// What happened between two scrapes.
struct Change<'a> {
    before: &'a Samples,
    after: &'a Samples,
}

/// A line for each queue that has run, and what is known of it between `before` and `after`, `time` apart.
pub fn render(before: &Samples, after: &Samples, time: Duration) -> String {
    let change = Change { before, after };
    let mut text = format!(
        "{:<16} {:>3} {:>9} {:>9} {:>8} {:>8} {:>4} {:>6} {:>7} {:>7} {:>6} {:>5}\n",
        "EXPORT",
        "Q",
        "IOPS",
        "MB/s",
        "p50",
        "p99",
        "FLT",
        "POLL%",
        "KICK/IO",
        "CALL/IO",
        "CACHE%",
        "ERR"
    );
    let queues = after.all("queue_info");
    for (labels, _) in queues {
        let [export, queue, worker] =
            ["export", "queue", "worker"].map(|name| labels.get(name).map_or("", String::as_str));
        // Strings take everything.
        writeln!(text, "{}", change.queue(export, queue, worker, time)).unwrap_or_default();
    }
    if queues.is_empty() {
        text.push_str("(no queue has run)\n");
    }
    text
}

impl Change<'_> {
    /// By how much the sum of `name` has grown. A back end that was started anew has counted from 0.
    fn of(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let (before, after) = (self.before.sum(name, labels), self.after.sum(name, labels));
        if after >= before { after - before } else { after }
    }

    fn queue(&self, export: &str, queue: &str, worker: &str, time: Duration) -> String {
        let at = [("export", export), ("queue", queue)];
        let ios = self.of("requests_total", &at);
        let bytes = self.of("request_bytes_total", &at);
        let seconds = time.as_secs_f64().max(1e-9);
        let [p50, p99] = self.quantiles(&at, [0.5, 0.99]).map(|q| q.map_or("-".into(), duration));
        let thread = [("export", export), ("worker", worker)];
        let hits = self.of("worker_poll_hits_total", &thread);
        let waits = hits + self.of("worker_poll_misses_total", &thread);
        format!(
            "{:<16} {queue:>3} {:>9.0} {:>9.1} {p50:>8} {p99:>8} {:>4} {:>6} {:>7} {:>7} {:>6} {:>5}",
            printable(export),
            ios / seconds,
            bytes / 1e6 / seconds,
            self.after.sum("in_flight_requests", &at),
            ratio(100.0 * hits, waits, 1),
            ratio(self.of("kicks_total", &at), ios, 3),
            ratio(self.of("notifications_total", &at), ios, 3),
            self.cached(export),
            self.of("request_errors_total", &at),
        )
    }

    /// Of the export's reads and writes the part, in percent, for which no table was read.
    fn cached(&self, export: &str) -> String {
        let info = self.after.of("export_info", &[("export", export)]).next().cloned();
        let root = info.and_then(|(mut labels, _)| labels.remove("node")).unwrap_or_default();
        let node = [("node", root.as_str())];
        if self.after.of("node_l2_cache_misses_total", &node).next().is_none() {
            return "-".into();
        }
        let ios: f64 = ["read", "write"]
            .iter()
            .map(|op| self.of("requests_total", &[("export", export), ("op", op)]))
            .fold(0.0, |sum, n| sum + n);
        let missed = self.of("node_l2_cache_misses_total", &node)
            + self.of("node_refcount_cache_misses_total", &node);
        ratio(100.0 * (ios - missed).max(0.0), ios, 1)
    }

    /// Of the reads, writes and flushes together, in seconds; within a bucket in equal parts.
    fn quantiles<const N: usize>(&self, at: &[(&str, &str)], wanted: [f64; N]) -> [Option<f64>; N] {
        const NAME: &str = "request_latency_seconds_bucket";
        let mut buckets: BTreeMap<u64, (f64, f64)> = BTreeMap::new();
        for (sign, samples) in [(1.0, self.after), (-1.0, self.before)] {
            for (labels, count) in samples.of(NAME, at) {
                let bound: f64 =
                    labels.get("le").and_then(|le| le.parse().ok()).unwrap_or(f64::INFINITY);
                // Bounds are positive: their bits are ordered as they are.
                buckets.entry(bound.to_bits()).or_insert((bound, 0.0)).1 += sign * count;
            }
        }
        let buckets: Vec<_> = buckets.into_values().collect();
        let all = buckets.last().map_or(0.0, |(_, count)| *count);
        wanted.map(|q| {
            let rank = q * all;
            let i = buckets.iter().position(|(_, count)| *count >= rank).filter(|_| all > 0.0)?;
            let (from, below) = if i == 0 { (0.0, 0.0) } else { buckets[i - 1] };
            let (to, upto) = buckets[i];
            match to.is_finite() {
                true => {
                    Some(from + (to - from) * ((rank - below) / (upto - below)).clamp(0.0, 1.0))
                }
                false => Some(from),
            }
        })
    }
}

/// `part` of `all`, `-` of nothing.
fn ratio(part: f64, all: f64, digits: usize) -> String {
    if all > 0.0 { format!("{:.digits$}", part / all) } else { "-".into() }
}

/// Three digits or so.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1e-6 => format!("{:.0}ns", s * 1e9),
        s if s < 1e-3 => format!("{:.1}us", s * 1e6),
        s if s < 1.0 => format!("{:.1}ms", s * 1e3),
        s => format!("{s:.1}s"),
    }
}

/// A name cannot move the cursor.
fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrape(reads: u32, slow: u32) -> Samples {
        let q = "export=\"e\",queue=\"0\"";
        let bucket = |le: &str, n: u32| {
            format!(
                "vhost_user_blk_request_latency_seconds_bucket{{{q},op=\"read\",le=\"{le}\"}} {n}\n"
            )
        };
        let text = format!(
            "vhost_user_blk_export_info{{export=\"e\",node=\"n\"}} 1\n\
             vhost_user_blk_queue_info{{{q},worker=\"0\"}} 1\n\
             vhost_user_blk_requests_total{{{q},op=\"read\"}} {reads}\n\
             vhost_user_blk_request_bytes_total{{{q},op=\"read\"}} {}\n\
             vhost_user_blk_node_l2_cache_misses_total{{node=\"n\",driver=\"qcow2\"}} {slow}\n\
             vhost_user_blk_kicks_total{{{q}}} {}\n{}{}{}# EOF\n",
            reads * 4096,
            reads / 4,
            bucket("0.000001", reads - slow),
            bucket("0.000002", reads),
            bucket("+Inf", reads),
        );
        Samples::parse(&text).unwrap()
    }

    #[test]
    fn a_line_says_what_happened_in_between() {
        let text = render(&scrape(1000, 0), &scrape(3000, 200), Duration::from_secs(2));
        let line: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(
            line,
            ["e", "0", "1000", "4.1", "556ns", "1.9us", "0", "-", "0.250", "0.000", "90.0", "0"]
        );
    }

    #[test]
    fn nothing_happened() {
        let text = render(&scrape(8, 0), &scrape(8, 0), Duration::from_secs(1));
        let line: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(line, ["e", "0", "0", "0.0", "-", "-", "0", "-", "-", "-", "-", "0"]);
    }
}
