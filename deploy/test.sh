#!/bin/sh
# Installs what the tests lack and runs them all.
#
#   deploy/test.sh            everything
#   deploy/test.sh --quick    without the trainer: burn and wgpu (20 minutes cold) are not built, but tract is built once more (6 minutes), since
#                             the trainer's packages switch on features below it that the others do not
set -eu
cd "$(dirname "$0")/.."
sh deploy/setup.sh --test
if [ "${1:-}" = "--quick" ]; then
    shift
    exec cargo test --release "$@"
fi
exec cargo test --release --workspace "$@"
