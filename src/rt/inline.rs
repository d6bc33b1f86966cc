//! Transfers on the spot: when is a system call on this thread better than io_uring?
//!
//! Writes:
//! ext4 and tmpfs cannot write into the page cache without being allowed to block, so io_uring hands every buffered
//! write to a kernel thread: two context switches and 30 us of CPU for a copy that takes 2 us (`contrib/bench`, case
//! `page-d32-randwrite`). So such writes are done inline. Sometimes they do block, when the kernel throttles who dirties
//! pages faster than the disk takes them, and then everything else on this thread would wait; so a file whose write
//! took long goes back to io_uring for a while, longer each time.
//!
//! Reads: one that is alone has nobody to share io_uring's costs with, and `preadv2` answers a quarter of a microsecond
//! sooner (case `depth-page-1`) if the data is in the page cache. One for the thread pool never has: waking a thread and being
//! woken costs ten times what the copy does (case `nouring-page-threads`). RWF_NOWAIT says that the data is not there; then the
//! file's engine reads it, and the next ones are not tried, more of them each time.
#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Inline work per turn of a worker's loop; then completions are shown to the guest first.
pub const TURN: Duration = Duration::from_micros(100);
/// The longest inline write in bytes: a longer one is worth a kernel thread.
pub const LEN_MAX: usize = 256 << 10;
/// A copy into the page cache that takes this long has blocked, or lost its CPU.
const SLOW: Duration = Duration::from_millis(5);
/// The first pause after a slow write.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// Reads that are not tried after one that the page cache could not answer; twice as many after the next.
const SKIP_MIN: u32 = 4;
/// The most of them: what a cache that has been filled since is found out by.
const SKIP_MAX: u32 = 1024;

/// What was learnt about a file's buffered transfers. Shared by all threads; races only cost a wrong guess.
#[derive(Debug, Default)]
pub struct Inline {
    /// Nanoseconds since the process began, from which inline writes may be tried again.
    resume_at: AtomicU64,
    pause: AtomicU64,
    /// Reads not to be tried.
    skip: AtomicU32,
    /// How many there were after the last miss; 0 after a hit.
    skipped: AtomicU32,
}

fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    nanos(START.get_or_init(Instant::now).elapsed())
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

impl Inline {
    /// Whether the next write may be done inline.
    #[inline]
    pub fn allowed(&self) -> bool {
        match self.resume_at.load(Ordering::Relaxed) {
            0 => true,
            at => now() >= at,
        }
    }

    /// An inline write took `time`.
    #[inline]
    pub fn observe(&self, time: Duration) {
        if time >= SLOW {
            self.back_off();
        }
    }

    /// Whether a read that is alone may ask the page cache.
    #[inline]
    pub fn tries_read(&self) -> bool {
        let skip = self.skip.load(Ordering::Relaxed);
        if skip > 0 {
            self.skip.store(skip - 1, Ordering::Relaxed);
        }
        skip == 0
    }

    /// The page cache could, or could not, answer a read.
    #[inline]
    pub fn observe_read(&self, hit: bool) {
        let skipped = self.skipped.load(Ordering::Relaxed);
        if !hit {
            let skip = skipped.saturating_mul(2).clamp(SKIP_MIN, SKIP_MAX);
            self.skip.store(skip, Ordering::Relaxed);
            self.skipped.store(skip, Ordering::Relaxed);
        } else if skipped > 0 {
            self.skipped.store(0, Ordering::Relaxed);
        }
    }

    fn back_off(&self) {
        let (now, last) = (now(), self.resume_at.load(Ordering::Relaxed));
        let pause = self.pause.load(Ordering::Relaxed);
        // Slow again soon after the last pause: wait longer. Else start anew.
        let again = last != 0 && now.saturating_sub(last) < pause.saturating_mul(4);
        let next = if again { pause.saturating_mul(2) } else { 0 };
        let next = next.clamp(nanos(PAUSE_MIN), nanos(PAUSE_MAX));
        self.pause.store(next, Ordering::Relaxed);
        self.resume_at.store(now.saturating_add(next).max(1), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_tried_less_and_less_while_they_miss() {
        let inline = Inline::default();
        let tries = |n: u32| (0..n).filter(|_| inline.tries_read()).count();
        assert_eq!(tries(100), 100);
        for skip in [4, 8, 16, 32, 64, 128, 256, 512, 1024, 1024] {
            inline.observe_read(false);
            assert_eq!(tries(skip), 0);
            assert_eq!(tries(1), 1, "{skip}");
        }
        inline.observe_read(true);
        inline.observe_read(false);
        assert_eq!(tries(5), 1, "a hit forgives");
    }

    #[test]
    fn slow_writes_pause_inline_ones_for_longer_and_longer() {
        let inline = Inline::default();
        inline.observe(Duration::from_micros(3));
        assert!(inline.allowed());
        inline.observe(SLOW);
        assert!(!inline.allowed());
        let first = inline.pause.load(Ordering::Relaxed);
        inline.observe(SLOW);
        assert_eq!(inline.pause.load(Ordering::Relaxed), 2 * first);
        for _ in 0..40 {
            inline.observe(SLOW);
        }
        assert_eq!(inline.pause.load(Ordering::Relaxed), nanos(PAUSE_MAX));
        inline.resume_at.store(1, Ordering::Relaxed);
        assert!(inline.allowed());
    }
}
