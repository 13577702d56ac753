/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two threads on the two ends of a ring (bypass/afxdp/ring.h), from shortly before the indices wrap: every
 * descriptor arrives once, in order and whole. One end behaves as the device does, the other as the kernel; the
 * second ring brings the numbers back, so that both roles of ring.h run on both threads.
 * Prints how many went around. Exit code 1: a descriptor was torn, lost or repeated.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "afxdp/ring.h"

enum { SIZE = 64, BATCH = 17 };

static struct {
    uint32_t producer __attribute__((aligned(64)));
    uint32_t consumer __attribute__((aligned(64)));
    uint32_t flags __attribute__((aligned(64)));
    union {
        struct xdp_desc desc[SIZE];
        uint64_t addr[SIZE];
    } entries __attribute__((aligned(64)));
} shared[2];

static struct ring rings[2];
static struct ring_pos near_wrap = {0xffffff00u, 0xffffff00u};
static uint32_t total;

static struct xdp_desc made(uint32_t i)
{
    return (struct xdp_desc){.addr = i * 0x100000001ull, .len = ~i, .options = i};
}

static void bad(const char *what, uint32_t i)
{
    fprintf(stderr, "%s at %u\n", what, i);
    exit(1);
}

static uint32_t send_some(struct ring_pos *pos, uint32_t next)
{
    uint32_t want = total - next < BATCH ? total - next : BATCH;
    uint32_t n = ring_space(&rings[0], pos, want);

    n = n < want ? n : want;
    for (uint32_t i = 0; i < n; i++) {
        *ring_desc(&rings[0], pos->prod + i) = made(next + i);
    }
    if (n) {
        ring_produce(&rings[0], pos, n);
    }
    return n;
}

static uint32_t take_back(struct ring_pos *pos, uint32_t next)
{
    uint32_t n = ring_avail(&rings[1], pos, BATCH);

    for (uint32_t i = 0; i < n; i++) {
        if (*ring_addr(&rings[1], pos->cons + i) != (next + i) * 0x100000001ull) {
            bad("address torn, lost or repeated", next + i);
        }
    }
    if (n) {
        ring_release(&rings[1], pos, n);
    }
    return n;
}

static void *device(void *arg)
{
    struct ring_pos out = near_wrap, in = near_wrap;
    uint32_t sent = 0, back = 0;

    while (back < total) {
        uint32_t moved = send_some(&out, sent), got = take_back(&in, back);

        sent += moved;
        back += got;
        if (!moved && !got) {
            sched_yield();
        }
    }
    return arg;
}

static void *kernel(void *arg)
{
    struct ring_pos in = near_wrap, out = near_wrap;

    for (uint32_t next = 0; next < total;) {
        uint32_t n = ring_avail(&rings[0], &in, BATCH);
        uint32_t room = ring_space(&rings[1], &out, n);

        n = n < room ? n : room;
        for (uint32_t i = 0; i < n; i++) {
            struct xdp_desc got = *ring_desc(&rings[0], in.cons + i), want = made(next + i);

            if (memcmp(&got, &want, sizeof got) != 0) {
                bad("descriptor torn, lost or repeated", next + i);
            }
            *ring_addr(&rings[1], out.prod + i) = got.addr;
        }
        if (n) {
            ring_release(&rings[0], &in, n);
            ring_produce(&rings[1], &out, n);
        } else {
            sched_yield();
        }
        next += n;
    }
    return arg;
}

int main(int argc, char **argv)
{
    pthread_t threads[2];

    total = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 1000000;
    for (int i = 0; i < 2; i++) {
        shared[i].producer = shared[i].consumer = near_wrap.prod;
        rings[i] = (struct ring){.producer = &shared[i].producer,
                                 .consumer = &shared[i].consumer,
                                 .flags = &shared[i].flags,
                                 .entries = &shared[i].entries,
                                 .size = SIZE,
                                 .mask = SIZE - 1};
    }
    pthread_create(&threads[0], NULL, device, NULL);
    pthread_create(&threads[1], NULL, kernel, NULL);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    printf("%u\n", total);
    return 0;
}
