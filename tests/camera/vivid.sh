#!/bin/sh
# A real V4L2 camera without hardware: boots an emulated machine whose kernel has `vivid`, the virtual camera, and runs
# examples/camera_vivid.rs in it, then `cull doctor`. Heavy: half a minute to 2 minutes without the build.
#
#   tests/camera/vivid.sh [FOLDER OF BUILT BINARIES]      default: builds them with cargo, release profile
#
# Skips with exit status 0, loudly, where the tools or the kernel package cannot be had. Works without KVM, as any user once the tools are there.
set -eu
cd "$(dirname "$0")/../.."

skip() {
    echo "SKIPPED: tests/camera/vivid.sh: $*" >&2
    exit 0
}

work="${XDG_CACHE_HOME:-$HOME/.cache}/cull/vivid"
mkdir -p "$work"

# Tools.
missing=""
command -v qemu-system-x86_64 >/dev/null 2>&1 || missing="$missing qemu-system-x86"
command -v cpio >/dev/null 2>&1 || missing="$missing cpio"
[ -x /bin/busybox ] || missing="$missing busybox-static"
[ -x /sbin/depmod ] || [ -x /usr/sbin/depmod ] || missing="$missing kmod"
if [ -n "$missing" ]; then
    [ "$(id -u)" -eq 0 ] || skip "not installed:$missing (deploy/setup.sh --test installs them)"
    # shellcheck disable=SC2086 # one word each
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } >/dev/null 2>&1 ||
        skip "cannot install$missing"
fi
[ "$(uname -m)" = x86_64 ] || skip "the guest's kernel is for x86-64, this machine is $(uname -m)"
file_is_static=$(LC_ALL=C /bin/busybox true && ldd /bin/busybox 2>&1 || true)
case "$file_is_static" in *"not a dynamic"* | *"statically"*) ;; *) skip "/bin/busybox is not static; install busybox-static" ;; esac

# The kernel with its modules, kept between runs.
if [ ! -f "$work/kernel/.complete" ]; then
    rm -rf "$work/kernel"
    mkdir -p "$work/kernel"
    package=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*-amd64\)$/\1/p' | head -1)
    [ -n "$package" ] || skip "no kernel package known to apt (apt-get update?)"
    (cd "$work/kernel" && apt-get download -qq "$package" >/dev/null 2>&1) || skip "cannot download $package"
    dpkg -x "$work/kernel/"linux-image-*.deb "$work/kernel"
    rm "$work/kernel/"linux-image-*.deb
    touch "$work/kernel/.complete"
fi
modules=$(echo "$work"/kernel/lib/modules/*)
version=$(basename "$modules")
[ -f "$work/kernel/boot/vmlinuz-$version" ] || skip "the kernel package has an unknown layout"

# The binaries.
if [ $# -ge 1 ]; then
    built=$1
else
    cargo build --release -p cull --bin cull --example camera_vivid
    built="${CARGO_TARGET_DIR:-target}/release"
fi
test_binary="$built/examples/camera_vivid"
[ -x "$test_binary" ] || test_binary="$built/camera_vivid"

# The guest's file system.
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/bin" "$root/proc" "$root/sys" "$root/dev" "$root/tmp" "$root/run" "$root/lib/modules/$version"
cp /bin/busybox "$root/bin/busybox"
cp "$test_binary" "$root/bin/camera_vivid"
cp "$built/cull" "$root/bin/cull"
strip "$root/bin/camera_vivid" "$root/bin/cull" 2>/dev/null || true
# Shared libraries, where the loader looks for them.
for library in $(ldd "$test_binary" "$built/cull" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^[[:space:]]*\(\/[^ ]*ld-linux[^ ]*\) .*/\1/p' | sort -u); do
    mkdir -p "$root$(dirname "$library")"
    cp -L "$library" "$root$library"
done
# vivid and what it depends on.
PATH="$PATH:/sbin:/usr/sbin"
depmod -b "$work/kernel" "$version"
for module in $(modprobe -d "$work/kernel" -S "$version" --show-depends vivid | sed -n 's/^insmod \([^ ]*\).*/\1/p'); do
    target="$root/${module#"$work"/kernel/}"
    mkdir -p "$(dirname "$target")"
    cp "$module" "$target"
done
cp "$modules/modules.order" "$modules/modules.builtin" "$modules/modules.builtin.modinfo" "$root/lib/modules/$version/"
depmod -b "$root" "$version"
cat > "$root/init" <<'END'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
modprobe vivid n_devs=1 node_types=0x1 || echo "GUEST: no vivid"
camera_vivid
echo "GUEST: camera_vivid ended with $?"
echo "GUEST: cull doctor"
cull doctor 2>&1 | head -60
echo "GUEST: end"
poweroff -f
END
chmod +x "$root/init"
(cd "$root" && find . | cpio --quiet -o -H newc | gzip -1 > "$work/initrd.gz")

log="$work/log.txt"
echo "booting Linux $version with vivid (log: $log)"
# A guest that hangs must not hang the test: 10 minutes cover a machine ten times slower than a usual one.
timeout 600 qemu-system-x86_64 -accel tcg -cpu max -smp 2 -m 768 -nographic -no-reboot -nodefaults -serial stdio \
    -kernel "$work/kernel/boot/vmlinuz-$version" -initrd "$work/initrd.gz" -append "console=ttyS0 quiet panic=-1" </dev/null >"$log" 2>&1 || true
sed -n '/^ok:\|^Error\|VIVID-OK\|GUEST\|counters\|panicked\|^    /p' "$log" | tr -d '\r'
grep -q '^VIVID-OK' "$log" || {
    echo "FAILED: no VIVID-OK; the end of $log:" >&2
    tail -40 "$log" >&2
    exit 1
}
