/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forward.h - frames between one network device and the ports of applications. No clock, no sleeping, no allocation
 * but when a port comes; the caller gives the time and the device, which may be any.
 *
 * A round receives at most FORWARD_RX frames and takes at most FORWARD_TX from each port, beginning with another one
 * each time, so that what one application does costs the others a bounded time.
 */
#ifndef BYPASS_FWD_FORWARD_H
#define BYPASS_FWD_FORWARD_H

#include "check.h"
#include "peer.h"

enum { FORWARD_RX = 64, FORWARD_TX = 32, FORWARD_PENDING = 64 };

struct forward_port {
    uint32_t app, leases;
    struct peer peer;
    struct sender sender;
    struct bucket bytes, packets;
    uint64_t ready_ns; /* it waits for its rate until then; 0: it does not */
    uint64_t tx_sent, tx_limited;
    uint64_t refused[FWD_REFUSALS];
    uint32_t cut_told;
};

struct forwarder {
    struct bypass_netdev *dev; /* NULL: none yet */
    struct checker check;
    struct forward_port *port[FWD_PORTS_MAX]; /* NULL: free. Owners of leases are index + 1 */
    uint32_t ports;                           /* the highest in use, + 1 */
    uint32_t first;                           /* whose turn it is */
    uint32_t link;
    uint32_t again;                  /* the device has more to do: do not sleep */
    uint32_t pending;                /* frames that were checked and did not fit the device yet */
    bypass_pkt pkt[FORWARD_PENDING]; /* in order */
    uint16_t entry[FWD_ENTRIES_MAX]; /* index + 1 of the port; 0: nobody's */
    struct fwd_stats n;
};

int forward_init(struct forwarder *f, uint64_t seed); /* 0, -ENOMEM */
void forward_free(struct forwarder *f);               /* no port is left */
void forward_device(struct forwarder *f, struct bypass_netdev *dev);

/* A port over memory that is mapped already. -EEXIST, -ENOSPC, -ENOMEM, -EINVAL. */
int forward_port_add(struct forwarder *f, const struct fwd_port_add *about, void *mem, size_t size, int doorbell);
/* Its leases and entries go with it. -ENOENT. */
int forward_port_del(struct forwarder *f, uint32_t app);
struct forward_port *forward_port_find(const struct forwarder *f, uint32_t app); /* or NULL */
int forward_lease(struct forwarder *f, const struct fwd_lease *lease, int add);  /* -errno */
int forward_entry(struct forwarder *f, uint32_t entry, uint32_t app);
int forward_rate(struct forwarder *f, const struct fwd_rate *rate, uint64_t now_ns);
/* The device's MAC address and MTU, which its netdev says, are these from now on: checked, and told to all. */
void forward_about(struct forwarder *f);
void forward_link(struct forwarder *f, uint32_t state); /* the device's: told to all applications */
void forward_port_stats(const struct forward_port *p, struct fwd_port_stats *out);

/* One round. Frames moved. */
uint32_t forward_round(struct forwarder *f, uint64_t now_ns);
/* Before sleeping: 0 when nothing is to be done before *until_ns (UINT64_MAX: before something happens). */
uint32_t forward_sleep(struct forwarder *f, uint64_t now_ns, uint64_t *until_ns);
void forward_wake(struct forwarder *f); /* after it */

#endif
