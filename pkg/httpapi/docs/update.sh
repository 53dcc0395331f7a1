#!/bin/sh
# Downloads and compresses Swagger UI's files, from its npm package with exactly
# this version and checksum. To change the version, change both lines.
set -eu
version=5.35.0
integrity=sha512-U06rpMtW9V3XPGOBeamTUSr0Z09jMX4IJuANpE/EZbAhw0G8CgwrzU4YmXkn/h0wCDNsXdGarTNNHC3sU8yVUQ==
cd "$(dirname "$0")"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
npm pack --silent --pack-destination "$dir" "swagger-ui-dist@$version" >/dev/null
got=sha512-$(openssl dgst -sha512 -binary "$dir/swagger-ui-dist-$version.tgz" | openssl base64 -A)
[ "$got" = "$integrity" ] || { echo "swagger-ui-dist $version has another checksum: $got" >&2; exit 1; }
tar -xzf "$dir/swagger-ui-dist-$version.tgz" -C "$dir"
for file in swagger-ui-bundle.js swagger-ui.css; do
    # Remove the comment that names the source map, which is not included.
    grep -v '^//# sourceMappingURL\|^/\*# sourceMappingURL' "$dir/package/$file" | gzip -9 -n >"$file.gz"
done
cp "$dir/package/LICENSE" "$dir/package/NOTICE" .
