/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rr_counted.h - the requests and responses whose server callgrind counts (callgrind_rr.c, dpdk/count.c), on any device.
 *
 * Counted is all that a server does: bypass_poll() with the request frames waiting, bypass_events(), bypass_recv(),
 * bypass_send(), bypass_flush() with the response frames handed to the device.
 */
#ifndef BENCH_RR_COUNTED_H
#define BENCH_RR_COUNTED_H

#include <valgrind/callgrind.h>

#include "memhost.h"

enum { SIZE = 64, MAX_CONNS = 256 };

static struct sockets {
    bypass_sock server[MAX_CONNS], client[MAX_CONNS];
} socks;

/* The measured part. Number of requests answered. */
static inline int serve(struct host *server)
{
    struct bypass_event ev[BATCH];
    uint8_t buf[SIZE];
    int done = 0, n;
    CALLGRIND_TOGGLE_COLLECT;
    (void)bypass_poll(&server->stack, now_ns, BATCH);
    while ((n = bypass_events(&server->stack, ev, BATCH)) > 0) {
        for (int i = 0; i < n; i++) {
            int64_t got = bypass_recv(&server->stack, ev[i].sock, buf, sizeof buf, 0);
            if (got > 0 && bypass_send(&server->stack, ev[i].sock, buf, (size_t)got, 0) == got)
                done++;
        }
    }
    (void)bypass_flush(&server->stack);
    CALLGRIND_TOGGLE_COLLECT;
    return done;
}

static inline void ask(struct host *client, int conns, const uint8_t *request)
{
    for (int i = 0; i < conns; i++) {
        int64_t n = bypass_send(&client->stack, socks.client[i], request, SIZE, 0);
        if (n != SIZE)
            die("request", n < 0 ? n : -EIO);
    }
    (void)bypass_flush(&client->stack);
}

static inline void take_answers(struct host *client, int conns, const uint8_t *request)
{
    uint8_t buf[SIZE];
    (void)bypass_poll(&client->stack, now_ns, 2 * MAX_CONNS);
    for (int i = 0; i < conns; i++) {
        int64_t n = bypass_recv(&client->stack, socks.client[i], buf, sizeof buf, 0);
        if (n != SIZE || memcmp(buf, request, SIZE) != 0)
            die("response", n < 0 ? n : -EIO);
    }
}

#endif
