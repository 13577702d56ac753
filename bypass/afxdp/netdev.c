/* SPDX-License-Identifier: Apache-2.0 */
/*
 * netdev.c - the per-packet path: bypass_netdev_ops over the rings. Makes system calls only to wake the kernel,
 * through dev->sys. Opening, closing and statistics are in socket.c.
 *
 * Reception comes first: while a queue is short of frames (state.hungry), every frame that becomes free goes to
 * its fill ring before alloc can hand it out. Otherwise unacknowledged data could hold all frames and the
 * acknowledgement that frees them would find no frame to arrive in.
 */
#include <errno.h>
#include <string.h>

#include "bpf/verdict.h"
#include "internal.h"

enum { HOLD_STACK = BYPASS_HOLD_STACK, HOLD_DEV = BYPASS_HOLD_DEV, HOLD_RX = BYPASS_HOLD_RX };

/* The device, at the beginning of an operation. Another view may have taken or given frames since the last one. */
static struct afxdp *device(struct bypass_netdev *nd)
{
    struct afxdp *d = (struct afxdp *)nd;

    nd->free_frames = d->st->free_count;
    return d;
}

static uint8_t *frame_at(const struct afxdp *d, uint32_t frame) { return d->nd.mem + ((size_t)frame << d->shift); }

/* ---- Reception ------------------------------------------------------------------------------------------- */

/* The verdict's place when the packet starts at off. Only its magic tells that it is one. */
static struct steer_verdict *verdict_at(const struct afxdp *d, uint32_t frame, uint32_t off)
{
    return (struct steer_verdict *)(frame_at(d, frame) + off - sizeof(struct steer_verdict));
}

/* Of this view's queues; another view may serve more. */
static uint64_t hungry_queues(const struct afxdp *d) { return d->st->hungry & (~0ull >> (64 - d->nd.queues)); }

static void fill_rings(struct afxdp *d)
{
    uint64_t hungry = hungry_queues(d);

    while (hungry) {
        uint32_t qi = (uint32_t)__builtin_ctzll(hungry);

        hungry &= hungry - 1;
        fill_refill(d, qi);
    }
}

/* Brings a queue's reception back to fill_target. The fill ring cannot be full: what it holds is part of
 * rx_frames, and fill_target is at most its size. */
void fill_refill(struct afxdp *d, uint32_t qi)
{
    struct afxdp_state *st = d->st;
    struct queue_state *qs = &st->queue[qi];
    const struct ring *fill = &d->queue[qi].fill;
    uint32_t want = st->fill_target > qs->rx_frames ? st->fill_target - qs->rx_frames : 0; /* it may have shrunk */
    uint32_t n = want < st->free_count ? want : st->free_count;

    st->hungry &= ~(1ull << qi);
    if (n < want) {
        st->hungry |= 1ull << qi;
        qs->n.fill_starved++;
    }
    if (n == 0) {
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t frame = frame_from_pool(d);

        /* A redirect without metadata must not find a verdict of this frame's earlier life. */
        verdict_at(d, frame, d->rx_off)->magic = 0;
        *ring_addr(fill, qs->fill.prod) = (uint64_t)frame << d->shift;
        ring_stage(&qs->fill);
        meta_at(d, frame)->holders = HOLD_RX;
    }
    qs->rx_frames += n;
    ring_produce(fill, &qs->fill, 0);
}

void fill_undo(struct afxdp *d, uint32_t qi)
{
    struct queue_state *qs = &d->st->queue[qi];

    for (; qs->rx_frames; qs->rx_frames--) {
        uint32_t frame = (uint32_t)(*ring_addr(&d->queue[qi].fill, --qs->fill.prod) >> d->shift);

        meta_at(d, frame)->holders = 0;
        frame_to_pool(d, frame);
    }
    d->st->hungry &= ~(1ull << qi);
}

static void rx_meta(const struct afxdp *d, struct bypass_pkt_meta *m, uint32_t frame, uint32_t off)
{
    const struct steer_verdict *v = verdict_at(d, frame, off);

    m->flags = d->rx_csum_trust ? BYPASS_RX_CSUM_OK : 0;
    if (v->magic == STEER_VERDICT_MAGIC) {
        m->flags |= BYPASS_RX_VERDICT;
        m->entry = v->entry;
        m->rule = v->rule;
        m->hash = v->hash;
    } else {
        m->entry = m->rule = m->hash = 0;
    }
}

/* Takes one received frame over. false: the descriptor makes no sense, the caller gets nothing. */
static bool rx_accept(struct afxdp *d, uint32_t qi, struct xdp_desc desc, bypass_pkt *out)
{
    struct afxdp_state *st = d->st;
    struct queue_state *qs = &st->queue[qi];
    uint64_t frame = desc.addr >> d->shift;
    uint32_t off = (uint32_t)desc.addr & (d->nd.stride - 1);
    struct bypass_pkt_meta *m;

    if (frame >= d->nd.frames || meta_at(d, (uint32_t)frame)->holders != HOLD_RX) {
        qs->n.rx_bad++; /* not one of those that we gave */
        return false;
    }
    m = meta_at(d, (uint32_t)frame);
    qs->rx_frames--;
    if (off < sizeof(struct steer_verdict) || desc.len < ETH_HEADER || desc.len > d->nd.stride - off) {
        qs->n.rx_bad++;
        m->holders = 0;
        frame_to_pool(d, (uint32_t)frame);
        return false;
    }
    m->holders = HOLD_STACK;
    m->off = (uint16_t)off;
    m->len = (uint16_t)desc.len;
    m->queue = (uint16_t)qi;
    rx_meta(d, m, (uint32_t)frame, off);
    qs->n.rx_packets++;
    qs->n.rx_bytes += desc.len;
    *out = (bypass_pkt)frame;
    return true;
}

static int rx_queue(struct afxdp *d, uint32_t qi, bypass_pkt *out, int max)
{
    struct queue_state *qs = &d->st->queue[qi];
    const struct ring *rx = &d->queue[qi].rx;
    uint32_t n = ring_avail(rx, &qs->rx, (uint32_t)max);
    int got = 0;

    if (n == 0) {
        return 0;
    }
    for (uint32_t i = 0; i < n; i++) {
        struct xdp_desc desc = *ring_desc(rx, qs->rx.cons + i); /* read once */

        if (i + 4 < n) {
            uint64_t ahead = ring_desc(rx, qs->rx.cons + i + 4)->addr;

            if (ahead >> d->shift < d->nd.frames) {
                __builtin_prefetch(meta_at(d, (uint32_t)(ahead >> d->shift)), 1);
                __builtin_prefetch(d->nd.mem + ahead);
            }
        }
        got += rx_accept(d, qi, desc, &out[got]);
    }
    ring_release(rx, &qs->rx, n);
    fill_refill(d, qi);
    return got;
}

static int afxdp_rx_burst(struct bypass_netdev *nd, bypass_pkt *out, int max)
{
    struct afxdp *d = device(nd);
    struct afxdp_state *st = d->st;
    int got = 0;

    for (uint32_t i = 0; i < nd->queues && got < max; i++) {
        uint32_t qi = st->next_queue < nd->queues ? st->next_queue : 0;
        int n;

        if (d->busy_poll && ring_avail(&d->queue[qi].rx, &st->queue[qi].rx, 1) == 0) {
            d->sys->wake_rx(d, qi); /* nothing but this call makes the driver receive */
            st->queue[qi].n.kicks_rx++;
        }
        n = rx_queue(d, qi, out + got, max - got);
        got += n;
        st->next_queue = qi + 1 < nd->queues ? qi + 1 : 0;
    }
    umem_check(d, "rx_burst");
    return got || !st->gone ? got : -ENXIO;
}

/* ---- The pool --------------------------------------------------------------------------------------------- */

static int afxdp_alloc(struct bypass_netdev *nd, bypass_pkt *out, int n)
{
    struct afxdp *d = device(nd);
    int got = 0;

    while (got < n && d->st->free_count) {
        uint32_t frame = frame_from_pool(d);
        struct bypass_pkt_meta *m = meta_at(d, frame);

        m->holders = HOLD_STACK;
        m->off = nd->headroom;
        m->len = 0;
        m->queue = 0;
        m->flags = 0;
        out[got++] = frame;
    }
    umem_check(d, "alloc");
    return got;
}

/* Frames have come back while a queue had too few: pass them on at once. Nothing else might happen before a
 * packet arrives, and none can. */
static void feed_hungry(struct afxdp *d)
{
    uint64_t hungry = hungry_queues(d);

    fill_rings(d);
    ring_fence();
    for (; hungry; hungry &= hungry - 1) {
        uint32_t qi = (uint32_t)__builtin_ctzll(hungry);

        if (ring_needs_wakeup(&d->queue[qi].fill) && !d->st->gone) {
            d->sys->wake_rx(d, qi);
            d->st->queue[qi].n.kicks_rx++;
        }
    }
}

static void afxdp_free(struct bypass_netdev *nd, const bypass_pkt *pkts, int n)
{
    struct afxdp *d = device(nd);

    for (int i = 0; i < n; i++) {
        struct bypass_pkt_meta *m = meta_at(d, pkts[i]);

        if (pkts[i] >= nd->frames || !(m->holders & HOLD_STACK)) {
            d->st->bad_free++;
            continue;
        }
        m->holders &= (uint8_t)~HOLD_STACK;
        if (m->holders == 0) {
            frame_to_pool(d, pkts[i]);
        }
    }
    if (d->st->hungry) {
        feed_hungry(d);
    }
    umem_check(d, "free");
}

/* ---- Transmission ------------------------------------------------------------------------------------------ */

/* What the kernel would refuse (xskq_cons_is_valid_desc), and what would put a frame in two places. */
static bool tx_valid(const struct afxdp *d, bypass_pkt p)
{
    const struct bypass_pkt_meta *m = meta_at(d, p);

    return p < d->nd.frames && m->holders == HOLD_STACK && m->len >= ETH_HEADER && m->off < d->nd.stride &&
           m->len <= d->nd.stride - m->off && m->off >= d->tx_meta_len &&
           (!(m->flags & BYPASS_TX_CSUM) || (d->nd.caps & BYPASS_CAP_TX_CSUM));
}

static struct xdp_desc describe(const struct afxdp *d, bypass_pkt p, const struct bypass_pkt_meta *m)
{
    struct xdp_desc desc = {.addr = ((uint64_t)p << d->shift) + m->off, .len = m->len};

    if (m->flags & BYPASS_TX_CSUM) {
        const struct tx_metadata md = {.flags = TXMD_CHECKSUM, .csum_start = m->csum_start, .csum_offset = m->csum_off};

        memcpy(d->nd.mem + desc.addr - d->tx_meta_len, &md, sizeof md);
        desc.options = TX_METADATA_OPTION;
    }
    return desc;
}

static int afxdp_tx_burst(struct bypass_netdev *nd, const bypass_pkt *pkts, int n)
{
    struct afxdp *d = device(nd);
    struct afxdp_state *st = d->st;
    uint64_t touched = 0;
    int done = 0, err = 0;

    if (st->gone) {
        return -ENXIO;
    }
    for (; done < n; done++) {
        struct bypass_pkt_meta *m = meta_at(d, pkts[done]);
        uint32_t qi = pkts[done] < nd->frames && m->queue ? m->queue % nd->queues : 0;
        struct queue_state *qs = &st->queue[qi];

        if (!tx_valid(d, pkts[done])) {
            qs->n.tx_invalid++;
            err = -EINVAL;
            break;
        }
        if (ring_space(&d->queue[qi].tx, &qs->tx, 1) == 0) {
            qs->n.tx_full++;
            break;
        }
        *ring_desc(&d->queue[qi].tx, qs->tx.prod) = describe(d, pkts[done], m);
        ring_stage(&qs->tx);
        m->holders |= HOLD_DEV;
        qs->tx_frames++;
        qs->n.tx_packets++;
        qs->n.tx_bytes += m->len;
        touched |= 1ull << qi;
    }
    for (; touched; touched &= touched - 1) {
        uint32_t qi = (uint32_t)__builtin_ctzll(touched);

        ring_produce(&d->queue[qi].tx, &st->queue[qi].tx, 0);
    }
    umem_check(d, "tx_burst");
    return done ? done : err;
}

/* The device lets go of a frame that it transmitted. 1: the caller still holds it, it is in *done. */
static int tx_complete(struct afxdp *d, uint32_t frame, bypass_pkt *done)
{
    struct bypass_pkt_meta *m = meta_at(d, frame);

    m->holders &= (uint8_t)~HOLD_DEV;
    if (m->holders & HOLD_STACK) {
        *done = frame;
        return 1;
    }
    frame_to_pool(d, frame);
    return 0;
}

static int reap_queue(struct afxdp *d, uint32_t qi, bypass_pkt *done, int max)
{
    struct queue_state *qs = &d->st->queue[qi];
    const struct ring *comp = &d->queue[qi].comp;
    uint32_t n;
    int got = 0;

    while (got < max && (n = ring_avail(comp, &qs->comp, (uint32_t)(max - got))) > 0) {
        for (uint32_t i = 0; i < n; i++) {
            uint64_t frame = *ring_addr(comp, qs->comp.cons + i) >> d->shift;

            if (frame >= d->nd.frames || !(meta_at(d, (uint32_t)frame)->holders & HOLD_DEV)) {
                qs->n.completion_bad++;
                continue;
            }
            qs->tx_frames--;
            qs->n.tx_completed++;
            got += tx_complete(d, (uint32_t)frame, &done[got]);
        }
        ring_release(comp, &qs->comp, n);
    }
    return got;
}

/* After the interface is gone nothing completes any more: its frames are given back, max at a time. */
static int reap_abandoned(struct afxdp *d, bypass_pkt *done, int max)
{
    struct queue_state *qs = &d->st->queue[0]; /* device_gone() has gathered the count there */
    int got = 0;

    for (uint32_t f = 0; f < d->nd.frames && qs->tx_frames && got < max; f++) {
        if (meta_at(d, f)->holders & HOLD_DEV) {
            qs->tx_frames--;
            qs->n.tx_abandoned++;
            got += tx_complete(d, f, &done[got]);
        }
    }
    return got;
}

static int afxdp_reap(struct bypass_netdev *nd, bypass_pkt *done, int max)
{
    struct afxdp *d = device(nd);
    int got = 0;

    for (uint32_t qi = 0; qi < d->nd.queues && !d->st->gone; qi++) {
        if (d->st->queue[qi].tx_frames) {
            got += reap_queue(d, qi, done + got, max - got);
        }
    }
    if (d->st->gone) {
        got = reap_abandoned(d, done, max);
    }
    if (d->st->hungry) {
        feed_hungry(d);
    }
    umem_check(d, "reap");
    return got;
}

/* The kernel has unbound the sockets: it touches neither rings nor frames any more. */
void device_gone(struct afxdp *d)
{
    struct afxdp_state *st = d->st;

    if (st->gone) {
        return;
    }
    st->gone = 1;
    for (uint32_t qi = 1; qi < AFXDP_MAX_QUEUES; qi++) { /* those that this view does not serve too */
        st->queue[0].tx_frames += st->queue[qi].tx_frames;
        st->queue[qi].tx_frames = 0;
    }
}

/* ---- Kick -------------------------------------------------------------------------------------------------- */

/* Others may count at the same time: the embedder's lock is not held, if afxdp_defer(). */
static void count(uint64_t *n) { __atomic_fetch_add(n, 1, __ATOMIC_RELAXED); }

/* One system call for a queue with something to send. Counts what came of it. 0: it may go on; or what stops all
 * transmission, -ENETDOWN or -ENXIO. */
static int kick_once(struct afxdp *d, uint32_t qi)
{
    struct afxdp_counters *n = &d->st->queue[qi].n;
    int err = d->sys->wake_tx(d, qi);

    count(&n->kicks_tx);
    switch (err) {
    case 0:
        return 0;
    case -EAGAIN:
        count(&n->kick_again);
        return 0;
    case -EBUSY: /* the packet at fault is in the completion ring already: TCP's timers know what to do */
        count(&n->kick_busy);
        return 0;
    case -ENETDOWN:
        count(&n->kick_down);
        return err;
    case -ENXIO:
        count(&n->kick_gone);
        return err;
    default: /* ENOBUFS, ENOMEM: short of memory; the descriptors stay in the ring */
        count(&n->kick_failed);
        return 0;
    }
}

/* In copy mode a call sends 32 packets, or what XDP_MAX_TX_SKB_BUDGET says: calls again while that helps. */
static int kick_tx(struct afxdp *d, uint32_t qi)
{
    const struct ring *tx = &d->queue[qi].tx;
    uint32_t left = ring_left(tx);

    if (left == 0) {
        return 0;
    }
    if (!ring_needs_wakeup(tx)) {
        count(&d->st->queue[qi].n.kicks_saved);
        return 0;
    }
    for (int round = 0; round < KICK_ROUNDS && left; round++) {
        uint32_t before = left;
        int err = kick_once(d, qi);

        if (err) {
            return err;
        }
        left = ring_left(tx);
        if (left == before) {
            break;
        }
    }
    return left && ring_needs_wakeup(tx) ? -EAGAIN : 0;
}

static int worse(int a, int b)
{
    static const int order[] = {-ENXIO, -ENETDOWN, -EAGAIN};

    for (unsigned i = 0; i < sizeof order / sizeof *order; i++) {
        if (a == order[i] || b == order[i]) {
            return order[i];
        }
    }
    return 0;
}

static int afxdp_kick(struct bypass_netdev *nd)
{
    struct afxdp *d = device(nd);
    int err = 0;

    if (d->st->gone) {
        return -ENXIO;
    }
    if (d->st->hungry) {
        fill_rings(d);
    }
    ring_fence();
    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        if (ring_needs_wakeup(&d->queue[qi].fill)) {
            d->sys->wake_rx(d, qi);
            d->st->queue[qi].n.kicks_rx++;
        }
        if (d->st->queue[qi].tx_frames && d->defer) {
            d->owed |= 1ull << qi;
        } else if (d->st->queue[qi].tx_frames) {
            err = worse(err, kick_tx(d, qi));
        }
    }
    if (err == -ENXIO) {
        device_gone(d);
    }
    umem_check(d, "kick");
    return err;
}

void afxdp_defer(struct afxdp *d, int on) { d->defer = on != 0; }

uint64_t afxdp_owed(struct afxdp *d)
{
    uint64_t owed = d->owed;

    d->owed = 0;
    return owed;
}

int afxdp_kick_owed(struct afxdp *d, uint64_t queues)
{
    int err = 0;

    for (; queues; queues &= queues - 1) {
        err = worse(err, kick_tx(d, (uint32_t)__builtin_ctzll(queues)));
    }
    return err;
}

static int afxdp_wait_fd(struct bypass_netdev *nd) { return device(nd)->epoll_fd; }

const struct bypass_netdev_ops afxdp_ops = {
    .alloc = afxdp_alloc,
    .free = afxdp_free,
    .rx_burst = afxdp_rx_burst,
    .tx_burst = afxdp_tx_burst,
    .reap = afxdp_reap,
    .kick = afxdp_kick,
    .wait_fd = afxdp_wait_fd,
};
