//! QEMU's option language: keyval and JSON texts, checked against a schema, with QEMU's error words.
//!
//! The result of a check is an [`Options`] tree in which every value has its right JSON type (`true`, `42`,
//! `"text"`, nested objects for structs and inline children, a string for a reference to a node), whichever of the
//! two syntaxes it came from. Nothing below this layer parses text.
//!
//! ```text
//! argument --> json | keyval --> visit (schema, number) --> Options
//! ```
#![forbid(unsafe_code)]

pub mod json;
pub mod keyval;
pub mod number;
pub mod schema;
pub mod texts;
pub mod visit;

pub use visit::{Input, Syntax};

/// A checked and typed option tree: what the block graph takes.
pub type Options = serde_json::Map<String, serde_json::Value>;

/// The type of one option, as QEMU's schema has it.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `bool`: JSON `true`/`false`; keyval `on`/`off`/`yes`/`no`/`true`/`false`/`y`/`n`.
    Bool,
    /// `str`.
    Str,
    /// An integer of `bits` bits; QEMU names it `int64_t`, `uint16_t`, ... in its errors (`int` is `int64`).
    Int {
        /// Width in bits: 8, 16, 32 or 64.
        bits: u8,
        /// Whether negative values are allowed.
        signed: bool,
    },
    /// `size`: bytes; keyval accepts QEMU's suffixes (`k`, `M`, `G`, ...).
    Size,
    /// One of a fixed set of words.
    Enum(&'static [&'static str]),
    /// `BlockdevRef`: the name of a node, or an object that defines one (`driver` and its options).
    BlockdevRef,
    /// `BlockdevRefOrNull`: as [`Kind::BlockdevRef`], or JSON `null`, or the empty string.
    BlockdevRefOrNull,
    /// A nested object.
    Struct(&'static [OptionSpec]),
    /// A nested object whose members depend on the word in one of them: a flat union.
    Union(&'static UnionSpec),
    /// A list of values of one kind.
    List(&'static Kind),
    /// `StrOrNull` and alternates that a driver takes apart itself.
    Any,
}

/// The members of a flat union.
#[derive(Debug)]
pub struct UnionSpec {
    /// The member that chooses.
    pub tag: &'static str,
    /// Its words, and the further members that each brings.
    pub branches: &'static [(&'static str, &'static [OptionSpec])],
}

/// One option of a driver, export or object.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// Its name, as the user writes it.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Whether leaving it out is an error (`Parameter 'x' is missing`).
    pub required: bool,
}

impl OptionSpec {
    /// An option that may be left out.
    pub const fn optional(name: &'static str, kind: Kind) -> Self {
        OptionSpec { name, kind, required: false }
    }

    /// An option that must be given.
    pub const fn required(name: &'static str, kind: Kind) -> Self {
        OptionSpec { name, kind, required: true }
    }
}
