//! JSON as QEMU reads it: strict JSON plus strings in single quotes, with QEMU's error texts.
//!
//! Words are cut first, for as long as brackets are open; only then are they put together. So a character that cannot
//! begin a word is complained about before a missing comma left of it, as QEMU does.
#![forbid(unsafe_code)]

mod lexer;
mod string;

use lexer::{Lexer, Token};
use serde_json::Value;

use super::Options;
use crate::err;
use crate::error::{Error, Result};

/// How deep objects and lists may nest (QEMU's limit).
const DEPTH_MAX: usize = 1024;

/// Parses the one JSON value in `text`.
///
/// # Errors
/// In QEMU's words.
pub fn parse(text: &str) -> Result<Value> {
    let mut lexer = Lexer::new(text);
    let tokens = one_value(&mut lexer)?;
    let value = Parser { tokens: &tokens, at: 0 }.value()?;
    match lexer.next() {
        Ok(None) => Ok(value),
        _ => Err(err!("Expecting at most one JSON value")),
    }
}

/// The words up to where all brackets are closed (or closed too often: the parser will say so).
fn one_value<'a>(lexer: &mut Lexer<'a>) -> Result<Vec<Token<'a>>> {
    let (mut braces, mut brackets) = (0usize, 0usize);
    let mut tokens = Vec::new();
    while let Some(token) = lexer.next()? {
        tokens.push(token);
        let open = match token {
            Token::Punct('{') => braces.checked_add(1).map(|n| braces = n),
            Token::Punct('}') => braces.checked_sub(1).map(|n| braces = n),
            Token::Punct('[') => brackets.checked_add(1).map(|n| brackets = n),
            Token::Punct(']') => brackets.checked_sub(1).map(|n| brackets = n),
            _ => Some(()),
        };
        if braces + brackets > DEPTH_MAX {
            return Err(err!("JSON nesting depth limit exceeded"));
        }
        if open.is_none() || (braces == 0 && brackets == 0) {
            break;
        }
    }
    Ok(tokens)
}

/// An error in the grammar.
fn syntax(what: impl std::fmt::Display) -> Error {
    err!("JSON parse error, {what}")
}

/// Puts words together. Recursion is bounded by [`DEPTH_MAX`].
struct Parser<'t, 'a> {
    tokens: &'t [Token<'a>],
    at: usize,
}

impl<'a> Parser<'_, 'a> {
    fn take(&mut self) -> Result<Token<'a>> {
        let token = self.peek()?;
        self.at += 1;
        Ok(token)
    }

    fn peek(&self) -> Result<Token<'a>> {
        self.tokens.get(self.at).copied().ok_or_else(|| syntax("premature EOI"))
    }

    fn value(&mut self) -> Result<Value> {
        match self.take()? {
            Token::Punct('{') => self.object(),
            Token::Punct('[') => self.list(),
            Token::Punct(_) => Err(syntax("expecting value")),
            Token::Number(text) => number(text),
            Token::Str(text) => string::unescape(text).map(Value::String),
            Token::Keyword("true") => Ok(Value::Bool(true)),
            Token::Keyword("false") => Ok(Value::Bool(false)),
            Token::Keyword("null") => Ok(Value::Null),
            Token::Keyword(text) => Err(syntax(format!("invalid keyword '{text}'"))),
        }
    }

    fn object(&mut self) -> Result<Value> {
        let mut map = Options::new();
        if self.peek()? == Token::Punct('}') {
            self.at += 1;
            return Ok(Value::Object(map));
        }
        loop {
            self.pair(&mut map)?;
            match self.take()? {
                Token::Punct('}') => return Ok(Value::Object(map)),
                Token::Punct(',') => {}
                _ => return Err(syntax("expected separator in dict")),
            }
        }
    }

    fn pair(&mut self, map: &mut Options) -> Result<()> {
        let Value::String(key) = self.value()? else {
            return Err(syntax("key is not a string in object"));
        };
        if self.take()? != Token::Punct(':') {
            return Err(syntax("missing : in object pair"));
        }
        let value = self.value()?;
        if map.insert(key, value).is_some() {
            return Err(syntax("duplicate key"));
        }
        Ok(())
    }

    fn list(&mut self) -> Result<Value> {
        let mut list = Vec::new();
        if self.peek()? == Token::Punct(']') {
            self.at += 1;
            return Ok(Value::Array(list));
        }
        loop {
            list.push(self.value()?);
            match self.take()? {
                Token::Punct(']') => return Ok(Value::Array(list)),
                Token::Punct(',') => {}
                _ => return Err(syntax("expected separator in list")),
            }
        }
    }
}

/// An integer if it is one and fits 64 bits, else a floating-point number.
fn number(text: &str) -> Result<Value> {
    if let Ok(n) = text.parse::<i64>() {
        return Ok(n.into());
    }
    if let Ok(n) = text.parse::<u64>() {
        return Ok(n.into());
    }
    // Out of range is infinity, which JSON values cannot hold: the largest number is as wrong for every option.
    let n = text.parse::<f64>().map_err(|_| syntax(format!("invalid number '{text}'")))?;
    Ok(n.clamp(f64::MIN, f64::MAX).into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values() {
        assert_eq!(
            parse(r#" {"a": [1, -2, 1.5, 1E5], "b": {}, "c": [], "d": null, "e": true, 'f': 'x"y\''} "#)
                .unwrap(),
            json!({"a": [1, -2, 1.5, 1e5], "b": {}, "c": [], "d": null, "e": true, "f": "x\"y'"})
        );
        assert_eq!(parse("18446744073709551615").unwrap(), json!(u64::MAX));
        assert!(parse("99999999999999999999").unwrap().is_f64());
        assert!(parse("1e999").unwrap().is_f64());
        assert_eq!(parse("-0").unwrap(), json!(0));
    }

    #[test]
    fn errors_are_qemus() {
        for (text, expected) in [
            ("{", "premature EOI"),
            (r#"{"a"}"#, "missing : in object pair"),
            (r#"{"a":}"#, "expecting value"),
            (r#"{"a":1,"#, "premature EOI"),
            (r#"{"a":1,}"#, "expecting value"),
            (r#"{"a":1 "b":2}"#, "expected separator in dict"),
            ("{a:1}", "invalid keyword 'a'"),
            ("{1:1}", "key is not a string in object"),
            ("{null:1}", "key is not a string in object"),
            ("{]", "expecting value"),
            (r#"{"a":[}"#, "expecting value"),
            (r#"{"a":[1}}"#, "expected separator in list"),
            (r#"{"a":[1,]}"#, "expecting value"),
            (r#"{"a":1,"a":2}"#, "duplicate key"),
            (r#"{"a" 1 @"#, "stray '@'"),
            (r#"{"a":a_b}"#, "stray '_'"),
            (r#"{"a":a-b}"#, "stray '-b'"),
            (r#"{"a":a1}"#, "invalid keyword 'a'"),
            (r#"{"a":True}"#, "stray 'T'"),
            (r#"{"a":01}"#, "stray '01'"),
            (r#"{"a":-01}"#, "stray '-01'"),
            (r#"{"a":1.}"#, "stray '1.}'"),
            (r#"{"a":1.e}"#, "stray '1.e'"),
            (r#"{"a":1e}"#, "stray '1e}'"),
            (r#"{"a":-1.5e+}"#, "stray '-1.5e+}'"),
            (r#"{"a":1.5.}"#, "stray '.'"),
            (r#"{"a":1x}"#, "expected separator in dict"),
            (r#"{"a":1."#, "stray '1.'"),
            (r#"{"a":"x}"#, "stray '\"x}'"),
            (r#"{"a":"\"#, "stray '\"\\'"),
            ("{\"a\":\"\t\"}", "stray '\"\t'"),
            (r#"{"a":"\q"}"#, "invalid escape sequence in string"),
            (r#"{"a":"\u12zzzz"}"#, r"\u12zz is not a valid Unicode character"),
            (r#"{"a":"\u1"}"#, "\\u1\" is not a valid Unicode character"),
            (r#"{"a":"\ud800\ud800"}"#, r"\ud800 is not a valid Unicode character"),
            (r#"{"a":"\uffff"}"#, r"\uffff is not a valid Unicode character"),
        ] {
            assert_eq!(
                parse(text).unwrap_err().message(),
                format!("JSON parse error, {expected}"),
                "{text}"
            );
        }
        for text in ["{} x", "{}}", "{}{}", "{},", "{} @"] {
            assert_eq!(parse(text).unwrap_err().message(), "Expecting at most one JSON value");
        }
    }

    #[test]
    fn depth_has_a_limit() {
        let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(parse(&nested(1024)).is_ok());
        for n in [1025, 1_000_000] {
            assert_eq!(
                parse(&nested(n)).unwrap_err().message(),
                "JSON nesting depth limit exceeded"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in r#"[{}\[\]:,"'\\ua0-2e.é@ -]{0,40}"#) {
            let _ = parse(&text);
        }

        #[test]
        fn agrees_with_serde(text in r#"[{}\[\]:,"a0-2e. -]{0,12}"#) {
            // Whatever serde takes, QEMU's dialect takes too, but for repeated keys.
            if let (Ok(expected), false) = (serde_json::from_str::<Value>(&text), text.contains(',')) {
                proptest::prop_assert_eq!(parse(&text).unwrap(), expected);
            }
        }
    }
}
