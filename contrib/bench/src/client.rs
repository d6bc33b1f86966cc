//! A guest without a guest: handshake, memory, rings of one vhost-user-blk connection.
//!
//! `Client::connect` does what QEMU does, in QEMU's order, and leaves every ring running. All of it is
//! also there in single steps, and `conn` sends anything else.

mod memory;
mod options;

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_config as vc;
use virtio_bindings::{virtio_blk as vb, virtio_ring as vr};
use vmm_sys_util::eventfd::EventFd;

use crate::blk::{CONFIG_LEN, Config};
use crate::error::{Error, Result, io_err};
use crate::mem::{Buf, GuestMem};
use crate::packed::{Packed, WRAP};
use crate::proto::{Conn, F_PROTOCOL_FEATURES, InflightDesc, pf, req, vring_addr};
use crate::queue::{Driver, Queue};
use crate::ring::{Ring, RingMem};
pub use options::{Base, DEFAULT_PROTOCOL, KNOWN_FEATURES, MemStyle, Options};

/// What the protocol must know of a queue, wherever the `Queue` itself has gone.
#[derive(Debug)]
struct Wiring {
    /// Of a split ring.
    ring: Option<RingMem>,
    size: u16,
    /// User addresses of the three parts.
    parts: [u64; 3],
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    base: u32,
}

/// A connected guest.
#[derive(Debug)]
pub struct Client {
    /// The connection, for any message.
    pub conn: Conn,
    /// The back channel, when asked for and offered.
    pub backend: Option<Conn>,
    /// The in-flight area, when asked for and offered.
    pub inflight: Option<(InflightDesc, OwnedFd)>,
    opts: Options,
    mem: Arc<GuestMem>,
    queues: Vec<Queue>,
    wiring: Vec<Wiring>,
    offered: u64,
    acked: u64,
    offered_protocol: u64,
    acked_protocol: u64,
    queue_num: u64,
    config: Config,
}

impl Client {
    /// Connects to a socket and does everything up to running rings.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn connect(path: impl AsRef<Path>, opts: Options) -> Result<Self> {
        Self::over(Conn::connect(path)?, opts)
    }

    /// `connect` which tries again until someone listens, within the time limit.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn connect_retry(path: impl AsRef<Path>, opts: Options) -> Result<Self> {
        Self::over(connect_retry(path.as_ref(), opts.timeout)?, opts)
    }

    /// The same over a connected socket.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn from_stream(stream: UnixStream, opts: Options) -> Result<Self> {
        Self::over(Conn::from_stream(stream)?, opts)
    }

    fn over(conn: Conn, opts: Options) -> Result<Self> {
        let mem = GuestMem::new(opts.mem_regions.max(1), opts.mem_size)?;
        let mut client = Self {
            conn,
            backend: None,
            inflight: None,
            mem,
            queues: Vec::new(),
            wiring: Vec::new(),
            offered: 0,
            acked: 0,
            offered_protocol: 0,
            acked_protocol: 0,
            queue_num: 0,
            config: Config { raw: Vec::new() },
            opts,
        };
        client.handshake()?;
        if client.has_protocol(pf::CONFIG) {
            client.read_config()?;
        }
        client.make_queues()?;
        if client.opts.start {
            client.start()?;
        }
        Ok(client)
    }

    /// Features, protocol features, owner, back channel.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn handshake(&mut self) -> Result<()> {
        let opts = &self.opts;
        self.conn.set_timeout(opts.timeout)?;
        self.offered = self.conn.get_u64(req::GET_FEATURES)?;
        let mut want = opts.want_features & KNOWN_FEATURES;
        for (on, bit) in [
            (opts.event_idx, vr::VIRTIO_RING_F_EVENT_IDX),
            (opts.indirect, vr::VIRTIO_RING_F_INDIRECT_DESC),
            (opts.packed, vc::VIRTIO_F_RING_PACKED),
            (opts.queues > 1, vb::VIRTIO_BLK_F_MQ),
        ] {
            if !on {
                want &= !(1 << bit);
            }
        }
        self.acked = self.offered & want | opts.force_features;
        if self.acked & F_PROTOCOL_FEATURES != 0 {
            self.negotiate_protocol()?;
        }
        self.conn.set(req::SET_OWNER, &[], &[])?;
        if self.has_protocol(pf::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair().map_err(io_err("socketpair"))?;
            self.conn.set(req::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()])?;
            self.backend = Some(Conn::from_stream(ours)?);
        }
        Ok(())
    }

    fn negotiate_protocol(&mut self) -> Result<()> {
        let mut want = self.opts.want_protocol;
        for (on, bit) in
            [(self.opts.inflight, pf::INFLIGHT_SHMFD), (self.opts.backend_channel, pf::BACKEND_REQ)]
        {
            want |= u64::from(on) << bit;
        }
        self.offered_protocol = self.conn.get_u64(req::GET_PROTOCOL_FEATURES)?;
        self.acked_protocol = self.offered_protocol & want;
        self.conn.reply_ack = false;
        self.conn.set_u64(req::SET_PROTOCOL_FEATURES, self.acked_protocol)?;
        self.conn.reply_ack = self.has_protocol(pf::REPLY_ACK);
        if self.has_protocol(pf::MQ) {
            self.queue_num = self.conn.get_u64(req::GET_QUEUE_NUM)?;
        }
        Ok(())
    }

    fn make_queues(&mut self) -> Result<()> {
        let event_idx = self.acked & 1 << vr::VIRTIO_RING_F_EVENT_IDX != 0;
        let indirect = self.acked & 1 << vr::VIRTIO_RING_F_INDIRECT_DESC != 0;
        let packed = self.has_feature(vc::VIRTIO_F_RING_PACKED);
        for index in 0..self.opts.queues {
            let size = self.opts.queue_size;
            let (driver, ring, parts, base) = if packed {
                let mut driver = Packed::new(&self.mem, size, event_idx)?;
                // The wrap counters begin with 1.
                let base = self.opts.base ^ WRAP;
                driver.reset(base);
                let parts = [&driver.desc, &driver.driver, &driver.device].map(Buf::user_addr);
                (Driver::Packed(driver), None, parts, u32::from(base) << 16 | u32::from(base))
            } else {
                let areas = RingMem::new(&self.mem, size)?;
                let view =
                    |b: &Buf| self.mem.view(b.gpa(), b.len()).ok_or(Error::OutOfMemory(b.len()));
                let ring =
                    RingMem::over(view(&areas.desc)?, view(&areas.avail)?, view(&areas.used)?);
                let parts = [&areas.desc, &areas.avail, &areas.used].map(Buf::user_addr);
                let mut driver = Ring::new(areas, event_idx);
                driver.reset(self.opts.base);
                (driver.into(), Some(ring), parts, self.opts.base.into())
            };
            let mut queue = Queue::new(index, &self.mem, driver, self.opts.polling)?;
            (queue.indirect, queue.timeout) = (indirect, self.opts.timeout);
            let copy = |fd: &EventFd| fd.try_clone().map_err(io_err("dup of eventfd"));
            self.wiring.push(Wiring {
                ring,
                size,
                parts,
                kick: copy(queue.kick_fd())?,
                call: copy(queue.call_fd())?,
                err: copy(queue.err_fd())?,
                base,
            });
            self.queues.push(queue);
        }
        Ok(())
    }

    /// SET_FEATURES, the in-flight area, memory, and every ring.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn start(&mut self) -> Result<()> {
        self.conn.set_u64(req::SET_FEATURES, self.acked)?;
        if self.has_protocol(pf::INFLIGHT_SHMFD) {
            let area = match self.inflight.take() {
                Some(area) => area,
                None => self.conn.get_inflight(self.opts.queues, self.opts.queue_size)?,
            };
            self.conn.set(req::SET_INFLIGHT_FD, &area.0.to_body(), &[area.1.as_raw_fd()])?;
            self.inflight = Some(area);
        }
        self.share_memory()?;
        (0..self.wiring.len()).try_for_each(|i| self.start_queue(i))
    }

    /// Configures and enables one ring, where it last stood.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn start_queue(&self, index: usize) -> Result<()> {
        let w = &self.wiring[index];
        let i = number(index);
        self.conn.set_vring_fd(req::SET_VRING_CALL, i, Some(w.call.as_raw_fd()))?;
        self.conn.set_vring_fd(req::SET_VRING_ERR, i, Some(w.err.as_raw_fd()))?;
        self.conn.set_vring(req::SET_VRING_NUM, i, u32::from(w.size))?;
        self.conn.set_vring(req::SET_VRING_BASE, i, w.base)?;
        let [desc, avail, used] = w.parts;
        let body = vring_addr(i, 0, desc, used, avail, 0);
        self.conn.set(req::SET_VRING_ADDR, &body, &[])?;
        self.conn.set_vring_fd(req::SET_VRING_KICK, i, Some(w.kick.as_raw_fd()))?;
        if self.acked & F_PROTOCOL_FEATURES != 0 {
            self.enable_queue(index, true)?;
        }
        Ok(())
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// As `Conn::set`.
    pub fn enable_queue(&self, index: usize, on: bool) -> Result<()> {
        self.conn.set_vring(req::SET_VRING_ENABLE, number(index), u32::from(on))
    }

    /// GET_VRING_BASE: stops a ring and remembers where it stood.
    ///
    /// # Errors
    /// As `Conn::get_vring_base`.
    pub fn stop_queue(&mut self, index: usize) -> Result<u32> {
        let base = self.conn.get_vring_base(number(index))?;
        if self.wiring[index].ring.is_some() && base > u16::MAX.into() {
            return Err(Error::Protocol(format!("vring base {base:#x} of a split ring")));
        }
        self.wiring[index].base = base;
        Ok(base)
    }

    /// Stops every ring, QEMU's way: ENABLE 0 for all, then GET_VRING_BASE for all.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn stop(&mut self) -> Result<Vec<u32>> {
        if self.acked & F_PROTOCOL_FEATURES != 0 {
            (0..self.wiring.len()).try_for_each(|i| self.enable_queue(i, false))?;
        }
        (0..self.wiring.len()).map(|i| self.stop_queue(i)).collect()
    }

    /// Sets where a ring goes on at its next start.
    ///
    /// # Panics
    /// When a packed ring is to go on at an index of its own: it has none.
    pub fn set_base(&mut self, index: usize, base: Base) {
        let w = &mut self.wiring[index];
        let ring = || w.ring.as_ref().expect("a split ring");
        w.base = match base {
            Base::Used => ring().used_idx().into(),
            Base::Avail => ring().avail_idx().into(),
            Base::At(base) => base,
        };
    }

    /// RESET_DEVICE, and all queues forget what was in flight; `start` brings the device up again.
    ///
    /// # Errors
    /// As `Conn::set`.
    pub fn reset_device(&mut self) -> Result<()> {
        self.conn.set(req::RESET_DEVICE, &[], &[])?;
        let first = if self.has_feature(vc::VIRTIO_F_RING_PACKED) { WRAP } else { 0 };
        self.queues.iter_mut().for_each(|q| q.reset(first));
        let both = |w: &Wiring| {
            if w.ring.is_some() { 0 } else { u32::from(first) << 16 | u32::from(first) }
        };
        self.wiring.iter_mut().for_each(|w| w.base = both(w));
        Ok(())
    }

    /// Connects anew with the same memory, rings and in-flight area; what was in flight stays so. Like QEMU it does not
    /// read the configuration again.
    ///
    /// # Errors
    /// Any of this crate's.
    pub fn reconnect(&mut self, path: impl AsRef<Path>, base: Base) -> Result<()> {
        self.conn = connect_retry(path.as_ref(), self.opts.timeout)?;
        self.handshake()?;
        (0..self.wiring.len()).for_each(|i| self.set_base(i, base));
        self.start()
    }

    /// Closes the connection; guest memory and queues stay.
    ///
    /// # Errors
    /// `Io`
    pub fn hang_up(&self) -> Result<()> {
        self.conn.stream().shutdown(std::net::Shutdown::Both).map_err(io_err("shutdown"))
    }

    /// One queue.
    ///
    /// # Panics
    /// When there is none of that number, or it was taken.
    pub fn queue(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    /// All queues, for scoped threads.
    pub fn queues_mut(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    /// The connection and all queues at once.
    pub fn split(&mut self) -> (&mut Conn, &mut [Queue]) {
        (&mut self.conn, &mut self.queues)
    }

    /// Hands out all queues, to be moved to threads. Messages about them still work.
    pub fn take_queues(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
    }

    /// Gives them back.
    pub fn put_queues(&mut self, queues: Vec<Queue>) {
        self.queues = queues;
    }

    /// Guest memory.
    #[must_use]
    pub fn mem(&self) -> &Arc<GuestMem> {
        &self.mem
    }

    /// The options it was made with; the next handshake or start obeys changes.
    pub fn options(&mut self) -> &mut Options {
        &mut self.opts
    }

    /// Features the device offers.
    #[must_use]
    pub fn offered_features(&self) -> u64 {
        self.offered
    }

    /// Features acknowledged.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.acked
    }

    /// True when the feature bit was acknowledged.
    #[must_use]
    pub fn has_feature(&self, bit: u32) -> bool {
        self.acked & 1 << bit != 0
    }

    /// Protocol features the back end offers.
    #[must_use]
    pub fn offered_protocol(&self) -> u64 {
        self.offered_protocol
    }

    /// True when the protocol feature was acknowledged.
    #[must_use]
    pub fn has_protocol(&self, bit: u64) -> bool {
        self.acked_protocol & 1 << bit != 0
    }

    /// GET_QUEUE_NUM's answer; 0 without MQ.
    #[must_use]
    pub fn queue_num(&self) -> u64 {
        self.queue_num
    }

    /// The configuration as last read.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Capacity in sectors.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.config.capacity()
    }

    /// Reads the configuration anew: 96 bytes, or 60 from a back end that does not know the fields
    /// behind write-zeroes and refuses longer reads.
    ///
    /// # Errors
    /// As `Conn::get_config`.
    pub fn read_config(&mut self) -> Result<&Config> {
        let raw = match self.conn.get_config(0, CONFIG_LEN, 0) {
            Err(Error::Protocol(_)) => self.conn.get_config(0, 60, 0)?,
            other => other?,
        };
        self.config = Config { raw };
        Ok(&self.config)
    }

    /// SET_CONFIG.
    ///
    /// # Errors
    /// As `Conn::set`.
    pub fn set_config(&self, offset: u32, flags: u32, bytes: &[u8]) -> Result<()> {
        self.conn.set(req::SET_CONFIG, &crate::proto::config_body(offset, flags, bytes), &[])
    }
}

fn number(index: usize) -> u32 {
    u32::try_from(index).expect("queues are numbered by u16")
}

/// Connects as soon as someone listens.
///
/// # Errors
/// The last try's when the time is over.
pub fn connect_retry(path: &Path, timeout: Duration) -> Result<Conn> {
    let deadline = std::time::Instant::now() + timeout;
    loop {
        match Conn::connect(path) {
            Err(e) if std::time::Instant::now() > deadline => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_micros(500)),
            ok => return ok,
        }
    }
}
