/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stats.c - what a port became, what it and its device count, and where every frame is.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <rte_dev.h>

#include "eth/port.h"

/* ---- What it became ---------------------------------------------------------------------------------------- */
void port_about(struct dpdk_port *d, struct dpdk_about *out)
{
    struct rte_eth_link link = {0};

    memset(out, 0, sizeof *out);
    snprintf(out->driver, sizeof out->driver, "%s", d->info.driver_name ? d->info.driver_name : "");
    snprintf(out->device, sizeof out->device, "%s", d->name);
    memcpy(out->mac, d->nd.mac, sizeof out->mac);
    out->mtu = d->nd.mtu;
    out->queues = d->nd.queues;
    out->rx_ring = d->rx_ring;
    out->tx_ring = d->tx_ring;
    out->frames = d->nd.frames;
    out->frame_size = d->cfg.frame_size;
    out->stride = d->nd.stride;
    out->if_index = d->if_index;
    out->rx_offered = d->info.rx_offload_capa;
    out->tx_offered = d->info.tx_offload_capa;
    out->rx_used = d->conf.rxmode.offloads;
    out->tx_used = d->conf.txmode.offloads;
    out->numa = -1;
    out->link_up = link_look(d, true) == 0;
    if (!d->gone) {
        out->numa = rte_eth_dev_socket_id(d->id);
        out->speed_mbps = rte_eth_link_get_nowait(d->id, &link) < 0 ? 0 : link.link_speed;
    }
    link_members(d, out);
    wake_about(d, out->wake, sizeof out->wake);
}

const char *port_offload_name(int tx, uint64_t bit)
{
    return tx ? rte_eth_dev_tx_offload_name(bit) : rte_eth_dev_rx_offload_name(bit);
}

/* ---- Counters ----------------------------------------------------------------------------------------------- */
int port_counters(struct dpdk_port *d, uint32_t queue, struct dpdk_counters *out)
{
    if (queue >= d->nd.queues) {
        return -EINVAL;
    }
    *out = d->queue[queue].n;
    return 0;
}

int port_stats(struct dpdk_port *d, struct dpdk_stats *out)
{
    struct rte_eth_stats s;
    int err = d->gone ? -ENXIO : rte_eth_stats_get(d->id, &s);

    memset(out, 0, sizeof *out);
    if (err < 0) {
        return err;
    }
    *out = (struct dpdk_stats){.ipackets = s.ipackets,
                               .opackets = s.opackets,
                               .ibytes = s.ibytes,
                               .obytes = s.obytes,
                               .imissed = s.imissed,
                               .ierrors = s.ierrors,
                               .oerrors = s.oerrors,
                               .rx_nombuf = s.rx_nombuf};
    return 0;
}

static int read_xstats(struct dpdk_port *d, struct dpdk_xstat *out, uint32_t max, uint32_t n)
{
    struct rte_eth_xstat_name *names = calloc(n, sizeof *names);
    struct rte_eth_xstat *values = calloc(n, sizeof *values);
    int got = names && values ? rte_eth_xstats_get_names(d->id, names, n) : -ENOMEM;

    if (got >= 0) {
        got = rte_eth_xstats_get(d->id, values, n);
    }
    for (int i = 0; i < got && (uint32_t)i < max && (uint32_t)i < n; i++) {
        snprintf(out[i].name, sizeof out[i].name, "%s", values[i].id < n ? names[values[i].id].name : "");
        out[i].value = values[i].value;
    }
    free(names);
    free(values);
    return got;
}

int port_xstats(struct dpdk_port *d, struct dpdk_xstat *out, uint32_t max)
{
    int n = d->gone ? -ENXIO : rte_eth_xstats_get(d->id, NULL, 0);

    return n <= 0 || max == 0 ? n : read_xstats(d, out, max, (uint32_t)n);
}

/* ---- Audit -------------------------------------------------------------------------------------------------- */
int port_audit(struct dpdk_port *d, struct frame_audit *out)
{
    struct pool *p = &d->pool;
    uint32_t tx = 0;

    memset(out, 0, sizeof *out);
    rte_spinlock_lock(&p->lock); /* drivers' threads may free meanwhile */
    out->bad_free = d->bad_free + p->bad_free;
    for (uint32_t i = 0; i < p->count; i++) { /* marks what the free list names, each once */
        frames_listed(mbuf_meta(p->list[i]), out);
    }
    frames_count(&d->nd, out);
    rte_spinlock_unlock(&p->lock);
    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        tx += d->queue[qi].fifo.tail - d->queue[qi].fifo.head;
    }
    return out->misplaced || out->tx + out->stack_tx != tx ? -EIO : 0;
}

#ifdef BYPASS_DEBUG
/* After every operation: at least the sums; the whole walk where it is cheap. */
void port_check(struct dpdk_port *d, const char *where)
{
    struct frame_audit audit;

    if (d->pool.count > d->pool.frames || (d->pool.frames <= 1024 && port_audit(d, &audit) != 0)) {
        fprintf(stderr, "dpdk: frames are not conserved after %s\n", where);
        abort();
    }
}
#endif
