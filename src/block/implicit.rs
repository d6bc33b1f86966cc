//! Children that the user did not define: an image names them (backing files), and this turns the name into options.
//!
//! QEMU's rules: a relative name is relative to the directory of the image; `json:{...}` is an option tree; a prefix
//! before a colon names a protocol; a name of a block device is opened by the driver for devices, and a format that is not
//! named is guessed from the first bytes. Which driver takes what is each driver's own word ([`Recognises`]).
#![forbid(unsafe_code)]

use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::driver::{DriverKind, Recognises};
use super::graph::Graph;
use super::node::Node;
use crate::err;
use crate::error::Result;
use crate::qapi::texts::give_types;
use crate::qapi::{Kind, Options, schema};

/// How many bytes of an image the guess of its format sees (QEMU's BLOCK_PROBE_BUF_SIZE).
pub const PROBE_LEN: usize = 512;

/// The most levels of options in a `json:` name, counting both nested objects and dots: each is a level of recursion.
const LEVELS_MAX: usize = 256;

/// Formats that QEMU would recognise and this program does not have: taken for raw, the guest would see their tables.
const FOREIGN: &[(&str, usize, &[u8])] = &[
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("qed", 0, b"QED\0"),
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
];

impl Graph {
    /// The options of the image called `name` in the header of the image in `overlay`; `format`: its format, if the
    /// header tells one.
    ///
    /// # Errors
    /// In QEMU's words: an unknown protocol or format, a bad `json:`, a relative name in an image that has no directory;
    /// no format while guessing is forbidden ([`Graph::set_strict_formats`]).
    pub fn implicit_image(
        &self,
        overlay: &Node,
        name: &str,
        format: Option<&str>,
    ) -> Result<Options> {
        let mut options = match name.strip_prefix("json:") {
            Some(json) => self.parse_json(json)?,
            None => {
                let file = self.protocol(&self.full_name(overlay, name)?)?;
                Options::from_iter([("file".to_owned(), Value::Object(file))])
            }
        };
        if options.contains_key("driver") {
            self.give_types(&mut options)?;
            return Ok(options);
        }
        let format = match format {
            Some(format) => format.to_owned(),
            None => self.guess(&options, name)?,
        };
        // A "format" that is a protocol: the file itself.
        if self.driver(&format).is_some_and(|def| def.kind == DriverKind::Protocol)
            && let Some(Value::Object(file)) = options.shift_remove("file")
        {
            options = file;
        }
        options.insert("driver".to_owned(), format.into());
        self.give_types(&mut options)?;
        Ok(options)
    }

    /// Gives the options of a node and of the nodes inside of it their types: a `json:` name may have them as texts.
    fn give_types(&self, options: &mut Options) -> Result<()> {
        let Some(Value::String(name)) = options.get("driver") else { return Ok(()) };
        let Some(def) = self.driver(name) else { return Ok(()) };
        give_types(options, schema::NODE)?;
        give_types(options, def.options)?;
        for spec in def.options {
            if let Kind::BlockdevRef | Kind::BlockdevRefOrNull = spec.kind
                && let Some(Value::Object(child)) = options.get_mut(spec.name)
            {
                self.give_types(child)?;
            }
        }
        Ok(())
    }

    /// The options of the file called `name`, as it is: relative names are the process's.
    ///
    /// # Errors
    /// An unknown protocol.
    pub fn implicit_file(&self, name: &str) -> Result<Options> {
        match name.strip_prefix("json:") {
            Some(json) => {
                let mut options = self.parse_json(json)?;
                self.give_types(&mut options)?;
                Ok(options)
            }
            None => self.protocol(name),
        }
    }

    fn full_name(&self, overlay: &Node, name: &str) -> Result<String> {
        if has_protocol(name) || name.starts_with('/') {
            return Ok(name.to_owned());
        }
        match overlay.base_filename() {
            Some(base) => Ok(combine(&base, name)),
            None => {
                let driver = overlay.def().name;
                Err(err!("Cannot generate a base directory for {driver} nodes"))
            }
        }
    }

    /// The options of the protocol node for `name`: by its prefix, or by what is there.
    fn protocol(&self, name: &str) -> Result<Options> {
        let opens = |def: &super::DriverDef, path: &str| match def.recognises {
            Recognises::Path(takes) => takes(Path::new(path)),
            _ => false,
        };
        let options = |driver: &str, filename: &str| {
            let pairs = [("driver", driver), ("filename", filename)];
            pairs.map(|(name, value)| (name.to_owned(), Value::from(value))).into_iter().collect()
        };
        if has_protocol(name) {
            let (prefix, path) = name.split_once(':').unwrap_or((name, ""));
            let named = self.driver(prefix).filter(|d| matches!(d.recognises, Recognises::Path(_)));
            return match named {
                // A prefix chooses the driver for files in general, and what is there the one in particular.
                Some(def) if opens(def, path) => {
                    let best = self.drivers().find(|d| opens(d, path)).unwrap_or(def);
                    Ok(options(best.name, path))
                }
                Some(def) => Ok(options(def.name, path)),
                None => Err(err!("Unknown protocol '{prefix}'")),
            };
        }
        match self.drivers().find(|def| opens(def, name)) {
            Some(def) => Ok(options(def.name, name)),
            None => Err(err!("Could not open '{name}': no driver for it")),
        }
    }

    /// The options in a `json:` name: nested objects or names with dots; a file without a driver gets one.
    fn parse_json(&self, json: &str) -> Result<Options> {
        let Ok(value) = serde_json::from_str(json) else {
            return Err(err!("Could not parse the JSON options"));
        };
        let Value::Object(flat) = value else { return Err(err!("Invalid JSON object given")) };
        let mut options = Options::new();
        for (name, value) in flat {
            insert_dotted(&mut options, &name, value, LEVELS_MAX)?;
        }
        self.fill_in_protocols(&mut options)?;
        Ok(options)
    }

    fn fill_in_protocols(&self, options: &mut Options) -> Result<()> {
        for name in ["file", "data-file"] {
            let Some(Value::Object(child)) = options.get_mut(name) else { continue };
            if child.contains_key("driver") {
                continue;
            }
            if let Some(Value::String(filename)) = child.get("filename") {
                let driver = self.protocol(filename)?.shift_remove("driver");
                child.insert("driver".to_owned(), driver.unwrap_or_default());
            }
        }
        Ok(())
    }

    /// The format of the image in `options`' file, by its first bytes.
    fn guess(&self, options: &Options, name: &str) -> Result<String> {
        if self.strict_formats() {
            return Err(err!(
                "Image format was not specified for '{name}', and guessing it is not allowed"
            ));
        }
        let Some(Value::String(path)) = options.get("file").and_then(|f| f.get("filename")) else {
            return Err(err!("Image format was not specified for '{name}', and cannot be guessed"));
        };
        let mut first = Vec::with_capacity(PROBE_LEN);
        let file = std::fs::File::open(path);
        let read = file.and_then(|f| f.take(PROBE_LEN as u64).read_to_end(&mut first));
        if let Err(e) = read {
            // Opening it will say so.
            log::debug!("'{path}' cannot be probed: {e}");
        }
        let recognised = self.drivers().find(|def| match def.recognises {
            Recognises::Content(is) => is(&first),
            _ => false,
        });
        let foreign = FOREIGN
            .iter()
            .find(|(_, at, magic)| first.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
        let format = foreign.map(|(name, ..)| *name).or(recognised.map(|def| def.name));
        let format = format
            .ok_or_else(|| err!("Could not determine image format: No compatible driver found"))?;
        log::warn!(
            "Image format was not specified for '{path}' and probing guessed {format}. \
             Automatically detecting the format is dangerous for raw images: specify the format \
             explicitly."
        );
        Ok(format.to_owned())
    }
}

/// Whether a file name begins with a protocol: a colon comes before the first slash.
fn has_protocol(name: &str) -> bool {
    name.find([':', '/']).is_some_and(|at| name[at..].starts_with(':'))
}

/// `name`, relative to the directory of `base`.
fn combine(base: &str, name: &str) -> String {
    match base.rfind('/') {
        Some(slash) => format!("{}{name}", &base[..=slash]),
        None => name.to_owned(),
    }
}

/// Inserts `a.b.c` as nested objects, at most `levels` of them, also where names with dots are inside of objects.
fn insert_dotted(options: &mut Options, name: &str, value: Value, levels: usize) -> Result<()> {
    let mixed = || err!("Cannot mix scalar and non-scalar keys");
    let left = levels.checked_sub(1).ok_or_else(|| err!("The JSON options are nested too deep"))?;
    let (head, tail) = name.split_once('.').map_or((name, None), |(a, b)| (a, Some(b)));
    let members = match (tail, value) {
        (Some(tail), value) => Options::from_iter([(tail.to_owned(), value)]),
        (None, Value::Object(members)) => members,
        (None, scalar) => {
            let before = options.insert(head.to_owned(), scalar);
            return if before.is_some_and(|before| before.is_object()) {
                Err(mixed())
            } else {
                Ok(())
            };
        }
    };
    let child = options.entry(head).or_insert_with(|| Value::Object(Options::new()));
    let Value::Object(child) = child else { return Err(mixed()) };
    members.into_iter().try_for_each(|(name, value)| insert_dotted(child, &name, value, left))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_combined_as_qemu_does() {
        assert_eq!(combine("/a/b.qcow2", "c"), "/a/c");
        assert_eq!(combine("b.qcow2", "c"), "c");
        assert_eq!(combine("x/b.qcow2", "../c"), "x/../c");
        assert!(has_protocol("nbd://x") && has_protocol("file:x"));
        assert!(!has_protocol("/a:b") && !has_protocol("./a:b") && !has_protocol("a"));
    }

    #[test]
    fn protocols_by_prefix_and_by_what_is_there() {
        let graph = Graph::new();
        let file = |name: &str| graph.implicit_file(name).map(Value::Object);
        let ok = |driver: &str, name: &str| Ok(json!({ "driver": driver, "filename": name }));
        assert_eq!(file("/nonexistent"), ok("file", "/nonexistent"));
        assert_eq!(file("/dev/null"), ok("host_device", "/dev/null"));
        assert_eq!(file("file:x"), ok("file", "x"));
        let error = file("nbd://localhost").unwrap_err();
        assert_eq!(error.to_string(), "Unknown protocol 'nbd'");
        assert_eq!(
            file("json:{\"driver\":\"raw\",\"file.filename\":\"x\"}"),
            Ok(json!({ "driver": "raw", "file": { "filename": "x", "driver": "file" } }))
        );
        assert!(file("json:{").is_err() && file("json:[]").is_err());
        assert!(file("json:{\"a\":1,\"a.b\":2}").is_err());
        assert!(file("json:{\"a.b\":2,\"a\":1}").is_err());
        let deep = format!("{{\"{}\":1}}", vec!["a"; 1 << 20].join("."));
        assert!(file(&format!("json:{deep}")).is_err());
        let deep = |levels: usize| {
            let inner = format!("{{\"{}\":1}}", vec!["a"; levels - 100].join("."));
            (0..100).fold(inner, |inner, _| format!("{{\"a\":{inner}}}"))
        };
        assert!(file(&format!("json:{}", deep(256))).is_ok());
        assert!(file(&format!("json:{}", deep(257))).is_err());
        assert_eq!(
            file("json:{\"a.b\":1,\"a\":{\"c.d\":2,\"c\":{\"e\":3}}}"),
            Ok(json!({ "a": { "b": 1, "c": { "d": 2, "e": 3 } } }))
        );
    }
}
