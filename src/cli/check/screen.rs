//! What `check` shows: the report as text and as JSON, findings, the progress bar.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::block::drivers::qcow2::check::{Report, Watch};
use crate::cli::help::PROGRAM;

/// The report as `qemu-img` prints it.
pub(super) fn as_text(report: &Report) -> String {
    let mut text = String::new();
    if report.is_clean() {
        text += "No errors were found on the image.\n";
    }
    let findings = [
        (
            report.corruptions,
            "errors were found on the image.\nData may be corrupted, or further writes to the image \
             may corrupt it.",
        ),
        (
            report.leaks,
            "leaked clusters were found on the image.\nThis means waste of disk space, but no harm \
             to data.",
        ),
        (report.check_errors, "internal errors have occurred during the check."),
    ];
    for (count, what) in findings.iter().filter(|(count, _)| *count > 0) {
        text += &format!("\n{count} {what}\n");
    }
    if report.total_clusters != 0 && report.allocated_clusters != 0 {
        let percent = |part: u64, of: u64| part as f64 * 100.0 / of as f64;
        let (allocated, total) = (report.allocated_clusters, report.total_clusters);
        text += &format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated)
        );
    }
    if report.image_end_offset > 0 {
        text += &format!("Image end offset: {}\n", report.image_end_offset);
    }
    text
}

/// The fields in the order in which QEMU's hash table has them. Those that are 0 are left out, but for one.
pub(super) fn as_json(name: &str, report: &Report) -> String {
    let fields: [(&str, Value); 12] = [
        ("image-end-offset", report.image_end_offset.into()),
        ("compressed-clusters", report.compressed_clusters.into()),
        ("total-clusters", report.total_clusters.into()),
        ("corruptions", report.corruptions.into()),
        ("corruptions-fixed", report.corruptions_fixed.into()),
        ("check-errors", report.check_errors.into()),
        ("leaks", report.leaks.into()),
        ("leaks-fixed", report.leaks_fixed.into()),
        ("allocated-clusters", report.allocated_clusters.into()),
        ("filename", name.into()),
        ("format", "qcow2".into()),
        ("fragmented-clusters", report.fragmented_clusters.into()),
    ];
    let lines: Vec<String> = fields
        .iter()
        .filter(|(key, value)| value.as_u64() != Some(0) || *key == "check-errors")
        .map(|(key, value)| format!("    \"{key}\": {value}"))
        .collect();
    format!("{{\n{}\n}}\n", lines.join(",\n"))
}

/// The standard error: findings, and on a terminal how far the check is.
pub(super) struct Screen {
    bar: bool,
    shown: bool,
    next: Instant,
}

/// How often the bar moves.
const BAR_INTERVAL: Duration = Duration::from_millis(100);
const BAR_WIDTH: u64 = 40;

impl Screen {
    /// No bar if `quiet`.
    pub(super) fn new(quiet: bool) -> Screen {
        let bar = !quiet && std::io::stderr().is_terminal();
        Screen { bar, shown: false, next: Instant::now() + BAR_INTERVAL }
    }

    /// Takes the bar away.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            eprint!("\r\x1b[K");
        }
    }
}

impl Watch for Screen {
    fn line(&mut self, text: &str) {
        self.clear();
        eprintln!("{text}");
    }

    fn error(&mut self, text: &str) {
        self.line(&format!("{PROGRAM}: {text}"));
    }

    fn progress(&mut self, done: u64, total: u64) {
        if !self.bar || Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + BAR_INTERVAL;
        let full = (BAR_WIDTH * done / total.max(1)).min(BAR_WIDTH);
        let bar: String = (0..BAR_WIDTH).map(|i| if i < full { '#' } else { '.' }).collect();
        let percent = done as f64 * 100.0 / total.max(1) as f64;
        eprint!("\r[{bar}] {percent:6.2}%");
        self.shown = true;
    }
}
