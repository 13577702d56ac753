/* SPDX-License-Identifier: Apache-2.0 */
/*
 * many.c - the rate of one server over many connections: 64-byte requests on connections drawn at random, in batches
 * of 64, answered by a server that holds them all in one process; the client acknowledges the answers before the next
 * batch, for with many connections the next request on the same one is far. What grows with their number is memory
 * that is not in the cache: a connection's state, its place in the flow table, its handle.
 *
 * many CONNECTIONS REQUESTS: prints one JSON object: requests, CPU nanoseconds of the server's half alone (bypass_poll
 * to bypass_flush). The client's half is not counted, but shares the cache.
 */
#include <time.h>

#include "memhost.h"

enum { SIZE = 64, MOST = 1000000 };

static bypass_sock *clients;

static void opened(void *ctx, uint32_t i, bypass_sock at_server, bypass_sock at_client)
{
    (void)ctx, (void)at_server;
    clients[i] = at_client;
}

static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* BATCH different connections: steps through all of them, a fixed odd distance apart, from a random start. */
static void draw(uint32_t conns, bypass_sock *out)
{
    static uint64_t state = 1;
    (void)repeatable(&state, &(uint8_t){0}, 1);
    uint32_t at = (uint32_t)((state >> 33) % conns), step = conns > BATCH ? conns / BATCH : 1;
    for (uint32_t i = 0; i < BATCH; i++)
        out[i] = clients[(at + i * step) % conns];
}

static int serve(struct host *server)
{
    struct bypass_event ev[BATCH];
    uint8_t buf[SIZE];
    int done = 0, n;
    (void)bypass_poll(&server->stack, now_ns, 4 * BATCH);
    while ((n = bypass_events(&server->stack, ev, BATCH)) > 0)
        for (int i = 0; i < n; i++) {
            int64_t got = bypass_recv(&server->stack, ev[i].sock, buf, sizeof buf, 0);
            done += got > 0 && bypass_send(&server->stack, ev[i].sock, buf, (size_t)got, 0) == got;
        }
    (void)bypass_flush(&server->stack);
    return done;
}

static void ask(struct host *client, const bypass_sock *socks)
{
    static const uint8_t request[SIZE];
    for (int i = 0; i < BATCH; i++)
        if (bypass_send(&client->stack, socks[i], request, SIZE, 0) != SIZE)
            die("request", -EIO);
    (void)bypass_flush(&client->stack);
}

static void take_answers(struct host *client, const bypass_sock *socks)
{
    struct bypass_event ev[BATCH];
    uint8_t buf[SIZE];
    (void)bypass_poll(&client->stack, now_ns, 2 * BATCH);
    for (int i = 0; i < BATCH; i++)
        if (bypass_recv(&client->stack, socks[i], buf, SIZE, 0) != SIZE)
            die("response", -EIO);
    while (bypass_events(&client->stack, ev, BATCH) > 0) {}
    now_ns += 45000000; /* delayed ACKs are due */
    (void)bypass_poll(&client->stack, now_ns, 2 * BATCH);
}

static uint64_t count(struct host *server, int expected)
{
    uint64_t began = cpu_ns();
    int n = serve(server);
    began = cpu_ns() - began;
    if (n != expected)
        die("the server missed requests", -EIO);
    return began;
}

int main(int argc, char **argv)
{
    static struct host server, client;
    uint32_t conns = argc > 1 ? (uint32_t)atoi(argv[1]) : 100, requests = argc > 2 ? (uint32_t)atoi(argv[2]) : 1000000;
    uint64_t busy_ns = 0;
    uint32_t done = 0;
    if (conns < BATCH || conns > MOST)
        die("usage: many CONNECTIONS REQUESTS (64 to 1,000,000 connections)", -EINVAL);
    clients = calloc(conns, sizeof *clients);
    host_open(&server, 1, conns, true);
    host_open(&client, 2, conns, true);
    open_connections(&server, &client, conns, opened, NULL);
    while (done < requests) {
        bypass_sock socks[BATCH];
        draw(conns, socks);
        now_ns += 50000;
        ask(&client, socks);
        (void)memport_carry(&client.port, &server.port);
        busy_ns += count(&server, BATCH);
        (void)memport_carry(&server.port, &client.port);
        take_answers(&client, socks);
        (void)memport_carry(&client.port, &server.port);
        busy_ns += count(&server, 0); /* acknowledgments only */
        done += BATCH;
    }
    printf("{\"conns\": %u, \"requests\": %u, \"server_cpu_ns\": %llu}\n", conns, done, (unsigned long long)busy_ns);
    return 0;
}
