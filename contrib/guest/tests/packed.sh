# shellcheck shell=dash
# Driver and device agreed on packed rings.
features=$(cat "/sys/block/$NAME/device/features")
# One character for each bit, from bit 0 on.
[ "$(printf %s "$features" | cut -c 35)" = 1 ] || fail "no packed rings: $features"
