/* SPDX-License-Identifier: Apache-2.0 */
/*
 * idle.c - the memory of an idle established connection: opens connections between two stacks on a wire of memory
 * (memport.h) and counts the pages of the server's arena that came to life.
 *
 * idle CONNECTIONS: prints one JSON object. A program holds a handle for each; keepalive is on, so that each stands
 * in the timer wheel.
 */
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memport.h"

enum { BATCH = 64, BURST = 32, PORTS_EACH = 20000, FIRST_PORT = 1000 }; /* PORTS_EACH: a multiple of BURST */

struct host {
    struct memport port;
    struct bypass_stack stack;
    size_t size;
};

static uint64_t now_ns = 1000000000;

static int die(const char *what, int64_t err)
{
    fprintf(stderr, "idle: %s: %s\n", what, strerror((int)-err));
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

static struct bypass_endpoint endpoint(uint8_t last, uint32_t port)
{
    return (struct bypass_endpoint){.addr = {{[10] = 0xff, [11] = 0xff, 10, 0, 0, last}}, .port = (uint16_t)port};
}

static void host_open(struct host *h, uint8_t last, uint32_t conns)
{
    uint64_t seed = last;
    struct bypass_env env = {.random = repeatable, .ctx = &seed};
    struct bypass_config cfg;
    bypass_config_default(&cfg, conns);
    h->size = bypass_arena_size(&cfg);
    void *arena = mmap(NULL, h->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED || memport_open(&h->port, last) < 0)
        die("memory", -ENOMEM);
    (void)madvise(arena, h->size, MADV_NOHUGEPAGE); /* pages of 4 KiB are counted */
    int err = bypass_create(&h->stack, arena, h->size, &cfg, &h->port.dev, &env, now_ns);
    struct bypass_endpoint self = endpoint(last, 0);
    if (err == 0)
        err = bypass_addr_add(&h->stack, &self.addr, 24);
    if (err < 0)
        die("create", err);
}

static void settle(struct host *a, struct host *b)
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

static bypass_sock listen_on(struct host *server, uint32_t port)
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

/* So many a port that the client's ports suffice. */
static void open_connections(struct host *server, struct host *client, uint32_t conns)
{
    bypass_sock listener = -1;
    for (uint32_t i = 0; i < conns;) {
        uint32_t port = FIRST_PORT + i / PORTS_EACH;
        struct bypass_endpoint at = endpoint(1, port);
        if (i % PORTS_EACH == 0)
            listener = listen_on(server, port);
        for (uint32_t n = 0; n < BURST && i < conns; n++, i++) {
            int err = bypass_connect(&client->stack, bypass_socket(&client->stack, BYPASS_STREAM), &at);
            if (err != -EINPROGRESS)
                die("connect", err);
        }
        settle(server, client);
        bypass_sock k;
        while ((k = bypass_accept(&server->stack, listener)) >= 0)
            (void)bypass_setopt(&server->stack, k, BYPASS_SO_KEEPALIVE, 1);
        if (k != -EAGAIN)
            die("accept", k);
    }
    settle(server, client);
}

static uint64_t resident_bytes(const struct host *h)
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

int main(int argc, char **argv)
{
    static struct host server, client;
    uint32_t conns = argc > 1 ? (uint32_t)atoi(argv[1]) : 100000;
    struct bypass_audit in_use;
    if (conns < 1 || conns > 1000000)
        die("usage: idle CONNECTIONS", -EINVAL);
    host_open(&server, 1, conns);
    host_open(&client, 2, conns);
    open_connections(&server, &client, conns);
    bypass_audit(&server.stack, &in_use);
    printf("{\"conns\": %u, \"timers\": %u, \"resident_bytes\": %llu}\n", in_use.conns, in_use.timers,
           (unsigned long long)resident_bytes(&server));
    return in_use.conns == conns && in_use.timers == conns ? 0 : 1;
}
