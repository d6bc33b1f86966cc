//! `--object`: I/O threads and secrets.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Read;

use serde_json::Value;

use crate::err;
use crate::error::{Errno, Error, Result};
use crate::qapi::{Input, OptionSpec, Options, keyval, schema};

/// QEMU's default of `poll-max-ns`, in nanoseconds.
pub const POLL_MAX_NS_DEFAULT: u64 = 32768;

/// QEMU's default of `thread-pool-max`.
const THREAD_POOL_MAX_DEFAULT: i64 = 64;

/// The largest secret, in bytes: keys and passwords are below a kilobyte; a device file would never end.
const SECRET_MAX: u64 = 1 << 20;

/// The types of objects, sorted.
static TYPES: &[(&str, &[OptionSpec])] =
    &[("iothread", schema::IOTHREAD), ("secret", schema::SECRET)];

/// What an object is.
enum Object {
    /// Settings for the exports that name it.
    IoThread {
        /// The longest busy wait, in nanoseconds; 0 = never.
        poll_max_ns: u64,
    },
    /// A password or key.
    Secret(Vec<u8>),
}

/// All objects, by id.
#[derive(Default)]
pub struct Objects {
    table: Vec<(String, Object)>,
}

/// What became of an `--object`.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The object exists.
    Added,
    /// Help was wanted: this.
    Help(String),
}

impl Objects {
    /// Makes the object that `text`, an option's argument, describes.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn add(&mut self, text: &str) -> Result<Outcome> {
        let mut input = if text.starts_with('{') {
            Input::parse(text, "qom-type")?
        } else {
            let parsed = keyval::parse(text, Some("qom-type"))?;
            if parsed.help {
                return Ok(Outcome::Help(help(parsed.tree.get("qom-type"))));
            }
            Input::from_keyval(parsed.tree)
        };
        let name = input.take_word("qom-type")?;
        let Some((_, members)) = TYPES.iter().find(|entry| entry.0 == name) else {
            return Err(unknown(&name));
        };
        let options = input.visit(&[members])?;
        let id = word(&options, "id").unwrap_or_default().to_string();
        check_id(&id)?;
        let object = match name.as_str() {
            "iothread" => iothread(&options)?,
            _ => Object::Secret(Vec::new()),
        };
        if self.table.iter().any(|entry| entry.0 == id) {
            return Err(err!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            ));
        }
        let object = match object {
            Object::Secret(_) => Object::Secret(self.secret(&options)?),
            other => other,
        };
        self.table.push((id, object));
        Ok(Outcome::Added)
    }

    /// `poll-max-ns` of the I/O thread `id`; `None` if there is none of that name.
    pub fn iothread_poll_max_ns(&self, id: &str) -> Option<u64> {
        self.table.iter().find_map(|entry| match &entry.1 {
            Object::IoThread { poll_max_ns } if entry.0 == id => Some(*poll_max_ns),
            _ => None,
        })
    }

    /// The bytes of the secret `id`.
    ///
    /// # Errors
    /// `No secret with id '...'`.
    pub fn secret_bytes(&self, id: &str) -> Result<&[u8]> {
        let found = self.table.iter().find_map(|entry| match &entry.1 {
            Object::Secret(bytes) if entry.0 == id => Some(bytes.as_slice()),
            _ => None,
        });
        found.ok_or_else(|| err!("No secret with id '{id}'"))
    }

    /// Reads, and decodes, a secret.
    fn secret(&self, options: &Options) -> Result<Vec<u8>> {
        let bytes = match (word(options, "data"), word(options, "file")) {
            (Some(_), Some(_)) => return Err(err!("'file' and 'data' are mutually exclusive")),
            (None, None) => return Err(err!("Either 'file' or 'data' must be provided")),
            (Some(data), None) => data.as_bytes().to_vec(),
            (None, Some(file)) => read_file(file)?,
        };
        if let Some(key) = word(options, "keyid") {
            self.secret_bytes(key)?;
            return Err(err!(
                "Encrypted secrets ('keyid') are not supported by vhost-user-blk yet"
            ));
        }
        match word(options, "format") {
            Some("base64") => decode_base64(&bytes),
            _ => Ok(bytes),
        }
    }
}

fn word<'a>(options: &'a Options, name: &str) -> Option<&'a str> {
    options.get(name).and_then(Value::as_str)
}

/// Why there is no object of type `name`.
fn unknown(name: &str) -> Error {
    if schema::QEMUS_OBJECTS.contains(&name) {
        err!("Object type '{name}' is not supported by vhost-user-blk yet")
    } else {
        err!("Parameter 'qom-type' does not accept value '{name}'")
    }
}

/// Whether `id` is a letter, then letters, digits, `-`, `.` and `_`: QEMU's rule for all ids.
pub fn id_is_well_formed(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

fn check_id(id: &str) -> Result<()> {
    if id_is_well_formed(id) {
        return Ok(());
    }
    Err(err!("Parameter 'id' expects an identifier").with_hint(
        "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
    ))
}

/// Checks that every number is not negative.
///
/// # Errors
/// In QEMU's words.
pub fn check_not_negative(options: &Options, names: &[&str]) -> Result<()> {
    for name in names {
        if options.get(*name).and_then(Value::as_i64).is_some_and(|n| n < 0) {
            return Err(err!("{name} value must be in range [0, {}]", i64::MAX));
        }
    }
    Ok(())
}

fn iothread(options: &Options) -> Result<Object> {
    let number = |name: &str| options.get(name).and_then(Value::as_i64);
    check_not_negative(
        options,
        &[
            "aio-max-batch",
            "thread-pool-min",
            "thread-pool-max",
            "poll-max-ns",
            "poll-grow",
            "poll-shrink",
        ],
    )?;
    let min = number("thread-pool-min").unwrap_or(0);
    let max = number("thread-pool-max").unwrap_or(THREAD_POOL_MAX_DEFAULT);
    if min > max || max == 0 || max > i64::from(i32::MAX) {
        return Err(err!("bad thread-pool-min/thread-pool-max values"));
    }
    let poll = number("poll-max-ns").and_then(|n| u64::try_from(n).ok());
    Ok(Object::IoThread { poll_max_ns: poll.unwrap_or(POLL_MAX_NS_DEFAULT) })
}

/// Reads a secret's file.
fn read_file(name: &str) -> Result<Vec<u8>> {
    let error = |what: &str, e: std::io::Error| {
        Error::from_errno(format!("Unable to read {name}: {what} “{name}”"), Errno::from(e))
    };
    let file = File::open(name).map_err(|e| error("Failed to open file", e))?;
    let mut bytes = Vec::new();
    file.take(SECRET_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| error("Error reading file", e))?;
    if bytes.len() as u64 > SECRET_MAX {
        return Err(err!("Unable to read {name}: larger than {SECRET_MAX} bytes"));
    }
    Ok(bytes)
}

/// Decodes base64 as QEMU does: other characters are refused, but for line feeds; what is left of an incomplete group
/// at the end is dropped.
fn decode_base64(text: &[u8]) -> Result<Vec<u8>> {
    let mut group = 0u32;
    let mut digits = 0;
    let mut padding = 0;
    let mut bytes = Vec::new();
    for b in text {
        let value = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => 0,
            b'\n' => continue,
            _ => return Err(err!("Base64 data contains invalid characters")),
        };
        padding += usize::from(*b == b'=');
        group = group << 6 | u32::from(value);
        digits += 1;
        if digits == 4 {
            let [_, three @ ..] = group.to_be_bytes();
            bytes.extend_from_slice(&three[..3 - padding.min(2)]);
            (group, digits, padding) = (0, 0, 0);
        }
    }
    Ok(bytes)
}

/// The help for objects: the options of the type, or the list of types.
fn help(name: Option<&Value>) -> String {
    let named = TYPES.iter().find(|entry| name.is_some_and(|name| name == entry.0));
    let Some((name, members)) = named else {
        let types: String = TYPES.iter().map(|entry| format!("  {}\n", entry.0)).collect();
        return format!("List of user creatable objects:\n{types}");
    };
    let mut lines: Vec<String> = members
        .iter()
        .filter(|member| member.name != "id")
        .map(|member| {
            let kind = match (member.name, member.kind) {
                ("format", _) => "QCryptoSecretFormat",
                (_, crate::qapi::Kind::Str) => "string",
                _ => "int",
            };
            format!("  {}=<{kind}>\n", member.name)
        })
        .collect();
    lines.sort();
    format!("{name} options:\n{}", lines.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Result<Vec<u8>> {
        let mut objects = Objects::default();
        objects.add(&format!("secret,id=s,{text}"))?;
        objects.secret_bytes("s").map(<[u8]>::to_vec)
    }

    #[test]
    fn secrets() {
        assert_eq!(secret("data=geheim").unwrap(), b"geheim");
        assert_eq!(secret("data=Z2VoZWlt,format=base64").unwrap(), b"geheim");
        assert_eq!(secret("data=Zw==,format=base64").unwrap(), b"g");
        assert_eq!(secret("data=Z2U=,format=base64").unwrap(), b"ge");
        assert_eq!(secret("data=Z2U,format=base64").unwrap(), b"");
        assert_eq!(secret("data=Z2Vo\nZWlt\n,format=base64").unwrap(), b"geheim");
        assert_eq!(
            secret("data=Z 2,format=base64").unwrap_err().message(),
            "Base64 data contains invalid characters"
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"\xff\0x").unwrap();
        assert_eq!(secret(&format!("file={}", path.display())).unwrap(), b"\xff\0x");
        assert!(secret("file=/dev/zero").unwrap_err().message().contains("larger than"));
    }

    #[test]
    fn iothreads_have_settings() {
        let mut objects = Objects::default();
        objects.add("iothread,id=a").unwrap();
        objects.add(r#"{"qom-type":"iothread","id":"b","poll-max-ns":0}"#).unwrap();
        assert_eq!(objects.iothread_poll_max_ns("a"), Some(POLL_MAX_NS_DEFAULT));
        assert_eq!(objects.iothread_poll_max_ns("b"), Some(0));
        assert_eq!(objects.iothread_poll_max_ns("c"), None);
        assert!(objects.secret_bytes("a").is_err());
    }
}
