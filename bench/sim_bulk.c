/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sim_bulk.c - one bulk transfer over the simulated wire, sender, wire and receiver on one core: how fast the stack
 * itself moves bytes (MSS 1448: 1500-byte packets with timestamps). The wire copies each frame, as veth does.
 *
 * sim_bulk MEGABYTES DELAY_US: prints one JSON object: bytes, CPU nanoseconds of the process during the transfer,
 * segments, virtual nanoseconds, mss.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "sim/sim.h"

enum { CHUNK = 65536 };

struct host {
    struct bypass_stack stack;
    struct bypass_netdev *dev;
    void *arena;
    bypass_sock sock;
};

static int die(const char *what, int64_t err)
{
    fprintf(stderr, "sim_bulk: %s: %s\n", what, strerror((int)-err));
    exit(1);
}

static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static struct bypass_endpoint endpoint(uint8_t last, uint16_t port)
{
    return (struct bypass_endpoint){.addr = {{[10] = 0xff, [11] = 0xff, 10, 0, 0, last}}, .port = port};
}

static void host_open(struct host *h, struct sim *sim, struct sim_wire *wire, uint8_t last, uint64_t delay_ns)
{
    struct sim_port_config port = {.mac = {2, 0, 0, 0, 0, last}};
    struct sim_faults faults = {.delay_ns = delay_ns};
    struct bypass_endpoint self = endpoint(last, 0);
    struct bypass_config cfg;
    struct bypass_env env;
    bypass_config_default(&cfg, 16);
    size_t size = bypass_arena_size(&cfg);
    h->dev = sim_port_create(wire, &port);
    h->arena = aligned_alloc(64, size);
    if (!h->dev || !h->arena || sim_env(sim, &env, last) < 0)
        die("memory", -ENOMEM);
    sim_port_faults(h->dev, &faults);
    memset(h->arena, 0, size);
    int err = bypass_create(&h->stack, h->arena, size, &cfg, h->dev, &env, sim_now(sim));
    if (err == 0)
        err = bypass_addr_add(&h->stack, &self.addr, 24);
    if (err == 0)
        err = sim_stack_add(sim, &h->stack, h->dev);
    if (err < 0)
        die("create", err);
}

static void step(struct sim *sim)
{
    struct sim_event ev[16];
    struct sim_result res;
    int err = sim_run(sim, UINT64_MAX, ev, 16, &res);
    if (err < 0)
        die("run", err);
    if (res.reason == SIM_IDLE)
        die("the transfer came to a stop", -ETIMEDOUT);
}

static void connect_both(struct sim *sim, struct host *server, struct host *client)
{
    struct bypass_endpoint at = endpoint(1, 80);
    bypass_sock listener = bypass_socket(&server->stack, BYPASS_STREAM);
    int err = bypass_bind(&server->stack, listener, &at);
    if (err == 0)
        err = bypass_listen(&server->stack, listener, 1);
    if (err < 0)
        die("listen", err);
    client->sock = bypass_socket(&client->stack, BYPASS_STREAM);
    err = bypass_connect(&client->stack, client->sock, &at);
    if (err != -EINPROGRESS)
        die("connect", err);
    while ((server->sock = bypass_accept(&server->stack, listener)) == -EAGAIN)
        step(sim);
    if (server->sock < 0)
        die("accept", server->sock);
}

/* Copies in and copies out are the program's, counted too. */
static void transfer(struct sim *sim, struct host *from, struct host *to, uint64_t total)
{
    static uint8_t out[CHUNK], in[CHUNK];
    uint64_t sent = 0, received = 0;
    for (size_t i = 0; i < sizeof out; i++)
        out[i] = (uint8_t)(i * 7 + (i >> 8));
    for (;;) {
        int64_t n;
        while (sent < total) {
            size_t off = sent % CHUNK, most = total - sent < CHUNK - off ? (size_t)(total - sent) : CHUNK - off;
            n = bypass_send(&from->stack, from->sock, out + off, most, 0);
            if (n == -EAGAIN)
                break;
            if (n < 0)
                die("send", n);
            sent += (uint64_t)n;
        }
        while ((n = bypass_recv(&to->stack, to->sock, in, sizeof in, 0)) > 0) {
            if (in[0] != out[received % CHUNK])
                die("received bytes differ", -EIO);
            received += (uint64_t)n;
        }
        if (n != -EAGAIN)
            die("recv", n == 0 ? -EPIPE : n);
        if (received == total)
            return;
        step(sim);
    }
}

int main(int argc, char **argv)
{
    uint64_t bytes = (argc > 1 ? (uint64_t)atoll(argv[1]) : 1000) * 1000000;
    uint64_t delay_ns = (argc > 2 ? (uint64_t)atoll(argv[2]) : 10) * 1000;
    struct host server = {0}, client = {0};
    struct bypass_tcp_info info;
    struct sim_port_stats wire_stats;
    struct sim *sim = sim_create(1, 1000000000);
    struct sim_wire *wire = sim ? sim_wire_create(sim, SIM_WIRE_SWITCH) : NULL;
    if (!wire)
        die("memory", -ENOMEM);
    host_open(&server, sim, wire, 1, delay_ns);
    host_open(&client, sim, wire, 2, delay_ns);
    connect_both(sim, &server, &client);
    uint64_t began_ns = sim_now(sim), cpu = cpu_ns();
    transfer(sim, &client, &server, bytes);
    cpu = cpu_ns() - cpu;
    (void)bypass_tcp_info(&client.stack, client.sock, &info);
    sim_port_stats(client.dev, &wire_stats);
    printf("{\"bytes\": %llu, \"cpu_ns\": %llu, \"virtual_ns\": %llu, \"mss\": %u, \"frames\": %llu, "
           "\"retransmits\": %u}\n",
           (unsigned long long)bytes, (unsigned long long)cpu, (unsigned long long)(sim_now(sim) - began_ns),
           info.snd_mss, (unsigned long long)wire_stats.tx_frames, info.retransmits);
    bypass_destroy(&client.stack);
    bypass_destroy(&server.stack);
    sim_destroy(sim);
    free(client.arena);
    free(server.arena);
    return 0;
}
