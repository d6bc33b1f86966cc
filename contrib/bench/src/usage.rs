//! What a process costs, read from outside: CPU time, context switches, resident memory.

use std::collections::HashMap;
use std::fs;
use std::io;

use serde::{Deserialize, Serialize};
use vub_client::sys;

/// A snapshot of a process.
#[derive(Debug)]
pub struct Snapshot {
    /// From the process's CPU clock: exact to the ns, threads that exited and io_uring's workers
    /// (which are threads of the process) included. The sum of `task/*/schedstat` is the same number
    /// without the exited ones.
    cpu_ns: u64,
    /// utime and stime in clock ticks, for their proportion only.
    ticks: (u64, u64),
    /// Bytes it had devices read; page cache and holes of files are not in it.
    read_bytes: u64,
    /// Voluntary and involuntary switches per thread.
    switches: HashMap<u32, (u64, u64)>,
}

/// The difference of two snapshots. Switches of a thread that exited in between are lost.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Usage {
    /// CPU time.
    pub cpu_ns: u64,
    /// Share of it in user mode, by the clock tick.
    pub user_share: f64,
    /// Times a thread slept.
    pub voluntary: u64,
    /// Times a thread was pushed off its CPU.
    pub involuntary: u64,
    /// Bytes read from devices.
    #[serde(default)]
    pub read_bytes: u64,
    /// System calls, where they can be counted.
    #[serde(default)]
    pub syscalls: Option<u64>,
}

/// A process watched from a moment on: a snapshot, and a counter of its system calls.
#[derive(Debug)]
pub struct Counted {
    pid: u32,
    syscalls: Option<sys::SyscallCounter>,
    first: Snapshot,
}

impl Counted {
    /// Begins.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn begin(pid: u32) -> io::Result<Self> {
        let syscalls = sys::SyscallCounter::new(pid).ok();
        Ok(Self { pid, syscalls, first: Snapshot::take(pid)? })
    }

    /// What happened since.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn end(&self) -> io::Result<Usage> {
        let syscalls = self.syscalls.as_ref().and_then(|s| s.count().ok());
        Ok(Usage { syscalls, ..self.first.until(&Snapshot::take(self.pid)?) })
    }
}

/// Resident memory in KiB.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Rss {
    /// Everything.
    pub total_kib: u64,
    /// Private.
    pub anon_kib: u64,
    /// Of files: the program and its libraries.
    pub file_kib: u64,
    /// Shared memory: the guest's.
    pub shmem_kib: u64,
}

fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn ticks(pid: u32) -> io::Result<(u64, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may hold spaces and parentheses: fields are counted after its last one.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut fields = rest.split_whitespace().skip(11).map(|f| f.parse().unwrap_or(0));
    Ok((fields.next().unwrap_or(0), fields.next().unwrap_or(0)))
}

impl Snapshot {
    /// Looks at a process now.
    ///
    /// # Errors
    /// When it is gone.
    pub fn take(pid: u32) -> io::Result<Self> {
        let mut switches = HashMap::new();
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            // A thread may exit between the listing and the reading.
            let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
            let Ok(tid) = task.file_name().to_string_lossy().parse() else { continue };
            let voluntary = field(&status, "voluntary_ctxt_switches");
            switches.insert(tid, (voluntary, field(&status, "nonvoluntary_ctxt_switches")));
        }
        let io = fs::read_to_string(format!("/proc/{pid}/io"))?;
        let read_bytes = field(&io, "read_bytes");
        Ok(Self { cpu_ns: sys::process_cpu_ns(pid)?, ticks: ticks(pid)?, read_bytes, switches })
    }

    /// What happened until `end`.
    pub fn until(&self, end: &Self) -> Usage {
        let user = end.ticks.0.saturating_sub(self.ticks.0) as f64;
        let system = end.ticks.1.saturating_sub(self.ticks.1) as f64;
        let mut usage = Usage {
            cpu_ns: end.cpu_ns.saturating_sub(self.cpu_ns),
            user_share: user / (user + system).max(1.0),
            read_bytes: end.read_bytes.saturating_sub(self.read_bytes),
            ..Usage::default()
        };
        for (tid, now) in &end.switches {
            let before = self.switches.get(tid).copied().unwrap_or_default();
            usage.voluntary += now.0.saturating_sub(before.0);
            usage.involuntary += now.1.saturating_sub(before.1);
        }
        usage
    }
}

/// CPU time all of the machine has spent, idling and waiting for disks excepted, in ns.
///
/// # Errors
/// When /proc is not there.
pub fn machine_busy_ns() -> io::Result<u64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line.split_whitespace().skip(1).flat_map(str::parse).collect();
    // user nice system idle iowait irq softirq steal; guest time is in user already.
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|i| ticks.get(*i)).sum();
    // USER_HZ is 100 on every Linux this runs on.
    Ok(busy * 10_000_000)
}

/// Resident memory of a process.
///
/// # Errors
/// When it is gone.
pub fn rss(pid: u32) -> io::Result<Rss> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    Ok(Rss {
        total_kib: field(&status, "VmRSS"),
        anon_kib: field(&status, "RssAnon"),
        file_kib: field(&status, "RssFile"),
        shmem_kib: field(&status, "RssShmem"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_cpu_time_is_seen() {
        let pid = std::process::id();
        let before = Snapshot::take(pid).unwrap();
        let start = std::time::Instant::now();
        while start.elapsed().as_millis() < 50 {
            std::hint::spin_loop();
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
        let usage = before.until(&Snapshot::take(pid).unwrap());
        assert!(usage.cpu_ns > 10_000_000, "{usage:?}");
        assert!(machine_busy_ns().unwrap() > 10_000_000);
        assert!(rss(pid).unwrap().total_kib > 100);
        assert_eq!(field("a:\t1\nVmRSS:\t  17 kB\n", "VmRSS"), 17);
    }
}
