/* SPDX-License-Identifier: Apache-2.0 */
/*
 * simhost.h - two hosts on the simulated wire with one connection between them, for programs that move much data.
 */
#ifndef BENCH_SIMHOST_H
#define BENCH_SIMHOST_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "sim/sim.h"

struct host {
    struct bypass_stack stack;
    struct bypass_netdev *dev;
    void *arena;
    bypass_sock sock;
};

static inline int die(const char *what, int64_t err)
{
    fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror((int)-err));
    exit(1);
}

static inline uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static inline struct bypass_endpoint endpoint(uint8_t last, uint16_t port)
{
    return (struct bypass_endpoint){.addr = {{[10] = 0xff, [11] = 0xff, 10, 0, 0, last}}, .port = port};
}

static inline void host_open(struct host *h, struct sim *sim, struct sim_wire *wire, uint8_t last,
                             const struct sim_faults *faults)
{
    struct sim_port_config port = {.mac = {2, 0, 0, 0, 0, last}};
    struct bypass_endpoint self = endpoint(last, 0);
    struct bypass_config cfg;
    struct bypass_env env;
    bypass_config_default(&cfg, 16);
    size_t size = bypass_arena_size(&cfg);
    h->dev = sim_port_create(wire, &port);
    h->arena = aligned_alloc(64, size);
    if (!h->dev || !h->arena || sim_env(sim, &env, last) < 0)
        die("memory", -ENOMEM);
    sim_port_faults(h->dev, faults);
    memset(h->arena, 0, size);
    int err = bypass_create(&h->stack, h->arena, size, &cfg, h->dev, &env, sim_now(sim));
    if (err == 0)
        err = bypass_addr_add(&h->stack, &self.addr, 24);
    if (err == 0)
        err = sim_stack_add(sim, &h->stack, h->dev);
    if (err < 0)
        die("create", err);
}

static inline void step(struct sim *sim)
{
    struct sim_event ev[16];
    struct sim_result res;
    int err = sim_run(sim, UINT64_MAX, ev, 16, &res);
    if (err < 0)
        die("run", err);
    if (res.reason == SIM_IDLE)
        die("the transfer came to a stop", -ETIMEDOUT);
}

static inline void connect_both(struct sim *sim, struct host *server, struct host *client)
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

static inline void host_close(struct host *h)
{
    bypass_destroy(&h->stack);
    free(h->arena);
}

#endif
