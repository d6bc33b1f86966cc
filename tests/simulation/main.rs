//! The deterministic simulation, proven by what it finds and by what it does not find.
//!
//! `raw` over a simulated disk must pass; a toy format (`toy.rs`) passes as it is and fails with any one of its rules
//! broken. Time: `VUB_SIM_SECONDS` for each test; one seed: `VUB_SIM_SEED`; first seed: `VUB_SIM_FIRST`.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "tests")]

mod qcow2;
mod toy;
mod world;

use std::time::Duration;

use serde_json::{Value, json};
use vhost_user_blk::block::drivers::raw::RAW;
use vhost_user_blk::error::Errno;
use vhost_user_blk::sim::harness::{self, Cuts, Drivers, Plan, Report, Subject};
use vhost_user_blk::sim::{
    Discarded, DiskOptions, DiskSpec, FlushFailure, Pages, Request, Rng, SIM_DISK, Workload,
};

const SECTORS: u64 = 2048;

/// `raw` on a disk of the given kind.
struct Raw {
    options: DiskOptions,
}

impl Subject for Raw {
    fn drivers(&self) -> Drivers {
        static DRIVERS: Drivers = &[&RAW, &SIM_DISK];
        DRIVERS
    }

    fn disks(&self, _: &mut Rng) -> Vec<DiskSpec> {
        let image = Pages::zeroed(SECTORS * 512);
        vec![DiskSpec { options: self.options, ..DiskSpec::file("disk", image) }]
    }

    fn options(&self) -> Value {
        json!({
            "driver": "raw",
            "discard": "unmap",
            "file": { "driver": "sim-disk", "disk": "disk", "discard": "unmap" },
        })
    }
}

fn raw(options: DiskOptions) -> Raw {
    Raw { options }
}

const FILE: DiskOptions = DiskOptions {
    request_align: 1,
    capacity: 1 << 40,
    zeroes: true,
    discarded: Discarded::Zero,
    flush_failure: FlushFailure::Sticky,
};

#[test]
fn raw_keeps_every_promise() {
    let guest = Workload { discard_zeroes: true, cluster: 8, ..Workload::default() };
    harness::seeds("raw on a file", Duration::from_secs(2), |seed| {
        harness::run(&raw(FILE), &Plan { workload: guest, ..Plan::new(seed) })
    });
}

#[test]
fn raw_writes_zeroes_where_the_disk_cannot() {
    let options = DiskOptions { zeroes: false, discarded: Discarded::Old, ..FILE };
    harness::seeds("raw on a plain device", Duration::from_secs(1), |seed| {
        harness::run(&raw(options), &Plan::new(seed))
    });
}

/// Sectors of 512 bytes on blocks of 4096: the generic layer reads, modifies and writes back.
#[test]
fn ragged_writes_share_blocks() {
    struct Window(Raw);
    impl Subject for Window {
        fn drivers(&self) -> Drivers {
            self.0.drivers()
        }
        fn disks(&self, rng: &mut Rng) -> Vec<DiskSpec> {
            let mut disks = self.0.disks(rng);
            disks[0].image.set_len(SECTORS * 512 + 4096);
            disks
        }
        fn options(&self) -> Value {
            let mut options = self.0.options();
            options["offset"] = json!(512);
            options["size"] = json!(SECTORS * 512);
            options
        }
    }
    let options = DiskOptions { request_align: 4096, ..FILE };
    harness::seeds("ragged writes", Duration::from_secs(1), |seed| {
        harness::run(&Window(raw(options)), &Plan::new(seed))
    });
}

#[test]
fn raw_passes_errors_on() {
    let failure = [FlushFailure::Retry, FlushFailure::Sticky, FlushFailure::Lies];
    harness::seeds("raw with faults", Duration::from_secs(2), |seed| {
        let n = usize::try_from(seed % 3).unwrap();
        let options = DiskOptions { flush_failure: failure[n], ..FILE };
        let guest = Workload { operations: 60, ..Workload::default() };
        let plan = Plan { workload: guest, cuts: Cuts::Random(3), ..Plan::new(seed) };
        let errno = if seed.is_multiple_of(2) { Errno::EIO } else { Errno::ENOSPC };
        harness::run_faults(&raw(options), &plan, ("disk", &Request::ALL, errno), 3)
    });
}

#[test]
fn every_boundary_of_a_run() {
    let guest = Workload { operations: 40, longest: 40, ..Workload::default() };
    let plan = Plan { workload: guest, cuts: Cuts::Every(1), outcomes: 6, ..Plan::new(7) };
    let report = harness::run(&raw(FILE), &plan).unwrap();
    assert!(report.cuts >= report.events, "{report:?}");
}

#[test]
fn the_same_seed_is_the_same_run() {
    let once = |seed| -> Report { harness::run(&raw(FILE), &Plan::new(seed)).unwrap() };
    let toy = |seed| -> Report { harness::run(&toy::RIGHT, &toy::plan(seed)).unwrap() };
    for seed in 1..4 {
        assert_eq!(once(seed), once(seed));
        assert_eq!(toy(seed), toy(seed));
    }
    assert_ne!(once(1).trace, once(2).trace);
}
