# shellcheck shell=dash
# As fio-verify.sh, at a pace that makes it last, beside one job that writes all the time: how long its longest request took
# is how long the disk stood still. For back ends that go away and come back. Wants 64 MiB or more.
# Variables: RATE (requests per second of each kind, default 200).
RATE=${RATE:-200}
PULSE="--name=pulse --filename=$DISK --direct=1 --ioengine=psync --offset=60m --size=1m --rw=randwrite --bs=512 --eta=never"
JOB="--filename=$DISK --direct=1 --ioengine=io_uring --iodepth=16 --size=16m --bssplit=512/25:1k/10:4k/35:16k/15:64k/10:256k/5 \
    --verify=crc32c --verify_fatal=1 --randrepeat=1 --rate_iops=$RATE --rate_process=poisson"

run() {
    step "$1"
    shift
    # shellcheck disable=SC2086 # words
    fio $JOB "$@" >/tmp/fio 2>&1 || { cat /tmp/fio; fail "fio"; }
}

# shellcheck disable=SC2086 # words
fio $PULSE --time_based --runtime=600 --rate_iops=200 --output-format=terse --output=/tmp/pulse &
pulse=$!
run "write" --name=write --rw=randwrite --do_verify=0
run "verify in a second process" --name=write --rw=randwrite --verify_only=1
run "mixed reads and writes, verified" --name=mixed --rw=randrw --rwmixread=40 --do_verify=1 --verify_backlog=256
step "the end"
# Told to end, fio fails; its report has an error of its own.
kill -INT "$pulse"
wait "$pulse" || true
awk -F ';' '/^3;/ && $5 == 0 { print "longest write: " int($56 / 1000) " ms of " $47 * 2 " writes"; ok = 1 }
    END { exit !ok }' /tmp/pulse || fail "fio's pulse: $(cat /tmp/pulse)"
no_kernel_errors
