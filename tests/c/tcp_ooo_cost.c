/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_ooo_cost.c - what segments behind a hole cost, for callgrind to count: bypass_poll() with one such segment
 * each time, its ACK included.
 *
 *   valgrind --tool=callgrind --collect-atstart=no tcp_ooo_cost PATTERN SEGMENTS
 *
 * PATTERN: burst (in sequence behind one hole), repair (every second segment is missing and is then filled in, in
 * order, while new ones come at the end), descending and random (every second segment only: a hostile sender).
 */
#include <stdio.h>

#include <valgrind/callgrind.h>

#include "memport.h"
#include "wire.h"

enum { SIZE = 100, ISS = 1000, HDR = ETH_LEN + IP4_LEN + 20 };

static struct memport port;
static struct bypass_stack stack;
static uint64_t now_ns = 1000000000;
static uint32_t our_seq;

static int die(const char *what, int64_t err)
{
    fprintf(stderr, "tcp_ooo_cost: %s: %s\n", what, strerror((int)-err));
    exit(1);
}

static int repeatable(void *ctx, void *buf, size_t n)
{
    (void)ctx;
    memset(buf, 7, n);
    return 0;
}

static struct bypass_addr address(uint8_t last)
{
    return (struct bypass_addr){{[10] = 0xff, [11] = 0xff, 10, 0, 0, last}};
}

static void put16(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static void put32(uint8_t *p, uint32_t v)
{
    put16(p, v >> 16);
    put16(p + 2, v);
}

/* A segment from 10.0.0.2:4000 waits to be received; the device vouches for its checksum. */
static void inject(uint8_t flags, uint32_t at, const uint8_t *opts, uint32_t opt_len, uint32_t len)
{
    bypass_pkt p;
    if (memport_alloc(&port.dev, &p, 1) != 1)
        die("frames", -ENOBUFS);
    struct bypass_pkt_meta *m = memport_meta(&port, p);
    uint8_t *b = port.dev.mem + (size_t)p * MEMPORT_STRIDE + m->off, *ip = b + ETH_LEN, *h = ip + IP4_LEN;
    memset(b, 0, HDR + opt_len + len);
    memcpy(b, port.dev.mac, 6);
    put16(b + ETH_TYPE, ETH_TYPE_IPV4);
    ip[0] = 0x45;
    put16(ip + 2, IP4_LEN + 20 + opt_len + len);
    ip[8] = 64;
    ip[9] = 6;
    put32(ip + 12, 0x0a000002);
    put32(ip + 16, 0x0a000001);
    uint32_t sum = 0;
    for (int i = 0; i < IP4_LEN; i += 2)
        sum += (uint32_t)(ip[i] << 8 | ip[i + 1]);
    put16(ip + 10, ~((sum & 0xffff) + (sum >> 16)));
    put16(h, 4000);
    put16(h + 2, 7);
    put32(h + 4, ISS + at);
    put32(h + 8, our_seq);
    h[12] = (uint8_t)((20 + opt_len) / 4 << 4);
    h[13] = flags;
    put16(h + 14, 65535);
    memcpy(h + 20, opts, opt_len);
    m->len = (uint16_t)(HDR + opt_len + len);
    m->flags = BYPASS_RX_CSUM_OK;
    m->holders = BYPASS_HOLD_RX;
    port.rx[port.rx_tail++ & MEMPORT_MASK] = p;
}

static void poll_once(void)
{
    now_ns += 1000;
    int err = bypass_poll(&stack, now_ns, 64);
    if (err < 0)
        die("poll", err);
}

/* What was sent left; the last frame's sequence number behind its data. */
static void carry(void)
{
    for (; port.tx_carried != port.tx_tail; port.tx_carried++) {
        bypass_pkt p = port.tx[port.tx_carried & MEMPORT_MASK];
        const uint8_t *h = port.dev.mem + (size_t)p * MEMPORT_STRIDE + memport_meta(&port, p)->off + ETH_LEN + IP4_LEN;
        our_seq = (uint32_t)(h[4] << 24 | h[5] << 16 | h[6] << 8 | h[7]) + (h[13] & 2 ? 1 : 0);
    }
}

static void open_connection(void)
{
    static const uint8_t opts[12] = {2, 4, 5, 180, 4, 2, 1, 1, 1, 3, 3, 7}, mac[6] = {2, 0, 0, 0, 0, 2};
    struct bypass_endpoint at = {.addr = address(1), .port = 7};
    struct bypass_addr peer = address(2);
    bypass_sock listener = bypass_socket(&stack, BYPASS_STREAM);
    (void)bypass_addr_add(&stack, &at.addr, 24);
    (void)bypass_nexthop_set(&stack, &peer, mac, 0);
    (void)bypass_setopt(&stack, listener, BYPASS_SO_RCVBUF, 8 << 20);
    (void)bypass_bind(&stack, listener, &at);
    (void)bypass_listen(&stack, listener, 1);
    inject(2, 0, opts, sizeof opts, 0);
    poll_once();
    carry();
    inject(16, 1, NULL, 0, 0);
    poll_once();
    if (bypass_accept(&stack, listener) < 0)
        die("accept", -ECONNREFUSED);
}

static void segment(uint32_t number)
{
    inject(16, 1 + number * SIZE, NULL, 0, SIZE);
    CALLGRIND_TOGGLE_COLLECT;
    poll_once();
    CALLGRIND_TOGGLE_COLLECT;
    carry();
}

static void run(const char *pattern, uint32_t n)
{
    uint32_t at = 12345;
    if (strcmp(pattern, "burst") == 0) {
        for (uint32_t i = 0; i < n; i++)
            segment(1 + i);
    } else if (strcmp(pattern, "repair") == 0) { /* 200 holes; each repaired as a new one opens */
        for (uint32_t i = 0; i < 200; i++)
            segment(2 + 2 * i);
        for (uint32_t i = 0; i < n / 2; i++) {
            segment(402 + 2 * i);
            segment(3 + 2 * i);
        }
    } else if (strcmp(pattern, "descending") == 0) {
        for (uint32_t i = n; i > 0; i--)
            segment(2 * i);
    } else {
        for (uint32_t i = 0; i < n; i++) {
            at = at * 1664525 + 1013904223;
            segment(2 + 2 * (at >> 8) % n);
        }
    }
}

int main(int argc, char **argv)
{
    if (argc != 3 || atoi(argv[2]) < 1)
        die("usage: tcp_ooo_cost PATTERN SEGMENTS", -EINVAL);
    struct bypass_env env = {.random = repeatable};
    struct bypass_config cfg;
    bypass_config_default(&cfg, 64);
    cfg.max_chunks = 32768;
    size_t size = bypass_arena_size(&cfg);
    void *arena = aligned_alloc(64, size);
    if (!arena || memport_open(&port, 1) < 0)
        die("memory", -ENOMEM);
    memset(arena, 0, size);
    int err = bypass_create(&stack, arena, size, &cfg, &port.dev, &env, now_ns);
    if (err < 0)
        die("create", err);
    cfg.flags = 0;
    open_connection();
    run(argv[1], (uint32_t)atoi(argv[2]));
    struct bypass_audit audit;
    bypass_audit(&stack, &audit);
    printf("%u\n", audit.chunks); /* what is held: the segments were taken */
    bypass_destroy(&stack);
    free(arena);
    memport_close(&port);
    return 0;
}
