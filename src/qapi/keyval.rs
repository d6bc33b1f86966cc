//! `driver=file,filename=a,,b,cache.direct=on,list.0=x`: QEMU's keyval syntax.
//!
//! * `,` separates, `,,` in a value is a comma;
//! * dots in a key descend into objects, numbers after a dot are indices of a list;
//! * the first parameter may be a bare value: that of the *implied* key (`null-co` for `driver=null-co`);
//! * of a key given twice, the last value counts.
//!
//! All scalars are strings: the schema visitor gives them their types.
#![forbid(unsafe_code)]

use serde_json::Value;

use super::Options;
use crate::err;
use crate::error::Result;

/// The longest name between two dots, in bytes (QEMU's limit).
const FRAGMENT_MAX: usize = 127;

/// The most dots in one key. QEMU has no limit; its deepest schema is far below, and unbounded recursion is not for us.
const DEPTH_MAX: usize = 1024;

/// What [`parse`] found.
#[derive(Debug, PartialEq)]
pub struct Keyval {
    /// The parameters: objects, lists and strings.
    pub tree: Options,
    /// `help` or `?` stood where a parameter should.
    pub help: bool,
}

/// Parses `text`; `implied` is the key of a first parameter that is only a value.
///
/// # Errors
/// In QEMU's words.
pub fn parse(text: &str, implied: Option<&str>) -> Result<Keyval> {
    let mut result = Keyval { tree: Options::new(), help: false };
    let mut implied = implied;
    let mut rest = text;
    while !rest.is_empty() {
        rest = parse_one(&mut result, rest, implied.take())?;
    }
    listify(&mut result.tree, &mut String::new())?;
    Ok(result)
}

/// Takes one parameter off the front of `text` and answers what follows it.
fn parse_one<'a>(result: &mut Keyval, text: &'a str, implied: Option<&str>) -> Result<&'a str> {
    let word = &text[..text.find(['=', ',']).unwrap_or(text.len())];
    let after = &text[word.len()..];
    let bare = !word.is_empty() && !after.starts_with('=');
    if bare && (word == "help" || word == "?") {
        result.help = true;
        return Ok(after.strip_prefix(',').unwrap_or(after));
    }
    if let (true, Some(key)) = (bare, implied) {
        put(&mut result.tree, &split_key(key)?, key, word.to_string())?;
        return Ok(after.strip_prefix(',').unwrap_or(after));
    }
    let fragments = split_key(word)?;
    let Some(after) = after.strip_prefix('=') else {
        return Err(err!("Expected '=' after parameter '{word}'"));
    };
    let (value, rest) = take_value(after);
    put(&mut result.tree, &fragments, word, value)?;
    Ok(rest)
}

/// A value up to its comma (`,,` is one in the value), and what follows.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let end = rest.find(',').unwrap_or(rest.len());
        value.push_str(&rest[..end]);
        rest = &rest[end..];
        if let Some(more) = rest.strip_prefix(",,") {
            value.push(',');
            rest = more;
        } else {
            return (value, rest.strip_prefix(',').unwrap_or(rest));
        }
    }
}

/// The length of the name at the front of `text`; 0 if there is none. A name is a letter, then letters, digits, `-`
/// and `_`; a vendor's own has `__DOMAIN_` in front.
fn name_len(text: &str) -> usize {
    let run = |s: &str, more: &[char]| {
        s.find(|c: char| !c.is_ascii_alphanumeric() && !more.contains(&c)).unwrap_or(s.len())
    };
    let mut start = 0;
    if let Some(vendor) = text.strip_prefix("__") {
        let len = run(vendor, &['-', '.']);
        if len == 0 || !vendor[len..].starts_with('_') {
            return 0;
        }
        start = 2 + len + 1;
    }
    if !text[start..].starts_with(|c: char| c.is_ascii_alphabetic()) {
        return 0;
    }
    start + run(&text[start..], &['-', '_'])
}

/// Splits a key at its dots and checks every part.
fn split_key(key: &str) -> Result<Vec<&str>> {
    let mut fragments = Vec::new();
    let mut start = 0;
    loop {
        let text = &key[start..];
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let len = if start > 0 && digits > 0 { digits } else { name_len(text) };
        let end = start + len;
        if len == 0 || (end < key.len() && !key[end..].starts_with('.')) {
            return Err(err!("Invalid parameter '{key}'"));
        }
        if len > FRAGMENT_MAX {
            let what = if start > 0 || end < key.len() { " fragment" } else { "" };
            return Err(err!("Parameter{what} '{}' is too long", &text[..len]));
        }
        fragments.push(&text[..len]);
        if end == key.len() {
            return Ok(fragments);
        }
        if fragments.len() == DEPTH_MAX {
            return Err(err!("Parameter '{}...' is nested too deeply", fragments[0]));
        }
        start = end + 1;
    }
}

/// Stores `value` under the path `fragments` (whose text is `key`). Lists are still objects with numbers for keys.
fn put(tree: &mut Options, fragments: &[&str], key: &str, value: String) -> Result<()> {
    let mut map = tree;
    let mut end = 0;
    let (last, parents) = fragments.split_last().expect("split_key answers at least one fragment");
    for fragment in parents {
        end += fragment.len();
        let slot = map.entry(*fragment).or_insert_with(|| Value::Object(Options::new()));
        let Value::Object(next) = slot else {
            return Err(err!("Parameters '{}.*' used inconsistently", &key[..end]));
        };
        map = next;
        end += 1;
    }
    if matches!(map.get(*last), Some(Value::Object(_))) {
        return Err(err!("Parameters '{key}.*' used inconsistently"));
    }
    map.insert((*last).to_string(), Value::String(value));
    Ok(())
}

/// Turns the objects below `map` whose keys are all numbers into lists. `prefix` is the path of `map` with a dot.
fn listify(map: &mut Options, prefix: &mut String) -> Result<()> {
    let len = prefix.len();
    for (key, value) in map.iter_mut() {
        let Value::Object(child) = value else { continue };
        prefix.push_str(key);
        prefix.push('.');
        listify(child, prefix)?;
        if let Some(list) = to_list(child, prefix)? {
            *value = Value::Array(list);
        }
        prefix.truncate(len);
    }
    Ok(())
}

/// The list that `map` stands for; `None` if its keys are names.
fn to_list(map: &mut Options, prefix: &str) -> Result<Option<Vec<Value>>> {
    let indices = map.keys().filter(|k| k.starts_with(|c: char| c.is_ascii_digit())).count();
    if indices == 0 {
        return Ok(None);
    }
    if indices != map.len() {
        return Err(err!("Parameters '{prefix}*' used inconsistently"));
    }
    let mut items: Vec<(u64, Value)> =
        std::mem::take(map).into_iter().map(|(k, v)| (k.parse().unwrap_or(u64::MAX), v)).collect();
    items.sort_by_key(|item| item.0);
    // "1" and "01" are the same index: the first that was written counts.
    items.dedup_by_key(|item| item.0);
    for (expected, item) in (0..).zip(&items) {
        if item.0 != expected {
            return Err(err!("Parameter '{prefix}{expected}' missing"));
        }
    }
    Ok(Some(items.into_iter().map(|item| item.1).collect()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tree(text: &str) -> Value {
        Value::Object(parse(text, Some("driver")).unwrap().tree)
    }

    fn error(text: &str) -> String {
        parse(text, Some("driver")).unwrap_err().message().to_string()
    }

    #[test]
    fn values_and_nesting() {
        assert_eq!(tree(""), json!({}));
        assert_eq!(tree("file"), json!({"driver": "file"}));
        assert_eq!(tree("file,"), json!({"driver": "file"}));
        assert_eq!(tree("file,filename=a,,b"), json!({"driver": "file", "filename": "a,b"}));
        assert_eq!(tree("a=,b=x=y"), json!({"a": "", "b": "x=y"}));
        assert_eq!(tree("a=1,a=2"), json!({"a": "2"}));
        assert_eq!(tree("a=b,,,c=d"), json!({"a": "b,", "c": "d"}));
        assert_eq!(tree("a.b.c=1,a.d=2"), json!({"a": {"b": {"c": "1"}, "d": "2"}}));
        assert_eq!(tree("a.1=x,a.0=y"), json!({"a": ["y", "x"]}));
        assert_eq!(tree("a.0.x=1,a.0.y=2"), json!({"a": [{"x": "1", "y": "2"}]}));
        assert_eq!(tree("__com.redhat_x=1"), json!({"__com.redhat_x": "1"}));
    }

    #[test]
    fn errors_are_qemus() {
        for (text, expected) in [
            ("=x", "Invalid parameter ''"),
            ("null-co,,", "Invalid parameter ''"),
            (".x=3", "Invalid parameter '.x'"),
            ("x.=3", "Invalid parameter 'x.'"),
            ("x..y=3", "Invalid parameter 'x..y'"),
            ("x.1y=3", "Invalid parameter 'x.1y'"),
            ("1x=3", "Invalid parameter '1x'"),
            ("0=3", "Invalid parameter '0'"),
            ("_x=3", "Invalid parameter '_x'"),
            ("__x=3", "Invalid parameter '__x'"),
            ("__com_=3", "Invalid parameter '__com_'"),
            ("x.-1=3", "Invalid parameter 'x.-1'"),
            ("a b=3", "Invalid parameter 'a b'"),
            ("é=3", "Invalid parameter 'é'"),
            ("x,node-name", "Expected '=' after parameter 'node-name'"),
            ("a=3,a.b=on", "Parameters 'a.*' used inconsistently"),
            ("a.b=on,a=3", "Parameters 'a.*' used inconsistently"),
            ("a.b.c=1,a.b=2", "Parameters 'a.b.*' used inconsistently"),
            ("a.0=1,a.x=2", "Parameters 'a.*' used inconsistently"),
            ("a.b.0=1,a.b.x=2,a.0=1", "Parameters 'a.b.*' used inconsistently"),
            ("a.1=1", "Parameter 'a.0' missing"),
            ("a.0=1,a.2=1", "Parameter 'a.1' missing"),
            ("a.4294967296=1", "Parameter 'a.0' missing"),
        ] {
            assert_eq!(error(text), expected, "{text:?}");
        }
        let long = "k".repeat(128);
        assert_eq!(error(&format!("{long}=1")), format!("Parameter '{long}' is too long"));
        assert_eq!(
            error(&format!("x.{long}=1")),
            format!("Parameter fragment '{long}' is too long")
        );
    }

    #[test]
    fn help_is_seen_and_taken_out() {
        assert_eq!(parse("help", Some("d")).unwrap(), Keyval { tree: Options::new(), help: true });
        assert!(parse("x,?", Some("d")).unwrap().help);
        assert!(!parse("help=on", Some("d")).unwrap().help);
        assert!(error("x,helpx").starts_with("Expected '='"));
    }

    #[test]
    fn hostile_depth_is_an_error() {
        assert!(error(&format!("{}b=1", "a.".repeat(50_000))).ends_with("nested too deeply"));
        assert!(parse(&format!("{}b=1", "a.".repeat(1000)), None).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in "[a-c0-2.,=?_ é-]{0,40}") {
            let _ = parse(&text, Some("driver"));
        }
    }
}
