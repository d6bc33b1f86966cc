//! What a format tells the node below it before it does something there: QEMU's `BlkdebugEvent`s.
//!
//! Only `blkdebug` listens; for every other node an event is one empty call of the slow lane. The parent raises an event on
//! its child ([`super::Node::event`]), as QEMU does: `blkdebug` sits below the format that is to fail.
#![forbid(unsafe_code)]

/// Names every event once, in QEMU's order.
macro_rules! events {
    ($($name:literal $event:ident,)*) => {
        /// What is about to happen, by QEMU's name for it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Event {
            $(#[doc = concat!("`", $name, "`")] $event,)*
        }

        /// The names of all events.
        pub static NAMES: &[&str] = &[$($name),*];

        impl Event {
            /// The event called `name`.
            pub fn parse(name: &str) -> Option<Event> {
                match name {
                    $($name => Some(Event::$event),)*
                    _ => None,
                }
            }
        }
    };
}

events! {
    "l1_update" L1Update,
    "l1_grow_alloc_table" L1GrowAllocTable,
    "l1_grow_write_table" L1GrowWriteTable,
    "l1_grow_activate_table" L1GrowActivateTable,
    "l2_load" L2Load,
    "l2_update" L2Update,
    "l2_update_compressed" L2UpdateCompressed,
    "l2_alloc_cow_read" L2AllocCowRead,
    "l2_alloc_write" L2AllocWrite,
    "read_aio" ReadAio,
    "read_backing_aio" ReadBackingAio,
    "read_compressed" ReadCompressed,
    "write_aio" WriteAio,
    "write_compressed" WriteCompressed,
    "vmstate_load" VmstateLoad,
    "vmstate_save" VmstateSave,
    "cow_read" CowRead,
    "cow_write" CowWrite,
    "reftable_load" ReftableLoad,
    "reftable_grow" ReftableGrow,
    "reftable_update" ReftableUpdate,
    "refblock_load" RefblockLoad,
    "refblock_update" RefblockUpdate,
    "refblock_update_part" RefblockUpdatePart,
    "refblock_alloc" RefblockAlloc,
    "refblock_alloc_hookup" RefblockAllocHookup,
    "refblock_alloc_write" RefblockAllocWrite,
    "refblock_alloc_write_blocks" RefblockAllocWriteBlocks,
    "refblock_alloc_write_table" RefblockAllocWriteTable,
    "refblock_alloc_switch_table" RefblockAllocSwitchTable,
    "cluster_alloc" ClusterAlloc,
    "cluster_alloc_bytes" ClusterAllocBytes,
    "cluster_free" ClusterFree,
    "flush_to_os" FlushToOs,
    "flush_to_disk" FlushToDisk,
    "pwritev_rmw_head" PwritevRmwHead,
    "pwritev_rmw_after_head" PwritevRmwAfterHead,
    "pwritev_rmw_tail" PwritevRmwTail,
    "pwritev_rmw_after_tail" PwritevRmwAfterTail,
    "pwritev" Pwritev,
    "pwritev_zero" PwritevZero,
    "pwritev_done" PwritevDone,
    "empty_image_prepare" EmptyImagePrepare,
    "l1_shrink_write_table" L1ShrinkWriteTable,
    "l1_shrink_free_l2_clusters" L1ShrinkFreeL2Clusters,
    "cor_write" CorWrite,
    "cluster_alloc_space" ClusterAllocSpace,
    "none" None,
}
