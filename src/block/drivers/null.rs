//! `null-co` and `null-aio`: a disk that stores nothing. Reads leave the memory as it is (or zero it, with
//! `read-zeroes`), writes vanish. For benchmarks and tests.
#![forbid(unsafe_code)]

use std::time::Duration;

use serde_json::Value;

use crate::block::perm::default_child_perms;
use crate::block::{
    Dir, Driver, DriverDef, DriverKind, IoFuture, Limits, Map, Op, OpenArgs, Recognises,
};
use crate::err;
use crate::error::{Errno, Result};
use crate::qapi::{Kind, OptionSpec, Options};
use crate::rt;

/// The size of a disk for which the user gives none, in bytes.
const DEFAULT_SIZE: u64 = 1 << 30;

const OPTIONS: &[OptionSpec] = &[
    OptionSpec::optional("size", Kind::Int { bits: 64, signed: true }),
    OptionSpec::optional("latency-ns", Kind::Int { bits: 64, signed: false }),
    OptionSpec::optional("read-zeroes", Kind::Bool),
];

/// `null-co`.
pub static NULL_CO: DriverDef = DriverDef {
    name: "null-co",
    kind: DriverKind::Protocol,
    options: OPTIONS,
    open,
    recognises: Recognises::Nothing,
    child_perms: default_child_perms,
};

/// `null-aio`: the same, under the name of the other implementation that QEMU has.
pub static NULL_AIO: DriverDef = DriverDef {
    name: "null-aio",
    kind: DriverKind::Protocol,
    options: OPTIONS,
    open,
    recognises: Recognises::Nothing,
    child_perms: default_child_perms,
};

struct Null {
    size: u64,
    latency: Duration,
    read_zeroes: bool,
}

fn open(args: &mut OpenArgs<'_>) -> Result<Box<dyn Driver>> {
    let size = args.take_size("size")?.unwrap_or(DEFAULT_SIZE);
    let latency = match args.options.shift_remove("latency-ns") {
        None => 0,
        Some(value) => value
            .as_u64()
            .filter(|ns| i64::try_from(*ns).is_ok())
            .ok_or_else(|| err!("latency-ns is invalid"))?,
    };
    let read_zeroes = args.take_bool("read-zeroes")?.unwrap_or(false);
    Ok(Box::new(Null { size, latency: Duration::from_nanos(latency), read_zeroes }))
}

impl Null {
    async fn serve(&self, op: Op<'_>) -> std::result::Result<(), Errno> {
        if !self.latency.is_zero() {
            rt::sleep_unless_cancelled(self.latency).await?;
        }
        if let (Op::Read { to, .. }, true) = (op, self.read_zeroes) {
            to.zero();
        }
        Ok(())
    }
}

impl Driver for Null {
    fn len(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn map(&self, dir: Dir, _offset: u64, _len: u64) -> Map<'_> {
        match dir {
            _ if !self.latency.is_zero() => Map::Slow,
            Dir::Read if self.read_zeroes => Map::Zero,
            _ => Map::Null,
        }
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        Box::pin(self.serve(op))
    }

    fn options_in_force(&self) -> Options {
        let latency = u64::try_from(self.latency.as_nanos()).unwrap_or(u64::MAX);
        [
            ("size", Value::from(self.size)),
            ("latency-ns", Value::from(latency)),
            ("read-zeroes", Value::from(self.read_zeroes)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .collect()
    }
}
