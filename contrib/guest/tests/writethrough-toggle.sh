# shellcheck shell=dash
# The guest switches the disk's cache off and on again; data is right in either mode.
cache=/sys/block/$NAME/cache_type
round=0
for mode in "write through" "write back" "write through" "write back"; do
    step "$mode"
    echo "$mode" >"$cache" || fail "cannot switch to $mode"
    [ "$(cat "$cache")" = "$mode" ] || fail "cache_type is '$(cat "$cache")', not '$mode'"
    round=$((round + 1))
    dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
    dd if=/tmp/data of="$DISK" bs=4k seek=$((round * 1000)) conv=fsync 2>/dev/null || fail "write"
    drop_caches
    dd if="$DISK" bs=4k skip=$((round * 1000)) count=256 2>/dev/null | cmp - /tmp/data || fail "read differs"
done
