//! `vhost-user-blk check`: `qemu-img check` with its options, its output and its exit codes.
//!
//! Only the image file itself is opened, with the locks that `qemu-img` takes: shared for a check, exclusive for a
//! repair. Backing and data files are not needed, so they need not be there.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::os::unix::fs::FileTypeExt;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::help::PROGRAM;
use crate::block::drivers;
use crate::block::drivers::qcow2::check::{self, Fix, Report, Watch};
use crate::block::drivers::qcow2::header::MAGIC;
use crate::block::perm::{ChildPermQuery, Perms, default_child_perms};
use crate::block::{Graph, Node, Op, Role};
use crate::error::{Errno, Error, Result};
use crate::mem::Sg;
use crate::qapi::{Input, Options, keyval};
use crate::rt::{self, Buffer};
use crate::{err, qapi};

/// The word on the command line.
pub const COMMAND: &str = "check";

const HELP: &str = "\
Usage: vhost-user-blk check [-f FMT | --image-opts] [-T CACHE_MODE] [-r leaks|all] [-q] [-U]
        [--output human|json] FILENAME
Checks the metadata of a qcow2 image, and repairs it.

  -f, --format FMT           the image's format, not probed
  --image-opts               FILENAME is options: driver=qcow2,file.filename=...
  -T, --cache CACHE_MODE     writeback, none, ... (writeback)
  -r, --repair leaks|all     repair leaked clusters, or whatever can be repaired
  -q, --quiet                no output but errors
  -U, --force-share          do not lock the image (not with -r)
  --output human|json        form of the output (human)
  -h, --help                 print this

Exit codes: 0 good, 1 not checked, 2 corrupt, 3 leaks but good otherwise, 63 the format has no
checks. Close the image in virtual machines before a repair.
";

/// Exit codes of `qemu-img check`.
const FAILED: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const NOT_SUPPORTED: u8 = 63;

/// What the user asked for.
#[derive(Default)]
struct Wish {
    format: Option<String>,
    repair: Option<String>,
    output: Option<String>,
    cache: Option<String>,
    quiet: bool,
    share: bool,
    image_opts: bool,
    help: bool,
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

fn parse(args: &[String]) -> Result<Wish> {
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
struct Job {
    name: String,
    fix: Fix,
    json: bool,
    quiet: bool,
    share: bool,
    direct: bool,
    image_opts: bool,
    format: Option<String>,
}

fn job(wish: Wish) -> Result<Job> {
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

fn hinted(e: Error) -> Error {
    e.with_hint(format!("Try '{PROGRAM} {COMMAND} --help' for more info"))
}

/// Runs the command with the words after its name.
pub fn main(args: &[String]) -> ExitCode {
    let wish = match parse(args) {
        Ok(wish) => wish,
        Err(e) => return complain(&hinted(e.prepend(format!("{COMMAND}: "))), FAILED),
    };
    if wish.help {
        return out(HELP).map_or_else(|e| complain(&e, FAILED), |()| ExitCode::SUCCESS);
    }
    let _ = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("error"))
        .try_init();
    match job(wish).and_then(|job| run(&job)) {
        Ok(code) => ExitCode::from(code),
        Err(e) => complain(&e, FAILED),
    }
}

fn complain(e: &Error, code: u8) -> ExitCode {
    let hint = e.hint().map(|hint| format!("{hint}\n")).unwrap_or_default();
    eprint!("{PROGRAM}: {e}\n{hint}");
    ExitCode::from(code)
}

fn out(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout();
    let printed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    printed.map_err(|e| err!("cannot print: {e}"))
}

/// Opens the image, checks it and says what was found.
fn run(job: &Job) -> Result<u8> {
    let cannot = |e: Error| e.prepend(format!("Could not open '{}': ", job.name));
    let (format, file) = definition(job).map_err(cannot)?;
    let known = |name: &str| name == "qcow2" || drivers::TABLE.iter().any(|def| def.name == name);
    if let Some(format) = format.as_deref().filter(|format| !known(format)) {
        return Err(cannot(err!("Unknown driver '{format}'")));
    }
    let graph = Graph::new();
    let node = graph.add(file).map_err(cannot)?;
    let write = job.fix != Fix::Nothing;
    let node_perms = Perms::device(write);
    let query = ChildPermQuery { role: Role::File, node: node_perms, read_only: !write };
    let mut perms = default_child_perms(&query);
    if job.share {
        perms.shared = Perms::NONE.shared;
    }
    let user = graph.attach_root(&node, "an image check", perms).map_err(cannot)?;
    let format = match format {
        Some(format) => format,
        None => rt::block_on(probe(&node)).map_err(cannot)?.to_owned(),
    };
    if format != "qcow2" {
        return Ok(not_supported());
    }
    let code = check_qcow2(job, &node);
    graph.detach(user);
    drop(node);
    graph.close();
    code
}

fn not_supported() -> u8 {
    eprintln!("{PROGRAM}: This image format does not support checks");
    NOT_SUPPORTED
}

/// The image's format, if the user told it, and the options of its file's node.
fn definition(job: &Job) -> Result<(Option<String>, Options)> {
    let (format, file) = if job.image_opts {
        split(keyval::parse(&job.name, None)?.tree, true)?
    } else if let Some(text) = job.name.strip_prefix("json:") {
        let Value::Object(tree) = qapi::json::parse(text)? else {
            return Err(err!("Could not parse the JSON options"));
        };
        split(tree, false)?
    } else {
        (job.format.clone(), file_options(&job.name)?)
    };
    let mut file = file;
    for (key, value) in generic(job) {
        file.entry(key).or_insert(value);
    }
    if job.share && job.fix != Fix::Nothing {
        return Err(err!("force-share=on can only be used with read-only images"));
    }
    Ok((format, file))
}

/// The options that the command itself gives.
fn generic(job: &Job) -> Vec<(&'static str, Value)> {
    let read_only = job.fix == Fix::Nothing;
    let mut list = vec![
        ("node-name", json!("image")),
        ("read-only", json!(read_only)),
        ("discard", json!("unmap")),
        ("force-share", json!(job.share)),
    ];
    if job.direct {
        list.push(("cache", json!({ "direct": true })));
    }
    list
}

/// The format and the file's options out of an image's options.
fn split(mut tree: Options, words: bool) -> Result<(Option<String>, Options)> {
    let format = match tree.shift_remove("driver") {
        Some(Value::String(name)) => Some(name),
        _ => None,
    };
    let Some(Value::Object(mut file)) = tree.shift_remove("file") else {
        // No layer of a format: the options of the file itself.
        return match format.as_deref() {
            Some("file" | "host_device") | None => {
                let name = tree.get("filename").and_then(Value::as_str).unwrap_or_default();
                Ok((None, file_options(name)?))
            }
            Some(_) => Err(err!("A block device must be specified for \"file\"")),
        };
    };
    if !file.contains_key("driver") {
        let name = file.get("filename").and_then(Value::as_str).unwrap_or_default();
        let driver = driver_for(name);
        file.insert("driver".to_owned(), json!(driver));
    }
    let input = if words { Input::from_keyval(file) } else { Input::from_json(file) };
    Ok((format, input.visit_blockdev()?))
}

fn driver_for(name: &str) -> &'static str {
    let device = std::fs::metadata(name)
        .is_ok_and(|m| m.file_type().is_block_device() || m.file_type().is_char_device());
    if device { "host_device" } else { "file" }
}

/// The options for a file name as the user writes it, perhaps with a protocol in front.
fn file_options(name: &str) -> Result<Options> {
    let path = match name.split_once(':') {
        Some(("file", path)) => path,
        Some((protocol, _)) if !protocol.contains('/') => {
            return Err(err!("Unknown protocol '{protocol}'"));
        }
        _ => name,
    };
    let Value::Object(options) = json!({ "driver": driver_for(path), "filename": path }) else {
        return Err(err!("no options"));
    };
    Ok(options)
}

/// The format by the first bytes of an image.
async fn probe(node: &Node) -> Result<&'static str> {
    let buffer = Buffer::new(512, 4096);
    if node.len() >= 512 {
        let iov = [buffer.iovec()];
        let read = node.submit(Op::Read { offset: 0, to: Sg::new(&iov) }).await;
        read.map_err(|e| Error::from_errno("Could not read image for determining its format", e))?;
    }
    let bytes = buffer.bytes();
    let version = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    let qcow2 = bytes[..4] == MAGIC.to_be_bytes() && version >= 2;
    Ok(if qcow2 { "qcow2" } else { "raw" })
}

fn check_qcow2(job: &Job, node: &Arc<Node>) -> Result<u8> {
    let mut screen = Screen::new(job.quiet);
    let once = |fix, screen: &mut Screen| -> Result<std::result::Result<Report, Errno>> {
        rt::block_on(async {
            let header = check::read_header(node).await;
            let header =
                header.map_err(|e| e.prepend(format!("Could not open '{}': ", job.name)))?;
            Ok(check::check(node, &header, fix, screen).await)
        })
    };
    let mut result = once(job.fix, &mut screen)?;
    screen.clear();
    if let Ok(first) = result
        && first.corruptions_fixed + first.leaks_fixed > 0
    {
        if !job.json && !job.quiet {
            out(&format!(
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} \
                 corruptions\n\nDouble checking the fixed image now...\n",
                first.leaks_fixed, first.corruptions_fixed
            ))?;
        }
        result = once(Fix::Nothing, &mut screen)?.map(|second| Report {
            leaks_fixed: first.leaks_fixed,
            corruptions_fixed: first.corruptions_fixed,
            ..second
        });
        screen.clear();
    }
    let report = match result {
        Ok(report) => report,
        Err(e) => return Err(Error::from_errno("Check failed", e)),
    };
    if !job.quiet {
        out(&if job.json { as_json(&job.name, &report) } else { as_text(&report) })?;
    }
    if report.check_errors > 0 {
        return Err(err!("Check failed"));
    }
    Ok(match report {
        Report { corruptions: 1.., .. } => CORRUPT,
        Report { leaks: 1.., .. } => LEAKS,
        _ => 0,
    })
}

fn as_text(report: &Report) -> String {
    let mut text = String::new();
    if report.is_clean() {
        text += "No errors were found on the image.\n";
    }
    let findings = [
        (
            report.corruptions,
            "errors were found on the image.\nData may be corrupted, or further writes to the image \
             may corrupt it.",
        ),
        (
            report.leaks,
            "leaked clusters were found on the image.\nThis means waste of disk space, but no harm \
             to data.",
        ),
        (report.check_errors, "internal errors have occurred during the check."),
    ];
    for (count, what) in findings.iter().filter(|(count, _)| *count > 0) {
        text += &format!("\n{count} {what}\n");
    }
    if report.total_clusters != 0 && report.allocated_clusters != 0 {
        let percent = |part: u64, of: u64| part as f64 * 100.0 / of as f64;
        let (allocated, total) = (report.allocated_clusters, report.total_clusters);
        text += &format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated)
        );
    }
    if report.image_end_offset > 0 {
        text += &format!("Image end offset: {}\n", report.image_end_offset);
    }
    text
}

/// The fields in the order in which QEMU's hash table has them. Those that are 0 are left out, but for one.
fn as_json(name: &str, report: &Report) -> String {
    let fields: [(&str, Value); 12] = [
        ("image-end-offset", report.image_end_offset.into()),
        ("compressed-clusters", report.compressed_clusters.into()),
        ("total-clusters", report.total_clusters.into()),
        ("corruptions", report.corruptions.into()),
        ("corruptions-fixed", report.corruptions_fixed.into()),
        ("check-errors", report.check_errors.into()),
        ("leaks", report.leaks.into()),
        ("leaks-fixed", report.leaks_fixed.into()),
        ("allocated-clusters", report.allocated_clusters.into()),
        ("filename", name.into()),
        ("format", "qcow2".into()),
        ("fragmented-clusters", report.fragmented_clusters.into()),
    ];
    let lines: Vec<String> = fields
        .iter()
        .filter(|(key, value)| *value != Value::from(0u64) || *key == "check-errors")
        .map(|(key, value)| format!("    \"{key}\": {value}"))
        .collect();
    format!("{{\n{}\n}}\n", lines.join(",\n"))
}

/// The standard error: findings, and on a terminal how far the check is.
struct Screen {
    bar: bool,
    shown: bool,
    next: Instant,
}

/// How often the bar moves.
const BAR_INTERVAL: Duration = Duration::from_millis(100);
const BAR_WIDTH: u64 = 40;

impl Screen {
    fn new(quiet: bool) -> Screen {
        let bar = !quiet && std::io::stderr().is_terminal();
        Screen { bar, shown: false, next: Instant::now() + BAR_INTERVAL }
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            eprint!("\r\x1b[K");
        }
    }
}

impl Watch for Screen {
    fn line(&mut self, text: &str) {
        self.clear();
        eprintln!("{text}");
    }

    fn error(&mut self, text: &str) {
        self.line(&format!("{PROGRAM}: {text}"));
    }

    fn progress(&mut self, done: u64, total: u64) {
        if !self.bar || Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + BAR_INTERVAL;
        let full = (BAR_WIDTH * done / total.max(1)).min(BAR_WIDTH);
        let bar: String = (0..BAR_WIDTH).map(|i| if i < full { '#' } else { '.' }).collect();
        let percent = done as f64 * 100.0 / total.max(1) as f64;
        eprint!("\r[{bar}] {percent:6.2}%");
        self.shown = true;
    }
}
