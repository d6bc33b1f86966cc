//! What the program logs, by the id of the export that a line names.

use std::sync::{Mutex, Once};

use log::{Level, LevelFilter, Log, Metadata, Record};

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Collector;

impl Log for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            LINES.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// Collects from now on.
pub fn start() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Collector).unwrap();
        log::set_max_level(LevelFilter::Warn);
    });
}

/// The lines about the export `id`, without that.
pub fn of(id: &str) -> Vec<String> {
    let start = format!("export '{id}': ");
    let lines = LINES.lock().unwrap();
    lines.iter().filter_map(|line| line.strip_prefix(&start)).map(str::to_owned).collect()
}
