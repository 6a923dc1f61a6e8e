#!/bin/sh
# Installs what the tests lack and runs them all. --quick leaves out the trainer (burn and wgpu take 20 minutes to build cold).
set -eu
cd "$(dirname "$0")/.."
sh deploy/setup.sh --test
if [ "${1:-}" = "--quick" ]; then
    shift
    exec cargo test --release "$@"
fi
exec cargo test --release --workspace "$@"
