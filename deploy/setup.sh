#!/bin/sh
# Installs what building cull needs on a bare Debian 12 (or 13, Ubuntu 22.04 and later). Run it as often as you like: what is there is left alone,
# and then nothing asks for root. As root, or as a user with sudo.
#
#   deploy/setup.sh           what the build needs
#   deploy/setup.sh --test    and what the tests use beyond it
#
# Rust itself is not installed here: rust-toolchain and version are yours to choose (1.95 or later, https://rustup.rs).
set -eu

# gcc and libc headers: the linker, and SQLite's C source. libclang and the kernel's headers: nokhwa generates its V4L2 bindings with bindgen.
build="gcc libc6-dev libclang-dev linux-libc-dev"
# Third-party Modbus implementations for the interoperability tests; an emulated machine with a kernel that has a virtual camera; a software GPU
# for the trainer's wgpu tests.
test="pkg-config libmodbus-dev python3 python3-venv qemu-system-x86 busybox-static kmod cpio libvulkan1 mesa-vulkan-drivers"

wanted="$build"
for argument in "$@"; do
    case "$argument" in
        --test) wanted="$wanted $test" ;;
        *)
            sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
            exit 2
            ;;
    esac
done

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: no cargo found: install Rust 1.95 or later (https://rustup.rs), then run this again" >&2
    exit 1
fi
if ! command -v dpkg-query >/dev/null 2>&1 || ! command -v apt-get >/dev/null 2>&1; then
    echo "setup: this is no Debian or Ubuntu; install the equivalents of: $wanted" >&2
    exit 1
fi

missing=""
for package in $wanted; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
if [ -z "$missing" ]; then
    echo "setup: everything is installed"
    exit 0
fi

root=""
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "setup: missing:$missing. Run as root: apt-get install --no-install-recommends$missing" >&2
        exit 1
    fi
    root=sudo
fi
echo "setup: installing$missing"
$root apt-get update -qq
# shellcheck disable=SC2086 # one word each
DEBIAN_FRONTEND=noninteractive $root apt-get install -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends $missing
echo "setup: done"
