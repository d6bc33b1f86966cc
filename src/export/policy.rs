//! What becomes of a request that failed (`rerror=`, `werror=`), and what is said about it.
//!
//! With `stop` a failed request is kept, and its queue takes no others, until [`super::Export::resume`] has it tried again and it
//! succeeds; a disk that was full is tried again every second anyway. The guest waits, as for a slow disk. A queue that
//! must come to rest (GET_VRING_BASE, other guest memory) waits for nobody: what it keeps fails then. When the front end goes, or
//! this program, what is kept stays in flight for who comes next, if there is a region that says so; else it fails.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::request::Doing;
use crate::error::Errno;

/// How often requests are tried again that failed for want of space: thin pools and quotas grow.
pub const RETRY: Duration = Duration::from_secs(1);
/// Failed requests are reported at most this often,
const REPORT: Duration = Duration::from_secs(1);
/// and those that fail just like the last one that was reported, this often.
const REPORT_SAME: Duration = Duration::from_secs(60);

/// What becomes of a request that failed: QEMU's `BlockdevOnError`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The guest is told.
    #[default]
    Report,
    /// The guest is told that all went well.
    Ignore,
    /// As `Stop` without space, else as `Report`.
    Enospc,
    /// It waits.
    Stop,
}

impl OnError {
    /// The words of the options; `auto` is QEMU's choice.
    pub const NAMES: &'static [&'static str] = &["report", "ignore", "enospc", "stop", "auto"];

    /// What `word` stands for: `auto` is `enospc` for writes, and `report` for reads.
    pub fn parse(word: &str, write: bool) -> Option<OnError> {
        match word {
            "report" => Some(OnError::Report),
            "ignore" => Some(OnError::Ignore),
            "enospc" => Some(OnError::Enospc),
            "stop" => Some(OnError::Stop),
            "auto" => Some(if write { OnError::Enospc } else { OnError::Report }),
            _ => None,
        }
    }
}

/// `rerror` and `werror`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnErrors {
    /// Of reads.
    pub read: OnError,
    /// Of everything else: writes, zeroes, discards, flushes.
    pub write: OnError,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Report,
    Ignore,
    Stop,
}

impl OnErrors {
    /// What becomes of `doing`, which failed with `e`.
    pub fn verdict(self, doing: &Doing, e: Errno) -> Verdict {
        match if doing.reads { self.read } else { self.write } {
            OnError::Report => Verdict::Report,
            OnError::Ignore => Verdict::Ignore,
            OnError::Enospc if e != Errno::ENOSPC => Verdict::Report,
            OnError::Enospc | OnError::Stop => Verdict::Stop,
        }
    }
}

/// What was reported last, so that neither a guest nor a broken disk can fill another disk with our log.
#[derive(Default)]
pub struct Reports {
    last: Option<(Instant, &'static str, Errno)>,
    more: u64,
    /// Queues of which it was reported that they wait.
    waiting: Vec<u16>,
}

impl Reports {
    /// Whether something of the kind `what`, `errno` may be reported at `now`; and how many reports were left out before.
    pub fn may(&mut self, now: Instant, what: &'static str, errno: Errno) -> Option<u64> {
        let pause = |(_, last, e)| if (last, e) == (what, errno) { REPORT_SAME } else { REPORT };
        if self.last.is_some_and(|last| now - last.0 < pause(last)) {
            self.more += 1;
            return None;
        }
        self.last = Some((now, what, errno));
        Some(std::mem::take(&mut self.more))
    }

    /// It has been reported that `queue` waits.
    pub fn waits(&mut self, queue: u16) {
        self.waiting.push(queue);
    }

    /// `queue` goes on. Whether that is to be reported: whoever was told the one must hear the other.
    pub fn goes_on(&mut self, queue: u16) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| *waiting != queue);
        self.waiting.len() != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_as_qemu_has_it() {
        let of = |word, write| OnError::parse(word, write).unwrap();
        for (word, write, eio, enospc) in [
            ("report", true, Verdict::Report, Verdict::Report),
            ("ignore", true, Verdict::Ignore, Verdict::Ignore),
            ("enospc", true, Verdict::Report, Verdict::Stop),
            ("stop", false, Verdict::Stop, Verdict::Stop),
            ("auto", true, Verdict::Report, Verdict::Stop),
            ("auto", false, Verdict::Report, Verdict::Report),
        ] {
            let mine = of(word, write);
            let all = if write {
                OnErrors { write: mine, read: OnError::Report }
            } else {
                OnErrors { read: mine, write: OnError::Report }
            };
            let doing = Doing { reads: !write, ..Doing::default() };
            assert_eq!(all.verdict(&doing, Errno::EIO), eio, "{word} {write}");
            assert_eq!(all.verdict(&doing, Errno::ENOSPC), enospc, "{word} {write}");
            let other = Doing { reads: write, ..doing };
            assert_eq!(all.verdict(&other, Errno::ENOSPC), Verdict::Report, "{word} {write}");
        }
        assert_eq!(OnError::parse("x", true), None);
    }

    #[test]
    fn a_fault_is_reported_once() {
        let (mut reports, start) = (Reports::default(), Instant::now());
        let mut at = |s, what, errno| reports.may(start + Duration::from_millis(s), what, errno);
        assert_eq!(at(0, "read", Errno::EIO), Some(0));
        assert_eq!(at(10, "write", Errno::EIO), None, "too soon");
        assert_eq!(at(1500, "read", Errno::EIO), None, "the same");
        assert_eq!(at(1600, "read", Errno::ENOSPC), Some(2));
        assert_eq!(at(61_500, "read", Errno::ENOSPC), None);
        assert_eq!(at(61_700, "read", Errno::ENOSPC), Some(1));
    }
}
