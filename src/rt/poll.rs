//! The polling policy: how long a worker looks at memory before it sleeps. A pure function of observed gaps.
//!
//! Sleeping costs two context switches and the wake-up's latency; spinning costs the core. What pays depends on what
//! the worker waits for:
//!
//! * **the guest's next request** (nothing in flight): spin at most `max_ns`, growing from 4 us while the wait pays off,
//!   cut when it did not, as QEMU's `adjust_polling_time` does; an idle disk reaches 0 and never spins;
//! * **a completion with few requests in flight** (a guest at depth 1): latency is all the guest sees. A short wait is
//!   always spun over; for a longer one, up to [`DEVICE_MAX_NS`], both are tried, again and again, and spinning has to earn
//!   its core: a polling guest gains a third by it, while one that sleeps may lose as much, when its processor has
//!   to be woken instead of ours (`contrib/bench`, cases `disk-d1` and `disk-d1-poll`);
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

/// A wait for the device that is always spun over: little is lost, and the gain is certain.
const DEVICE_SHORT_NS: u64 = 20_000;
/// Requests that a trial of spinning, or of sleeping, lasts: some 50 ms. With 64 the kernel's scheduler still had the guest where the
/// other way had put it, and `disk-d1` chose wrongly.
const TRIAL: u32 = 1024;
/// Requests between two trials of what turned out worse.
const STEADY: u32 = 32_768;
/// A request that took this many times as long as its device: the guest was thinking, which says nothing.
const THINKING: u64 = 4;

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
    trial: Trial,
}

/// Which of two ways to wait for the device serves the guest faster.
#[derive(Clone, Debug)]
struct Trial {
    /// The way in force.
    spin: bool,
    /// Requests still to be served that way.
    left: u32,
    /// What the one in work has taken so far.
    request_ns: u64,
    /// The sum over those that count, and their number.
    sum_ns: u64,
    count: u32,
    /// The mean of the other way's last requests, while this one is on trial.
    other_ns: Option<u64>,
}

impl Trial {
    /// Spinning, which is to be compared with sleeping.
    fn new() -> Self {
        Trial { spin: true, left: TRIAL, request_ns: 0, sum_ns: 0, count: 0, other_ns: None }
    }

    /// A request is done, by a device that usually takes `device_ns`.
    fn done(&mut self, device_ns: u64) {
        let took = std::mem::take(&mut self.request_ns);
        if took > THINKING * device_ns {
            return;
        }
        self.left -= 1;
        // The first one began in the other way.
        if self.left < TRIAL - 1 {
            self.sum_ns += took;
            self.count += 1;
        }
        if self.left > 0 {
            return;
        }
        let mean = self.sum_ns / u64::from(self.count);
        let stay = match self.other_ns.take() {
            // A core has to be earned by a tenth.
            Some(other) if self.spin => mean < other - other / 10,
            Some(other) => other >= mean - mean / 10,
            None => {
                self.other_ns = Some(mean);
                false
            }
        };
        self.spin ^= !stay;
        self.left = if self.other_ns.is_some() { TRIAL } else { STEADY };
        (self.sum_ns, self.count) = (0, 0);
    }
}

impl Policy {
    /// A policy that spins for the guest at most `max_ns` nanoseconds; 0 = never spin at all.
    pub fn new(max_ns: u64) -> Self {
        Policy { max_ns, guest_ns: 0, device_ns: 0, gap_ns: 0, trial: Trial::new() }
    }

    /// How long to spin now, in nanoseconds, with `in_flight` requests in the kernel.
    pub fn budget_ns(&self, in_flight: usize) -> u64 {
        match in_flight {
            _ if self.max_ns == 0 => 0,
            0 => self.guest_ns,
            1..=FEW if self.spins_for_device() => {
                (self.device_ns * 2).clamp(self.guest_ns.max(START_NS), DEVICE_MAX_NS)
            }
            1..=FEW => 0,
            _ if self.gap_ns <= SWITCH_NS => SWITCH_NS,
            _ => 0,
        }
    }

    fn spins_for_device(&self) -> bool {
        self.device_ns <= DEVICE_SHORT_NS || self.device_ns <= DEVICE_MAX_NS && self.trial.spin
    }

    /// After `busy_ns` of work an idle gap of `gap_ns` began with `in_flight` requests in the kernel, and has ended (by
    /// whatever event); `slept` tells whether the spin was given up and the worker blocked.
    pub fn observe(&mut self, busy_ns: u64, gap_ns: u64, in_flight: usize, slept: bool) {
        if self.max_ns == 0 {
            return;
        }
        self.trial.request_ns = self.trial.request_ns.saturating_add(busy_ns + gap_ns);
        let average = |old: u64| old - old / 8 + gap_ns.min(8 * DEVICE_MAX_NS) / 8;
        match in_flight {
            0 => self.adjust_guest(gap_ns, slept),
            1..=FEW => {
                self.device_ns = average(self.device_ns);
                self.trial.done(self.device_ns);
            }
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
            p.observe(0, 10_000, 0, true);
        }
        assert_eq!(p.budget_ns(0), 16_000);
        p.observe(0, 1_000_000_000, 0, true);
        assert_eq!(p.budget_ns(0), 0);
    }

    #[test]
    fn grows_to_the_maximum_and_not_beyond() {
        let mut p = Policy::new(32_768);
        for _ in 0..10 {
            p.observe(0, 32_700, 0, true);
        }
        assert_eq!(p.budget_ns(0), 32_768);
        p.observe(0, 100, 0, false);
        assert_eq!(p.budget_ns(0), 32_768, "a spin that paid off changes nothing");
    }

    #[test]
    fn a_lone_request_is_waited_for_as_long_as_the_disk_takes() {
        let mut p = Policy::new(32_768);
        for _ in 0..64 {
            p.observe(0, 45_000, 1, false);
        }
        assert!((80_000..=DEVICE_MAX_NS).contains(&p.budget_ns(1)), "{}", p.budget_ns(1));
        for _ in 0..64 {
            p.observe(0, 5_000_000, 1, true);
        }
        assert_eq!(p.budget_ns(1), 0, "a spinning disk is not spun for");
    }

    /// Which part of 100,000 requests was spun for, where one takes so long if it is, or is not.
    fn part_spun_for(spinning_ns: u64, sleeping_ns: u64) -> f64 {
        let (mut p, mut spun) = (Policy::new(32_768), 0);
        for n in 0..100_000 {
            let spin = p.budget_ns(1) > 0;
            spun += u32::from(spin);
            let took = if spin { spinning_ns } else { sleeping_ns };
            // The guest takes its time, and now and then a lot of it.
            p.observe(1_000, took - 10_000, 1, !spin);
            p.observe(1_000, if n % 100 == 0 { 10_000_000 } else { 8_000 }, 0, true);
        }
        f64::from(spun) / 100_000.0
    }

    #[test]
    fn spinning_has_to_earn_its_core() {
        assert!(part_spun_for(50_000, 70_000) > 0.95);
        assert!(part_spun_for(100_000, 65_000) < 0.05);
        assert!(part_spun_for(63_000, 65_000) < 0.05, "little is not enough");
        assert_eq!(part_spun_for(25_000, 25_000), 1.0, "next to nothing is paid for it");
    }

    #[test]
    fn many_in_flight_sleep_unless_completions_are_dense() {
        let mut p = Policy::new(32_768);
        for _ in 0..64 {
            p.observe(0, 14_000, 32, true);
        }
        assert_eq!(p.budget_ns(32), 0);
        for _ in 0..64 {
            p.observe(0, 1_000, 32, false);
        }
        assert_eq!(p.budget_ns(32), SWITCH_NS);
    }

    #[test]
    fn zero_means_never() {
        let mut p = Policy::new(0);
        p.observe(0, 1_000, 0, true);
        p.observe(0, 1_000, 1, true);
        assert_eq!((p.budget_ns(0), p.budget_ns(1), p.budget_ns(9)), (0, 0, 0));
    }
}
