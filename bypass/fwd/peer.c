/* SPDX-License-Identifier: Apache-2.0 */
/* peer.c - see peer.h. Every access to the application's memory stands in this file. */
#include "peer.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "layout.h"

/* What the application may change under our eyes is read once, into a register. */
#define READ_ONCE(x) (*(const volatile __typeof__(x) *)&(x))

int peer_attach(struct peer *p, void *mem, size_t size, const struct port_config *cfg, int doorbell)
{
    struct port_places at;
    uint8_t *base = mem;

    if (!port_config_valid(cfg) || ((uintptr_t)mem & (PORT_PAGE - 1))) {
        return -EINVAL;
    }
    at = port_places(cfg);
    if (size < at.end) {
        return -ENOMEM;
    }
    *p = (struct peer){.cfg = *cfg,
                       .sh = mem,
                       .rx = (struct port_rx_slot *)(base + at.rx),
                       .tx = (struct port_tx_slot *)(base + at.tx),
                       .frames = base + at.frames,
                       .frame_size = port_frame_size(cfg),
                       .doorbell = doorbell};
    p->rx_posted = p->rx_done = READ_ONCE(p->sh->rx_done); /* any number will do: they are only compared, and masked */
    p->tx_posted = p->tx_done = READ_ONCE(p->sh->tx_done);
    peer_sleeps(p, 0);
    return 0;
}

/* Slots between a position of ours and the application's, of a ring with `size`. */
static uint32_t distance(struct peer *p, const uint32_t *theirs, uint32_t ours, uint32_t size, uint32_t *seen)
{
    uint32_t posted = __atomic_load_n(theirs, __ATOMIC_ACQUIRE); /* A */

    if (posted - ours > size) {
        p->cut = 1;
        return 0;
    }
    *seen = posted;
    return posted - ours;
}

/* ---- To the application ------------------------------------------------------------------------------------ */

int peer_deliver(struct peer *p, const uint8_t *frame, const struct bypass_pkt_meta *m)
{
    struct port_rx_slot *slot = &p->rx[p->rx_done & (p->cfg.rx_ring - 1)];
    uint32_t to;

    if (p->cut || m->len > p->frame_size - PORT_HEADROOM ||
        (p->rx_posted == p->rx_done &&
         distance(p, &p->sh->rx_posted, p->rx_done, p->cfg.rx_ring, &p->rx_posted) == 0)) {
        p->n.rx_full++;
        return 0;
    }
    to = READ_ONCE(slot->frame);
    p->rx_done++;
    p->unpublished++;
    if (to >= p->cfg.frames) {
        slot->len = 0; /* nothing is in it */
        p->n.rx_bad_slot++;
        return 0;
    }
    memcpy(p->frames + (size_t)to * p->frame_size + PORT_HEADROOM, frame, m->len);
    slot->off = PORT_HEADROOM;
    slot->len = m->len;
    slot->queue = m->queue;
    slot->flags = m->flags & (BYPASS_RX_CSUM_OK | BYPASS_RX_VERDICT);
    slot->entry = m->entry;
    slot->rule = m->rule;
    slot->hash = m->hash;
    p->n.rx_packets++;
    p->n.rx_bytes += m->len;
    return 1;
}

static void ring_doorbell(struct peer *p)
{
    uint32_t was = PORT_ASLEEP;

    if (!__atomic_compare_exchange_n(&p->sh->app_sleeps, &was, PORT_RUNG, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
        return;
    }
    p->n.rings++;
    if (p->doorbell >= 0 && send(p->doorbell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
        p->n.rings_failed++; /* it plays with its end */
    }
}

void peer_publish(struct peer *p)
{
    if (!p->unpublished) {
        return;
    }
    p->unpublished = 0;
    __atomic_store_n(&p->sh->rx_done, p->rx_done, __ATOMIC_RELEASE); /* B */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);                         /* C */
    if (__atomic_load_n(&p->sh->app_sleeps, __ATOMIC_RELAXED) == PORT_ASLEEP) {
        ring_doorbell(p);
    }
}

/* ---- From the application ---------------------------------------------------------------------------------- */

uint32_t peer_tx_avail(struct peer *p, uint32_t max)
{
    uint32_t n = p->tx_posted - p->tx_done;

    if (p->cut) {
        return 0;
    }
    if (n < max) {
        n = distance(p, &p->sh->tx_posted, p->tx_done, p->cfg.tx_ring, &p->tx_posted);
    }
    return n < max ? n : max;
}

int peer_tx_take(struct peer *p, uint8_t *to, uint32_t room, struct bypass_pkt_meta *m)
{
    const struct port_tx_slot *slot = &p->tx[p->tx_done++ & (p->cfg.tx_ring - 1)];
    uint32_t frame = READ_ONCE(slot->frame), off = READ_ONCE(slot->off), len = READ_ONCE(slot->len);

    if (frame >= p->cfg.frames || len < PORT_ETH || len > room || len > p->frame_size || off > p->frame_size - len) {
        p->n.tx_bad_slot++;
        return 0;
    }
    m->len = (uint16_t)len;
    m->queue = READ_ONCE(slot->queue) % p->cfg.queues;
    m->flags = READ_ONCE(slot->flags) & BYPASS_TX_CSUM;
    m->csum_start = READ_ONCE(slot->csum_start);
    m->csum_off = READ_ONCE(slot->csum_off);
    memcpy(to, p->frames + (size_t)frame * p->frame_size + off, len);
    p->n.tx_packets++;
    p->n.tx_bytes += len;
    return 1;
}

void peer_tx_publish(struct peer *p) { __atomic_store_n(&p->sh->tx_done, p->tx_done, __ATOMIC_RELEASE); /* B */ }

void peer_sleeps(struct peer *p, int on)
{
    __atomic_store_n(&p->sh->fwd_sleeps, (uint32_t)on, __ATOMIC_RELAXED);
    if (on) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST); /* C */
    }
}

void peer_about(struct peer *p, const uint8_t mac[6], uint16_t mtu)
{
    __atomic_store_n(&p->sh->about, port_about(mac, mtu), __ATOMIC_RELAXED);
}

void peer_link(struct peer *p, int link)
{
    if (__atomic_exchange_n(&p->sh->link, (uint32_t)link, __ATOMIC_SEQ_CST) != (uint32_t)link) { /* also C */
        ring_doorbell(p);
    }
}
