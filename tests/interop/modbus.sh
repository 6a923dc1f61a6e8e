#!/bin/sh
# Modbus RTU against third-party implementations, both roles, clean and damaged lines: pymodbus (PyPI) and libmodbus (Debian).
# What is not installed is skipped, and said so. The log stays in tests/interop/modbus.log.
#
#   apt-get install python3-venv gcc pkg-config libmodbus-dev
#   tests/interop/modbus.sh
set -eu
cd "$(dirname "$0")/../.."
if [ -z "${CULL_PYTHON:-}" ]; then
    CULL_PYTHON=target/interop-venv/bin/python
    if [ ! -x "$CULL_PYTHON" ]; then
        python3 -m venv target/interop-venv && "$CULL_PYTHON" -m pip install --quiet 'pymodbus==3.16.1' 'pyserial==3.5' ||
            echo "no venv with pymodbus: its half will be skipped"
    fi
    export CULL_PYTHON
fi
status=0
{ cargo test --release --workspace --test plc_modbus -- --nocapture --test-threads 1 2>&1 || echo FAILED; } | tee tests/interop/modbus.log
! grep -q '^FAILED' tests/interop/modbus.log || status=1
! grep '^SKIPPED' tests/interop/modbus.log || echo "NOTE: part of the interoperability test was skipped"
exit $status
