# Sourced in the guest before each script: what the scripts in tests/ share.
# shellcheck shell=dash disable=SC2034

DISK=${DISK:-/dev/vda}
NAME=${DISK#/dev/}

step() { echo "-- $*"; }
fail() { echo "FAILED: $*"; exit 1; }

# What `read` sees next comes from the disk, not from the guest's page cache.
drop_caches() {
    sync
    blockdev --flushbufs "$DISK"
    echo 3 >/proc/sys/vm/drop_caches
}

# sum OFFSET_MIB LENGTH_MIB: checksum of a range of the disk.
sum() { dd if="$DISK" bs=1M skip="$1" count="$2" 2>/dev/null | md5sum | cut -d ' ' -f 1; }

# zero_sum LENGTH_MIB: checksum of as many zeroes.
zero_sum() { dd if=/dev/zero bs=1M count="$1" 2>/dev/null | md5sum | cut -d ' ' -f 1; }

no_kernel_errors() {
    dmesg | grep -E "I/O error|EXT4-fs (error|warning)|blk_update_request" && fail "the kernel saw errors"
    return 0
}

# busybox's shell takes its own applets before anything in PATH; these know more options.
blkdiscard() { /sbin/blkdiscard "$@"; }
fstrim() { /sbin/fstrim "$@"; }
