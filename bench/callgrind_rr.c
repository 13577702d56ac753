/* SPDX-License-Identifier: Apache-2.0 */
/*
 * callgrind_rr.c - what one request and response of 64 bytes costs the server's stack, for callgrind to count.
 *
 * Two stacks in one process on a wire of memory (memhost.h). The client's stack makes valid requests outside of what is
 * counted (rr_counted.h). Timestamps and window scaling are on (both stacks offer them), checksums are made and verified
 * in software. Nothing depends on clocks or addresses, so the count repeats exactly.
 *
 * Run under: valgrind --tool=callgrind --collect-atstart=no callgrind_rr OPERATIONS CONNECTIONS
 * With several connections each poll finds a request of each of them.
 */
#include "rr_counted.h"

static void opened(void *ctx, uint32_t i, bypass_sock at_server, bypass_sock at_client)
{
    (void)ctx;
    socks.server[i] = at_server;
    socks.client[i] = at_client;
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
