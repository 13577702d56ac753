/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memhost.h - two hosts on a wire of memory (memport.h), for the programs that measure the stack alone: creation,
 * a clock that only moves when told, and connections from one to the other.
 */
#ifndef BENCH_MEMHOST_H
#define BENCH_MEMHOST_H

#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>

#include "memport.h"

enum { BATCH = 64, BURST = 32, PORTS_EACH = 20000, FIRST_PORT = 1000 }; /* PORTS_EACH: a multiple of BURST */

struct host {
    struct memport port;
    struct bypass_stack stack;
    size_t size; /* of the arena */
};

static uint64_t now_ns = 1000000000;

static inline int die(const char *what, int64_t err)
{
    fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror((int)-err));
    exit(1);
}

static int repeatable(void *ctx, void *buf, size_t n)
{
    uint64_t *state = ctx;
    for (size_t i = 0; i < n; i++) {
        *state = *state * 6364136223846793005ull + 1442695040888963407ull;
        ((uint8_t *)buf)[i] = (uint8_t)(*state >> 56);
    }
    return 0;
}

static inline struct bypass_endpoint endpoint(uint8_t last, uint32_t port)
{
    return (struct bypass_endpoint){.addr = {{[10] = 0xff, [11] = 0xff, 10, 0, 0, last}}, .port = (uint16_t)port};
}

/* Its address is 10.0.0.`last`. Pages of the arena are of 4 KiB, so that those in use can be counted; huge: not. */
static inline void host_open(struct host *h, uint8_t last, uint32_t conns, bool huge)
{
    uint64_t seed = last;
    struct bypass_env env = {.random = repeatable, .ctx = &seed};
    struct bypass_config cfg;
    bypass_config_default(&cfg, conns);
    h->size = bypass_arena_size(&cfg);
    void *arena = mmap(NULL, h->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED || memport_open(&h->port, last) < 0)
        die("memory", -ENOMEM);
    (void)madvise(arena, h->size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    int err = bypass_create(&h->stack, arena, h->size, &cfg, &h->port.dev, &env, now_ns);
    struct bypass_endpoint self = endpoint(last, 0);
    if (err == 0)
        err = bypass_addr_add(&h->stack, &self.addr, 24);
    if (err < 0)
        die("create", err);
}

/* Everything that is under way arrives; events are thrown away. */
static inline void settle(struct host *a, struct host *b)
{
    struct bypass_event ev[BATCH];
    for (int quiet = 0; quiet < 2;) {
        now_ns += 1000;
        (void)bypass_poll(&a->stack, now_ns, BATCH);
        (void)bypass_poll(&b->stack, now_ns, BATCH);
        while (bypass_events(&a->stack, ev, BATCH) > 0 || bypass_events(&b->stack, ev, BATCH) > 0) {}
        quiet = memport_carry(&a->port, &b->port) + memport_carry(&b->port, &a->port) > 0 ? 0 : quiet + 1;
    }
}

static inline bypass_sock listen_on(struct host *server, uint32_t port)
{
    struct bypass_endpoint at = endpoint(1, port);
    bypass_sock listener = bypass_socket(&server->stack, BYPASS_STREAM);
    int err = bypass_bind(&server->stack, listener, &at);
    if (err == 0)
        err = bypass_listen(&server->stack, listener, BATCH);
    if (err < 0)
        die("listen", err);
    return listener;
}

/* So many a listening port that the client's ports suffice. opened(ctx, i, server's socket, client's socket) is called
 * for each, in order. */
static inline void open_connections(struct host *server, struct host *client, uint32_t conns,
                                    void (*opened)(void *ctx, uint32_t i, bypass_sock at_server, bypass_sock at_client),
                                    void *ctx)
{
    bypass_sock listener = -1, ours[BURST];
    for (uint32_t i = 0; i < conns;) {
        uint32_t port = FIRST_PORT + i / PORTS_EACH, n = 0;
        struct bypass_endpoint at = endpoint(1, port);
        if (i % PORTS_EACH == 0)
            listener = listen_on(server, port);
        uint32_t most = i == 0 ? 1 : BURST - i % BURST; /* the first learns the way */
        for (; n < most && i + n < conns; n++) {
            ours[n] = bypass_socket(&client->stack, BYPASS_STREAM);
            int err = bypass_connect(&client->stack, ours[n], &at);
            if (err != -EINPROGRESS)
                die("connect", err);
        }
        settle(server, client);
        for (uint32_t k = 0; k < n; k++, i++) { /* in the order of their SYNs */
            bypass_sock theirs = bypass_accept(&server->stack, listener);
            if (theirs < 0)
                die("accept", theirs);
            opened(ctx, i, theirs, ours[k]);
        }
    }
    settle(server, client);
}

#endif
