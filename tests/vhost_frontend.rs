//! The handshake of rust-vmm's front end (crate `vhost`), which cloud-hypervisor and StratoVirt build on.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod common;

use std::os::fd::AsRawFd;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use vub_client::ring::{Ring, RingMem};
use vub_client::{GuestMem, Queue};

use common::{Disk, ENGINES, FileDisk, LIMIT, MIB, config};

/// The regions of `mem` in that crate's words.
fn regions(mem: &GuestMem) -> Vec<VhostUserMemoryRegionInfo> {
    let one = |(info, fd): (vub_client::mem::RegionInfo, i32)| VhostUserMemoryRegionInfo {
        guest_phys_addr: info.gpa,
        memory_size: info.len,
        userspace_addr: info.user_addr,
        mmap_offset: 0,
        mmap_handle: fd,
    };
    mem.regions().into_iter().map(one).collect()
}

fn handshake(disk: &Disk, queues: u64) -> Frontend {
    let mut front = Frontend::connect(disk.path(), queues).unwrap();
    front.set_owner().unwrap();
    let features = front.get_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE;
    let offered = front.get_protocol_features().unwrap();
    assert!(offered.contains(wanted), "{offered:?}");
    front.set_protocol_features(wanted).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    // All but packed rings, which the rings here are not.
    front.set_features(features & !(1 << 34)).unwrap();
    front
}

#[test]
fn the_whole_handshake_and_requests_on_four_queues() {
    let file = FileDisk::new(MIB, ENGINES[2], config());
    for slots in [false, true] {
        let mut front = handshake(&file.disk, 4);
        assert_eq!(front.get_queue_num().unwrap(), 4);
        let (_, space) = front.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60]).unwrap();
        assert_eq!(space[..8], (MIB / 512).to_le_bytes());
        front.set_config(32, VhostUserConfigFlags::WRITABLE, &[1]).unwrap();

        let mem = GuestMem::new(2, 4 << 20).unwrap();
        if slots {
            assert!(front.get_max_mem_slots().unwrap() >= 8);
            for region in regions(&mem) {
                front.add_mem_region(&region).unwrap();
            }
        } else {
            front.set_mem_table(&regions(&mem)).unwrap();
        }
        let mut queues = Vec::new();
        for i in 0..4u16 {
            let ring = Ring::new(RingMem::new(&mem, 64).unwrap(), true);
            let at = usize::from(i);
            front.set_vring_num(at, 64).unwrap();
            let config = VringConfigData {
                queue_max_size: 64,
                queue_size: 64,
                flags: 0,
                desc_table_addr: ring.mem().desc.user_addr(),
                used_ring_addr: ring.mem().used.user_addr(),
                avail_ring_addr: ring.mem().avail.user_addr(),
                log_addr: None,
            };
            front.set_vring_addr(at, &config).unwrap();
            front.set_vring_base(at, 0).unwrap();
            let mut q = Queue::new(i, &mem, ring, false).unwrap();
            (q.timeout, q.indirect) = (LIMIT, true);
            front.set_vring_call(at, &copy(q.call_fd())).unwrap();
            front.set_vring_err(at, &copy(q.err_fd())).unwrap();
            front.set_vring_kick(at, &copy(q.kick_fd())).unwrap();
            front.set_vring_enable(at, true).unwrap();
            queues.push(q);
        }
        for q in &mut queues {
            let (sector, byte) = (u64::from(q.index()), q.index().to_le_bytes()[0] + 1);
            q.write(sector, &[byte; 512]).unwrap();
            let mut back = [0; 512];
            q.read(sector, &mut back).unwrap();
            assert_eq!(back, [byte; 512]);
        }
        for i in 0..4 {
            front.set_vring_enable(i, false).unwrap();
            assert_eq!(front.get_vring_base(i).unwrap(), 2);
        }
        if slots {
            front.remove_mem_region(&regions(&mem)[1]).unwrap();
        }
        front.reset_device().unwrap();
    }
}

fn copy(fd: &EventFd) -> EventFd {
    assert!(fd.as_raw_fd() >= 0);
    fd.try_clone().unwrap()
}

#[test]
fn what_cannot_be_is_refused_and_the_connection_goes_on() {
    let disk = Disk::null(MIB, config());
    let mut front = handshake(&disk, 64);
    front.set_vring_num(10, 64).unwrap_err();
    front.set_vring_enable(10, true).unwrap_err();
    front.set_vring_num(0, 63).unwrap_err();
    let mem = GuestMem::new(1, 1 << 20).unwrap();
    let mut region = regions(&mem).swap_remove(0);
    region.memory_size = 1 << 40;
    front.add_mem_region(&region).unwrap_err();
    front.remove_mem_region(&region).unwrap_err();
    front.set_features(1 << 63).unwrap_err();
    assert_eq!(front.get_queue_num().unwrap(), 4);
    front.add_mem_region(&regions(&mem)[0]).unwrap();
}
