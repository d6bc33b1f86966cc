//! The file of `config=`: rules in QEMU's old form.
//!
//! ```text
//! [inject-error]
//! event = "l2_load"
//! errno = "5"
//! once = "on"
//! ```
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Read;

use serde_json::Value;

use super::rules::Rule;
use super::{INJECT, SET_STATE, inject, set_state};
use crate::err;
use crate::error::{Error, Result};
use crate::qapi::{Kind, Options, texts};

/// The longest file that is read, in bytes: rules are written by hand.
const LEN_MAX: u64 = 1 << 20;

/// The rules of the file at `path`: those that inject first.
///
/// # Errors
/// In QEMU's words.
pub fn read(path: &str) -> Result<Vec<Rule>> {
    let failed = |what: &str, e: std::io::Error| Error::from_errno(what, e.into());
    let file = File::open(path).map_err(|e| failed("Could not read blkdebug config file", e))?;
    let mut text = String::new();
    let read = file.take(LEN_MAX).read_to_string(&mut text);
    read.map_err(|e| failed("Cannot read config file", e))?;
    parse(&text)
}

fn parse(text: &str) -> Result<Vec<Rule>> {
    let mut groups: Vec<(&str, Options)> = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            if !["inject-error", "set-state"].contains(&name) {
                return Err(err!("There is no option group '{name}'"));
            }
            groups.push((name, Options::new()));
            continue;
        }
        let assignment = line.split_once('=').and_then(|(key, value)| {
            let value = value.trim().strip_prefix('"')?.strip_suffix('"')?;
            Some((key.trim(), value))
        });
        let (Some((key, value)), Some((_, group))) = (assignment, groups.last_mut()) else {
            return Err(err!("Invalid parameter '{line}'"));
        };
        group.insert(key.to_owned(), Value::from(value));
    }
    // Rules that inject come first, whatever the order in the file.
    groups.sort_by_key(|(name, _)| *name == "set-state");
    groups.into_iter().map(|(name, group)| rule(name == "inject-error", group)).collect()
}

fn rule(injects: bool, mut group: Options) -> Result<Rule> {
    let kind = if injects { INJECT } else { SET_STATE };
    if let Kind::Struct(specs) = kind {
        if let Some(key) = group.keys().find(|key| !specs.iter().any(|s| s.name == **key)) {
            return Err(err!("Invalid parameter '{key}'"));
        }
        texts::give_types(&mut group, specs)?;
    }
    if injects { inject(&group) } else { set_state(&group) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_as_qemu_reads_them() {
        let rules = parse(
            "# a comment\n[set-state]\nevent = \"l2_load\"\nnew_state = \"2\"\n\n\
             [inject-error]\nevent = \"read_aio\"\nsector=\"7\"\nonce = \"on\"\nstate = \"2\"\n",
        );
        let rules = rules.unwrap();
        assert_eq!((rules.len(), rules[0].state, rules[1].state), (2, 2, 0));
        for (text, error) in [
            ("[inject-error]\nevent = \"foo\"", "invalid parameter value: foo"),
            ("[inject-error]\nfoo = \"foo\"", "Invalid parameter 'foo'"),
            ("[inject-errorx]", "There is no option group 'inject-errorx'"),
            ("[inject-error]\nerrno = \"5\"", "Missing event name for rule"),
        ] {
            assert_eq!(parse(text).unwrap_err().message(), error);
        }
        let none = read("/nowhere/at/all").unwrap_err();
        let want = "Could not read blkdebug config file: No such file or directory";
        assert_eq!(none.message(), want);
    }
}
