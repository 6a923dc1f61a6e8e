#!/usr/bin/env bash
# Fuzz the camera JPEG decoder for SECONDS (default 60) and print executions and coverage. Works on stable: RUSTC_BOOTSTRAP opens the coverage
# flags. Seeds are the pictures of tests/fixtures/mjpg.json.
set -euo pipefail
cd "$(dirname "$0")"
seconds="${1:-60}"
export CARGO_TARGET_DIR="${CULL_FUZZ_TARGET:-$HOME/.cache/cull/fuzz-target}" RUSTC_BOOTSTRAP=1
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
# --target keeps the flags away from build scripts.
host=$(rustc -vV | awk '/^host:/ {print $2}')
cargo build --release --quiet --target "$host"
mkdir -p corpus/mjpg
python3 - <<'PYTHON'
import json, pathlib
for i, case in enumerate(json.loads(pathlib.Path("../tests/fixtures/mjpg.json").read_text())):
    pathlib.Path(f"corpus/mjpg/seed-{i:02}.jpg").write_bytes(bytes.fromhex(case["jpeg"]))
PYTHON
"$CARGO_TARGET_DIR/$host/release/mjpg" corpus/mjpg -max_total_time="$seconds" -max_len=4096 -print_final_stats=1 -artifact_prefix=artifacts-mjpg- 2>&1 |
    grep -E 'DONE|PC tables|stat::number_of_executed|stat::average|SUMMARY|panicked|Test unit' | tail -6 | sed 's/^/mjpg: /'
