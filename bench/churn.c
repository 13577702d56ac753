/* SPDX-License-Identifier: Apache-2.0 */
/*
 * churn.c - connections that are opened, used and closed one after another: does anything grow, and how many a second?
 *
 * churn CONNECTIONS: a client connects by a port of its stack's choice, sends 64 bytes, gets them back, and closes first,
 * so that its end goes through TIME_WAIT; the server's end is closed as the FIN comes. The way takes 20 us of virtual
 * time in each direction, so ports come round before a minute is over. Prints one JSON object; `memory`: resident bytes of
 * both arenas and of the process, connections, and what else is in use, after a tenth, a half and all of them.
 */
#include <time.h>

#include "memhost.h"

enum { SIZE = 64, PORT = 7, WAY_NS = 20000, MOST = 40000 };

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
    bypass_sock k = connect_to(&client, PORT), end;
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
    forget_events(&server);
    forget_events(&client);
}

static void report_memory(uint32_t done, uint32_t total)
{
    struct bypass_audit at_server, at_client;
    bypass_audit(&server.stack, &at_server);
    bypass_audit(&client.stack, &at_client);
    printf("%s{\"conns\": %u, \"server\": %llu, \"client\": %llu, \"process\": %llu, \"open\": %u, \"time_wait\": %u, "
           "\"chunks\": %u, \"frames\": %u}",
           done == total / 10 ? "" : ", ", done, (unsigned long long)resident_bytes(&server),
           (unsigned long long)resident_bytes(&client), (unsigned long long)process_bytes(), at_server.conns,
           at_client.conns, at_server.chunks + at_client.chunks,
           server.port.dev.frames - server.port.dev.free_frames + client.port.dev.frames - client.port.dev.free_frames);
}

int main(int argc, char **argv)
{
    uint32_t total = argc == 2 ? (uint32_t)atoi(argv[1]) : 0;
    if (total < 10 || total > 100000000)
        die("usage: churn CONNECTIONS (at least 10)", -EINVAL);
    host_open(&server, 1, MOST, false);
    host_open(&client, 2, MOST, false);
    bypass_sock listener = listen_on(&server, PORT, 128);
    printf("{\"memory\": [");
    double began = cpu_s();
    for (uint32_t i = 1; i <= total; i++) {
        one(listener, i);
        if (i == total / 10 || i == total / 2 || i == total)
            report_memory(i, total);
    }
    printf("], \"conns\": %u, \"cpu_s\": %.3f, \"virtual_s\": %.3f, \"taken_over\": %llu}\n", total, cpu_s() - began,
           (double)now_ns / 1e9 - 1, (unsigned long long)stat_of(&client.stack, "tcp_time_wait_reused"));
    host_close(&client);
    host_close(&server);
    return 0;
}
