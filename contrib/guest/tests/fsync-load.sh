# shellcheck shell=dash
# Makes a file system, unpacks files/tree.tar, and then says of each round when its files are stable, while others come and
# go: what the disk must hold after a power loss. Wants 64 MiB or more.
# Variables: ROUNDS (default 60).
ROUNDS=${ROUNDS:-60}

step "mkfs.ext4"
mkfs.ext4 -q -F "$DISK" || fail "mkfs.ext4"
mount -t ext4 -o discard "$DISK" /mnt || fail "mount"
sync
echo "STABLE mount 0"
mkdir /mnt/tree /mnt/files
tar -x -f /guest/files/tree.tar -C /mnt/tree || fail "tar"
sync
echo "STABLE tree 0"

# What nobody asks for comes and goes, so that there is always something in flight and to be discarded.
dd if=/dev/urandom of=/tmp/noise bs=64k count=16 2>/dev/null
touch /tmp/go
while [ -e /tmp/go ]; do
    cp /tmp/noise /mnt/noise
    cp /mnt/noise /mnt/more-noise
    rm /mnt/noise
    usleep 20000
done &
noise=$!
printf '%08d' 0 >/mnt/counter
i=1
while [ "$i" -le "$ROUNDS" ]; do
    # A new file, more of an old one, and a place that is written over.
    seq "$i" $((i + i * 97 % 5000)) | dd of="/mnt/files/$i" conv=fsync 2>/dev/null || fail "file $i"
    echo "$i" | dd of=/mnt/journal oflag=append conv=notrunc,fsync 2>/dev/null || fail "journal"
    printf '%08d' "$i" | dd of=/mnt/counter conv=notrunc,fsync 2>/dev/null || fail "counter"
    echo "STABLE round $i"
    i=$((i + 1))
done
rm /tmp/go
wait "$noise" || fail "noise"
umount /mnt || fail "umount"
no_kernel_errors
