/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dpdk_port.h - a port of the DPDK plug-in for the benchmark's programs: EAL in memory, one port by devargs. A program
 * that cannot have one says why and ends.
 */
#ifndef BENCH_DPDK_PORT_H
#define BENCH_DPDK_PORT_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dpdk_backend/load.h"

enum { PORT_CLOSE_MS = 100 };

struct dpdk_end {
    const struct dpdk_plugin *plugin;
    struct dpdk_port *port;
    struct bypass_netdev *dev;
};

static inline void port_check(int ok, const char *what, const struct dpdk_error *e)
{
    if (!ok) {
        fprintf(stderr, "%s: %s\n", what, e->text);
        exit(1);
    }
}

static inline struct dpdk_end port_open(const char *device, uint32_t frames)
{
    static const char *const eal[] = {"bench", "--no-huge", "--no-shconf", "--no-telemetry", "--no-pci", "-m", "256"};
    struct dpdk_config cfg = {.ring_size = 1024, .frames = frames, .queues = 1};
    struct dpdk_error e = {0};
    struct dpdk_end end = {.plugin = dpdk_load(NULL, &e)};

    port_check(end.plugin != NULL, "plug-in", &e);
    port_check(end.plugin->start(sizeof eal / sizeof *eal, eal, NULL, &e) == 0, "EAL", &e);
    snprintf(cfg.device, sizeof cfg.device, "%s", device);
    end.port = end.plugin->open(&cfg, &e);
    port_check(end.port != NULL, device, &e);
    end.dev = end.plugin->netdev(end.port);
    return end;
}

static inline void port_close(struct dpdk_end *end) { (void)end->plugin->close(end->port, PORT_CLOSE_MS); }

#endif
