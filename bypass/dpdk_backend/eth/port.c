/* SPDX-License-Identifier: Apache-2.0 */
/*
 * port.c - opens a port: takes the device (device.c), configures queues and offloads within its limits, gives it a
 * pool and starts it; and closes it so that nothing is left. Each failure is one sentence that says what to do.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <rte_cycles.h>
#include <rte_random.h>

#include "eth/port.h"

enum {
    MIN_FRAMES = 64,
    MAX_FRAMES = 1 << 22,
    MIN_MTU = 68,
    DEFAULT_RING = 1024,
    DEFAULT_IDLE_US = 100,
    AF_PACKET_HEADER = 96 /* the kernel's, in front of a packet in the ring (tpacket2_hdr, alignment) */
};

/* ---- What is asked for ------------------------------------------------------------------------------------- */
static int check_config(const struct dpdk_config *c, struct dpdk_error *error)
{
    bool size = c->frame_size == 2048 || c->frame_size == 4096 || c->frame_size == 8192 || c->frame_size == 16384;

    if (memchr(c->device, 0, sizeof c->device) == NULL || !c->device[0]) {
        return complain(error, EINVAL, "a DPDK port needs a device, such as net_af_packet0,iface=eth1 or 0000:03:00.0");
    }
    if (c->queues > DPDK_MAX_QUEUES) {
        return complain(error, EINVAL, "%s: %u queues: at most %d", c->device, c->queues, DPDK_MAX_QUEUES);
    }
    if (!size) {
        return complain(error, EINVAL, "%s: frame_size %u: it is one of 2048, 4096, 8192, 16384", c->device,
                        c->frame_size);
    }
    if (c->mtu && (c->mtu < MIN_MTU || c->mtu > c->frame_size - MAX_HEADER)) {
        return complain(error, EINVAL, "%s: an MTU of %u: frames of frame_size %u hold %d to %u", c->device, c->mtu,
                        c->frame_size, MIN_MTU, c->frame_size - MAX_HEADER);
    }
    if (c->ring_size < 16 || c->ring_size > 32768) {
        return complain(error, EINVAL, "%s: ring_size %u: 16 to 32768", c->device, c->ring_size);
    }
    return 0;
}

static void defaults(struct dpdk_config *c)
{
    c->queues = c->queues ? c->queues : 1;
    c->ring_size = c->ring_size ? c->ring_size : DEFAULT_RING;
    c->frame_size = c->frame_size ? c->frame_size : 2048;
    c->idle_us = c->idle_us ? c->idle_us : DEFAULT_IDLE_US;
    c->link_poll_ms = c->link_poll_ms ? c->link_poll_ms : 100;
}

/* ---- Sizes ----------------------------------------------------------------------------------------------- */

/* The MTU of a kernel's device below the port; 0: there is none, or not in this network namespace. */
static uint32_t find_kernel(struct dpdk_port *d)
{
    struct ifreq ifr = {.ifr_ifindex = (int)d->info.if_index};

    d->control_fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (d->control_fd < 0 || !d->info.if_index || ioctl(d->control_fd, SIOCGIFNAME, &ifr) < 0) {
        return 0;
    }
    d->if_index = d->info.if_index;
    return link_kernel_mtu(d, d->if_index);
}

static int choose_mtu(struct dpdk_port *d, struct dpdk_error *error)
{
    uint32_t hold = d->cfg.frame_size - MAX_HEADER - (device_is_af_packet(d->name) ? AF_PACKET_HEADER : 0),
             kernel = find_kernel(d), most = d->info.max_mtu;
    uint16_t own = RTE_ETHER_MTU;

    rte_eth_dev_get_mtu(d->id, &own);
    own = own ? own : RTE_ETHER_MTU;
    d->most_mtu = (uint16_t)(d->cfg.mtu ? d->cfg.mtu : RTE_MIN(hold, UINT16_MAX));
    d->cfg.mtu = d->cfg.mtu ? d->cfg.mtu : RTE_MIN(kernel ? kernel : own, hold);
    if (!kernel || device_is_pci(d->name)) { /* it is told once what it receives */
        d->most_mtu = (uint16_t)d->cfg.mtu;
    }
    if (kernel && d->cfg.mtu > kernel) {
        return complain(error, EINVAL, "%s: an MTU of %u: the kernel's device below it has %u: ip link set ... mtu %u",
                        d->name, d->cfg.mtu, kernel, d->cfg.mtu);
    }
    if (d->cfg.mtu > hold) {
        return complain(error, EINVAL, "%s: an MTU of %u: frames of frame_size %u hold %u with this driver", d->name,
                        d->cfg.mtu, d->cfg.frame_size, hold);
    }
    if (!kernel && (d->cfg.mtu > most || d->cfg.mtu < d->info.min_mtu)) {
        return complain(error, EINVAL, "%s: an MTU of %u: the driver %s takes %u to %u", d->name, d->cfg.mtu,
                        d->info.driver_name, d->info.min_mtu, most);
    }
    d->nd.mtu = (uint16_t)d->cfg.mtu;
    return 0;
}

static int choose_sizes(struct dpdk_port *d, struct dpdk_error *error)
{
    struct dpdk_config *c = &d->cfg;
    uint32_t most = RTE_MIN(d->info.max_rx_queues, d->info.max_tx_queues), least;

    if (c->queues > most) {
        return complain(error, EINVAL,
                        "%s: %u queues: it has %u (some drivers have to be told in the device's "
                        "arguments: qpairs=%u for net_af_packet, queues=%u for virtio and vhost)",
                        d->name, c->queues, most, c->queues, c->queues);
    }
    d->rx_ring = d->tx_ring = (uint16_t)c->ring_size;
    if (rte_eth_dev_adjust_nb_rx_tx_desc(d->id, &d->rx_ring, &d->tx_ring) < 0) {
        return complain(error, EINVAL, "%s: rings of %u descriptors cannot be had", d->name, c->ring_size);
    }
    /* All that the rings may keep, and something to work with. */
    least = c->queues * (d->rx_ring + d->tx_ring) + MIN_FRAMES;
    c->frames = c->frames ? c->frames : RTE_MIN(2 * (least - MIN_FRAMES) + 512, (uint32_t)MAX_FRAMES);
    if (c->frames < least || c->frames > MAX_FRAMES) {
        return complain(
            error, EINVAL,
            "%s: %u frames: %u queues with rings of %u and %u descriptors need %u at least (%d at most); or "
            "take a smaller ring_size",
            d->name, c->frames, c->queues, d->rx_ring, d->tx_ring, least, MAX_FRAMES);
    }
    return choose_mtu(d, error);
}

/* ---- Configuring ---------------------------------------------------------------------------------------- */
static int failed(struct dpdk_port *d, struct dpdk_error *error, const char *doing, int err)
{
    return complain(error, -err, "%s: %s failed: %s%s%s%s", d->name, doing, strerror(-err), *log_why() ? " (" : "",
                    log_why(), *log_why() ? ")" : "");
}

/* virtio passes on frames of neighbours on the same host whose checksum nobody has completed (VIRTIO_NET_HDR_F_NEEDS_CSUM),
 * when it may: DPDK's flag says so (RTE_MBUF_F_RX_L4_CKSUM_NONE), but the kernel behind the exception path sees none of it.
 * Without the offload the host completes them. */
static bool sums_left_out(const struct dpdk_port *d) { return strncmp(d->info.driver_name, "net_virtio", 10) == 0; }

/* A virtio device drops the frames of all VLANs that it was not told of, once its driver can tell it of some
 * (VIRTIO_NET_F_CTRL_VLAN), which DPDK's always says. NICs let all of them through, unless they are asked to filter. */
static bool filters_vlans(const struct dpdk_port *d)
{
    return d->cfg.vlan && strncmp(d->info.driver_name, "net_virtio", 10) == 0 &&
           (d->info.rx_offload_capa & RTE_ETH_RX_OFFLOAD_VLAN_FILTER);
}

/* Large packets for the device to cut up, as chains of mbufs. A driver that does not offer IPv4 checksums (virtio: IP's is
 * the driver's own) finds a right one in the large packet's header. */
static void choose_segmentation(struct dpdk_port *d)
{
    uint64_t least = RTE_ETH_TX_OFFLOAD_TCP_TSO | RTE_ETH_TX_OFFLOAD_MULTI_SEGS;
    uint64_t sum = RTE_ETH_TX_OFFLOAD_IPV4_CKSUM & d->info.tx_offload_capa;
    uint16_t most = d->info.tx_desc_lim.nb_seg_max;

    if ((d->info.tx_offload_capa & least) == least) {
        d->conf.txmode.offloads |= least | sum;
        d->tso_pieces = most ? most : UINT16_MAX;
        d->tso_flags = RTE_MBUF_F_TX_TCP_SEG | (sum ? RTE_MBUF_F_TX_IP_CKSUM : 0);
    }
}

static void choose_offloads(struct dpdk_port *d)
{
    struct rte_eth_conf *conf = &d->conf;
    uint64_t csum = RTE_ETH_TX_OFFLOAD_TCP_CKSUM | RTE_ETH_TX_OFFLOAD_UDP_CKSUM;

    conf->rxmode.mtu = d->cfg.mtu;
    if (d->cfg.queues > 1) {
        uint64_t hash = RTE_ETH_RSS_IP | RTE_ETH_RSS_TCP | RTE_ETH_RSS_UDP;

        conf->rx_adv_conf.rss_conf.rss_hf = hash & d->info.flow_type_rss_offloads;
        conf->rxmode.mq_mode = conf->rx_adv_conf.rss_conf.rss_hf ? RTE_ETH_MQ_RX_RSS : RTE_ETH_MQ_RX_NONE;
    }
    conf->rxmode.offloads = filters_vlans(d) ? RTE_ETH_RX_OFFLOAD_VLAN_FILTER : 0;
    if (d->cfg.flags & DPDK_F_NO_OFFLOADS) {
        return;
    }
    conf->rxmode.offloads |= sums_left_out(d) ? 0 : RTE_ETH_RX_OFFLOAD_CHECKSUM & d->info.rx_offload_capa;
    if ((d->info.tx_offload_capa & csum) == csum) {
        conf->txmode.offloads |= csum;
        d->tx_csum = true;
        choose_segmentation(d);
    }
    if (d->cfg.mtu > RTE_ETHER_MTU) { /* a driver may have smaller buffers than we: it comes in pieces */
        conf->rxmode.offloads |= RTE_ETH_RX_OFFLOAD_SCATTER & d->info.rx_offload_capa;
    }
}

static int try_configuration(struct dpdk_port *d)
{
    uint16_t n = (uint16_t)d->cfg.queues;
    int err;

    log_mark();
    err = rte_eth_dev_configure(d->id, n, n, &d->conf);
    if (err == -EINVAL && !device_is_pci(d->name) && d->cfg.mtu != RTE_ETHER_MTU) {
        /* Virtual devices say that they take 1,500 bytes, and take what their memory or the kernel below them does. */
        d->conf.rxmode.mtu = 0;
        err = rte_eth_dev_configure(d->id, n, n, &d->conf);
    }
    return err;
}

/* A driver may refuse what it does with interrupts, and work without. Whether it is to be tried so. */
static bool without_interrupts(struct dpdk_port *d)
{
    bool with = d->conf.intr_conf.rxq;

    if (with) {
        snprintf(d->wake.why, sizeof d->wake.why, "%s", *log_why() ? log_why() : "the driver refuses them");
        d->conf.intr_conf.rxq = 0;
    }
    return with;
}

static int configure(struct dpdk_port *d, struct dpdk_error *error)
{
    int err;

    choose_offloads(d);
    d->conf.intr_conf.rxq = wake_by_driver(d);
    err = try_configuration(d);
    if (err < 0 && without_interrupts(d)) {
        err = try_configuration(d);
    }
    if (err < 0) {
        return failed(d, error, "configuring", err);
    }
    rte_eth_dev_info_get(d->id, &d->info); /* a bonding device has its members only now */
    return 0;
}

static int set_up_queues(struct dpdk_port *d, struct dpdk_error *error)
{
    int numa = rte_eth_dev_socket_id(d->id), err;

    for (uint16_t qi = 0; qi < d->cfg.queues; qi++) {
        struct rte_eth_rxconf rx = d->info.default_rxconf;
        struct rte_eth_txconf tx = d->info.default_txconf;

        rx.offloads = d->conf.rxmode.offloads;
        tx.offloads = d->conf.txmode.offloads;
        log_mark();
        err = rte_eth_rx_queue_setup(d->id, qi, d->rx_ring, (unsigned)numa, &rx, d->pool.mp);
        if (err < 0) {
            return failed(d, error, "setting up a receive queue", err);
        }
        err = rte_eth_tx_queue_setup(d->id, qi, d->tx_ring, (unsigned)numa, &tx);
        if (err < 0) {
            return failed(d, error, "setting up a transmit queue", err);
        }
    }
    return 0;
}

static int make_fifos(struct dpdk_port *d, struct dpdk_error *error)
{
    uint32_t size = rte_align32pow2(d->cfg.frames);

    for (uint32_t qi = 0; qi < d->cfg.queues; qi++) {
        struct tx_fifo *f = &d->queue[qi].fifo;

        f->frame = malloc(size * sizeof *f->frame);
        f->mask = size - 1;
        if (!f->frame) {
            return complain(error, ENOMEM, "%s: no memory", d->name);
        }
    }
    return 0;
}

static int make_netdev(struct dpdk_port *d, struct dpdk_error *error)
{
    struct bypass_netdev *nd = &d->nd;
    struct rte_ether_addr mac = {{0}};

    rte_eth_macaddr_get(d->id, &mac);
    if (rte_is_zero_ether_addr(&mac)) { /* rings and the like have none */
        uint64_t any = rte_rand();

        memcpy(mac.addr_bytes, &any, sizeof mac.addr_bytes);
        mac.addr_bytes[0] = (uint8_t)((mac.addr_bytes[0] & 0xfc) | 2); /* locally administered, unicast */
    }
    memcpy(nd->mac, mac.addr_bytes, sizeof nd->mac);
    nd->ops = d->guarded ? guarded_ops() : &eth_ops;
    nd->mem = d->pool.base;
    nd->meta = (struct bypass_pkt_meta *)(d->pool.base + META_AT);
    nd->stride = nd->meta_stride = d->pool.stride;
    nd->frames = d->pool.frames;
    nd->free_frames = pool_free_frames(&d->pool);
    nd->queues = (uint16_t)d->cfg.queues;
    nd->headroom = PACKET_AT;
    nd->caps = BYPASS_CAP_TX_LAZY | (d->tx_csum ? BYPASS_CAP_TX_CSUM : 0);
    d->csum_trust = (d->cfg.flags & DPDK_F_RX_CSUM_TRUST) != 0;
    if (d->csum_trust || (d->conf.rxmode.offloads & RTE_ETH_RX_OFFLOAD_TCP_CKSUM)) {
        nd->caps |= BYPASS_CAP_RX_CSUM;
    }
    return wake_open(d, error);
}

static int start(struct dpdk_port *d, struct dpdk_error *error)
{
    int err;

    log_mark();
    err = rte_eth_dev_start(d->id);
    if (err < 0 && without_interrupts(d) && try_configuration(d) == 0) {
        if (set_up_queues(d, error)) {
            return error->err;
        }
        log_mark();
        err = rte_eth_dev_start(d->id);
    }
    if (err < 0) {
        return failed(d, error, "starting", err);
    }
    if (d->guarded) {
        guard_add(d);
    }
    if (filters_vlans(d)) {
        err = rte_eth_dev_vlan_filter(d->id, (uint16_t)d->cfg.vlan, 1);
        if (err < 0) {
            return failed(d, error, "letting frames of the VLAN in", err);
        }
    }
    /* What a filter of the device would keep from the kernel behind the exception path. Not all drivers have either. */
    if (rte_eth_allmulticast_enable(d->id) < 0 && d->member_count) {
        rte_eth_promiscuous_enable(d->id); /* with LACP the driver drops even broadcasts without one of the two */
    }
    if ((d->cfg.flags & DPDK_F_PROMISCUOUS) && rte_eth_promiscuous_enable(d->id) < 0 && !d->if_index) {
        return complain(error, ENOTSUP, "%s: the driver %s has no promiscuous mode", d->name, d->info.driver_name);
    }
    return make_netdev(d, error) ? error->err : link_watch(d, error);
}

/* ---- Open and close --------------------------------------------------------------------------------------- */
static void unplug_all(struct dpdk_port *d)
{
    if (d->started && !d->gone) {
        device_unplug(d->id);
    }
    for (uint32_t i = 0; i < d->member_count; i++) {
        if (!d->member[i].gone) {
            device_unplug(d->member[i].port_id);
        }
    }
}

static void undo(struct dpdk_port *d)
{
    link_unwatch(d);
    flow_clear(d);
    wake_close(d);
    if (d->guarded) {
        guard_remove(d);
        guard_hold();
        unplug_all(d);
        guard_release();
    } else {
        unplug_all(d);
    }
    pool_destroy(&d->pool);
    for (uint32_t qi = 0; qi < DPDK_MAX_QUEUES; qi++) {
        free(d->queue[qi].fifo.frame);
    }
    if (d->control_fd >= 0) {
        close(d->control_fd);
    }
    claim_drop(d);
    free(d);
}

static int open_steps(struct dpdk_port *d, struct dpdk_error *error)
{
    uint32_t reserve;

    if (check_config(&d->cfg, error) || device_find(d, error) || claim_take(d, error) || choose_sizes(d, error)) {
        return error->err;
    }
    reserve = RTE_MIN(64u * d->cfg.queues, d->cfg.frames / 8);
    if (configure(d, error) ||
        pool_create(&d->pool, d->cfg.frames, d->cfg.frame_size, reserve, rte_eth_dev_socket_id(d->id), error)) {
        return error->err;
    }
    return set_up_queues(d, error) || make_fifos(d, error) || start(d, error) ? error->err : 0;
}

struct dpdk_port *port_open(const struct dpdk_config *cfg, struct dpdk_error *error)
{
    struct dpdk_port *d = aligned_alloc(64, sizeof *d);

    memset(error, 0, sizeof *error);
    if (!d) {
        complain(error, ENOMEM, "no memory");
        return NULL;
    }
    memset(d, 0, sizeof *d);
    d->cfg = *cfg;
    d->wake.epoll = d->wake.timer = d->control_fd = d->claim_fd = -1;
    defaults(&d->cfg);
    pthread_mutex_lock(&device_lock);
    if (open_steps(d, error)) {
        undo(d);
        d = NULL;
    }
    pthread_mutex_unlock(&device_lock);
    return d;
}

int port_close(struct dpdk_port *d, uint32_t wait_ms)
{
    uint64_t end = rte_rdtsc() + rte_get_tsc_hz() / 1000 * wait_ms;
    uint32_t left = tx_settle(d);

    while (left && !d->gone && rte_rdtsc() < end) {
        usleep(1000);
        left = tx_settle(d);
    }
    pthread_mutex_lock(&device_lock);
    undo(d);
    pthread_mutex_unlock(&device_lock);
    return (int)left;
}
