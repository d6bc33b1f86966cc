//! Cuts JSON text into words.
#![forbid(unsafe_code)]

use super::syntax;
use crate::error::Result;

/// One word of JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token<'a> {
    /// One of `{}[]:,`.
    Punct(char),
    /// A number.
    Number(&'a str),
    /// A run of lower-case letters.
    Keyword(&'a str),
    /// A string with its quotes, escapes unread.
    Str(&'a str),
}

/// What is left of the text.
pub(super) struct Lexer<'a> {
    rest: &'a str,
}

impl<'a> Lexer<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Lexer { rest: text }
    }

    /// The next word; `None` at the end.
    ///
    /// # Errors
    /// If none can begin or go on like this: `stray '...'`.
    pub(super) fn next(&mut self) -> Result<Option<Token<'a>>> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        let Some(first) = self.rest.chars().next() else { return Ok(None) };
        let (len, make): (_, fn(&'a str) -> Token<'a>) = match first {
            '{' | '}' | '[' | ']' | ':' | ',' => {
                self.rest = &self.rest[1..];
                return Ok(Some(Token::Punct(first)));
            }
            'a'..='z' => {
                let other = |c: char| !c.is_ascii_lowercase();
                (Ok(self.rest.find(other).unwrap_or(self.rest.len())), Token::Keyword)
            }
            '-' | '0'..='9' => (number_len(self.rest), Token::Number),
            '"' | '\'' => (string_len(self.rest, first), Token::Str),
            _ => (Err(first.len_utf8()), Token::Keyword),
        };
        let len = len.map_err(|bad| syntax(format!("stray '{}'", &self.rest[..bad])))?;
        let (word, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(Some(make(word)))
    }
}

/// The length of the string at the front of `text`, with its quotes; or how much of it shows that it is none.
fn string_len(text: &str, quote: char) -> std::result::Result<usize, usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if c < ' ' {
            return Err(at + 1);
        }
        if c == quote && !escaped {
            return Ok(at + 1);
        }
        escaped = c == '\\' && !escaped;
    }
    Err(text.len())
}

/// The length of the number at the front of `text`; or how much of it shows that it is none.
fn number_len(text: &str) -> std::result::Result<usize, usize> {
    let digit = |at: usize| text.as_bytes().get(at).is_some_and(u8::is_ascii_digit);
    // Up to and with the character at `at`, which should have been a digit.
    let bad = |at: usize| Err(at + text[at..].chars().next().map_or(0, char::len_utf8));
    let digits = |mut at: usize| {
        while digit(at) {
            at += 1;
        }
        at
    };
    let mut at = usize::from(text.starts_with('-'));
    if !digit(at) {
        return bad(at);
    }
    let zero = text[at..].starts_with('0');
    at = if zero { at + 1 } else { digits(at) };
    if zero && digit(at) {
        return bad(at);
    }
    if text[at..].starts_with('.') {
        if !digit(at + 1) {
            return bad(at + 1);
        }
        at = digits(at + 1);
    }
    if text[at..].starts_with(['e', 'E']) {
        at += 1;
        at += usize::from(text[at..].starts_with(['+', '-']));
        if !digit(at) {
            return bad(at);
        }
        at = digits(at);
    }
    Ok(at)
}
