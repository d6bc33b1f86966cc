# shellcheck shell=dash
# In the guest: every job file of /guest/files, with marks for the host, which reads the back
# end's CPU time at each.
for file in /guest/files/*.fio; do
    job=$(basename "$file" .fio)
    echo "@begin $job"
    DISK=$DISK RUNTIME=${RUNTIME:-3} fio --output-format=terse "$file" >/tmp/fio 2>&1 || { cat /tmp/fio; fail "$job"; }
    echo "@end $job $(grep '^3;' /tmp/fio)"
done
no_kernel_errors
