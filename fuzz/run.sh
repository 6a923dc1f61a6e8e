#!/usr/bin/env bash
# Runs fuzz targets and prints, for each, executions and coverage:
#
#   fuzz/run.sh [--seconds N] [TARGET ...]
#
# N is 60 unless said, TARGET all of these unless named:
#   mjpg                          the camera JPEG decoder           (fuzz/)
#   linear attention bottleneck   the model's kernels               (fuzz/)
#   gemm                          the product that training needs   (fuzz/)
#   rows                          the kernels of pixels and rows    (fuzz/)
#   modbus_slave modbus_master    the Modbus links                  (fuzz/plc/)
#   decoder line                  the bridge's protocol             (firmware-bridge/fuzz/)
#
# Works on stable: RUSTC_BOOTSTRAP opens the coverage flags, and AddressSanitizer where there is unsafe code (fuzz/). Builds go to CULL_FUZZ_TARGET
# (default ~/.cache/cull/fuzz-target). Inputs that were found stay in `corpus/` beside each crate, those that fail in `artifacts-TARGET-*`.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=60
targets=()
while [ $# -gt 0 ]; do
    case "$1" in
        --seconds) seconds="${2:?--seconds wants a number}"; shift ;;
        -*) sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
        *) targets+=("$1") ;;
    esac
    shift
done
[ ${#targets[@]} -gt 0 ] || targets=(mjpg linear attention bottleneck gemm rows modbus_slave modbus_master decoder line)

export CARGO_TARGET_DIR="${CULL_FUZZ_TARGET:-$HOME/.cache/cull/fuzz-target}" RUSTC_BOOTSTRAP=1
coverage="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
host=$(rustc -vV | awk '/^host:/ {print $2}')

seed_mjpg() {
    python3 - "$1" <<'PYTHON'
import json, pathlib, sys
for i, case in enumerate(json.loads(pathlib.Path("tests/fixtures/mjpg.json").read_text())):
    (pathlib.Path(sys.argv[1]) / f"seed-{i:02}.jpg").write_bytes(bytes.fromhex(case["jpeg"]))
PYTHON
}

failed=""
for target in "${targets[@]}"; do
    flags="$coverage -Ccodegen-units=1"
    case "$target" in
        mjpg) crate=fuzz longest=4096 ;;
        linear | attention | bottleneck | gemm | rows) crate=fuzz longest=4096 ;;
        modbus_slave | modbus_master) crate=fuzz/plc longest=1024 ;;
        decoder | line) crate=firmware-bridge/fuzz longest=2048 ;;
        *) echo "fuzz: there is no target $target" >&2; exit 2 ;;
    esac
    # The kernels' intrinsics make one unit slow to compile; their counters do not need it.
    [ "$crate" != fuzz ] || flags="$coverage -Zsanitizer=address"
    # --target keeps the flags away from build scripts.
    RUSTFLAGS="$flags" cargo build --release --quiet --target "$host" --manifest-path "$crate/Cargo.toml" --bin "$target"
    corpus="$crate/corpus/$target"
    mkdir -p "$corpus"
    if [ -d "$crate/seeds/$target" ]; then cp -n "$crate/seeds/$target"/* "$corpus/"; fi
    if [ "$target" = mjpg ]; then seed_mjpg "$corpus"; fi
    # Leaks are looked for at the end only, which in a container without ptrace fails; nothing here allocates behind Rust's back.
    ASAN_OPTIONS=detect_leaks=0 "$CARGO_TARGET_DIR/$host/release/$target" "$corpus" -max_total_time="$seconds" -max_len="$longest" -print_final_stats=1 \
        -artifact_prefix="$crate/artifacts-$target-" 2>&1 |
        grep -E 'DONE|PC tables|stat::number_of_executed|stat::average|SUMMARY|panicked|Test unit' | tail -6 | sed "s/^/$target: /" || failed="$failed $target"
done
[ -z "$failed" ] || { echo "fuzz: failed:$failed; the inputs are beside the crate, artifacts-*" >&2; exit 1; }
