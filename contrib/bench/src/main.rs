//! `vub-bench`: load on a vhost-user-blk back end without a guest, and two back ends compared.

#![forbid(unsafe_code)]
#![allow(clippy::cast_possible_truncation, reason = "sizes were checked against the disk")]

mod backend;
mod bars;
mod cases;
mod compare;
mod goals;
mod guest;
mod hist;
mod host;
mod idle;
mod load;
mod many;
mod peer;
mod publish;
mod qcow2;
mod results;
mod selftest;
mod usage;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vub_client::{Client, Error, sys};

use load::{Job, Report};

/// Load on a vhost-user-blk back end without a guest
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Run one job against a socket
    Run {
        /// The back end's socket
        #[arg(long)]
        socket: PathBuf,
        /// The back end's process [default: who listens on the socket]
        #[arg(long)]
        pid: Option<u32>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        job: Job,
    },
    /// Run two back ends in turn on the preset cases, and judge them by the bars of issues 2 and 3
    Compare {
        #[command(flatten)]
        plan: Box<compare::Plan>,
    },
    /// Measure everything and write a report: JSON, CSV, SVG plots, an HTML page
    #[command(args_override_self = true)]
    Report {
        #[command(flatten)]
        options: Box<publish::Options>,
    },
    /// Judge a file written by `compare --json`
    Bars {
        /// The file
        file: PathBuf,
    },
    /// Run one job against a device thread in this process: what the client itself can do
    Fake {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        job: Job,
    },
}

fn run(socket: &PathBuf, pid: Option<u32>, job: &Job) -> Result<Report, Error> {
    let mut client = Client::connect(socket, job.options())?;
    let pid = pid.or_else(|| sys::peer_pid(client.conn.stream()).ok());
    load::run(job, &mut client, pid)
}

fn print(report: &Report, json: bool) {
    if json {
        println!("{}", serde_json::to_string_pretty(report).expect("a report has plain fields"));
        return;
    }
    let us = |ns: u64| ns as f64 / 1000.0;
    println!(
        "{:.0} IOPS, {:.1} MB/s, {} requests in {:.2} s, {} errors",
        report.iops, report.mb_per_s, report.ios, report.seconds, report.errors
    );
    println!(
        "latency us: mean {:.1}, p50 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1}",
        us(report.lat_mean_ns),
        us(report.lat_p50_ns),
        us(report.lat_p99_ns),
        us(report.lat_p999_ns),
        us(report.lat_max_ns)
    );
    println!(
        "client: {:.0} ns CPU, {:.3} kicks, {:.3} sleeps per request",
        report.client_cpu_ns_per_io, report.kicks_per_io, report.sleeps_per_io
    );
    if report.foreign_cpus > compare::QUIET {
        println!("others kept {:.2} CPUs busy meanwhile", report.foreign_cpus);
    }
    if let Some(usage) = report.backend {
        println!(
            "back end: {:.0} ns CPU ({:.0} % user), {:.4} voluntary, {:.4} involuntary switches \
             per request",
            report.backend_cpu_ns_per_io,
            usage.user_share * 100.0,
            report.backend_voluntary_per_io,
            report.backend_involuntary_per_io
        );
    }
}

fn single(job: &Job, json: bool, go: impl FnOnce() -> Result<Report, Error>) -> Result<(), String> {
    job.check()?;
    let report = go().map_err(|e| e.to_string())?;
    print(&report, json);
    if report.errors > 0 { Err(format!("{} requests failed", report.errors)) } else { Ok(()) }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Cmd::Run { socket, pid, json, job } => single(&job, json, || run(&socket, pid, &job)),
        Cmd::Compare { plan } => compare::run(&plan),
        Cmd::Report { options } => publish::run(&options),
        Cmd::Bars { file } => compare::judge_file(&file),
        Cmd::Fake { json, job } => single(&job, json, || selftest::run(&job)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("vub-bench: {text}");
            ExitCode::FAILURE
        }
    }
}
