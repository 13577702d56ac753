/* SPDX-License-Identifier: Apache-2.0 */
/* forward.c - see forward.h. */
#include "forward.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { RETRY_NS = 10000000, UDP = 17, TCP = 6 };

static struct bypass_pkt_meta *meta_at(const struct bypass_netdev *dev, bypass_pkt pkt)
{
    return (struct bypass_pkt_meta *)((uint8_t *)dev->meta + (size_t)pkt * dev->meta_stride);
}

static uint8_t *data_at(const struct bypass_netdev *dev, bypass_pkt pkt)
{
    return dev->mem + (size_t)pkt * dev->stride + meta_at(dev, pkt)->off;
}

/* ---- Making ------------------------------------------------------------------------------------------------ */

int forward_init(struct forwarder *f, uint64_t seed)
{
    memset(f, 0, sizeof *f);
    return leases_init(&f->check.leases, seed);
}

void forward_free(struct forwarder *f)
{
    for (uint32_t i = 0; i < FWD_PORTS_MAX; i++) {
        free(f->port[i]);
    }
    leases_free(&f->check.leases);
}

void forward_device(struct forwarder *f, struct bypass_netdev *dev)
{
    if (f->dev) { /* what it had is given back by whoever closes it */
        f->n.tx_dropped += f->pending;
        f->pending = 0;
    }
    f->dev = dev;
    if (dev) {
        forward_about(f);
    }
}

struct forward_port *forward_port_find(const struct forwarder *f, uint32_t app)
{
    for (uint32_t i = 0; i < f->ports; i++) {
        if (f->port[i] && f->port[i]->app == app) {
            return f->port[i];
        }
    }
    return NULL;
}

int forward_port_add(struct forwarder *f, const struct fwd_port_add *about, void *mem, size_t size, int doorbell)
{
    struct forward_port *p;
    uint32_t i = 0;
    int err;

    if (!about->app || about->allow & ~(uint32_t)(FWD_ALLOW_VLAN | FWD_ALLOW_GROUPS | FWD_ALLOW_PING)) {
        return -EINVAL;
    }
    if (forward_port_find(f, about->app)) {
        return -EEXIST;
    }
    while (i < FWD_PORTS_MAX && f->port[i]) {
        i++;
    }
    if (i == FWD_PORTS_MAX) {
        return -ENOSPC;
    }
    p = calloc(1, sizeof *p);
    err = p ? peer_attach(&p->peer, mem, size, &about->cfg, doorbell) : -ENOMEM;
    if (err) {
        free(p);
        return err;
    }
    p->app = about->app;
    p->sender.owner = i + 1;
    p->sender.allow = about->allow;
    peer_link(&p->peer, (int)f->link);
    if (f->dev) {
        peer_about(&p->peer, f->check.mac, f->check.mtu);
    }
    f->port[i] = p;
    f->ports = f->ports > i + 1 ? f->ports : i + 1;
    return 0;
}

int forward_port_del(struct forwarder *f, uint32_t app)
{
    struct forward_port *p = forward_port_find(f, app);

    if (!p) {
        return -ENOENT;
    }
    if (p->leases) { /* a walk through the whole table */
        leases_remove_all(&f->check.leases, p->sender.owner);
    }
    for (uint32_t i = 0; i < FWD_ENTRIES_MAX; i++) {
        f->entry[i] = f->entry[i] == p->sender.owner ? 0 : f->entry[i];
    }
    f->port[p->sender.owner - 1] = NULL;
    while (f->ports && !f->port[f->ports - 1]) {
        f->ports--;
    }
    free(p);
    return 0;
}

/* ---- What belongs to whom ---------------------------------------------------------------------------------- */

static bool ipv4_of(const struct bypass_endpoint *e, uint32_t *addr)
{
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff}, any[16];

    memcpy(addr, e->addr.b + 12, sizeof *addr);
    return memcmp(e->addr.b, mapped, sizeof mapped) == 0 || memcmp(e->addr.b, any, sizeof any) == 0;
}

int forward_lease(struct forwarder *f, const struct fwd_lease *lease, int add)
{
    struct forward_port *p = forward_port_find(f, lease->app);
    int err;
    struct lease_key key = {.proto = (uint8_t)lease->proto,
                            .local_port = lease->local.port,
                            .remote_port = lease->remote.port,
                            .block = lease->flags & FWD_LEASE_BLOCK ? 1 : 0};

    if (!p) {
        return -ENOENT;
    }
    if (!ipv4_of(&lease->local, &key.local) || !ipv4_of(&lease->remote, &key.remote)) {
        return -EAFNOSUPPORT;
    }
    if ((lease->proto != TCP && lease->proto != UDP) || lease->flags & ~(uint32_t)FWD_LEASE_BLOCK) {
        return -EINVAL;
    }
    err = add ? leases_add(&f->check.leases, &key, p->sender.owner)
              : leases_remove(&f->check.leases, &key, p->sender.owner);
    if (err == 0) {
        p->leases += add ? 1 : -1u;
    }
    return err;
}

int forward_entry(struct forwarder *f, uint32_t entry, uint32_t app)
{
    const struct forward_port *p = app ? forward_port_find(f, app) : NULL;

    if (entry >= FWD_ENTRIES_MAX) {
        return -EINVAL;
    }
    if (app && !p) {
        return -ENOENT;
    }
    f->entry[entry] = p ? (uint16_t)p->sender.owner : 0;
    return 0;
}

int forward_rate(struct forwarder *f, const struct fwd_rate *rate, uint64_t now_ns)
{
    struct forward_port *p = forward_port_find(f, rate->app);

    if (!p) {
        return -ENOENT;
    }
    bucket_set(&p->bytes, rate->bytes, rate->bytes_burst, now_ns);
    bucket_set(&p->packets, rate->packets, rate->packets_burst, now_ns);
    return 0;
}

void forward_about(struct forwarder *f)
{
    memcpy(f->check.mac, f->dev->mac, sizeof f->check.mac);
    f->check.mtu = f->dev->mtu;
    for (uint32_t i = 0; i < f->ports; i++) {
        if (f->port[i]) {
            peer_about(&f->port[i]->peer, f->check.mac, f->dev->mtu);
        }
    }
}

void forward_link(struct forwarder *f, uint32_t state)
{
    f->link = state;
    for (uint32_t i = 0; i < f->ports; i++) {
        if (f->port[i]) {
            peer_link(&f->port[i]->peer, (int)state);
        }
    }
}

/* ---- To applications --------------------------------------------------------------------------------------- */

static struct forward_port *owner_of(const struct forwarder *f, const struct bypass_pkt_meta *m, const uint8_t *frame)
{
    uint32_t owner;

    if (m->flags & BYPASS_RX_VERDICT) {
        owner = m->entry < FWD_ENTRIES_MAX ? f->entry[m->entry] : 0;
    } else {
        owner = check_owner(&f->check, frame, m->len); /* a driver without room for the verdict */
    }
    return owner ? f->port[owner - 1] : NULL;
}

static uint32_t rx_round(struct forwarder *f)
{
    bypass_pkt pkts[FORWARD_RX];
    struct forward_port *touched[FORWARD_RX];
    uint32_t touched_n = 0;
    int n = f->dev->ops->rx_burst(f->dev, pkts, FORWARD_RX);

    if (n <= 0) {
        return 0;
    }
    for (int i = 0; i < n; i++) {
        const struct bypass_pkt_meta *m = meta_at(f->dev, pkts[i]);
        const uint8_t *frame = data_at(f->dev, pkts[i]);
        struct forward_port *p = owner_of(f, m, frame);

        f->n.rx_packets++;
        f->n.rx_bytes += m->len;
        if (!p) {
            f->n.rx_nobody++;
        } else if (peer_deliver(&p->peer, frame, m) && (!touched_n || touched[touched_n - 1] != p)) {
            touched[touched_n++] = p;
        }
    }
    for (uint32_t i = 0; i < touched_n; i++) {
        peer_publish(&touched[i]->peer); /* a second time: nothing */
    }
    f->dev->ops->free(f->dev, pkts, n);
    return (uint32_t)n;
}

/* ---- From applications ------------------------------------------------------------------------------------- */

/* Hands what was checked to the device. false: it is full. */
static bool flush(struct forwarder *f)
{
    struct bypass_netdev *dev = f->dev;

    while (f->pending) {
        int n = dev->ops->tx_burst(dev, f->pkt, (int)f->pending);

        if (n == 0) {
            return false;
        }
        if (n < 0) { /* refused for good: the first of them, or all when the interface is gone */
            n = n == -ENXIO ? (int)f->pending : 1;
            f->n.tx_dropped += (uint32_t)n;
        } else {
            f->n.tx_packets += (uint32_t)n;
        }
        dev->ops->free(dev, f->pkt, n);
        f->pending -= (uint32_t)n;
        memmove(f->pkt, f->pkt + n, f->pending * sizeof *f->pkt);
    }
    return true;
}

static bool may_send(struct forward_port *p, uint64_t now_ns)
{
    uint64_t bytes_ns = bucket_ready(&p->bytes), packets_ns = bucket_ready(&p->packets);
    uint64_t ready_ns = bytes_ns > packets_ns ? bytes_ns : packets_ns;

    if (ready_ns <= now_ns) {
        p->ready_ns = 0;
        return true;
    }
    p->tx_limited += p->ready_ns != ready_ns;
    p->ready_ns = ready_ns;
    return false;
}

/* One frame: copied first, then checked, so that the application cannot change what was found right. */
static bool take_one(struct forwarder *f, struct forward_port *p, bypass_pkt pkt, uint64_t now_ns)
{
    struct bypass_pkt_meta *m = meta_at(f->dev, pkt);
    enum fwd_refusal why;

    if (!peer_tx_take(&p->peer, data_at(f->dev, pkt), f->dev->stride - m->off, m)) {
        bucket_take(&p->packets, 1, now_ns);
        return false;
    }
    bucket_take(&p->bytes, m->len, now_ns);
    bucket_take(&p->packets, 1, now_ns);
    if ((m->flags & BYPASS_TX_CSUM) && !(f->dev->caps & BYPASS_CAP_TX_CSUM)) {
        p->refused[FWD_REFUSED_OFFLOAD]++;
        return false;
    }
    why = check_send(&f->check, &p->sender, data_at(f->dev, pkt), m, now_ns);
    if (why != FWD_OK) {
        p->refused[why]++;
        return false;
    }
    p->tx_sent++;
    f->n.tx_bytes += m->len;
    return true;
}

static uint32_t tx_port(struct forwarder *f, struct forward_port *p, uint64_t now_ns)
{
    uint32_t room = FORWARD_PENDING - f->pending;
    uint32_t n = peer_tx_avail(&p->peer, room < FORWARD_TX ? room : FORWARD_TX), taken = 0;

    for (; taken < n && may_send(p, now_ns); taken++) {
        bypass_pkt pkt;

        if (f->dev->ops->alloc(f->dev, &pkt, 1) != 1) {
            f->n.no_frames++;
            f->again = 1;
            break;
        }
        if (take_one(f, p, pkt, now_ns)) {
            f->pkt[f->pending++] = pkt;
        } else {
            f->dev->ops->free(f->dev, &pkt, 1);
        }
    }
    if (taken) {
        peer_tx_publish(&p->peer);
    }
    return taken;
}

static uint32_t tx_round(struct forwarder *f, uint64_t now_ns)
{
    uint32_t moved = 0, i = 0;

    for (; i < f->ports && flush(f); i++) {
        struct forward_port *p = f->port[(f->first + i) % f->ports];

        if (p) {
            moved += tx_port(f, p, now_ns);
        }
    }
    flush(f);
    f->first = f->ports ? (f->first + i + (i == f->ports)) % f->ports : 0; /* goes on where it stopped */
    return moved;
}

/* ---- Rounds ------------------------------------------------------------------------------------------------ */

static void kick(struct forwarder *f)
{
    int err = f->dev->ops->kick(f->dev);

    if (err == -EAGAIN) {
        f->again = 1;
    } else if (err == -ENETDOWN && f->link == 0) {
        forward_link(f, 1);
    } else if (err == -ENXIO && f->link != 2) {
        forward_link(f, 2);
    }
}

uint32_t forward_round(struct forwarder *f, uint64_t now_ns)
{
    bypass_pkt done[64];
    uint32_t moved;

    f->n.rounds++;
    f->again = 0;
    if (!f->dev) {
        return 0;
    }
    while (f->dev->ops->reap(f->dev, done, 64) == 64) {} /* nothing of it is held here any more */
    moved = rx_round(f);
    moved += tx_round(f, now_ns);
    kick(f);
    return moved;
}

uint32_t forward_sleep(struct forwarder *f, uint64_t now_ns, uint64_t *until_ns)
{
    *until_ns = UINT64_MAX;
    if (!f->dev || f->link == 2) {
        return 0;
    }
    if (f->again) {
        return 1;
    }
    if (f->pending) { /* it fits when the device has sent something: no event tells that */
        if (f->link == 0) {
            return 1;
        }
        *until_ns = now_ns + RETRY_NS;
    }
    for (uint32_t i = 0; i < f->ports; i++) {
        struct forward_port *p = f->port[i];

        if (!p) {
            continue;
        }
        if (p->ready_ns > now_ns) { /* it has something: it need not say so */
            *until_ns = p->ready_ns < *until_ns ? p->ready_ns : *until_ns;
            continue;
        }
        peer_sleeps(&p->peer, 1);
        if (!f->pending && peer_tx_avail(&p->peer, 1)) {
            return 1;
        }
    }
    f->n.sleeps++;
    return 0;
}

void forward_wake(struct forwarder *f)
{
    for (uint32_t i = 0; i < f->ports; i++) {
        if (f->port[i]) {
            peer_sleeps(&f->port[i]->peer, 0);
        }
    }
}

void forward_port_stats(const struct forward_port *p, struct fwd_port_stats *out)
{
    const struct peer_counters *n = &p->peer.n;

    *out = (struct fwd_port_stats){.app = p->app,
                                   .cut = p->peer.cut,
                                   .leases = p->leases,
                                   .rx_packets = n->rx_packets,
                                   .rx_bytes = n->rx_bytes,
                                   .rx_full = n->rx_full,
                                   .rx_bad_slot = n->rx_bad_slot,
                                   .tx_packets = n->tx_packets,
                                   .tx_bytes = n->tx_bytes,
                                   .tx_sent = p->tx_sent,
                                   .tx_bad_slot = n->tx_bad_slot,
                                   .tx_limited = p->tx_limited,
                                   .rings = n->rings,
                                   .rings_failed = n->rings_failed};
    memcpy(out->refused, p->refused, sizeof out->refused);
}
