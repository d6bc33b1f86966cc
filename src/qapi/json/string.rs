//! Escapes in JSON strings.
#![forbid(unsafe_code)]

use super::syntax;
use crate::error::{Error, Result};

/// The text of `quoted`, a string with its quotes.
pub(super) fn unescape(quoted: &str) -> Result<String> {
    let body = &quoted[1..quoted.len() - 1];
    let mut text = String::with_capacity(body.len());
    let mut at = 0;
    while let Some(found) = body[at..].find('\\') {
        text.push_str(&body[at..at + found]);
        at += found + 1;
        let escape = body[at..].chars().next().expect("the lexer ends no string after a backslash");
        at += escape.len_utf8();
        match escape {
            '"' | '\'' | '\\' | '/' => text.push(escape),
            'b' => text.push('\u{8}'),
            'f' => text.push('\u{c}'),
            'n' => text.push('\n'),
            'r' => text.push('\r'),
            't' => text.push('\t'),
            'u' => {
                // The quote at the end stays visible: QEMU shows it when digits are missing.
                let (c, used) = unicode(&quoted[1 + at..])?;
                text.push(c);
                at += used;
            }
            _ => return Err(syntax("invalid escape sequence in string")),
        }
    }
    text.push_str(&body[at..]);
    Ok(text)
}

/// Four hexadecimal digits at the front of `text`.
fn hex4(text: &str) -> Option<u32> {
    let digits = text.get(..4)?;
    digits.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u32::from_str_radix(digits, 16).ok())?
}

/// The character that `text`, which follows `\u`, stands for, and how many bytes of `text` that takes. A pair of
/// surrogates is one character.
fn unicode(text: &str) -> Result<(char, usize)> {
    let high = hex4(text).ok_or_else(|| invalid(text))?;
    let mut code = high;
    let mut used = 4;
    if (0xd800..0xdc00).contains(&high)
        && let Some(low) = text[4..].strip_prefix("\\u").and_then(hex4)
        && (0xdc00..0xe000).contains(&low)
    {
        code = 0x10000 + ((high & 0x3ff) << 10) + (low & 0x3ff);
        used = 10;
    }
    // Noncharacters are refused too.
    let noncharacter = (0xfdd0..=0xfdef).contains(&code) || code & 0xfffe == 0xfffe;
    match char::from_u32(code) {
        Some(c) if !noncharacter => Ok((c, used)),
        _ => Err(invalid(text)),
    }
}

/// The complaint about the escape `\u` before `text`.
fn invalid(text: &str) -> Error {
    let shown: String = text.chars().take(4).collect();
    syntax(format!("\\u{shown} is not a valid Unicode character"))
}
