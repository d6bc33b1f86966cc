# shellcheck shell=dash
# As fio-verify.sh, at a pace that makes it last, beside two jobs that write all the time: bursts, so that a back end that goes
# away has much in flight, and a pulse, whose longest request tells how long the disk stood still. Wants 64 MiB or more.
# Variables: RATE (requests per second of each kind, default 200).
RATE=${RATE:-200}
JOB="--filename=$DISK --direct=1 --ioengine=io_uring --iodepth=16 --size=16m --bssplit=512/25:1k/10:4k/35:16k/15:64k/10:256k/5 \
    --verify=crc32c --verify_fatal=1 --randrepeat=1 --rate_iops=$RATE --rate_process=poisson"

run() {
    step "$1"
    shift
    # shellcheck disable=SC2086 # words
    fio $JOB "$@" >/tmp/fio 2>&1 || { cat /tmp/fio; fail "fio"; }
}

fio --filename="$DISK" --direct=1 --time_based --runtime=600 --rw=randwrite --eta=never --output-format=terse --output=/tmp/beside \
    --name=pulse --ioengine=psync --offset=60m --size=1m --bs=512 --rate_iops=100 \
    --name=burst --ioengine=io_uring --offset=32m --size=16m --bs=16k --iodepth=32 --iodepth_batch=32 --iodepth_low=1 \
    --thinktime=10000 --thinktime_blocks=32 &
beside=$!
run "write" --name=write --rw=randwrite --do_verify=0
run "verify in a second process" --name=write --rw=randwrite --verify_only=1
run "mixed reads and writes, verified" --name=mixed --rw=randrw --rwmixread=40 --do_verify=1 --verify_backlog=256
step "the end"
# Told to end, fio fails; its report has an error of its own.
kill -INT "$beside"
wait "$beside" || true
awk -F ';' '/^3;/ && $5 == 0 { ok++ }
    /^3;.*;pulse;/ { print "longest write: " int($56 / 1000) " ms of " $47 * 2 " writes" }
    END { exit ok != 2 }' /tmp/beside || fail "fio: $(cat /tmp/beside)"
no_kernel_errors
