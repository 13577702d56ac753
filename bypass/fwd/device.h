/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device.h - what bypass-fwd moves the frames of. Frames come and go by a struct bypass_netdev; what a netdev does not
 * say is in a table of functions, one for each kind of device: device_afxdp.c, device_dpdk.c.
 *
 * To add a kind: a message that opens it (fwd.h), a table, and a line in control.c.
 */
#ifndef BYPASS_FWD_DEVICE_H
#define BYPASS_FWD_DEVICE_H

#include "bypass.h"
#include "fwd.h"

struct program;
struct request;
struct device;

struct device_kind {
    /* What the broker is told, beside what the netdev says. NULL: nothing. */
    void (*describe)(const struct device *d, struct fwd_device_info *a);
    /* Before each round of frames: the time. NULL: it needs none. */
    void (*turn)(struct device *d, uint64_t now_ns);
    /* Asked every look_ns: 0, -ENETDOWN, -ENXIO (gone for good). Brings MTU and MAC of the netdev up to date. */
    int (*health)(struct device *d);
    /* Serves queues that it got since, and tells the broker. NULL: its queues never change. */
    void (*grow)(struct device *d, struct program *w);
    /* Its packets are somebody else's from now on. Frees it. */
    void (*close)(struct device *d);
};

struct device { /* the first member of a kind's own struct */
    const struct device_kind *kind;
    struct bypass_netdev *netdev;
    int wait_fd; /* readable when there may be frames */
    uint64_t look_ns;
};

/* Opens it as the message says, and keeps the descriptors that it needs. 0, or as refuse(). */
int device_afxdp_open(struct request *q, struct device **out);
int device_dpdk_open(struct request *q, struct device **out);

#endif
