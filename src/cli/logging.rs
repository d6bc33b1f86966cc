//! Where log lines go, and how many: what a guest or a front end can make us say again and again must not fill a disk.
//!
//! Every place in the program that logs has, for each subject ("export 'disk0'"), [`BURST`] lines, and another one each
//! [`REFILL`]. What is left out is counted, and the next line tells. Debug and trace lines are for who asked: not limited.
//!
//! Lock held: `seen`, for the look-up alone.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, Log, Metadata, Record};

use super::plan::Settings;

/// Lines in a row: what 16 queues of 16 exports have to say about one event.
const BURST: u32 = 256;
/// The time in which one more line may be logged: some megabytes a day, for a place that never stops.
const REFILL: Duration = Duration::from_secs(2);
/// Places and subjects that are told apart; all others share one: exports and nodes are not made by guests, but messages quote.
const KINDS_MAX: usize = 4096;
/// The longest subject, in bytes.
const SUBJECT_MAX: usize = 160;

/// What is known of the lines of one kind.
struct Kind {
    left: u32,
    /// Up to when lines were refilled.
    refilled: Instant,
    left_out: u64,
}

impl Kind {
    fn new(now: Instant) -> Kind {
        Kind { left: BURST, refilled: now, left_out: 0 }
    }

    /// Whether a line may be logged at `now`, and how many were left out before it.
    fn may(&mut self, now: Instant) -> Option<u64> {
        let elapsed = now.saturating_duration_since(self.refilled);
        let more = u32::try_from(elapsed.as_nanos() / REFILL.as_nanos()).unwrap_or(u32::MAX);
        if self.left.saturating_add(more) >= BURST {
            (self.left, self.refilled) = (BURST, now);
        } else {
            (self.left, self.refilled) = (self.left + more, self.refilled + REFILL * more);
        }
        if self.left == 0 {
            self.left_out += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// A logger that leaves out what comes too often.
struct Limited<L> {
    to: L,
    seen: Mutex<HashMap<u64, Kind>>,
}

impl<L> Limited<L> {
    fn new(to: L) -> Limited<L> {
        Limited { to, seen: Mutex::default() }
    }

    fn may(&self, kind: u64, now: Instant) -> Option<u64> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = if seen.len() < KINDS_MAX || seen.contains_key(&kind) { kind } else { 0 };
        seen.entry(kind).or_insert_with(|| Kind::new(now)).may(now)
    }
}

/// The place and the subject of a line that says `text`.
fn kind(record: &Record<'_>, text: &str) -> u64 {
    let subject = text.split_once(": ").map_or("", |(subject, _)| subject);
    let mut hasher = DefaultHasher::new();
    let place = (record.file().unwrap_or_default(), record.line());
    (place, subject.get(..SUBJECT_MAX).unwrap_or(subject)).hash(&mut hasher);
    hasher.finish()
}

impl<L: Log> Log for Limited<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.to.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        if record.level() > Level::Info {
            return self.to.log(record);
        }
        let text = record.args().to_string();
        match self.may(kind(record, &text), Instant::now()) {
            None => {}
            Some(0) => self.to.log(record),
            Some(n) => {
                let mut more = Record::builder();
                more.metadata(record.metadata().clone());
                more.module_path(record.module_path()).file(record.file()).line(record.line());
                let args = format_args!("{text} (and {n} more of these, not shown)");
                self.to.log(&more.args(args).build());
            }
        }
    }

    fn flush(&self) {
        self.to.flush();
    }
}

/// Logs to the standard error: by `--log-level`, else by `RUST_LOG`, else warnings and errors.
pub fn start(settings: &Settings) {
    let mut builder =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"));
    if let Some(level) = &settings.log_level {
        builder.parse_filters(level);
    }
    let logger = builder.build();
    let level = logger.filter();
    log::set_boxed_logger(Box::new(Limited::new(logger))).expect("nobody else sets one");
    log::set_max_level(level);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Lines(Mutex<Vec<String>>);

    impl Log for Lines {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &Record<'_>) {
            self.0.lock().unwrap().push(record.args().to_string());
        }

        fn flush(&self) {}
    }

    fn say(to: &Limited<Lines>, line: u32, level: Level, text: &str) {
        let mut record = Record::builder();
        record.file(Some("a.rs")).line(Some(line)).level(level);
        to.log(&record.args(format_args!("{text}")).build());
    }

    #[test]
    fn one_subject_does_not_silence_another() {
        let log = Limited::new(Lines::default());
        for n in 0..1000 {
            say(&log, 1, Level::Warn, &format!("export 'a': queue 0: {n}"));
        }
        say(&log, 1, Level::Warn, "export 'b': queue 0");
        say(&log, 2, Level::Error, "export 'a': another place");
        let mut lines = log.to.0.lock().unwrap();
        // A line may have been refilled meanwhile: a slow machine.
        let all = lines.len();
        assert!((258..270).contains(&all), "{all}");
        assert_eq!(lines[all - 2..], ["export 'b': queue 0", "export 'a': another place"]);
        lines.clear();
        drop(lines);
        for _ in 0..1000 {
            say(&log, 3, Level::Debug, "export 'a': what somebody wants to see");
        }
        assert_eq!(log.to.0.lock().unwrap().len(), 1000);
    }

    #[test]
    fn what_is_left_out_is_counted_and_more_may_come() {
        let start = Instant::now();
        let mut kind = Kind::new(start);
        let shown = |kind: &mut Kind, n: u32, at: Duration| {
            (0..n).filter_map(|_| kind.may(start + at)).collect::<Vec<_>>()
        };
        assert_eq!(shown(&mut kind, 1000, Duration::ZERO), vec![0; BURST as usize]);
        assert!(shown(&mut kind, 1, REFILL / 2).is_empty());
        assert_eq!(shown(&mut kind, 10, REFILL * 3 / 2), [1000 - u64::from(BURST) + 1]);
        assert_eq!(shown(&mut kind, 10, REFILL * 2), [9]);
        assert_eq!(shown(&mut kind, 1000, REFILL * 10_000).len(), BURST as usize);
    }

    #[test]
    fn the_number_of_kinds_is_bounded() {
        let log = Limited::new(Lines::default());
        for n in 0..KINDS_MAX as u32 + 1000 {
            say(&log, n, Level::Info, "x");
        }
        assert!(log.seen.lock().unwrap().len() <= KINDS_MAX + 1);
        assert!((KINDS_MAX + 256..KINDS_MAX + 270).contains(&log.to.0.lock().unwrap().len()));
    }
}
