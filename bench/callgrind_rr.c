/* SPDX-License-Identifier: Apache-2.0 */
/*
 * callgrind_rr.c - what one request and response of 64 bytes costs the server's stack, for callgrind to count.
 *
 * Two stacks in one process on a wire of memory (memport.h). The client's stack makes valid requests outside of
 * what is counted. Counted is all that a server does: bypass_poll() with the request frames waiting,
 * bypass_events(), bypass_recv(), bypass_send(), bypass_flush() with the response frames handed to the device.
 * Timestamps and window scaling are on (both stacks offer them), checksums are made and verified in software.
 * Nothing depends on clocks or addresses, so the count repeats exactly.
 *
 * Run under: valgrind --tool=callgrind --collect-atstart=no callgrind_rr OPERATIONS CONNECTIONS
 * With several connections each poll finds a request of each of them.
 */
#include <stdio.h>

#include <valgrind/callgrind.h>

#include "memport.h"

enum { SIZE = 64, MAX_CONNS = 256, BATCH = 64 };

struct host {
    struct memport port;
    struct bypass_stack stack;
    bypass_sock socks[MAX_CONNS];
};

static uint64_t now_ns = 1000000000;

static int die(const char *what, int64_t err)
{
    fprintf(stderr, "callgrind_rr: %s: %s\n", what, strerror((int)-err));
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

static struct bypass_endpoint endpoint(uint8_t last, uint16_t port)
{
    return (struct bypass_endpoint){.addr = {{[10] = 0xff, [11] = 0xff, 10, 0, 0, last}}, .port = port};
}

static void host_open(struct host *h, uint8_t last)
{
    uint64_t seed = last;
    struct bypass_env env = {.random = repeatable, .ctx = &seed};
    struct bypass_config cfg;
    bypass_config_default(&cfg, MAX_CONNS);
    size_t size = bypass_arena_size(&cfg);
    void *arena = aligned_alloc(64, size);
    if (!arena || memport_open(&h->port, last) < 0)
        die("memory", -ENOMEM);
    memset(arena, 0, size);
    int err = bypass_create(&h->stack, arena, size, &cfg, &h->port.dev, &env, now_ns);
    struct bypass_endpoint self = endpoint(last, 0);
    if (err == 0)
        err = bypass_addr_add(&h->stack, &self.addr, 24);
    if (err < 0)
        die("create", err);
}

/* Everything that is under way arrives. */
static void settle(struct host *a, struct host *b)
{
    struct bypass_event ev[BATCH];
    for (int quiet = 0; quiet < 2;) {
        now_ns += 10000;
        (void)bypass_poll(&a->stack, now_ns, BATCH);
        (void)bypass_poll(&b->stack, now_ns, BATCH);
        while (bypass_events(&b->stack, ev, BATCH) > 0) {}
        quiet = memport_carry(&a->port, &b->port) + memport_carry(&b->port, &a->port) > 0 ? 0 : quiet + 1;
    }
}

static void open_connections(struct host *server, struct host *client, int conns)
{
    struct bypass_endpoint at = endpoint(1, 7);
    bypass_sock listener = bypass_socket(&server->stack, BYPASS_STREAM);
    int err = bypass_bind(&server->stack, listener, &at);
    if (err == 0)
        err = bypass_listen(&server->stack, listener, MAX_CONNS);
    if (err < 0)
        die("listen", err);
    for (int i = 0; i < conns; i++) {
        client->socks[i] = bypass_socket(&client->stack, BYPASS_STREAM);
        err = bypass_connect(&client->stack, client->socks[i], &at);
        if (err != -EINPROGRESS)
            die("connect", err);
        settle(server, client);
        server->socks[i] = bypass_accept(&server->stack, listener);
        if (server->socks[i] < 0)
            die("accept", server->socks[i]);
        (void)bypass_set_user(&server->stack, server->socks[i], (uint64_t)i);
    }
    settle(client, server);
}

/* The measured part. Number of requests answered. */
static int serve(struct host *server)
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

static void ask(struct host *client, int conns, const uint8_t *request)
{
    for (int i = 0; i < conns; i++) {
        int64_t n = bypass_send(&client->stack, client->socks[i], request, SIZE, 0);
        if (n != SIZE)
            die("request", n < 0 ? n : -EIO);
    }
    (void)bypass_flush(&client->stack);
}

static void take_answers(struct host *client, int conns, const uint8_t *request)
{
    uint8_t buf[SIZE];
    (void)bypass_poll(&client->stack, now_ns, 2 * MAX_CONNS);
    for (int i = 0; i < conns; i++) {
        int64_t n = bypass_recv(&client->stack, client->socks[i], buf, sizeof buf, 0);
        if (n != SIZE || memcmp(buf, request, SIZE) != 0)
            die("response", n < 0 ? n : -EIO);
    }
}

int main(int argc, char **argv)
{
    static struct host server, client;
    int ops = argc > 1 ? atoi(argv[1]) : 10000, conns = argc > 2 ? atoi(argv[2]) : 1;
    uint8_t request[SIZE];
    if (ops < 1 || conns < 1 || conns > BATCH)
        die("usage: callgrind_rr OPERATIONS CONNECTIONS (at most 64)", -EINVAL);
    for (int i = 0; i < SIZE; i++)
        request[i] = (uint8_t)(i * 7);
    host_open(&server, 1);
    host_open(&client, 2);
    open_connections(&server, &client, conns);
    int done = 0;
    while (done < ops) {
        now_ns += 50000; /* 20,000 round trips a second on each connection */
        ask(&client, conns, request);
        (void)memport_carry(&client.port, &server.port);
        done += serve(&server);
        (void)memport_carry(&server.port, &client.port);
        take_answers(&client, conns, request);
    }
    printf("%d\n", done);
    bypass_destroy(&client.stack);
    bypass_destroy(&server.stack);
    free(client.stack.arena);
    free(server.stack.arena);
    memport_close(&client.port);
    memport_close(&server.port);
    return 0;
}
