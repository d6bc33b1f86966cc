//! The command line of `check`: `getopt_long`'s rules and `qemu-img`'s words.
#![forbid(unsafe_code)]

use super::COMMAND;
use crate::block::drivers::qcow2::check::Fix;
use crate::cli::help::PROGRAM;
use crate::err;
use crate::error::{Error, Result};

/// What the user asked for.
#[derive(Default)]
pub(super) struct Wish {
    format: Option<String>,
    repair: Option<String>,
    output: Option<String>,
    cache: Option<String>,
    quiet: bool,
    share: bool,
    image_opts: bool,
    pub(super) help: bool,
    names: Vec<String>,
}

/// Where an option's argument, or the fact that it was given, is noted.
enum Place<'a> {
    Flag(&'a mut bool),
    Argument(&'a mut Option<String>),
}

impl Wish {
    fn place(&mut self, name: &str) -> Option<Place<'_>> {
        Some(match name {
            "help" => Place::Flag(&mut self.help),
            "quiet" => Place::Flag(&mut self.quiet),
            "force-share" => Place::Flag(&mut self.share),
            "image-opts" => Place::Flag(&mut self.image_opts),
            "format" => Place::Argument(&mut self.format),
            "repair" => Place::Argument(&mut self.repair),
            "output" => Place::Argument(&mut self.output),
            "cache" => Place::Argument(&mut self.cache),
            _ => return None,
        })
    }
}

/// Names of the options, and their letters.
const OPTIONS: [(&str, char); 8] = [
    ("help", 'h'),
    ("quiet", 'q'),
    ("force-share", 'U'),
    ("image-opts", '\0'),
    ("format", 'f'),
    ("repair", 'r'),
    ("output", '\0'),
    ("cache", 'T'),
];

pub(super) fn parse(args: &[String]) -> Result<Wish> {
    let mut wish = Wish::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if arg == "--" {
            wish.names.extend(args.by_ref().cloned());
        } else if let Some(long) = arg.strip_prefix("--") {
            parse_long(&mut wish, long, &mut args)?;
        } else if arg.len() > 1 && arg.starts_with('-') {
            parse_short(&mut wish, &arg[1..], &mut args)?;
        } else {
            wish.names.push(arg.clone());
        }
    }
    Ok(wish)
}

fn parse_long(wish: &mut Wish, long: &str, args: &mut std::slice::Iter<'_, String>) -> Result<()> {
    let (name, attached) = match long.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (long, None),
    };
    let fits = |(full, _): &&(&str, char)| full.starts_with(name);
    let mut found = OPTIONS.iter().filter(fits);
    let full = match (found.next(), found.next()) {
        (Some((full, _)), None) => *full,
        _ => OPTIONS
            .iter()
            .find(|(full, _)| *full == name)
            .map(|(full, _)| *full)
            .ok_or_else(|| err!("unrecognized option '--{long}'"))?,
    };
    match (wish.place(full), attached) {
        (Some(Place::Flag(_)), Some(_)) => {
            return Err(err!("option '--{full}' doesn't allow an argument"));
        }
        (Some(Place::Flag(flag)), None) => *flag = true,
        (Some(Place::Argument(to)), value) => {
            let value = value.map(str::to_owned).or_else(|| args.next().cloned());
            *to = Some(value.ok_or_else(|| err!("option '--{full}' requires an argument"))?);
        }
        (None, _) => {}
    }
    Ok(())
}

fn parse_short(
    wish: &mut Wish,
    letters: &str,
    args: &mut std::slice::Iter<'_, String>,
) -> Result<()> {
    let mut rest = letters.chars();
    while let Some(letter) = rest.next() {
        let name = OPTIONS.iter().find(|(_, l)| *l == letter && letter != '\0');
        match name.and_then(|(name, _)| wish.place(name)) {
            None => return Err(err!("invalid option -- '{letter}'")),
            Some(Place::Flag(flag)) => *flag = true,
            Some(Place::Argument(to)) => {
                let attached = rest.as_str();
                let value = match attached {
                    "" => args.next().cloned(),
                    attached => Some(attached.to_owned()),
                };
                let missing = || err!("option requires an argument -- '{letter}'");
                *to = Some(value.ok_or_else(missing)?);
                return Ok(());
            }
        }
    }
    Ok(())
}

/// What the words of the command line come to.
pub(super) struct Job {
    /// The image, as the user names it.
    pub(super) name: String,
    /// What may be repaired.
    pub(super) fix: Fix,
    /// JSON rather than text.
    pub(super) json: bool,
    /// No output but errors.
    pub(super) quiet: bool,
    /// No locks.
    pub(super) share: bool,
    /// Past the page cache.
    pub(super) direct: bool,
    /// The name is a list of options.
    pub(super) image_opts: bool,
    /// The format, not probed.
    pub(super) format: Option<String>,
}

pub(super) fn job(wish: Wish) -> Result<Job> {
    let fix = match wish.repair.as_deref() {
        None => Fix::Nothing,
        Some("leaks") => Fix::Leaks,
        Some("all") => Fix::All,
        Some(word) => {
            return Err(hinted(err!("--repair (-r) expects 'leaks' or 'all' not '{word}'")));
        }
    };
    let json = match wish.output.as_deref() {
        None | Some("human") => false,
        Some("json") => true,
        Some(word) => {
            return Err(hinted(err!("--output expects 'human' or 'json' not '{word}'")));
        }
    };
    let direct = match wish.cache.as_deref() {
        None | Some("writeback" | "writethrough" | "unsafe") => false,
        Some("none" | "off" | "directsync") => true,
        Some(word) => return Err(err!("Invalid source cache option: {word}")),
    };
    let [name] = <[String; 1]>::try_from(wish.names)
        .map_err(|_| hinted(err!("Expecting one image file name")))?;
    if wish.image_opts && wish.format.is_some() {
        return Err(err!("--image-opts and --format are mutually exclusive"));
    }
    let (quiet, share, image_opts) = (wish.quiet, wish.share, wish.image_opts);
    Ok(Job { name, fix, json, quiet, share, direct, image_opts, format: wish.format })
}

pub(super) fn hinted(e: Error) -> Error {
    e.with_hint(format!("Try '{PROGRAM} {COMMAND} --help' for more info"))
}
