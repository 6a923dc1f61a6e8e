#!/bin/sh
# From a bare Debian 12 with a Rust toolchain to a running (simulated) line: installs what the build lacks, builds, runs `cull demo`.
# Arguments go to `cull demo`, for example: deploy/demo.sh --seconds 30 --seed 7
set -eu
cd "$(dirname "$0")/.."
sh deploy/setup.sh
# `--workspace` selects the features that the tests and the trainer build with, so that tract is compiled once for all of them; `--bin cull` keeps
# burn and wgpu out.
cargo build --release --workspace --bin cull
exec "${CARGO_TARGET_DIR:-target}/release/cull" demo "$@"
