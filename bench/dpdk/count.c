/* SPDX-License-Identifier: Apache-2.0 */
/*
 * count.c - callgrind_rr.c with DPDK below: what a request and response of 64 bytes costs a server of which the stack is
 * on a DPDK port, the driver included, for callgrind to count.
 *
 * Both ends are in this process, say of a memif. The client's turns are not counted.
 *
 * Run under: valgrind --tool=callgrind --collect-atstart=no count OPERATIONS CONNECTIONS SERVER_DEVICE CLIENT_DEVICE
 */
#include "dpdk_port.h"
#include "rr_counted.h"

enum { FRAMES = 4096 };

static void turns(struct host *x, struct host *y)
{
    for (int i = 0; i < 8; i++) {
        now_ns += 1000;
        (void)bypass_poll(&x->stack, now_ns, BATCH);
        (void)bypass_poll(&y->stack, now_ns, BATCH);
        forget_events(x);
        forget_events(y);
    }
}

static void open_all(struct host *server, struct host *client, int conns)
{
    bypass_sock listener = listen_on(server, FIRST_PORT, BATCH);

    for (int i = 0; i < conns; i++) {
        socks.client[i] = connect_to(client, FIRST_PORT);
        turns(client, server);
        socks.server[i] = bypass_accept(&server->stack, listener);
        if (socks.server[i] < 0)
            die("accept", socks.server[i]);
    }
}

int main(int argc, char **argv)
{
    static struct host server, client;
    int ops = argc == 5 ? atoi(argv[1]) : 0, conns = argc == 5 ? atoi(argv[2]) : 0, done = 0;
    uint8_t request[SIZE];
    if (ops < 1 || conns < 1 || conns > BATCH) {
        fprintf(stderr, "usage: count OPERATIONS CONNECTIONS (at most 64) SERVER_DEVICE CLIENT_DEVICE\n");
        return 2;
    }
    memset(request, 7, sizeof request);
    struct dpdk_end at_server = port_open(argv[3], FRAMES), at_client = port_open(argv[4], FRAMES);
    while (at_server.plugin->health(at_server.port) || at_client.plugin->health(at_client.port))
        usleep(1000); /* memif's ends find each other in a thread of DPDK's */
    host_create(&server, at_server.dev, 1, MAX_CONNS, false);
    host_create(&client, at_client.dev, 2, MAX_CONNS, false);
    open_all(&server, &client, conns);
    while (done < ops) {
        now_ns += 50000; /* 20,000 round trips a second on each connection */
        ask(&client, conns, request);
        done += serve(&server);
        take_answers(&client, conns, request);
        forget_events(&client);
    }
    printf("%d\n", done);
    bypass_destroy(&server.stack);
    bypass_destroy(&client.stack);
    port_close(&at_server);
    port_close(&at_client);
    return 0;
}
