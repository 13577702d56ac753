/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fwd.h - what bypass-fwd is told, and what it tells: messages on a Unix socket of type SOCK_SEQPACKET. The broker
 * starts bypass-fwd with one end of a pair as descriptor 3; a successor connects to the socket that it listens on
 * (--listen), which only root may. Every request has one answer of the same type and seq, in order; error is a
 * positive errno, and then the answer is a struct fwd_error. Descriptors travel by SCM_RIGHTS. Numbers in host order.
 *
 * What bypass-fwd is for:
 *   store     what a broker would lose with its life: descriptors of links, programs, maps, memory, sockets, and what it
 *             knew, by name. Items named NAME.SOMETHING are parts of NAME and go with it. Who puts an item in keeps its
 *             own descriptors: a link is attached as long as any is open, so a broker that wants `kill -9` of bypass-fwd
 *             to detach everything closes its own.
 *   watches   an item may have processes. When all are dead, keys are deleted from maps, and its port and the item itself
 *             go, whether a broker lives or not.
 *   ports     shared mode: it holds the interface's AF_XDP sockets, or a DPDK port, and moves frames between it and
 *             applications.
 */
#ifndef BYPASS_FWD_H
#define BYPASS_FWD_H

#include "afxdp/afxdp.h"
#include "bypass.h"
#include "dpdk_backend/filter.h"
#include "dpdk_backend/plugin.h"
#include "port.h"

enum {
    FWD_ABI = 7,
    FWD_NAME = 64,           /* bytes of an item's name, with its 0 */
    FWD_BLOB = 4096,         /* bytes of an item */
    FWD_FDS = 128,           /* descriptors of an item, and of a message */
    FWD_PORTS_MAX = 256,     /* applications on an interface */
    FWD_ENTRIES_MAX = 65536, /* live entries of the steering program */
    FWD_LOCALS_MAX = 4096,   /* addresses of the host */
    FWD_KEYS_BYTES = 32768,  /* of one message */
    FWD_MAPS = 8,            /* maps of a watch */
    FWD_ARGS = 2048,         /* bytes of EAL's arguments */
    FWD_LIST_MAX = 256,      /* items of one answer */
    FWD_TEXT = 192,
    FWD_SPIN_US = 50, /* how long it polls before it sleeps, if nobody says */
};

enum fwd_type {
    FWD_HELLO = 1, /* struct fwd_hello: the first message. EPROTO: another abi; EBUSY: another broker is connected */
    FWD_QUIT,      /* fwd_head: ends when it has answered; everything closes */

    FWD_PUT,    /* fwd_item, descriptors: puts or replaces */
    FWD_GET,    /* fwd_name -> fwd_item, descriptors. ENOENT */
    FWD_LIST,   /* fwd_list -> fwd_list, `count` from item `from` on, in the order they were put in */
    FWD_DELETE, /* fwd_name: the item, its watch and its port. ENOENT */

    FWD_WATCH,       /* fwd_name, pidfds: more processes of the item */
    FWD_WATCH_KEYS,  /* fwd_keys, maybe a map: more keys to delete */
    FWD_FORGET_KEYS, /* fwd_keys: no more to delete. Those that there are not are none */
    FWD_UNWATCH,     /* fwd_name: nothing happens when its processes die */

    FWD_DEVICE_OPEN,  /* fwd_device, an XSKMAP: opens the interface's AF_XDP sockets and puts them into the map, from
                         `slot` on, by queue -> fwd_device_info. The descriptors never leave bypass-fwd.
                         Where all queues are asked for, those that the interface gets later are served too */
    FWD_DEVICE_CLOSE, /* fwd_head */
    FWD_LOCALS,       /* fwd_locals: all addresses of the host */
    FWD_PORT_ADD, /* fwd_port_add; memory file (sealed against shrinking), eventfd, socket. EEXIST, EINVAL, EPERM (seal) */
    FWD_PORT_DEL,  /* fwd_app */
    FWD_LEASE_ADD, /* fwd_lease. EEXIST: somebody has it */
    FWD_LEASE_DEL, /* fwd_lease. ENOENT */
    FWD_ENTRY,     /* fwd_entry: whose frames with this verdict are */
    FWD_RATE,      /* fwd_rate: what an application may send */
    FWD_SPIN,      /* fwd_spin */

    FWD_STATS,      /* fwd_head -> fwd_stats */
    FWD_PORT_STATS, /* fwd_app -> fwd_port_stats. ENOENT */

    /* With seq 0, to the broker. */
    FWD_DIED, /* fwd_name: all processes of the item are dead, and what its watch says is done */
    FWD_CUT,  /* fwd_app: it broke the rules of its port, which is not served any more */
    FWD_LINK, /* fwd_link: the interface's, whenever one of these has changed, and once to a broker that is new */
    FWD_QUEUES, /* fwd_queues: the interface has got more, which have sockets now. A veth runs no XDP program on them until
                 * one is attached anew: the broker's to do */

    FWD_LOOK,      /* fwd_head: looks at the interface (link, MTU, queues) now, and not within a second */
    FWD_DPDK_OPEN, /* fwd_dpdk; the classifier's memory, sealed against shrinking, and the exception path's TAP: starts DPDK
                       and opens a port -> fwd_device_info. What the classifier passes goes to the TAP */
    FWD_DPDK_STATS, /* fwd_app, app: the number of a queue -> fwd_dpdk_stats. ENODEV; EINVAL: no such queue */

    FWD_WATCHED, /* fwd_watched -> fwd_watched, `count` pidfds: the item's processes that are alive, from number `from` on */

    FWD_DPDK_XSTATS, /* fwd_dpdk_xstats -> the same, `count` of the driver's own counters from number `from` on. ENODEV */

    FWD_DPDK_FLOWS, /* fwd_flows; a file with the rules -> fwd_flows_done: rules of the port's hardware, in place of those
                       before; the port's own memory of them ends with it. ENODEV */
    FWD_DPDK_AUDIT, /* fwd_head -> fwd_dpdk_audit: looks at each of the port's frames. ENODEV */
};

/* Why a frame of an application was not sent. */
enum fwd_refusal {
    FWD_OK = 0,
    FWD_REFUSED_SHORT,
    FWD_REFUSED_SOURCE_MAC, /* not the interface's */
    FWD_REFUSED_GROUP_MAC,  /* to more than one host */
    FWD_REFUSED_VLAN,       /* tagged */
    FWD_REFUSED_NOT_IPV4,
    FWD_REFUSED_HEADER,  /* IP version or header length */
    FWD_REFUSED_OPTIONS, /* IP options: they could choose the way back */
    FWD_REFUSED_LENGTH,  /* total length and frame differ */
    FWD_REFUSED_MTU,
    FWD_REFUSED_CHECKSUM,    /* of the IP header */
    FWD_REFUSED_SOURCE,      /* not an address of this host */
    FWD_REFUSED_DESTINATION, /* not one host */
    FWD_REFUSED_PROTOCOL,
    FWD_REFUSED_FRAGMENT, /* of TCP or ICMP, or of a datagram whose first fragment was not seen */
    FWD_REFUSED_PORTS,    /* TCP or UDP header that is incomplete or contradicts itself */
    FWD_REFUSED_LEASE,    /* the source is not leased to this application */
    FWD_REFUSED_ICMP,     /* neither an error about a packet that it received, nor an echo reply that it may send */
    FWD_REFUSED_OFFLOAD,  /* a checksum to complete elsewhere than in a TCP or UDP header */
    FWD_REFUSALS,
};

enum {
    /* fwd_hello.flags */
    FWD_BROKER = 1, /* this is the broker: one at a time. Others may only look: HELLO, LIST, STATS, PORT_STATS */

    /* fwd_port_add.allow */
    FWD_ALLOW_VLAN = 1,
    FWD_ALLOW_GROUPS = 2, /* multicast and broadcast */
    FWD_ALLOW_PING = 4,   /* echo replies */

    /* fwd_lease.flags */
    FWD_LEASE_BLOCK = 1, /* 256 ports from local.port on, which is a multiple of 256 */
};

struct fwd_head {
    uint16_t type, error;
    uint32_t seq;
};

struct fwd_error {
    struct fwd_head head;
    char text[FWD_TEXT]; /* for people; ends with 0 */
};

struct fwd_hello { /* answer: the same with pid, items and ports */
    struct fwd_head head;
    uint32_t abi, flags;
    uint32_t pid, items, ports, device; /* device: its queues that are served; 0: none is open */
};

struct fwd_name {
    struct fwd_head head;
    char name[FWD_NAME];
};

struct fwd_item {
    struct fwd_head head;
    char name[FWD_NAME];
    uint32_t len;
    uint8_t blob[FWD_BLOB]; /* a message ends after len bytes */
};

struct fwd_listed {
    char name[FWD_NAME];
    uint32_t len, fds, pids, keys;
};

struct fwd_list {
    struct fwd_head head;
    uint32_t from, count;
    struct fwd_listed item[FWD_LIST_MAX]; /* a message ends after count of them; a request before them */
};

struct fwd_watched {
    struct fwd_head head;
    char name[FWD_NAME];
    uint32_t from, count; /* count: of the answer; FWD_FDS: there may be more */
};

struct fwd_keys {
    struct fwd_head head;
    char name[FWD_NAME];
    uint32_t
        map; /* below FWD_MAPS. With a descriptor: that is the map from now on, or a classifier's memory, whose keys are
                     struct classify_key; its keys so far are forgotten */
    uint32_t key_size, count;
    uint8_t keys[FWD_KEYS_BYTES]; /* a message ends after them */
};

struct fwd_device {
    struct fwd_head head;
    struct afxdp_config cfg;
    uint32_t slot;
};

struct fwd_device_info {
    struct fwd_head head;
    uint32_t caps, queues, zerocopy;
    uint16_t mtu;
    uint8_t mac[6];
    char driver[32]; /* of a DPDK port */
};

struct fwd_dpdk {
    struct fwd_head head;
    struct dpdk_config cfg;
    uint16_t vlan;           /* that the port's frames are tagged with; 0: with none */
    uint32_t exception_rate; /* packets a second to the TAP */
    uint32_t argc;
    char args[FWD_ARGS]; /* argc words for EAL, the program's name first, each with its 0; a message ends after them */
};

struct fwd_flows {
    struct fwd_head head;
    uint32_t count; /* of struct dpdk_flow in the file, which holds nothing else */
    int32_t rest;   /* as in dpdk_plugin.flows() */
};

struct fwd_flows_done {
    struct fwd_head head;
    uint32_t err; /* positive errno: rule `at` is refused, and none is in force; 0: all are */
    uint32_t at;
    char text[FWD_TEXT]; /* why */
};

struct fwd_local {
    struct bypass_addr addr;
    uint32_t prefix_len; /* 0..32 for IPv4 */
};

struct fwd_locals {
    struct fwd_head head;
    uint32_t count;
    struct fwd_local local[FWD_LOCALS_MAX]; /* a message ends after count of them; of IPv6 nothing comes yet */
};

struct fwd_port_add {
    struct fwd_head head;
    uint32_t app; /* not 0 */
    uint32_t allow;
    uint64_t mem_off;       /* of the port in the memory file, a multiple of 4096 */
    struct port_config cfg; /* as port_init() was called */
    char item[FWD_NAME];    /* whose death is the port's */
};

struct fwd_app {
    struct fwd_head head;
    uint32_t app;
};

struct fwd_lease {
    struct fwd_head head;
    uint32_t app, flags;
    uint32_t proto;                       /* 6 or 17 */
    struct bypass_endpoint local, remote; /* local.addr ::: any of the host; remote.port 0: any peer */
};

struct fwd_entry {
    struct fwd_head head;
    uint32_t entry;
    uint32_t app; /* 0: nobody's */
};

struct fwd_rate { /* per second; 0: no limit. burst: what may go at once after a pause */
    struct fwd_head head;
    uint32_t app;
    uint64_t bytes, bytes_burst;
    uint64_t packets, packets_burst;
};

struct fwd_spin { /* how long it polls before it sleeps, and the CPU it runs on (-1: any) */
    struct fwd_head head;
    uint32_t spin_us;
    int32_t cpu;
};

struct fwd_stats {
    struct fwd_head head;
    uint64_t rx_packets, rx_bytes; /* from the interface */
    uint64_t rx_nobody;            /* dropped: no application's */
    uint64_t tx_packets, tx_bytes; /* to the interface */
    uint64_t tx_dropped;           /* the interface went away with them */
    uint64_t no_frames;            /* rounds in which no frame was free to copy to */
    uint64_t rounds, sleeps;
    uint32_t ports, leases, items, link; /* link: 0 up, 1 down, 2 gone */
};

struct fwd_port_stats {
    struct fwd_head head;
    uint32_t app, cut, leases, reserved;
    uint64_t rx_packets, rx_bytes; /* to the application */
    uint64_t rx_full, rx_bad_slot; /* dropped: no frame posted; or one that there is not */
    uint64_t tx_packets, tx_bytes; /* copied from it */
    uint64_t tx_sent, tx_bad_slot; /* passed on; descriptors without sense */
    uint64_t tx_limited;           /* times that it had to wait for its rate */
    uint64_t rings, rings_failed;  /* wake-ups of it */
    uint64_t refused[FWD_REFUSALS];
};

struct fwd_dpdk_stats {
    struct fwd_head head;
    struct dpdk_counters queue; /* ours, of the queue that was asked for */
    struct dpdk_stats port;     /* the driver's, of the whole port */
    struct filter_counters filter;
    struct exception_counters kernel; /* of the exception path */
    struct dpdk_about about;
};

struct fwd_dpdk_xstats { /* a message ends after count of them; a request before them */
    struct fwd_head head;
    uint32_t from, count;
    struct dpdk_xstat xstat[FWD_LIST_MAX];
};

struct fwd_dpdk_audit {
    struct fwd_head head;
    struct frame_audit frames;
};

struct fwd_queues {
    struct fwd_head head;
    uint32_t queues; /* that it has now */
};

struct fwd_link {
    struct fwd_head head;
    uint32_t state; /* 0 up, 1 down, 2 gone */
    uint16_t mtu;
    uint8_t mac[6];
};

#endif
