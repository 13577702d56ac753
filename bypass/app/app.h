/* SPDX-License-Identifier: Apache-2.0 */
/*
 * app.h - what an application, the broker and bypass-fwd agree on: the layout of an application's memory, and the
 * messages on the broker's socket. No code beyond checks of these.
 *
 * An application is a unit of trust: one stack, one device, all processes that descend from one program by fork and
 * exec (relatives). All its state lies in one memory file (memfd, sealed in size), which the broker makes:
 *
 *     header | group: descriptors, processes, the lock | arena: the stack | device: rings or ports, frames
 *            |           preload/group.h               |     bypass.h     |  afxdp.h, fwd/port.h, app/loop.h
 *
 * Everything in it is the application's to write. Who else maps it (broker, bypass-fwd, tools) believes nothing of it.
 */
#ifndef BYPASS_APP_H
#define BYPASS_APP_H

#include "bypass.h"

enum {
    APP_MAGIC = 0x50504142, /* "BAPP" */
    APP_ABI = 3,            /* changes with any struct of this header, and of preload/group.h */
    APP_HEADER_SIZE = 4096,
    APP_NAME = 32,   /* bytes of a name, with its 0 */
    APP_QUEUES = 64, /* AF_XDP sockets of an application at most */
    APP_TOKEN = 16,  /* bytes */

    /* app_header.device */
    APP_DEV_LOOP = 1,  /* the stack talks to itself: no interface, no privilege */
    APP_DEV_AFXDP = 2, /* direct: AF_XDP rings of the interface */
    APP_DEV_PORT = 3,  /* shared: rings to bypass-fwd */
};

struct app_header { /* at the beginning; zero elsewhere at first */
    uint32_t magic, abi;
    uint64_t size; /* of the file, bytes */
    uint64_t group_off, group_size;
    uint64_t arena_off, arena_size;
    uint64_t dev_off, dev_size;
    uint32_t device;             /* APP_DEV_* */
    uint32_t app;                /* the application's number, from 1; 0 without a broker */
    struct bypass_config config; /* what bypass_create() is called with */
    uint32_t spin_us; /* how long a waiting call polls before it sleeps; the broker may change it at any time */
    uint32_t batch;   /* frames of one poll */
    uint16_t mtu;
    uint8_t mac[6];
    char ifname[16];
    char name[APP_NAME];             /* BYPASS_PROCNAME, or the program's */
    char congestion[BYPASS_CC_NAME]; /* default algorithm; empty: the stack's */
    uint8_t token[APP_TOKEN];        /* what relatives show to the broker */
};

enum {
    APP_GROUP_FIXED = 1 << 17,  /* bytes of the group's part (preload/group.h), and */
    APP_GROUP_PER_SOCKET = 256, /* for each of config.max_socks */
};

/* Fills in sizes and offsets of a header whose `config` and `device` are set: the memory file's size in bytes, or 0: the
 * configuration makes no sense. dev_size: of the device's part, which begins at a page. */
BYPASS_API size_t app_layout(struct app_header *h, size_t dev_size);
/* Whether offsets and sizes of a header lie within `size` bytes, do not overlap the header, and magic and abi fit. */
BYPASS_API int app_valid(const struct app_header *h, size_t size);

/* ---- Messages ------------------------------------------------------------------------------------
 *
 * On a Unix socket of type SOCK_SEQPACKET (BYPASS_SOCKET, default /run/bypass/broker.sock; a leading @ means the abstract
 * namespace): one struct app_msg each way, with descriptors by SCM_RIGHTS where said. Every request has one answer of the
 * same type and seq, in any order; messages with seq 0 are the broker's own accord. A process has one connection; its
 * end is the process' end, unless APP_EXEC announced another program. When the broker has ended without APP_DRAIN it was
 * killed: another one may come at the same name, to whom each process says hello as a relative again. The broker knows who asks by SO_PEERCRED.
 * Addresses as in bypass.h; numbers in host order.
 */
enum app_msg_type {
    /* First message of a connection. app 0: a new application, for `name`; else a relative, with app and token.
     * Answer: app, token, and the descriptors: memory file, then device (direct: one AF_XDP socket a queue; shared: an
     * eventfd to wake bypass-fwd, a datagram socket to be woken by it: fwd/port.h). error EACCES: policy grants this
     * user nothing; EBUSY: the interface is another application's; EPROTO: another abi. text says why. Then the broker
     * sends APP_ADDR_ADD and APP_GRANT for all there are, and APP_READY. */
    APP_HELLO = 1,
    APP_READY = 2,
    /* Reserves a local address and makes its flows live. kind BYPASS_STREAM or BYPASS_DGRAM; local; remote (port 0:
     * none: a listener or a bound datagram socket). One descriptor: the kernel socket that holds the port, or that is
     * to be bound now (connect: local port 0: the broker binds it to an address and port that the policy grants).
     * Answer: lease, local. error EACCES (text: which rule is missing), EADDRINUSE (live for another application),
     * ENETUNREACH, EDQUOT. The broker keeps a duplicate of the descriptor until the lease ends.
     * flags 1, of a connect without a local port: a block of ports would do. If the answer has flags 1 the lease is for
     * all ports from local.port to last_port of local.addr, to any peer that grants allow; the descriptor is not bound,
     * nor kept. No other socket has such a port at that moment, and the kernel chooses none; who binds by name may.
     * With flags 2 besides, the blocks that the application has are in use: another one; without, it may be the last of them.
     * With flags 4 besides nothing but a block will do, and no descriptor comes with it: they will soon be in use. */
    APP_LEASE = 3,
    /* Ends a lease: its packets are the kernel's, its port is free. Only when the stack has no connection on it. */
    APP_RELEASE = 4,
    /* How to reach remote.addr. APP_NEXTHOP with seq 0 tells it to all processes, at once or later, and again when it
     * changes; the answer has it too if it is known, else error EINPROGRESS. */
    APP_RESOLVE = 5,
    APP_NEXTHOP = 6, /* remote.addr, mac, mtu (0: the interface's); flags 1: unreachable, 2: forget it (addr ::: all) */
    APP_ADDR_ADD = 7, /* local.addr is this host's, prefix_len as bypass_addr_add() takes it; it may be known already */
    APP_ADDR_DEL = 8,
    /* One rule of the policy that this user may use; kind 0: both; local.port..last_port (0..65535: any),
     * remote.port..last_remote_port as well. index 0 begins a new list, flags 1 ends it: then it replaces the old one.
     * flags 2: the list is empty. A list has at most 256: where there are more, the last is all flows, and APP_LEASE tells. */
    APP_GRANT = 9,
    APP_REVOKED = 10, /* lease: the policy grants it no more. Its packets are the kernel's already */
    APP_LINK = 11,    /* flags 0: up, 1: down, 2: gone for good; mtu and mac as they are now */
    APP_EXEC = 12,    /* this process becomes another program, which says hello soon */
    /* The last process ends and the stack has data or connections: the broker drives it on until these are done, as
     * this user. It starts build/bypass-linger with BYPASS_SOCKET and BYPASS_APP ("APP:TOKEN", the token in hex), a
     * relative that says hello, and ends by itself. The answer is sent when that has begun. */
    APP_LINGER = 13,
    /* seq 0, no answer: the process `index` is a child of the sender's, with all it has; it says hello when it has to
     * do something. Until then the application lasts as long as that process, too. */
    APP_FORK = 15,
    APP_DRAIN = 14, /* the broker wants to end: no new leases; flags 1: at once */
    /* Direct mode: the interface has got a queue, of number `index`; there are going to be `flags` of them. One
     * descriptor: its AF_XDP socket, for afxdp_take_queue(). Soon after, the queue's packets come there. It may be told
     * again. Who says hello later gets the socket with the others, in their order, also before any relative has taken it. */
    APP_QUEUE = 16,
    /* A broker that was started after another one was killed has taken the application over: a lease that it has. Who
     * does not know it has given it back, or asked for it, while there was no broker, and releases it. */
    APP_LEASED = 17,
};

struct app_msg {
    uint16_t type;  /* enum app_msg_type */
    uint16_t error; /* positive errno of an answer; 0: good */
    uint32_t seq;
    uint32_t app;
    uint32_t lease;
    struct bypass_endpoint local, remote;
    uint32_t kind;
    uint32_t flags;
    uint16_t mtu;
    uint16_t last_port, last_remote_port;
    uint8_t prefix_len, remote_prefix_len; /* 0..128 of the 16 bytes; a grant's */
    uint32_t index;
    uint8_t mac[6];
    uint16_t abi; /* APP_HELLO: APP_ABI */
    uint8_t token[APP_TOKEN];
    char name[APP_NAME];
    char text[160]; /* for people: why not; ends with 0 */
};

#endif
