//! The side that serves, until it is told that somebody else does.
#![forbid(unsafe_code)]

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::time::Instant;

use serde_json::json;

use super::pause::Paused;
use super::wire::{Kind, Peer};
use super::{
    ACTIVATE_LIMIT, Control, PAUSE_LIMIT, PREPARE_LIMIT, REPORT, RETRY, TALK_LIMIT, VERSIONS,
    check_peer, save_place,
};
use crate::cli::daemon::{Manager, Pidfile};
use crate::cli::metrics::Metrics;
use crate::cli::session::Session;
use crate::err;
use crate::error::Result;
use crate::sys::{self, Signals};
use crate::vhost_user::parcel::{Parcel, list, number};

/// What came of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// We serve, as before.
    Serving,
    /// A successor serves. All that is left is to end, and to leave all names where they are.
    HandedOver(i32),
    /// A signal that ends the program.
    Signal(u32),
}

/// What has a name beside the exports' sockets, and the service manager.
type Names<'a> = (&'a Control, Option<&'a Metrics>, Option<&'a Pidfile>, &'a Manager);

/// Somebody has connected to the control socket.
pub fn attend(names: Names<'_>, session: &mut Session, signals: &Signals) -> Outcome {
    let control = names.0;
    let stream = match control.listener.accept() {
        Ok((stream, _)) => stream,
        Err(e) => {
            if e.kind() != ErrorKind::WouldBlock {
                log::warn!("take-over: {e}");
                // For want of descriptors: nobody must burn a core for that.
                std::thread::sleep(RETRY);
            }
            return Outcome::Serving;
        }
    };
    let refused = check_peer(&stream);
    let mut peer = match Peer::new(stream) {
        Ok(peer) => peer,
        Err(e) => {
            log::warn!("take-over: {e}");
            return Outcome::Serving;
        }
    };
    let mut ended = None;
    let outcome = refused
        .and_then(|()| prepare(&mut peer, names, session, signals))
        .and_then(|pid| hand_over(&mut peer, session, (signals, &mut ended)).map(|()| pid));
    match outcome {
        Ok(pid) => Outcome::HandedOver(pid),
        Err(e) => {
            log::warn!("take-over refused or failed, going on: {e}");
            peer.fail(e.message());
            ended.map_or(Outcome::Serving, Outcome::Signal)
        }
    }
}

/// Everything that happens while guests are served. The successor's process number.
fn prepare(
    peer: &mut Peer,
    (control, metrics, pidfile, manager): Names<'_>,
    session: &Session,
    signals: &Signals,
) -> Result<i32> {
    let signals = Some(signals.as_fd());
    let within = |limit| Instant::now() + limit;
    let hello = peer.expect(Kind::Hello, within(TALK_LIMIT), signals)?.body;
    let theirs: Vec<_> = list(&hello, "versions")?.iter().filter_map(|v| v.as_u64()).collect();
    let [from, to] = VERSIONS;
    let version = match theirs.as_slice() {
        [first, last] if *first <= to && *last >= from => to.min(*last),
        _ => return Err(err!("the successor speaks versions {theirs:?}, not {from} to {to}")),
    };
    let mut config = Parcel::default();
    let listener = config.put(control.listener.as_fd())?;
    let metrics = match metrics {
        None => json!(null),
        Some(metrics) => {
            let listener = config.put(metrics.listener())?;
            json!({"listener": listener, "place": save_place(metrics.place())})
        }
    };
    let pidfile = match pidfile {
        None => json!(null),
        Some(pidfile) => {
            let (path, file) = pidfile.parts();
            json!({"path": path, "file": config.put(file.as_fd())?})
        }
    };
    let manager = config.put_if(manager.socket())?;
    config.body = json!({
        "version": version,
        "args": control.args,
        "directory": control.directory,
        "exports": session.places(),
        "control": {"listener": listener, "place": save_place(Some(&control.place))},
        "metrics": metrics,
        "pidfile": pidfile,
        "manager": manager,
    });
    peer.send(Kind::Config, &config)?;
    let ready = peer.expect(Kind::Ready, within(PREPARE_LIMIT), signals)?.body;
    number::<u32>(&ready, "pid")?.try_into().map_err(|_| err!("no process number"))
}

/// From the pause to the point of no return, or back.
fn hand_over(
    peer: &mut Peer,
    session: &mut Session,
    (signals, ended): (&Signals, &mut Option<u32>),
) -> Result<()> {
    let mut paused = Paused::default();
    let start = Instant::now();
    let result = session.check_pausable().and_then(|()| {
        let parcels = session.pause(&mut paused, start + PAUSE_LIMIT)?;
        log::info!("take-over: paused after {:?}", start.elapsed());
        parcels.iter().try_for_each(|parcel| peer.send(Kind::Export, parcel))?;
        peer.expect(Kind::Activated, Instant::now() + ACTIVATE_LIMIT, Some(signals.as_fd()))?;
        peer.send(Kind::Go, &Parcel::default())
    });
    match result {
        Ok(()) => {
            log::info!("take-over: handed over after {:?}", start.elapsed());
            paused.end();
        }
        Err(e) => {
            if paused.is_begun() {
                log::warn!("take-over: {e}");
                peer.fail(e.message());
                *ended = go_on(peer, session, paused, signals);
                log::warn!("take-over: guests go on after {:?}", start.elapsed());
            }
            return Err(e);
        }
    }
    Ok(())
}

/// The successor has failed: serves again, as soon as it is gone; or ends, for this signal.
fn go_on(
    peer: &mut Peer,
    session: &mut Session,
    mut paused: Paused,
    signals: &Signals,
) -> Option<u32> {
    if let Some(signal) = peer.wait_until_gone(signals) {
        // Who ends with closed images has nothing to lose.
        paused.end();
        return Some(signal);
    }
    let mut report = Instant::now();
    while let Err(e) = session.reopen(&mut paused) {
        if Instant::now() >= report {
            log::error!("guests wait: {e}");
            report = Instant::now() + REPORT;
        }
        let woken = sys::wait_readable(&[signals.as_fd()], Some(Instant::now() + RETRY));
        if let Ok(Some(_)) = woken
            && let Some(signal) = end_signal(signals)
        {
            paused.end();
            return Some(signal);
        }
    }
    paused.resume();
    None
}

/// The signal that is there to be read, if it ends the program. The other one asks for what opening an image does anyway.
pub(super) fn end_signal(signals: &Signals) -> Option<u32> {
    signals.wait().ok().filter(|signal| i32::try_from(*signal) != Ok(libc::SIGUSR1))
}
