//! Options that no visitor has seen: in the `json:` names of image headers, numbers and truth values may be written as
//! text, because QEMU's oldest option parser takes them so.
#![forbid(unsafe_code)]

use serde_json::Value;

use super::number::parse_size;
use super::visit::parse_bool;
use super::{Kind, OptionSpec, Options};
use crate::err;
use crate::error::Result;

/// Gives the members `specs` of `tree` that are texts, but should not be, their types. Whatever else is wrong is left to
/// who takes the options.
///
/// # Errors
/// In QEMU's words: a text that says no number, or neither yes nor no.
pub fn give_types(tree: &mut Options, specs: &[OptionSpec]) -> Result<()> {
    for spec in specs {
        let Some(value) = tree.get_mut(spec.name) else { continue };
        match (spec.kind, &mut *value) {
            (Kind::Struct(specs), Value::Object(tree)) => give_types(tree, specs)?,
            (Kind::List(Kind::Struct(specs)), Value::Array(list)) => {
                for tree in list.iter_mut().filter_map(Value::as_object_mut) {
                    give_types(tree, specs)?;
                }
            }
            (Kind::Bool, Value::String(text)) => {
                let name = spec.name;
                let word = parse_bool(text);
                let word = word.ok_or_else(|| err!("Parameter '{name}' expects 'on' or 'off'"))?;
                *value = word.into();
            }
            (Kind::Int { .. } | Kind::Size, Value::String(text)) => {
                let name = spec.name;
                let number = parse_size(text).ok_or_else(|| {
                    err!("Parameter '{name}' expects a non-negative number below 2^64").with_hint(
                        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, \
                         peta-\nand exabytes, respectively.",
                    )
                })?;
                *value = number.into();
            }
            _ => {}
        }
    }
    Ok(())
}
