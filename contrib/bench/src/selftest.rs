//! The load generator against a device thread in this process, which moves no data: shows what the
//! client costs and that it is not what a measurement measures.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vmm_sys_util::eventfd::EventFd;
use vub_client::fake::FakeDevice;
use vub_client::ring::{Ring, RingMem};
use vub_client::{Error, GuestMem, Queue, Result};

use crate::load::{Job, Mode, Report, run_queues};

/// Any size will do: no data is moved.
const DISK: u64 = 1 << 30;

/// Runs a job on fake queues, one polling device thread for all of them.
///
/// # Errors
/// The client's.
pub fn run(job: &Job) -> Result<Report> {
    let opts = job.options();
    let mem = GuestMem::new(1, opts.mem_size)?;
    let (mut queues, mut devices) = (Vec::new(), Vec::new());
    for index in 0..job.queues {
        let ring = Ring::new(RingMem::new(&mem, job.queue_size)?, opts.event_idx);
        let mut device = FakeDevice::new(&mem, ring.mem(), opts.event_idx, None);
        device.arm(false);
        let mut queue = Queue::new(index, &mem, ring, job.client == Mode::Poll)?;
        queue.indirect = opts.indirect;
        let call = queue.call_fd().try_clone().map_err(|e| Error::Io("dup of eventfd", e))?;
        devices.push((device, call));
        queues.push(queue);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let device = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || serve(&mut devices, &stop))
    };
    let report = run_queues(job, queues, DISK, None);
    stop.store(true, Ordering::Relaxed);
    device.join().map_err(|_| Error::Protocol("the device thread died".into()))?;
    report
}

fn serve(devices: &mut [(FakeDevice, EventFd)], stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let mut idle = true;
        for (device, call) in devices.iter_mut() {
            let (n, interrupt) = device.step();
            idle &= n == 0;
            if interrupt {
                // It can only fail when the counter is full, and then the client is awake anyway.
                let _ = call.write(1);
            }
            if n > 0 {
                device.arm(false);
            }
        }
        if idle {
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        job: Job,
    }

    fn job(line: &str) -> Job {
        Line::parse_from(std::iter::once("job").chain(line.split_whitespace())).job
    }

    #[test]
    fn verify_notices_a_device_that_stores_nothing() {
        let job = job("--verify --rw randrw --size 64k --iodepth 4 --ios 1000");
        assert!(run(&job).unwrap_err().to_string().contains("verify"));
    }

    #[test]
    fn every_mode_runs_and_counts() {
        for line in [
            "--ios 5000 --iodepth 32",
            "--ios 5000 --iodepth 4 --client event --no-indirect",
            "--ios 5000 --iodepth 8 --queues 2 --rw randrw --fsync 3 --no-event-idx --segment 512",
            "--ios 2000 --queues 2 --threads 1 --client event --rw write --bs 64k",
            "--ios 5000 --rw rw --rwmixread 80 --iodepth 8",
            "--time 0.05 --warmup 0.01 --rw read --bs 128k --segment 4k",
        ] {
            let job = job(line);
            job.check().unwrap();
            let report = run(&job).unwrap();
            assert!(report.ios > 0 && report.errors == 0, "{line}: {report:?}");
            assert!(job.ios == 0 || report.ios >= job.ios, "{line}: {report:?}");
            assert!(job.fsync == 0 || report.flushes * 2 < report.writes, "{line}: {report:?}");
        }
        assert!(job("--iodepth 100 --no-indirect").check().is_err());
        assert!(job("--bs 1000").check().is_err());
    }

    #[test]
    fn a_rate_is_kept() {
        for client in ["poll", "event"] {
            let line =
                format!("--rate-iops 1000 --queues 2 --ios 400 --iodepth 4 --client {client}");
            let report = run(&job(&line)).unwrap();
            // 200 on each queue, the last of which begins 199 ms after the first; depth 4 may reap later ones for it.
            assert!(report.ios >= 400 && report.seconds > 0.19, "{line}: {report:?}");
        }
    }

    #[test]
    fn once_touches_every_stride_and_ends() {
        for line in [
            "--rw randwrite --size 4m --stride 64k --once --iodepth 8",
            "--rw write --size 256k --once --iodepth 8 --client event",
            "--rw randwrite --size 8m --stride 64k --once --queues 2 --fsync 1 --iodepth 4",
        ] {
            let job = job(line);
            job.check().unwrap();
            let report = run(&job).unwrap();
            let blocks = job.size / job.stride.max(job.bs);
            assert_eq!(report.writes, blocks, "{line}");
            assert_eq!(report.flushes, if job.fsync > 0 { blocks } else { 0 }, "{line}");
            assert!(report.seconds < job.time, "{line}: waited for the clock");
        }
        assert!(job("--stride 6k").check().is_err());
    }
}
