//! The side that is going to serve.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use super::pause::Paused;
use super::wire::{Kind, Peer};
use super::{Control, PREPARE_LIMIT, TALK_LIMIT, VERSIONS, check_peer};
use crate::cli::daemon::Pidfile;
use crate::cli::getopt::Opt;
use crate::cli::listen::Place;
use crate::cli::metrics::Metrics;
use crate::cli::plan::{Plan, Settings};
use crate::cli::session::Session;
use crate::err;
use crate::error::Result;
use crate::metrics::address::Address;
use crate::metrics::server::Listener;
use crate::sys::Signals;
use crate::vhost_user::parcel::{Parcel, list, number, text};

/// A predecessor that has said what it serves, and serves on.
pub struct Takeover {
    peer: Peer,
    config: Parcel,
    directory: PathBuf,
}

/// What a successor has besides its session, when it serves.
pub struct Inherited {
    /// For its own successor.
    pub control: Control,
    /// Where metrics are served.
    pub metrics: Option<Metrics>,
    /// Still with the predecessor's number in it.
    pub pidfile: Option<Pidfile>,
}

/// Asks the process that listens at `path`, and makes its command line ours, with what `own` adds to it.
///
/// # Errors
/// There is none, it refuses, or belongs to somebody else.
pub fn ask(path: &str, own: &Settings, signals: &Signals) -> Result<(Takeover, Box<Settings>)> {
    let stream = UnixStream::connect(path).map_err(|e| err!("{path}: {e}"))?;
    check_peer(&stream)?;
    let mut peer = Peer::new(stream)?;
    let body = json!({
        "versions": VERSIONS, "program": crate::cli::help::version().trim(), "pid": std::process::id(),
    });
    peer.send(Kind::Hello, &body.into())?;
    let config = peer.expect(Kind::Config, Instant::now() + TALK_LIMIT, Some(signals.as_fd()))?;
    let version: u64 = number(&config.body, "version")?;
    if !(VERSIONS[0]..=VERSIONS[1]).contains(&version) {
        return Err(err!("the predecessor wants version {version}"));
    }
    let args = list(&config.body, "args")?.iter().map(|arg| arg.as_str().map(str::to_owned));
    let args: Option<Vec<String>> = args.collect();
    let mut args = args.ok_or_else(|| err!("arguments that are no text"))?;
    for item in &own.items {
        match item.opt {
            Some(Opt::LogLevel) => args.push(format!("--log-level={}", item.argument())),
            Some(Opt::Daemonize) => args.push("--daemonize".into()),
            _ => {}
        }
    }
    // Before its command line is read: `--allow-path` is looked up at once.
    let directory = PathBuf::from(text(&config.body, "directory")?);
    std::env::set_current_dir(&directory).map_err(|e| err!("{}: {e}", directory.display()))?;
    let Plan::Serve(settings) = Plan::read(&args)? else {
        return Err(err!("the predecessor's command line serves nothing"));
    };
    Ok((Takeover { peer, config, directory }, settings))
}

impl Takeover {
    /// The predecessor's connection to the service manager. A predecessor may be so old that it gives none.
    pub fn manager(&mut self) -> Option<OwnedFd> {
        let place = self.config.body["manager"].take();
        self.config.take_if(&place).unwrap_or_default()
    }

    /// The directories of the names that will be ours.
    pub fn dirs(&self) -> Vec<PathBuf> {
        let body = &self.config.body;
        let exports = body["exports"].as_array().into_iter().flatten();
        let places =
            exports.chain([&body["control"]["place"], &body["metrics"]["place"], &body["pidfile"]]);
        let paths = places.filter_map(|place| place["path"].as_str());
        paths.filter_map(|path| Path::new(path).parent()).map(Path::to_path_buf).collect()
    }

    /// Serves with `session`, which has processed the predecessor's command line, where the predecessor has stopped.
    ///
    /// # Errors
    /// Something fails: the predecessor goes on when [`Takeover::fail`] has told it, or this process has ended.
    pub fn take(
        &mut self,
        session: &mut Session,
        settings: &Settings,
        signals: BorrowedFd<'_>,
    ) -> Result<Inherited> {
        session.check_openable()?;
        let ready = json!({"pid": std::process::id()});
        self.peer.send(Kind::Ready, &ready.into())?;
        let mut exports = Vec::new();
        for _ in list(&self.config.body, "exports")? {
            exports.push(self.peer.expect(
                Kind::Export,
                Instant::now() + PREPARE_LIMIT,
                Some(signals),
            )?);
        }
        let mut paused = Paused::default();
        session.adopt(exports, &mut paused, Instant::now() + TALK_LIMIT)?;
        // All that may fail comes before GO.
        let (control, metrics, pidfile, places) = self.names(settings)?;
        self.peer.send(Kind::Activated, &Parcel::default())?;
        // Without it, servers that only pause end with `paused`.
        self.peer.expect_go(signals)?;
        paused.resume();
        session.set_places(places.into_iter().map(|place| place.map(Name::ours)).collect());
        let (listener, place, args) = control;
        let directory = self.directory.clone();
        let control = Control { listener, place: place.ours(), args, directory };
        let metrics = metrics.map(|(l, place)| Metrics::adopt(l, place.map(Name::ours)));
        Ok(Inherited {
            control,
            metrics,
            pidfile: pidfile.map(|(path, file)| Pidfile::adopt(path, file)),
        })
    }

    /// The names that are ours after GO.
    #[expect(clippy::type_complexity, reason = "taken apart by its one user")]
    fn names(
        &mut self,
        settings: &Settings,
    ) -> Result<(
        (UnixListener, Name, Vec<String>),
        Option<(Listener, Option<Name>)>,
        Option<(PathBuf, File)>,
        Vec<Option<Name>>,
    )> {
        let body = std::mem::take(&mut self.config.body);
        let control = &body["control"];
        let listener = UnixListener::from(self.config.take(&control["listener"])?);
        let place = Name::parse(&control["place"])?;
        let place = place.ok_or_else(|| err!("a control socket without a place"))?;
        // A predecessor without them, of whichever version, has no socket for them.
        let metrics = match &body["metrics"] {
            Value::Null => None,
            there => {
                let fd = self.config.take(&there["listener"])?;
                let unix = !matches!(settings.metrics, Some(Address::Port(_)));
                Some((Listener::from_fd(fd, unix), Name::parse(&there["place"])?))
            }
        };
        let pidfile = match &body["pidfile"] {
            Value::Null => None,
            there => {
                let file = File::from(self.config.take(&there["file"])?);
                Some((PathBuf::from(text(there, "path")?), file))
            }
        };
        let places = list(&body, "exports")?.iter().map(Name::parse).collect::<Result<_>>()?;
        Ok(((listener, place, settings.args.clone()), metrics, pidfile, places))
    }

    /// Tells the predecessor to go on. To be called when all images are closed.
    pub fn fail(mut self, why: &str) {
        self.peer.fail(why);
    }
}

/// A place that is not ours yet.
struct Name {
    path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Name {
    fn parse(from: &Value) -> Result<Option<Name>> {
        if from.is_null() {
            return Ok(None);
        }
        let (dev, ino) = (number(from, "dev")?, number(from, "ino")?);
        Ok(Some(Name { path: text(from, "path")?.into(), dev, ino }))
    }

    fn ours(self) -> Place {
        Place::adopt(self.path, self.dev, self.ino)
    }
}
