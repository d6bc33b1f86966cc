//! The virtio side: the split ring and the virtio-blk device's constants, configuration and requests.
