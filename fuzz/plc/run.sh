#!/usr/bin/env bash
# Fuzz the Modbus slave and master for SECONDS each (default 60) and print executions and coverage. Works on stable: RUSTC_BOOTSTRAP opens the
# coverage flags; no sanitizer, since the links have no unsafe code. Only `src/plc` and what it stands on is instrumented, and not tract.
set -euo pipefail
cd "$(dirname "$0")"
seconds="${1:-60}"
export CARGO_TARGET_DIR="${CULL_FUZZ_TARGET:-$HOME/.cache/cull/fuzz-target}" RUSTC_BOOTSTRAP=1
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
# --target keeps the flags away from build scripts.
host=$(rustc -vV | awk '/^host:/ {print $2}')
cargo build --release --quiet --target "$host"
for target in modbus_slave modbus_master; do
    mkdir -p "corpus/$target"
    cp -n "seeds/$target"/* "corpus/$target/"
    "$CARGO_TARGET_DIR/$host/release/$target" "corpus/$target" -max_total_time="$seconds" -max_len=1024 -print_final_stats=1 \
        -artifact_prefix="artifacts-$target-" 2>&1 | grep -E 'DONE|PC tables|stat::number_of_executed|stat::average|SUMMARY|panicked|Test unit' | tail -6 | sed "s/^/$target: /"
done
