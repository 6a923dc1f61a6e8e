#!/bin/sh
# Builds cull for 64-bit ARM boxes on an x86-64 Debian, without a rustup target: target/aarch64-unknown-linux-gnu/dist/cull
# Then: deploy/deb.sh --binary target/aarch64-unknown-linux-gnu/dist/cull arm64
#
#   deploy/cross-aarch64.sh [PROFILE]     dist (default) or release
#
# With a rustup that has the aarch64-unknown-linux-gnu target that one is used. Otherwise Debian's own Rust packages are unpacked (not installed)
# under ~/.cache/cull/cross: compiler and standard library for both architectures. A cold build takes about 10 minutes on 2 cores for tract alone.
# To run the result here: qemu-aarch64-static -cpu max -L /usr/aarch64-linux-gnu FILE   (correctness only: 10 s and more for one inference)
set -eu
cd "$(dirname "$0")/.."
profile=${1:-dist}
target=aarch64-unknown-linux-gnu
cache="${XDG_CACHE_HOME:-$HOME/.cache}/cull/cross"

root=""
[ "$(id -u)" -eq 0 ] || root=sudo
missing=""
for package in gcc-aarch64-linux-gnu libc6-dev-arm64-cross libclang-dev; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
    echo "cross: installing$missing"
    $root apt-get update -qq
    # shellcheck disable=SC2086 # one word each
    DEBIAN_FRONTEND=noninteractive $root apt-get install -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends $missing
fi

if [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; then
    echo "cross: using the installed $target target"
else
    if [ ! -x "$cache/rustc" ]; then
        echo "cross: unpacking Debian's Rust for $target into $cache"
        rm -rf "$cache"
        mkdir -p "$cache/debs"
        dpkg --print-foreign-architectures | grep -qx arm64 || { $root dpkg --add-architecture arm64; $root apt-get update -qq; }
        # rustc-web is Debian 12's current Rust (kept up for browsers); its standard library is named after its version, 1.96 for 1.96.0+dfsg1.
        version=$(apt-cache policy rustc-web | sed -n 's/.*Candidate: \([0-9]*\.[0-9]*\)\..*/\1/p')
        llvm=$(apt-cache depends "libstd-rust-web-$version" rustc-web 2>/dev/null | sed -n 's/.*Depends: \(libllvm[0-9.]*\)$/\1/p' | head -1)
        if [ -z "$version" ] || [ -z "$llvm" ]; then
            echo "cross: this Debian has no rustc-web; add the target with rustup instead: rustup target add $target" >&2
            exit 1
        fi
        (cd "$cache/debs" && apt-get download -qq rustc-web "libstd-rust-web-$version" libstd-rust-web-dev libstd-rust-web-dev:arm64 "$llvm")
        for package in "$cache"/debs/*.deb; do dpkg -x "$package" "$cache/root"; done
        rm -rf "$cache/debs"
        libraries=$(find "$cache/root/usr/lib" -name 'libLLVM*.so*' -exec dirname {} \; | sort -u | tr '\n' ':')
        cat > "$cache/rustc" <<END
#!/bin/sh
LD_LIBRARY_PATH="$cache/root/usr/lib/x86_64-linux-gnu:$libraries\${LD_LIBRARY_PATH:-}" exec "$cache/root/usr/bin/rustc" "\$@"
END
        chmod +x "$cache/rustc"
    fi
    "$cache/rustc" --version
    export RUSTC="$cache/rustc"
fi

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
# nokhwa's V4L2 bindings are generated from the target's headers.
export BINDGEN_EXTRA_CLANG_ARGS_aarch64_unknown_linux_gnu="--target=aarch64-linux-gnu -I/usr/aarch64-linux-gnu/include"
cargo build --profile "$profile" --target "$target" -p cull --bin cull
binary="${CARGO_TARGET_DIR:-target}/$target/$profile/cull"
ls -l "$binary"
