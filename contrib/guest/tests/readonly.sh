# shellcheck shell=dash
# A disk exported read-only: reads work, nothing can be written.
# Variables: EXPECT_MD5 (of the first MiB; default: not checked).
step "ro"
[ "$(cat "/sys/block/$NAME/ro")" = 1 ] || fail "$DISK is not read-only"

step "read"
before=$(sum 0 1)
[ "$(dd if="$DISK" bs=1M count=1 2>/dev/null | wc -c)" = 1048576 ] || fail "read"
[ -z "${EXPECT_MD5:-}" ] || [ "$before" = "$EXPECT_MD5" ] || fail "first MiB: $before, expected $EXPECT_MD5"

step "write"
if dd if=/dev/zero of="$DISK" bs=4k count=1 conv=notrunc,fsync 2>/dev/null; then fail "a write succeeded"; fi
if blkdiscard -o 0 -l 1M "$DISK" 2>/dev/null; then fail "a discard succeeded"; fi

drop_caches
[ "$(sum 0 1)" = "$before" ] || fail "the content changed"
