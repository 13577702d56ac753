/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memport.h - the cheapest netdev there can be, for counting instructions of the stack alone: frames in
 * ordinary memory, rings of frame numbers, nothing checked. memport_carry() is the wire; it copies what one
 * port has sent to the other and is called outside of what is measured.
 *
 * A frame is transmitted as soon as tx_burst() took it, so reap() completes all of them.
 */
#ifndef BENCH_MEMPORT_H
#define BENCH_MEMPORT_H

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bypass.h"

#ifndef MEMPORT_COUNT
#define MEMPORT_COUNT 4096 /* a power of two */
#endif
enum { MEMPORT_FRAMES = MEMPORT_COUNT, MEMPORT_MASK = MEMPORT_FRAMES - 1, MEMPORT_STRIDE = 2048 };

struct memport {
    struct bypass_netdev dev;
    uint32_t rx_head, rx_tail;
    uint32_t tx_reaped, tx_carried, tx_tail;
    bypass_pkt free[MEMPORT_FRAMES]; /* stack of dev.free_frames entries */
    bypass_pkt rx[MEMPORT_FRAMES];
    bypass_pkt tx[MEMPORT_FRAMES];
};

static inline struct memport *memport_of(struct bypass_netdev *dev) { return (struct memport *)dev; }

static inline struct bypass_pkt_meta *memport_meta(const struct memport *m, bypass_pkt p) { return &m->dev.meta[p]; }

static int memport_alloc(struct bypass_netdev *dev, bypass_pkt *out, int n)
{
    struct memport *m = memport_of(dev);
    int i = 0;
    for (; i < n && dev->free_frames > 0; i++) {
        out[i] = m->free[--dev->free_frames];
        memport_meta(m, out[i])->holders = BYPASS_HOLD_STACK;
        memport_meta(m, out[i])->off = dev->headroom;
    }
    return i;
}

static void memport_free(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct memport *m = memport_of(dev);
    for (int i = 0; i < n; i++) {
        struct bypass_pkt_meta *meta = memport_meta(m, pkts[i]);
        meta->holders &= (uint8_t)~BYPASS_HOLD_STACK;
        if (meta->holders == 0)
            m->free[dev->free_frames++] = pkts[i];
    }
}

static int memport_rx_burst(struct bypass_netdev *dev, bypass_pkt *out, int max)
{
    struct memport *m = memport_of(dev);
    int n = 0;
    for (; n < max && m->rx_head != m->rx_tail; n++) {
        out[n] = m->rx[m->rx_head++ & MEMPORT_MASK];
        memport_meta(m, out[n])->holders = BYPASS_HOLD_STACK;
    }
    return n;
}

static int memport_tx_burst(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct memport *m = memport_of(dev);
    for (int i = 0; i < n; i++) {
        memport_meta(m, pkts[i])->holders |= BYPASS_HOLD_DEV;
        m->tx[m->tx_tail++ & MEMPORT_MASK] = pkts[i];
    }
    return n;
}

static int memport_reap(struct bypass_netdev *dev, bypass_pkt *done, int max)
{
    struct memport *m = memport_of(dev);
    int n = 0;
    for (; n < max && m->tx_reaped != m->tx_carried; m->tx_reaped++) {
        bypass_pkt p = m->tx[m->tx_reaped & MEMPORT_MASK];
        struct bypass_pkt_meta *meta = memport_meta(m, p);
        meta->holders &= (uint8_t)~BYPASS_HOLD_DEV;
        if (meta->holders == 0)
            m->free[dev->free_frames++] = p;
        else
            done[n++] = p;
    }
    return n;
}

static int memport_kick(struct bypass_netdev *dev)
{
    (void)dev;
    return 0;
}

static int memport_wait_fd(struct bypass_netdev *dev)
{
    (void)dev;
    return -ENOTSUP;
}

/* 0, or -ENOMEM. `last` is the last byte of the MAC address. */
static inline int memport_open(struct memport *m, uint8_t last)
{
    static const struct bypass_netdev_ops ops = {
        .alloc = memport_alloc,
        .free = memport_free,
        .rx_burst = memport_rx_burst,
        .tx_burst = memport_tx_burst,
        .reap = memport_reap,
        .kick = memport_kick,
        .wait_fd = memport_wait_fd,
    };
    memset(m, 0, sizeof *m);
    m->dev = (struct bypass_netdev){.ops = &ops,
                                    .stride = MEMPORT_STRIDE,
                                    .meta_stride = sizeof(struct bypass_pkt_meta),
                                    .frames = MEMPORT_FRAMES,
                                    .queues = 1,
                                    .mtu = 1500,
                                    .headroom = 256,
                                    .mac = {2, 0, 0, 0, 0, last}};
    m->dev.mem = aligned_alloc(64, (size_t)MEMPORT_FRAMES * MEMPORT_STRIDE);
    m->dev.meta = aligned_alloc(64, MEMPORT_FRAMES * sizeof(struct bypass_pkt_meta));
    if (!m->dev.mem || !m->dev.meta)
        return -ENOMEM;
    memset(m->dev.meta, 0, MEMPORT_FRAMES * sizeof(struct bypass_pkt_meta));
    for (uint32_t i = 0; i < MEMPORT_FRAMES; i++)
        m->free[m->dev.free_frames++] = i;
    return 0;
}

static inline void memport_close(struct memport *m)
{
    free(m->dev.mem);
    free(m->dev.meta);
}

/* Delivers what `from` has sent since the last call. Number of frames, or -ENOBUFS. */
static inline int memport_carry(struct memport *from, struct memport *to)
{
    int n = 0;
    for (; from->tx_carried != from->tx_tail; from->tx_carried++, n++) {
        bypass_pkt p = from->tx[from->tx_carried & MEMPORT_MASK], q;
        const struct bypass_pkt_meta *sent = memport_meta(from, p);
        if (memport_alloc(&to->dev, &q, 1) != 1)
            return -ENOBUFS;
        struct bypass_pkt_meta *got = memport_meta(to, q);
        got->holders = BYPASS_HOLD_RX;
        got->len = sent->len;
        got->queue = 0;
        got->flags = 0;
        memcpy(to->dev.mem + (size_t)q * MEMPORT_STRIDE + got->off,
               from->dev.mem + (size_t)p * MEMPORT_STRIDE + sent->off, sent->len);
        to->rx[to->rx_tail++ & MEMPORT_MASK] = q;
    }
    return n;
}

#endif
