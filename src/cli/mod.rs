//! The command line: QSD's options in QSD's words, and our own.
//!
//! Two passes. The first ([`plan`]) collects what must be known before anything happens (`--daemonize`, `--pidfile`,
//! ...) and answers `--help` and `--version`; the second ([`session`]) makes nodes, objects and exports in the order in
//! which they are written. Nobody is served before the last option has been processed.
//!
//! ```text
//! getopt -> plan -> (daemonize) -> session -> pidfile -> publish -> sandbox -> serve -> READY -> signal -> STOPPING -> close
//! ```
//!
//! With `--take-over`, the command line is that of the process whose place is taken: see [`takeover`].
#![forbid(unsafe_code)]

pub mod check;
pub mod daemon;
mod dormant;
pub mod exports;
pub mod getopt;
pub mod help;
pub mod listen;
mod logging;
mod metrics;
pub mod objects;
pub mod plan;
pub mod session;
pub mod state;
pub mod takeover;

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use daemon::{Background, Manager, Pidfile, Side};
use help::PROGRAM;
use metrics::Metrics;
use plan::{Plan, Settings};
use session::{Next, Session};

use crate::err;
use crate::error::{Error, Result};
use crate::metrics::top;
use crate::sandbox::{Allow, privileges};
use crate::sys::{self, Signals};
use takeover::Control;
use takeover::predecessor::{self, Outcome};
use takeover::successor::{self, Takeover};

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
    if let Some((first, rest)) = args.split_first()
        && first == top::COMMAND
    {
        return top::main(rest);
    }
    let settings = match Plan::read(&args)? {
        Plan::Print(text) => return print(&text),
        Plan::Serve(settings) => settings,
    };
    listen::note_systemd();
    let block = || Signals::block(&SIGNALS).map_err(|e| err!("cannot block signals: {e}"));
    let (settings, predecessor) = match &settings.take_over {
        None => (settings, None),
        Some(path) => {
            let signals = block()?;
            let (takeover, settings) = successor::ask(path, &settings, &signals)
                .map_err(|e| e.prepend("--take-over: "))?;
            (settings, Some((takeover, signals)))
        }
    };
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
    let (mut takeover, signals) = match predecessor {
        Some((takeover, signals)) => (Some(takeover), signals),
        None => (None, block()?),
    };
    // Later it may be out of reach.
    let manager = Manager::connect(takeover.as_mut().and_then(Takeover::manager));
    let mut session = Session::new();
    let mut names = Names::default();
    let result =
        begin(&mut session, &mut names, &settings, takeover.as_mut(), &signals).and_then(|next| {
            match next {
                Next::Print(text) => print(&text).map(|code| (code, false)),
                Next::Serve => serve(&mut session, &mut names, (background, manager), &signals),
            }
        });
    if let Ok((_, true)) = result {
        session.leave_places();
        names.leave();
    }
    end_at_once_if_told_again(signals);
    let flushed = session.close();
    if let (Err(e), Some(takeover)) = (&result, takeover) {
        takeover.fail(e.message());
    }
    // The last trace of the process, for who waits for it.
    drop(names);
    match result {
        Ok(_) if !flushed => Ok(ExitCode::FAILURE),
        result => result.map(|(code, _)| code),
    }
}

/// What has a name beside the exports' sockets. Dropping it removes the names.
#[derive(Default)]
struct Names {
    control: Option<Control>,
    metrics: Option<Metrics>,
    pidfile: Option<Pidfile>,
}

impl Names {
    /// Gives them to another user and group, as far as they are given.
    fn give_to(&self, numbers: (Option<u32>, Option<u32>)) -> Result<()> {
        self.control.as_ref().map(|control| control.place.give_to(numbers)).transpose()?;
        self.metrics.as_ref().map(|metrics| metrics.give_to(numbers)).transpose()?;
        self.pidfile.as_ref().map(|file| file.give_to(numbers)).transpose()?;
        Ok(())
    }

    /// The directories they are in.
    fn dirs(&self) -> Vec<PathBuf> {
        let control = self.control.as_ref().and_then(|control| control.place.dir());
        let metrics = self.metrics.as_ref().and_then(Metrics::dir);
        let pidfile = self.pidfile.as_ref().and_then(Pidfile::dir);
        control.into_iter().chain(metrics).chain(pidfile).map(Path::to_path_buf).collect()
    }

    /// A successor has them.
    fn leave(&mut self) {
        if let Some(control) = &mut self.control {
            control.leave();
        }
        if let Some(metrics) = &mut self.metrics {
            metrics.leave();
        }
        if let Some(pidfile) = &mut self.pidfile {
            pidfile.leave();
        }
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

/// Everything until all exports are served. What it makes outlives it, whatever happens.
fn begin(
    session: &mut Session,
    names: &mut Names,
    settings: &Settings,
    takeover: Option<&mut Takeover>,
    signals: &Signals,
) -> Result<Next> {
    if let Next::Print(text) = session.process(settings, takeover.is_some())? {
        return Ok(Next::Print(text));
    }
    if let Some(takeover) = takeover {
        confine(session, settings, takeover.dirs())?;
        let inherited = takeover.take(session, settings, signals.as_fd())?;
        (names.control, names.pidfile) = (Some(inherited.control), inherited.pidfile);
        names.metrics = inherited.metrics;
        // Guests are served already.
        if let Some(Err(e)) = names.metrics.as_ref().map(|metrics| metrics.serve(&session.graph)) {
            log::error!("{e}");
        }
        if let Some(Err(e)) = names.pidfile.as_mut().map(Pidfile::fill) {
            log::error!("{e}");
        }
        return Ok(Next::Serve);
    }
    // Locked before a socket of a process with the same pidfile is replaced; filled when ours is there to be used.
    names.pidfile = settings.pidfile.as_deref().map(Pidfile::lock).transpose()?;
    let control = settings.control.as_deref().map(|path| Control::listen(path, &settings.args));
    names.control = control.transpose().map_err(|e| e.prepend("--control: "))?;
    names.metrics = settings.metrics.as_ref().map(Metrics::listen).transpose()?;
    let numbers = settings.identity.numbers();
    if numbers != (None, None) {
        session.give_to(numbers)?;
        names.give_to(numbers)?;
    }
    session.publish()?;
    names.control.as_mut().map(Control::publish).transpose()?;
    names.metrics.as_mut().map(Metrics::publish).transpose()?;
    names.pidfile.as_mut().map(Pidfile::fill).transpose()?;
    confine(session, settings, names.dirs())?;
    session.serve()?;
    names.metrics.as_ref().map(|metrics| metrics.serve(&session.graph)).transpose()?;
    Ok(Next::Serve)
}

/// Becomes another user and enters the sandbox, as `settings` say. Names that lie in `dirs` will have to be removed.
fn confine(session: &Session, settings: &Settings, dirs: Vec<PathBuf>) -> Result<()> {
    if !settings.unconfined {
        privileges::bound_capabilities();
    }
    settings.identity.assume().map_err(|e| err!("cannot become another user: {e}"))?;
    if !settings.unconfined {
        let mut allow = Allow::default();
        settings.allow.iter().for_each(|path| allow.directory(path));
        dirs.into_iter().for_each(|dir| allow.remove_in(dir));
        session.confine(allow, settings.control.is_some())?;
    }
    Ok(())
}

/// From the moment when all is up until the signal to stop, or until a successor serves: whether that is so.
fn serve(
    session: &mut Session,
    names: &mut Names,
    (background, manager): (Option<Background>, Manager),
    signals: &Signals,
) -> Result<(ExitCode, bool)> {
    if let Some(background) = background {
        let stays = session.needs_directory(names.control.is_some());
        background.ready(stays).map_err(|e| err!("cannot go to the background: {e}"))?;
    }
    manager.notify("READY=1");
    let signal = loop {
        let mut sources = vec![signals.as_fd()];
        sources.extend(names.control.as_ref().map(|control| control.listener().as_fd()));
        let woken =
            sys::wait_readable(&sources, None).map_err(|e| err!("cannot wait for signals: {e}"))?;
        let (Some(1), Some(control)) = (woken, &names.control) else {
            let signal = signals.wait().map_err(|e| err!("cannot wait for signals: {e}"))?;
            if i32::try_from(signal) != Ok(libc::SIGUSR1) {
                break signal;
            }
            session.look_at_storage();
            continue;
        };
        let names = (control, names.metrics.as_ref(), names.pidfile.as_ref(), &manager);
        match predecessor::attend(names, session, signals) {
            Outcome::Serving => {}
            Outcome::HandedOver(pid) => {
                manager.notify(&format!("MAINPID={pid}"));
                return Ok((ExitCode::SUCCESS, true));
            }
            Outcome::Signal(signal) => break signal,
        }
    };
    log::info!("signal {signal}: stopping");
    manager.notify("STOPPING=1");
    Ok((ExitCode::SUCCESS, false))
}

/// Prints to the standard output.
fn print(text: &str) -> Result<ExitCode> {
    let printed = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
    printed.map_err(|e| Error::new(format!("cannot print: {e}")))?;
    Ok(ExitCode::SUCCESS)
}
