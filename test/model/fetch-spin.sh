#!/bin/sh
# Puts the model checker Spin at the path $1, unless the file exists. If Spin is
# installed, $1 becomes a link to it. Otherwise the script unpacks Debian's package,
# without installing it.
set -eu
[ ! -x "$1" ] || exit 0
mkdir -p "$(dirname "$1")"
if command -v spin >/dev/null; then
    ln -sf "$(command -v spin)" "$1"
    exit
fi
missing() {
    echo 'the model checker Spin is missing: install it from your package manager (Debian: apt install spin; Homebrew: brew install spin)' >&2
    exit 1
}
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || missing
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
# With package lists in a temporary folder, apt-get needs no root and no earlier update.
mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
apt() {
    (cd "$dir" && apt-get -qq -o Dir::State::Lists="$dir/lists" -o Dir::Cache="$dir/cache" -o APT::Sandbox::User="$(id -un)" "$@" >"$dir/log" 2>&1)
}
apt update && apt download spin && dpkg-deb -x "$dir"/spin_*.deb "$dir" || { cat "$dir/log" >&2; missing; }
cp "$dir/usr/bin/spin" "$1"
