/* SPDX-License-Identifier: Apache-2.0 */
/*
 * reclaim.c - the device of a process that was killed while it used it. What it did with frames of its own is nobody's
 * business any more; what counts is where the kernel has frames, and that is known without the kernel's help:
 *
 *   The positions that we published in the rings (producer of fill and tx, consumer of rx and completion) are right at
 *   any moment, for publishing is one store. Their differences are the numbers of frames with the kernel.
 *   meta.holders says which frames these are, up to the operation that was cut short, in the order of its steps:
 *     fill, tx         entry written, cached position advanced, holder noted | published: entries between the published
 *                      and the cached position are not with the kernel, whatever the holders say
 *     rx, completion   holder changed | released: entries from the released position on are still the ring's
 *
 * First all holders are put right, which may be done any number of times; then positions and lists are written from
 * them. So a second death in the middle of this does no harm.
 */
#include <errno.h>

#include "internal.h"

enum { HOLD_DEV = BYPASS_HOLD_DEV, HOLD_RX = BYPASS_HOLD_RX };

static uint32_t published(const uint32_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

static struct bypass_pkt_meta *meta_of(const struct afxdp *d, uint64_t addr)
{
    return addr >> d->shift < d->nd.frames ? meta_at(d, (uint32_t)(addr >> d->shift)) : NULL;
}

/* Entries that were written and never published: their frames are not with the kernel. */
static int take_back(struct afxdp *d, const struct ring *r, const struct ring_pos *pos, bool descs, uint8_t holder)
{
    uint32_t at = published(r->producer);

    if (pos->prod - at > r->size) {
        return -EBADMSG;
    }
    for (; at != pos->prod; at++) {
        struct bypass_pkt_meta *m = meta_of(d, descs ? ring_desc(r, at)->addr : *ring_addr(r, at));

        if (m) {
            m->holders &= (uint8_t)~holder;
        }
    }
    return 0;
}

/* Entries that were read and never released: they will be read again. */
static int read_again(struct afxdp *d, const struct ring *r, bool descs, uint8_t holder)
{
    uint32_t at = published(r->consumer), end = published(r->producer);

    if (end - at > r->size) {
        return -EBADMSG;
    }
    for (; at != end; at++) {
        struct bypass_pkt_meta *m = meta_of(d, descs ? ring_desc(r, at)->addr : *ring_addr(r, at));

        if (m) {
            m->holders = holder;
        }
    }
    return 0;
}

static int holders_of_queue(struct afxdp *d, uint32_t qi)
{
    const struct queue *q = &d->queue[qi];
    const struct queue_state *qs = &d->st->queue[qi];
    int err = take_back(d, &q->fill, &qs->fill, false, HOLD_RX);

    err = err ? err : take_back(d, &q->tx, &qs->tx, true, HOLD_DEV);
    err = err ? err : read_again(d, &q->rx, true, HOLD_RX);
    return err ? err : read_again(d, &q->comp, false, HOLD_DEV);
}

/* Frames with the device for a purpose; the caller's have become free. */
static int count_held(struct afxdp *d, uint32_t *rx, uint32_t *tx)
{
    *rx = *tx = 0;
    for (uint32_t f = 0; f < d->nd.frames; f++) {
        struct bypass_pkt_meta *m = meta_at(d, f);

        m->holders &= d->st->gone ? HOLD_RX : HOLD_RX | HOLD_DEV; /* gone: nothing is transmitted any more */
        if (m->holders == (HOLD_RX | HOLD_DEV)) {
            return -EBADMSG;
        }
        *rx += m->holders == HOLD_RX;
        *tx += m->holders == HOLD_DEV;
    }
    return 0;
}

/* Frames with the kernel by the positions of a queue; of a queue that this view does not serve, by its books. */
static void count_published(const struct afxdp *d, uint32_t qi, uint32_t *rx, uint32_t *tx)
{
    const struct queue *q = &d->queue[qi];
    const struct queue_state *qs = &d->st->queue[qi];

    *rx = qi < d->nd.queues ? *q->fill.producer - *q->rx.consumer : qs->rx_frames;
    *tx = qi < d->nd.queues ? *q->tx.producer - *q->comp.consumer : qs->tx_frames;
    if (d->st->gone) {
        *tx = 0;
    }
}

static int check_counts(struct afxdp *d)
{
    uint32_t held_rx, held_tx, rx = 0, tx = 0;
    int err = count_held(d, &held_rx, &held_tx);

    for (uint32_t qi = 0; qi < AFXDP_MAX_QUEUES; qi++) {
        uint32_t r, t;

        count_published(d, qi, &r, &t);
        rx += r;
        tx += t;
    }
    if (err == 0 && (rx != held_rx || tx != held_tx)) {
        return d->nd.queues < d->st->cfg.queue_count ? -EXDEV : -EBADMSG;
    }
    return err;
}

static void restore_queue(struct afxdp *d, uint32_t qi)
{
    const struct queue *q = &d->queue[qi];
    struct queue_state *qs = &d->st->queue[qi];
    uint32_t rx, tx;

    count_published(d, qi, &rx, &tx);
    qs->rx_frames = rx;
    qs->tx_frames = tx;
    if (qi < d->nd.queues) { /* what the other side did is looked up when it is needed */
        qs->fill = (struct ring_pos){.prod = *q->fill.producer, .cons = *q->fill.producer - q->fill.size};
        qs->tx = (struct ring_pos){.prod = *q->tx.producer, .cons = *q->tx.producer - q->tx.size};
        qs->rx = (struct ring_pos){.prod = *q->rx.consumer, .cons = *q->rx.consumer};
        qs->comp = (struct ring_pos){.prod = *q->comp.consumer, .cons = *q->comp.consumer};
    }
}

static void restore_pool(struct afxdp *d)
{
    d->st->free_count = 0;
    for (uint32_t f = d->nd.frames; f-- > 0;) {
        if (meta_at(d, f)->holders == 0) {
            frame_to_pool(d, f);
        }
    }
    d->st->hungry = ~0ull >> (64 - d->st->cfg.queue_count); /* those that are not will find that out */
    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        fill_refill(d, qi);
    }
}

int afxdp_reclaim(struct afxdp *d)
{
    uint32_t queues = d->st->cfg.queue_count;
    int err = queues >= d->nd.queues && queues <= AFXDP_MAX_QUEUES ? 0 : -EBADMSG;

    for (uint32_t qi = 0; err == 0 && qi < d->nd.queues; qi++) {
        err = holders_of_queue(d, qi);
    }
    err = err ? err : check_counts(d);
    if (err) {
        return err;
    }
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    for (uint32_t qi = 0; qi < AFXDP_MAX_QUEUES; qi++) {
        restore_queue(d, qi);
    }
    restore_pool(d);
    umem_check(d, "reclaim");
    return 0;
}
