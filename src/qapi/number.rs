//! Numbers as QEMU reads them from a command line: C's integer syntax, and sizes with a suffix.
#![forbid(unsafe_code)]

/// Splits the blanks that `strtol` skips, and then a sign, off the front: whether it is a minus, and the rest.
fn sign(text: &str) -> (bool, &str) {
    let text = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
    match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    }
}

/// The magnitude of an integer in C's syntax (`0x1f`, `017`, `42`), all of `digits`.
fn magnitude(digits: &str) -> Option<u64> {
    let (digits, radix) = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    // `from_str_radix` would take a second sign.
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

/// A signed integer, as `strtoll` with base 0 reads it, if that is all of `text` and fits.
pub fn parse_i64(text: &str) -> Option<i64> {
    let (negative, digits) = sign(text);
    let value = i128::from(magnitude(digits)?);
    i64::try_from(if negative { -value } else { value }).ok()
}

/// An unsigned integer, as `strtoull` with base 0 reads it, if that is all of `text` and fits. A negative number
/// wraps, as it does there: `-1` is the largest.
pub fn parse_u64(text: &str) -> Option<u64> {
    let (negative, digits) = sign(text);
    let value = magnitude(digits)?;
    Some(if negative { value.wrapping_neg() } else { value })
}

/// Bytes for one unit of `suffix` (`b`, `k`, `M`, ... in either case).
fn unit(suffix: char) -> Option<u64> {
    let power = "bkmgtpe".find(suffix.to_ascii_lowercase())?;
    Some(1 << (10 * power))
}

/// A size in bytes: a decimal number with an optional fraction and an optional suffix (`512`, `1.5k`, `2G`), or
/// a hexadecimal one without either. Fractions of a byte are dropped, but only where there is a unit above bytes.
pub fn parse_size(text: &str) -> Option<u64> {
    let (negative, digits) = sign(text);
    if negative {
        return None;
    }
    if digits.starts_with("0x") || digits.starts_with("0X") {
        return magnitude(digits);
    }
    let (number, unit) = match digits.chars().next_back() {
        Some(c) if c.is_ascii_alphabetic() => (&digits[..digits.len() - 1], unit(c)?),
        _ => (digits, 1),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let fraction =
        if fraction.is_empty() { 0.0 } else { format!("0.{fraction}").parse::<f64>().ok()? };
    if fraction != 0.0 && unit == 1 {
        return None;
    }
    // The fraction is below 1 and a unit at most 2^60: no overflow.
    whole.checked_mul(unit)?.checked_add((fraction * unit as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_read_as_c_reads_them() {
        for (text, value) in [
            ("0", Some(0)),
            (" 1", Some(1)),
            ("+2", Some(2)),
            ("-5", Some(-5)),
            ("0x10", Some(16)),
            ("010", Some(8)),
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("", None),
            ("x", None),
            ("1 ", None),
            ("1k", None),
            ("1.5", None),
            ("08", None),
            ("0x", None),
            ("0x+1", None),
            ("--2", None),
            ("+-2", None),
        ] {
            assert_eq!(parse_i64(text), value, "{text:?}");
        }
        assert_eq!(parse_u64("18446744073709551615"), Some(u64::MAX));
        assert_eq!(parse_u64("18446744073709551616"), None);
        assert_eq!(parse_u64("-1"), Some(u64::MAX), "as strtoull");
    }

    #[test]
    fn sizes_have_suffixes_and_fractions() {
        for (text, value) in [
            ("512", Some(512)),
            (" 512", Some(512)),
            ("+512", Some(512)),
            ("512b", Some(512)),
            ("512.0", Some(512)),
            ("512.0b", Some(512)),
            ("4k", Some(4096)),
            ("4K", Some(4096)),
            ("0.5k", Some(512)),
            (".5k", Some(512)),
            ("1.", Some(1)),
            ("4.5k", Some(4608)),
            ("0.5000001k", Some(512)),
            ("1M", Some(1 << 20)),
            ("9E", Some(9 << 60)),
            ("16E", None),
            ("0x200", Some(512)),
            ("0X1E", Some(30)),
            ("0777", Some(777)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("", None),
            ("k", None),
            (".", None),
            (".k", None),
            ("-0", None),
            ("1.5", None),
            ("1.5b", None),
            ("4kk", None),
            ("4kB", None),
            ("1e3", None),
            (".5e1k", None),
            ("0.5.0k", None),
            ("0x1k", None),
            ("0x200.0", None),
            ("512s", None),
            ("512 ", None),
            ("1é", None),
        ] {
            assert_eq!(parse_size(text), value, "{text:?}");
        }
    }
}
