#!/bin/sh
# Unpacks the packages $2… of Debian into the folder $1, unless that was done before.
# They are not installed, so that nobody has to be root.
set -eu
target=$1
shift
[ ! -d "$target" ] || exit 0
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { echo 'apt-get or dpkg-deb is missing' >&2; exit 1; }
mkdir -p "$(dirname "$target")"
dir=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$dir"' EXIT
# Package lists of its own: the machine may have none, and they belong to root.
mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/root"
apt() {
    (cd "$dir" && apt-get -qq -o Dir::State::Lists="$dir/lists" -o Dir::Cache="$dir/cache" -o APT::Sandbox::User="$(id -un)" "$@")
}
apt update
apt download "$@"
for package in "$dir"/*.deb; do
    dpkg-deb -x "$package" "$dir/root"
done
mv "$dir/root" "$target"
