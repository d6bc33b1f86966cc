//! A session's state, for a server in another process that goes on with the same connection.
//!
//! Taken while the session is between two messages and no ring runs: what the front end has said so far is all there is.
//! Unread messages stay in the socket. What the successor cannot go on with (features that it does not offer, another number of
//! queues, a disk that looks otherwise) is an error before it has touched anything.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use super::inflight::Area;
use super::message::{InflightDesc, LogPlace, MemRegion, Protocol, VringAddr};
use super::parcel::{Parcel, flag, list, number, text};
use super::ring::{Kick, Ring};
use super::session::{OFFERED, Session};
use super::{ConfigChange, Device, memory};
use crate::err;
use crate::error::Result;
use crate::virtio::blk::CONFIG_LEN;

/// The capacity, in the configuration space: a medium may become longer at any moment.
const CAPACITY: std::ops::Range<usize> = 0..8;
/// The cache mode, likewise: it goes with the export.
const WCE: usize = crate::virtio::blk::CONFIG_WCE;

/// What the guest has read of the disk and believes in for ever.
fn looks(device: &dyn Device) -> Vec<u8> {
    let mut space = vec![0; CONFIG_LEN];
    device.read_config(0, &mut space);
    space[CAPACITY].fill(0);
    space[WCE] = 0;
    space
}

impl Session<'_> {
    /// Puts everything into `parcel`; what stands for it in its document. The rings of `ran` are those that are to run.
    ///
    /// # Errors
    /// No room for more descriptors; the device's state is being transferred.
    pub(super) fn save(
        &self,
        stream: &UnixStream,
        ran: &[usize],
        parcel: &mut Parcel,
    ) -> Result<Value> {
        if self.state.is_some() {
            return Err(err!("the device's state is being transferred"));
        }
        let mut regions = Vec::new();
        for r in self.map.regions() {
            regions.push(json!({
                "guest": r.guest_addr, "size": r.size, "user": r.user_addr, "offset": r.mmap_offset,
                "file": parcel.put(r.file())?,
            }));
        }
        let mut rings = Vec::new();
        for (i, ring) in self.rings.iter().enumerate() {
            rings.push(save_ring(ring, ran.contains(&i), parcel)?);
        }
        let inflight = match &self.inflight {
            None => Value::Null,
            Some(area) => {
                let (desc, file) = area.describe();
                json!({
                    "size": desc.mmap_size, "offset": desc.mmap_offset, "queues": desc.num_queues,
                    "queue-size": desc.queue_size, "file": parcel.put(file)?,
                })
            }
        };
        let log = match &self.log {
            None => Value::Null,
            Some(Err(e)) => json!({"error": e.message()}),
            Some(Ok(log)) => {
                let region = log.region();
                let file = parcel.put(region.file())?;
                json!({"size": region.size, "offset": region.mmap_offset, "file": file})
            }
        };
        let (channel, pending) = self.config_change.save(parcel)?;
        Ok(json!({
            "stream": parcel.put(stream.as_fd())?,
            "features": self.features,
            "protocol": self.protocol.bits(),
            "status": self.status,
            "looks": looks(self.device),
            "memory": regions,
            "rings": rings,
            "inflight": inflight,
            "log": log,
            "channel": channel,
            "pending": pending,
        }))
    }

    /// The session that [`Session::save`] described, its connection, and the rings that are to run. None runs yet.
    ///
    /// # Errors
    /// This device cannot go on with it; a file cannot be mapped.
    pub(super) fn load<'a>(
        (device, name, config_change): (&'a dyn Device, &'a str, &'a ConfigChange),
        from: &Value,
        parcel: &mut Parcel,
    ) -> Result<(Session<'a>, UnixStream, Vec<usize>)> {
        let mut session = Session::new(device, name, config_change);
        if from["looks"] != json!(looks(device)) {
            return Err(err!("the disk would look different to its guest"));
        }
        if !from["features"].is_null() {
            let features = number(from, "features")?;
            let foreign = features & !session.offered_features();
            if foreign != 0 {
                return Err(err!("the guest uses features {foreign:#x}, which are not offered"));
            }
            session.features = Some(features);
            device.set_features(features & device.features());
        }
        let protocol = Protocol::from_bits(number(from, "protocol")?);
        session.protocol = protocol
            .filter(|p| OFFERED.contains(*p))
            .ok_or_else(|| err!("the front end uses other protocol features"))?;
        let stream = UnixStream::from(parcel.take(&from["stream"])?);
        session.status = number(from, "status")?;
        let (mut regions, mut files) = (Vec::new(), Vec::new());
        for r in list(from, "memory")? {
            regions.push(MemRegion {
                guest_addr: number(r, "guest")?,
                size: number(r, "size")?,
                user_addr: number(r, "user")?,
                mmap_offset: number(r, "offset")?,
            });
            files.push(parcel.take(&r["file"])?);
        }
        session.map = memory::replaced(&regions, files)?;
        session.inflight = load_inflight(&from["inflight"], session.is_packed(), parcel)?;
        session.log = match &from["log"] {
            Value::Null => None,
            log if log["error"].is_string() => Some(Err(err!("{}", text(log, "error")?))),
            log => {
                let place =
                    LogPlace { size: number(log, "size")?, mmap_offset: number(log, "offset")? };
                Some(Ok(memory::log(place, parcel.take(&log["file"])?)?))
            }
        };
        let rings = list(from, "rings")?;
        if rings.len() != session.rings.len() {
            return Err(err!("{} queues, not {}", session.rings.len(), rings.len()));
        }
        let mut ran = Vec::new();
        for (i, ring) in rings.iter().enumerate() {
            session.rings[i] = load_ring(ring, parcel).map_err(|e| err!("queue {i}: {e}"))?;
            if flag(ring, "runs")? {
                session.check_ring(i)?;
                ran.push(i);
            }
        }
        config_change.load(parcel.take_if(&from["channel"])?, flag(from, "pending")?);
        Ok((session, stream, ran))
    }
}

fn load_inflight(from: &Value, packed: bool, parcel: &mut Parcel) -> Result<Option<Area>> {
    if from.is_null() {
        return Ok(None);
    }
    let desc = InflightDesc {
        mmap_size: number(from, "size")?,
        mmap_offset: number(from, "offset")?,
        num_queues: number(from, "queues")?,
        queue_size: number(from, "queue-size")?,
    };
    Area::map(desc, packed, parcel.take(&from["file"])?).map(Some)
}

fn save_ring(ring: &Ring, runs: bool, parcel: &mut Parcel) -> Result<Value> {
    let addr = ring.addr.map(|a| {
        json!({"flags": a.flags, "desc": a.desc, "used": a.used, "avail": a.avail, "log": a.log})
    });
    let kick = match &ring.kick {
        None => Value::Null,
        Some(Kick::Poll) => "poll".into(),
        Some(Kick::Event(fd)) => parcel.put(fd.as_fd())?,
    };
    Ok(json!({
        "size": ring.size,
        "addr": addr,
        "base": ring.base,
        "kick": kick,
        "call": parcel.put_if(ring.call.as_ref().map(OwnedFd::as_fd))?,
        "err": parcel.put_if(ring.err.as_ref().map(OwnedFd::as_fd))?,
        "enabled": ring.enabled,
        "runs": runs,
    }))
}

fn load_ring(from: &Value, parcel: &mut Parcel) -> Result<Ring> {
    let addr = match &from["addr"] {
        Value::Null => None,
        a => Some(VringAddr {
            flags: number(a, "flags")?,
            desc: number(a, "desc")?,
            used: number(a, "used")?,
            avail: number(a, "avail")?,
            log: number(a, "log")?,
        }),
    };
    let kick = match &from["kick"] {
        Value::String(poll) if poll == "poll" => Some(Kick::Poll),
        other => parcel.take_if(other)?.map(Kick::Event),
    };
    Ok(Ring {
        size: number(from, "size")?,
        addr,
        base: if from["base"].is_null() { None } else { Some(number(from, "base")?) },
        kick,
        call: parcel.take_if(&from["call"])?,
        err: parcel.take_if(&from["err"])?,
        enabled: flag(from, "enabled")?,
        running: false,
    })
}
