/* SPDX-License-Identifier: Apache-2.0 */
/*
 * churn.c - connections that are opened, used and closed one after another: does anything grow, and how many a second?
 *
 * churn CONNECTIONS: a client connects by a port of its stack's choice, sends 64 bytes, gets them back, and closes first,
 * so that its end goes through TIME_WAIT; the server's end is closed as the FIN comes. The way takes 20 us of virtual
 * time in each direction, so ports come round before a minute is over. Prints one JSON object.
 */
#include <time.h>

#include "hosts.h"

enum { SIZE = 64, PORT = 7, WAY_NS = 20000 };

static struct host server, client;

static double cpu_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void pass(void)
{
    now_ns += WAY_NS;
    (void)exchange(&server, &client);
}

/* Events are taken as they come; each socket is asked itself. */
static void forget_events(void)
{
    struct bypass_event ev[BATCH];
    while (bypass_events(&server.stack, ev, BATCH) > 0) {}
    while (bypass_events(&client.stack, ev, BATCH) > 0) {}
}

static void echo(bypass_sock k, bypass_sock end, uint32_t number)
{
    uint8_t request[SIZE], buf[SIZE];
    for (int i = 0; i < SIZE; i++)
        request[i] = (uint8_t)(number >> (i & 3) * 8);
    if (bypass_send(&client.stack, k, request, SIZE, 0) != SIZE)
        die("send", -EIO);
    pass();
    pass();
    int64_t n = bypass_recv(&server.stack, end, buf, SIZE, 0);
    if (n != SIZE || bypass_send(&server.stack, end, buf, SIZE, 0) != SIZE)
        die("request", n < 0 ? n : -EIO);
    pass();
    pass();
    n = bypass_recv(&client.stack, k, buf, SIZE, 0);
    if (n != SIZE || memcmp(request, buf, SIZE) != 0)
        die("answer", n < 0 ? n : -EIO);
}

static void one(bypass_sock listener, uint32_t number)
{
    struct bypass_endpoint at = endpoint(1, PORT);
    bypass_sock k = bypass_socket(&client.stack, BYPASS_STREAM), end;
    int err = bypass_connect(&client.stack, k, &at);
    if (err != -EINPROGRESS)
        die("connect", err);
    for (int i = 0; (end = bypass_accept(&server.stack, listener)) == -EAGAIN && i < 1000; i++)
        pass();
    if (end < 0)
        die("accept", end);
    echo(k, end, number);
    if (bypass_close(&client.stack, k) < 0)
        die("close", -EIO);
    pass();
    pass();
    if (bypass_recv(&server.stack, end, &number, 1, 0) != 0)
        die("end of stream", -EIO);
    if (bypass_close(&server.stack, end) < 0)
        die("close", -EIO);
    pass();
    pass();
    forget_events();
}

int main(int argc, char **argv)
{
    uint32_t total = argc == 2 ? (uint32_t)atoi(argv[1]) : 0;
    struct bypass_audit in_use;
    struct bypass_config cfg;
    if (total < 10 || total > 100000000)
        die("usage: churn CONNECTIONS (at least 10)", -EINVAL);
    bypass_config_default(&cfg, 40000);
    host_open(&server, 1, &cfg);
    host_open(&client, 2, &cfg);
    bypass_sock listener = listen_on(&server, 1, PORT, 128);
    uint64_t early[2] = {0}, late[2];
    double began = cpu_s();
    for (uint32_t i = 0; i < total; i++) {
        one(listener, i);
        if (i + 1 == total / 2) { /* by then TIME_WAIT holds as many as there are ports */
            early[0] = resident_bytes(&server);
            early[1] = resident_bytes(&client);
        }
    }
    double took = cpu_s() - began;
    late[0] = resident_bytes(&server);
    late[1] = resident_bytes(&client);
    bypass_audit(&client.stack, &in_use);
    printf("{\"conns\": %u, \"cpu_s\": %.3f, \"virtual_s\": %.3f, \"time_wait\": %u, \"taken_over\": %llu, "
           "\"resident_early\": [%llu, %llu], \"resident\": [%llu, %llu]}\n",
           total, took, (double)now_ns / 1e9 - 1, in_use.conns,
           (unsigned long long)stat_of(&client.stack, "tcp_time_wait_reused"), (unsigned long long)early[0],
           (unsigned long long)early[1], (unsigned long long)late[0], (unsigned long long)late[1]);
    host_close(&client);
    host_close(&server);
    return 0;
}
