/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ask.c - a client on a DPDK port, in one process: the stack as 10.0.0.2, against 10.0.0.1.
 *
 *   ask udp|tcp|up|down DEVICE PEER_MAC PARALLEL WARMUP_MS MEASURE_MS PIDS
 *
 * tcp: PARALLEL connections, a request of 64 bytes in flight on each. udp: one socket, PARALLEL datagrams of 64 bytes in
 * flight. up, down: PARALLEL connections, as much as goes to the peer or from it. Spins. Prints one JSON object (measure.h).
 */
#include <errno.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "dpdk_port.h"
#include "measure.h"
#include "ports.h"

enum { FRAMES = 16384, SIZE = 64, MAX_PARALLEL = 1024, EVENTS = 64, BUDGET = 256, OPEN_NS = 2000000000 };

struct flow {
    bypass_sock sock;
    uint64_t sent_ns;
};

static struct asker {
    struct bypass_stack stack;
    struct flow flow[MAX_PARALLEL];
    int parallel, open, conns; /* conns: sockets */
    bool tcp, up, down, measuring;
    bool timed; /* one request in flight on each socket */
    uint64_t ops, bytes;
    struct histogram h;
} a;

static void die(const char *what, int64_t err)
{
    fprintf(stderr, "ask: %s: %s\n", what, strerror((int)-err));
    exit(1);
}

static int fill_random(void *ctx, void *buf, size_t n)
{
    (void)ctx;
    return getrandom(buf, n, 0) == (ssize_t)n ? 0 : -EIO;
}

static void send_one(struct flow *f)
{
    static const uint8_t request[SIZE] = {1};
    int64_t n = bypass_send(&a.stack, f->sock, request, SIZE, 0);

    if (n != SIZE)
        die("send", n < 0 ? n : -EIO);
    f->sent_ns = clock_ns();
}

static void answered(struct flow *f)
{
    uint8_t buf[SIZE];
    int64_t n;

    while ((n = bypass_recv(&a.stack, f->sock, buf, SIZE, 0)) == SIZE) {
        if (a.measuring) {
            a.ops++;
            a.bytes += SIZE;
            if (a.timed)
                histogram_add(&a.h, clock_ns() - f->sent_ns);
        }
        send_one(f);
    }
    if (n != -EAGAIN)
        die("recv", n < 0 ? n : -ECONNRESET);
}

/* As many bytes as go now. */
static void stream(struct flow *f)
{
    static uint8_t buf[1 << 16];
    int64_t n;

    while ((n = a.up ? bypass_send(&a.stack, f->sock, buf, sizeof buf, 0)
                     : bypass_recv(&a.stack, f->sock, buf, sizeof buf, 0)) > 0)
        a.bytes += a.measuring ? (uint64_t)n : 0;
    if (n != -EAGAIN)
        die("stream", n < 0 ? n : -ECONNRESET);
}

static void heard(struct flow *f, uint32_t mask)
{
    bool first = !f->sent_ns && (mask & BYPASS_OUT);

    a.open += first;
    if (first)
        f->sent_ns = clock_ns();
    if ((a.up || a.down) && f->sent_ns)
        stream(f);
    else if (first)
        send_one(f);
    else if (f->sent_ns)
        answered(f);
}

static void turn(void)
{
    struct bypass_event ev[EVENTS];
    int n = bypass_poll(&a.stack, clock_ns(), BUDGET);

    if (n < 0 && n != -EAGAIN && n != -ENETDOWN)
        die("poll", n);
    while ((n = bypass_events(&a.stack, ev, EVENTS)) > 0) {
        for (int i = 0; i < n; i++) {
            struct flow *f = &a.flow[ev[i].user];

            if (ev[i].mask & BYPASS_ERR)
                die("socket", bypass_error(&a.stack, f->sock));
            heard(f, ev[i].mask);
        }
    }
    (void)bypass_flush(&a.stack);
}

static void open_sockets(void)
{
    const struct bypass_endpoint peer = {.addr.b = {[10] = 0xff, [11] = 0xff, 10, 0, 0, 1},
                                         .port = a.up     ? PORT_DISCARD
                                                 : a.down ? PORT_CHARGEN
                                                          : PORT_ECHO};
    uint64_t give_up = clock_ns() + OPEN_NS;

    a.conns = a.tcp ? a.parallel : 1;
    for (int i = 0; i < a.conns; i++) {
        bypass_sock k = bypass_socket(&a.stack, a.tcp ? BYPASS_STREAM : BYPASS_DGRAM);
        int err = k < 0 ? (int)k : bypass_set_user(&a.stack, k, (uint64_t)i);

        a.flow[i].sock = k;
        if (err == 0)
            err = bypass_connect(&a.stack, k, &peer);
        if (err < 0 && err != -EINPROGRESS)
            die("connect", err);
        if (a.tcp)
            (void)bypass_setopt(&a.stack, k, BYPASS_TCP_NODELAY, 1);
    }
    for (int i = 0; !a.tcp && i < a.parallel; i++)
        send_one(&a.flow[0]);
    while (a.tcp && a.open < a.conns) {
        turn();
        if (clock_ns() > give_up)
            die("connections", -ETIMEDOUT);
    }
}

static void create(struct bypass_netdev *dev, const char *peer_mac)
{
    struct bypass_env env = {.random = fill_random};
    struct bypass_addr self = {{[10] = 0xff, [11] = 0xff, 10, 0, 0, 2}},
                       peer = {{[10] = 0xff, [11] = 0xff, 10, 0, 0, 1}};
    struct bypass_config cfg;
    uint8_t mac[6];

    bypass_config_default(&cfg, 2 * MAX_PARALLEL);
    cfg.flags = BYPASS_F_RST;
    size_t size = bypass_arena_size(&cfg);
    void *arena = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED)
        die("memory", -ENOMEM);
    int err = bypass_create(&a.stack, arena, size, &cfg, dev, &env, clock_ns());
    if (err == 0)
        err = bypass_addr_add(&a.stack, &self, 24);
    if (sscanf(peer_mac, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", mac, mac + 1, mac + 2, mac + 3, mac + 4, mac + 5) != 6)
        err = -EINVAL;
    if (err == 0)
        err = bypass_nexthop_set(&a.stack, &peer, mac, dev->mtu);
    if (err < 0)
        die("stack", err);
}

static void run_until(uint64_t end_ns)
{
    while (clock_ns() < end_ns)
        turn();
}

int main(int argc, char **argv)
{
    if (argc != 8 || (a.parallel = atoi(argv[4])) < 1 || a.parallel > MAX_PARALLEL) {
        fprintf(stderr, "usage: ask udp|tcp|up|down DEVICE PEER_MAC PARALLEL WARMUP_MS MEASURE_MS PIDS\n");
        return 2;
    }
    a.up = strcmp(argv[1], "up") == 0;
    a.down = strcmp(argv[1], "down") == 0;
    a.tcp = strcmp(argv[1], "udp") != 0;
    a.timed = !a.up && !a.down && (a.tcp || a.parallel == 1);
    struct dpdk_end end = port_open(argv[2], FRAMES);

    create(end.dev, argv[3]);
    while (end.plugin->health(end.port) != 0) {} /* the other end has to come */
    open_sockets();
    run_until(clock_ns() + (uint64_t)atoi(argv[5]) * 1000000);
    a.measuring = true;
    struct cpu_sample from = cpu_sample(argv[7]);
    uint64_t begin = clock_ns();
    run_until(begin + (uint64_t)atoi(argv[6]) * 1000000);
    uint64_t ns = clock_ns() - begin;
    struct cpu_sample to = cpu_sample(argv[7]);
    print_result("", a.ops, a.bytes, ns, &from, &to, a.timed ? &a.h : NULL);
    bypass_destroy(&a.stack);
    port_close(&end);
    return 0;
}
