/* SPDX-License-Identifier: Apache-2.0 */
/*
 * filter.h - a network device in front of another one, which takes out of what is received there what is not the stack's:
 *
 *     device below -> classifier --STEER--> who asked (rx_burst), with the verdict in the metadata
 *                        |-------DROP----> freed, counted
 *                        `-------PASS----> queue for the kernel -> exception path (exception.h)
 *     exception path -> device below, by queue 0
 *
 * It wraps any bypass_netdev; there is nothing of DPDK in it. Frames and their memory are those of the device below, which
 * has to outlive it. Nothing is copied but the kernel's own frames.
 *
 * Nobody starves: a call of rx_burst looks at FILTER_LOOKS frames at most beyond those that it hands up, and then comes
 * again (wait_fd is readable); the kernel gets EXCEPTION_WRITES frames a call and FILTER_QUEUE may wait, and its own
 * EXCEPTION_READS are sent in the same call, one where the stack found the ring full.
 */
#ifndef BYPASS_DPDK_FILTER_H
#define BYPASS_DPDK_FILTER_H

#include "bypass.h"
#include "dpdk_backend/classify.h"
#include "dpdk_backend/exception.h"

enum {
    FILTER_LOOKS = 256,
    FILTER_QUEUE = 256, /* frames that wait for the kernel; a power of two */
};

/* classify_burst(), or what stands for it. */
typedef void (*filter_classify_fn)(struct classifier *ctx, const struct classify_frame *in, uint32_t n,
                                   struct classify_result *out);

struct filter_config {
    struct classifier *classifier;
    filter_classify_fn classify;
    struct exception_path *exception; /* NULL: there is no kernel on this port, and what it would get is handed up too,
                                       * without a verdict: the stack does ARP and ping */
    uint16_t vlan;                    /* 802.1Q tag of the stack's frames, which neither classifier nor stack see; the
                                       * kernel's frames are as on the wire. 0: frames are as they are */
    uint16_t reserved;
};

struct filter_counters {
    uint64_t steered, passed, dropped; /* by the classifier's verdict; passed: to the queue for the kernel */
    uint64_t other_vlan;               /* of passed: not this port's tag, so not judged */
    uint64_t from_kernel;              /* frames of the kernel that the device took */
    uint64_t from_kernel_full;         /* dropped: its ring stayed full, or its link is down */
    uint64_t from_kernel_no_frame;     /* dropped: no frame was free */
    uint64_t again;                    /* calls that ended because they had looked at enough */
    uint64_t waiting;                  /* in the queue for the kernel now */
};

/* NULL: no memory or descriptors (errno). One caller at a time, as of the device below. */
struct bypass_netdev *filter_create(struct bypass_netdev *lower, const struct filter_config *cfg);
/* The time, before each turn: what the rate is measured by. Another process's clock is as good. */
void filter_now(struct bypass_netdev *filter, uint64_t now_ns);
void filter_counters(const struct bypass_netdev *filter, struct filter_counters *out);
/* Takes over MTU and MAC address of the device below, when these have changed. */
void filter_refresh(struct bypass_netdev *filter);
/* Gives its frames back to the device below. The exception path is the caller's to close. */
void filter_destroy(struct bypass_netdev *filter);

#endif
