//! One connection: what a front end asks, in whatever order, done to the device.
//!
//! Every request is handled to its end before the next is read, and its answer goes out after its effect: what
//! GET_VRING_BASE, SET_VRING_ENABLE 0, a reset or REM_MEM_REG promise about the guest's memory holds when the front
//! end reads the answer. Sections named are those of the "Vhost-user Protocol" document.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

mod dirty_log;
mod rings;

use super::device_state::Transfer;
use super::hold::Verdict;
use super::inflight::{self, Area};
use super::message::*;
use super::notify::ConfigChange;
use super::parcel::Parcel;
use super::ring::Ring;
use super::socket::{Channel, End};
use super::{Device, memory};
use crate::err;
use crate::error::Result;
use crate::mem::map::MAX_REGIONS;
use crate::mem::{DirtyLog, GuestMap};
use crate::virtio::queue::is_packed;

/// The protocol features offered. QEMU acknowledges every one that it knows, without asking whether it can serve it:
/// INBAND_NOTIFICATIONS must never stand here.
pub(super) const OFFERED: Protocol = Protocol::MQ
    .union(Protocol::LOG_SHMFD)
    .union(Protocol::REPLY_ACK)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::CONFIG)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::CONFIGURE_MEM_SLOTS)
    .union(Protocol::STATUS)
    .union(Protocol::DEVICE_STATE)
    .union(Protocol::GET_VRING_BASE_INFLIGHT);

/// Feature bits that are not the device's.
const OWN: u64 = VHOST_USER_F_PROTOCOL_FEATURES | VHOST_F_LOG_ALL;

/// Warnings of one connection that are logged as such: a front end must not be able to fill a disk with our log.
const MAX_WARNINGS: u32 = 64;

/// What a handled request has to say.
enum Answer {
    /// Nothing, unless it is asked whether it worked.
    Done,
    U64(u64),
    State(VringState),
    Config(Vec<u8>),
    Inflight(InflightDesc, Option<OwnedFd>),
    Log(LogPlace),
}

/// The state of one connection.
pub(super) struct Session<'a> {
    pub(super) device: &'a dyn Device,
    name: &'a str,
    pub(super) config_change: &'a ConfigChange,
    pub(super) rings: Vec<Ring>,
    pub(super) map: Arc<GuestMap>,
    /// Where requests in flight are tracked.
    pub(super) inflight: Option<Area>,
    /// What the driver accepted, with [`OWN`]; `None` before it did.
    pub(super) features: Option<u64>,
    /// The last SET_LOG_BASE.
    pub(super) log: Option<Result<Arc<DirtyLog>>>,
    pub(super) protocol: Protocol,
    pub(super) status: u8,
    /// A transfer of the device's state, from its beginning to its check.
    pub(super) state: Option<Transfer>,
    warnings: u32,
}

impl<'a> Session<'a> {
    /// A session that nothing has been said in. `name` is the export's, for the log.
    pub(super) fn new(
        device: &'a dyn Device,
        name: &'a str,
        config_change: &'a ConfigChange,
    ) -> Self {
        let queues = device.num_queues().min(MAX_QUEUES);
        Session {
            device,
            name,
            config_change,
            rings: (0..queues).map(|_| Ring::default()).collect(),
            map: Arc::default(),
            inflight: None,
            features: None,
            log: None,
            protocol: Protocol::empty(),
            status: 0,
            state: None,
            warnings: 0,
        }
    }

    /// Serves the front end until the connection ends; afterwards no ring runs and the device has forgotten it.
    pub(super) fn serve(self, channel: &mut Channel<'_>) -> End {
        self.go_on(channel, &[])
    }

    /// The same, after the rings of `ran` have been started: another process served them before.
    pub(super) fn go_on(mut self, channel: &mut Channel<'_>, ran: &[usize]) -> End {
        self.resume(ran);
        let end = self.converse(channel);
        self.end_all(|device, queues| device.leave_queues(queues));
        self.config_change.detach();
        self.map = Arc::default();
        self.state = None;
        self.log = None;
        self.device.disconnected();
        end
    }

    fn converse(&mut self, channel: &mut Channel<'_>) -> End {
        loop {
            let mut message = match channel.receive() {
                Ok(message) => message,
                Err(End::Paused) => match self.pause(channel) {
                    Verdict::Resume => continue,
                    Verdict::End => return End::HandedOver,
                },
                Err(end) => return end,
            };
            log::trace!("{}: {} {:?}", self.name, message.header.name(), message.header);
            let sent = match self.reply_to(&mut message) {
                None => Ok(()),
                Some((reply, None)) => channel.send(&reply),
                Some((reply, Some(fd))) => channel.send_with(&reply, &fd),
            };
            if let Err(end) = sent {
                return end;
            }
            // After the reply: QEMU hears nothing else while it waits for one.
            self.config_change.set_running(self.rings.iter().any(|r| r.running));
        }
    }

    /// Somebody wants another process to go on with this connection: stops all rings as GET_VRING_BASE does, says what there is
    /// to know, and does nothing more until it is known who serves.
    fn pause(&mut self, channel: &Channel<'_>) -> Verdict {
        let Some(ask) = channel.hold.asked() else { return Verdict::Resume };
        let ran: Vec<usize> = self.all().filter(|i| self.rings[*i].running).collect();
        if !ran.is_empty() {
            self.device.about_to_stop();
        }
        self.halt_all();
        let verdict = ask.settle(self.packed(channel, &ran), Verdict::Resume);
        if verdict == Verdict::Resume {
            self.resume(&ran);
        }
        verdict
    }

    fn packed(&self, channel: &Channel<'_>, ran: &[usize]) -> Result<Parcel> {
        let mut parcel = channel.hold.parcel()?;
        parcel.body["session"] = self.save(&channel.stream, ran, &mut parcel)?;
        Ok(parcel)
    }

    /// Starts the rings of `ran`.
    fn resume(&mut self, ran: &[usize]) {
        ran.iter().for_each(|i| self.start_or_warn(*i));
        self.config_change.set_running(self.rings.iter().any(|r| r.running));
    }

    /// Handles one message; answers the bytes of the reply, if there is to be one ("Communication", "REPLY_ACK"), and the
    /// descriptor that goes with them.
    fn reply_to(&mut self, message: &mut Message) -> Option<(Vec<u8>, Option<OwnedFd>)> {
        let header = message.header;
        if header.flags & REPLY != 0 {
            self.warn(&format!("{}: a reply to a question that was not asked", header.name()));
            return None;
        }
        let outcome = self.handle(message);
        if !self.rings.iter().any(|ring| ring.running) {
            self.device.no_ring_runs();
        }
        if let Err(e) = &outcome {
            self.warn(&format!("{} ({}): {e}", header.name(), header.request));
        }
        // SET_PROTOCOL_FEATURES itself may have just negotiated it.
        let wants_ack =
            header.flags & NEED_REPLY != 0 && self.protocol.contains(Protocol::REPLY_ACK);
        let mut fd_out = None;
        let payload = match outcome {
            Ok(Answer::U64(v)) => v.to_ne_bytes().to_vec(),
            Ok(Answer::State(s)) => s.to_bytes(),
            Ok(Answer::Config(bytes)) => bytes,
            Ok(Answer::Inflight(desc, fd)) => {
                fd_out = fd;
                desc.to_bytes()
            }
            Ok(Answer::Log(place)) => place.to_bytes(),
            // Requests that always have a reply have no way to fail but a reply without payload.
            Err(_) if matches!(header.request, GET_CONFIG | GET_VRING_BASE) => Vec::new(),
            Err(_) if header.request == SET_LOG_BASE && self.log_is_answered() => Vec::new(),
            Ok(Answer::Done) if wants_ack => 0u64.to_ne_bytes().to_vec(),
            Err(_) if wants_ack => 1u64.to_ne_bytes().to_vec(),
            Ok(Answer::Done) | Err(_) => return None,
        };
        Some((encode(header.request, REPLY, &payload), fd_out))
    }

    fn warn(&mut self, what: &str) {
        self.warnings = self.warnings.saturating_add(1);
        match self.warnings {
            ..MAX_WARNINGS => log::warn!("{}: {what}", self.name),
            MAX_WARNINGS => log::warn!("{}: {what} (no more such warnings)", self.name),
            _ => log::debug!("{}: {what}", self.name),
        }
    }

    fn handle(&mut self, m: &mut Message) -> Result<Answer> {
        match m.header.request {
            GET_FEATURES => return Ok(Answer::U64(self.offered_features())),
            GET_PROTOCOL_FEATURES => return Ok(Answer::U64(OFFERED.bits())),
            GET_QUEUE_NUM => return Ok(Answer::U64(self.rings.len() as u64)),
            GET_MAX_MEM_SLOTS => return Ok(Answer::U64(MAX_REGIONS as u64)),
            GET_STATUS => return Ok(Answer::U64(u64::from(self.status))),
            GET_CONFIG => return self.get_config(m),
            GET_VRING_BASE => return self.get_base(m.vring_state()?),
            GET_INFLIGHT_FD => return Ok(self.get_inflight(m)),
            SET_DEVICE_STATE_FD => return Ok(self.set_state_fd(m)),
            CHECK_DEVICE_STATE => return Ok(self.check_state()),
            SET_LOG_BASE => return self.set_log(m),

            // Every front end owns its connection; StratoVirt says so at each activation.
            SET_OWNER => {}
            RESET_OWNER => self.disable_all(),
            RESET_DEVICE => self.reset(),
            SET_STATUS => self.set_status(m.u64()?)?,
            SET_FEATURES => self.set_features(m.u64()?)?,
            SET_PROTOCOL_FEATURES => self.set_protocol_features(m.u64()?)?,
            SET_CONFIG => self.set_config(m)?,
            // Nobody says what it is for: QEMU never sends it. Closed.
            SET_LOG_FD => drop(m.take_fd()?),
            SET_BACKEND_REQ_FD => self.config_change.attach(UnixStream::from(m.take_fd()?)),

            SET_MEM_TABLE => {
                let map = memory::replaced(&m.regions()?, m.take_fds()?)?;
                self.switch_memory(map, true);
            }
            ADD_MEM_REG => {
                let map = memory::with(&self.map, &m.region()?, m.take_fd()?)?;
                self.switch_memory(map, false);
            }
            // A descriptor may come with it, and is closed.
            REM_MEM_REG => self.switch_memory(memory::without(&self.map, &m.region()?)?, true),

            SET_VRING_NUM => self.set_size(m.vring_state()?)?,
            SET_VRING_ADDR => {
                let (index, addr) = m.vring_addr()?;
                self.set_addr(index, addr)?;
            }
            SET_VRING_BASE => self.set_base(m.vring_state()?)?,
            SET_VRING_ENABLE => self.enable(m.vring_state()?)?,
            SET_VRING_KICK => self.set_kick(m)?,
            SET_VRING_CALL => self.set_call(m)?,
            SET_VRING_ERR => self.set_err(m)?,

            SET_INFLIGHT_FD => {
                let packed = self.is_packed();
                self.inflight = Some(Area::map(m.inflight()?, packed, m.take_fd()?)?);
            }

            _ => return Err(err!("not supported")),
        }
        Ok(Answer::Done)
    }

    fn ring(&self, index: u32) -> Result<usize> {
        match usize::try_from(index) {
            Ok(i) if i < self.rings.len() => Ok(i),
            _ => Err(err!("queue {index}: there are only {} queues", self.rings.len())),
        }
    }

    /// Whether the driver's rings are packed, as far as is known.
    pub(super) fn is_packed(&self) -> bool {
        self.features.is_some_and(is_packed)
    }

    fn all(&self) -> Range<usize> {
        0..self.rings.len()
    }
}

/// Features, status and configuration space.
impl Session<'_> {
    pub(super) fn offered_features(&self) -> u64 {
        self.device.features() | OWN
    }

    /// SET_FEATURES. Repeated with the same bits, it does nothing; if only LOG_ALL is another, running rings go on and log,
    /// or do not log any more. With others, running rings are drained and go on with the new ones.
    fn set_features(&mut self, acked: u64) -> Result<()> {
        let foreign = acked & !self.offered_features();
        if foreign != 0 {
            return Err(err!("features {foreign:#x} were not offered"));
        }
        // QEMU looks only at whether SET_LOG_BASE has a reply: it must not migrate without a log.
        if let (Some(Err(e)), true) = (&self.log, acked & VHOST_F_LOG_ALL != 0) {
            return Err(err!("there is no dirty log: {e}"));
        }
        let changed = self.features.map_or(u64::MAX, |f| f ^ acked);
        if changed & !VHOST_F_LOG_ALL == 0 {
            self.features = Some(acked);
            if changed != 0 && self.has_log() {
                self.switch_log();
            }
        } else {
            log::info!(
                "{}: features negotiated: {acked:#x}, protocol {:#x}",
                self.name,
                self.protocol.bits()
            );
            let ran: Vec<usize> = self.all().filter(|i| self.rings[*i].running).collect();
            ran.iter().for_each(|i| self.halt(*i));
            self.features = Some(acked);
            self.device.set_features(acked & !OWN);
        }
        // "Ring states": a front end that does not negotiate them has no SET_VRING_ENABLE either.
        if acked & VHOST_USER_F_PROTOCOL_FEATURES == 0 {
            self.rings.iter_mut().for_each(|r| r.enabled = true);
        }
        self.start_wanted();
        Ok(())
    }

    fn set_protocol_features(&mut self, bits: u64) -> Result<()> {
        match Protocol::from_bits(bits).filter(|p| OFFERED.contains(*p)) {
            Some(protocol) => {
                self.protocol = protocol;
                Ok(())
            }
            None => Err(err!("protocol features {:#x} were not offered", bits & !OFFERED.bits())),
        }
    }

    /// SET_STATUS: kept; 0 resets, as in virtio.
    fn set_status(&mut self, status: u64) -> Result<()> {
        self.status = u8::try_from(status).map_err(|_| err!("{status:#x} is not a status"))?;
        if self.status == 0 {
            self.reset();
        }
        Ok(())
    }

    /// RESET_DEVICE: "disable all rings and reset all internal device state". The guest's memory and what was
    /// negotiated for the connection stay (QEMU gives neither again after it). The in-flight region does not: it is
    /// about rings that are no more, and QEMU gives one again before it starts others.
    fn reset(&mut self) {
        self.halt_all();
        self.inflight = None;
        self.rings.iter_mut().for_each(Ring::reset);
        self.status = 0;
        if self.features.take().is_some() {
            self.device.set_features(0);
        }
    }

    /// RESET_OWNER: deprecated; "it is recommended that back-ends either ignore this message, or use it to disable all
    /// rings".
    fn disable_all(&mut self) {
        self.halt_all();
        self.rings.iter_mut().for_each(|r| r.enabled = false);
    }

    /// GET_INFLIGHT_FD. It says nothing about the rings of now: SET_INFLIGHT_FD gives the memory back. Has no way to fail
    /// but a region of no bytes; QEMU then does without. Both real front ends negotiate features first, so that it is known
    /// what kind of rings it is for.
    fn get_inflight(&mut self, m: &Message) -> Answer {
        let (queues, size_max) = (queue(self.rings.len()), self.device.max_queue_size());
        let packed = self.is_packed();
        match m.inflight().and_then(|asked| inflight::create(asked, packed, queues, size_max)) {
            Ok((desc, fd)) => Answer::Inflight(desc, Some(fd)),
            Err(e) => {
                self.warn(&format!("GET_INFLIGHT_FD: {e}"));
                Answer::Inflight(InflightDesc::default(), None)
            }
        }
    }

    fn get_config(&mut self, m: &Message) -> Result<Answer> {
        let (range, _) = m.config()?;
        let mut bytes = range.to_bytes();
        let mut contents = vec![0; range.resolve()?.len()];
        // First: what changes from now on may not be in the answer.
        self.config_change.seen();
        self.device.read_config(range.resolve()?.start, &mut contents);
        bytes.append(&mut contents);
        Ok(Answer::Config(bytes))
    }

    /// SET_CONFIG, whatever the flags: cloud-hypervisor sets that of migration when its guest writes.
    fn set_config(&mut self, m: &Message) -> Result<()> {
        let (range, contents) = m.config()?;
        let at = range.resolve()?;
        let contents =
            contents.get(..at.len()).ok_or_else(|| err!("the contents are cut short"))?;
        self.device.write_config(at.start, contents);
        Ok(())
    }
}

/// The device's state.
impl Session<'_> {
    /// SET_DEVICE_STATE_FD; the answer: bit 8, no descriptor comes back; bits 0 to 7, whether it failed.
    fn set_state_fd(&mut self, m: &mut Message) -> Answer {
        self.state = None;
        match self.transfer_state(m) {
            Ok(transfer) => {
                self.state = Some(transfer);
                Answer::U64(VRING_NOFD)
            }
            Err(e) => {
                self.warn(&format!("SET_DEVICE_STATE_FD: {e}"));
                Answer::U64(VRING_NOFD | 1)
            }
        }
    }

    fn transfer_state(&self, m: &mut Message) -> Result<Transfer> {
        let (direction, phase) = m.device_state()?;
        let fd = m.take_fd()?;
        if phase != STATE_PHASE_STOPPED || self.rings.iter().any(|ring| ring.running) {
            return Err(err!("state is transferred while all rings are stopped only"));
        }
        match direction {
            STATE_SAVE => Transfer::save(self.device, fd),
            STATE_LOAD => Transfer::load(fd),
            n => Err(err!("{n} is no direction of a transfer")),
        }
    }

    /// CHECK_DEVICE_STATE; the answer: 0 if the last transfer came to a good end.
    fn check_state(&mut self) -> Answer {
        let transfer = self.state.take().ok_or_else(|| err!("there was no transfer"));
        match transfer.and_then(|transfer| transfer.finish(self.device)) {
            Ok(()) => Answer::U64(0),
            Err(e) => {
                self.warn(&format!("CHECK_DEVICE_STATE: {e}"));
                Answer::U64(1)
            }
        }
    }
}

/// Memory.
impl Session<'_> {
    /// Changes to another map. Rings that it does not hold any more are stopped first; rings that waited for theirs
    /// start.
    fn switch_memory(&mut self, map: Arc<GuestMap>, drain: bool) {
        let packed = self.is_packed();
        for i in self.all() {
            if self.rings[i].running && !self.rings[i].is_mapped(&map, packed) {
                self.halt(i);
                self.warn(&format!("queue {i}: its memory is taken away, it stops"));
            }
        }
        if self.rings.iter().any(|r| r.running) {
            self.device.set_memory(Arc::clone(&map), drain);
        }
        self.map = map;
        // Regions may come one by one: a ring that is not in memory yet is no reason to refuse this one.
        for i in self.all() {
            if self.rings[i].is_mapped(&self.map, packed) {
                self.start_or_warn(i);
            }
        }
    }
}

fn queue(i: usize) -> u16 {
    u16::try_from(i).expect("at most MAX_QUEUES")
}
