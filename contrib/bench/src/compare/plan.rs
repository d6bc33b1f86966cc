//! What is compared, and how: the command line.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::LARGE;
use crate::backend::Program;
use crate::cases::{self, Case};
use crate::load::Extra;
use crate::peer;

/// What to compare and how.
#[derive(Args, Clone, Debug)]
pub struct Plan {
    /// Back end A
    #[arg(long, default_value = "target/release/vhost-user-blk")]
    pub a: PathBuf,
    /// Back end B
    #[arg(long, default_value = "qemu-storage-daemon")]
    pub b: PathBuf,
    /// Run only one of them: a or b
    #[arg(long, value_parser = ["a", "b"])]
    pub only: Option<String>,
    /// Options added to A's export, as in ",poll-max-ns=0"
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub a_export: String,
    /// The same for B
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub b_export: String,
    /// An argument put before all others of A (repeatable)
    #[arg(long, allow_hyphen_values = true)]
    pub a_arg: Vec<String>,
    /// The same for B
    #[arg(long, allow_hyphen_values = true)]
    pub b_arg: Vec<String>,
    /// What else A's rings are asked for (repeatable)
    #[arg(long, value_enum)]
    pub a_ring: Vec<Extra>,
    /// The same for B
    #[arg(long, value_enum)]
    pub b_ring: Vec<Extra>,
    /// Another back end (repeatable): NAME[:FORMAT,...]=COMMAND, run by `sh -c`, with {socket} {image} {format}
    /// {queues} {size} {direct} {aio} {dir} filled in; formats are null, raw and qcow2 [default: raw]
    #[arg(long, value_name = "PEER", allow_hyphen_values = true)]
    pub peer: Vec<String>,
    /// Run the host's own io_uring loop on the same files, where a case has one
    #[arg(long)]
    pub host: bool,
    /// Give qemu-storage-daemon an iothread
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1,
          default_missing_value = "true")]
    pub qsd_iothread: bool,
    /// Cases, by name or beginning of one [default: all]
    #[arg(long, value_delimiter = ',')]
    pub cases: Vec<String>,
    /// Runs of each back end per case
    #[arg(long, default_value_t = 5)]
    pub repeat: usize,
    /// Tries to get a quiet run
    #[arg(long, default_value_t = 5)]
    pub tries: usize,
    /// Seconds to wait for others to leave the CPUs alone, before each run
    #[arg(long, default_value_t = 20.0)]
    pub wait: f64,
    /// Seconds per run
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// Which clients to pin to CPU 0, for both back ends (which stay unpinned)
    #[arg(long, value_enum, default_value = "poll")]
    pub pin: Pin,
    /// Do not measure start, memory and idling
    #[arg(long)]
    pub no_idle: bool,
    /// Where test files and sockets live: a real file system
    #[arg(long, default_value = "/var/tmp/vub-bench")]
    pub dir: PathBuf,
    /// Exports of one process, idle and busy (0: do not measure them)
    #[arg(long, default_value_t = 64)]
    pub exports: usize,
    /// The cases of the report's plots too
    #[arg(skip)]
    pub sweeps: bool,
    /// Write everything measured to this file
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// Which clients are pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pin {
    /// Those that poll: else back end and client share a CPU for part of the run, by luck.
    Poll,
    /// All.
    All,
    /// None.
    None,
}

impl Plan {
    /// Everything that takes part, A first.
    ///
    /// # Errors
    /// A peer that cannot be read.
    pub fn programs(&self) -> Result<Vec<Program>, String> {
        let program = |label: &str, path: &Path, args: &[String], export: &String| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Program {
                label: label.into(),
                path: path.into(),
                iothread: self.qsd_iothread && name.contains("storage-daemon"),
                extra: (args.to_vec(), export.clone()),
                template: None,
                host: false,
            }
        };
        let a = program("A", &self.a, &self.a_arg, &self.a_export);
        let b = program("B", &self.b, &self.b_arg, &self.b_export);
        let mut all = match self.only.as_deref() {
            Some("a") => vec![a],
            Some(_) => vec![b],
            None => vec![a, b],
        };
        for text in &self.peer {
            let (name, template) = peer::parse(text)?;
            if all.iter().any(|p| p.label == name) {
                return Err(format!("--peer {name}: there are two of that name"));
            }
            all.push(template.program(name));
        }
        Ok(all)
    }

    /// Whether the user asked for it.
    pub fn wants(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|n| case.starts_with(n.as_str()))
    }

    /// The cases asked for.
    ///
    /// # Errors
    /// A name that no case begins with.
    pub fn wanted(&self) -> Result<Vec<Case>, String> {
        let all = cases::all();
        let names: Vec<_> = all.iter().map(|c| c.name.as_str()).chain([LARGE]).collect();
        for name in &self.cases {
            if !names.iter().any(|n| n.starts_with(name.as_str())) {
                return Err(format!("no case {name}; there are {}", names.join(" ")));
            }
        }
        Ok(all
            .into_iter()
            .filter(|c| {
                self.wants(&c.name) && (self.sweeps || !self.cases.is_empty() || !c.report_only)
            })
            .collect())
    }
}
