/* SPDX-License-Identifier: Apache-2.0 */
/*
 * link.c - is there a link, is there a device at all, and what a bonding device's members do.
 *
 * Who tells: the driver by events, from DPDK's interrupt thread, which only set a flag here; a look every link_poll_ms,
 * since drivers over a kernel's device know neither its link (some) nor that it was deleted (all).
 * A removed device is stopped and closed at once: that is what makes its driver give back all mbufs.
 */
#define _GNU_SOURCE
#define ALLOW_EXPERIMENTAL_API /* rte_dev_event_callback_register(): the same since DPDK 18.08 */
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <net/if.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <rte_cycles.h>
#include <rte_dev.h>

#include "eth/port.h"

enum { LACP_MODE = 4, ACTIVE_BACKUP = 1, LACP_MS = 50 /* the driver demands a call every 100 ms */ };

/* ---- DPDK's bonding driver, when it is loaded: not linked, since it is a package of its own -------------------- */
static struct {
    bool looked;
    int (*mode)(uint16_t bond);
    int (*active)(uint16_t bond, uint16_t *members, uint16_t n);
    int (*primary)(uint16_t bond);
    int (*primary_set)(uint16_t bond, uint16_t member);
    int (*remove)(uint16_t bond, uint16_t member);
    int (*add)(uint16_t bond, uint16_t member);
    int (*monitor)(uint16_t bond, uint32_t ms);
    int (*lacp_info)(uint16_t bond, uint16_t member, void *out);
    int (*lacp_setup)(uint16_t bond, void *conf);
} bonding;

/* The beginning of what rte_eth_bond_8023ad_slave_info() tells, whose type has changed its name. */
struct lacp_info {
    int32_t selected;
    uint8_t actor_state; /* IEEE 802.1AX 6.4.2.3 */
    uint8_t rest[251];
};
enum { LACP_COLLECTING = 0x10, LACP_DISTRIBUTING = 0x20 };

static int find_library(struct dl_phdr_info *info, size_t size, void *out)
{
    (void)size;
    if (info->dlpi_name && strstr(info->dlpi_name, "librte_net_bond.so")) {
        *(const char **)out = info->dlpi_name;
        return 1;
    }
    return 0;
}

/* Members were called otherwise before DPDK 23.11. */
static void *symbol(void *so, const char *name, const char *older)
{
    void *found = dlsym(so, name);

    return found ? found : dlsym(so, older);
}

static bool bonding_there(void)
{
    const char *path = NULL;
    void *so;

    if (bonding.looked) {
        return bonding.mode != NULL;
    }
    bonding.looked = true;
    dl_iterate_phdr(find_library, &path);
    so = path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : NULL;
    if (!so) {
        return false;
    }
    *(void **)&bonding.mode = dlsym(so, "rte_eth_bond_mode_get");
    *(void **)&bonding.primary = dlsym(so, "rte_eth_bond_primary_get");
    *(void **)&bonding.primary_set = dlsym(so, "rte_eth_bond_primary_set");
    *(void **)&bonding.monitor = dlsym(so, "rte_eth_bond_link_monitoring_set");
    *(void **)&bonding.lacp_setup = dlsym(so, "rte_eth_bond_8023ad_setup");
    *(void **)&bonding.active = symbol(so, "rte_eth_bond_active_members_get", "rte_eth_bond_active_slaves_get");
    *(void **)&bonding.lacp_info = symbol(so, "rte_eth_bond_8023ad_member_info", "rte_eth_bond_8023ad_slave_info");
    *(void **)&bonding.remove = symbol(so, "rte_eth_bond_member_remove", "rte_eth_bond_slave_remove");
    *(void **)&bonding.add = symbol(so, "rte_eth_bond_member_add", "rte_eth_bond_slave_add");
    return bonding.mode != NULL;
}

/* ---- The kernel's device ------------------------------------------------------------------------------------ */

/* 1: it runs; 0: it does not; -ENXIO: it was deleted, or moved to another network namespace. */
static int kernel_link(const struct dpdk_port *d, uint32_t if_index)
{
    struct ifreq ifr = {.ifr_ifindex = (int)if_index};

    if (ioctl(d->control_fd, SIOCGIFNAME, &ifr) < 0 || ioctl(d->control_fd, SIOCGIFFLAGS, &ifr) < 0) {
        return errno == ENODEV || errno == ENXIO ? -ENXIO : 0;
    }
    return (ifr.ifr_flags & (IFF_UP | IFF_RUNNING)) == (IFF_UP | IFF_RUNNING);
}

/* As above, of a port of ethdev. */
static int link_of(const struct dpdk_port *d, uint16_t id, uint32_t if_index)
{
    struct rte_eth_link link = {0};
    int kernel = if_index ? kernel_link(d, if_index) : 1;

    if (kernel <= 0) {
        return kernel;
    }
    if (rte_eth_dev_is_removed(id)) {
        return -ENXIO;
    }
    /* A driver that cannot tell is believed to have one. */
    return rte_eth_link_get_nowait(id, &link) < 0 || link.link_status == RTE_ETH_LINK_UP;
}

/* ---- Removal ------------------------------------------------------------------------------------------------- */
static int on_removed(uint16_t id, enum rte_eth_event_type event, void *arg, void *ret)
{
    struct dpdk_port *d = arg;

    (void)id, (void)event, (void)ret;
    __atomic_store_n(&d->removed, 1, __ATOMIC_RELEASE);
    return 0;
}

/* The kernel wants a device back that vfio-pci has, and waits until it is closed: it is taken away. */
static void on_wanted(const char *name, enum rte_dev_event_type event, void *arg)
{
    struct dpdk_port *d = arg;

    (void)name;
    if (event == RTE_DEV_EVENT_REMOVE) {
        __atomic_store_n(&d->removed, 1, __ATOMIC_RELEASE);
    }
}

static int on_link(uint16_t id, enum rte_eth_event_type event, void *arg, void *ret)
{
    struct dpdk_port *d = arg;

    (void)id, (void)event, (void)ret;
    __atomic_store_n(&d->link_news, 1, __ATOMIC_RELEASE);
    return 0;
}

/* Stopping a bond ends its LACP alarm in DPDK's interrupt thread; but where that thread is just taking a member out whose link
 * is lost, it sets the alarm anew, which would go off when the bond's memory is freed. Of a bond that is stopped this call
 * does no more than end it, and waits where it runs. */
void link_stopped(uint16_t id)
{
    if (bonding.mode && bonding.lacp_setup && bonding.mode(id) == LACP_MODE) {
        bonding.lacp_setup(id, NULL);
    }
}

/* What a driver kept in spite of being closed is lost to it. */
static void abandon(struct dpdk_port *d)
{
    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        struct tx_fifo *f = &d->queue[qi].fifo;

        for (uint32_t at = f->head; at != f->tail; at++) {
            struct rte_mbuf *mbuf = frame_mbuf(&d->pool, f->frame[at & f->mask]);

            d->queue[qi].n.tx_abandoned++;
            rte_mbuf_refcnt_set(mbuf, 1);
        }
    }
}

static void device_gone(struct dpdk_port *d)
{
    for (uint32_t i = 0; i < d->member_count; i++) {
        d->member[i].if_index = 0;
    }
    link_unwatch(d);
    wake_stop(d);
    device_close(d->id, d->device);
    abandon(d);
    d->gone = 1;
    d->link_up = false;
}

/* ---- Members of a bonding device ------------------------------------------------------------------------------ */
static void member_gone(struct dpdk_port *d, struct member *m)
{
    m->gone = true;
    m->link_up = false;
    if (bonding.remove) {
        bonding.remove(d->id, m->port_id);
    }
    device_unplug(m->port_id);
}

/* With LACP a member whose driver does not know its link is distributed to until the other side has not been heard for 90
 * seconds. It is taken out of the bond at once, and closed: for when its link is back, the driver has to open it anew. */
static void leaves(struct dpdk_port *d, struct member *m)
{
    struct rte_eth_link link = {0};

    if (!d->lacp_tsc || !m->if_index || !bonding.add || rte_eth_link_get_nowait(m->port_id, &link) < 0 ||
        link.link_status != RTE_ETH_LINK_UP) {
        return;
    }
    member_gone(d, m);
    m->away = true;
    m->due = 0;
}

static void comes_back(struct dpdk_port *d, struct member *m)
{
    int kernel = kernel_link(d, m->if_index), id;
    uint64_t now = rte_rdtsc();

    if (kernel < 0) {
        m->away = false; /* never */
    }
    if (kernel != 1 || now < m->due) {
        return;
    }
    m->due = now + rte_get_tsc_hz();
    id = device_again(m);
    if (id < 0) {
        return;
    }
    m->port_id = (uint16_t)id;
    if (bonding.add(d->id, m->port_id) < 0) {
        device_unplug(m->port_id);
        return;
    }
    m->gone = m->away = false;
}

/* A driver that does not know its link leaves the bonding driver in the dark: another member is told to be the one. */
static void replace_active(struct dpdk_port *d)
{
    int primary = bonding.primary && bonding.mode(d->id) == ACTIVE_BACKUP ? bonding.primary(d->id) : -1;
    struct member *better = NULL;

    for (uint32_t i = 0; i < d->member_count; i++) {
        struct member *m = &d->member[i];

        if (m->link_up && !m->gone && (int)m->port_id == primary) {
            return;
        }
        better = !better && m->link_up && !m->gone ? m : better;
    }
    if (better && primary >= 0 && bonding.primary_set) {
        bonding.primary_set(d->id, better->port_id);
    }
}

/* Whether any has a link. */
static bool look_at_members(struct dpdk_port *d)
{
    bool any = false, changed = false;

    for (uint32_t i = 0; i < d->member_count; i++) {
        struct member *m = &d->member[i];
        int link;

        if (m->away) {
            comes_back(d, m);
        }
        link = m->gone ? 0 : link_of(d, m->port_id, m->if_index);
        if (link == -ENXIO) {
            member_gone(d, m);
        } else if (link == 0 && !m->gone) {
            leaves(d, m);
        }
        changed = changed || m->link_up != (link == 1);
        m->link_up = link == 1;
        any = any || m->link_up;
    }
    if (changed) {
        replace_active(d);
    }
    return any;
}

/* With LACP a member takes part once both sides have agreed on it. */
static bool agreed(const struct dpdk_port *d, const struct member *m)
{
    struct lacp_info info = {0};
    uint8_t both = LACP_COLLECTING | LACP_DISTRIBUTING;

    return !d->lacp_tsc || !bonding.lacp_info ||
           (bonding.lacp_info(d->id, m->port_id, &info) == 0 && (info.actor_state & both) == both);
}

void link_members(struct dpdk_port *d, struct dpdk_about *out)
{
    uint16_t active[DPDK_MAX_MEMBERS] = {0};
    int n, primary;

    if (!d->member_count || d->gone) {
        return;
    }
    n = bonding.active ? bonding.active(d->id, active, DPDK_MAX_MEMBERS) : 0;
    out->bonding_mode = (uint32_t)bonding.mode(d->id);
    primary = out->bonding_mode == ACTIVE_BACKUP && bonding.primary ? bonding.primary(d->id) : -1;
    out->members = d->member_count;
    for (uint32_t i = 0; i < d->member_count; i++) {
        const struct member *m = &d->member[i];

        memcpy(out->member[i].name, m->name, sizeof m->name);
        out->member[i].link_up = m->link_up;
        for (int j = 0; j < n; j++) {
            out->member[i].active |=
                !m->gone && active[j] == m->port_id && (primary < 0 || primary == m->port_id) && agreed(d, m);
        }
    }
}

/* ---- MAC address ------------------------------------------------------------------------------------------- */

/* Somebody may change it: an administrator, or the bonding driver when a member goes. Rings and the like have none. */
static void look_at_mac(struct dpdk_port *d)
{
    struct ifreq ifr = {.ifr_ifindex = (int)d->if_index};
    struct rte_ether_addr mac = {{0}};

    if (!d->if_index) {
        rte_eth_macaddr_get(d->id, &mac);
    } else if (ioctl(d->control_fd, SIOCGIFNAME, &ifr) == 0 && ioctl(d->control_fd, SIOCGIFHWADDR, &ifr) == 0) {
        memcpy(mac.addr_bytes, ifr.ifr_hwaddr.sa_data, sizeof mac.addr_bytes);
    }
    if (!rte_is_zero_ether_addr(&mac)) {
        memcpy(d->nd.mac, mac.addr_bytes, sizeof d->nd.mac);
    }
}

/* ---- MTU --------------------------------------------------------------------------------------------------- */
uint32_t link_kernel_mtu(const struct dpdk_port *d, uint32_t if_index)
{
    struct ifreq ifr = {.ifr_ifindex = (int)if_index};

    return ioctl(d->control_fd, SIOCGIFNAME, &ifr) < 0 || ioctl(d->control_fd, SIOCGIFMTU, &ifr) < 0
               ? 0
               : (uint32_t)ifr.ifr_mtu;
}

/* An administrator may change that of a kernel's device, which then drops what is larger; of a bond's members the least
 * counts. A driver of its own keeps what it was configured with. A device that is gone changes nothing. */
static void look_at_mtu(struct dpdk_port *d)
{
    uint32_t least = d->most_mtu, mtu = d->if_index ? link_kernel_mtu(d, d->if_index) : least;

    if (!mtu) {
        return;
    }
    least = RTE_MIN(least, mtu);
    for (uint32_t i = 0; i < d->member_count; i++) {
        mtu = d->member[i].if_index && !d->member[i].gone ? link_kernel_mtu(d, d->member[i].if_index) : 0;
        least = mtu ? RTE_MIN(least, mtu) : least;
    }
    d->nd.mtu = (uint16_t)least;
}

/* ---- Looking ----------------------------------------------------------------------------------------------- */
static void look(struct dpdk_port *d, uint64_t now)
{
    int link;

    d->link_due = now + d->link_tsc;
    __atomic_store_n(&d->link_news, 0, __ATOMIC_RELAXED);
    if (d->member_count) {
        d->link_up = look_at_members(d);
        look_at_mac(d);
        look_at_mtu(d);
        return;
    }
    link = d->removed ? -ENXIO : link_of(d, d->id, d->if_index);
    if (link == -ENXIO) {
        device_gone(d);
    } else {
        d->link_up = link == 1;
        look_at_mac(d);
        look_at_mtu(d);
    }
}

int link_look(struct dpdk_port *d, bool at_once)
{
    uint64_t now;

    if (unlikely(d->gone)) {
        return -ENXIO;
    }
    now = rte_rdtsc();
    if (unlikely(at_once || now >= d->link_due || __atomic_load_n(&d->removed, __ATOMIC_ACQUIRE) ||
                 __atomic_load_n(&d->link_news, __ATOMIC_ACQUIRE))) {
        look(d, now);
    }
    if (unlikely(d->lacp_tsc && now >= d->lacp_due && !d->gone)) {
        d->lacp_due = now + d->lacp_tsc;
        rte_eth_tx_burst(d->id, 0, NULL, 0); /* its own frames go out with ours, and also without any */
    }
    return d->gone ? -ENXIO : d->link_up ? 0 : -ENETDOWN;
}

int link_look_alone(struct dpdk_port *d)
{
    int err;

    if (!d->guarded) {
        return link_look(d, true);
    }
    guard_hold(); /* LACP sends with it */
    err = link_look(d, true);
    guard_release();
    return err;
}

static int watch_bonding(struct dpdk_port *d, struct dpdk_error *error)
{
    if (!bonding_there()) {
        return complain(error, ELIBACC, "%s: DPDK's bonding driver cannot be found in this process", d->name);
    }
    if (bonding.monitor) {
        bonding.monitor(d->id, d->cfg.link_poll_ms);
    }
    if (bonding.mode(d->id) == LACP_MODE) {
        d->lacp_tsc = rte_get_tsc_hz() / 1000 * LACP_MS;
    }
    for (uint32_t i = 0; i < d->member_count; i++) {
        struct rte_eth_dev_info info;

        if (rte_eth_dev_info_get(d->member[i].port_id, &info) == 0 && info.if_index &&
            kernel_link(d, info.if_index) >= 0) {
            d->member[i].if_index = info.if_index;
        }
    }
    return 0;
}

int link_watch(struct dpdk_port *d, struct dpdk_error *error)
{
    d->link_tsc = rte_get_tsc_hz() / 1000 * d->cfg.link_poll_ms;
    if (d->member_count && watch_bonding(d, error)) {
        return error->err;
    }
    rte_eth_dev_callback_register(d->id, RTE_ETH_EVENT_INTR_RMV, on_removed, d);
    rte_eth_dev_callback_register(d->id, RTE_ETH_EVENT_INTR_LSC, on_link, d);
    rte_dev_event_callback_register(rte_dev_name(d->device), on_wanted, d);
    link_look_alone(d);
    return 0;
}

/* None of them runs any more when this returns: one that does cannot be taken off, and is over in a moment. */
void link_unwatch(struct dpdk_port *d)
{
    if (!d->link_tsc || d->gone) {
        return;
    }
    while (rte_eth_dev_callback_unregister(d->id, RTE_ETH_EVENT_INTR_RMV, on_removed, d) == -EAGAIN ||
           rte_eth_dev_callback_unregister(d->id, RTE_ETH_EVENT_INTR_LSC, on_link, d) == -EAGAIN ||
           rte_dev_event_callback_unregister(rte_dev_name(d->device), on_wanted, d) == -EAGAIN) {
        usleep(10);
    }
}

int link_set(struct dpdk_port *d, int up)
{
    int err;

    if (d->gone) {
        return -ENXIO;
    }
    err = up ? rte_eth_dev_set_link_up(d->id) : rte_eth_dev_set_link_down(d->id);
    link_look(d, true);
    return err;
}
