//! Where metrics are served: `PATH`, `unix:PATH` or `HOST:PORT` of this host.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::err;
use crate::error::Result;

/// A place to listen at, or to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket's path.
    Path(String),
    /// A port of the loopback interface.
    Port(SocketAddr),
}

impl Address {
    /// Reads `text`. What has a slash is a path, and so is what does not end with a colon and a number.
    ///
    /// # Errors
    /// A host that is not this one: who may connect to a port cannot be told, so nobody else's machine may.
    pub fn parse(text: &str) -> Result<Address> {
        let path = |path: &str| match path {
            "" => Err(err!("expected PATH, unix:PATH or HOST:PORT")),
            path => Ok(Address::Path(path.to_owned())),
        };
        if let Some(after) = text.strip_prefix("unix:") {
            return path(after);
        }
        let Some((host, port)) = text.rsplit_once(':').filter(|_| !text.contains('/')) else {
            return path(text);
        };
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return path(text);
        }
        let port = port.parse().map_err(|_| err!("no port has the number {port}"))?;
        let host = match host {
            "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            host => {
                let number = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
                number.unwrap_or(host).parse().map_err(|_| err!("'{host}' is not loopback"))?
            }
        };
        if !host.is_loopback() {
            return Err(err!("'{host}' is not loopback"));
        }
        Ok(Address::Port(SocketAddr::new(host, port)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_ports() {
        let path = |text: &str| Address::Path(text.into());
        for (text, expected) in [
            ("m.sock", path("m.sock")),
            ("/run/x:1/m", path("/run/x:1/m")),
            ("./a:12", path("./a:12")),
            ("unix:a:12", path("a:12")),
            ("a:b", path("a:b")),
            ("127.0.0.1:9100", Address::Port("127.0.0.1:9100".parse().unwrap())),
            ("127.9.9.9:0", Address::Port("127.9.9.9:0".parse().unwrap())),
            ("localhost:9100", Address::Port("127.0.0.1:9100".parse().unwrap())),
            ("[::1]:9100", Address::Port("[::1]:9100".parse().unwrap())),
        ] {
            assert_eq!(Address::parse(text).unwrap(), expected, "{text}");
        }
        for text in [
            "",
            "unix:",
            "0.0.0.0:1",
            "10.0.0.1:9100",
            "host:1",
            "[::]:1",
            ":9100",
            "127.0.0.1:65536",
        ] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }
}
