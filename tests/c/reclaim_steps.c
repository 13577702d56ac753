/* SPDX-License-Identifier: Apache-2.0 */
/*
 * reclaim_steps.c - a process that uses a device, stopped after every single instruction that changed the memory: what if
 * it was killed there? Its parent reclaims the device, looks whether every frame is in one place and whether traffic
 * goes on, puts the memory back, and lets it take the next step.
 *
 *     reclaim_steps afxdp|port OPERATIONS SEED
 *
 * Prints how many moments were tried. The kernel's, or bypass-fwd's, side is the parent's, between operations.
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "afxdp_fake.h"
#include "fwd/peer.h"
#include "fwd/port.h"

enum { ROOM = 256 << 10, FRAMES = 64, RING = 16, LEN = 60, DOUBLE_EVERY = 40, QUEUES = 2 };

struct shared {
    volatile int operation; /* the child has begun so many */
};

static uint8_t *region, *saved; /* all that child and parent share; region[0..] the device, then struct shared */
static struct shared *shared;
static struct bypass_netdev *nd;
static int operation; /* for messages */
static unsigned steps;

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *text, ...)
{
    va_list args;

    va_start(args, text);
    fprintf(stderr, "operation %d, step %u: ", operation, steps);
    vfprintf(stderr, text, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static unsigned rnd(unsigned n) { return (unsigned)random() % n; }

static struct bypass_pkt_meta *meta(bypass_pkt p)
{
    return (struct bypass_pkt_meta *)((uint8_t *)nd->meta + (size_t)p * nd->meta_stride);
}

/* ---- The two kinds: what stands on the other side of the device ------------------------------------------------- */
struct kind {
    void (*make)(void);
    int (*deliver)(uint8_t byte); /* a packet of LEN such bytes; whether there was room */
    int (*take)(uint8_t *seen);   /* all that is sent, completed: first bytes */
    int (*reclaim)(void);
    int (*rx_and_free)(void); /* audits: frames that are free or wait for packets; -1: the books are wrong */
    void *(*other)(size_t *bytes);
};

static struct afxdp *dev;

static void afxdp_make(void)
{
    struct afxdp_config cfg = {.queue_count = QUEUES, .queues = {0, 1}, .frames = FRAMES, .frame_size = 2048};

    cfg.ring_size = RING;
    dev = fake_open_in(region, ROOM, &cfg, 0xfffffff0);
    if (!dev) {
        fail("no room for the device");
    }
    fake_kick_answers(0, 0);
    nd = afxdp_netdev(dev);
}

static unsigned queue_of; /* both have their turn */

static int afxdp_deliver(uint8_t byte) { return fake_rx(dev, queue_of++ % QUEUES, LEN, byte, -1) == 0; }

static int afxdp_take(uint8_t *seen)
{
    int n = 0;

    for (uint32_t qi = 0; qi < QUEUES; qi++) {
        n += fake_tx(dev, qi, FRAMES, seen + n);
        fake_complete(dev, qi, FRAMES, 0);
    }
    return n;
}

static int afxdp_places(void)
{
    struct frame_audit a;
    uint8_t places[FRAMES];

    fake_census(dev, places);
    for (unsigned f = 0; f < FRAMES; f++) {
        if (places[f] != 1) {
            fail("frame %u is in %u places", f, places[f]);
        }
    }
    return afxdp_audit(dev, &a) == 0 && a.stack == 0 && a.stack_tx == 0 ? (int)(a.free + a.rx) : -1;
}

static int afxdp_again(void) { return afxdp_reclaim(dev); }
static void *afxdp_other(size_t *bytes) { return fake_kernel(QUEUES, bytes); }

static struct port port;
static struct peer peer;

static void port_make(void)
{
    const struct port_config cfg = {.frames = FRAMES, .rx_ring = RING, .tx_ring = RING, .mtu = 1500, .queues = 1};

    if (port_init(region, ROOM, &cfg) < 0 || port_attach(&port, region, ROOM, -1, -1) < 0 ||
        peer_attach(&peer, region, ROOM, &cfg, -1) < 0) {
        fail("no room for the port");
    }
    nd = port_netdev(&port);
}

static int port_deliver(uint8_t byte)
{
    const struct bypass_pkt_meta m = {.len = LEN};
    uint8_t data[LEN];
    int done;

    memset(data, byte, LEN);
    done = peer_deliver(&peer, data, &m);
    peer_publish(&peer);
    return done;
}

static int port_take(uint8_t *seen)
{
    struct bypass_pkt_meta m;
    uint8_t data[PORT_STRIDE];
    int n = 0;

    for (; peer_tx_avail(&peer, 1); n++) {
        if (!peer_tx_take(&peer, data, sizeof data, &m) || m.len != LEN || memcmp(data, data + 1, LEN - 1) != 0) {
            fail("a frame that was sent is torn");
        }
        seen[n] = data[0];
    }
    peer_tx_publish(&peer);
    return n;
}

static int port_places(void)
{
    struct frame_audit a;

    return port_audit(&port, &a) == 0 && a.stack == 0 && a.stack_tx == 0 && !peer.cut ? (int)(a.free + a.rx) : -1;
}

static int port_again(void) { return port_reclaim(&port); }
static void *port_other(size_t *bytes) { return *bytes = sizeof peer, &peer; }

static const struct kind kinds[] = {
    {afxdp_make, afxdp_deliver, afxdp_take, afxdp_again, afxdp_places, afxdp_other},
    {port_make, port_deliver, port_take, port_again, port_places, port_other},
};
static const struct kind *kind;

/* ---- The child: any operations, in any order ------------------------------------------------------------------------ */
static void use(int operations, unsigned seed)
{
    bypass_pkt held[FRAMES], some[FRAMES];
    int n = 0, got;

    srandom(seed);
    for (int i = 0; i < operations; i++) {
        unsigned what = rnd(8);
        int k = 1 + (int)rnd(6);

        shared->operation = i + 1;
        if (what < 2 && n + k <= FRAMES) {
            n += nd->ops->alloc(nd, held + n, k);
        } else if (what < 4 && n + k <= FRAMES) {
            n += (got = nd->ops->rx_burst(nd, held + n, k)) > 0 ? got : 0;
        } else if (what == 4) {
            for (got = 0; got < n && got < k && meta(held[got])->holders == BYPASS_HOLD_STACK; got++) {
                meta(held[got])->len = LEN;
                memset(nd->mem + (size_t)held[got] * nd->stride + meta(held[got])->off, i & 0xff, LEN);
                meta(held[got])->queue = (uint16_t)rnd(2);
            }
            nd->ops->tx_burst(nd, held, got);
            nd->ops->kick(nd);
        } else if (what == 5) {
            nd->ops->reap(nd, some, k);
        } else if (n) {
            k = k < n ? k : n;
            nd->ops->free(nd, held + n - k, k);
            n -= k;
        }
    }
    _exit(0);
}

/* ---- What if it died now? ---------------------------------------------------------------------------------------- */
static uint8_t delivered; /* the last packet's byte */

/* All that is there is received, in order, and given back; what is sent goes out; nothing is left anywhere. */
static void drain(void)
{
    bypass_pkt p[FRAMES];
    uint8_t seen[4 * FRAMES];

    for (int round = 0; round < 8; round++) {
        int n = nd->ops->rx_burst(nd, p, FRAMES);

        for (int i = 0; i < n; i++) {
            uint8_t *data = nd->mem + (size_t)p[i] * nd->stride + meta(p[i])->off;

            if (meta(p[i])->len != LEN || memcmp(data, data + 1, LEN - 1) != 0) {
                fail("a packet that waited is torn");
            }
        }
        nd->ops->free(nd, p, n);
        kind->take(seen);
        n = nd->ops->reap(nd, p, FRAMES);
        nd->ops->free(nd, p, n);
    }
    if (kind->rx_and_free() != FRAMES) {
        fail("frames are lost");
    }
}

static void talk(void)
{
    bypass_pkt p[2];
    uint8_t seen[4 * FRAMES];

    for (int i = 0; i < 2 * RING; i++) {
        if (!kind->deliver((uint8_t)i) || nd->ops->rx_burst(nd, p, 2) != 1 ||
            nd->mem[(size_t)p[0] * nd->stride + meta(p[0])->off] != i) {
            fail("packet %d does not arrive", i);
        }
        if (nd->ops->tx_burst(nd, p, 1) != 1 || kind->take(seen) != 1 || seen[0] != i) {
            fail("packet %d is not sent", i);
        }
        nd->ops->free(nd, p, 1);
        nd->ops->reap(nd, p, 2);
    }
    if (kind->rx_and_free() != FRAMES) {
        fail("frames are lost");
    }
}

/* Whoever reclaims dies as well, after so many instructions; false: it was faster. */
static bool reclaim_dying(unsigned after)
{
    pid_t pid = fork();
    int status;

    if (pid == 0) {
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGSTOP);
        _exit(kind->reclaim() != 0);
    }
    waitpid(pid, &status, 0);
    while (after-- && WIFSTOPPED(status)) {
        ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL);
        waitpid(pid, &status, 0);
    }
    if (WIFEXITED(status)) {
        return false;
    }
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    return true;
}

static void die_here(bool twice)
{
    size_t bytes;
    void *other = kind->other(&bytes), *kept = malloc(bytes);
    uint32_t free_frames = nd->free_frames;
    int err;

    memcpy(kept, other, bytes);
    memcpy(saved, region, ROOM);
    if (twice) {
        reclaim_dying(rnd(6000));
    }
    err = kind->reclaim();
    if (err) {
        fail("reclaim: %d", err);
    }
    if (kind->rx_and_free() < 0) {
        fail("the books are wrong");
    }
    drain();
    talk();
    if (fake_violations()) {
        fail("%s", fake_violation());
    }
    memcpy(region, saved, ROOM);
    memcpy(other, kept, bytes);
    nd->free_frames = free_frames;
    free(kept);
}

/* Between the child's operations the other side does something too. */
static void other_side(void)
{
    uint8_t seen[4 * FRAMES];

    for (unsigned n = rnd(5); n; n--) {
        delivered = (uint8_t)(delivered + kind->deliver((uint8_t)(delivered + 1)));
    }
    if (rnd(3) == 0) {
        kind->take(seen);
    }
}

int main(int argc, char **argv)
{
    int operations = argc > 2 ? atoi(argv[2]) : 100, status;
    unsigned seed = argc > 3 ? (unsigned)atoi(argv[3]) : 1, tried = 0;
    pid_t pid;

    kind = &kinds[argc > 1 && strcmp(argv[1], "port") == 0];
    region = mmap(NULL, ROOM + 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    saved = calloc(2, ROOM);
    shared = (struct shared *)(region + ROOM);
    kind->make();
    pid = fork();
    if (pid == 0) {
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGSTOP);
        use(operations, seed);
    }
    srandom(seed + 1);
    waitpid(pid, &status, 0);
    while (WIFSTOPPED(status)) {
        if (ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) < 0 || waitpid(pid, &status, 0) < 0) {
            fail("it cannot be stepped");
        }
        steps++;
        if (WIFSTOPPED(status) && memcmp(region, saved + ROOM, ROOM) != 0) {
            memcpy(saved + ROOM, region, ROOM);
            die_here(tried++ % DOUBLE_EVERY == 0);
        }
        if (shared->operation != operation) {
            operation = shared->operation;
            other_side();
        }
    }
    printf("%d operations, %u instructions, %u moments\n", operation, steps, tried);
    return operation != operations || tried == 0;
}
