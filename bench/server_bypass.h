/* SPDX-License-Identifier: Apache-2.0 */
/* server_bypass.h - the call that Python makes (bench/serve.py); read by cffi too. */
#ifndef BENCH_SERVER_BYPASS_H
#define BENCH_SERVER_BYPASS_H

#ifndef BYPASS_CDEF
#include "bypass.h"
#endif

enum {
    SERVER_SPIN = 1, /* never sleeps */
};
struct server_args {
    struct bypass_addr local, peer;
    uint8_t peer_mac[6];
    uint16_t flags;
    uint32_t spin_us; /* without SERVER_SPIN: polls so long after the last packet before it sleeps */
};
/* Serves on dev until *stop is not 0, then copies the stack's bypass_stat_count() counters to stats. 0, or -errno of
 * the stack or the device. */
int server_run(struct bypass_netdev *dev, const struct server_args *args, volatile uint32_t *stop, uint64_t *stats);

#endif
