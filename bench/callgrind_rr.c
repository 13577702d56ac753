/* SPDX-License-Identifier: Apache-2.0 */
/*
 * callgrind_rr.c - what one request and response of 64 bytes costs the server's stack, for callgrind to count.
 *
 * Two stacks in one process on a wire of memory (memhost.h). The client's stack makes valid requests outside of
 * what is counted. Counted is all that a server does: bypass_poll() with the request frames waiting,
 * bypass_events(), bypass_recv(), bypass_send(), bypass_flush() with the response frames handed to the device.
 * Timestamps and window scaling are on (both stacks offer them), checksums are made and verified in software.
 * Nothing depends on clocks or addresses, so the count repeats exactly.
 *
 * Run under: valgrind --tool=callgrind --collect-atstart=no callgrind_rr OPERATIONS CONNECTIONS
 * With several connections each poll finds a request of each of them.
 */
#include <valgrind/callgrind.h>

#include "memhost.h"

enum { SIZE = 64, MAX_CONNS = 256 };

static struct sockets {
    bypass_sock server[MAX_CONNS], client[MAX_CONNS];
} socks;

static void opened(void *ctx, uint32_t i, bypass_sock at_server, bypass_sock at_client)
{
    (void)ctx;
    socks.server[i] = at_server;
    socks.client[i] = at_client;
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
        int64_t n = bypass_send(&client->stack, socks.client[i], request, SIZE, 0);
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
        int64_t n = bypass_recv(&client->stack, socks.client[i], buf, sizeof buf, 0);
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
    host_open(&server, 1, MAX_CONNS, false);
    host_open(&client, 2, MAX_CONNS, false);
    open_connections(&server, &client, (uint32_t)conns, opened, NULL);
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
    host_close(&client);
    host_close(&server);
    return 0;
}
