/* SPDX-License-Identifier: Apache-2.0 */
/*
 * netdev.c - the per-packet path: bypass_netdev_ops over ethdev's bursts. Nothing is copied, and no system call is
 * made but to sleep and wake (wake.c).
 *
 * Completion: a frame goes to the driver with two references to its mbuf; the driver drops one when it is done, whenever
 * that is (many free a descriptor's mbuf only when they reuse the descriptor), and reap() finds one left. Frames of a queue
 * mostly complete in the order in which they were given; below a bonding device each member has its own order.
 */
#include <errno.h>
#include <string.h>

#include <rte_cycles.h>
#include <rte_errno.h>

#include "eth/port.h"

enum {
    HOLD_STACK = BYPASS_HOLD_STACK,
    HOLD_DEV = BYPASS_HOLD_DEV,
    TAG = 4,
    IP_LEAST = 20,
    IP_MOST = 60,
    BURST = 64,
    TSO_REFUSALS = 16, /* large packets in a row that a driver did not take, until it gets none any more */
    TSO_WAITS = 16,    /* times that one which takes them is believed to be full */
    STUCK_REAPS = 16,  /* reaps that find the oldest frame with the driver, until the others are looked at too */
};

static struct dpdk_port *port_of(struct bypass_netdev *nd) { return (struct dpdk_port *)nd; }
static void count_free(struct dpdk_port *d) { d->nd.free_frames = pool_free_frames(&d->pool); }

/* ---- The pool --------------------------------------------------------------------------------------------- */
static int eth_alloc(struct bypass_netdev *nd, bypass_pkt *out, int n)
{
    struct dpdk_port *d = port_of(nd);
    struct pool *p = &d->pool;
    int got = 0;

    rte_spinlock_lock(&p->lock);
    while (got < n && p->count > p->reserve) {
        struct rte_mbuf *mbuf = p->list[--p->count];
        struct bypass_pkt_meta *m = mbuf_meta(mbuf);

        m->holders = HOLD_STACK;
        m->off = PACKET_AT;
        m->len = 0;
        m->queue = 0;
        m->flags = 0;
        out[got++] = mbuf_frame(p, mbuf);
    }
    rte_spinlock_unlock(&p->lock);
    count_free(d);
    port_check(d, "alloc");
    return got;
}

/* Of frames that nobody holds any more. */
static void to_pool(struct pool *p, struct rte_mbuf **mbufs, uint32_t n)
{
    rte_spinlock_lock(&p->lock);
    memcpy(p->list + p->count, mbufs, n * sizeof *mbufs);
    p->count += n;
    rte_spinlock_unlock(&p->lock);
}

static void eth_free(struct bypass_netdev *nd, const bypass_pkt *pkts, int n)
{
    struct dpdk_port *d = port_of(nd);
    struct pool *p = &d->pool;

    rte_spinlock_lock(&p->lock); /* once: mostly they are few, and nobody else wants it */
    for (int i = 0; i < n; i++) {
        struct rte_mbuf *mbuf = pkts[i] < nd->frames ? frame_mbuf(p, pkts[i]) : NULL;
        struct bypass_pkt_meta *m = mbuf ? mbuf_meta(mbuf) : NULL;

        if (!m || !(m->holders & HOLD_STACK)) {
            d->bad_free++;
            continue;
        }
        m->holders &= (uint8_t)~HOLD_STACK;
        if (m->holders == 0) {
            p->list[p->count++] = mbuf;
        }
    }
    rte_spinlock_unlock(&p->lock);
    count_free(d);
    port_check(d, "free");
}

/* ---- Reception ------------------------------------------------------------------------------------------- */

/* A frame of ours with the same packet: it came in several mbufs, or in one that another has too (a ring between two
 * ports hands over what was sent, which its sender may send again) or that is another pool's. NULL: it does not fit, or
 * no frame is free. */
static struct rte_mbuf *one_frame(struct dpdk_port *d, struct queue *q, struct rte_mbuf *mbuf)
{
    struct rte_mbuf *copy = mbuf->pkt_len <= d->nd.stride - PACKET_AT ? rte_pktmbuf_alloc(d->pool.mp) : NULL;
    uint8_t *to = copy ? rte_pktmbuf_mtod(copy, uint8_t *) : NULL;

    if (!copy) {
        return NULL;
    }
    q->n.rx_linearized += mbuf->nb_segs > 1;
    copy->ol_flags = mbuf->ol_flags;
    copy->pkt_len = mbuf->pkt_len;
    copy->data_len = (uint16_t)mbuf->pkt_len;
    for (const struct rte_mbuf *m = mbuf; m; m = m->next) {
        memcpy(to, rte_pktmbuf_mtod(m, const void *), m->data_len);
        to += m->data_len;
    }
    rte_pktmbuf_free(mbuf);
    return copy;
}

static uint8_t rx_flags(const struct dpdk_port *d, struct queue *q, const struct rte_mbuf *mbuf)
{
    uint64_t l4 = mbuf->ol_flags & RTE_MBUF_F_RX_L4_CKSUM_MASK;

    if (l4 == RTE_MBUF_F_RX_L4_CKSUM_BAD) {
        q->n.rx_csum_bad++; /* the stack computes it itself, and has the last word */
    }
    return d->csum_trust || l4 == RTE_MBUF_F_RX_L4_CKSUM_GOOD || l4 == RTE_MBUF_F_RX_L4_CKSUM_NONE ? BYPASS_RX_CSUM_OK
                                                                                                   : 0;
}

/* Takes one received mbuf over. false: it was of no use, and is the driver's or the pool's again. */
static bool rx_accept(struct dpdk_port *d, uint32_t qi, struct rte_mbuf *mbuf, bypass_pkt *out)
{
    struct queue *q = &d->queue[qi];
    bool own = mbuf->pool == d->pool.mp && mbuf->nb_segs == 1 && rte_mbuf_refcnt_read(mbuf) == 1;
    struct rte_mbuf *frame = likely(own) ? mbuf : one_frame(d, q, mbuf);
    struct bypass_pkt_meta *m;

    if (unlikely(!frame || frame->data_len < ETH_HEADER)) {
        q->n.rx_bad++;
        rte_pktmbuf_free(frame ? frame : mbuf);
        return false;
    }
    mbuf = frame;
    m = mbuf_meta(mbuf);
    m->holders = HOLD_STACK;
    m->off = (uint16_t)(BUF_AT + mbuf->data_off);
    m->len = mbuf->data_len;
    m->queue = (uint16_t)qi;
    m->flags = rx_flags(d, q, mbuf);
    m->entry = m->rule = m->hash = 0;
    q->n.rx_packets++;
    q->n.rx_bytes += mbuf->data_len;
    *out = mbuf_frame(&d->pool, mbuf);
    return true;
}

int rx_queue(struct dpdk_port *d, uint32_t qi, bypass_pkt *out, int max)
{
    struct rte_mbuf *mbufs[BURST];
    int got = 0, n;

    do {
        int want = max - got < BURST ? max - got : BURST;

        n = rte_eth_rx_burst(d->id, (uint16_t)qi, mbufs, (uint16_t)want);
        for (int i = 0; i < n; i++) {
            if (i + 4 < n) {
                rte_prefetch0(mbufs[i + 4]);
                rte_prefetch0(mbuf_meta(mbufs[i + 4]));
            }
            got += rx_accept(d, qi, mbufs[i], &out[got]);
        }
        n = n == want ? n : 0;
    } while (n && got < max);
    return got;
}

static int eth_rx_burst(struct bypass_netdev *nd, bypass_pkt *out, int max)
{
    struct dpdk_port *d = port_of(nd);
    int got;

    if (unlikely(link_look(d, false) == -ENXIO)) {
        return -ENXIO;
    }
    wake_before(d);
    got = wake_early(d, out, max);
    for (uint32_t i = 0; i < nd->queues && got < max; i++) {
        uint32_t qi = d->next_queue;

        got += rx_queue(d, qi, out + got, max - got);
        d->next_queue = qi + 1 < nd->queues ? qi + 1 : 0;
    }
    if (got == 0) {
        d->queue[0].n.rx_idle++;
        wake_nothing(d);
    } else {
        wake_found(d);
    }
    count_free(d);
    port_check(d, "rx_burst");
    return got;
}

/* ---- Transmission ------------------------------------------------------------------------------------------ */

/* Drivers compute with what is said of a packet, and do not look whether it can be: it has room for the headers in front of
 * the transport's, tagged or not, and for the checksum, TCP's or UDP's. */
static bool sum_within(const struct bypass_pkt_meta *m)
{
    return m->csum_start >= ETH_HEADER + IP_LEAST && m->csum_start <= ETH_HEADER + TAG + IP_MOST &&
           (m->csum_off == 16 || m->csum_off == 6) && m->csum_start + m->csum_off + 2u <= m->len;
}

static bool tx_valid(const struct dpdk_port *d, bypass_pkt p)
{
    const struct bypass_pkt_meta *m;

    if (p >= d->nd.frames) {
        return false;
    }
    m = mbuf_meta(frame_mbuf(&d->pool, p));
    return m->holders == HOLD_STACK && m->len >= ETH_HEADER && m->off >= BUF_AT && m->off < d->nd.stride &&
           m->len <= d->nd.stride - m->off && (!(m->flags & BYPASS_TX_CSUM) || (d->tx_csum && sum_within(m)));
}

/* What the driver needs to know to complete the checksum; the pseudo-header's sum is in its place already. */
static void tx_checksum(struct rte_mbuf *mbuf, const struct bypass_pkt_meta *m)
{
    const uint8_t *type = rte_pktmbuf_mtod(mbuf, const uint8_t *) + 12;
    uint32_t l2 = ETH_HEADER;

    if (type[0] == 0x81 && type[1] == 0) {
        l2 += 4;
        type += 4;
    }
    mbuf->ol_flags = type[0] == 0x08 ? RTE_MBUF_F_TX_IPV4 : RTE_MBUF_F_TX_IPV6;
    mbuf->ol_flags |= m->csum_off == 16 ? RTE_MBUF_F_TX_TCP_CKSUM : RTE_MBUF_F_TX_UDP_CKSUM;
    mbuf->tx_offload = 0;
    mbuf->l2_len = l2;
    mbuf->l3_len = (uint16_t)(m->csum_start - l2);
}

static struct rte_mbuf *describe(struct dpdk_port *d, bypass_pkt p)
{
    struct rte_mbuf *mbuf = frame_mbuf(&d->pool, p);
    struct bypass_pkt_meta *m = mbuf_meta(mbuf);

    mbuf->data_off = (uint16_t)(m->off - BUF_AT);
    mbuf->data_len = m->len;
    mbuf->pkt_len = m->len;
    mbuf->ol_flags = 0;
    if (m->flags & BYPASS_TX_CSUM) {
        tx_checksum(mbuf, m);
    }
    rte_mbuf_refcnt_set(mbuf, 2);
    m->holders |= HOLD_DEV;
    return mbuf;
}

/* The driver has no room for it. */
static void take_back(struct rte_mbuf *mbuf)
{
    rte_mbuf_refcnt_set(mbuf, 1);
    mbuf_meta(mbuf)->holders &= (uint8_t)~HOLD_DEV;
}

static uint32_t queue_of(const struct dpdk_port *d, bypass_pkt p)
{
    uint16_t queue = mbuf_meta(frame_mbuf(&d->pool, p))->queue;

    return queue < d->nd.queues ? queue : queue % d->nd.queues;
}

/* Valid frames for that queue, at most BURST, become what the driver gets. Their number. */
static int describe_run(struct dpdk_port *d, uint32_t qi, const bypass_pkt *pkts, int n, struct rte_mbuf **mbufs)
{
    int run = 0;

    n = n < BURST ? n : BURST;
    while (run < n && tx_valid(d, pkts[run]) && queue_of(d, pkts[run]) == qi) {
        mbufs[run] = describe(d, pkts[run]);
        run++;
    }
    return run;
}

/* As many packets as the driver takes. *ready: those with which nothing is wrong; *err: what is wrong with the next. */
static int give(struct dpdk_port *d, uint32_t qi, struct rte_mbuf **mbufs, int n, int *ready, int *err)
{
    *ready = n;
    *err = 0;
    if (d->tx_csum) { /* some drivers have to put something into the packet for it */
        *ready = rte_eth_tx_prepare(d->id, (uint16_t)qi, mbufs, (uint16_t)n);
        *err = *ready < n && (rte_errno == EINVAL || rte_errno == ENOTSUP) ? -EINVAL : 0;
    }
    return *ready ? rte_eth_tx_burst(d->id, (uint16_t)qi, mbufs, (uint16_t)*ready) : 0;
}

/* The driver has the first n of these frames; those behind them, up to all, it has no room for. */
static void note_sent(struct dpdk_port *d, struct queue *q, const bypass_pkt *pkts, int n, int all)
{
    struct tx_fifo *f = &q->fifo;

    for (int i = 0; i < n; i++) {
        q->n.tx_bytes += mbuf_meta(frame_mbuf(&d->pool, pkts[i]))->len;
        f->frame[f->tail++ & f->mask] = pkts[i];
    }
    q->n.tx_packets += (uint64_t)n;
    for (int i = n; i < all; i++) {
        take_back(frame_mbuf(&d->pool, pkts[i]));
    }
}

/* n described frames for one queue, a packet each. The number that the driver took; *err: what is wrong with the next. */
static int tx_small(struct dpdk_port *d, uint32_t qi, const bypass_pkt *pkts, struct rte_mbuf **mbufs, int n, int *err)
{
    struct queue *q = &d->queue[qi];
    int ready, sent = give(d, qi, mbufs, n, &ready, err);

    note_sent(d, q, pkts, sent, n);
    q->n.tx_full += sent < ready;
    q->n.tx_invalid += *err != 0;
    return sent;
}

/* The driver took nothing that begins with a large packet, of `first` frames. It is full: a large one needs a descriptor for
 * each piece, and small ones put into what room there is would only keep it so. Or it refuses it for reasons of its own
 * (net_tap: segments that with headers exceed the IP MTU), as it does when it takes more small ones at the same moment:
 * traffic goes on with those, and so it stays when it never takes a large one. */
static int large_refused(struct dpdk_port *d, uint32_t qi, const bypass_pkt *pkts, int n, int first, int *err)
{
    struct queue *q = &d->queue[qi];
    struct rte_mbuf *mbufs[BURST];
    int sent;

    if (q->n.tso_packets && !*err && ++q->tso_waits < TSO_WAITS) {
        q->n.tx_full++;
        return 0;
    }
    q->tso_waits = 0;
    describe_run(d, qi, pkts, n, mbufs);
    sent = tx_small(d, qi, pkts, mbufs, n, err);
    if (sent >= first && ++q->tso_refused == TSO_REFUSALS) {
        d->tso_pieces = 0;
    }
    return sent;
}

/* As tx_small(), for a device that cuts up large packets. */
static int tx_joined(struct dpdk_port *d, uint32_t qi, const bypass_pkt *pkts, struct rte_mbuf **mbufs, int n, int *err)
{
    struct queue *q = &d->queue[qi];
    struct tso_packet packets[BURST];
    int packed = tso_join(d, mbufs, n, packets), ready, sent = give(d, qi, mbufs, packed, &ready, err), taken = 0;

    for (int i = 0; i < sent; i++) {
        if (packets[i].frames > 1) {
            q->n.tso_packets++;
            q->n.tso_segments += (uint64_t)packets[i].frames;
            q->tso_waits = q->tso_refused = 0;
        }
        taken += packets[i].frames;
    }
    for (int i = sent; i < packed; i++) {
        tso_take_back(mbufs[i], &packets[i]);
    }
    note_sent(d, q, pkts, taken, n);
    if (sent == 0 && packets[0].frames > 1) {
        return large_refused(d, qi, pkts, n, packets[0].frames, err);
    }
    q->n.tx_full += sent < ready;
    q->n.tx_invalid += *err != 0;
    return taken;
}

static int eth_tx_burst(struct bypass_netdev *nd, const bypass_pkt *pkts, int n)
{
    struct dpdk_port *d = port_of(nd);
    struct rte_mbuf *mbufs[BURST];
    int done = 0, err = 0, run = 0, sent = 0;

    if (d->gone) {
        return -ENXIO;
    }
    while (done < n && !err && sent == run) {
        uint32_t qi = pkts[done] < nd->frames ? queue_of(d, pkts[done]) : 0;

        run = describe_run(d, qi, pkts + done, n - done, mbufs);
        if (run == 0) {
            d->queue[qi].n.tx_invalid++;
            err = -EINVAL;
            break;
        }
        sent = (d->tso_pieces && run > 1 ? tx_joined : tx_small)(d, qi, pkts + done, mbufs, run, &err);
        done += sent;
    }
    port_check(d, "tx_burst");
    return done ? done : err;
}

/* ---- Completion -------------------------------------------------------------------------------------------- */
struct reaper {
    struct dpdk_port *port;
    bypass_pkt *done;
    int got, max;
    struct rte_mbuf *back[BURST]; /* on their way to the pool */
    uint32_t count;
};

static void flush(struct reaper *r)
{
    if (r->count) {
        to_pool(&r->port->pool, r->back, r->count);
    }
    r->count = 0;
}

/* The driver is done with a frame. */
static void complete(struct reaper *r, struct queue *q, bypass_pkt p, struct rte_mbuf *mbuf)
{
    struct bypass_pkt_meta *m = mbuf_meta(mbuf);

    mbuf->next = NULL; /* it may have been a piece of a chain */
    mbuf->nb_segs = 1;
    m->holders &= (uint8_t)~HOLD_DEV;
    q->n.tx_completed++;
    if (m->holders & HOLD_STACK) {
        r->done[r->got++] = p;
        return;
    }
    r->back[r->count++] = mbuf;
    if (r->count == BURST) {
        flush(r);
    }
}

/* In any order: a member of a bonding device, or a link that is down, keeps the oldest frames while others are through. */
static void reap_all(struct reaper *r, struct queue *q)
{
    struct tx_fifo *f = &q->fifo;
    uint32_t keep = f->head;

    for (uint32_t at = f->head; at != f->tail; at++) {
        bypass_pkt p = f->frame[at & f->mask];
        struct rte_mbuf *mbuf = frame_mbuf(&r->port->pool, p);

        if (rte_mbuf_refcnt_read(mbuf) == 1 && r->got < r->max) {
            complete(r, q, p, mbuf);
        } else {
            f->frame[keep++ & f->mask] = p;
        }
    }
    f->tail = keep;
}

static void reap_queue(struct reaper *r, struct queue *q)
{
    struct tx_fifo *f = &q->fifo;
    uint32_t before = f->head;

    while (f->head != f->tail && r->got < r->max) {
        bypass_pkt p = f->frame[f->head & f->mask];
        struct rte_mbuf *mbuf = frame_mbuf(&r->port->pool, p);

        if (rte_mbuf_refcnt_read(mbuf) != 1) {
            break;
        }
        f->head++;
        complete(r, q, p, mbuf);
    }
    f->stuck = f->head == before && f->head != f->tail ? f->stuck + 1 : 0;
}

static int eth_reap(struct bypass_netdev *nd, bypass_pkt *done, int max)
{
    struct dpdk_port *d = port_of(nd);
    struct reaper r = {.port = d, .done = done, .max = max};

    for (uint32_t qi = 0; qi < nd->queues; qi++) {
        struct queue *q = &d->queue[qi];

        reap_queue(&r, q);
        if (q->fifo.stuck >= STUCK_REAPS) {
            q->fifo.stuck = 0;
            if (!d->gone) {
                rte_eth_tx_done_cleanup(d->id, (uint16_t)qi, 0); /* few drivers have it; the others free on reuse */
            }
            reap_all(&r, q);
        }
    }
    flush(&r);
    count_free(d);
    port_check(d, "reap");
    return r.got;
}

uint32_t tx_settle(struct dpdk_port *d)
{
    uint32_t left = 0;

    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        struct queue *q = &d->queue[qi];
        bypass_pkt done[BURST];
        struct reaper r = {.port = d, .done = done, .max = BURST};

        if (d->started) {
            rte_eth_tx_done_cleanup(d->id, (uint16_t)qi, 0);
        }
        do { /* what the stack holds too is told to nobody: it has gone, or learns it by the next reap of nothing */
            r.got = 0;
            reap_all(&r, q);
        } while (r.got == BURST);
        flush(&r);
        left += q->fifo.tail - q->fifo.head;
    }
    count_free(d);
    return left;
}

/* ---- The rest ---------------------------------------------------------------------------------------------- */
static int eth_kick(struct bypass_netdev *nd)
{
    struct dpdk_port *d = port_of(nd);

    return link_look(d, false);
}

static int eth_wait_fd(struct bypass_netdev *nd) { return port_of(nd)->wake.epoll; }
static int eth_sleep(struct bypass_netdev *nd) { return wake_arm(port_of(nd)); }

const struct bypass_netdev_ops eth_ops = {
    .alloc = eth_alloc,
    .free = eth_free,
    .rx_burst = eth_rx_burst,
    .tx_burst = eth_tx_burst,
    .reap = eth_reap,
    .kick = eth_kick,
    .wait_fd = eth_wait_fd,
    .sleep = eth_sleep,
};
