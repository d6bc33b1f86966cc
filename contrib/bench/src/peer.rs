//! Other back ends, by a command of their own: `--peer 'NAME[:FORMAT,...]=COMMAND'`, with places for what
//! differs from case to case. The README has those of SPDK, ubiblk and cloud-hypervisor.

use std::path::Path;
use std::process::Command;

use crate::backend::Program;
use crate::cases::{Case, DISK};

/// Words a command may hold, and must in the case of the first.
const PLACES: [&str; 8] = ["socket", "image", "format", "queues", "size", "direct", "aio", "dir"];
/// What a peer serves unless it says so.
const DEFAULT_FORMATS: &str = "raw";

/// A command with places, run by `sh -c`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    formats: Vec<String>,
    command: String,
}

/// Reads `NAME[:FORMAT,...]=COMMAND`.
///
/// # Errors
/// What is wrong with it, in words.
pub fn parse(text: &str) -> Result<(String, Template), String> {
    let (head, command) = text
        .split_once('=')
        .ok_or_else(|| format!("--peer {text}: no '='; it is NAME[:FORMAT,...]=COMMAND"))?;
    let (name, formats) = head.split_once(':').unwrap_or((head, DEFAULT_FORMATS));
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || !name.chars().all(plain) || ["A", "B", "R", "host"].contains(&name) {
        return Err(format!(
            "--peer {name:?}: a name of letters, digits, - and _, not A, B, R or host"
        ));
    }
    let formats: Vec<String> = formats.split(',').map(str::to_string).collect();
    if let Some(other) = formats.iter().find(|f| !["null", "raw", "qcow2"].contains(&f.as_str())) {
        return Err(format!("--peer {name}: format {other:?} is none of null, raw, qcow2"));
    }
    for place in places(command) {
        if !PLACES.contains(&place) {
            return Err(format!(
                "--peer {name}: {{{place}}} is none of {{{}}}",
                PLACES.join("} {")
            ));
        }
    }
    if !command.contains("{socket}") {
        return Err(format!("--peer {name}: the command has no {{socket}}"));
    }
    Ok((name.into(), Template { formats, command: command.into() }))
}

/// What is between braces and looks like a place: lower-case letters only, so that JSON and shell
/// expressions (`${x}` too) may stay as they are.
fn places(command: &str) -> impl Iterator<Item = &str> {
    let after = command.match_indices('{').filter(|(i, _)| !command[..*i].ends_with('$'));
    after.filter_map(|(i, _)| {
        let word = command[i + 1..].split_once('}')?.0;
        (!word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase())).then_some(word)
    })
}

impl Template {
    /// Whether it was said to serve the case's format, in the case's way: other programs do not know
    /// our variable for doing without io_uring.
    pub fn serves(&self, case: &Case) -> bool {
        !case.no_io_uring && self.formats.iter().any(|f| f == case.format())
    }

    /// The command for a case.
    pub fn command(&self, case: &Case, dir: &Path, socket: &Path) -> Command {
        let text = PLACES.iter().fold(self.command.clone(), |text, place| {
            let value = match *place {
                "socket" => socket.display().to_string(),
                "image" => case.file(dir).map_or(String::new(), |p| p.display().to_string()),
                "format" => case.format().into(),
                "queues" => case.queues().to_string(),
                "size" => DISK.to_string(),
                "direct" => if case.direct() { "on" } else { "off" }.into(),
                "aio" => case.aio.unwrap_or("io_uring").into(),
                _ => dir.display().to_string(),
            };
            text.replace(&format!("{{{place}}}"), &value)
        });
        let mut command = Command::new("sh");
        command.args(["-c", &text]);
        command
    }

    /// A program in the comparison.
    pub fn program(self, name: String) -> Program {
        Program {
            label: name,
            path: "sh".into(),
            iothread: false,
            extra: (Vec::new(), String::new()),
            template: Some(self),
            host: false,
        }
    }

    /// As the user wrote it.
    pub fn text(&self) -> &str {
        &self.command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_and_filled() {
        let (name, template) =
            parse("spdk:raw,null=exec vhost -S {dir} '{socket}' {image} n={queues} ${x} {\"a\":1}")
                .unwrap();
        assert_eq!(name, "spdk");
        let cases = crate::cases::all();
        let find = |n: &str| cases.iter().find(|c| c.name == n).unwrap();
        assert!(template.serves(find("disk-d1")) && template.serves(find("null-d1-event")));
        assert!(!template.serves(find("q2-miss")) && !template.serves(find("nouring-disk-native")));
        let command = template.command(find("queues-page-4"), Path::new("/d"), Path::new("/s s"));
        let text: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        assert_eq!(text[1], "exec vhost -S /d '/s s' /d/page.raw n=4 ${x} {\"a\":1}");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, part) in [
            ("spdk", "no '='"),
            ("A={socket}", "not A, B"),
            ("x:vmdk={socket}", "\"vmdk\" is none of"),
            ("x=run {image}", "no {socket}"),
            ("x=run {socket} {imgae}", "{imgae} is none of"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
