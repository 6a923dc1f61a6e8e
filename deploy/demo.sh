#!/bin/sh
# From a bare Debian 12 with a Rust toolchain to a running (simulated) line: installs what the build lacks, builds, runs `cull demo`.
# Arguments go to `cull demo`, for example: deploy/demo.sh --seconds 30 --seed 7
set -eu
cd "$(dirname "$0")/.."
sh deploy/setup.sh
exec cargo run --release --bin cull -- demo "$@"
