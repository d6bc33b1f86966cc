//! The command line: QSD's options in QSD's words, and our own.
//!
//! Two passes. The first ([`plan`]) collects what must be known before anything happens (`--daemonize`, `--pidfile`,
//! ...) and answers `--help` and `--version`; the second ([`session`]) makes nodes, objects and exports in the order in
//! which they are written. Nobody is served before the last option has been processed.
//!
//! ```text
//! getopt -> plan -> (daemonize) -> session -> pidfile -> publish -> sandbox -> serve -> READY -> signal -> STOPPING -> close
//! ```
#![forbid(unsafe_code)]

pub mod check;
pub mod daemon;
mod dormant;
pub mod exports;
pub mod getopt;
pub mod help;
pub mod listen;
mod logging;
pub mod objects;
pub mod plan;
pub mod session;
pub mod state;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use daemon::{Background, Manager, Pidfile, Side};
use help::PROGRAM;
use plan::{Plan, Settings};
use session::{Next, Session};

use crate::err;
use crate::error::{Error, Result};
use crate::sandbox::{Allow, privileges};
use crate::sys::{self, Signals};

/// The signals that are waited for: the first looks at the sizes of the disks, the others end the program.
const SIGNALS: [i32; 4] = [libc::SIGUSR1, libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Runs the program with `args`, the first of which is its name. Errors go to the standard error.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    match run(args) {
        Ok(code) => code,
        Err(e) => {
            let hint = e.hint().map(|hint| format!("{hint}\n")).unwrap_or_default();
            eprint!("{PROGRAM}: {e}\n{hint}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: impl Iterator<Item = OsString>) -> Result<ExitCode> {
    let args = args
        .skip(1)
        .map(|arg| arg.into_string().map_err(|arg| err!("{}: not valid UTF-8", arg.display())))
        .collect::<Result<Vec<_>>>()?;
    if let Some((first, rest)) = args.split_first()
        && first == check::COMMAND
    {
        return Ok(check::main(rest));
    }
    let settings = match Plan::read(&args)? {
        Plan::Print(text) => return print(&text),
        Plan::Serve(settings) => settings,
    };
    listen::note_systemd();
    let background = match settings.daemonize {
        false => None,
        true => match daemon::daemonize().map_err(|e| err!("cannot daemonize: {e}"))? {
            Side::Parent(code) => return Ok(ExitCode::from(code)),
            Side::Daemon(background) => Some(background),
        },
    };
    logging::start(&settings);
    if let Err(e) = sys::raise_nofile_limit() {
        log::warn!("cannot raise the limit of open files: {e}");
    }
    if let Err(e) = sys::raise_memlock_limit() {
        log::warn!("cannot raise the limit of locked memory: {e}");
    }
    settings.identity.announce();
    // Before the first thread: threads inherit the mask.
    let signals = Signals::block(&SIGNALS).map_err(|e| err!("cannot block signals: {e}"))?;
    let mut session = Session::new();
    let mut pidfile = None;
    let result = serve(&mut session, &mut pidfile, &settings, background, &signals);
    end_at_once_if_told_again(signals);
    let flushed = session.close();
    // The last trace of the process, for who waits for it.
    drop(pidfile);
    match result {
        Ok(_) if !flushed => Ok(ExitCode::FAILURE),
        result => result,
    }
}

/// Draining waits for the disk, and a disk may hang: a second signal ends the process without it. What is left behind (a
/// socket, a pidfile without its lock) does not hinder the next start.
fn end_at_once_if_told_again(signals: Signals) {
    let watch = move || {
        if let Ok(signal) = wait_for_end(&signals, || {}) {
            log::error!("signal {signal} again: ending without finishing requests");
            sys::exit_now(1);
        }
    };
    if let Err(e) = std::thread::Builder::new().name("signals".into()).spawn(watch) {
        log::warn!("a second signal will not be heard: {e}");
    }
}

/// Waits for a signal that ends the program; `resize` is called for each of the other.
fn wait_for_end(signals: &Signals, resize: impl Fn()) -> io::Result<u32> {
    loop {
        let signal = signals.wait()?;
        if i32::try_from(signal) != Ok(libc::SIGUSR1) {
            return Ok(signal);
        }
        resize();
    }
}

/// Everything between the first node and the signal to stop. What it makes outlives it, whatever happens.
fn serve(
    session: &mut Session,
    pidfile: &mut Option<Pidfile>,
    settings: &Settings,
    background: Option<Background>,
    signals: &Signals,
) -> Result<ExitCode> {
    if let Next::Print(text) = session.process(settings)? {
        return print(&text);
    }
    // Locked before a socket of a process with the same pidfile is replaced; filled when ours is there to be used.
    *pidfile = settings.pidfile.as_deref().map(Pidfile::lock).transpose()?;
    let numbers = settings.identity.numbers();
    if numbers != (None, None) {
        session.give_to(numbers)?;
        pidfile.as_ref().map(|file| file.give_to(numbers)).transpose()?;
    }
    session.publish()?;
    pidfile.as_mut().map(Pidfile::fill).transpose()?;
    let manager = Manager::connect();
    if settings.sandbox {
        privileges::bound_capabilities();
    }
    settings.identity.assume().map_err(|e| err!("cannot become another user: {e}"))?;
    if settings.sandbox {
        let mut allow = Allow::default();
        settings.allow.iter().for_each(|path| allow.directory(path));
        pidfile.iter().filter_map(Pidfile::dir).for_each(|dir| allow.remove_in(dir));
        session.confine(allow)?;
    }
    session.serve()?;
    if let Some(background) = background {
        background.ready().map_err(|e| err!("cannot go to the background: {e}"))?;
    }
    manager.notify("READY=1");
    let signal = wait_for_end(signals, || session.look_at_storage())
        .map_err(|e| err!("cannot wait for signals: {e}"))?;
    log::info!("signal {signal}: stopping");
    manager.notify("STOPPING=1");
    Ok(ExitCode::SUCCESS)
}

/// Prints to the standard output.
fn print(text: &str) -> Result<ExitCode> {
    let printed = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
    printed.map_err(|e| Error::new(format!("cannot print: {e}")))?;
    Ok(ExitCode::SUCCESS)
}
