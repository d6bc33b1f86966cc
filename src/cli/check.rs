//! `vhost-user-blk check`: `qemu-img check` with its options, its output and its exit codes.
//!
//! Only the image file itself is opened, with the locks that `qemu-img` takes: shared for a check, exclusive for a
//! repair. Backing and data files are not needed, so they need not be there.
#![forbid(unsafe_code)]

mod screen;
mod words;

use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::process::ExitCode;
use std::sync::Arc;

use screen::{Screen, as_json, as_text};
use serde_json::{Value, json};
use words::{Job, hinted, job, parse};

use super::help::PROGRAM;
use crate::block::drivers;
use crate::block::drivers::qcow2::check::{self, Fix, Report};
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
            if fix != Fix::Nothing
                && check::give_up_journal(node, &header)
                    .await
                    .map_err(|e| Error::from_errno("Could not update qcow2 header", e))?
            {
                eprintln!(
                    "{PROGRAM}: the program that had this image open was killed: what it has not \
                     written is given up"
                );
            }
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
