/* SPDX-License-Identifier: Apache-2.0 */
/*
 * peer.h - a stack at 10.0.0.1 with a listener at port 7, and whoever writes segments of 10.0.0.2:4000 to it, for
 * programs whose instructions are counted. The device vouches for checksums.
 */
#ifndef BYPASS_TESTS_PEER_H
#define BYPASS_TESTS_PEER_H

#include <stdio.h>

#include "memport.h"
#include "wire.h"

enum { PEER_ISS = 1000, PEER_HEADERS = ETH_LEN + IP4_LEN + 20 };

static struct memport port;
static struct bypass_stack stack;
static uint64_t now_ns = 1000000000;

static inline int die(const char *what, int64_t err)
{
    fprintf(stderr, "%s: %s\n", what, strerror((int)-err));
    exit(1);
}

static inline int repeatable(void *ctx, void *buf, size_t n)
{
    (void)ctx;
    memset(buf, 7, n);
    return 0;
}

static inline void put16(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}

static inline void put32(uint8_t *p, uint32_t v)
{
    put16(p, v >> 16);
    put16(p + 2, v);
}

static inline uint32_t get32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)(p[1] << 16 | p[2] << 8 | p[3]);
}

static inline struct bypass_addr address(uint8_t last)
{
    return (struct bypass_addr){{[10] = 0xff, [11] = 0xff, 10, 0, 0, last}};
}

/* A segment waits to be received: `at` counts from the peer's first sequence number, its `len` bytes are zero. */
static inline void inject(uint8_t flags, uint32_t at, uint32_t ack, const uint8_t *opts, uint32_t opt_len, uint32_t len)
{
    bypass_pkt p;
    if (memport_alloc(&port.dev, &p, 1) != 1)
        die("frames", -ENOBUFS);
    struct bypass_pkt_meta *m = memport_meta(&port, p);
    uint8_t *b = port.dev.mem + (size_t)p * MEMPORT_STRIDE + m->off, *ip = b + ETH_LEN, *h = ip + IP4_LEN;
    memset(b, 0, PEER_HEADERS + opt_len + len);
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
    put32(h + 4, PEER_ISS + at);
    put32(h + 8, ack);
    h[12] = (uint8_t)((20 + opt_len) / 4 << 4);
    h[13] = flags;
    put16(h + 14, 65535);
    if (opt_len > 0)
        memcpy(h + 20, opts, opt_len);
    m->len = (uint16_t)(PEER_HEADERS + opt_len + len);
    m->flags = BYPASS_RX_CSUM_OK;
    m->holders = BYPASS_HOLD_RX;
    port.rx[port.rx_tail++ & MEMPORT_MASK] = p;
}

static inline void poll_after(uint64_t ns)
{
    now_ns += ns;
    int err = bypass_poll(&stack, now_ns, 64);
    if (err < 0)
        die("poll", err);
}

/* The next frame that was sent: its TCP header, and the bytes behind it; NULL: all are carried away. */
static inline const uint8_t *carried(uint32_t *len)
{
    if (port.tx_carried == port.tx_tail)
        return NULL;
    bypass_pkt p = port.tx[port.tx_carried++ & MEMPORT_MASK];
    const struct bypass_pkt_meta *m = memport_meta(&port, p);
    const uint8_t *h = port.dev.mem + (size_t)p * MEMPORT_STRIDE + m->off + ETH_LEN + IP4_LEN;
    *len = m->len - ETH_LEN - IP4_LEN - (uint32_t)(h[12] >> 4) * 4;
    return h;
}

/* The listener, with this option at this value, and the next hop to the peer. */
static inline bypass_sock listen_with(int opt, int64_t value)
{
    static const uint8_t mac[6] = {2, 0, 0, 0, 0, 2};
    struct bypass_endpoint at = {.addr = address(1), .port = 7};
    struct bypass_addr peer = address(2);
    bypass_sock listener = bypass_socket(&stack, BYPASS_STREAM);
    (void)bypass_addr_add(&stack, &at.addr, 24);
    (void)bypass_nexthop_set(&stack, &peer, mac, 0);
    (void)bypass_setopt(&stack, listener, opt, value);
    (void)bypass_bind(&stack, listener, &at);
    (void)bypass_listen(&stack, listener, 1);
    return listener;
}

#endif
