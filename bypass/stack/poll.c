/* SPDX-License-Identifier: Apache-2.0 */
/*
 * poll.c - the one loop: completed transmissions, received frames in phases over a batch, timers, and the
 * transmit queue. Everything the stack does happens inside bypass_poll() or a socket call.
 */
#include <errno.h>

#include "net.h"
#include "tcp.h"

static void reap(struct bypass_stack *s)
{
    bypass_pkt done[RX_BATCH];
    int n;
    do /* frames that connections still hold stay theirs; the device has cleared its mark */
        n = s->dev->ops->reap(s->dev, done, RX_BATCH);
    while (n == RX_BATCH);
}

/* Segments: what is fetched so far ahead arrives while those before it are worked on. */
enum { CONN_AHEAD = 12, HANDLE_AHEAD = 3 };

static void rx_batch(struct bypass_stack *s, bypass_pkt *pkts, int n)
{
    struct rx_flow flows[RX_BATCH];
    struct rx_info ri;
    STAT_ADD(s, rx_frames, (uint64_t)n);
    tcp_fast_prefetch(s, pkts, flows, n);
    for (int i = 0; n > 1 && i < n && i < CONN_AHEAD; i++)
        tcp_fast_prefetch_conn(s, &flows[i]);
    for (int i = 0; i < n; i++) {
        if (i + CONN_AHEAD < n)
            tcp_fast_prefetch_conn(s, &flows[i + CONN_AHEAD]);
        if (i + HANDLE_AHEAD < n)
            tcp_fast_prefetch_handle(s, &flows[i + HANDLE_AHEAD]);
        STAT_ADD(s, rx_bytes, pkt_meta(s, pkts[i])->len);
        int taken = likely(flows[i].plain) ? tcp_fast_in(s, pkts + i, flows + i, n - i) : 0;
        if (taken > 0) {
            i += taken - 1;
            continue;
        }
        ri.has_hash = flows[i].plain;
        ri.flow_hash = flows[i].hash;
        bypass_pkt p = pkts[i];
        if (eth_in(s, &p, &ri))
            tcp_in(s, p, &ri);
    }
}

int bypass_poll(struct bypass_stack *s, uint64_t now_ns, int budget)
{
    bypass_pkt pkts[RX_BATCH];
    int done = 0, n = 0;
    if (unlikely(s->attached) && !tcp_cc_complete(s))
        return -EINVAL; /* connections may use algorithms that this process does not have */
    bypass_now(s, now_ns);
    reap(s);
    while (done < budget) {
        int want = budget - done < RX_BATCH ? budget - done : RX_BATCH;
        n = s->dev->ops->rx_burst(s->dev, pkts, want);
        if (n <= 0)
            break;
        rx_batch(s, pkts, n);
        done += n;
        if (n < want)
            break;
    }
    tcp_timers(s);
    net_timers(s);
    tcp_output_pending(s);
    const struct core *c = core(s);
    int err = c->txq_head != c->txq_tail || c->kick_again ? bypass_flush(s) : 0;
    if (n < 0)
        return n;
    return err < 0 ? err : done;
}

uint64_t bypass_deadline(const struct bypass_stack *s)
{
    const struct core *c = core(s);
    if (c->kick_again ? c->kick_again == EAGAIN : c->txq_head != c->txq_tail)
        return 0; /* the ring was full, or the device stopped in the middle: at once; not while its link is down */
    return min_u64(tcp_deadline(s), net_deadline(s));
}

/* ---- Transmit queue ------------------------------------------------------------------------------ */
static bypass_pkt *txq_slot(struct bypass_stack *s, uint32_t i)
{
    struct core *c = core(s);
    return (bypass_pkt *)at(s, c->txq_off) + (i & (c->txq_cap - 1));
}

static void tx_done(struct bypass_stack *s, uint32_t n)
{
    struct core *c = core(s);
    const bypass_pkt *ring = at(s, c->txq_off);
    for (; n > 0; n--) {
        bypass_pkt p = ring[c->txq_head++ & (c->txq_cap - 1)];
        struct bypass_pkt_meta *m = pkt_meta(s, p);
        m->seg_flags &= (uint16_t)~IN_TXQ;
        if (!(m->seg_flags & IN_TCP))
            pkt_free(s, p);
    }
}

int bypass_flush(struct bypass_stack *s)
{
    struct core *c = core(s);
    struct bypass_netdev *dev = s->dev;
    bool sent = false;
    while (c->txq_head != c->txq_tail) {
        uint32_t n = min_u32(c->txq_tail - c->txq_head, c->txq_cap - (c->txq_head & (c->txq_cap - 1)));
        n = min_u32(n, RX_BATCH);
        int done = dev->ops->tx_burst(dev, txq_slot(s, c->txq_head), (int)n);
        if (done > 0) {
            tx_done(s, (uint32_t)done);
            sent = true;
        }
        if (done < (int)n) {
            if (done == -EINVAL) { /* refused for good: whoever waits behind it must not wait for ever */
                tx_done(s, 1);
                continue;
            }
            if (done == -ENXIO) { /* the device is gone for good: as on a wire that nobody hears, time decides */
                tx_drop_all(s);
                c->kick_again = 0;
                return done;
            }
            STAT(s, tx_ring_full);
            if (done < 0)
                return done;
            break;
        }
    }
    /* Frames that the device could not send yet (EAGAIN, link down) stay in its ring, and TCP does not send them
     * again while they are there: it has to be told until it takes them. */
    int err = sent || c->txq_head != c->txq_tail || c->kick_again ? dev->ops->kick(dev) : 0;
    c->kick_again = (uint16_t)(err < 0 ? -err : 0);
    return err == -EAGAIN ? 0 : err;
}

void tx_drop_all(struct bypass_stack *s) { tx_done(s, core(s)->txq_tail - core(s)->txq_head); }
