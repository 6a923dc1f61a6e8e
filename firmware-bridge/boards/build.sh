#!/usr/bin/env bash
# Firmware for all boards: build for thumbv6m and thumbv7em, look for panics in the core, run the self-test under qemu, print flash and RAM.
#
# Where rustup can add targets: `rustup target add thumbv6m-none-eabi thumbv7em-none-eabihf` and this script uses them. Elsewhere it builds
# `core` from Debian's rust-src with Debian's rustc (unpacked into a cache folder, not installed). Needs qemu-system-arm, binutils.
set -euo pipefail
cd "$(dirname "$0")"
cache="${CULL_THUMB_CACHE:-$HOME/.cache/cull/thumb}"
export CARGO_TARGET_DIR="${CULL_BOARDS_TARGET:-$cache/target}"

need() { command -v "$1" >/dev/null || { echo "boards/build.sh: $1 is missing; apt-get install -y --no-install-recommends $2" >&2; exit 2; }; }
need qemu-system-arm qemu-system-arm
need nm binutils

sysroot=$(rustc --print sysroot)
lld="$sysroot/lib/rustlib/x86_64-unknown-linux-gnu/bin/rust-lld"
export CARGO_TARGET_THUMBV6M_NONE_EABI_LINKER="$lld" CARGO_TARGET_THUMBV7EM_NONE_EABIHF_LINKER="$lld"
std=()
if [ ! -d "$sysroot/lib/rustlib/thumbv6m-none-eabi" ]; then
    root="$cache/root"
    mkdir -p "$cache/debs" "$root"
    cat > "$cache/rustc" <<WRAPPER
#!/bin/sh
LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu:$root/usr/lib/llvm-22/lib exec $root/usr/bin/rustc "\$@"
WRAPPER
    chmod +x "$cache/rustc"
    if ! "$cache/rustc" -vV >/dev/null 2>&1; then
        # The compiler's own library is named after its version: libstd-rust-web-1.96.
        library=$(apt-cache depends libstd-rust-web-dev | awk '/Depends: libstd-rust-web-[0-9]/ {print $2; exit}')
        (cd "$cache/debs" && apt-get download rustc-web "$library" libstd-rust-web-dev rust-web-src libllvm22)
        for deb in "$cache"/debs/*.deb; do dpkg -x "$deb" "$root"; done
    fi
    export RUSTC="$cache/rustc" RUSTC_BOOTSTRAP=1
    std=(-Zbuild-std=core)
fi

v6=thumbv6m-none-eabi
v7=thumbv7em-none-eabihf
build() { cargo build --release --locked "${std[@]}" --target "$1" "${@:2}"; }
# One at a time: the HALs turn on features of cortex-m-rt that the others must not have.
build $v6 -p bridge-rp2040
build $v7 -p bridge-stm32f411
for target in $v6 $v7; do
    build $target -p bridge-nopanic
    build $target -p bridge-selftest
done

echo "--- panics in the core"
for target in $v6 $v7; do
    elf="$CARGO_TARGET_DIR/$target/release/bridge-nopanic"
    # Mangled names too: _ZN4core9panicking…, _RNv…4core9panicking….
    if nm "$elf" | grep -i 'panicking\|panic_fmt\|panic_bounds\|unwrap_failed\|slice_index_fail'; then
        echo "boards/build.sh: $target: the core can panic (symbols above)" >&2
        exit 1
    fi
    echo "$target: none"
done

echo "--- self-test under qemu"
selftest() {
    echo "$1 ($2)"
    timeout 120 qemu-system-arm -M "$1" -nographic -monitor none -serial none \
        -semihosting-config enable=on,target=native -kernel "$CARGO_TARGET_DIR/$2/release/bridge-selftest"
}
selftest microbit $v6
selftest mps2-an386 $v7

echo "--- flash and RAM in bytes (the stack comes on top: the futures live in statics, so it is small)"
printf '%-12s %-26s %8s %8s\n' board target flash RAM
sizes() {
    size -A "$CARGO_TARGET_DIR/$2/release/$1" | awk -v board="$1" -v target="$2" '
        $1 ~ /^\.(boot2|vector_table|text|rodata|data|gnu\.sgstubs)$/ { flash += $2 }
        $1 ~ /^\.(data|bss|uninit)$/ { ram += $2 }
        END { printf "%-12s %-26s %8d %8d\n", substr(board, 8), target, flash, ram }'
}
sizes bridge-rp2040 $v6
sizes bridge-stm32f411 $v7
sizes bridge-nopanic $v6
sizes bridge-nopanic $v7
