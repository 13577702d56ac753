/* SPDX-License-Identifier: Apache-2.0 */
/*
 * port.c - the network device of a simulated wire: packet memory, the receive queue, completions, and
 * the device's own faults. What becomes of a frame that was sent is wire.c's and fault.c's business.
 *
 * A frame of the pool is in exactly one place: the free pool, the receive queue (HOLD_RX), the stack
 * (HOLD_STACK), and, as a second hold on a transmitted frame, the completion ring (HOLD_DEV).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "internal.h"

enum {
    DEFAULT_FRAMES = 16384,
    DEFAULT_TX_RING = 1024,
    DEFAULT_MTU = 1500,
    RX_SHARE = 4,   /* one frame in four is kept for reception, as a fill ring keeps them */
    HEADROOM = 256, /* as much as XDP leaves in front of a frame, so that both devices look alike */
    TAILROOM = 64,
};

static struct bypass_pkt_meta *meta_at(const struct port *p, bypass_pkt pkt)
{
    return (struct bypass_pkt_meta *)((uint8_t *)p->dev.meta + (size_t)pkt * p->dev.meta_stride);
}

/* What alloc may still hand out; frames that are kept for reception do not count. */
static void pool_count(struct port *p, int change)
{
    p->pool_free += (uint32_t)change;
    p->dev.free_frames = p->pool_free > p->rx_reserve ? p->pool_free - p->rx_reserve : 0;
}

static bypass_pkt pool_take(struct port *p)
{
    bypass_pkt pkt = BYPASS_PKT_NONE;
    if (p->free_listed) {
        pkt = p->free_list[--p->free_listed];
    } else if (p->bump < p->dev.frames) {
        pkt = p->bump++;
    }
    if (pkt != BYPASS_PKT_NONE) {
        pool_count(p, -1);
    }
    return pkt;
}

static void pool_put(struct port *p, bypass_pkt pkt)
{
    p->free_list[p->free_listed++] = pkt;
    pool_count(p, 1);
}

static int port_alloc(struct bypass_netdev *dev, bypass_pkt *out, int n)
{
    struct port *p = port_of(dev);
    if (prng_hit(&p->bad_prng, p->bad.alloc_fail_ppm)) {
        return 0;
    }
    int done = 0;
    for (; done < n; done++) {
        bypass_pkt pkt = dev->free_frames ? pool_take(p) : BYPASS_PKT_NONE;
        if (pkt == BYPASS_PKT_NONE) {
            break;
        }
        struct bypass_pkt_meta *m = meta_at(p, pkt);
        memset(m, 0, sizeof *m);
        m->off = dev->headroom;
        m->holders = BYPASS_HOLD_STACK;
        out[done] = pkt;
    }
    return done;
}

static void port_free(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct port *p = port_of(dev);
    for (int i = 0; i < n; i++) {
        if (pkts[i] >= dev->frames || !(meta_at(p, pkts[i])->holders & BYPASS_HOLD_STACK)) {
            p->stats.misuse++;
            continue;
        }
        struct bypass_pkt_meta *m = meta_at(p, pkts[i]);
        m->holders &= (uint8_t)~BYPASS_HOLD_STACK;
        if (!m->holders) {
            pool_put(p, pkts[i]);
        }
    }
}

static int port_rx_burst(struct bypass_netdev *dev, bypass_pkt *out, int max)
{
    struct port *p = port_of(dev);
    int n = 0;
    if (p->bad.gone) {
        return -ENXIO;
    }
    for (; n < max && p->rxq_head != p->rxq_tail; n++) {
        out[n] = p->rxq[p->rxq_head++ & p->rxq_mask];
        meta_at(p, out[n])->holders = BYPASS_HOLD_STACK;
    }
    return n;
}

/* Whether the frame may be sent: held by the stack, not by the device, and inside its memory. */
static bool tx_valid(const struct port *p, bypass_pkt pkt)
{
    if (pkt >= p->dev.frames) {
        return false;
    }
    const struct bypass_pkt_meta *m = meta_at(p, pkt);
    return m->holders == BYPASS_HOLD_STACK && m->len >= ETH_HEADER && (uint32_t)m->off + m->len <= p->dev.stride;
}

static int port_tx_burst(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct port *p = port_of(dev);
    if (p->bad.gone) {
        return -ENXIO;
    }
    if (n > 0 && prng_hit(&p->bad_prng, p->bad.tx_short_ppm)) {
        n = (int)prng_below(&p->bad_prng, (uint64_t)n);
    }
    int i = 0;
    for (; i < n && p->done_tail - p->done_head < p->done_cap; i++) {
        if (!tx_valid(p, pkts[i])) {
            p->stats.misuse++;
            continue;
        }
        struct bypass_pkt_meta *m = meta_at(p, pkts[i]);
        m->holders |= BYPASS_HOLD_DEV;
        struct outgoing out = {
            .data = port_bytes(p, pkts[i], m->off),
            .len = m->len,
            .csum_start = m->csum_start,
            .csum_off = m->csum_off,
            .complete_csum = m->flags & BYPASS_TX_CSUM && dev->caps & BYPASS_CAP_TX_CSUM,
        };
        wire_send(p, &out);
        p->done[p->done_tail++ & p->done_mask] =
            (struct completion){.time_ns = p->sim->now_ns + p->bad.complete_ns, .pkt = pkts[i]};
    }
    return i;
}

static int port_reap(struct bypass_netdev *dev, bypass_pkt *done, int max)
{
    struct port *p = port_of(dev);
    int n = 0;
    while (n < max && p->done_tail - p->done_head > p->bad.keep) {
        const struct completion *c = &p->done[p->done_head & p->done_mask];
        if (c->time_ns > p->sim->now_ns) {
            break;
        }
        p->done_head++;
        struct bypass_pkt_meta *m = meta_at(p, c->pkt);
        m->holders &= (uint8_t)~BYPASS_HOLD_DEV;
        if (m->holders) {
            done[n++] = c->pkt;
        } else {
            pool_put(p, c->pkt);
        }
    }
    return n;
}

static int port_kick(struct bypass_netdev *dev)
{
    struct port *p = port_of(dev);
    if (p->bad.gone) {
        return -ENXIO;
    }
    if (p->bad.down) {
        return -ENETDOWN;
    }
    return prng_hit(&p->bad_prng, p->bad.kick_again_ppm) ? -EAGAIN : 0;
}

static int port_wait_fd(struct bypass_netdev *dev)
{
    (void)dev;
    return -ENOTSUP; /* time is virtual: there is nothing to sleep on */
}

static const struct bypass_netdev_ops port_ops = {
    .alloc = port_alloc,
    .free = port_free,
    .rx_burst = port_rx_burst,
    .tx_burst = port_tx_burst,
    .reap = port_reap,
    .kick = port_kick,
    .wait_fd = port_wait_fd,
};

bool port_is(const struct bypass_netdev *dev) { return dev && dev->ops == &port_ops; }

/* ---- Arrival ------------------------------------------------------------------------------------ */

/* Spreads flows over the queues, both directions of a flow alike: addresses and ports summed. */
static uint16_t rx_queue(const struct port *p, const uint8_t *data, uint32_t len)
{
    if (p->dev.queues < 2 || len < ETH_HEADER + 24) {
        return 0;
    }
    uint32_t sum = 0;
    for (uint32_t i = ETH_HEADER + 12; i < ETH_HEADER + 24; i += 2) {
        sum += (uint32_t)data[i] << 8 | data[i + 1];
    }
    return (uint16_t)(sum % p->dev.queues);
}

bypass_pkt port_rx_begin(struct port *p, const uint8_t *data, uint32_t len)
{
    if (p->bad.down || p->bad.gone) {
        p->stats.down_dropped++;
        return BYPASS_PKT_NONE;
    }
    if (len > p->dev.stride - p->dev.headroom) {
        p->stats.oversize++;
        return BYPASS_PKT_NONE;
    }
    bypass_pkt pkt = pool_take(p);
    if (pkt == BYPASS_PKT_NONE) {
        p->stats.no_frame++;
        if (p->capture) {
            capture_add(p->capture, p->sim->now_ns, p->capture_interface, CAPTURE_RX | CAPTURE_NO_FRAME, data, len);
        }
        return BYPASS_PKT_NONE;
    }
    memcpy(port_bytes(p, pkt, p->dev.headroom), data, len);
    struct bypass_pkt_meta *m = meta_at(p, pkt);
    memset(m, 0, sizeof *m);
    m->off = p->dev.headroom;
    m->len = (uint16_t)len;
    m->holders = BYPASS_HOLD_RX;
    return pkt;
}

void port_rx_end(struct port *p, bypass_pkt pkt, uint8_t rx_flags)
{
    struct bypass_pkt_meta *m = meta_at(p, pkt);
    const uint8_t *data = port_bytes(p, pkt, m->off);
    m->flags = p->dev.caps & BYPASS_CAP_RX_CSUM ? rx_flags : 0;
    m->queue = rx_queue(p, data, m->len);
    p->rx_time_ns[pkt] = p->sim->now_ns;
    p->rxq[p->rxq_tail++ & p->rxq_mask] = pkt;
    p->stats.rx_frames++;
    p->stats.rx_bytes += m->len;
    if (p->capture) {
        capture_add(p->capture, p->sim->now_ns, p->capture_interface, CAPTURE_RX, data, m->len);
    }
}

/* ---- Raw ports ---------------------------------------------------------------------------------- */

int sim_port_send(struct bypass_netdev *dev, const void *frame, size_t len)
{
    struct port *p = port_of(dev);
    if (len < ETH_HEADER || len > dev->stride - dev->headroom) {
        return -EMSGSIZE;
    }
    wire_send(p, &(struct outgoing){.data = frame, .len = (uint32_t)len});
    return 0;
}

int64_t sim_port_recv(struct bypass_netdev *dev, void *buf, size_t n, uint64_t *time_ns)
{
    struct port *p = port_of(dev);
    bypass_pkt pkt;
    if (port_rx_burst(dev, &pkt, 1) < 1) {
        return -EAGAIN;
    }
    const struct bypass_pkt_meta *m = meta_at(p, pkt);
    int64_t len = m->len;
    memcpy(buf, port_bytes(p, pkt, m->off), (size_t)len < n ? (size_t)len : n);
    *time_ns = p->rx_time_ns[pkt];
    port_free(dev, &pkt, 1);
    return len;
}

/* ---- Creation ----------------------------------------------------------------------------------- */

static uint32_t pow2_at_least(uint32_t n)
{
    uint32_t p = 1;
    while (p < n) {
        p <<= 1;
    }
    return p;
}

static void *carve(uint8_t **next, size_t bytes)
{
    void *here = *next;
    *next += (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    return here;
}

/* Points all arrays into memory; with memory NULL it only measures. */
static size_t port_layout(struct port *p, uint8_t *memory)
{
    uint8_t *next = memory;
    uint32_t frames = p->dev.frames, cap = p->flights_cap;
    p->dev.mem = carve(&next, (size_t)frames * p->dev.stride);
    p->dev.meta = carve(&next, (size_t)frames * p->dev.meta_stride);
    p->free_list = carve(&next, frames * sizeof *p->free_list);
    p->rx_time_ns = carve(&next, frames * sizeof *p->rx_time_ns);
    p->rxq = carve(&next, (p->rxq_mask + 1ul) * sizeof *p->rxq);
    p->done = carve(&next, (p->done_mask + 1ul) * sizeof *p->done);
    p->flights = carve(&next, (p->flights_mask + 1ul) * sizeof *p->flights);
    p->slots = carve(&next, (size_t)cap * p->slot_stride);
    p->slot_free = carve(&next, cap * sizeof *p->slot_free);
    return (size_t)(next - memory);
}

/* An odd number of cache lines from frame to frame: headers of neighbouring frames then fall into
 * different cache sets. */
static uint32_t frame_stride(uint32_t mtu)
{
    uint32_t lines = (HEADROOM + ETH_HEADER + mtu + TAILROOM + CACHE_LINE - 1) / CACHE_LINE;
    return (lines | 1) * CACHE_LINE;
}

static int port_map(struct port *p)
{
    p->memory_bytes = port_layout(p, NULL);
    p->memory = mmap(NULL, p->memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p->memory == MAP_FAILED) {
        return -ENOMEM;
    }
    port_layout(p, p->memory);
    return 0;
}

static void port_configure(struct port *p, const struct sim_port_config *cfg)
{
    struct bypass_netdev *dev = &p->dev;
    dev->ops = &port_ops;
    dev->mtu = cfg->mtu ? cfg->mtu : DEFAULT_MTU;
    dev->frames = cfg->frames ? cfg->frames : DEFAULT_FRAMES;
    p->rx_reserve = dev->frames / RX_SHARE;
    pool_count(p, (int)dev->frames);
    dev->stride = frame_stride(dev->mtu);
    dev->meta_stride = (sizeof(struct bypass_pkt_meta) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    dev->caps = cfg->caps;
    dev->queues = cfg->queues ? cfg->queues : 1;
    dev->headroom = HEADROOM;
    memcpy(dev->mac, cfg->mac, sizeof dev->mac);
    p->flags = cfg->flags;
    p->rxq_mask = pow2_at_least(dev->frames) - 1; /* holds every frame, so it cannot overflow */
    p->done_cap = cfg->tx_ring ? cfg->tx_ring : DEFAULT_TX_RING;
    p->done_mask = pow2_at_least(p->done_cap) - 1;
    p->flights_cap = cfg->in_flight ? cfg->in_flight : DEFAULT_FRAMES;
    p->flights_mask = pow2_at_least(p->flights_cap) - 1;
    p->slot_stride = (dev->stride - HEADROOM + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
}

struct bypass_netdev *sim_port_create(struct sim_wire *wire, const struct sim_port_config *cfg)
{
    enum { LIMIT = 1 << 26 };
    if (cfg->frames > LIMIT || cfg->in_flight > LIMIT || cfg->tx_ring > LIMIT || cfg->mtu > 65000) {
        return NULL;
    }
    struct port *p = calloc(1, sizeof *p);
    if (!p) {
        return NULL;
    }
    port_configure(p, cfg);
    if (port_map(p)) {
        free(p);
        return NULL;
    }
    struct sim *sim = wire->sim;
    p->sim = sim;
    p->wire = wire;
    p->index = sim->port_count++;
    prng_seed(&p->prng, sim->seed, 2ull * p->index);
    prng_seed(&p->bad_prng, sim->seed, 2ull * p->index + 1);
    /* Appended, so that ports are served in the order of their creation. */
    struct port **last = &wire->ports;
    while (*last) {
        last = &(*last)->next;
    }
    *last = p;
    for (last = &sim->ports; *last;) {
        last = &(*last)->all;
    }
    *last = p;
    return &p->dev;
}

void port_release(struct port *p)
{
    munmap(p->memory, p->memory_bytes);
    free(p->script);
    free(p);
}

void sim_port_device_faults(struct bypass_netdev *dev, const struct sim_device_faults *faults)
{
    port_of(dev)->bad = *faults;
}

void sim_port_stats(const struct bypass_netdev *dev, struct sim_port_stats *out)
{
    const struct port *p = port_of_const(dev);
    *out = p->stats;
    out->in_flight = p->flights_tail - p->flights_head;
    out->misuse += p->slot_bump - p->slot_listed != out->in_flight; /* each frame on the wire has one slot */
    out->rx_waiting = port_rx_waiting(p);
    out->unreaped = p->done_tail - p->done_head;
    /* A frame that the stack keeps after sending it counts with the stack's, not with the unreaped. */
    uint32_t only_dev = 0;
    for (uint32_t i = p->done_head; i != p->done_tail; i++) {
        only_dev += meta_at(p, p->done[i & p->done_mask].pkt)->holders == BYPASS_HOLD_DEV;
    }
    out->held = dev->frames - p->pool_free - out->rx_waiting - only_dev;
}

void sim_port_capture(struct bypass_netdev *dev, struct capture *cap, uint16_t interface)
{
    struct port *p = port_of(dev);
    p->capture = cap;
    p->capture_interface = interface;
}
