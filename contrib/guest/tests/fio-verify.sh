# shellcheck shell=dash
# fio writes and verifies checksummed blocks of mixed sizes, then a second process verifies them
# again from the disk. One job per vCPU, each on its own part.
# Variables: FIO_SIZE (per job, default 32m), FIO_ENGINE (io_uring), FIO_DEPTH (16).
BSSPLIT=512/25:1k/10:4k/35:16k/15:64k/10:256k/5
# verify_only replays the same seeds: both phases must be given the same job.
JOB="--filename=$DISK --direct=1 --ioengine=${FIO_ENGINE:-io_uring} --iodepth=${FIO_DEPTH:-16} \
    --size=${FIO_SIZE:-32m} --offset_increment=${FIO_SIZE:-32m} --numjobs=$(nproc) --group_reporting \
    --bssplit=$BSSPLIT --verify=crc32c --verify_fatal=1 --randrepeat=1 --output-format=terse"

run() {
    step "$1"
    shift
    # shellcheck disable=SC2086 # words
    timeout 100 fio $JOB "$@" >/tmp/fio 2>&1 || { cat /tmp/fio; fail "fio"; }
    awk -F ';' '/^3;/ { print "reads: " $6 " KiB, writes: " $47 " KiB" }' /tmp/fio
}

run "write" --name=write --rw=randwrite --do_verify=0
drop_caches
run "verify in a second process" --name=write --rw=randwrite --verify_only=1
run "mixed reads and writes, verified" --name=mixed --rw=randrw --rwmixread=40 --do_verify=1 --verify_backlog=512
no_kernel_errors
