/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ours.c - this stack as a host, driven by the loop of main.c. Its device is a port of the simulator, joined by a
 * perfect wire to a raw port through which frames come and go; the simulator's clock follows the loop's.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "goodput.h"
#include "sim/sim.h"

enum { CONNS = 1024, FRAMES = 1 << 16, EVENTS = 64 };

struct ours_host {
    struct host host;
    struct sim *sim;
    struct bypass_netdev *port, *raw;
    struct bypass_stack stack;
    bool touched;
};

static struct ours_host *self(struct host *h) { return (struct ours_host *)h; }

static struct bypass_endpoint endpoint(int number, uint16_t port)
{
    uint32_t ip = host_ip(number);
    return (struct bypass_endpoint){
        .addr = {{[10] = 0xff, [11] = 0xff, (uint8_t)(ip >> 24), (uint8_t)(ip >> 16), (uint8_t)(ip >> 8), (uint8_t)ip}},
        .port = port};
}

/* ---- Frames ------------------------------------------------------------------------------------------------- */
static void take_frames(struct host *h)
{
    uint8_t frame[FRAME_MAX + 512];
    uint64_t t;
    int64_t n;
    while ((n = sim_port_recv(self(h)->raw, frame, sizeof frame, &t)) >= 0)
        host_out(h, frame, (uint32_t)n);
}

static void ours_run(struct host *h)
{
    struct ours_host *o = self(h);
    struct sim_event ev[EVENTS];
    struct sim_result res;
    do {
        o->touched = false;
        int err = sim_run(o->sim, h->bench->now_ns, ev, EVENTS, &res);
        if (err < 0)
            die("this stack", err);
        take_frames(h);
        for (uint32_t i = 0; i < res.events; i++)
            flow_event(h->bench, ev[i].user);
    } while (o->touched || (res.reason != SIM_TIME && res.reason != SIM_IDLE));
}

/* The simulator's clock first goes to where the loop's is: the frame arrives now, not when it last ran. */
static void ours_deliver(struct host *h, const uint8_t *frame, uint32_t len)
{
    if (sim_now(self(h)->sim) < h->bench->now_ns)
        ours_run(h);
    int err = sim_port_send(self(h)->raw, frame, len);
    if (err < 0)
        die("a frame for this stack", err);
    self(h)->touched = true;
}

static uint64_t ours_next_ns(const struct host *h)
{
    const struct ours_host *o = (const struct ours_host *)h;
    return o->touched ? 0 : sim_next(o->sim);
}

/* ---- Sockets ------------------------------------------------------------------------------------------------ */
static int64_t ours_listen(struct host *h, uint16_t port, uint64_t tag)
{
    struct bypass_stack *s = &self(h)->stack;
    struct bypass_endpoint at = endpoint(h->number, port);
    bypass_sock k = bypass_socket(s, BYPASS_STREAM);
    int err = bypass_bind(s, k, &at);
    if (err == 0)
        err = bypass_set_user(s, k, tag);
    if (err == 0)
        err = bypass_listen(s, k, 16);
    return err < 0 ? err : k;
}

static int64_t ours_connect(struct host *h, int to, uint16_t port, const char *cc, uint64_t tag)
{
    struct ours_host *o = self(h);
    struct bypass_endpoint at = endpoint(to, port);
    if (sim_now(o->sim) < h->bench->now_ns)
        ours_run(h);
    bypass_sock k = bypass_socket(&o->stack, BYPASS_STREAM);
    o->touched = true;
    if (k < 0)
        return k;
    int err = strcmp(cc, "default") == 0 ? 0 : bypass_cc_set(&o->stack, k, cc);
    if (err == 0)
        err = bypass_set_user(&o->stack, k, tag);
    if (err == 0)
        err = bypass_connect(&o->stack, k, &at);
    return err < 0 && err != -EINPROGRESS ? err : k;
}

static int64_t ours_accept(struct host *h, int64_t listener, uint64_t tag)
{
    struct ours_host *o = self(h);
    bypass_sock k = bypass_accept(&o->stack, listener);
    if (k >= 0)
        (void)bypass_set_user(&o->stack, k, tag);
    return k;
}

static int64_t ours_send(struct host *h, int64_t sock, const void *buf, size_t n)
{
    self(h)->touched = true;
    return bypass_send(&self(h)->stack, sock, buf, n, 0);
}

static int64_t ours_recv(struct host *h, int64_t sock, void *buf, size_t n)
{
    self(h)->touched = true;
    return bypass_recv(&self(h)->stack, sock, buf, n, 0);
}

static void ours_close(struct host *h, int64_t sock)
{
    self(h)->touched = true;
    (void)bypass_close(&self(h)->stack, sock);
}

static void ours_info(struct host *h, int64_t sock, struct tcp_info *out)
{
    struct bypass_tcp_info i;
    if (bypass_tcp_info(&self(h)->stack, sock, &i) < 0)
        memset(&i, 0, sizeof i);
    (void)bypass_tcp_info_linux(&i, out, sizeof *out);
}

static void ours_end(struct host *h)
{
    struct sim_port_stats p;
    sim_port_stats(self(h)->port, &p);
    if (p.misuse || p.no_frame || p.in_flight_dropped)
        die("the device of this stack dropped or misused frames", 0);
}

/* ---- Creation ----------------------------------------------------------------------------------------------- */
static void stack_open(struct ours_host *o, struct bypass_env *env)
{
    struct bypass_config cfg;
    bypass_config_default(&cfg, CONNS);
    cfg.flags = BYPASS_F_RST;
    size_t size = bypass_arena_size(&cfg);
    void *arena = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED)
        die("memory", -ENOMEM);
    struct bypass_endpoint at = endpoint(o->host.number, 0);
    int err = bypass_create(&o->stack, arena, size, &cfg, o->port, env, o->host.bench->now_ns);
    if (err == 0)
        err = bypass_addr_add(&o->stack, &at.addr, 24);
    for (int other = 1; err == 0 && other < HOSTS; other++) {
        uint8_t mac[6];
        at = endpoint(other, 0);
        host_mac(other, mac);
        if (other != o->host.number)
            err = bypass_nexthop_set(&o->stack, &at.addr, mac, MTU);
    }
    if (err == 0)
        err = sim_stack_add(o->sim, &o->stack, o->port);
    if (err < 0)
        die("this stack", err);
}

struct host *ours_create(struct bench *b, int number)
{
    static const struct host_ops ops = {
        .deliver = ours_deliver,
        .run = ours_run,
        .next_ns = ours_next_ns,
        .listen = ours_listen,
        .connect = ours_connect,
        .accept = ours_accept,
        .send = ours_send,
        .recv = ours_recv,
        .close = ours_close,
        .info = ours_info,
        .end = ours_end,
    };
    struct sim_port_config port = {.frames = FRAMES, .mtu = MTU}, raw = {.flags = SIM_PORT_RAW, .mtu = MTU};
    struct bypass_env env;
    struct ours_host *o = calloc(1, sizeof *o);
    if (!o)
        die("memory", -ENOMEM);
    o->host = (struct host){.ops = &ops, .bench = b, .number = number};
    host_mac(number, port.mac);
    o->sim = sim_create(b->seed * HOSTS + (uint64_t)number, b->now_ns);
    struct sim_wire *wire = o->sim ? sim_wire_create(o->sim, 0) : NULL;
    o->port = wire ? sim_port_create(wire, &port) : NULL;
    o->raw = o->port ? sim_port_create(wire, &raw) : NULL;
    if (!o->raw || sim_env(o->sim, &env, 0) < 0)
        die("memory", -ENOMEM);
    stack_open(o, &env);
    return &o->host;
}
