/* SPDX-License-Identifier: Apache-2.0 */
/*
 * internal.h - the two halves of an AF_XDP device, and what its files share:
 *
 *   umem.c    layout of the memory, frames and who holds them, audit
 *   socket.c  sockets, rings, bind, options, statistics, closing
 *   interface.c  what is asked about the interface and its network namespace
 *   attach.c  a view of a device that another process opened
 *   netdev.c  the per-packet path: bypass_netdev_ops over the rings
 *   reclaim.c  the device of a process that was killed in the middle of anything
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
    uint32_t bytes;          /* of this struct: another build's is not ours */
    struct afxdp_config cfg; /* as opened, queues added since included: tells another process all sizes and offsets */
    uint32_t tx_meta_len, caps, ifindex;
    uint8_t mac[6];
    uint16_t mtu;                      /* the interface's; a view's may be less */
    uint64_t size;                     /* of the device's memory, bytes: has to follow from cfg */
    uint64_t cookie[AFXDP_MAX_QUEUES]; /* SO_COOKIE of each queue's socket */
    uint32_t fill_target;
    uint32_t free_count;
    uint32_t next_queue; /* where rx_burst and reap go on, so that no queue starves the others */
    uint32_t gone;       /* the interface was deleted */
    uint64_t hungry;     /* bit per queue: below fill_target for want of free frames */
    uint32_t bad_free;
    struct queue_state queue[AFXDP_MAX_QUEUES];
};

/* ---- View: this process's; all that bounds an access to the memory is here, read once and checked -------------------------------------------------------------------------------- */
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
    uint32_t shift; /* nd.stride == 1 << shift */
    bool busy_poll; /* reception has to be driven by system calls */
    bool rx_csum_trust;
    bool defer;           /* afxdp_defer(), */
    uint64_t owed;        /* ... and by bit the queues whose system call is due */
    uint32_t tx_meta_len; /* bytes in front of each packet that tell the kernel what to complete; 0: not offered */
    uint32_t rx_off;      /* where the kernel puts packets in a frame; the verdict ends there */
    int epoll_fd;         /* all sockets */
    int namespace_fd;     /* the network namespace that it was opened in; -1: opened by another process */
    int control_fd;       /* for questions about the interface, in its network namespace; -1: we are in another one */
    uint32_t ifindex;
    struct afxdp_config cfg; /* as in the state */
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
/* Pointers and sizes of the view, for memory that is laid out for cfg: reads and writes nothing of it. 0, -EINVAL (cfg,
 * alignment), -ENOMEM (size). */
int umem_view(struct afxdp *d, const struct afxdp_config *cfg, void *mem, size_t size);
int umem_init(struct afxdp *d, const struct afxdp_config *cfg, void *mem, size_t size); /* and a new state in it */
bool umem_sane(const struct afxdp *d); /* what the state says of pool and rings is possible */
bool config_valid(const struct afxdp_config *cfg);
static inline uint32_t fill_size(const struct afxdp_config *cfg)
{
    return cfg->fill_size ? cfg->fill_size : cfg->ring_size;
}
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

/* socket.c */
extern const struct afxdp_sys kernel_calls;
int fail(struct afxdp_error *error, int step, int queue, int option); /* notes errno; -1, for `return fail(...)` */
struct afxdp *view_new(const struct afxdp_config *cfg);               /* with no descriptor; NULL: no memory */
int rings_map(struct queue *q, const struct afxdp_config *cfg, struct afxdp_error *error); /* of q->fd; 0 or -1 */
int queue_watch(struct afxdp *d, uint32_t qi, struct afxdp_error *error);                  /* 0 or -1 */
/* Rings of the socket q->fd, not mapped, and its options. 0 or -1. */
int queue_prepare(struct queue *q, const struct afxdp_config *cfg, struct afxdp_error *error);
/* To its queue; but for the first, with the UMEM of the first. A busy one is tried until then. 0 or -1. */
int queue_bind(struct afxdp *d, uint32_t qi, const struct afxdp_config *cfg, uint64_t deadline_ns,
               struct afxdp_error *error);
void queue_release(struct queue *q); /* unmaps its rings, closes q->fd if there is one */
uint64_t socket_cookie(int fd);

/* interface.c */
int interface_find(struct afxdp *d, const char *ifname); /* 0 or -1 with errno */
void interface_attach(struct afxdp *d, int xsk);         /* as the state says; asks further only in xsk's namespace */
/* MAC address and MTU of the interface into state and netdev. 0 or -1 with errno. */
int interface_read(struct afxdp *d);
void interface_take(struct afxdp *d); /* from the state into the netdev; the MTU is also bounded by a frame */
/* Is it worth leaving transmit checksums to the kernel? In copy mode it completes them by software where the device
 * does not, a second pass over the data. In zero-copy mode the driver would have to say that it can: untried. */
bool interface_sums(const struct afxdp *d);
/* Makes the calling thread's network namespace the device's, for sockets belong to the one they are made in. A
 * descriptor of the one it was in, for namespace_leave(); -1: it is in the right one already; -2: errno. */
int namespace_enter(const struct afxdp *d);
void namespace_leave(int back);

/* netdev.c */
extern const struct bypass_netdev_ops afxdp_ops;
void fill_refill(struct afxdp *d, uint32_t qi);
void fill_undo(struct afxdp *d, uint32_t qi); /* of a queue that was never bound: its frames are free again */
/* The interface is gone: reap will give back all frames that the device held for transmission. */
void device_gone(struct afxdp *d);

#endif
