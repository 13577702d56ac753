/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_ooo_cost.c - what segments behind a hole cost, for callgrind to count: bypass_poll() with one such segment
 * each time, its ACK included.
 *
 *   valgrind --tool=callgrind --collect-atstart=no tcp_ooo_cost PATTERN SEGMENTS
 *
 * PATTERN: burst (in sequence behind one hole), repair (every second segment is missing and is then filled in, in
 * order, while new ones come at the end), descending and random (every second segment only: a hostile sender).
 */
#include <valgrind/callgrind.h>

#include "peer.h"

enum { SIZE = 100, STEP_NS = 1000 };

static uint32_t our_seq;

static void carry(void)
{
    const uint8_t *h;
    uint32_t len;
    while ((h = carried(&len)))
        our_seq = get32(h + 4) + (h[13] & 2 ? 1 : 0);
}

static void open_connection(void)
{
    static const uint8_t opts[12] = {2, 4, 5, 180, 4, 2, 1, 1, 1, 3, 3, 7};
    bypass_sock listener = listen_with(BYPASS_SO_RCVBUF, 8 << 20);
    inject(2, 0, 0, opts, sizeof opts, 0);
    poll_after(STEP_NS);
    carry();
    inject(16, 1, our_seq, NULL, 0, 0);
    poll_after(STEP_NS);
    if (bypass_accept(&stack, listener) < 0)
        die("accept", -ECONNREFUSED);
}

static void segment(uint32_t number)
{
    inject(16, 1 + number * SIZE, our_seq, NULL, 0, SIZE);
    CALLGRIND_TOGGLE_COLLECT;
    poll_after(STEP_NS);
    CALLGRIND_TOGGLE_COLLECT;
    carry();
}

static void run(const char *pattern, uint32_t n)
{
    uint32_t at = 12345;
    if (strcmp(pattern, "burst") == 0) {
        for (uint32_t i = 0; i < n; i++)
            segment(1 + i);
    } else if (strcmp(pattern, "repair") == 0) { /* 200 holes; each repaired as a new one opens */
        for (uint32_t i = 0; i < 200; i++)
            segment(2 + 2 * i);
        for (uint32_t i = 0; i < n / 2; i++) {
            segment(402 + 2 * i);
            segment(3 + 2 * i);
        }
    } else if (strcmp(pattern, "descending") == 0) {
        for (uint32_t i = n; i > 0; i--)
            segment(2 * i);
    } else {
        for (uint32_t i = 0; i < n; i++) {
            at = at * 1664525 + 1013904223;
            segment(2 + 2 * (at >> 8) % n);
        }
    }
}

int main(int argc, char **argv)
{
    if (argc != 3 || atoi(argv[2]) < 1)
        die("usage: tcp_ooo_cost PATTERN SEGMENTS", -EINVAL);
    struct bypass_env env = {.random = repeatable};
    struct bypass_config cfg;
    bypass_config_default(&cfg, 64);
    cfg.max_chunks = 32768;
    size_t size = bypass_arena_size(&cfg);
    void *arena = aligned_alloc(64, size);
    if (!arena || memport_open(&port, 1) < 0)
        die("memory", -ENOMEM);
    memset(arena, 0, size);
    int err = bypass_create(&stack, arena, size, &cfg, &port.dev, &env, now_ns);
    if (err < 0)
        die("create", err);
    cfg.flags = 0;
    open_connection();
    run(argv[1], (uint32_t)atoi(argv[2]));
    struct bypass_audit audit;
    bypass_audit(&stack, &audit);
    printf("%u\n", audit.chunks); /* what is held: the segments were taken */
    bypass_destroy(&stack);
    free(arena);
    memport_close(&port);
    return 0;
}
