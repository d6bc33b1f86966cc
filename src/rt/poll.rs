//! The polling policy: how long a worker looks at memory before it sleeps. A pure function of observed gaps.
//!
//! Sleeping costs two context switches and the wake-up's latency; spinning costs the core. What pays depends on what
//! the worker waits for:
//!
//! * **the guest's next request** (nothing in flight): spin at most `max_ns`, growing from 4 us while the wait pays off,
//!   cut when it did not, as QEMU's `adjust_polling_time` does; an idle disk reaches 0 and never spins;
//! * **a completion with few requests in flight** (a guest at depth 1): latency is all the guest sees. A short wait is
//!   always spun over;
//! * **either of them, up to [`LONG_NS`]**: both ways are tried, again and again, and spinning has to earn its core by a quarter
//!   more requests. A guest that sleeps as well and is woken by us gains ten times that where waking a halted processor takes
//!   long, or loses as much when it is its own that has to be woken (`contrib/bench`, cases `null-d1-event`, `disk-d1` and
//!   `disk-d1-poll`);
//! * **a completion with many in flight**: throughput is the device's, sleeping costs the guest nothing and batches
//!   completions, so only very short gaps are spun over.

/// The first spin after sleeping turned out to be short (QEMU's `poll-grow` default start).
const START_NS: u64 = 4_000;
/// A fast disk's worst usual latency, and the time that a guest on a halted processor takes to wake: longer waits are slept over.
pub const LONG_NS: u64 = 100_000;
/// With more requests than this in flight the guest is not waiting for one completion.
const FEW: usize = 2;
/// A gap that is shorter than going to sleep and waking up (two switches and a system call, about 5 us here).
const SWITCH_NS: u64 = 6_000;

/// A wait for the device that is always spun over: little is lost, and the gain is certain.
const DEVICE_SHORT_NS: u64 = 20_000;
/// Requests that a trial of spinning, or of sleeping, lasts: some 50 ms. With 64 the kernel's scheduler still had the guest where the
/// other way had put it, and `disk-d1` chose wrongly.
const TRIAL: u32 = 1024;
/// Requests between two trials of what turned out worse: more, as the worse one takes longer.
const STEADY: u32 = 32 * TRIAL;
/// A request that took this many times as long as waits usually do: the guest was thinking, which says nothing.
const THINKING: u64 = 4;

/// The state of one worker's polling.
#[derive(Clone, Debug)]
pub struct Policy {
    max_ns: u64,
    /// Budget for the guest's next request.
    guest_ns: u64,
    /// How long completions took lately when few were in flight (moving average).
    device_ns: u64,
    /// How long the guest's next request took to come lately (moving average).
    think_ns: u64,
    /// Nothing was in flight when the last gap began.
    at_rest: bool,
    /// The usual gap between completions when many are in flight (moving average).
    gap_ns: u64,
    trial: Trial,
}

/// Which of two ways to wait serves the guest faster.
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
    /// Sleeping, which spinning is to be compared with.
    fn new() -> Self {
        Trial { spin: false, left: TRIAL, request_ns: 0, sum_ns: 0, count: 0, other_ns: None }
    }

    /// A request is done, where the longer of the two waits usually takes `wait_ns`.
    fn done(&mut self, wait_ns: u64) {
        let took = std::mem::take(&mut self.request_ns);
        if took > THINKING * wait_ns.max(START_NS) {
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
        let mean = (self.sum_ns / u64::from(self.count)).max(1);
        (self.sum_ns, self.count) = (0, 0);
        let Some(other) = self.other_ns.take() else {
            (self.other_ns, self.spin, self.left) = (Some(mean), !self.spin, TRIAL);
            return;
        };
        let (spinning, sleeping) = if self.spin { (mean, other) } else { (other, mean) };
        // A core has to be earned.
        self.spin = spinning < sleeping - sleeping / 5;
        let (better, worse) = if self.spin { (spinning, sleeping) } else { (sleeping, spinning) };
        self.left = STEADY * u32::try_from(worse / better).unwrap_or(1).clamp(1, 64);
    }
}

impl Policy {
    /// A policy that spins for the guest at most `max_ns` nanoseconds; 0 = never spin at all.
    pub fn new(max_ns: u64) -> Self {
        let (guest_ns, device_ns, think_ns, gap_ns) = (0, 0, 0, 0);
        Policy { max_ns, guest_ns, device_ns, think_ns, at_rest: true, gap_ns, trial: Trial::new() }
    }

    /// How long to spin now, in nanoseconds, with `in_flight` requests in the kernel.
    pub fn budget_ns(&self, in_flight: usize) -> u64 {
        match in_flight {
            _ if self.max_ns == 0 => 0,
            0 if self.trial.spin && self.think_ns <= LONG_NS => self.guest_ns.max(LONG_NS),
            0 => self.guest_ns,
            1..=FEW if self.spins_for_device() => {
                (self.device_ns * 2).clamp(START_NS, LONG_NS).max(self.guest_ns)
            }
            1..=FEW => 0,
            _ if self.gap_ns <= SWITCH_NS => SWITCH_NS,
            _ => 0,
        }
    }

    fn spins_for_device(&self) -> bool {
        self.device_ns <= DEVICE_SHORT_NS || self.device_ns <= LONG_NS && self.trial.spin
    }

    /// After `busy_ns` of work an idle gap of `gap_ns` began with `in_flight` requests in the kernel, and has ended (by
    /// whatever event); `slept` tells whether the spin was given up and the worker blocked.
    pub fn observe(&mut self, busy_ns: u64, gap_ns: u64, in_flight: usize, slept: bool) {
        if self.max_ns == 0 {
            return;
        }
        let rested = std::mem::replace(&mut self.at_rest, in_flight == 0);
        self.trial.request_ns = self.trial.request_ns.saturating_add(busy_ns + gap_ns);
        let average = |old: u64| old - old / 8 + gap_ns.min(8 * LONG_NS) / 8;
        match in_flight {
            0 => {
                self.adjust_guest(gap_ns, slept);
                self.think_ns = average(self.think_ns);
                // Requests that were not in flight at all: a device without latency.
                if rested {
                    self.trial.done(self.think_ns);
                }
            }
            1..=FEW => {
                self.device_ns = average(self.device_ns);
                self.trial.done(self.device_ns.max(self.think_ns));
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
        for _ in 0..2 * TRIAL {
            let spins = p.budget_ns(1) > 0;
            p.observe(0, if spins { 45_000 } else { 60_000 }, 1, !spins);
        }
        assert!((80_000..=LONG_NS).contains(&p.budget_ns(1)), "{}", p.budget_ns(1));
        for _ in 0..64 {
            p.observe(0, 5_000_000, 1, true);
        }
        assert_eq!(p.budget_ns(1), 0, "a spinning disk is not spun for");
        // Whatever the most is that was asked for.
        for max_ns in [1, LONG_NS, LONG_NS + 1, 1 << 40] {
            let mut p = Policy::new(max_ns);
            for n in 0..100 {
                p.observe(n, 90_000 * n, 0, true);
                p.observe(n, 1_000 * n, 1, true);
                assert!(p.budget_ns(1) <= max_ns.max(LONG_NS));
            }
        }
    }

    /// Which part of `n` requests was spun for, by a policy that has found out: the device takes `device_ns`, the guest
    /// `think_ns`, and what is not spun for `wake_ns` more. And the spin's budget afterwards.
    fn part_spun_for(n: u32, [device_ns, think_ns, wake_ns]: [u64; 3]) -> (f64, u64) {
        let (mut p, mut spun) = (Policy::new(32_768), 0);
        for n in 0..n {
            for (in_flight, wait) in [(0, think_ns), (1, device_ns)] {
                if wait == 0 {
                    continue;
                }
                let spin = p.budget_ns(in_flight) >= wait;
                spun += u32::from(spin && in_flight == 0);
                p.observe(1_000, if spin { wait } else { wait + wake_ns }, in_flight, !spin);
            }
            if n % 100 == 0 {
                // Now and then the guest takes a lot of time.
                p.observe(1_000, 10_000_000, 0, true);
            }
        }
        (f64::from(spun) / f64::from(n), p.budget_ns(0))
    }

    #[test]
    fn spinning_has_to_earn_its_core() {
        const MANY: u32 = 200_000;
        // A disk, and a guest that is waited for in any case.
        let device = |ns: [u64; 3]| {
            let (mut p, mut spun) = (Policy::new(32_768), 0);
            for n in 0..MANY {
                let spin = p.budget_ns(1) > 0;
                spun += u32::from(spin);
                p.observe(1_000, if spin { ns[0] } else { ns[1] }, 1, !spin);
                p.observe(1_000, if n % 100 == 0 { 10_000_000 } else { ns[2] }, 0, true);
            }
            f64::from(spun) / f64::from(MANY)
        };
        assert!(device([40_000, 60_000, 8_000]) > 0.9);
        assert!(device([90_000, 55_000, 8_000]) < 0.05);
        assert!(device([53_000, 55_000, 8_000]) < 0.05, "little is not enough");
        assert_eq!(device([15_000, 15_000, 8_000]), 1.0, "next to nothing is paid for it");
        // A guest that sleeps longer than `max_ns`, and no device at all.
        let (part, budget) = part_spun_for(MANY, [0, 40_000, 25_000]);
        assert!(part > 0.8 && budget == LONG_NS, "{part} {budget}");
        let (part, budget) = part_spun_for(MANY, [0, 40_000, 5_000]);
        assert!(part < 0.1 && budget == 0, "{part} {budget}");
        let (part, budget) = part_spun_for(MANY, [0, 150_000, 100_000]);
        assert!(part < 0.05 && budget == 0, "{part} {budget}");
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
