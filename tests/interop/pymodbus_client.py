"""A PLC on pymodbus that polls cull as slave, unit 5: python pymodbus_client.py PORT clean|noisy. Exit status 0 when all is as MODBUS.md says."""

# A pseudo-terminal has no parity bit, and glibc refuses to set one (EINVAL), so pyserial is told "N"; the line between the two keeps
# the time of the eleven bits of 8E1.
import sys
import time

import pymodbus
import serial
from pymodbus.client import ModbusSerialClient

PORT, NOISY, UNIT, PARTS = sys.argv[1], sys.argv[2] == "noisy", 5, 30


def expected(part):
    """The test's rule: every seventh part gets no verdict, every third is bad."""
    return 5 if part % 7 == 0 else 2 if part % 3 == 0 else 1


def client(unit_retries):
    c = ModbusSerialClient(PORT, baudrate=115200, parity="N", bytesize=8, stopbits=1, timeout=0.3, retries=unit_retries)
    assert c.connect(), "cannot open the port"
    return c


def good(answer):
    assert not answer.isError(), answer
    return answer


print("pymodbus", pymodbus.__version__, "as master,", "noisy line" if NOISY else "clean line")
c = client(20 if NOISY else 0)
assert good(c.read_input_registers(0, count=1, device_id=UNIT)).registers == [1], "map version"
times = []
for part in range(1, PARTS + 1):
    start = time.monotonic()
    good(c.write_registers(0, [0, part, part], device_id=UNIT))
    while True:
        value = good(c.read_input_registers(64 + part % 64, count=1, device_id=UNIT)).registers[0]
        assert value >> 8 == part & 0xFF, (part, value)
        if value & 0xFF:
            break
        assert not good(c.read_discrete_inputs(64 + part % 64, count=1, device_id=UNIT)).bits[0], "pending reads OK"
        assert time.monotonic() - start < 20, f"no result for part {part}"
    assert value & 0xFF == expected(part), (part, value & 0xFF)
    ok = good(c.read_discrete_inputs(64 + part % 64, count=1, device_id=UNIT)).bits[0]
    assert ok == (expected(part) == 1), (part, ok)
    if expected(part) != 5:
        times.append(time.monotonic() - start)
r = good(c.read_input_registers(8, count=12, device_id=UNIT)).registers
triggers, ok, ng, errors = (r[i] << 16 | r[i + 1] for i in (0, 2, 4, 6))
want = [expected(p) for p in range(1, PARTS + 1)]
assert (triggers, ok, ng, errors) == (PARTS, want.count(1), PARTS - want.count(1), want.count(5)), (triggers, ok, ng, errors)
assert r[8] >= r[10] >= r[9], "time max, average, min"
times.sort()
print(f"{PARTS} parts: {ok} OK, {ng} NG of which {errors} missed; write to result read: median {times[len(times) // 2] * 1e3:.1f} ms")

good(c.write_register(6, 2, device_id=UNIT))  # mode: stop
good(c.write_register(5, 17, device_id=UNIT))  # recipe
good(c.write_coil(4, True, device_id=UNIT))  # golden sample
assert good(c.read_holding_registers(5, count=2, device_id=UNIT)).registers == [17, 2]
if not NOISY:
    assert c.read_input_registers(200, count=1, device_id=UNIT).exception_code == 2, "illegal address"
    assert c.read_input_registers(127, count=2, device_id=UNIT).exception_code == 2, "beyond the end"
    try:
        c.read_input_registers(0, count=1, device_id=UNIT + 1)
        raise SystemExit("another unit was answered")
    except pymodbus.exceptions.ModbusIOException:
        pass
    c.close()
    # Raw: what a broken master sends is not answered, and the next good request is.
    request = bytes([UNIT, 4, 0, 0, 0, 1])
    crc = 0xFFFF
    for byte in request:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0xA001 if crc & 1 else crc >> 1
    whole = request + crc.to_bytes(2, "little")
    with serial.Serial(PORT, 115200, parity="N", timeout=0.2) as s:
        for name, bad in [("bad CRC", whole[:-1] + bytes([whole[-1] ^ 1])), ("short frame", whole[:5]), ("noise", bytes(range(40)))]:
            s.write(bad)
            assert s.read(1) == b"", f"{name} was answered"
            s.write(whole)
            answer = s.read(7)
            assert answer[:5] == bytes([UNIT, 4, 2, 0, 1]), (name, answer)
            print(f"after {name}: silence, then the next request is answered")
print("PASS")
