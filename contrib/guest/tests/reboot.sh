# shellcheck shell=dash
# Files survive the machine. The first time: makes a file system, writes, trims, syncs and ends without unmounting. Later,
# on the same disk: everything synced is there. Wants 64 MiB or more.
# Variables: BOOT (first, or anything else; default first).
if [ "${BOOT:-first}" = first ]; then
    step "files, some of them deleted and trimmed"
    mkfs.ext4 -q -F "$DISK" || fail "mkfs.ext4"
    mount -t ext4 "$DISK" /mnt || fail "mount"
    dd if=/dev/urandom of=/tmp/seed bs=1M count=2 2>/dev/null
    i=0
    while [ "$i" -lt 100 ]; do
        tail -c $((i * i * 100 + 1)) /tmp/seed >"/mnt/f$i" || fail "write f$i"
        i=$((i + 1))
    done
    sync
    rm /mnt/f?5
    sync
    fstrim -v /mnt || fail "fstrim"
    # Written over what was trimmed.
    cp /tmp/seed /mnt/last || fail "write last"
    (cd /mnt && md5sum f* last >/tmp/sums && cp /tmp/sums sums) || fail "md5sum"
    sync
else
    step "what was synced is there"
    # The journal is replayed: nobody has unmounted it.
    mount -t ext4 "$DISK" /mnt || fail "mount"
    [ "$(wc -l </mnt/sums)" = 92 ] || fail "$(wc -l </mnt/sums) files"
    (cd /mnt && md5sum -c sums >/tmp/check 2>&1) || { grep -v ': OK$' /tmp/check; fail "checksums differ"; }
    umount /mnt || fail "umount"
    e2fsck -fn "$DISK" >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "e2fsck: $DISK is damaged"; }
fi
no_kernel_errors
