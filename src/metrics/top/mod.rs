//! `vhost-user-blk top`: what a running back end does, from its metrics.
#![forbid(unsafe_code)]

mod sample;
mod table;

use std::io::{self, IsTerminal, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use sample::Samples;

use super::address::Address;
use crate::err;
use crate::error::Result;

/// The word for it, the first argument.
pub const COMMAND: &str = "top";

/// The longest answer that is read, in bytes: thousands of queues.
const ANSWER_MAX: u64 = 256 << 20;
/// How long the back end may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

const HELP: &str = "\
Usage: vhost-user-blk top [--metrics] ADDRESS [--once] [--interval SECONDS]
Shows what a back end that was started with --metrics=ADDRESS does, queue by queue:
again and again on a terminal, else a block for each interval.

  --metrics ADDRESS      PATH, unix:PATH or HOST:PORT of its metrics
  --once                 one interval, and the end
  --interval SECONDS     its length (1), 0.05 to 3600

  IOPS, MB/s             answers and their bytes (10^6), of all kinds
  p50, p99               latency of reads, writes and flushes, between the turns of the
                         worker's loop that took and answered them; exact to a third
  FLT                    requests in flight at the end
  POLL%                  of the worker's waits those that ended before it slept
  KICK/IO, CALL/IO       kicks noticed and notifications sent for each answer
  CACHE%                 reads and writes that needed no qcow2 table from the image
  ERR                    answers with an error
";

/// What the arguments say.
struct Wish {
    address: Address,
    once: bool,
    interval: Duration,
}

/// Runs with `args`, those after the command.
///
/// # Errors
/// The arguments; nobody answers, or not with metrics of ours.
pub fn main(args: &[String]) -> Result<ExitCode> {
    let Some(wish) = read_args(args)? else {
        return print(HELP).map(|_| ExitCode::SUCCESS);
    };
    let terminal = io::stdout().is_terminal();
    let mut before = (fetch(&wish.address)?, Instant::now());
    loop {
        std::thread::sleep(wish.interval);
        let now = (fetch(&wish.address)?, Instant::now());
        let block = table::render(&before.0, &now.0, now.1 - before.1);
        // Home, the text, and nothing behind it.
        let text = if terminal && !wish.once {
            format!("\x1b[H{}\x1b[J", block.replace('\n', "\x1b[K\n"))
        } else {
            format!("{block}\n")
        };
        if !print(&text)? || wish.once {
            return Ok(ExitCode::SUCCESS);
        }
        before = now;
    }
}

/// `None`: help is asked for.
fn read_args(args: &[String]) -> Result<Option<Wish>> {
    let (mut address, mut once, mut interval) = (None, false, Duration::from_secs(1));
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let (name, mut value) = match arg.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value)),
            _ => (arg.as_str(), None),
        };
        let mut argument = || {
            value.take().or_else(|| args.next().map(String::as_str)).ok_or_else(|| {
                err!("option '{name}' requires an argument").with_hint("see top --help")
            })
        };
        match name {
            "-h" | "--help" => return Ok(None),
            "--once" => once = true,
            "--metrics" => address = Some(Address::parse(argument()?)?),
            "--interval" => {
                let text = argument()?;
                let seconds = text.parse().ok().filter(|s| (0.05..=3600.0).contains(s));
                let seconds = seconds.ok_or_else(|| err!("'{text}' are no seconds"))?;
                interval = Duration::from_secs_f64(seconds);
            }
            other if !other.starts_with('-') && address.is_none() => {
                address = Some(Address::parse(arg)?);
            }
            _ => return Err(err!("unexpected argument '{arg}'").with_hint("see top --help")),
        }
    }
    let address = address.ok_or_else(|| err!("no address is given").with_hint("see top --help"))?;
    Ok(Some(Wish { address, once, interval }))
}

/// Prints. Whether somebody still reads it.
fn print(text: &str) -> Result<bool> {
    let mut out = io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(err!("cannot print: {e}")),
    }
}

/// What the back end at `address` counts, now.
fn fetch(address: &Address) -> Result<Samples> {
    let (answer, name) = match address {
        Address::Path(path) => (ask_path(path), path.clone()),
        Address::Port(port) => (
            TcpStream::connect_timeout(port, PATIENCE).and_then(|stream| {
                stream.set_read_timeout(Some(PATIENCE))?;
                ask(stream)
            }),
            port.to_string(),
        ),
    };
    let answer = answer.map_err(|e| err!("{name}: {e}"))?;
    let head_and_body = answer.split_once("\r\n\r\n");
    let body = head_and_body.filter(|(head, _)| head.starts_with("HTTP/1.1 200 ")).map(|(_, b)| b);
    body.and_then(Samples::parse).ok_or_else(|| err!("{name}: no metrics of vhost-user-blk"))
}

fn ask_path(path: &str) -> io::Result<String> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    ask(stream)
}

fn ask(mut stream: impl Read + Write) -> io::Result<String> {
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let read =
            |args: &[&str]| read_args(&args.iter().map(ToString::to_string).collect::<Vec<_>>());
        let wish = read(&["--metrics", "m", "--once", "--interval=0.5"]).unwrap().unwrap();
        assert_eq!((wish.address, wish.once), (Address::Path("m".into()), true));
        assert_eq!(wish.interval, Duration::from_millis(500));
        assert!(read(&["m"]).unwrap().is_some());
        assert!(read(&["--help"]).unwrap().is_none());
        for bad in [
            &[][..],
            &["--metrics"],
            &["m", "n"],
            &["m", "-x"],
            &["m", "--interval", "0"],
            &["10.0.0.1:1"],
        ] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }
}
