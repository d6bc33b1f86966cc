//! As much of HTTP/1.1 as a scraper needs: one GET, one answer, the end of the connection.
#![forbid(unsafe_code)]

/// The longest request, in bytes, from the first to the empty line. Prometheus sends some 300.
pub const REQUEST_MAX: usize = 8 << 10;

/// What the specification calls its content type.
const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What to do about the bytes that have come so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Wait for the rest.
    More,
    /// Answer with the metrics; with `false`, with the answer's head only.
    Metrics(bool),
    /// Refuse, with this status.
    Refuse(&'static str),
}

/// Looks at `input`, the beginning of what a client sends.
pub fn look(input: &[u8]) -> Step {
    let end = input.windows(4).position(|w| w == b"\r\n\r\n");
    let Some(head) = end.map(|end| &input[..end]) else {
        return match input.len() {
            REQUEST_MAX.. => Step::Refuse("431 Request Header Fields Too Large"),
            _ => Step::More,
        };
    };
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let words: Vec<_> = line.split(|b| *b == b' ').collect();
    let [method, target, version] = words[..] else { return Step::Refuse("400 Bad Request") };
    if !version.starts_with(b"HTTP/1.") {
        return Step::Refuse("400 Bad Request");
    }
    let path = target.split(|b| *b == b'?').next().unwrap_or_default();
    match (method, path) {
        (b"GET", b"/metrics" | b"/") => Step::Metrics(true),
        (b"HEAD", b"/metrics" | b"/") => Step::Metrics(false),
        (b"GET" | b"HEAD", _) => Step::Refuse("404 Not Found"),
        _ => Step::Refuse("405 Method Not Allowed"),
    }
}

/// The answer with the metrics in `text`.
pub fn answer(text: &str, with_body: bool) -> Vec<u8> {
    let mut answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: {TYPE}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        text.len()
    );
    if with_body {
        answer.push_str(text);
    }
    answer.into_bytes()
}

/// The answer that says `status`.
pub fn refuse(status: &str) -> Vec<u8> {
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    format!("HTTP/1.1 {status}\r\n{allow}Content-Length: 0\r\nConnection: close\r\n\r\n")
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        let long = vec![b'x'; REQUEST_MAX];
        for (input, step) in [
            (&b""[..], Step::More),
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\n", Step::More),
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Step::Metrics(true)),
            (b"GET /metrics?a=b HTTP/1.0\r\n\r\n", Step::Metrics(true)),
            (b"HEAD / HTTP/1.1\r\n\r\n", Step::Metrics(false)),
            (b"GET /x HTTP/1.1\r\n\r\n", Step::Refuse("404 Not Found")),
            (b"POST /metrics HTTP/1.1\r\n\r\n", Step::Refuse("405 Method Not Allowed")),
            (b"GET /metrics HTTP/2\r\n\r\n", Step::Refuse("400 Bad Request")),
            (b"\r\n\r\n", Step::Refuse("400 Bad Request")),
            (b"GET  /metrics HTTP/1.1\r\n\r\n", Step::Refuse("400 Bad Request")),
            (b"\0\xff\xfe\r\n\r\n", Step::Refuse("400 Bad Request")),
            (&long, Step::Refuse("431 Request Header Fields Too Large")),
        ] {
            assert_eq!(look(input), step, "{:?}", String::from_utf8_lossy(input));
        }
    }
}
