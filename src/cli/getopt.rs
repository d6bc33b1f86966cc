//! Cuts the command line into options: `getopt_long`'s rules and words, with its order kept.
//!
//! QEMU's system emulator takes its long options with one dash, qemu-storage-daemon only with two; here both work.
//! Names may be shortened: among QEMU's options first, so that what is a unique beginning there stays one here.
#![forbid(unsafe_code)]

use crate::err;
use crate::error::Result;

/// An option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opt {
    /// `--help`
    Help,
    /// `--version`
    Version,
    /// `--trace`
    Trace,
    /// `--blockdev`
    Blockdev,
    /// `--chardev`
    Chardev,
    /// `--daemonize`
    Daemonize,
    /// `--export`
    Export,
    /// `--monitor`
    Monitor,
    /// `--nbd-server`
    NbdServer,
    /// `--object`
    Object,
    /// `--pidfile`
    Pidfile,
    /// `--socket-path`
    SocketPath,
    /// `--fd`
    Fd,
    /// `--blk-file`
    BlkFile,
    /// `--format`
    Format,
    /// `--read-only`
    ReadOnly,
    /// `--print-capabilities`
    PrintCapabilities,
    /// `--node-name`
    NodeName,
    /// `--socket-mode`
    SocketMode,
    /// `--log-level`
    LogLevel,
    /// `--print-graph`
    PrintGraph,
    /// `--state-dir`
    StateDir,
    /// `--strict-formats`
    StrictFormats,
    /// `--sandbox`
    Sandbox,
    /// `--allow-path`
    AllowPath,
    /// `--user`
    User,
    /// `--group`
    Group,
    /// `--control`
    Control,
    /// `--take-over`
    TakeOver,
    /// `--metrics`
    Metrics,
}

/// Whether an option has an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Argument {
    None,
    Required,
    /// Only in the form `--option=argument`.
    Optional,
}

/// An option's name and nature.
struct Spec {
    name: &'static str,
    short: Option<char>,
    opt: Opt,
    argument: Argument,
}

const fn spec(name: &'static str, opt: Opt, argument: Argument) -> Spec {
    Spec { name, short: None, opt, argument }
}

const fn with_short(name: &'static str, short: char, opt: Opt, argument: Argument) -> Spec {
    Spec { name, short: Some(short), opt, argument }
}

/// The options of qemu-storage-daemon.
static QEMUS: &[Spec] = &[
    spec("blockdev", Opt::Blockdev, Argument::Required),
    spec("chardev", Opt::Chardev, Argument::Required),
    spec("daemonize", Opt::Daemonize, Argument::None),
    spec("export", Opt::Export, Argument::Required),
    with_short("help", 'h', Opt::Help, Argument::None),
    spec("monitor", Opt::Monitor, Argument::Required),
    spec("nbd-server", Opt::NbdServer, Argument::Required),
    spec("object", Opt::Object, Argument::Required),
    spec("pidfile", Opt::Pidfile, Argument::Required),
    with_short("trace", 'T', Opt::Trace, Argument::Required),
    with_short("version", 'V', Opt::Version, Argument::None),
];

/// The options that only this program has.
static OURS: &[Spec] = &[
    spec("socket-path", Opt::SocketPath, Argument::Required),
    spec("fd", Opt::Fd, Argument::Required),
    spec("blk-file", Opt::BlkFile, Argument::Required),
    spec("format", Opt::Format, Argument::Required),
    spec("read-only", Opt::ReadOnly, Argument::None),
    spec("print-capabilities", Opt::PrintCapabilities, Argument::None),
    spec("node-name", Opt::NodeName, Argument::Required),
    spec("socket-mode", Opt::SocketMode, Argument::Required),
    spec("log-level", Opt::LogLevel, Argument::Required),
    spec("print-graph", Opt::PrintGraph, Argument::Optional),
    spec("state-dir", Opt::StateDir, Argument::Required),
    spec("strict-formats", Opt::StrictFormats, Argument::None),
    spec("sandbox", Opt::Sandbox, Argument::Required),
    spec("allow-path", Opt::AllowPath, Argument::Required),
    spec("user", Opt::User, Argument::Required),
    spec("group", Opt::Group, Argument::Required),
    spec("control", Opt::Control, Argument::Required),
    spec("take-over", Opt::TakeOver, Argument::Required),
    spec("metrics", Opt::Metrics, Argument::Required),
];

/// One option as it stands on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Which; `None` for a word that is no option.
    pub opt: Option<Opt>,
    /// Its argument, or the word.
    pub value: Option<String>,
    /// How the user wrote it, for errors.
    pub text: String,
}

impl Item {
    /// The argument of an option that must have one.
    pub fn argument(&self) -> &str {
        self.value.as_deref().unwrap_or_default()
    }
}

/// Walks over the arguments of the program.
pub struct GetOpt<'a> {
    args: std::slice::Iter<'a, String>,
}

impl<'a> GetOpt<'a> {
    /// `args` without the program's name.
    pub fn new(args: &'a [String]) -> Self {
        GetOpt { args: args.iter() }
    }

    fn parse(&mut self, arg: &str) -> Result<Item> {
        if let Some(body) = arg.strip_prefix("--") {
            let name = body.split('=').next().unwrap_or_default();
            return self.long(arg, body, find(name, body)?);
        }
        let body = &arg[1..];
        let name = body.split('=').next().unwrap_or_default();
        if name.len() > 1
            && let Some(spec) = exact(name)
        {
            return self.long(arg, body, spec);
        }
        self.short(arg, body)
    }

    fn long(&mut self, arg: &str, body: &str, spec: &Spec) -> Result<Item> {
        let attached = body.split_once('=').map(|(_, value)| value);
        match (spec.argument, attached) {
            (Argument::None, Some(_)) => {
                Err(err!("option '--{}' doesn't allow an argument", spec.name))
            }
            (Argument::Required, None) => {
                let missing = || err!("option '--{}' requires an argument", spec.name);
                self.separate(arg, spec.opt).ok_or_else(missing)
            }
            _ => Ok(item(spec.opt, attached, arg)),
        }
    }

    fn short(&mut self, arg: &str, body: &str) -> Result<Item> {
        let letter = body.chars().next().unwrap_or_default();
        let Some(spec) = QEMUS.iter().find(|spec| spec.short == Some(letter)) else {
            return Err(err!("invalid option -- '{letter}'"));
        };
        let attached = &body[letter.len_utf8()..];
        match spec.argument {
            // Letters after -h and -V do not matter: these end the program.
            Argument::None => Ok(item(spec.opt, None, arg)),
            _ if attached.is_empty() => {
                let missing = || err!("option requires an argument -- '{letter}'");
                self.separate(arg, spec.opt).ok_or_else(missing)
            }
            _ => Ok(item(spec.opt, Some(attached), arg)),
        }
    }

    /// The option `opt`, written as `arg`, with the next word as its argument.
    fn separate(&mut self, arg: &str, opt: Opt) -> Option<Item> {
        let value = self.args.next()?;
        Some(Item { opt: Some(opt), value: Some(value.clone()), text: format!("{arg} {value}") })
    }
}

impl Iterator for GetOpt<'_> {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Result<Item>> {
        let arg = self.args.next()?;
        if arg == "--" {
            // What follows is not looked at, as in qemu-storage-daemon.
            self.args = [].iter();
            return None;
        }
        if !arg.starts_with('-') || arg == "-" {
            return Some(Ok(Item { opt: None, value: Some(arg.clone()), text: arg.clone() }));
        }
        Some(self.parse(arg))
    }
}

fn item(opt: Opt, value: Option<&str>, text: &str) -> Item {
    Item { opt: Some(opt), value: value.map(str::to_string), text: text.to_string() }
}

fn exact(name: &str) -> Option<&'static Spec> {
    QEMUS.iter().chain(OURS).find(|spec| spec.name == name)
}

/// The option called `name`, or beginning with it if only one does. `body` is the word without its dashes.
fn find(name: &str, body: &str) -> Result<&'static Spec> {
    if let Some(spec) = exact(name) {
        return Ok(spec);
    }
    for table in [QEMUS, OURS] {
        let fits: Vec<_> = table.iter().filter(|spec| spec.name.starts_with(name)).collect();
        match fits.as_slice() {
            [] => {}
            [spec] => return Ok(spec),
            several => {
                let list: String =
                    several.iter().map(|spec| format!(" '--{}'", spec.name)).collect();
                return Err(err!("option '--{body}' is ambiguous; possibilities:{list}"));
            }
        }
    }
    Err(err!("unrecognized option '--{body}'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Vec<Result<Item>> {
        let args: Vec<String> = args.iter().map(ToString::to_string).collect();
        GetOpt::new(&args).collect()
    }

    fn one(args: &[&str]) -> (Option<Opt>, Option<String>, String) {
        let mut items = parse(args);
        assert_eq!(items.len(), 1, "{args:?}");
        let item = items.remove(0).unwrap();
        (item.opt, item.value, item.text)
    }

    fn error(args: &[&str]) -> String {
        parse(args).remove(0).unwrap_err().message().to_string()
    }

    #[test]
    fn one_dash_or_two_attached_or_not() {
        let expected =
            |text: &str| (Some(Opt::Blockdev), Some("x=y".to_string()), text.to_string());
        for args in [
            &["--blockdev", "x=y"][..],
            &["--blockdev=x=y"],
            &["-blockdev", "x=y"],
            &["-blockdev=x=y"],
            &["--b", "x=y"],
        ] {
            assert_eq!(one(args), expected(&args.join(" ")));
        }
        assert_eq!(one(&["-Tx"]), (Some(Opt::Trace), Some("x".into()), "-Tx".into()));
        assert_eq!(one(&["-T", "x"]), (Some(Opt::Trace), Some("x".into()), "-T x".into()));
        assert_eq!(one(&["extra"]), (None, Some("extra".into()), "extra".into()));
        assert_eq!(one(&["--print-graph"]).1, None);
        assert_eq!(one(&["--print-graph=dot"]).1, Some("dot".into()));
        assert!(parse(&["--", "--bogus"]).is_empty());
    }

    #[test]
    fn errors_are_getopts() {
        for (args, expected) in [
            (&["--bogus=1"][..], "unrecognized option '--bogus=1'"),
            (&["-x"], "invalid option -- 'x'"),
            (&["-é"], "invalid option -- 'é'"),
            (&["--blockdev"], "option '--blockdev' requires an argument"),
            (&["--p"], "option '--pidfile' requires an argument"),
            (&["-T"], "option requires an argument -- 'T'"),
            (&["--help=1"], "option '--help' doesn't allow an argument"),
            (
                &["--s"],
                "option '--s' is ambiguous; possibilities: '--socket-path' '--socket-mode' '--state-dir' '--strict-formats' '--sandbox'",
            ),
        ] {
            assert_eq!(error(args), expected);
        }
    }
}
