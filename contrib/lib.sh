# Shared by the scripts in contrib/. Source it; it runs nothing.
# shellcheck shell=bash disable=SC2034

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# What is fetched or built for the guest: outside the sources, gone with `cargo clean`.
cache=${VUB_CACHE:-$root/target/guest}

# A plain `su` or a service may lack these; mkfs.ext4 and rustup's cargo live there.
PATH=$PATH:/usr/sbin:/sbin:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin

# Whatever ends a script under `set -e` is named.
trap 'printf "%s: line %s failed: %s\n" "$0" "$LINENO" "$BASH_COMMAND" >&2' ERR

say() { printf '== %s\n' "$*" >&2; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# Runs a noisy command; its output is shown only when it fails.
quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || status=$?
    [ "$status" = 0 ] || { cat "$log" >&2; }
    rm -f "$log"
    return "$status"
}

# Holds the lock file $1 until this shell ends: tests start guests in parallel.
lock() {
    mkdir -p "$(dirname "$1")"
    exec {lock_fd}>"$1"
    flock "$lock_fd"
}

# The unpacked busybox runs on the host, too: it saves installing cpio and kmod.
guest_busybox() { find "$cache/pkg/busybox" -path '*/bin/busybox' -type f | head -n 1; }
