/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hosts.h - two stacks on a wire of memory (memport.h), a clock that only the program moves, and how much of an arena
 * has come to life. For programs that count what many connections cost.
 */
#ifndef BENCH_HOSTS_H
#define BENCH_HOSTS_H

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memport.h"

enum { BATCH = 64 };

struct host {
    struct memport port;
    struct bypass_stack stack;
    size_t size;
};

static uint64_t now_ns = 1000000000;

static inline int die(const char *what, int64_t err)
{
    fprintf(stderr, "%s: %s\n", what, strerror((int)-err));
    exit(1);
}

/* The environment's random numbers, and whatever else is to be the same in each run. */
static inline uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return *state >> 20;
}

static inline int repeatable(void *ctx, void *buf, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)buf)[i] = (uint8_t)(next_random(ctx) >> 30);
    return 0;
}

static inline struct bypass_endpoint endpoint(uint8_t last, uint32_t port)
{
    return (struct bypass_endpoint){.addr = {{[10] = 0xff, [11] = 0xff, 10, 0, 0, last}}, .port = (uint16_t)port};
}

/* At 10.0.0.`last`/24. The arena's pages come to life one by one. */
static inline void host_open(struct host *h, uint8_t last, const struct bypass_config *cfg)
{
    uint64_t seed = last;
    struct bypass_env env = {.random = repeatable, .ctx = &seed};
    h->size = bypass_arena_size(cfg);
    void *arena = mmap(NULL, h->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED || memport_open(&h->port, last) < 0)
        die("memory", -ENOMEM);
    (void)madvise(arena, h->size, MADV_NOHUGEPAGE);
    int err = bypass_create(&h->stack, arena, h->size, cfg, &h->port.dev, &env, now_ns);
    struct bypass_endpoint self = endpoint(last, 0);
    if (err == 0)
        err = bypass_addr_add(&h->stack, &self.addr, 24);
    if (err < 0)
        die("create", err);
}

static inline void host_close(struct host *h)
{
    bypass_destroy(&h->stack);
    munmap(h->stack.arena, h->size);
    memport_close(&h->port);
}

static inline bypass_sock listen_on(struct host *h, uint8_t last, uint32_t port, int backlog)
{
    struct bypass_endpoint at = endpoint(last, port);
    bypass_sock listener = bypass_socket(&h->stack, BYPASS_STREAM);
    int err = bypass_bind(&h->stack, listener, &at);
    if (err == 0)
        err = bypass_listen(&h->stack, listener, backlog);
    if (err < 0)
        die("listen", err);
    return listener;
}

/* One exchange of all that is under way, at this instant. Frames that were carried. */
static inline int exchange(struct host *a, struct host *b)
{
    (void)bypass_poll(&a->stack, now_ns, MEMPORT_FRAMES);
    (void)bypass_poll(&b->stack, now_ns, MEMPORT_FRAMES);
    int to_b = memport_carry(&a->port, &b->port), to_a = memport_carry(&b->port, &a->port);
    if (to_a < 0 || to_b < 0)
        die("frames", -ENOBUFS);
    return to_a + to_b;
}

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

static inline uint64_t stat_of(const struct bypass_stack *s, const char *name)
{
    for (int i = 0; i < bypass_stat_count(); i++)
        if (strcmp(bypass_stat_name(i), name) == 0)
            return bypass_stats(s)[i];
    return (uint64_t)die(name, -ENOENT);
}

#endif
