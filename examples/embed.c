/* SPDX-License-Identifier: Apache-2.0 */
/*
 * embed.c - the stack inside a program of your own, with no other part of bypass: a network device made
 * of ordinary memory, a clock that is a variable, and two stacks that talk to each other.
 *
 *   make build
 *   cc -Ibypass/include examples/embed.c -Lbuild -lbypass -Wl,-rpath,build -o embed && ./embed
 *
 * What you supply: an arena for each stack, a `struct bypass_netdev` whose operations move frames, a
 * source of unpredictable bytes, and the time. What you call: bypass_poll() whenever frames arrived or
 * bypass_deadline() has come, and the socket calls.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "bypass.h"

enum { FRAMES = 256, STRIDE = 2048, HEADROOM = 128 };

/* ---- A network device: a cable between two of them --------------------------------------------------- */
struct cable_end {
    struct bypass_netdev dev; /* first: the stack hands this pointer back to us */
    struct cable_end *other;
    uint8_t mem[FRAMES * STRIDE];
    struct bypass_pkt_meta meta[FRAMES];
    bypass_pkt free_list[FRAMES];
    bypass_pkt arrived[FRAMES];
    int arrived_count;
};

static struct cable_end *end_of(struct bypass_netdev *dev) { return (struct cable_end *)dev; }

static int cable_alloc(struct bypass_netdev *dev, bypass_pkt *out, int n)
{
    struct cable_end *e = end_of(dev);
    int got = 0;
    while (got < n && dev->free_frames > 0) {
        bypass_pkt p = e->free_list[--dev->free_frames];
        e->meta[p] = (struct bypass_pkt_meta){.off = HEADROOM, .holders = BYPASS_HOLD_STACK};
        out[got++] = p;
    }
    return got;
}

static void cable_free(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct cable_end *e = end_of(dev);
    for (int i = 0; i < n; i++) {
        e->meta[pkts[i]].holders &= (uint8_t)~BYPASS_HOLD_STACK;
        e->free_list[dev->free_frames++] = pkts[i];
    }
}

static int cable_rx(struct bypass_netdev *dev, bypass_pkt *out, int max)
{
    struct cable_end *e = end_of(dev);
    int n = e->arrived_count < max ? e->arrived_count : max;
    for (int i = 0; i < n; i++) {
        out[i] = e->arrived[i];
        e->meta[out[i]].holders = BYPASS_HOLD_STACK;
    }
    e->arrived_count -= n;
    memmove(e->arrived, e->arrived + n, (size_t)e->arrived_count * sizeof *out);
    return n;
}

/* The frame is copied to the other end at once, so this device never holds one: nothing to reap. A real
 * device would set BYPASS_HOLD_DEV here and clear it in its reap(). */
static int cable_tx(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct cable_end *to = end_of(dev)->other;
    for (int i = 0; i < n; i++) {
        const struct bypass_pkt_meta *m = &end_of(dev)->meta[pkts[i]];
        bypass_pkt p;
        if (cable_alloc(&to->dev, &p, 1) == 0)
            continue; /* the other end is full: the frame is lost, as on any wire; TCP sends it again */
        to->meta[p].len = m->len;
        to->meta[p].holders = BYPASS_HOLD_RX;
        memcpy(to->mem + p * STRIDE + HEADROOM, dev->mem + pkts[i] * STRIDE + m->off, m->len);
        to->arrived[to->arrived_count++] = p;
    }
    return n;
}

static int cable_reap(struct bypass_netdev *dev, bypass_pkt *done, int max)
{
    (void)dev, (void)done, (void)max;
    return 0;
}

static int cable_kick(struct bypass_netdev *dev)
{
    (void)dev;
    return 0;
}

static int cable_wait_fd(struct bypass_netdev *dev)
{
    (void)dev;
    return -ENOTSUP;
}

static const struct bypass_netdev_ops cable_ops = {cable_alloc, cable_free, cable_rx,      cable_tx,
                                                   cable_reap,  cable_kick, cable_wait_fd, NULL};

static void cable_init(struct cable_end *e, struct cable_end *other, uint8_t last_mac_byte)
{
    memset(e, 0, sizeof *e);
    e->other = other;
    e->dev = (struct bypass_netdev){
        .ops = &cable_ops,
        .mem = e->mem,
        .meta = e->meta,
        .stride = STRIDE,
        .meta_stride = sizeof e->meta[0],
        .frames = FRAMES,
        .queues = 1,
        .mtu = 1500,
        .headroom = HEADROOM,
        .mac = {2, 0, 0, 0, 0, last_mac_byte},
    };
    for (bypass_pkt p = 0; p < FRAMES; p++)
        e->free_list[e->dev.free_frames++] = p;
}

/* ---- The environment ----------------------------------------------------------------------------------- */
static int os_random(void *ctx, void *buf, size_t n)
{
    (void)ctx;
    return getrandom(buf, n, 0) == (ssize_t)n ? 0 : -EIO;
}

static void die(const char *what, long code)
{
    fprintf(stderr, "embed: %s: %s\n", what, strerror((int)-code));
    exit(1);
}

static struct bypass_addr host(uint8_t n) /* 10.0.0.n */
{
    return (struct bypass_addr){{[10] = 0xff, 0xff, 10, 0, 0, n}};
}

static void stack_up(struct bypass_stack *s, struct cable_end *e, uint8_t n, uint64_t now_ns)
{
    struct bypass_config cfg;
    const struct bypass_env env = {.random = os_random};
    const struct bypass_addr addr = host(n);
    bypass_config_default(&cfg, 16);
    size_t size = bypass_arena_size(&cfg);
    void *arena = aligned_alloc(64, size);
    if (!arena)
        die("memory", -ENOMEM);
    memset(arena, 0, size);
    int err = bypass_create(s, arena, size, &cfg, &e->dev, &env, now_ns);
    if (err == 0)
        err = bypass_addr_add(s, &addr, 24);
    if (err < 0)
        die("stack", err);
}

static void stack_down(const char *name, struct bypass_stack *s)
{
    struct bypass_audit left;
    bypass_destroy(s);
    bypass_audit(s, &left);
    if (left.conns || left.handles || left.timers || left.frames)
        die(name, -EBUSY);
    free(s->arena);
}

/* ---- The conversation ------------------------------------------------------------------------------------ */
static struct cable_end left_end, right_end;

int main(void)
{
    struct bypass_stack server, client;
    uint64_t now_ns = 1; /* any monotonic clock; here it jumps from deadline to deadline */
    const struct bypass_endpoint service = {.addr = host(1), .port = 7};
    char text[64] = "";
    long n;

    cable_init(&left_end, &right_end, 1);
    cable_init(&right_end, &left_end, 2);
    stack_up(&server, &left_end, 1, now_ns);
    stack_up(&client, &right_end, 2, now_ns);

    bypass_sock listener = bypass_socket(&server, BYPASS_STREAM), served = -1;
    bypass_sock sock = bypass_socket(&client, BYPASS_STREAM);
    if ((n = bypass_bind(&server, listener, &service)) < 0 || (n = bypass_listen(&server, listener, 8)) < 0)
        die("listen", n);
    if ((n = bypass_connect(&client, sock, &service)) != -EINPROGRESS)
        die("connect", n);

    int asked = 0;
    for (int turns = 0; turns < 1000; turns++) {
        int received = bypass_poll(&server, now_ns, 64) + bypass_poll(&client, now_ns, 64);

        if (served < 0 && (served = bypass_accept(&server, listener)) >= 0)
            printf("server: accepted a connection\n");
        if (served >= 0 && (n = bypass_recv(&server, served, text, sizeof text - 1, 0)) > 0) {
            printf("server: got %ld bytes, sends them back\n", n);
            bypass_send(&server, served, text, (size_t)n, 0);
        }
        if (!asked && (bypass_ready(&client, sock) & BYPASS_OUT)) {
            bypass_send(&client, sock, "hello, stack", 12, 0);
            asked = 1;
        }
        n = bypass_recv(&client, sock, text, sizeof text - 1, 0);
        if (n > 0) {
            printf("client: got \"%.*s\"\n", (int)n, text);
            break;
        }
        if (n != -EAGAIN)
            die("recv", n);
        if (received == 0) { /* nothing on the cable: time passes until one of them has something to do */
            uint64_t a = bypass_deadline(&server), b = bypass_deadline(&client);
            uint64_t next = a < b ? a : b;
            now_ns = next > now_ns && next != UINT64_MAX ? next : now_ns + 1;
        }
    }
    stack_down("server", &server);
    stack_down("client", &client);
    if (n != 12 || memcmp(text, "hello, stack", 12) != 0)
        die("no answer", -ETIMEDOUT);
    return 0;
}
