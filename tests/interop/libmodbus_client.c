/* A PLC on libmodbus that polls cull as slave, unit 5: libmodbus_client PORT clean|noisy. */
#include <errno.h>
#include <modbus.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PARTS 30
#define CHECK(condition, ...) do { if (!(condition)) { fprintf(stderr, __VA_ARGS__); fprintf(stderr, " (%s)\n", modbus_strerror(errno)); exit(1); } } while (0)

static int expected(int part) { return part % 7 == 0 ? 5 : part % 3 == 0 ? 2 : 1; }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }

static modbus_t *line;
static int tries;

/* libmodbus does not repeat; a PLC's program does. */
static void read_registers(int address, int count, uint16_t *out) {
    int rc = -1;
    for (int i = 0; i < tries && rc != count; i++) { if (i) modbus_flush(line); rc = modbus_read_input_registers(line, address, count, out); }
    CHECK(rc == count, "read of input registers %d", address);
}
static void read_bits(int address, int count, uint8_t *out) {
    int rc = -1;
    for (int i = 0; i < tries && rc != count; i++) { if (i) modbus_flush(line); rc = modbus_read_input_bits(line, address, count, out); }
    CHECK(rc == count, "read of discrete inputs %d", address);
}
static void write_registers(int address, int count, const uint16_t *in) {
    int rc = -1;
    for (int i = 0; i < tries && rc != count; i++) { if (i) modbus_flush(line); rc = modbus_write_registers(line, address, count, in); }
    CHECK(rc == count, "write of holding registers %d", address);
}

int main(int argc, char **argv) {
    CHECK(argc == 3, "usage: libmodbus_client PORT clean|noisy");
    int noisy = !strcmp(argv[2], "noisy");
    tries = noisy ? 20 : 1;
    printf("libmodbus %s as master, %s line\n", LIBMODBUS_VERSION_STRING, argv[2]);
    line = modbus_new_rtu(argv[1], 115200, 'E', 8, 1);
    CHECK(line && !modbus_set_slave(line, 5) && !modbus_connect(line), "cannot open %s", argv[1]);
    modbus_set_response_timeout(line, noisy ? 0 : 1, noisy ? 300000 : 0);
    uint16_t r[16];
    uint8_t b[16];
    read_registers(0, 1, r);
    CHECK(r[0] == 1, "map version is %d", r[0]);
    int ok = 0, missed = 0;
    for (int part = 1; part <= PARTS; part++) {
        uint16_t announce[3] = {0, part, part};
        write_registers(0, 3, announce);
        double start = now();
        do {
            read_registers(64 + part % 64, 1, r);
            CHECK(r[0] >> 8 == (part & 255), "slot of part %d holds %d", part, r[0]);
            CHECK(now() - start < 20, "no result for part %d", part);
        } while (!(r[0] & 255));
        CHECK((r[0] & 255) == expected(part), "part %d is %d", part, r[0] & 255);
        read_bits(64 + part % 64, 1, b);
        CHECK(b[0] == (expected(part) == 1), "OK bit of part %d is %d", part, b[0]);
        ok += expected(part) == 1;
        missed += expected(part) == 5;
    }
    read_registers(8, 8, r);
    CHECK(r[1] == PARTS && r[3] == ok && r[5] == PARTS - ok && r[7] == missed, "counters %d %d %d %d", r[1], r[3], r[5], r[7]);
    printf("%d parts: %d OK, %d NG of which %d missed\n", r[1], r[3], r[5], r[7]);
    uint16_t recipe_mode[2] = {17, 2};
    write_registers(5, 2, recipe_mode);
    if (!noisy) {
        CHECK(modbus_read_input_registers(line, 200, 1, r) == -1 && errno == EMBXILADD, "an illegal address was read");
        CHECK(modbus_write_bit(line, 4, 1) == 1, "write of coil 4");
        CHECK(modbus_report_slave_id(line, sizeof b, b) == -1 && errno == EMBXILFUN, "function 17 was taken");
        read_registers(0, 1, r);
        modbus_set_slave(line, 6);
        CHECK(modbus_read_input_registers(line, 0, 1, r) == -1 && errno == ETIMEDOUT, "another unit was answered");
    }
    modbus_close(line);
    modbus_free(line);
    printf("PASS\n");
    return 0;
}
