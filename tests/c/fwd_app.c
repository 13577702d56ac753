/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fwd_app.c - an application in shared mode, for tests: the core on a port, in a process of its own.
 *
 *   fwd_app MODE MEMFD OFFSET SIZE BELL_OUT BELL_IN ADDRESS PORT PEER PEER_MAC
 *
 * MODE echo: TCP and UDP echo at ADDRESS:PORT, asleep between frames; flood: UDP frames to PEER without end, every
 * fourth from a port that is not its own; garbage: random words all over the shared memory; clever: positions that make
 * sense, slots that change while they are read; these two also take pages away. All end at the end of their input; echo
 * then prints where its frames are.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "csum.h"
#include "fwd/layout.h"
#include "host.h"
#include "wire.h"

enum { CONNS = 64, ROOM = 16384, BATCH = 32 };

static struct port port;
static struct bypass_stack stack;
static struct bypass_endpoint local, peer;
static uint8_t peer_mac[6];
static int memory_fd;
static off_t memory_at; /* of the port in the file */
static uint8_t *memory;
static size_t memory_size;

static void die(const char *what, int64_t err)
{
    fprintf(stderr, "fwd_app: %s: %s\n", what, strerror((int)-err));
    exit(1);
}

static int ended(int timeout_ms, int bell)
{
    struct pollfd p[2] = {{.fd = 0, .events = POLLIN}, {.fd = bell, .events = POLLIN}};
    char c;

    return poll(p, bell >= 0 ? 2 : 1, timeout_ms) > 0 && p[0].revents && read(0, &c, 1) <= 0;
}

/* ---- echo -------------------------------------------------------------------------------------------------- */

struct echo {
    bypass_sock sock; /* -1: free */
    uint32_t len, sent;
    uint8_t buf[ROOM];
};
static struct echo conns[CONNS];

static void echo_go_on(struct echo *e)
{
    for (;;) {
        int64_t n;

        while (e->sent < e->len) {
            n = bypass_send(&stack, e->sock, e->buf + e->sent, e->len - e->sent, 0);
            if (n == -EAGAIN) {
                return;
            }
            if (n < 0) {
                break;
            }
            e->sent += (uint32_t)n;
        }
        n = e->sent < e->len ? -1 : bypass_recv(&stack, e->sock, e->buf, ROOM, 0);
        if (n == -EAGAIN) {
            return;
        }
        if (n <= 0) {
            bypass_close(&stack, e->sock);
            e->sock = -1;
            return;
        }
        e->len = (uint32_t)n;
        e->sent = 0;
    }
}

static void echo_accept(bypass_sock listener)
{
    bypass_sock s;

    while ((s = bypass_accept(&stack, listener)) >= 0) {
        for (int i = 0; i < CONNS; i++) {
            if (conns[i].sock < 0) {
                conns[i] = (struct echo){.sock = s};
                s = -1;
                break;
            }
        }
        if (s >= 0) {
            bypass_close(&stack, s);
        }
    }
}

static void echo_datagrams(bypass_sock sock)
{
    static uint8_t buf[65536];
    struct bypass_endpoint from;
    int64_t n;

    while ((n = bypass_recvfrom(&stack, sock, buf, sizeof buf, 0, &from)) >= 0) {
        bypass_sendto(&stack, sock, buf, (size_t)n, 0, &from);
    }
}

static void answer_nexthops(void)
{
    struct bypass_addr wanted[8];
    int n = bypass_nexthop_wanted(&stack, wanted, 8);

    for (int i = 0; i < n; i++) {
        bypass_nexthop_set(&stack, &wanted[i], peer_mac, 0);
    }
}

static int wait_ms(void)
{
    uint64_t deadline = bypass_deadline(&stack), now = host_now_ns();

    return deadline <= now ? 0 : deadline - now > 1000000000 ? 1000 : (int)((deadline - now + 999999) / 1000000);
}

static void echo(void *arena, size_t arena_size, const struct bypass_config *cfg)
{
    const struct bypass_env env = {.random = host_random};
    bypass_sock listener, datagrams;
    struct frame_audit audit;
    int err = bypass_create(&stack, arena, arena_size, cfg, port_netdev(&port), &env, host_now_ns());

    if (err < 0 || (err = bypass_addr_add(&stack, &local.addr, 24)) < 0) {
        die("stack", err);
    }
    listener = bypass_socket(&stack, BYPASS_STREAM);
    datagrams = bypass_socket(&stack, BYPASS_DGRAM);
    if ((err = bypass_bind(&stack, listener, &local)) < 0 || (err = bypass_listen(&stack, listener, 64)) < 0 ||
        (err = bypass_bind(&stack, datagrams, &local)) < 0) {
        die("bind", err);
    }
    for (int i = 0; i < CONNS; i++) {
        conns[i].sock = -1;
    }
    printf("ready\n");
    fflush(stdout);
    do {
        err = bypass_poll(&stack, host_now_ns(), BATCH);
        answer_nexthops();
        echo_accept(listener);
        echo_datagrams(datagrams);
        for (int i = 0; i < CONNS; i++) {
            if (conns[i].sock >= 0) {
                echo_go_on(&conns[i]);
            }
        }
        bypass_flush(&stack);
    } while (!ended(err == BATCH ? 0 : wait_ms(), port.doorbell_in));
    bypass_destroy(&stack);
    for (int i = 0; i < 1000 && port.sh->st.tx_posted != port.sh->st.tx_reaped; i++) {
        bypass_pkt done[BATCH];

        port.nd.ops->kick(&port.nd);
        port.nd.ops->reap(&port.nd, done, BATCH);
        usleep(1000);
    }
    err = port_audit(&port, &audit);
    printf("%d %u %u %u %u\n", err, audit.stack, audit.stack_tx + audit.tx, audit.misplaced, audit.bad_free);
}

/* ---- flood ------------------------------------------------------------------------------------------------- */

static void flood_frame(bypass_pkt pkt, uint32_t number)
{
    uint8_t *b = port.nd.mem + (size_t)pkt * PORT_STRIDE + PORT_HEADROOM, *ip = b + ETH_LEN, *udp = ip + IP4_LEN;
    struct bypass_pkt_meta *m = (void *)((uint8_t *)port.nd.meta + (size_t)pkt * PORT_META);
    uint16_t csum;

    m->len = 1000;
    memset(b, 0, 64);
    memcpy(b, peer_mac, 6);
    memcpy(b + 6, port.nd.mac, 6);
    wr16(b + ETH_TYPE, ETH_TYPE_IPV4);
    ip[0] = 0x45;
    wr16(ip + IP4_TOTAL, (uint16_t)(m->len - ETH_LEN));
    ip[IP4_TTL] = 64;
    ip[IP4_PROTO] = PROTO_UDP;
    memcpy(ip + IP4_SRC, local.addr.b + 12, 4);
    memcpy(ip + IP4_DST, peer.addr.b + 12, 4);
    csum = csum_fold(csum_bytes(ip, IP4_LEN, 0));
    memcpy(ip + IP4_CSUM, &csum, 2);
    wr16(udp + UDP_SRC, (uint16_t)(number % 4 ? local.port : local.port + 1));
    wr16(udp + UDP_DST, 9);
    wr16(udp + UDP_SIZE, (uint16_t)(m->len - ETH_LEN - IP4_LEN));
}

static void flood(void)
{
    bypass_pkt pkts[BATCH];
    uint32_t number = 0;

    printf("ready\n");
    fflush(stdout);
    while (number % 64 || !ended(0, -1)) {
        int n, sent;

        while (port.nd.ops->reap(&port.nd, pkts, BATCH) == BATCH) {}
        n = port.nd.ops->alloc(&port.nd, pkts, 8);
        for (int i = 0; i < n; i++) {
            flood_frame(pkts[i], number++);
        }
        sent = port.nd.ops->tx_burst(&port.nd, pkts, n);
        port.nd.ops->free(&port.nd, pkts, n);
        port.nd.ops->kick(&port.nd);
        number += sent <= 0;
    }
}

/* ---- hostile ----------------------------------------------------------------------------------------------- */

static uint64_t state;

static uint32_t rnd(void)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 32);
}

/* first: the first page that it may take away from under bypass-fwd. */
static void disturb(uint32_t first)
{
    const uint64_t one = 1;
    char byte[64];

    if (rnd() % 64 == 0) {
        __atomic_store_n(&port.sh->app_sleeps, rnd() % 3, __ATOMIC_RELAXED);
    }
    if (rnd() % 256 == 0 && write(port.doorbell_out, &one, sizeof one) < 0) {
        die("doorbell", -errno);
    }
    if (rnd() % 4096 == 0) { /* what it may do with its ends */
        fcntl(port.doorbell_out, F_SETFL, rnd() % 2 ? O_NONBLOCK : 0);
        fcntl(port.doorbell_in, F_SETFL, rnd() % 2 ? O_NONBLOCK : 0);
        send(port.doorbell_in, byte, sizeof byte, MSG_DONTWAIT);
        fallocate(memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  memory_at + PORT_PAGE * (first + rnd() % (memory_size / PORT_PAGE - first)), PORT_PAGE);
    }
}

static void garbage(void)
{
    while (rnd() % 1024 || !ended(0, -1)) {
        uint32_t *words = (uint32_t *)memory;

        words[rnd() % (memory_size / 4)] = rnd();
        if (rnd() % 16 == 0) { /* the head and the slots are small: often */
            words[rnd() % (port_places(&port.sh->cfg).free_list / 4 % 65536 + 64)] = rnd();
        }
        disturb(0);
    }
}

/* Positions that are believed, so that slots are read all the time, and slots that change meanwhile. */
static void clever(const struct port_config *cfg)
{
    while (rnd() % 1024 || !ended(0, -1)) {
        struct port_tx_slot *tx = &port.tx[rnd() % cfg->tx_ring];
        struct port_rx_slot *rx = &port.rx[rnd() % cfg->rx_ring];

        for (int i = 0; i < 8; i++) {
            bool good = rnd() % 2; /* until the next one writes over it, which may be meanwhile */

            tx->frame = good || rnd() % 8 ? rnd() % cfg->frames : rnd();
            tx->len = (uint16_t)(good ? 1000 : rnd() % 8 ? rnd() % 1800 : rnd());
            tx->off = (uint16_t)(good ? PORT_HEADROOM : rnd() % 8 ? rnd() % 512 : rnd());
            tx->queue = (uint16_t)rnd();
            tx->flags = (uint16_t)(good ? 0 : rnd());
            tx->csum_start = (uint16_t)rnd();
            tx->csum_off = (uint16_t)rnd();
            rx->frame = rnd() % 8 ? rnd() % cfg->frames : rnd();
            flood_frame(rnd() % cfg->frames, rnd());
        }
        __atomic_store_n(&port.sh->tx_posted, __atomic_load_n(&port.sh->tx_done, __ATOMIC_ACQUIRE) + rnd() % 8,
                         __ATOMIC_RELEASE);
        __atomic_store_n(&port.sh->rx_posted,
                         __atomic_load_n(&port.sh->rx_done, __ATOMIC_ACQUIRE) + cfg->rx_ring - rnd() % 4,
                         __ATOMIC_RELEASE);
        port.nd.ops->kick(&port.nd);
        disturb(1);
    }
}

int main(int argc, char **argv)
{
    struct bypass_config cfg;
    struct port_config port_cfg;
    int err;
    size_t arena_size;

    if (argc != 11) {
        fprintf(stderr, "usage: see the head of the file\n");
        return 2;
    }
    memory_size = strtoul(argv[4], NULL, 10);
    memory_fd = atoi(argv[2]);
    memory_at = atol(argv[3]);
    memory = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, memory_at);
    if (memory == MAP_FAILED) {
        die("memory", -errno);
    }
    err = port_attach(&port, memory, memory_size, atoi(argv[5]), atoi(argv[6]));
    if (err < 0) {
        die("port", err);
    }
    port_cfg = port.sh->cfg;
    local.addr = peer.addr = (struct bypass_addr){{[10] = 0xff, [11] = 0xff}};
    inet_pton(AF_INET, argv[7], local.addr.b + 12);
    inet_pton(AF_INET, argv[9], peer.addr.b + 12);
    local.port = (uint16_t)atoi(argv[8]);
    sscanf(argv[10], "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &peer_mac[0], &peer_mac[1], &peer_mac[2], &peer_mac[3],
           &peer_mac[4], &peer_mac[5]);
    state = local.port;
    if (strcmp(argv[1], "echo") == 0) {
        bypass_config_default(&cfg, 1024);
        cfg.flags = BYPASS_F_RST; /* the kernel answers ARP and ping, and we are told next hops */
        arena_size = bypass_arena_size(&cfg);
        echo(mmap(NULL, arena_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), arena_size, &cfg);
    } else if (strcmp(argv[1], "flood") == 0) {
        flood();
    } else {
        printf("ready\n");
        fflush(stdout);
        if (strcmp(argv[1], "garbage") == 0) {
            garbage();
        } else {
            clever(&port_cfg);
        }
    }
    return 0;
}
