#!/bin/sh
# Unpacks the Debian packages $2… into the folder $1, unless the folder exists.
# The script does not install the packages, so it does not need root.
set -eu
target=$1
shift
[ ! -d "$target" ] || exit 0
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { echo 'apt-get or dpkg-deb is missing' >&2; exit 1; }
mkdir -p "$(dirname "$target")"
dir=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$dir"' EXIT
# The script downloads package lists of its own. The system's package lists may be
# missing, and only root can update them.
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
