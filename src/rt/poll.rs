//! The polling policy: how long a worker looks at memory before it sleeps. A pure function of observed gaps.
//!
//! Sleeping costs two context switches and the wake-up's latency; spinning costs the core. What pays depends on what
//! the worker waits for:
//!
//! * **the guest's next request** (nothing in flight): spin at most `max_ns`, growing from 4 us while the wait pays off,
//!   cut when it did not, as QEMU's `adjust_polling_time` does; an idle disk reaches 0 and never spins;
//! * **a completion with few requests in flight** (a guest at depth 1): latency is all the guest sees, so the spin lasts as
//!   long as such a completion usually takes, up to [`DEVICE_MAX_NS`];
//! * **a completion with many in flight**: throughput is the device's, sleeping costs the guest nothing and batches
//!   completions, so only very short gaps are spun over.

/// The first spin after sleeping turned out to be short (QEMU's `poll-grow` default start).
const START_NS: u64 = 4_000;
/// A fast disk's worst usual latency: waiting longer than this is left to sleep.
pub const DEVICE_MAX_NS: u64 = 100_000;
/// With more requests than this in flight the guest is not waiting for one completion.
const FEW: usize = 2;
/// A gap that is shorter than going to sleep and waking up (two switches and a system call, about 5 us here).
const SWITCH_NS: u64 = 6_000;

/// The state of one worker's polling.
#[derive(Clone, Debug)]
pub struct Policy {
    max_ns: u64,
    /// Budget for the guest's next request.
    guest_ns: u64,
    /// How long completions took lately when few were in flight (moving average).
    device_ns: u64,
    /// The usual gap between completions when many are in flight (moving average).
    gap_ns: u64,
}

impl Policy {
    /// A policy that spins for the guest at most `max_ns` nanoseconds; 0 = never spin at all.
    pub fn new(max_ns: u64) -> Self {
        Policy { max_ns, guest_ns: 0, device_ns: 0, gap_ns: 0 }
    }

    /// How long to spin now, in nanoseconds, with `in_flight` requests in the kernel.
    pub fn budget_ns(&self, in_flight: usize) -> u64 {
        match in_flight {
            _ if self.max_ns == 0 => 0,
            0 => self.guest_ns,
            1..=FEW if self.device_ns <= DEVICE_MAX_NS => {
                (self.device_ns * 2).clamp(self.guest_ns.max(START_NS), DEVICE_MAX_NS)
            }
            1..=FEW => 0,
            _ if self.gap_ns <= SWITCH_NS => SWITCH_NS,
            _ => 0,
        }
    }

    /// An idle gap of `gap_ns` ended (by whatever event), having begun with `in_flight` requests in the kernel; `slept` tells
    /// whether the spin was given up and the worker blocked.
    pub fn observe(&mut self, gap_ns: u64, in_flight: usize, slept: bool) {
        if self.max_ns == 0 {
            return;
        }
        let average = |old: u64| old - old / 8 + gap_ns.min(8 * DEVICE_MAX_NS) / 8;
        match in_flight {
            0 => self.adjust_guest(gap_ns, slept),
            1..=FEW => self.device_ns = average(self.device_ns),
            _ => self.gap_ns = average(self.gap_ns),
        }
    }

    fn adjust_guest(&mut self, gap_ns: u64, slept: bool) {
        if !slept {
            return;
        }
        if gap_ns > self.max_ns {
            // Even the longest spin would not have caught it: the disk is idle, or slow.
            self.guest_ns = 0;
        } else if gap_ns > self.guest_ns {
            self.guest_ns = (self.guest_ns * 2).max(START_NS).min(self.max_ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_disk_never_spins() {
        let mut p = Policy::new(32_768);
        for _ in 0..5 {
            p.observe(10_000, 0, true);
        }
        assert_eq!(p.budget_ns(0), 16_000);
        p.observe(1_000_000_000, 0, true);
        assert_eq!(p.budget_ns(0), 0);
    }

    #[test]
    fn grows_to_the_maximum_and_not_beyond() {
        let mut p = Policy::new(32_768);
        for _ in 0..10 {
            p.observe(32_700, 0, true);
        }
        assert_eq!(p.budget_ns(0), 32_768);
        p.observe(100, 0, false);
        assert_eq!(p.budget_ns(0), 32_768, "a spin that paid off changes nothing");
    }

    #[test]
    fn a_lone_request_is_waited_for_as_long_as_the_disk_takes() {
        let mut p = Policy::new(32_768);
        for _ in 0..64 {
            p.observe(45_000, 1, false);
        }
        assert!((80_000..=DEVICE_MAX_NS).contains(&p.budget_ns(1)), "{}", p.budget_ns(1));
        for _ in 0..64 {
            p.observe(5_000_000, 1, true);
        }
        assert_eq!(p.budget_ns(1), 0, "a spinning disk is not spun for");
    }

    #[test]
    fn many_in_flight_sleep_unless_completions_are_dense() {
        let mut p = Policy::new(32_768);
        for _ in 0..64 {
            p.observe(14_000, 32, true);
        }
        assert_eq!(p.budget_ns(32), 0);
        for _ in 0..64 {
            p.observe(1_000, 32, false);
        }
        assert_eq!(p.budget_ns(32), SWITCH_NS);
    }

    #[test]
    fn zero_means_never() {
        let mut p = Policy::new(0);
        p.observe(1_000, 0, true);
        p.observe(1_000, 1, true);
        assert_eq!((p.budget_ns(0), p.budget_ns(1), p.budget_ns(9)), (0, 0, 0));
    }
}
