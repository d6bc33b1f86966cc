//! What a guest wants of its disk.

use std::time::Duration;

use virtio_bindings::virtio_config as vc;
use virtio_bindings::{virtio_blk as vb, virtio_ring as vr};

use crate::proto::{F_PROTOCOL_FEATURES, pf};

/// Feature bits this driver can honour.
pub const KNOWN_FEATURES: u64 = 1 << vc::VIRTIO_F_VERSION_1
    | 1 << vr::VIRTIO_RING_F_INDIRECT_DESC
    | 1 << vr::VIRTIO_RING_F_EVENT_IDX
    | 1 << vc::VIRTIO_F_RING_PACKED
    | F_PROTOCOL_FEATURES
    | 1 << vb::VIRTIO_BLK_F_SIZE_MAX
    | 1 << vb::VIRTIO_BLK_F_SEG_MAX
    | 1 << vb::VIRTIO_BLK_F_GEOMETRY
    | 1 << vb::VIRTIO_BLK_F_RO
    | 1 << vb::VIRTIO_BLK_F_BLK_SIZE
    | 1 << vb::VIRTIO_BLK_F_FLUSH
    | 1 << vb::VIRTIO_BLK_F_TOPOLOGY
    | 1 << vb::VIRTIO_BLK_F_CONFIG_WCE
    | 1 << vb::VIRTIO_BLK_F_MQ
    | 1 << vb::VIRTIO_BLK_F_DISCARD
    | 1 << vb::VIRTIO_BLK_F_WRITE_ZEROES;

/// Protocol features acknowledged unless the options say otherwise.
pub const DEFAULT_PROTOCOL: u64 = 1 << pf::MQ
    | 1 << pf::REPLY_ACK
    | 1 << pf::CONFIG
    | 1 << pf::RESET_DEVICE
    | 1 << pf::CONFIGURE_MEM_SLOTS;

/// How the back end learns of the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemStyle {
    /// ADD_MEM_REG when negotiated, else SET_MEM_TABLE.
    #[default]
    Auto,
    /// SET_MEM_TABLE.
    Table,
    /// ADD_MEM_REG for each region.
    Slots,
}

/// Where a ring goes on after a reconnect; front ends differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// At `used.idx`: QEMU, StratoVirt.
    Used,
    /// At `avail.idx`: cloud-hypervisor.
    Avail,
    /// Anywhere.
    At(u32),
}

/// What the guest wants.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queues to create.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// Mask of feature bits to acknowledge out of those offered.
    pub want_features: u64,
    /// Feature bits acknowledged though not offered.
    pub force_features: u64,
    /// Mask of protocol features to acknowledge out of those offered.
    pub want_protocol: u64,
    /// Acknowledge EVENT_IDX.
    pub event_idx: bool,
    /// Acknowledge INDIRECT_DESC and use it.
    pub indirect: bool,
    /// Acknowledge RING_PACKED.
    pub packed: bool,
    /// Bytes per memory region.
    pub mem_size: usize,
    /// Memory regions.
    pub mem_regions: usize,
    /// How the back end learns of them.
    pub mem_style: MemStyle,
    /// Acknowledge INFLIGHT_SHMFD and hand the area back.
    pub inflight: bool,
    /// Acknowledge BACKEND_REQ and open the back channel.
    pub backend_channel: bool,
    /// Poll for completions instead of waiting on the call eventfd.
    pub polling: bool,
    /// First index of the rings; of packed ones the first position, in the second round plus 0x8000.
    pub base: u16,
    /// Start the rings at once.
    pub start: bool,
    /// Limit of every wait.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 128,
            want_features: KNOWN_FEATURES,
            force_features: 0,
            want_protocol: DEFAULT_PROTOCOL,
            event_idx: true,
            indirect: true,
            packed: false,
            mem_size: 64 << 20,
            mem_regions: 1,
            mem_style: MemStyle::Auto,
            inflight: false,
            backend_channel: false,
            polling: false,
            base: 0,
            start: true,
            timeout: crate::TIMEOUT,
        }
    }
}
