#!/bin/sh
# Builds the Debian package of cull: target/debian/cull_VERSION_ARCH.deb
#
#   deploy/deb.sh                      for this machine: builds target/dist/cull first
#   deploy/deb.sh --binary FILE ARCH   from a binary built elsewhere (deploy/cross-aarch64.sh), for example ARCH arm64
#
# Needs only dpkg-deb, which every Debian has. The package holds the binary, the default model, the unit, udev rules, a configuration under
# /etc/cull (kept at upgrades when you changed it), and makes the user `cull`.
set -eu
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
if [ "${1:-}" = --binary ]; then
    [ $# -eq 3 ] || { echo "usage: deploy/deb.sh --binary FILE ARCH" >&2; exit 2; }
    binary=$2
    arch=$3
elif [ $# -eq 0 ]; then
    cargo build --profile dist --workspace --bin cull
    binary="${CARGO_TARGET_DIR:-target}/dist/cull"
    arch=$(dpkg --print-architecture)
else
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
[ -f "$binary" ] || { echo "deb: no binary at $binary" >&2; exit 1; }
[ -f models/default.onnx ] || { echo "deb: models/default.onnx is missing" >&2; exit 1; }

out="${CARGO_TARGET_DIR:-target}/debian"
root="$out/root-$arch"
rm -rf "$root"
install -Dm755 "$binary" "$root/usr/bin/cull"
install -Dm644 models/default.onnx "$root/usr/share/cull/models/default.onnx"
install -Dm644 deploy/cull.service "$root/usr/lib/systemd/system/cull.service"
for rules in deploy/*.rules; do
    install -Dm644 "$rules" "$root/usr/lib/udev/rules.d/$(basename "$rules")"
done
# Relative paths in a configuration start at its own folder; what is installed lies elsewhere.
install -d "$root/etc/cull"
sed -e 's|^\( *model: \)"[^"]*models/default.onnx"|\1"/usr/share/cull/models/default.onnx"|' \
    -e 's|^\( *folder: \)"\([^/"]*\)"|\1"/var/lib/cull/\2"|' \
    -e 's|^\( *path: \)"\([^/"]*\)"|\1"/var/lib/cull/\2"|' deploy/cull.ron > "$root/etc/cull/cull.ron"
if grep -nE '^ *(model|folder|path): "[^/]' "$root/etc/cull/cull.ron" >&2; then
    echo "deb: these paths in deploy/cull.ron are still relative" >&2
    exit 1
fi
chmod 644 "$root/etc/cull/cull.ron"
for document in README.md ARCHITECTURE.md models/MODEL_CARD.md; do
    [ ! -f "$document" ] || install -Dm644 "$document" "$root/usr/share/doc/cull/$(basename "$document")"
done
cat > "$root/usr/share/doc/cull/copyright" <<END
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: cull

Files: *
License: MIT or Apache-2.0
END

install -d "$root/DEBIAN"
for script in postinst prerm postrm; do
    install -m755 "deploy/debian/$script" "$root/DEBIAN/$script"
done
echo /etc/cull/cull.ron > "$root/DEBIAN/conffiles"
# The newest glibc symbol the binary asks for is the oldest glibc it runs on.
glibc=$(grep -ao 'GLIBC_2\.[0-9]*' "$binary" | sort -Vu | tail -1 | sed 's/GLIBC_//')
size=$(du -sk --exclude=DEBIAN "$root" | cut -f1)
cat > "$root/DEBIAN/control" <<END
Package: cull
Version: $version
Architecture: $arch
Maintainer: cull maintainers <cull@localhost>
Installed-Size: $size
Depends: libc6 (>= ${glibc:-2.31}), libgcc-s1, adduser
Section: science
Priority: optional
Description: headless visual inspector for production lines
 Camera frames come in, a UniAD anomaly detection model finds what is not normal,
 and a PLC or reject board on a serial line throws the part out in time. One model
 serves all products on the line.
END
package="$out/cull_${version}_${arch}.deb"
dpkg-deb --root-owner-group --build -Zxz "$root" "$package" >/dev/null
rm -rf "$root"
echo "$package ($(du -h "$package" | cut -f1))"
