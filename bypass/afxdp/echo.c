/* SPDX-License-Identifier: Apache-2.0 */
/*
 * echo.c - the bare echo: the least a program can do to answer packets over AF_XDP, as the yardstick of the stack.
 * Rings only: rx to tx, completion to fill, of the same queue. The frames stay HOLD_RX throughout, for they only
 * ever circle between the rings. IPv4 without options; UDP, and a stateless answer to TCP (RFC 9293 3.10.7.4 cut
 * down to a peer that loses nothing).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <time.h>

#include "internal.h"

enum {
    BATCH = 64,
    IP = ETH_HEADER,
    L4 = IP + 20,
    TCP_DATA = L4 + 20,
    PROTO_TCP = 6,
    PROTO_UDP = 17,
    FIN = 1,
    SYN = 2,
    RST = 4,
    PSH = 8,
    ACK = 16,
    MSS = 1400,
    SLEEP_MS = 10, /* so that the end is noticed */
    DRAIN_NS = 1000000000,
};

static uint64_t clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint16_t get16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static void put16(uint8_t *p, uint32_t v) { p[0] = (uint8_t)(v >> 8), p[1] = (uint8_t)v; }
static uint32_t get32(const uint8_t *p) { return (uint32_t)get16(p) << 16 | get16(p + 2); }
static void put32(uint8_t *p, uint32_t v) { put16(p, v >> 16), put16(p + 2, v & 0xffff); }

static void swap(uint8_t *a, uint8_t *b, size_t n)
{
    uint8_t t[8];

    memcpy(t, a, n);
    memcpy(a, b, n);
    memcpy(b, t, n);
}

/* The Internet checksum (RFC 1071) in host order, over n bytes, on top of sum. */
static uint16_t checksum(const uint8_t *p, uint32_t n, uint64_t sum)
{
    uint32_t w;

    for (; n >= 4; n -= 4, p += 4) {
        memcpy(&w, p, 4);
        sum += w;
    }
    if (n) {
        w = 0;
        memcpy(&w, p, n);
        sum += w;
    }
    sum = (sum >> 32) + (sum & 0xffffffff);
    sum = (sum >> 32) + (sum & 0xffffffff);
    sum = (sum >> 16) + (sum & 0xffff);
    sum = (sum >> 16) + (sum & 0xffff);
    return (uint16_t)~sum;
}

/* Makes the answer to a TCP segment in place, addresses and ports swapped already. Its length, 0: none. */
static uint32_t tcp_answer(uint8_t *p, uint32_t ip_len)
{
    uint8_t *t = p + L4;
    uint32_t header = (uint32_t)(t[12] >> 4) * 4;
    uint32_t flags = t[13], seq = get32(t + 4), ack = get32(t + 8);
    uint32_t data = ip_len - 20 - header;
    uint32_t options = flags & SYN ? 4 : 0;
    uint16_t sum;

    if (header < 20 || ip_len < 20 + header || (flags & RST) || (!(flags & (SYN | FIN)) && !data)) {
        return 0;
    }
    memmove(p + TCP_DATA + options, t + header, data);
    if (flags & SYN) { /* the only option of this side: without timestamps or SACK headers stay 20 bytes */
        put32(p + TCP_DATA, 2u << 24 | 4u << 16 | MSS);
    }
    put32(t + 4, flags & SYN ? 0 : ack);
    put32(t + 8, seq + data + (flags & (SYN | FIN) ? 1 : 0));
    t[12] = (uint8_t)((20 + options) / 4 << 4);
    t[13] = (uint8_t)(ACK | (flags & (SYN | FIN)) | (data ? PSH : 0));
    put16(t + 14, 0xffff);
    put32(t + 16, 0); /* checksum, urgent pointer */
    ip_len = 40 + options + data;
    put16(p + IP + 2, ip_len);
    put16(p + IP + 10, 0);
    sum = checksum(p + IP, 20, 0);
    memcpy(p + IP + 10, &sum, 2);
    /* pseudo-header: addresses, protocol and length; the sum is over words in network order */
    sum = checksum(t, ip_len - 20,
                   (uint64_t)(uint16_t)~checksum(p + IP + 12, 8, 0) + __builtin_bswap16(PROTO_TCP) +
                       __builtin_bswap16((uint16_t)(ip_len - 20)));
    memcpy(t + 16, &sum, 2);
    return IP + ip_len;
}

/* Turns a received packet into its answer. The answer's length, 0: none is due. */
static uint32_t answer(uint8_t *p, uint32_t len, uint32_t port)
{
    uint32_t ip_len;

    if (len < L4 + 8 || get16(p + 12) != 0x0800 || p[IP] != 0x45 || (get16(p + IP + 6) & 0x3fff)) {
        return 0;
    }
    ip_len = get16(p + IP + 2);
    if (ip_len > len - IP || ip_len < 28 || (port && get16(p + L4 + 2) != port)) {
        return 0;
    }
    swap(p, p + 6, 6);
    swap(p + IP + 12, p + IP + 16, 4);
    swap(p + L4, p + L4 + 2, 2);
    switch (p[IP + 9]) {
    case PROTO_UDP: /* no sum changes when its words change places */
        return IP + ip_len;
    case PROTO_TCP:
        return ip_len < 40 ? 0 : tcp_answer(p, ip_len);
    default:
        return 0;
    }
}

static void recycle(const struct queue *q, struct queue_state *qs, uint32_t stride_mask)
{
    uint32_t n = ring_avail(&q->comp, &qs->comp, BATCH);

    if (n) {
        for (uint32_t i = 0; i < n; i++) {
            *ring_addr(&q->fill, qs->fill.prod + i) = *ring_addr(&q->comp, qs->comp.cons + i) & ~(uint64_t)stride_mask;
        }
        ring_release(&q->comp, &qs->comp, n);
        ring_produce(&q->fill, &qs->fill, n);
    }
}

/* One batch of one queue. Number of packets received. */
static uint32_t echo_queue(struct afxdp *d, uint32_t qi, uint32_t port, struct afxdp_echo_result *out)
{
    struct queue *q = &d->queue[qi];
    struct queue_state *qs = &d->st->queue[qi];
    uint32_t mask = d->nd.stride - 1, sent = 0, ignored = 0;
    uint32_t n = ring_avail(&q->rx, &qs->rx, BATCH);

    if (n && ring_space(&q->tx, &qs->tx, n) < n) {
        out->tx_stalls++;
        n = 0;
    }
    for (uint32_t i = 0; i < n; i++) {
        struct xdp_desc desc = *ring_desc(&q->rx, qs->rx.cons + i);
        uint32_t len = answer(d->nd.mem + desc.addr, desc.len, port);

        if (len) {
            *ring_desc(&q->tx, qs->tx.prod + sent++) = (struct xdp_desc){.addr = desc.addr, .len = len};
            out->bytes += len;
        } else {
            *ring_addr(&q->fill, qs->fill.prod + ignored++) = desc.addr & ~(uint64_t)mask;
        }
    }
    if (n) {
        ring_release(&q->rx, &qs->rx, n);
        if (ignored) {
            ring_produce(&q->fill, &qs->fill, ignored);
        }
        ring_produce(&q->tx, &qs->tx, sent);
        out->packets += sent;
        out->ignored += ignored;
    }
    return n;
}

/* Wakes the kernel for one queue and takes completions back. 0, -ENETDOWN or -ENXIO. */
static int echo_kick(struct afxdp *d, uint32_t qi, struct afxdp_echo_result *out)
{
    struct queue *q = &d->queue[qi];
    struct queue_state *qs = &d->st->queue[qi];
    int err = 0;

    if (ring_unconsumed(&q->tx, &qs->tx)) {
        ring_fence();
        if (ring_needs_wakeup(&q->tx)) {
            err = d->sys->wake_tx(d, qi);
            out->kicks++;
        }
    }
    recycle(q, qs, d->nd.stride - 1);
    return err == -ENETDOWN || err == -ENXIO ? err : 0;
}

/* Until everything that was sent has completed. The sum of all that is on its way is tx.prod - comp.cons. */
static int drain(struct afxdp *d, struct afxdp_echo_result *out)
{
    uint64_t deadline_ns = clock_ns() + DRAIN_NS;

    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        const struct queue_state *qs = &d->st->queue[qi];

        while (qs->tx.prod != qs->comp.cons) {
            int err = echo_kick(d, qi, out);

            if (err || clock_ns() >= deadline_ns) {
                return err ? err : -ETIMEDOUT;
            }
        }
    }
    return 0;
}

static bool nap(struct afxdp *d, struct afxdp_echo_result *out)
{
    struct pollfd p = {.fd = d->nd.ops->wait_fd(&d->nd), .events = POLLIN};

    out->polls++;
    return poll(&p, 1, SLEEP_MS) >= 0;
}

int afxdp_echo(struct afxdp *d, const struct afxdp_echo_args *args, struct afxdp_echo_result *out)
{
    uint64_t deadline_ns = clock_ns() + args->duration_ns, answered = out->packets;

    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        if (d->st->queue[qi].tx_frames || d->st->queue[qi].tx.prod != d->st->queue[qi].comp.cons) {
            return -EBUSY;
        }
    }
    for (uint32_t round = 0; !args->max_packets || out->packets - answered < args->max_packets; round++) {
        uint32_t got = 0;
        int err = 0;

        for (uint32_t qi = 0; qi < d->nd.queues && !err; qi++) {
            got += echo_queue(d, qi, args->port, out);
            err = echo_kick(d, qi, out);
        }
        if (err) {
            return err;
        }
        if (!got && !(args->flags & AFXDP_ECHO_SPIN)) {
            nap(d, out);
        }
        if ((!got || (round & 255) == 0) && clock_ns() >= deadline_ns) {
            break;
        }
    }
    return drain(d, out);
}
