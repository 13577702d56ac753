/* SPDX-License-Identifier: Apache-2.0 */
/*
 * port.h - a port of the plug-in, and what its files share. These are the only files that see DPDK's headers:
 *
 *   eal.c     EAL, once a process; DPDK's messages
 *   pool.c    the frames: one mempool with a uniform stride, its free list, who holds what
 *   device.c  from devargs to a port of ethdev, and back; members of a bonding device
 *   port.c    opening, configuring and closing; every failure as one sentence
 *   tso.c     segments joined for a device that cuts them up
 *   netdev.c  the per-packet path: bypass_netdev_ops over rte_eth_rx_burst() and rte_eth_tx_burst()
 *   wake.c    what wakes a program that sleeps
 *   link.c    link, removal, members of a bonding device
 *   flow.c    rules of the device (rte_flow)
 *   guard.c   memif: its peer comes and goes while it is polled
 *   hook.c    calls of a driver into DPDK, taken over
 *   stats.c   what a port became and counts
 *   plugin.c  the table that the plug-in exports
 */
#ifndef BYPASS_DPDK_ETH_PORT_H
#define BYPASS_DPDK_ETH_PORT_H

#include <pthread.h>
#include <stdbool.h>

#include <rte_ethdev.h>
#include <rte_mbuf.h>
#include <rte_mempool.h>
#include <rte_spinlock.h>

#include "dpdk_backend/plugin.h"

/* ---- Frames: pool.c ------------------------------------------------------------------------------------
 *
 * Frame f is object f of the mempool, header and mbuf included, so that a frame ends where its buffer ends:
 *
 *     | objhdr | struct rte_mbuf | bypass_pkt_meta | headroom | packet ...... |
 *     0        64                192               256        384             stride
 */
enum {
    OBJ_HEADER = 64,
    META_AT = OBJ_HEADER + sizeof(struct rte_mbuf),
    BUF_AT = META_AT + 64,
    PACKET_AT = BUF_AT + RTE_PKTMBUF_HEADROOM, /* meta.off of a fresh frame */
    ETH_HEADER = 14,
    MAX_HEADER = 22, /* Ethernet with two VLAN tags */
};
_Static_assert(sizeof(struct rte_mbuf) == 128 && RTE_PKTMBUF_HEADROOM == DPDK_HEADROOM, "DPDK's usual layout");
_Static_assert(sizeof(struct bypass_pkt_meta) <= 64, "metadata of a frame fits its place");

struct pool {
    struct rte_mempool *mp;
    const struct rte_memzone *zone;
    uint8_t *base;
    uint32_t stride, frames;
    uint32_t shift;      /* stride is odd << shift; */
    uint64_t inverse;    /* ... the odd part's inverse modulo 2^64: exact division by one multiplication */
    uint32_t reserve;    /* frames that only the driver may take: an ACK has to find one to arrive in */
    uint32_t bad_free;   /* frames that came back and were not the driver's to give */
    rte_spinlock_t lock; /* drivers free from threads of their own */
    uint32_t count;
    struct rte_mbuf **list; /* free ones; LIFO: the one freed last is the warmest in the cache */
};

/* 0, or a positive errno with the reason in error->text. */
int pool_create(struct pool *pool, uint32_t frames, uint32_t frame_size, uint32_t reserve, int numa,
                struct dpdk_error *error);
void pool_destroy(struct pool *pool);

static inline struct bypass_pkt_meta *mbuf_meta(struct rte_mbuf *m) { return (struct bypass_pkt_meta *)(m + 1); }
static inline uint32_t mbuf_frame(const struct pool *p, const struct rte_mbuf *m)
{
    return (uint32_t)((((uint64_t)((const uint8_t *)m - OBJ_HEADER - p->base)) >> p->shift) * p->inverse);
}
static inline struct rte_mbuf *frame_mbuf(const struct pool *p, uint32_t frame)
{
    return (struct rte_mbuf *)(p->base + (size_t)frame * p->stride + OBJ_HEADER);
}
/* What alloc() may hand out. */
static inline uint32_t pool_free_frames(const struct pool *p)
{
    uint32_t count = __atomic_load_n(&p->count, __ATOMIC_RELAXED);

    return count > p->reserve ? count - p->reserve : 0;
}

/* ---- The port ------------------------------------------------------------------------------------------ */
struct tx_fifo { /* frames with the driver, in the order in which they were given to it; free-running positions */
    uint32_t *frame;
    uint32_t mask, head, tail;
    uint32_t stuck; /* reaps that found the head not completed, in a row */
};

struct queue {
    struct tx_fifo fifo;
    uint8_t tso_waits;   /* the driver took nothing that began with a large packet, times in a row; */
    uint8_t tso_refused; /* ... and as many small ones at once, times in a row */
    struct dpdk_counters n;
} __attribute__((aligned(64)));

struct member {
    uint16_t port_id;
    bool gone;
    bool link_up;
    bool away; /* gone, but its device may come back: at the earliest then */
    uint64_t due;
    uint32_t if_index;
    char name[64];
    char devargs[RTE_SIZEOF_FIELD(struct dpdk_config, device) + 64];
};

enum { DPDK_EARLY = 32 };
struct waker { /* wake.c */
    enum { WAKE_TIMER, WAKE_INTERRUPTS, WAKE_SOCKETS } source;
    int epoll; /* what wait_fd gives */
    int timer;
    int fd[DPDK_MAX_QUEUES];
    bool level;   /* these stay readable; else only what is new is an event */
    bool prompt;  /* the driver does not hold interrupts back */
    bool trusted; /* one has come */
    bool told;    /* the caller says when it sleeps */
    bool slept;   /* and what woke it has not been looked at */
    bool timed;   /* the timer did */
    bool slow;    /* which was to look at the link only */
    uint32_t on;  /* bits: queues that may interrupt */
    uint32_t fired;
    uint32_t misses;
    uint32_t refused;             /* by the driver, to switch interrupts on */
    uint32_t idle;                /* times that the timer was armed since something was received */
    uint64_t timer_tsc;           /* when it goes off */
    uint64_t refresh_tsc;         /* when the descriptors are looked at */
    uint64_t tsc_us;              /* ticks of a microsecond */
    bypass_pkt early[DPDK_EARLY]; /* early_at..early_n: received when interrupts were switched on */
    uint32_t early_at, early_n;
    char why[96]; /* not by interrupts */
};

struct guard {       /* guard.c */
    uint32_t busy;   /* the polling thread is in an operation */
    uint32_t closed; /* DPDK's interrupt thread wants to, or is in, a handler of the driver */
    struct dpdk_port *next;
};

struct dpdk_port {
    struct bypass_netdev nd; /* first: the netdev is the port */
    struct guard guard;
    bool guarded; /* it is memif, or has it below it */
    struct pool pool;
    uint16_t id; /* of ethdev */
    bool started;
    bool csum_trust, tx_csum;
    int tso_pieces;     /* mbufs that the device takes as one large segment; 0: it has no segmentation */
    uint64_t tso_flags; /* of a large segment's mbuf */
    uint32_t gone;      /* closed since it was removed: ethdev's functions are not called any more */
    uint32_t next_queue;
    uint32_t bad_free;
    struct waker wake;
    int claim_fd;       /* says that the interface has an owner; -1: it is not asked for, or not known */
    int control_fd;     /* for questions about the kernel's device, in the namespace of opening */
    uint32_t if_index;  /* of it; 0: none */
    uint16_t most_mtu;  /* the policy's, or what frames hold; the kernel's device may take less, now and then another */
    bool kernel_driver; /* it lives in the kernel: its link is the kernel's */
    /* Written by DPDK's interrupt thread. */
    uint32_t removed;
    uint32_t link_news;
    bool link_up;
    uint64_t link_tsc, link_due; /* between looks; next one */
    uint64_t lacp_tsc, lacp_due; /* rte_eth_bond_8023ad: tx_burst at least every 100 ms; 0: no LACP */
    uint32_t member_count;
    struct member member[DPDK_MAX_MEMBERS];
    struct dpdk_config cfg;
    char name[RTE_ETH_NAME_MAX_LEN];
    struct rte_device *device;
    struct rte_eth_dev_info info;
    struct rte_eth_conf conf;
    uint16_t rx_ring, tx_ring;
    struct port_flows *flows; /* rules of the device; NULL: none */
    struct queue queue[DPDK_MAX_QUEUES];
};
_Static_assert(offsetof(struct dpdk_port, nd) == 0, "the netdev is the first member");

/* eal.c */
int eal_start(int argc, const char *const *argv, void (*log)(int level, const char *text), struct dpdk_error *error);
/* DPDK's first complaint since log_mark(), for the end of a sentence; "": there is none. */
void log_mark(void);
const char *log_why(void);
__attribute__((format(printf, 3, 4))) int complain(struct dpdk_error *error, int err, const char *format,
                                                   ...); /* err */

/* device.c */
bool device_is_pci(const char *name); /* of EAL's names */
bool device_is_af_packet(const char *name);
/* Takes the device of cfg.device, and its members before it: id, name, info, member. 0, or a positive errno. */
int device_find(struct dpdk_port *port, struct dpdk_error *error);
/* Stops, closes and removes it; the second asks which it is. */
void device_close(uint16_t id, struct rte_device *device);
void device_unplug(uint16_t id);
/* DPDK's probing and removing is for one thread at a time. */
extern pthread_mutex_t device_lock;
/* A member's device once more, when it has been removed. Its port, or -errno: -EBUSY while another thread probes. */
int device_again(struct member *member);

/* claim.c: of the interface below a port that two processes could open. 0, or a positive errno. */
int claim_take(struct dpdk_port *port, struct dpdk_error *error);
void claim_drop(struct dpdk_port *port);

/* port.c */
struct dpdk_port *port_open(const struct dpdk_config *cfg, struct dpdk_error *error);
int port_close(struct dpdk_port *port, uint32_t wait_ms);

/* netdev.c */
extern const struct bypass_netdev_ops eth_ops;
/* Frames that the driver is not done with, of all queues. Those that it is done with are reaped. */
uint32_t tx_settle(struct dpdk_port *port);
/* Received frames of one queue, at most max; their number. */
int rx_queue(struct dpdk_port *port, uint32_t queue, bypass_pkt *out, int max);
#ifdef BYPASS_DEBUG
void port_check(struct dpdk_port *port, const char *where);
#else
static inline void port_check(struct dpdk_port *port, const char *where) { (void)port, (void)where; }
#endif

/* tso.c */
struct tso_undo {
    uint16_t ip_len, ip_sum, tcp_sum;
    uint8_t tcp_flags;
};
struct tso_packet { /* one mbuf or chain for the driver */
    int frames;     /* of the stack in it */
    struct tso_undo undo;
};
/* Joins what can be joined of n described mbufs, in place. Number of packets, each described in out. */
int tso_join(struct dpdk_port *port, struct rte_mbuf **mbufs, int n, struct tso_packet *out);
/* The driver did not take it: its frames are as before. */
void tso_take_back(struct rte_mbuf *first, const struct tso_packet *packet);

/* wake.c */
bool wake_by_driver(const struct dpdk_port *port); /* whether the driver is to be started with interrupts */
void wake_remember(void);                          /* before a port of net_af_packet is made */
int wake_open(struct dpdk_port *port, struct dpdk_error *error); /* when it has been started */
void wake_stop(struct dpdk_port *port);                          /* the device is about to be closed */
void wake_close(struct dpdk_port *port);
int wake_arm(struct dpdk_port *port);      /* bypass_netdev_ops.sleep() */
void wake_before(struct dpdk_port *port);  /* a look */
void wake_found(struct dpdk_port *port);   /* it found something; */
void wake_nothing(struct dpdk_port *port); /* nothing */
int wake_early(struct dpdk_port *port, bypass_pkt *out, int max);
void wake_about(const struct dpdk_port *port, char *out, size_t size);

/* link.c */
int link_watch(struct dpdk_port *port, struct dpdk_error *error); /* when it has been started */
void link_unwatch(struct dpdk_port *port);
void link_stopped(uint16_t id); /* before it is closed */
/* 0, -ENETDOWN or -ENXIO; looks when it is due or has been told of something. */
int link_look(struct dpdk_port *port, bool now);
int link_look_alone(struct dpdk_port *port); /* now, and not from an operation of the netdev */
int link_set(struct dpdk_port *port, int up);
uint32_t link_kernel_mtu(const struct dpdk_port *port, uint32_t if_index); /* 0: there is no such device */
void link_members(struct dpdk_port *port, struct dpdk_about *out);         /* what about() says of a bonding device's */

/* guard.c */
bool device_is_memif(const char *name);
int guard_install(struct dpdk_error *error,
                  const char *name); /* before the first of them is made. 0, or a positive errno */
/* In between no handler of the driver runs. Not for who polls. */
void guard_hold(void);
void guard_release(void);
void guard_add(struct dpdk_port *port); /* from here on handlers wait for who polls */
void guard_remove(struct dpdk_port *port);
const struct bypass_netdev_ops *guarded_ops(void);

/* hook.c */
struct hook {
    const char *name;
    void *with;
};
/* Calls of a loaded library (a part of its name), from now on. 0, or -errno. */
int hook_calls(const char *library, const struct hook *hooks, size_t n);

/* flow.c: dpdk_plugin.flows() */
int port_flows(struct dpdk_port *port, const struct dpdk_flow *flow, uint32_t count, int rest, uint32_t *at,
               struct dpdk_error *error);
void flow_clear(struct dpdk_port *port);

/* stats.c */
void port_about(struct dpdk_port *port, struct dpdk_about *out);
const char *port_offload_name(int tx, uint64_t bit);
int port_counters(struct dpdk_port *port, uint32_t queue, struct dpdk_counters *out);
int port_stats(struct dpdk_port *port, struct dpdk_stats *out);
int port_xstats(struct dpdk_port *port, struct dpdk_xstat *out, uint32_t max);
int port_audit(struct dpdk_port *port, struct frame_audit *out);

#endif
