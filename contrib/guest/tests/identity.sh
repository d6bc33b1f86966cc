# shellcheck shell=dash
# What the guest sees of the device.
# Variables, each unchecked if unset: EXPECT_SERIAL, EXPECT_QUEUES, EXPECT_SECTORS (of 512 bytes),
# EXPECT_LBS; EXPECT_CACHE (default "write back").
queue=/sys/block/$NAME/queue

for file in logical_block_size physical_block_size minimum_io_size optimal_io_size max_segments \
    max_segment_size max_sectors_kb max_hw_sectors_kb discard_max_bytes discard_granularity \
    write_zeroes_max_bytes nr_requests; do
    echo "$file: $(cat "$queue/$file")"
done

check() {
    echo "$1: $2"
    [ -z "$3" ] || [ "$2" = "$3" ] || fail "$1 is '$2', expected '$3'"
}

check serial "$(cat "/sys/block/$NAME/serial")" "${EXPECT_SERIAL:-}"
check cache_type "$(cat "/sys/block/$NAME/cache_type")" "${EXPECT_CACHE:-write back}"
check queues "$(find "/sys/block/$NAME/mq" -mindepth 1 -maxdepth 1 | wc -l)" "${EXPECT_QUEUES:-}"
check sectors "$(cat "/sys/block/$NAME/size")" "${EXPECT_SECTORS:-}"
check logical_block_size "$(cat "$queue/logical_block_size")" "${EXPECT_LBS:-}"
echo "features: $(cat "/sys/block/$NAME/device/features")"
