/* SPDX-License-Identifier: Apache-2.0 */
/*
 * internal.h - the two halves of an AF_XDP device, and what its files share:
 *
 *   umem.c    layout of the memory, frames and who holds them, audit
 *   socket.c  everything that talks to the kernel: sockets, rings, bind, options, statistics
 *   netdev.c  the per-packet path: bypass_netdev_ops over the rings
 *   echo.c    the bare echo; raw.c  whole frames by copy
 */
#ifndef BYPASS_AFXDP_INTERNAL_H
#define BYPASS_AFXDP_INTERNAL_H

#include "afxdp.h"
#include "ring.h"

enum { AFXDP_MAGIC = 0x41465831, META_STRIDE = 64, ETH_HEADER = 14, KERNEL_HEADROOM = 256, KICK_ROUNDS = 8 };
_Static_assert(sizeof(struct bypass_pkt_meta) <= META_STRIDE, "metadata of a frame fits one cache line");

/* ---- State: in the caller's memory, no pointers ------------------------------------------------------- */
struct queue_state {
    struct ring_pos rx, tx, fill, comp;
    uint32_t rx_frames; /* with the device for reception: fill ring, kernel, rx ring */
    uint32_t tx_frames; /* with the device for transmission: tx ring, kernel, completion ring */
    struct afxdp_counters n;
} __attribute__((aligned(64)));

struct afxdp_state {
    uint32_t magic;
    uint32_t frames, stride, shift; /* stride == 1 << shift */
    uint32_t queues, fill_target;
    uint32_t free_count;
    uint32_t next_queue; /* where rx_burst and reap go on, so that no queue starves the others */
    uint64_t hungry;     /* bit per queue: below fill_target for want of free frames */
    uint32_t gone;       /* the interface was deleted */
    uint32_t bad_free;
    uint64_t free_off, meta_off, umem_off; /* bytes from the state's start */
    struct queue_state queue[AFXDP_MAX_QUEUES];
};

/* ---- View: this process's -------------------------------------------------------------------------------- */
struct queue {
    struct ring rx, tx, fill, comp;
    int fd;
    uint16_t number; /* of the interface */
    struct {
        void *at;
        size_t size;
    } map[4];
};

/* Where the kernel begins: a test puts its own here and plays the kernel on rings in ordinary memory. */
struct afxdp_sys {
    int (*wake_tx)(struct afxdp *dev, uint32_t qi); /* 0 or -errno */
    int (*wake_rx)(struct afxdp *dev, uint32_t qi);
};

struct afxdp {
    struct bypass_netdev nd; /* first: the netdev is the device */
    struct afxdp_state *st;
    uint32_t *free_list; /* LIFO: the frame freed last is the warmest in the cache */
    const struct afxdp_sys *sys;
    bool busy_poll; /* reception has to be driven by system calls */
    bool rx_csum_trust;
    uint32_t tx_meta_len; /* bytes in front of each packet that tell the kernel what to complete; 0: not offered */
    uint32_t rx_off;      /* where the kernel puts packets in a frame; the verdict ends there */
    int epoll_fd;         /* -1 with one queue: its socket serves */
    int namespace_fd;     /* the network namespace that it was opened in */
    int control_fd;       /* for questions about the interface, in its network namespace */
    uint32_t ifindex;
    struct afxdp_config cfg; /* as it was opened */
    struct queue queue[AFXDP_MAX_QUEUES];
};
_Static_assert(offsetof(struct afxdp, nd) == 0, "the netdev is the first member");

static inline struct bypass_pkt_meta *meta_at(const struct afxdp *d, uint32_t frame)
{
    return (struct bypass_pkt_meta *)((uint8_t *)d->nd.meta + (size_t)frame * META_STRIDE);
}

/* In front of a packet that is transmitted with the option XDP_TX_METADATA (Documentation/networking/xsk-tx-metadata.rst):
 * the kernel, or the device in zero-copy mode, completes the checksum. Here because headers older than Linux 6.8 lack it. */
struct tx_metadata {
    uint64_t flags;
    uint16_t csum_start, csum_offset; /* from the packet's first byte; from csum_start */
    uint32_t pad;
};
enum { TX_METADATA_OPTION = 1 << 1, TXMD_CHECKSUM = 1 << 1, UMEM_TX_METADATA_LEN = 1 << 2 };

/* umem.c */
uint32_t umem_fill_target(const struct afxdp_config *cfg); /* what a queue keeps for reception; 0: too few frames */
int umem_init(struct afxdp *d, const struct afxdp_config *cfg, void *mem, size_t size); /* 0, -EINVAL, -ENOMEM */
bool config_valid(const struct afxdp_config *cfg);
static inline void frame_to_pool(struct afxdp *d, uint32_t frame)
{
    d->free_list[d->st->free_count++] = frame;
    d->nd.free_frames = d->st->free_count;
}
static inline uint32_t frame_from_pool(struct afxdp *d) /* the pool is not empty */
{
    uint32_t frame = d->free_list[--d->st->free_count];

    d->nd.free_frames = d->st->free_count;
    return frame;
}
#ifdef BYPASS_DEBUG
void umem_check(struct afxdp *d, const char *where);
#else
static inline void umem_check(struct afxdp *d, const char *where) { (void)d, (void)where; }
#endif

/* netdev.c */
extern const struct bypass_netdev_ops afxdp_ops;
void fill_refill(struct afxdp *d, uint32_t qi);
void fill_undo(struct afxdp *d, uint32_t qi); /* of a queue that was never bound: its frames are free again */
/* The interface is gone: reap will give back all frames that the device held for transmission. */
void device_gone(struct afxdp *d);

#endif
