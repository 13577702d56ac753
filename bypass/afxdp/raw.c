/* SPDX-License-Identifier: Apache-2.0 */
/*
 * raw.c - whole Ethernet frames by copy, in batches: what bypass/raw.py stands on. Works on any netdev, through its
 * operations only. One call moves a batch, because a call from Python costs more than the copying.
 */
#include <errno.h>
#include <string.h>

#include "afxdp.h"

enum { BATCH = 64, MIN_LEN = 14, MAX_HEADER = 18 /* with one VLAN tag */ };

static struct bypass_pkt_meta *raw_meta(const struct bypass_netdev *dev, bypass_pkt p)
{
    return (struct bypass_pkt_meta *)((uint8_t *)dev->meta + (size_t)p * dev->meta_stride);
}

static uint8_t *raw_data(const struct bypass_netdev *dev, bypass_pkt p)
{
    return dev->mem + (size_t)p * dev->stride + raw_meta(dev, p)->off;
}

/* Completed transmissions go back to the pool: this caller keeps no hold on what it sent. */
static void raw_reap(struct bypass_netdev *dev)
{
    bypass_pkt done[BATCH];

    dev->ops->reap(dev, done, BATCH);
}

int rawport_recv(struct bypass_netdev *dev, uint8_t *buf, size_t size, struct rawport_frame *out, int max)
{
    bypass_pkt pkts[BATCH];
    size_t fit = size / dev->stride;
    uint32_t at = 0;
    int got = 0;

    if (fit == 0) {
        return -EINVAL;
    }
    max = fit < (size_t)max ? (int)fit : max;
    raw_reap(dev);
    while (got < max) {
        int n = dev->ops->rx_burst(dev, pkts, max - got < BATCH ? max - got : BATCH);

        if (n <= 0) {
            return got ? got : n;
        }
        for (int i = 0; i < n; i++, got++) {
            const struct bypass_pkt_meta *m = raw_meta(dev, pkts[i]);

            memcpy(buf + at, raw_data(dev, pkts[i]), m->len);
            out[got] = (struct rawport_frame){.off = at,
                                              .len = m->len,
                                              .queue = m->queue,
                                              .flags = m->flags,
                                              .entry = m->entry,
                                              .rule = m->rule,
                                              .hash = m->hash};
            at += m->len;
        }
        dev->ops->free(dev, pkts, n);
    }
    return got;
}

/* Copies one batch into fresh frames. Number of frames made; *err: what is wrong with the next one. */
static int raw_fill(struct bypass_netdev *dev, const uint8_t *buf, const uint32_t *len, bypass_pkt *pkts, int n,
                    int queue, int *err)
{
    int made = 0;

    for (; made < n; made++) {
        struct bypass_pkt_meta *m = raw_meta(dev, pkts[made]);

        if (len[made] < MIN_LEN || len[made] > dev->mtu + (uint32_t)MAX_HEADER) {
            *err = len[made] < MIN_LEN ? -EINVAL : -EMSGSIZE;
            break;
        }
        memcpy(raw_data(dev, pkts[made]), buf, len[made]);
        m->len = (uint16_t)len[made];
        m->queue = (uint16_t)queue;
        buf += len[made];
    }
    return made;
}

int rawport_send(struct bypass_netdev *dev, const uint8_t *buf, const uint32_t *len, int n, int queue)
{
    bypass_pkt pkts[BATCH];
    int sent = 0, err = 0;

    raw_reap(dev);
    while (sent < n && !err) {
        int want = n - sent < BATCH ? n - sent : BATCH;
        int have = dev->ops->alloc(dev, pkts, want);
        int made = raw_fill(dev, buf, len + sent, pkts, have, queue, &err);
        int taken = made ? dev->ops->tx_burst(dev, pkts, made) : 0;

        dev->ops->free(dev, pkts, have); /* the device keeps what it took until it is reaped */
        if (taken < 0) {
            err = taken;
            break;
        }
        for (int i = 0; i < taken; i++) {
            buf += len[sent + i];
        }
        sent += taken;
        if (taken < want) { /* the pool or the ring is full, or err says more */
            break;
        }
    }
    if (err != -ENXIO) {
        int kick = dev->ops->kick(dev); /* -EAGAIN: the rest goes with the next call */

        if (kick && kick != -EAGAIN && !err) {
            err = kick;
        }
    }
    return sent ? sent : err;
}
