/* SPDX-License-Identifier: Apache-2.0 */
/* plugin.c - the table, which is all that the plug-in shows. */
#include <rte_version.h>

#include "eth/port.h"

static struct bypass_netdev *port_netdev(struct dpdk_port *port) { return &port->nd; }

static int port_health(struct dpdk_port *port) { return link_look_alone(port); }

static int port_set_link(struct dpdk_port *port, int up)
{
    int err;

    if (!port->guarded) {
        return link_set(port, up);
    }
    guard_hold();
    err = link_set(port, up);
    guard_release();
    return err;
}

extern struct dpdk_plugin bypass_dpdk_plugin;
__attribute__((visibility("default"))) struct dpdk_plugin bypass_dpdk_plugin = {
    .abi = DPDK_PLUGIN_ABI,
    .start = eal_start,
    .open = port_open,
    .netdev = port_netdev,
    .about = port_about,
    .offload_name = port_offload_name,
    .health = port_health,
    .set_link = port_set_link,
    .counters = port_counters,
    .stats = port_stats,
    .xstats = port_xstats,
    .audit = port_audit,
    .flows = port_flows,
    .close = port_close,
};

__attribute__((constructor)) static void at_load(void) { bypass_dpdk_plugin.version = rte_version(); }
