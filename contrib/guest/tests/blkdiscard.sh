# shellcheck shell=dash
# Discard and write zeroes touch what they should and nothing beside it. Wants 48 MiB or more.
# Variables: DISCARD_ZEROES (1: discarded ranges must read as zeroes; default 0: any content,
# which is all that virtio-blk promises).
[ "$(cat "/sys/block/$NAME/queue/discard_max_bytes")" -gt 0 ] || fail "the disk has no discard"

step "pattern"
tr '\0' 'v' </dev/zero | dd of="$DISK" bs=1M count=48 iflag=fullblock conv=fsync 2>/dev/null || fail "write"
drop_caches
pattern=$(sum 0 8)

step "discard 8..16 MiB"
blkdiscard -o 8M -l 8M "$DISK" || fail "blkdiscard"
drop_caches
[ "$(sum 0 8)" = "$pattern" ] || fail "what is before the discarded range changed"
[ "$(sum 16 8)" = "$pattern" ] || fail "what is behind the discarded range changed"
after=$(sum 8 8)
if [ "$after" = "$(zero_sum 8)" ]; then
    echo "the discarded range reads as zeroes"
elif [ "${DISCARD_ZEROES:-0}" = 1 ]; then
    fail "the discarded range does not read as zeroes"
elif [ "$after" = "$pattern" ]; then
    echo "the discarded range kept its content"
fi

step "zeroes to 24..32 MiB"
blkdiscard -z -o 24M -l 8M "$DISK" || fail "blkdiscard -z"
drop_caches
[ "$(sum 24 8)" = "$(zero_sum 8)" ] || fail "the zeroed range does not read as zeroes"
[ "$(sum 16 8)" = "$pattern" ] || fail "what is before the zeroed range changed"
[ "$(sum 32 8)" = "$pattern" ] || fail "what is behind the zeroed range changed"

step "zeroes to one odd sector"
sector() { dd if="$DISK" bs=512 skip="$1" count=1 2>/dev/null | tr -d "$2" | wc -c; }
blkdiscard -z -o $((67585 * 512)) -l 512 "$DISK" || fail "blkdiscard -z of a sector"
drop_caches
[ "$(sector 67585 '\0')" = 0 ] || fail "the sector is not zero"
[ "$(sector 67584 v)$(sector 67586 v)" = 00 ] || fail "a sector beside it changed"

step "write again"
tr '\0' 'v' </dev/zero | dd of="$DISK" bs=1M count=48 iflag=fullblock conv=fsync 2>/dev/null || fail "write"
drop_caches
for at in 0 8 16 24 32 40; do
    [ "$(sum $at 8)" = "$pattern" ] || fail "data written at $at MiB is not there"
done

step "discard the whole disk"
blkdiscard "$DISK" || fail "blkdiscard"
