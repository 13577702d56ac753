/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memhost.h - two hosts on a wire of memory (memport.h), for the programs that measure the stack alone: creation,
 * a clock that only moves when told, connections from one to the other, and how much memory has come to life.
 */
#ifndef BENCH_MEMHOST_H
#define BENCH_MEMHOST_H

#include <stdbool.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

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

/* The same in each run. */
static inline uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return *state >> 20;
}

static inline int repeatable(void *ctx, void *buf, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)buf)[i] = (uint8_t)(next_random(ctx) >> 36);
    return 0;
}

/* ---- Hosts ---------------------------------------------------------------------------------------------- */
static inline struct bypass_endpoint endpoint(uint8_t last, uint32_t port)
{
    return (struct bypass_endpoint){.addr = {{[10] = 0xff, [11] = 0xff, 10, 0, 0, last}}, .port = (uint16_t)port};
}

/* A stack on any device. Its address is 10.0.0.`last`. Pages of the arena are of 4 KiB, so that those in use can be
 * counted; huge: not. */
static inline void host_create(struct host *h, struct bypass_netdev *dev, uint8_t last, uint32_t conns, bool huge)
{
    uint64_t seed = last;
    struct bypass_env env = {.random = repeatable, .ctx = &seed};
    struct bypass_config cfg;
    bypass_config_default(&cfg, conns);
    h->size = bypass_arena_size(&cfg);
    void *arena = mmap(NULL, h->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED)
        die("memory", -ENOMEM);
    (void)madvise(arena, h->size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    int err = bypass_create(&h->stack, arena, h->size, &cfg, dev, &env, now_ns);
    struct bypass_endpoint self = endpoint(last, 0);
    if (err == 0)
        err = bypass_addr_add(&h->stack, &self.addr, 24);
    if (err < 0)
        die("create", err);
}

/* On a port of memory. */
static inline void host_open(struct host *h, uint8_t last, uint32_t conns, bool huge)
{
    if (memport_open(&h->port, last) < 0)
        die("memory", -ENOMEM);
    host_create(h, &h->port.dev, last, conns, huge);
}

static inline void host_close(struct host *h)
{
    bypass_destroy(&h->stack);
    munmap(h->stack.arena, h->size);
    memport_close(&h->port);
}

/* Of the arena; its pages come to life as they are touched. */
static inline uint64_t resident_bytes(const struct host *h)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (h->size + page - 1) / page;
    unsigned char *in_core = malloc(pages);
    uint64_t n = 0;
    if (!in_core || mincore(h->stack.arena, h->size, in_core) < 0)
        die("mincore", -errno);
    for (size_t i = 0; i < pages; i++)
        n += in_core[i] & 1;
    free(in_core);
    return n * page;
}

/* Of this process, with the frames and everything else. */
static inline uint64_t process_bytes(void)
{
    unsigned long long all = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (!f || fscanf(f, "%llu %llu", &all, &resident) != 2)
        die("/proc/self/statm", -EIO);
    fclose(f);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

static inline uint64_t stat_of(const struct bypass_stack *s, const char *name)
{
    for (int i = 0; i < bypass_stat_count(); i++)
        if (strcmp(bypass_stat_name(i), name) == 0)
            return bypass_stats(s)[i];
    return (uint64_t)die(name, -ENOENT);
}

/* ---- The wire ---------------------------------------------------------------------------------------------- */
/* All that is under way at this instant goes one step further. Frames that were carried. */
static inline int exchange(struct host *a, struct host *b)
{
    (void)bypass_poll(&a->stack, now_ns, MEMPORT_FRAMES);
    (void)bypass_poll(&b->stack, now_ns, MEMPORT_FRAMES);
    int to_b = memport_carry(&a->port, &b->port), to_a = memport_carry(&b->port, &a->port);
    if (to_a < 0 || to_b < 0)
        die("frames", -ENOBUFS);
    return to_a + to_b;
}

static inline void forget_events(struct host *h)
{
    struct bypass_event ev[BATCH];
    while (bypass_events(&h->stack, ev, BATCH) > 0) {}
}

/* Everything that is under way arrives; events are thrown away. */
static inline void settle(struct host *a, struct host *b)
{
    for (int quiet = 0; quiet < 2;) {
        now_ns += 1000;
        quiet = exchange(a, b) > 0 ? 0 : quiet + 1;
        forget_events(a);
        forget_events(b);
    }
}

/* ---- Connections ------------------------------------------------------------------------------------------- */
/* The server is 10.0.0.1. */
static inline bypass_sock listen_on(struct host *server, uint32_t port, int backlog)
{
    struct bypass_endpoint at = endpoint(1, port);
    bypass_sock listener = bypass_socket(&server->stack, BYPASS_STREAM);
    int err = bypass_bind(&server->stack, listener, &at);
    if (err == 0)
        err = bypass_listen(&server->stack, listener, backlog);
    if (err < 0)
        die("listen", err);
    return listener;
}

static inline bypass_sock connect_to(struct host *client, uint32_t port)
{
    struct bypass_endpoint at = endpoint(1, port);
    bypass_sock k = bypass_socket(&client->stack, BYPASS_STREAM);
    int err = bypass_connect(&client->stack, k, &at);
    if (err != -EINPROGRESS)
        die("connect", err);
    return k;
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
        if (i % PORTS_EACH == 0)
            listener = listen_on(server, port, BATCH);
        for (; n < BURST - i % BURST && i + n < conns; n++)
            ours[n] = connect_to(client, port);
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
