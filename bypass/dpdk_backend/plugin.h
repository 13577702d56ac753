/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plugin.h - what the DPDK plug-in (build/bypass-dpdk.so) offers: one table of functions. The plug-in alone is
 * compiled against DPDK; who uses it needs this header and dpdk_load() of load.h, and no DPDK.
 *
 *     dpdk_load() -> table -> start() once a process -> open() for each port -> netdev() for a stack -> close()
 *
 * A port's frames are the mbufs of one pool, so that nothing is copied between driver and stack. A frame's places:
 *
 *        alloc                    tx_burst                   reap
 *   free ------> caller (STACK) ----------> driver (STACK|DEV, mbuf refcnt 2; 1 when the driver is done) ------> caller or free
 *    |  driver takes                rx_burst
 *    `--------------> driver (RX) ----------> caller (STACK)
 *
 * One caller at a time per port; ports are independent of each other. Results are >= 0 or -errno. Drivers have threads
 * of their own (interrupts, alarms), which never touch a port's state here except the pool, which has a lock.
 * Read first: the Poll Mode Driver and Mbuf chapters of DPDK's programmer's guide.
 */
#ifndef BYPASS_DPDK_PLUGIN_H
#define BYPASS_DPDK_PLUGIN_H

#include "bypass.h"
#include "frames.h"

enum {
    DPDK_PLUGIN_ABI = 4, /* changes whenever a struct of this header changes its layout */
    DPDK_MAX_QUEUES = 16,
    DPDK_MAX_MEMBERS = 8, /* of a bonding device */
    DPDK_HEADROOM = 128,  /* bytes in front of each packet, beyond frame_size */
    DPDK_FLOWS = 4096,    /* rules of the device */
    DPDK_FLOW_ITEMS = 4,
    DPDK_FLOW_HEADER = 40, /* bytes of the longest header */

    /* dpdk_flow_item.kind */
    DPDK_FLOW_ETH = 1,
    DPDK_FLOW_VLAN,
    DPDK_FLOW_IPV4,
    DPDK_FLOW_IPV6,
    DPDK_FLOW_TCP,
    DPDK_FLOW_UDP,

    /* dpdk_config.flags */
    DPDK_F_NO_OFFLOADS = 1,      /* none of checksum, segmentation, scatter, even where the driver has them */
    DPDK_F_RX_CSUM_TRUST = 2,    /* received L4 checksums are taken as right: memory between two processes, a veth */
    DPDK_F_PROMISCUOUS = 4,      /* also frames for other MAC addresses */
    DPDK_F_NO_RX_INTERRUPTS = 8, /* who sleeps is woken by a timer */
    DPDK_F_RX_INTERRUPTS = 16,   /* by interrupts alone, or the port cannot be opened. Neither: where there are some */
};

struct dpdk_error {
    int32_t err;    /* positive errno */
    char text[500]; /* one line: what, where, what to do */
};

struct dpdk_config {       /* zeroed, then filled; 0 takes the default in brackets */
    char device[512];      /* devargs: "net_af_packet0,iface=eth1", or a PCI address "0000:03:00.0" with arguments */
    uint32_t queues;       /* receive and transmit queues each; RSS spreads flows over them [1] */
    uint32_t ring_size;    /* descriptors of each ring; the driver's limits adjust it [1024] */
    uint32_t frames;       /* in the pool [what rings and driver can hold, and twice as many again] */
    uint32_t frame_size;   /* packet bytes that a frame holds, headroom not included: 2048, 4096, 8192, 16384 [2048] */
    uint32_t mtu;          /* largest IP packet, bytes [the device's own, or what a frame holds where that is less] */
    uint32_t idle_us;      /* where a timer wakes: how long it sleeps, microseconds; up to 2000 after a while [100] */
    uint32_t vlan;         /* 802.1Q tag of what the port is about, where its device has to be told; 0: none */
    uint32_t link_poll_ms; /* between looks at the link and at a bonding device's members [100] */
    uint32_t flags;        /* DPDK_F_* */
};

struct dpdk_member { /* of a bonding device */
    char name[64];
    uint32_t link_up;
    uint32_t active; /* takes part: 1. An active-backup pair has one active member */
};

struct dpdk_about { /* what a port became */
    char driver[32];
    char device[64]; /* its name within EAL */
    uint8_t mac[6];
    uint16_t mtu;
    uint32_t queues;
    uint32_t rx_ring, tx_ring; /* descriptors */
    uint32_t frames, frame_size;
    uint32_t stride;              /* bytes of memory for each frame */
    uint32_t link_up, speed_mbps; /* now; speed 0 or UINT32_MAX: unknown */
    uint32_t if_index;            /* of the kernel's device below it; 0: none */
    int32_t numa;                 /* socket, -1: any */
    uint64_t rx_offered, rx_used; /* DPDK's offload bits; offload_name() says what they are */
    uint64_t tx_offered, tx_used;
    char wake[128];        /* what wakes a sleeper, and why not interrupts */
    uint32_t members;      /* of a bonding device */
    uint32_t bonding_mode; /* DPDK's number; only with members */
    struct dpdk_member member[DPDK_MAX_MEMBERS];
};

struct dpdk_counters { /* of one queue, since open; ours */
    uint64_t rx_packets, rx_bytes;
    uint64_t tx_packets, tx_bytes; /* handed to the driver */
    uint64_t tx_completed;
    uint64_t tx_full;       /* tx_burst stopped at a full ring */
    uint64_t tx_invalid;    /* refused: bad length or offset, or a frame that is not the caller's to send */
    uint64_t tx_abandoned;  /* given up when the device went away */
    uint64_t rx_bad;        /* dropped: longer than a frame, too short, or an mbuf of another pool */
    uint64_t rx_csum_bad;   /* the device says so; who takes the packet has the last word */
    uint64_t rx_linearized; /* came in several mbufs, copied into one */
    uint64_t tso_packets;   /* large packets handed to the device for segmentation */
    uint64_t tso_segments;  /* frames of the stack in them */
    uint64_t rx_idle;       /* looks that found nothing */
    uint64_t rx_interrupts; /* sleeps that the queue's interrupt (or socket) ended */
    uint64_t rx_timers;     /* that the timer ended; with queue 0, as the next */
    uint64_t rx_late;       /* of these: with frames that no interrupt had told of */
};

struct dpdk_stats { /* of the device, since open (rte_eth_stats) */
    uint64_t ipackets, opackets, ibytes, obytes;
    uint64_t imissed; /* no descriptor was free */
    uint64_t ierrors, oerrors;
    uint64_t rx_nombuf; /* no frame was free */
};

struct dpdk_xstat {
    char name[64];
    uint64_t value;
};

struct dpdk_flow_item { /* a header of a pattern, outermost first */
    uint32_t kind;
    uint8_t spec[DPDK_FLOW_HEADER], mask[DPDK_FLOW_HEADER]; /* as it is on the wire; mask 0: there has to be one */
};

struct dpdk_flow {     /* a rule of the device; without pointers, so that it may come from another process */
    uint32_t priority; /* 0 first */
    uint16_t items;
    uint16_t queues; /* 0: what matches is dropped; several share by their hash */
    uint16_t queue[DPDK_MAX_QUEUES];
    struct dpdk_flow_item item[DPDK_FLOW_ITEMS];
};

struct dpdk_port;

struct dpdk_plugin {
    uint32_t abi;        /* DPDK_PLUGIN_ABI; nothing else is looked at when it differs */
    const char *version; /* of DPDK, at run time */

    /* Starts EAL with these arguments (argv[0] is a name). Once a process: again with the same arguments is 0; with
     * others -EALREADY. The calling thread keeps its affinity. DPDK's own messages go to log(), from any thread; NULL:
     * nowhere, or to standard error where BYPASS_DPDK_LOG is set. 0, or -errno and *error says why; after a failure a second try fails as well (DPDK cannot). */
    int (*start)(int argc, const char *const *argv, void (*log)(int level, const char *text), struct dpdk_error *error);
    /* Probes, configures and starts a port. NULL: *error says why, and nothing is left of it. */
    struct dpdk_port *(*open)(const struct dpdk_config *cfg, struct dpdk_error *error);
    /* Valid until close(). */
    struct bypass_netdev *(*netdev)(struct dpdk_port *port);
    void (*about)(struct dpdk_port *port, struct dpdk_about *out);
    /* Text of one bit of rx_offered (tx 0) or tx_offered (tx 1). */
    const char *(*offload_name)(int tx, uint64_t bit);
    /* 0; -ENETDOWN: no link, recovers by itself; -ENXIO: removed, for good: reap gives back what was under transmission.
     * Looks at the device, whatever link_poll_ms says. */
    int (*health)(struct dpdk_port *port);
    /* Administratively: 1 up, 0 down. 0, -ENOTSUP (the driver cannot), -errno. */
    int (*set_link)(struct dpdk_port *port, int up);
    int (*counters)(struct dpdk_port *port, uint32_t queue, struct dpdk_counters *out); /* -EINVAL: no such queue */
    int (*stats)(struct dpdk_port *port, struct dpdk_stats *out);
    /* All extended statistics of the driver: their number, of which at most max are written. */
    int (*xstats)(struct dpdk_port *port, struct dpdk_xstat *out, uint32_t max);
    /* 0, or -EIO when the places do not add up. Walks all frames. */
    int (*audit)(struct dpdk_port *port, struct frame_audit *out);
    /* Has the device drop packets and choose their queues by these rules (rte_flow), in place of those before; rest: the
     * queue of what none matches, -1: as the port hashes. 0; or -errno, *error says why, *at is the number of the rule
     * that was refused (count: the rest cannot be kept on a queue), and no rule is in force. close() takes them off. */
    int (*flows)(struct dpdk_port *port, const struct dpdk_flow *flow, uint32_t count, int rest, uint32_t *at,
                 struct dpdk_error *error);
    /* Waits up to wait_ms for transmissions to complete, then stops and removes the device and frees the pool: the same
     * device may be opened again. Number of frames that the driver had not completed by then. */
    int (*close)(struct dpdk_port *port, uint32_t wait_ms);
};

#endif
