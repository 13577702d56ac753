/* SPDX-License-Identifier: Apache-2.0 */
/*
 * server_bypass.c - the benchmark's server on the bypass stack: echo (UDP and TCP), discard, chargen, in one event
 * loop over the public API, as a program in C would use it. A shared library: Python opens device and steering and
 * calls server_run(), which comes back when *stop is set.
 */
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>

#include "ports.h"
#include "server_bypass.h"

enum { BULK = 262144, EVENTS = 64, BUDGET = 256, SLEEP_MAX_MS = 50 };
enum kind { UDP_ECHO = 1, LISTEN_ECHO, LISTEN_DISCARD, LISTEN_CHARGEN, ECHO, DISCARD, CHARGEN };

struct server {
    struct bypass_stack stack;
    void *arena;
    size_t arena_size;
    bypass_sock listeners[CHARGEN]; /* by kind */
    uint8_t buf[BULK];
};

static uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static int fill_random(void *ctx, void *buf, size_t n)
{
    (void)ctx;
    return getrandom(buf, n, 0) == (ssize_t)n ? 0 : -EIO;
}

/* ---- Services -------------------------------------------------------------------------------------------- */
static void take_connections(struct server *v, enum kind kind)
{
    bypass_sock k;
    while ((k = bypass_accept(&v->stack, v->listeners[kind])) >= 0) {
        (void)bypass_set_user(&v->stack, k, (uint64_t)(kind + (ECHO - LISTEN_ECHO)));
        (void)bypass_setopt(&v->stack, k, BYPASS_TCP_NODELAY, 1);
    }
}

static void udp_echo(struct server *v, bypass_sock k)
{
    struct bypass_endpoint from;
    int64_t n;
    while ((n = bypass_recvfrom(&v->stack, k, v->buf, sizeof v->buf, 0, &from)) >= 0)
        (void)bypass_sendto(&v->stack, k, v->buf, (size_t)n, 0, &from);
}

/* Events are edges: what is there has to be taken until -EAGAIN. */
static void serve(struct server *v, bypass_sock k, enum kind kind)
{
    int64_t n;
    do {
        n = kind == CHARGEN ? 1 : bypass_recv(&v->stack, k, v->buf, kind == ECHO ? 4096 : sizeof v->buf, 0);
        if (n > 0 && kind != DISCARD)
            n = bypass_send(&v->stack, k, v->buf, kind == ECHO ? (size_t)n : sizeof v->buf, 0);
        /* an answer of 64 bytes that was read means that less than a buffer was there: no second look is needed */
    } while (n > 0 && (kind != ECHO || n == 4096));
    if (n == 0 || (n < 0 && n != -EAGAIN))
        (void)bypass_close(&v->stack, k);
}

static void dispatch(struct server *v)
{
    struct bypass_event ev[EVENTS];
    int n;
    while ((n = bypass_events(&v->stack, ev, EVENTS)) > 0) {
        for (int i = 0; i < n; i++) {
            enum kind kind = (enum kind)ev[i].user;
            if (kind == UDP_ECHO)
                udp_echo(v, ev[i].sock);
            else if (kind >= LISTEN_ECHO && kind <= LISTEN_CHARGEN)
                take_connections(v, kind);
            else if (kind >= ECHO && kind <= CHARGEN)
                serve(v, ev[i].sock, kind);
        }
    }
}

/* ---- The loop ---------------------------------------------------------------------------------------------- */
static void sleep_until(struct server *v, struct bypass_netdev *dev, uint64_t now)
{
    uint64_t deadline = bypass_deadline(&v->stack);
    struct pollfd p = {.fd = dev->ops->wait_fd(dev), .events = POLLIN};
    uint64_t ns = deadline > now ? deadline - now : 0;
    if (ns > SLEEP_MAX_MS * 1000000ull)
        ns = SLEEP_MAX_MS * 1000000ull;
    struct timespec t = {.tv_nsec = (long)ns};
    if (ns > 0 && !(dev->ops->sleep && dev->ops->sleep(dev) > 0))
        (void)ppoll(&p, 1, &t, NULL);
}

static int loop(struct server *v, struct bypass_netdev *dev, const struct server_args *args, volatile uint32_t *stop)
{
    uint64_t busy_until = 0;
    while (!*stop) {
        uint64_t now = clock_ns();
        int got = bypass_poll(&v->stack, now, BUDGET);
        if (got < 0 && got != -EAGAIN && got != -ENETDOWN)
            return got;
        dispatch(v);
        int err = bypass_flush(&v->stack);
        if (err < 0 && err != -EAGAIN && err != -ENETDOWN)
            return err;
        if (got > 0)
            busy_until = now + args->spin_us * 1000ull;
        else if (!(args->flags & SERVER_SPIN) && now >= busy_until)
            sleep_until(v, dev, now);
    }
    return 0;
}

/* ---- Set-up ------------------------------------------------------------------------------------------------ */
static int open_port(struct server *v, const struct bypass_addr *addr, int type, uint16_t port, enum kind kind)
{
    struct bypass_endpoint at = {.addr = *addr, .port = port};
    bypass_sock k = bypass_socket(&v->stack, type);
    if (k < 0)
        return (int)k;
    int err = bypass_bind(&v->stack, k, &at);
    if (err == 0 && type == BYPASS_STREAM)
        err = bypass_listen(&v->stack, k, 1024);
    (void)bypass_set_user(&v->stack, k, (uint64_t)kind);
    v->listeners[kind] = k;
    return err;
}

static int open_stack(struct server *v, struct bypass_netdev *dev, const struct server_args *args)
{
    struct bypass_env env = {.random = fill_random};
    struct bypass_config cfg;
    bypass_config_default(&cfg, 4096);
    cfg.flags = BYPASS_F_RST;
    v->arena_size = bypass_arena_size(&cfg);
    v->arena = mmap(NULL, v->arena_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (v->arena == MAP_FAILED)
        return -ENOMEM;
    int err = bypass_create(&v->stack, v->arena, v->arena_size, &cfg, dev, &env, clock_ns());
    if (err == 0)
        err = bypass_addr_add(&v->stack, &args->local, 24);
    if (err == 0)
        err = bypass_nexthop_set(&v->stack, &args->peer, args->peer_mac, dev->mtu);
    if (err == 0)
        err = open_port(v, &args->local, BYPASS_DGRAM, PORT_ECHO, UDP_ECHO);
    if (err == 0)
        err = open_port(v, &args->local, BYPASS_STREAM, PORT_ECHO, LISTEN_ECHO);
    if (err == 0)
        err = open_port(v, &args->local, BYPASS_STREAM, PORT_DISCARD, LISTEN_DISCARD);
    if (err == 0)
        err = open_port(v, &args->local, BYPASS_STREAM, PORT_CHARGEN, LISTEN_CHARGEN);
    return err;
}

__attribute__((visibility("default"))) int server_run(struct bypass_netdev *dev, const struct server_args *args,
                                                      volatile uint32_t *stop, uint64_t *stats)
{
    struct server *v = calloc(1, sizeof *v);
    if (!v)
        return -ENOMEM;
    int err = open_stack(v, dev, args);
    if (err == 0) {
        err = loop(v, dev, args, stop);
        memcpy(stats, bypass_stats(&v->stack), (size_t)bypass_stat_count() * sizeof *stats);
        bypass_destroy(&v->stack);
    }
    if (v->arena && v->arena != MAP_FAILED)
        munmap(v->arena, v->arena_size);
    free(v);
    return err;
}
