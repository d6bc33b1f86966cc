//! Checks an option tree against a schema, and gives every value its type.
//!
//! Members are visited in the order of the schema, whatever order the user wrote them in; the first fault found is the
//! error. What is left over in an object is complained about when its members are done. Where the two syntaxes differ
//! in what they accept and what they say, it is because QEMU's do.
#![forbid(unsafe_code)]

use serde_json::Value;

use super::number::{parse_i64, parse_size, parse_u64};
use super::schema::{self, Driver};
use super::{Kind, OptionSpec, Options, UnionSpec, json, keyval};
use crate::block::graph::MAX_DEPTH;
use crate::err;
use crate::error::{Error, Result};

/// Which of the two syntaxes an option tree was written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    /// `key=value,...`: scalars are text.
    Keyval,
    /// JSON: scalars have types.
    Json,
}

/// An option tree as the user wrote it.
#[derive(Debug)]
pub struct Input {
    syntax: Syntax,
    tree: Options,
}

impl Input {
    /// Reads `text`: JSON if it begins with `{`, else keyval with `implied` as the key of a first bare value.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn parse(text: &str, implied: &str) -> Result<Input> {
        if !text.starts_with('{') {
            let parsed = keyval::parse(text, Some(implied))?;
            if parsed.help {
                return Err(err!("Help is not available for this option"));
            }
            return Ok(Input { syntax: Syntax::Keyval, tree: parsed.tree });
        }
        match json::parse(text)? {
            Value::Object(tree) => Ok(Input { syntax: Syntax::Json, tree }),
            _ => Err(err!("JSON object expected")),
        }
    }

    /// A tree of keyval parameters that are parsed already.
    pub fn from_keyval(tree: Options) -> Input {
        Input { syntax: Syntax::Keyval, tree }
    }

    /// A tree with JSON's types, made by the program itself.
    pub fn from_json(tree: Options) -> Input {
        Input { syntax: Syntax::Json, tree }
    }

    /// Takes the word `name` out: the one that says which schema applies to the rest.
    ///
    /// # Errors
    /// If it is missing or no string, in QEMU's words.
    pub fn take_word(&mut self, name: &'static str) -> Result<String> {
        let mut visitor = Visitor::new(self.syntax);
        visitor.word(&mut self.tree, name)
    }

    /// The tree as an object with the members `specs` and no others.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn visit(mut self, specs: &[&[OptionSpec]]) -> Result<Options> {
        let mut visitor = Visitor::new(self.syntax);
        let mut out = Options::new();
        for members in specs {
            visitor.members(&mut self.tree, members, &mut out)?;
        }
        visitor.finish(&self.tree)?;
        Ok(out)
    }

    /// The tree as the definition of a block node.
    ///
    /// # Errors
    /// In QEMU's words; for a driver that QEMU has and this program has not, in its own.
    pub fn visit_blockdev(self) -> Result<Options> {
        Visitor::new(self.syntax).blockdev(self.tree)
    }
}

/// The walk over a tree: the syntax, and where it is.
struct Visitor {
    syntax: Syntax,
    /// The names of the objects that the walk is in.
    path: Vec<String>,
    /// How many of them are block nodes.
    nodes: usize,
}

impl Visitor {
    fn new(syntax: Syntax) -> Self {
        Visitor { syntax, path: Vec::new(), nodes: 0 }
    }

    /// `name` with the path in front.
    fn full(&self, name: &str) -> String {
        let mut full = String::new();
        for part in &self.path {
            full.push_str(part);
            full.push('.');
        }
        full + name
    }

    /// Moves the members `specs` from `tree` to `out`.
    fn members(
        &mut self,
        tree: &mut Options,
        specs: &[OptionSpec],
        out: &mut Options,
    ) -> Result<()> {
        for spec in specs {
            match tree.shift_remove(spec.name) {
                Some(value) => {
                    let value = self.value(spec.name, spec.kind, value)?;
                    out.insert(spec.name.to_string(), value);
                }
                None if spec.required => return Err(self.missing(spec.name)),
                None => {}
            }
        }
        Ok(())
    }

    /// The end of an object: nothing may be left over.
    fn finish(&self, tree: &Options) -> Result<()> {
        match tree.keys().next() {
            Some(name) => Err(err!("Parameter '{}' is unexpected", self.full(name))),
            None => Ok(()),
        }
    }

    fn value(&mut self, name: &str, kind: Kind, value: Value) -> Result<Value> {
        match kind {
            Kind::Any => Ok(value),
            Kind::Struct(specs) => {
                self.nested(name, value, |visitor, tree, out| visitor.members(tree, specs, out))
            }
            Kind::Union(spec) => {
                self.nested(name, value, |visitor, tree, out| visitor.union(tree, spec, out))
            }
            Kind::List(kind) => self.list(name, *kind, value),
            Kind::BlockdevRef => self.reference(name, "BlockdevRef", value),
            Kind::BlockdevRefOrNull if value.is_null() => Ok(value),
            Kind::BlockdevRefOrNull => self.reference(name, "BlockdevRefOrNull", value),
            _ if self.syntax == Syntax::Json => self.json_scalar(name, kind, value),
            _ => self.keyval_scalar(name, kind, &value),
        }
    }

    /// A list; its elements are named as the syntax would have it.
    fn list(&mut self, name: &str, kind: Kind, value: Value) -> Result<Value> {
        let Value::Array(items) = value else { return Err(self.wrong_type(name, "array")) };
        let syntax = self.syntax;
        let visit = |(i, item)| match syntax {
            Syntax::Json => self.value(&format!("{name}[{i}]"), kind, item),
            Syntax::Keyval => self.value(&format!("{name}.{i}"), kind, item),
        };
        items.into_iter().enumerate().map(visit).collect()
    }

    /// An object below `name`.
    fn nested(
        &mut self,
        name: &str,
        value: Value,
        visit: impl FnOnce(&mut Self, &mut Options, &mut Options) -> Result<()>,
    ) -> Result<Value> {
        let Value::Object(mut tree) = value else { return Err(self.wrong_type(name, "object")) };
        self.path.push(name.to_string());
        let mut out = Options::new();
        visit(self, &mut tree, &mut out)?;
        self.finish(&tree)?;
        self.path.pop();
        Ok(Value::Object(out))
    }

    fn union(&mut self, tree: &mut Options, spec: &UnionSpec, out: &mut Options) -> Result<()> {
        let word = self.word(tree, spec.tag)?;
        let Some((_, members)) = spec.branches.iter().find(|branch| branch.0 == word) else {
            return Err(bad_word(spec.tag, &word));
        };
        out.insert(spec.tag.to_string(), Value::String(word));
        self.members(tree, members, out)
    }

    /// Takes the string `name`, which must be there, out of `tree`.
    fn word(&mut self, tree: &mut Options, name: &'static str) -> Result<String> {
        let value = tree.shift_remove(name).ok_or_else(|| self.missing(name))?;
        match self.value(name, Kind::Str, value)? {
            Value::String(word) => Ok(word),
            other => unreachable!("a visited string is {other}"),
        }
    }

    /// A block node below `name`: its name or its definition.
    fn reference(&mut self, name: &str, wanted: &str, value: Value) -> Result<Value> {
        match value {
            Value::String(_) => Ok(value),
            Value::Object(tree) => {
                self.path.push(name.to_string());
                let node = self.blockdev(tree)?;
                self.path.pop();
                Ok(Value::Object(node))
            }
            // An alternate does not know where it is: no path.
            _ => Err(err!("Invalid parameter type for '{name}', expected: {wanted}")),
        }
    }

    /// The definition of a block node: the driver's word first, the options of every node, the driver's own.
    fn blockdev(&mut self, mut tree: Options) -> Result<Options> {
        // QEMU has no limit; recursion needs one.
        if self.nodes == MAX_DEPTH {
            return Err(err!("The block graph is more than {MAX_DEPTH} nodes deep"));
        }
        self.nodes += 1;
        let mut out = Options::new();
        let name = self.word(&mut tree, "driver")?;
        let def = match schema::driver(&name) {
            Driver::Here(def) => def,
            Driver::Qemus => {
                return Err(err!("Driver '{name}' is not supported by vhost-user-blk yet"));
            }
            Driver::Unknown => return Err(bad_word("driver", &name)),
        };
        out.insert("driver".to_string(), Value::String(name));
        self.members(&mut tree, schema::NODE, &mut out)?;
        self.members(&mut tree, def.options, &mut out)?;
        self.finish(&tree)?;
        self.nodes -= 1;
        Ok(out)
    }

    fn json_scalar(&self, name: &str, kind: Kind, value: Value) -> Result<Value> {
        let (good, expected) = match kind {
            Kind::Bool => (value.is_boolean(), "boolean"),
            Kind::Int { signed: true, .. } => (value.is_i64(), "integer"),
            Kind::Int { .. } | Kind::Size => return self.json_unsigned(name, kind, &value),
            _ => (value.is_string(), "string"),
        };
        if !good {
            return Err(self.wrong_type(name, expected));
        }
        in_range(name, kind, value)
    }

    /// Unsigned numbers: a negative one wraps, for it did so in the first versions of QEMU's interface.
    fn json_unsigned(&self, name: &str, kind: Kind, value: &Value) -> Result<Value> {
        let number = value.as_u64().or(value.as_i64().map(i64::cast_unsigned));
        match number {
            Some(number) => in_range(name, kind, number.into()),
            None => Err(err!("Parameter '{}' expects uint64", self.full(name))),
        }
    }

    fn keyval_scalar(&self, name: &str, kind: Kind, value: &Value) -> Result<Value> {
        let Value::String(text) = value else {
            return Err(err!("Parameters '{}.*' are unexpected", self.full(name)));
        };
        let (value, expected) = match kind {
            Kind::Bool => (parse_bool(text).map(Value::Bool), "'on' or 'off'"),
            Kind::Int { signed: true, .. } => (parse_i64(text).map(Value::from), "integer"),
            Kind::Int { .. } => (parse_u64(text).map(Value::from), "integer"),
            Kind::Size => (parse_size(text).map(Value::from), "size"),
            _ => (Some(Value::String(text.clone())), "string"),
        };
        match value {
            Some(value) => in_range(name, kind, value),
            None => Err(err!("Parameter '{}' expects {expected}", self.full(name))),
        }
    }

    fn missing(&self, name: &str) -> Error {
        err!("Parameter '{}' is missing", self.full(name))
    }

    fn wrong_type(&self, name: &str, expected: &str) -> Error {
        err!("Invalid parameter type for '{}', expected: {expected}", self.full(name))
    }
}

/// The words for yes and no.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// A word that is none of an enumeration's. QEMU shows no path here.
fn bad_word(name: &str, word: &str) -> Error {
    err!("Parameter '{name}' does not accept value '{word}'")
}

/// Checks a scalar of the right type against the bounds of its kind. QEMU shows no path here.
fn in_range(name: &str, kind: Kind, value: Value) -> Result<Value> {
    match kind {
        Kind::Enum(words) => match value.as_str() {
            Some(word) if !words.contains(&word) => Err(bad_word(name, word)),
            _ => Ok(value),
        },
        Kind::Int { bits, signed } if bits < 64 => {
            let good = if signed {
                value.as_i64().is_some_and(|n| n >> (bits - 1) == 0 || n >> (bits - 1) == -1)
            } else {
                value.as_u64().is_some_and(|n| n >> bits == 0)
            };
            let sign = if signed { "" } else { "u" };
            if good { Ok(value) } else { Err(err!("Parameter '{name}' expects {sign}int{bits}_t")) }
        }
        _ => Ok(value),
    }
}

#[cfg(test)]
#[path = "visit_tests.rs"]
mod tests;
