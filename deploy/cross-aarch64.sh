#!/bin/sh
# Builds cull for 64-bit ARM boxes on an x86-64 Debian, without a rustup target: DIR/aarch64-unknown-linux-gnu/dist/cull, DIR as it says at the end.
# Then: deploy/deb.sh --binary FILE arm64. Run it as often as you like: what is there is left alone, and then nothing asks for root.
#
#   deploy/cross-aarch64.sh [PROFILE]     dist (default) or release
#   deploy/cross-aarch64.sh --env         only the tools; prints what a shell needs for its own builds: eval "$(deploy/cross-aarch64.sh --env)"
#
# With a rustup that has the aarch64-unknown-linux-gnu target that one is used. Otherwise Debian's own Rust packages are unpacked (not installed)
# under ~/.cache/cull/cross: compiler and standard library for both architectures. Builds have their target directory there, too, since their
# compiler is another one; CULL_CROSS_TARGET names another directory. A cold build takes about 10 minutes on 2 idle cores for tract alone.
# tests/aarch64/run.sh runs the result here, in qemu.
set -eu
cd "$(dirname "$0")/.."
profile=${1:-dist}
target=aarch64-unknown-linux-gnu
cache="${XDG_CACHE_HOME:-$HOME/.cache}/cull/cross"
say() { echo "cross: $*" >&2; }

root=""
[ "$(id -u)" -eq 0 ] || root=sudo
missing=""
for package in gcc-aarch64-linux-gnu libc6-dev-arm64-cross libclang-dev; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
    say "installing$missing"
    $root apt-get update -qq >&2
    # shellcheck disable=SC2086 # one word each
    DEBIAN_FRONTEND=noninteractive $root apt-get install -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends $missing >&2
fi

rustc=rustc
if [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ]; then
    say "using the installed $target target"
else
    rustc="$cache/rustc"
    if [ ! -x "$rustc" ]; then
        say "unpacking Debian's Rust for $target into $cache"
        rm -rf "$cache/root" "$cache/debs"
        mkdir -p "$cache/debs"
        if ! dpkg --print-foreign-architectures | grep -qx arm64; then
            $root dpkg --add-architecture arm64
            $root apt-get update -qq >&2
        fi
        # rustc-web is Debian 12's current Rust (kept up for browsers); its standard library is named after its version, 1.96 for 1.96.0+dfsg1.
        version=$(apt-cache policy rustc-web | sed -n 's/.*Candidate: \([0-9]*\.[0-9]*\)\..*/\1/p')
        llvm=$(apt-cache depends "libstd-rust-web-$version" rustc-web 2>/dev/null | sed -n 's/.*Depends: \(libllvm[0-9.]*\)$/\1/p' | head -1)
        if [ -z "$version" ] || [ -z "$llvm" ]; then
            say "this Debian has no rustc-web; add the target with rustup instead: rustup target add $target"
            exit 1
        fi
        (cd "$cache/debs" && apt-get download -qq rustc-web "libstd-rust-web-$version" libstd-rust-web-dev libstd-rust-web-dev:arm64 "$llvm" >&2)
        for package in "$cache"/debs/*.deb; do dpkg -x "$package" "$cache/root"; done
        rm -rf "$cache/debs"
        libraries=$(find "$cache/root/usr/lib" -name 'libLLVM*.so*' -exec dirname {} \; | sort -u | tr '\n' ':')
        # Moved into place last: a run that was broken off starts over.
        cat > "$rustc.new" <<END
#!/bin/sh
LD_LIBRARY_PATH="$cache/root/usr/lib/x86_64-linux-gnu:$libraries\${LD_LIBRARY_PATH:-}" exec "$cache/root/usr/bin/rustc" "\$@"
END
        chmod +x "$rustc.new"
        mv "$rustc.new" "$rustc"
    fi
    say "$("$rustc" --version)"
fi

# nokhwa's V4L2 bindings are generated from the target's headers.
clang_args="--target=aarch64-linux-gnu -I/usr/aarch64-linux-gnu/include"
directory="${CULL_CROSS_TARGET:-$cache/target}"
if [ "$profile" = --env ]; then
    cat <<END
export RUSTC='$rustc'
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export BINDGEN_EXTRA_CLANG_ARGS_aarch64_unknown_linux_gnu='$clang_args'
export CARGO_TARGET_DIR='$directory'
END
    exit
fi
export RUSTC="$rustc" CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export BINDGEN_EXTRA_CLANG_ARGS_aarch64_unknown_linux_gnu="$clang_args" CARGO_TARGET_DIR="$directory"
# By package: with --workspace the trainer's dependencies (burn) would add features to those that tract stands on. tests/aarch64/run.sh builds its
# tests the same way, so that tract is compiled once in this directory.
cargo build --profile "$profile" --target "$target" -p cull --bin cull
ls -l "$directory/$target/$profile/cull"
