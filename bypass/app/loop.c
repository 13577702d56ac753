/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loop.c - the device of loop.h. A frame that is sent is copied into a free one, which is received; sent data stays
 * the sender's until it is acknowledged, as on any device.
 */
#include "loop.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

enum { LOOP_MAGIC = 0x504f4f4c, META = 64, HEADROOM = 256, RESERVE = 16 };

static const uint8_t mac[6] = {2, 0, 0, 0, 0, 1};

struct loop_state {
    uint32_t magic, frames;
    uint32_t free_count;
    uint32_t head, tail; /* of the ring: received up to, sent up to */
    uint32_t mask;
    uint64_t dropped; /* no free frame: as on a wire, TCP sends again */
};

static uint32_t ring_size(uint32_t frames)
{
    uint32_t n = 64;

    while (n < frames) {
        n *= 2;
    }
    return n;
}

static size_t align64(size_t n) { return (n + 63) & ~(size_t)63; }

struct places {
    size_t free_list, ring, meta, mem, end;
};

static struct places layout(uint32_t frames)
{
    struct places p = {.free_list = align64(sizeof(struct loop_state))};

    p.ring = align64(p.free_list + frames * sizeof(uint32_t));
    p.meta = align64(p.ring + ring_size(frames) * sizeof(uint32_t));
    p.mem = (p.meta + (size_t)frames * META + 4095) & ~(size_t)4095;
    p.end = p.mem + (size_t)frames * LOOP_STRIDE;
    return p;
}

size_t loop_mem_size(uint32_t frames) { return layout(frames).end; }

int loop_init(void *mem, size_t size, uint32_t frames)
{
    struct loop_state *st = mem;
    struct places p = layout(frames);

    if (frames < 64 || frames > 1u << 18 || size < p.end || ((uintptr_t)mem & 63)) {
        return -EINVAL;
    }
    *st =
        (struct loop_state){.magic = LOOP_MAGIC, .frames = frames, .free_count = frames, .mask = ring_size(frames) - 1};
    for (uint32_t i = 0; i < frames; i++) {
        ((uint32_t *)((uint8_t *)mem + p.free_list))[i] = frames - 1 - i;
    }
    return 0;
}

/* ---- bypass_netdev_ops ---------------------------------------------------------------------------- */
static struct loop *loop_of(struct bypass_netdev *nd) { return (struct loop *)nd; }

static struct bypass_pkt_meta *meta_at(const struct loop *l, uint32_t frame)
{
    return (struct bypass_pkt_meta *)((uint8_t *)l->nd.meta + (size_t)frame * META);
}

static uint32_t take(struct loop *l)
{
    uint32_t frame = l->free_list[--l->st->free_count];
    struct bypass_pkt_meta *m = meta_at(l, frame);

    l->nd.free_frames = l->st->free_count;
    m->off = HEADROOM;
    m->len = m->queue = 0;
    m->flags = 0;
    return frame;
}

static void give(struct loop *l, uint32_t frame)
{
    l->free_list[l->st->free_count++] = frame;
    l->nd.free_frames = l->st->free_count;
}

static int op_alloc(struct bypass_netdev *nd, bypass_pkt *out, int n)
{
    struct loop *l = loop_of(nd);
    int got = 0;

    while (got < n && l->st->free_count > RESERVE) { /* the rest is for reception */
        out[got] = take(l);
        meta_at(l, out[got++])->holders = BYPASS_HOLD_STACK;
    }
    return got;
}

static void op_free(struct bypass_netdev *nd, const bypass_pkt *pkts, int n)
{
    struct loop *l = loop_of(nd);

    for (int i = 0; i < n; i++) {
        meta_at(l, pkts[i])->holders = 0;
        give(l, pkts[i]);
    }
}

static int op_rx_burst(struct bypass_netdev *nd, bypass_pkt *out, int max)
{
    struct loop *l = loop_of(nd);
    struct loop_state *st = l->st;
    int got = 0;

    for (; got < max && st->head != st->tail; got++) {
        out[got] = l->ring[st->head++ & st->mask];
        meta_at(l, out[got])->holders = BYPASS_HOLD_STACK;
    }
    nd->free_frames = st->free_count; /* a relative may have changed it */
    return got;
}

static void send_one(struct loop *l, bypass_pkt from)
{
    const struct bypass_pkt_meta *m = meta_at(l, from);
    uint32_t frame;

    if (l->st->free_count == 0) {
        l->st->dropped++;
        return;
    }
    frame = take(l);
    memcpy(l->nd.mem + (size_t)frame * LOOP_STRIDE + HEADROOM, l->nd.mem + (size_t)from * LOOP_STRIDE + m->off, m->len);
    meta_at(l, frame)->len = m->len;
    meta_at(l, frame)->flags = BYPASS_RX_CSUM_OK; /* memory does not lose bits */
    meta_at(l, frame)->holders = BYPASS_HOLD_RX;
    l->ring[l->st->tail++ & l->st->mask] = frame;
}

static int op_tx_burst(struct bypass_netdev *nd, const bypass_pkt *pkts, int n)
{
    for (int i = 0; i < n; i++) {
        send_one(loop_of(nd), pkts[i]);
    }
    return n;
}

static int op_reap(struct bypass_netdev *nd, bypass_pkt *done, int max)
{
    (void)nd, (void)done, (void)max;
    return 0; /* what is sent is complete at once */
}

static int op_kick(struct bypass_netdev *nd)
{
    (void)nd;
    return 0;
}

static int op_wait_fd(struct bypass_netdev *nd)
{
    (void)nd;
    return -ENOTSUP;
}

static const struct bypass_netdev_ops ops = {
    .alloc = op_alloc,
    .free = op_free,
    .rx_burst = op_rx_burst,
    .tx_burst = op_tx_burst,
    .reap = op_reap,
    .kick = op_kick,
    .wait_fd = op_wait_fd,
};

int loop_attach(struct loop *l, void *mem, size_t size)
{
    struct loop_state *st = mem;
    struct places p;

    if (size < sizeof *st || st->magic != LOOP_MAGIC || st->frames > 1u << 18 || size < layout(st->frames).end) {
        return -EINVAL;
    }
    p = layout(st->frames);
    *l = (struct loop){.st = st,
                       .free_list = (uint32_t *)((uint8_t *)mem + p.free_list),
                       .ring = (uint32_t *)((uint8_t *)mem + p.ring),
                       .nd = {.ops = &ops,
                              .mem = (uint8_t *)mem + p.mem,
                              .meta = (struct bypass_pkt_meta *)((uint8_t *)mem + p.meta),
                              .stride = LOOP_STRIDE,
                              .meta_stride = META,
                              .frames = st->frames,
                              .free_frames = st->free_count,
                              .caps = BYPASS_CAP_RX_CSUM,
                              .queues = 1,
                              .mtu = LOOP_MTU,
                              .headroom = HEADROOM}};
    memcpy(l->nd.mac, mac, sizeof mac);
    return 0;
}

void loop_reclaim(struct loop *l)
{
    struct loop_state *st = l->st;

    st->head = st->tail = 0;
    st->free_count = 0;
    for (uint32_t i = st->frames; i-- > 0;) {
        meta_at(l, i)->holders = 0;
        give(l, i);
    }
}

uint32_t loop_waiting(const struct loop *l) { return l->st->tail - l->st->head; }
