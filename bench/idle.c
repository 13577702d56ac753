/* SPDX-License-Identifier: Apache-2.0 */
/*
 * idle.c - the memory of an idle established connection: opens connections between two stacks on a wire of memory
 * (memhost.h) and counts the pages of the server's arena that came to life.
 *
 * idle CONNECTIONS: prints one JSON object. A program holds a handle for each; keepalive is on, so that each stands
 * in the timer wheel.
 */
#include "memhost.h"

static void opened(void *ctx, uint32_t i, bypass_sock at_server, bypass_sock at_client)
{
    struct host *server = ctx;
    (void)i, (void)at_client;
    (void)bypass_setopt(&server->stack, at_server, BYPASS_SO_KEEPALIVE, 1);
}

int main(int argc, char **argv)
{
    static struct host server, client;
    uint32_t conns = argc > 1 ? (uint32_t)atoi(argv[1]) : 100000;
    struct bypass_audit in_use;
    if (conns < 1 || conns > 1000000)
        die("usage: idle CONNECTIONS", -EINVAL);
    host_open(&server, 1, conns, false);
    host_open(&client, 2, conns, false);
    open_connections(&server, &client, conns, opened, &server);
    bypass_audit(&server.stack, &in_use);
    printf("{\"conns\": %u, \"timers\": %u, \"resident_bytes\": %llu}\n", in_use.conns, in_use.timers,
           (unsigned long long)resident_bytes(&server));
    return in_use.conns == conns && in_use.timers == conns ? 0 : 1;
}
