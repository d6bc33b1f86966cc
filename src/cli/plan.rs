//! The first pass over the command line: everything that must be known before the first node is opened.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::exports::Defaults;
use super::getopt::{GetOpt, Item, Opt};
use super::help;
use crate::block::print::Format;
use crate::err;
use crate::error::{Errno, Result};
use crate::metrics::address::Address;
use crate::sandbox::privileges::Identity;

/// What the program is to do.
pub enum Plan {
    /// Print this and end.
    Print(String),
    /// Serve.
    Serve(Box<Settings>),
}

/// Settings that do not depend on the order of the options.
#[derive(Debug, Default)]
pub struct Settings {
    /// The arguments themselves.
    pub args: Vec<String>,
    /// All options, in order.
    pub items: Vec<Item>,
    /// Go to the background.
    pub daemonize: bool,
    /// Where the process number goes.
    pub pidfile: Option<String>,
    /// `--state-dir`.
    pub state_dir: Option<String>,
    /// Where successors ask.
    pub control: Option<String>,
    /// Where metrics are served.
    pub metrics: Option<Address>,
    /// Where the predecessor listens.
    pub take_over: Option<String>,
    /// What is logged, in env_logger's language.
    pub log_level: Option<String>,
    /// Print the graph in this format, and end.
    pub print_graph: Option<Format>,
    /// What holds for all exports.
    pub exports: Defaults,
    /// `--socket-path`, as written.
    pub socket_path: Option<Item>,
    /// `--fd`, as written.
    pub fd: Option<Item>,
    /// `--blk-file`, as written.
    pub blk_file: Option<Item>,
    /// `--format`.
    pub format: Option<String>,
    /// `--node-name`, as written.
    pub node_name: Option<Item>,
    /// `--read-only`.
    pub read_only: bool,
    /// `--sandbox=off`.
    pub unconfined: bool,
    /// `--allow-path`, each absolute: a daemon changes its directory.
    pub allow: Vec<PathBuf>,
    /// `--user`.
    pub user: Option<String>,
    /// `--group`.
    pub group: Option<String>,
    /// Who these are.
    pub identity: Identity,
}

impl Plan {
    /// Reads `args`, the arguments without the program's name.
    ///
    /// # Errors
    /// An option that does not exist or is not used as it should be, in getopt's words.
    pub fn read(args: &[String]) -> Result<Plan> {
        let mut settings = Settings { args: args.to_vec(), ..Settings::default() };
        let mut exports = 0;
        // Whoever asks for capabilities is told them, whatever else is on the command line.
        if args.iter().any(|arg| arg == "--print-capabilities") {
            return Ok(Plan::Print(help::CAPABILITIES.to_string()));
        }
        for item in GetOpt::new(args) {
            let item = item?;
            match item.opt {
                Some(Opt::Help) => return Ok(Plan::Print(help::HELP.to_string())),
                Some(Opt::Version) => return Ok(Plan::Print(help::version())),
                Some(Opt::PrintCapabilities) => {
                    return Ok(Plan::Print(help::CAPABILITIES.to_string()));
                }
                Some(Opt::Export) => exports += 1,
                _ => settings.note(&item).map_err(|e| e.prepend(format!("{}: ", item.text)))?,
            }
            settings.items.push(item);
        }
        settings.exports.several = exports > 1;
        settings.check()?;
        settings.identity = Identity::find(settings.user.as_deref(), settings.group.as_deref())?;
        Ok(Plan::Serve(Box::new(settings)))
    }
}

impl Settings {
    /// Keeps what `item` says, if it is one of ours.
    fn note(&mut self, item: &Item) -> Result<()> {
        let value = || item.value.clone();
        match item.opt {
            Some(Opt::Daemonize) => self.daemonize = true,
            Some(Opt::StateDir) => self.state_dir = value(),
            Some(Opt::Pidfile) => self.pidfile = value(),
            Some(Opt::Control) => self.control = value(),
            Some(Opt::TakeOver) => self.take_over = value(),
            Some(Opt::Metrics) => self.metrics = Some(Address::parse(item.argument())?),
            Some(Opt::LogLevel) => {
                check_log_level(item.argument())?;
                self.log_level = value();
            }
            Some(Opt::SocketMode) => self.exports.socket_mode = Some(parse_mode(item.argument())?),
            Some(Opt::PrintGraph) => self.print_graph = Some(parse_format(item.value.as_deref())?),
            Some(Opt::SocketPath) => self.socket_path = Some(item.clone()),
            Some(Opt::Fd) => self.fd = Some(item.clone()),
            Some(Opt::BlkFile) => self.blk_file = Some(item.clone()),
            Some(Opt::NodeName) => self.node_name = Some(item.clone()),
            Some(Opt::Format) => self.format = value(),
            Some(Opt::ReadOnly) => self.read_only = true,
            Some(Opt::Sandbox) => self.unconfined = !parse_switch(item.argument())?,
            Some(Opt::AllowPath) => self.allow.push(existing(item.argument())?),
            Some(Opt::User) => self.user = value(),
            Some(Opt::Group) => self.group = value(),
            _ => {}
        }
        Ok(())
    }

    /// Options that need, or exclude, each other.
    fn check(&self) -> Result<()> {
        if self.take_over.is_some() {
            let own = [Opt::TakeOver, Opt::Daemonize, Opt::LogLevel].map(Some);
            return match self.items.iter().find(|item| !own.contains(&item.opt)) {
                Some(item) => {
                    Err(err!("{}: --take-over serves what the predecessor serves", item.text))
                }
                None => Ok(()),
            };
        }
        if self.fd.is_some() && self.socket_path.is_some() {
            return Err(err!("--fd and --socket-path exclude each other"));
        }
        let endpoint = self.fd.is_some() || self.socket_path.is_some();
        if let (Some(item), false) = (&self.node_name, endpoint) {
            return Err(err!("{}: needs --socket-path or --fd", item.text));
        }
        if let (Some(item), false) = (&self.blk_file, endpoint || self.print_graph.is_some()) {
            return Err(err!("{}: needs --socket-path or --fd", item.text));
        }
        if self.format.is_some() && self.blk_file.is_none() {
            return Err(err!("--format needs --blk-file"));
        }
        if self.read_only && !endpoint {
            return Err(err!("--read-only needs --socket-path or --fd"));
        }
        Ok(())
    }
}

/// Permissions in octal.
fn parse_mode(text: &str) -> Result<u32> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if mode <= 0o777 && !digits.starts_with('+') => Ok(mode),
        _ => Err(err!("expected permissions in octal, such as 0660")),
    }
}

fn parse_switch(text: &str) -> Result<bool> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(err!("expected on or off")),
    }
}

/// The absolute path of something that is there.
fn existing(path: &str) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|e| err!("{}", Errno::from(e)))
}

fn parse_format(text: Option<&str>) -> Result<Format> {
    match text {
        None | Some("text") => Ok(Format::Text),
        Some("json") => Ok(Format::Json),
        Some("dot") => Ok(Format::Dot),
        Some(_) => Err(err!("expected text, json or dot")),
    }
}

/// A level, or `module=level`, or several of them: `env_logger` would only print a warning of its own.
fn check_log_level(text: &str) -> Result<()> {
    let level = |part: &str| {
        part.rsplit('=').next().unwrap_or_default().parse::<log::LevelFilter>().is_ok()
    };
    if text.split(',').all(level) {
        Ok(())
    } else {
        Err(err!("expected error, warn, info, debug, trace or off"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str]) -> Result<Plan> {
        Plan::read(&args.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    fn settings(args: &[&str]) -> Settings {
        match read(args).unwrap() {
            Plan::Serve(settings) => *settings,
            Plan::Print(text) => panic!("prints {text}"),
        }
    }

    fn error(args: &[&str]) -> String {
        read(args).err().expect("an error").message().to_string()
    }

    #[test]
    fn settings_are_collected() {
        let settings = settings(&[
            "--socket-mode=0660",
            "--print-graph=dot",
            "--log-level=info",
            "--export=a",
            "--export=b",
            "--pidfile=x",
        ]);
        assert_eq!(settings.exports.socket_mode, Some(0o660));
        assert_eq!(settings.print_graph, Some(Format::Dot));
        assert!(settings.exports.several);
        assert_eq!(settings.items.len(), 6);
    }

    #[test]
    fn what_ends_the_program_wins() {
        assert!(matches!(read(&["--help", "--bogus"]), Ok(Plan::Print(_))));
        assert!(matches!(read(&["--bogus", "--print-capabilities"]), Ok(Plan::Print(_))));
        assert_eq!(error(&["--bogus", "--help"]), "unrecognized option '--bogus'");
    }

    #[test]
    fn settings_are_checked() {
        assert!(error(&["--socket-mode=888"]).starts_with("--socket-mode=888: expected"));
        assert!(error(&["--socket-mode=7777"]).contains("expected"));
        assert!(error(&["--print-graph=x"]).contains("expected text"));
        assert!(error(&["--log-level=loud"]).contains("expected error"));
        assert!(error(&["--blk-file=x"]).contains("needs --socket-path"));
        assert!(error(&["--fd=3", "--socket-path=x"]).contains("exclude"));
        assert!(error(&["--take-over=x", "--blockdev=y"]).starts_with("--blockdev=y: --take-over"));
        assert!(read(&["--take-over=x", "--daemonize", "--log-level=info"]).is_ok());
    }
}
