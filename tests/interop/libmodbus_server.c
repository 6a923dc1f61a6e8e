/* A PLC on libmodbus that cull polls as master, unit 5: libmodbus_server PORT clean|noisy. */
#include <errno.h>
#include <modbus.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PARTS 20
#define CHECK(condition, ...) do { if (!(condition)) { fprintf(stderr, __VA_ARGS__); fprintf(stderr, " (%s)\n", modbus_strerror(errno)); exit(1); } } while (0)

static int expected(int part) { return part % 7 == 0 ? 5 : part % 3 == 0 ? 2 : 1; }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }

int main(int argc, char **argv) {
    CHECK(argc == 3, "usage: libmodbus_server PORT clean|noisy");
    printf("libmodbus %s as slave, %s line\n", LIBMODBUS_VERSION_STRING, argv[2]);
    modbus_t *line = modbus_new_rtu(argv[1], 115200, 'E', 8, 1);
    CHECK(line && !modbus_set_slave(line, 5) && !modbus_connect(line), "cannot open %s", argv[1]);
    modbus_set_indication_timeout(line, 1, 0);
    modbus_mapping_t *plc = modbus_mapping_new(8, 0, 32, 0);
    CHECK(plc, "no memory");
    uint8_t query[MODBUS_RTU_MAX_ADU_LENGTH];
    int part = 0, ok = 0, missed = 0, lost = 0, done = 0, noisy = !strcmp(argv[2], "noisy");
    double start = now(), end = 0;
    while (!done || now() < end) {
        int length = modbus_receive(line, query);
        if (length > 0) modbus_reply(line, query, length, plc);
        else if (length < 0) modbus_flush(line); /* a damaged request: the master repeats it */
        uint16_t *h = plc->tab_registers;
        uint8_t *c = plc->tab_bits;
        CHECK(!(c[0] && c[1]), "OK and NG");
        CHECK(!c[0] || h[18] == 1, "OK beside registers with result %d", h[18]);
        CHECK(now() - start < 60, "stuck at part %d", part);
        if (done) continue;
        if (part == 0) {
            if (!(h[23] == 1 && c[2] && !c[3])) continue; /* until READY */
        } else {
            int decided = h[17] == part && (c[0] || c[1]);
            /* The line may be gone for longer than the deadline: then a PLC rejects by itself, and goes on with the next part. */
            int given_up = noisy && !decided && now() - start > 4;
            if (!decided && !given_up) continue;
            lost += given_up;
            CHECK(given_up || (h[18] == expected(part) && c[0] == (expected(part) == 1)), "part %d is %d", part, h[18]);
            ok += decided && c[0];
            missed += decided && h[18] == 5;
        }
        if (part == PARTS) {
            h[5] = 17, h[6] = 2; /* recipe, mode: stop */
            done = 1, end = now() + 2;
            continue;
        }
        part++;
        start = now();
        h[0] = 0, h[1] = part, h[2] = part;
    }
    CHECK(lost <= PARTS / 2, "%d of %d parts without a result", lost, PARTS);
    printf("%d parts: %d OK, %d NG of which %d missed and %d undecided on this line\n", PARTS, ok, PARTS - ok, missed, lost);
    modbus_mapping_free(plc);
    modbus_close(line);
    modbus_free(line);
    printf("PASS\n");
    return 0;
}
