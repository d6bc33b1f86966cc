# shellcheck shell=dash
# ext4 on the disk: files survive remounting, trimming and a full check. Wants 64 MiB or more.
# Variables: FILES (default 200).
FILES=${FILES:-200}

check() { e2fsck -fn "$DISK" >/tmp/fsck 2>&1 || { cat /tmp/fsck; fail "e2fsck $1: $DISK is damaged"; }; }

step "mkfs.ext4"
mkfs.ext4 -q -F "$DISK" || fail "mkfs.ext4"
mount -t ext4 "$DISK" /mnt || fail "mount"

step "$FILES files"
# One random seed, cut differently for each file: /dev/urandom is slow on an emulated CPU.
dd if=/dev/urandom of=/tmp/seed bs=1M count=1 2>/dev/null
i=0
while [ "$i" -lt "$FILES" ]; do
    mkdir -p "/mnt/d$((i % 17))/s$((i % 5))"
    tail -c $((i * i * 8 + 1)) /tmp/seed >"/mnt/d$((i % 17))/s$((i % 5))/f$i" || fail "write f$i"
    i=$((i + 1))
done
ln -s f0 /mnt/link
(cd /mnt && find . -type f -exec md5sum {} + | sort >/tmp/sums)
[ "$(wc -l </tmp/sums)" = "$FILES" ] || fail "expected $FILES files, found $(wc -l </tmp/sums)"
sync

step "fstrim"
dd if=/dev/zero of=/mnt/big bs=1M count=16 2>/dev/null
sync
rm /mnt/big
sync
if [ "$(cat "/sys/block/$NAME/queue/discard_max_bytes")" -gt 0 ]; then
    fstrim -v /mnt || fail "fstrim"
else
    echo "no discard: fstrim skipped"
fi

step "umount, e2fsck, mount"
umount /mnt || fail "umount"
drop_caches
check "after writing"
mount -t ext4 "$DISK" /mnt || fail "second mount"
(cd /mnt && md5sum -c /tmp/sums >/tmp/check 2>&1) || { grep -v ': OK$' /tmp/check; fail "checksums differ"; }
[ "$(readlink /mnt/link)" = f0 ] || fail "symbolic link"

step "delete half"
i=0
while [ "$i" -lt "$FILES" ]; do
    rm "/mnt/d$((i % 17))/s$((i % 5))/f$i"
    i=$((i + 2))
done
umount /mnt || fail "second umount"
drop_caches
check "after deleting"
no_kernel_errors
