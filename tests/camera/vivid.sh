#!/bin/sh
# A real V4L2 camera without hardware: boots an emulated machine whose kernel has `vivid`, the virtual camera, and runs
# examples/camera_vivid.rs in it, then `cull doctor`, `cull collect` and a `cull run` that is stalled and unplugged. Heavy: 1 to 3 minutes without the build.
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
    cargo build --release --workspace --bin cull --example camera_vivid
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
cp models/default.onnx "$root/default.onnx"
cat > "$root/line.ron" <<'END'
(
    line: "vivid",
    model: "/default.onnx",
    source: Camera(
        device: Index(0), width_px: 640, height_px: 480, rate_hz: 25, format: Yuyv,
        controls: [("test_pattern", 1), ("osd_text_mode", 2)],
    ),
    snapshots: (folder: "/tmp/snapshots", keep: All, max_mb: 50, min_free_mb: 1),
    journal: (path: "/tmp/cull.db"),
    supervise: (stall_ms: 1500, backoff_min_ms: 100, backoff_max_ms: 1000),
)
END
cat > "$root/init" <<'END'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# vivid complains to the console on slow machines, in the middle of our lines.
dmesg -n 1
modprobe vivid n_devs=1 node_types=0x1 || echo "GUEST: no vivid"
camera_vivid
echo "GUEST: camera_vivid ended with $?"

echo "GUEST: cull doctor"
cull doctor 2>&1 | head -60

# The camera's pictures through `cull collect`.
cull collect --config /line.ron --out /tmp/set --parts 5 2>&1 | tail -3
echo "GUEST: collected $(find /tmp/set -name '*.png' | wc -l) pictures"

# A line that stalls, and whose camera is then unplugged and plugged in again.
cull run --config /line.ron --json >/tmp/verdicts 2>/tmp/run.log &
line=$!
verdicts() { wc -l </tmp/verdicts; }
# Wait up to 3 minutes for more than $1 verdicts: an inference takes 10 s and more on a busy machine.
wait_for_more() {
    tries=0
    while [ "$(verdicts)" -le "$1" ] && [ $tries -lt 360 ]; do
        sleep 0.5
        tries=$((tries + 1))
    done
    [ "$(verdicts)" -gt "$1" ]
}
wait_for_more 0 && echo "GUEST: $(verdicts) verdicts" || echo "GUEST: no verdicts"
camera_vivid set percentage_of_dropped_buffers 100
sleep 5
stalled=$(verdicts)
camera_vivid set percentage_of_dropped_buffers 0
wait_for_more "$stalled" && echo "GUEST: verdicts again after a stall"
camera_vivid set disconnect 1
sleep 1
gone=$(verdicts)
wait_for_more $((gone + 2)) && echo "GUEST: verdicts again after unplugging"
kill -TERM $line
wait $line
echo "GUEST: cull run ended with $?"
sed 's/^/    /' /tmp/run.log | cut -c1-200 | tail -40
cull snapshots list /tmp/snapshots --limit 3 2>&1
echo "GUEST: $(ls /tmp/snapshots | grep -c 'json$') snapshots, journal of $(wc -c </tmp/cull.db) bytes"
echo "GUEST: end"
poweroff -f
END
chmod +x "$root/init"
(cd "$root" && find . | cpio --quiet -o -H newc | gzip -1 > "$work/initrd.gz")

log="$work/log.txt"
echo "booting Linux $version with vivid (log: $log)"
# A guest that hangs must not hang the test: 10 minutes cover a machine ten times slower than a usual one.
timeout 600 qemu-system-x86_64 -accel tcg -cpu max -smp 2 -m 768 -nographic -no-reboot -nodefaults -serial stdio \
    -kernel "$work/kernel/boot/vmlinuz-$version" -initrd "$work/initrd.gz" -append "console=ttyS0 quiet loglevel=0 panic=-1" </dev/null >"$log" 2>&1 || true
tr -d '\r' <"$log" | sed -n 's/^.*\(ok: listed\)/\1/p; /^ok: listed/!{/^ok:\|^Error\|VIVID-OK\|GUEST\|^counters\|panicked\|^    /p}'
for wanted in '^VIVID-OK' 'GUEST: collected 5 pictures' 'verdicts again after a stall' 'verdicts again after unplugging' 'cull run ended with 0'; do
    tr -d '\r' <"$log" | grep -aq "$wanted" || {
        echo "FAILED: no \"$wanted\"; the end of $log:" >&2
        tail -60 "$log" >&2
        exit 1
    }
done
echo "PASSED"
