//! The job, in fio's words.

use clap::{Args, ValueEnum};
use serde::Serialize;
use vub_client::Options;
use vub_client::proto::pf;

/// What the requests are.
#[expect(clippy::enum_variant_names, reason = "fio's words")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Rw {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    RandRead,
    /// Random writes.
    RandWrite,
    /// Random reads and writes, see --rwmixread.
    RandRw,
    /// Sequential reads and writes, likewise.
    #[value(name = "rw", alias = "readwrite")]
    #[serde(rename = "rw")]
    Mixed,
}

impl Rw {
    /// One block after the other.
    pub fn is_sequential(self) -> bool {
        matches!(self, Self::Read | Self::Write | Self::Mixed)
    }
}

/// How the client learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Looks at the used ring all the time.
    Poll,
    /// Sleeps on the call eventfd.
    Event,
}

/// What costs a ring something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Extra {
    /// Requests in flight are tracked for a successor (INFLIGHT_SHMFD).
    Inflight,
    /// Written pages are logged, as during a migration (LOG_SHMFD, LOG_ALL).
    Log,
}

/// A size with a binary suffix: 4k, 128k, 1g.
pub fn size(text: &str) -> std::result::Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match lower[digits.len()..].trim_end_matches("ib") {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        other => return Err(format!("unknown suffix {other:?}")),
    };
    let number: u64 = digits.parse().map_err(|e| format!("{digits:?}: {e}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))
}

/// The job, in fio's words.
#[derive(Args, Clone, Debug, Serialize)]
pub struct Job {
    /// What the requests are
    #[arg(long, value_enum, default_value = "randread")]
    pub rw: Rw,
    /// Reads per hundred requests of randrw and rw
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub rwmixread: u32,
    /// Flush after every N writes of each request in flight, which is a writer of its own: it waits for
    /// its writes before it flushes, and for the flush before it goes on (0: never)
    #[arg(long, default_value_t = 0)]
    pub fsync: u32,
    /// Bytes per request
    #[arg(long, value_parser = size, default_value = "4k")]
    pub bs: u64,
    /// Cut a request's data into segments of this size (0: one segment)
    #[arg(long, value_parser = size, default_value = "0")]
    pub segment: u64,
    /// Requests in flight per queue
    #[arg(long, default_value_t = 1)]
    pub iodepth: u16,
    /// Queues
    #[arg(long, default_value_t = 1)]
    pub queues: u16,
    /// Begin at most this many requests a second on each queue (0: as fast as they complete)
    #[arg(long, default_value_t = 0)]
    pub rate_iops: u64,
    /// Client threads [default: 1 when polling, one per queue otherwise]
    #[arg(long, default_value_t = 0)]
    pub threads: u16,
    /// Measure for this many seconds
    #[arg(long, default_value_t = 3.0)]
    pub time: f64,
    /// Measure this many requests instead
    #[arg(long, default_value_t = 0)]
    pub ios: u64,
    /// Seconds before measuring (not with --ios and --once)
    #[arg(long, default_value_t = 0.5)]
    pub warmup: f64,
    /// How the client learns of completions
    #[arg(long, value_enum, default_value = "poll")]
    pub client: Mode,
    /// Check what is read against what this run has written
    #[arg(long)]
    pub verify: bool,
    /// Use only this much of the disk (0: all of it)
    #[arg(long, value_parser = size, default_value = "0")]
    pub size: u64,
    /// One request in each so many bytes, at an arbitrary block of them (0: every block)
    #[arg(long, value_parser = size, default_value = "0")]
    pub stride: u64,
    /// Touch every block (or stride) once, in random order if the job is random; ends when all were.
    /// No warm-up
    #[arg(long)]
    pub once: bool,
    /// Entries per ring
    #[arg(long, default_value_t = 256)]
    pub queue_size: u16,
    /// Do not use indirect descriptors
    #[arg(long)]
    pub no_indirect: bool,
    /// Do not use EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,
    /// What else the guest's rings ask of the back end (repeatable)
    #[arg(long, value_enum)]
    pub ring: Vec<Extra>,
    /// Pin client threads, the first to this CPU
    #[arg(long)]
    pub pin: Option<usize>,
    /// Seed of the offsets
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

impl Job {
    /// The command line's defaults.
    pub fn common() -> Self {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            job: Job,
        }
        <Line as clap::Parser>::parse_from(["job"]).job
    }

    /// Bytes per data segment.
    pub(super) fn segment_len(&self) -> u64 {
        if self.segment == 0 { self.bs } else { self.segment.min(self.bs) }
    }

    /// Bytes of the disk that one request stands for.
    pub(super) fn unit(&self) -> u64 {
        self.stride.max(self.bs)
    }

    /// The work is given and not only its time: every request counts, there is no warm-up.
    pub(super) fn counted(&self) -> bool {
        self.ios > 0 || self.once
    }

    /// Descriptors of a request, header and status included.
    fn descs(&self) -> u64 {
        self.bs.div_ceil(self.segment_len().max(1)) + 2
    }

    /// What is wrong with it, if anything.
    pub fn check(&self) -> std::result::Result<(), String> {
        let per_request = if self.no_indirect { self.descs() } else { 1 };
        let room = u64::from(self.queue_size) / per_request.max(1);
        match () {
            () if self.bs == 0 || !self.bs.is_multiple_of(512) => {
                Err("--bs must be a multiple of 512".into())
            }
            () if !self.stride.is_multiple_of(self.bs) => {
                Err("--stride must be a multiple of --bs".into())
            }
            () if !self.segment.is_multiple_of(512) => {
                Err("--segment must be a multiple of 512".into())
            }
            () if self.queues == 0 || self.iodepth == 0 => {
                Err("--queues and --iodepth begin at 1".into())
            }
            () if u64::from(self.iodepth) > room => {
                Err(format!("a ring of {} has room for {room} such requests", self.queue_size))
            }
            () if !self.queue_size.is_power_of_two() => {
                Err("--queue-size must be a power of two".into())
            }
            () => Ok(()),
        }
    }

    pub(super) fn is_logged(&self) -> bool {
        self.ring.contains(&Extra::Log)
    }

    /// The client this job needs.
    pub fn options(&self) -> Options {
        let depth = u64::from(self.iodepth);
        let lane = depth * (self.bs + 4096 + 64 + 16 * self.descs()) + (1 << 17);
        let ring = u64::from(self.queue_size) * 32 + 3 * 4096;
        let mem = (u64::from(self.queues) * (lane + ring)).next_multiple_of(1 << 21);
        let plain = Options::default();
        Options {
            queues: self.queues,
            queue_size: self.queue_size,
            event_idx: !self.no_event_idx,
            inflight: self.ring.contains(&Extra::Inflight),
            indirect: !self.no_indirect,
            polling: self.client == Mode::Poll,
            mem_size: usize::try_from(mem).unwrap_or(usize::MAX),
            want_protocol: plain.want_protocol | u64::from(self.is_logged()) << pf::LOG_SHMFD,
            ..plain
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("4k"), Ok(4096));
        assert_eq!(size("1GiB"), Ok(1 << 30));
        assert_eq!(size("512"), Ok(512));
        assert!(size("4x").is_err() && size("k").is_err() && size("99999999999t").is_err());
    }
}
