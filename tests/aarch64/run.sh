#!/bin/sh
# Runs the kernels' tests for 64-bit ARM in qemu, on three CPUs (plain NEON, with dot products, with the int8 matrix extension), and prints the
# instructions that one frame takes: the measure of speed that a machine without an ARM CPU allows.
#
#   tests/aarch64/run.sh [--count] [--full] [BUNDLE.onnx ...]
#
#   --count   no tests, only the instructions a frame
#   --full    also the whole library's unit tests and the real program (`cull doctor`, `cull model verify`, `cull bench` with the instructions of
#             the whole run); builds tract, 10 minutes and more
#
# Bundles: models/default.onnx unless named; a bundle with 8-bit weights shows what the integer kernels save (`cull model quantize A --out B`).
# Without --full only kernels, graph and plan are built (count.rs, model.rs, kernels.rs beside this file): no tract, a few minutes.
set -eu
cd "$(dirname "$0")/../.."
repo=$PWD
tests=yes
full=""
bundles=""
for argument in "$@"; do
    case "$argument" in
        --count) tests="" ;;
        --full) full=yes ;;
        -*)
            sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
            exit 2
            ;;
        *) bundles="$bundles $(realpath "$argument")" ;;
    esac
done
[ -n "$bundles" ] || bundles="$repo/models/default.onnx"

environment=$(sh deploy/cross-aarch64.sh --env)
eval "$environment"
target=aarch64-unknown-linux-gnu
tools="${XDG_CACHE_HOME:-$HOME/.cache}/cull/cross"

# qemu's dynamically linked user emulator, unpacked: the static one of Debian cannot load plugins.
qemu="$tools/qemu/usr/bin/qemu-aarch64"
if [ ! -x "$qemu" ]; then
    echo "aarch64: unpacking qemu-user into $tools/qemu" >&2
    mkdir -p "$tools/debs"
    (cd "$tools/debs" && apt-get download -qq qemu-user)
    for package in "$tools"/debs/*.deb; do dpkg -x "$package" "$tools/qemu"; done
    rm -rf "$tools/debs"
fi
gcc -O2 -Wall -shared -fPIC -o "$tools/insn.so" tests/aarch64/insn.c

# A crate of three of our folders, so that nothing of tract but its ONNX messages is compiled. Its source comes from the registry's copy.
small="$tools/small"
mkdir -p "$small/tract-onnx/src"
messages=$(cargo metadata --format-version 1 --filter-platform "$target" | grep -o '"[^"]*/tract-onnx-[0-9.]*/Cargo.toml"' | head -1 | tr -d '"')
[ -n "$messages" ] || { echo "aarch64: cargo does not say where tract-onnx lies" >&2; exit 1; }
cp "$(dirname "$messages")/src/prost/onnx.rs" "$small/tract-onnx/src/onnx.rs"
echo 'pub mod pb { include!("onnx.rs"); }' > "$small/tract-onnx/src/lib.rs"
cat > "$small/tract-onnx/Cargo.toml" <<END
[package]
name = "tract-onnx"
version = "0.0.0"
edition = "2021"
[dependencies]
prost = "0.14"
END
cat > "$small/Cargo.toml" <<END
[package]
name = "small"
version = "0.0.0"
edition = "2024"
[lib]
path = "$repo/tests/aarch64/kernels.rs"
[[bin]]
name = "count"
path = "$repo/tests/aarch64/count.rs"
test = false
[dependencies]
tract-onnx = { path = "tract-onnx" }
prost = "0.14"
log = "0.4"
thiserror = "2"
[dev-dependencies]
proptest = { version = "1.12", default-features = false, features = ["std"] }
[workspace]
[profile.release]
incremental = true
[profile.test]
inherits = "release"
opt-level = 1
END
run() { cpu=$1; shift; "$qemu" -cpu "$cpu" -L /usr/aarch64-linux-gnu "$@"; }
built() { sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1; }
cpus="cortex-a72 cortex-a76 max"

if [ -n "$tests" ]; then
    program=$(cargo test --manifest-path "$small/Cargo.toml" --target "$target" --lib --no-run --message-format json | built)
    for cpu in $cpus; do
        echo "=== kernels on $cpu"
        run "$cpu" "$program"
    done
fi

count() { # CPU ISA BUNDLE: instructions a frame, by the difference of three frames and one
    cpu=$1 isa=$2 bundle=$3
    for frames in 1 3; do
        CULL_ISA=$isa run "$cpu" -plugin "$tools/insn.so" "$program" "$bundle" "$frames" 2>&1 >/dev/null | sed -n 's/^instructions //p'
    done | paste -s -d ' ' | awk '{ printf "%.1f\n", ($2 - $1) / 2e6 }'
}
program=$(cargo build --release --manifest-path "$small/Cargo.toml" --target "$target" --bin count --message-format json | built)
printf '%-40s %10s %10s %10s   million instructions a frame\n' bundle neon neondot neoni8mm
for bundle in $bundles; do
    printf '%-40s %10s %10s %10s\n' "$(basename "$bundle")" "$(count max neon "$bundle")" "$(count max neondot "$bundle")" "$(count max neoni8mm "$bundle")"
done

if [ -n "$full" ]; then
    # By package, as deploy/cross-aarch64.sh builds, which explains it.
    program=$(cargo test --release --target "$target" -p cull --lib --no-run --message-format json | built)
    for cpu in $cpus; do
        echo "=== cull's unit tests on $cpu (without the two that open a serial line: qemu-user has no TCGETS2)"
        run "$cpu" "$program" --skip plc::port::tests::a_port_is_exclusive --skip plc::port::tests::a_pty_carries
    done
    sh deploy/cross-aarch64.sh release
    program="$CARGO_TARGET_DIR/$target/release/cull"
    run max "$program" doctor || echo "doctor: exit code $? (in qemu some of what it looks for is missing)"
    for bundle in $bundles; do
        run max "$program" model verify "$bundle"
        run max "$program" bench --model "$bundle" --seconds 1 --json
        printf '%s: ' "$(basename "$bundle")"
        run max -plugin "$tools/insn.so" "$program" bench --model "$bundle" --seconds 1 2>&1 >/dev/null | sed -n 's/^instructions //p'
    done
fi
