/* SPDX-License-Identifier: Apache-2.0 */
/*
 * port.h - the network device of an application in shared mode: memory and two rings that it shares with bypass-fwd,
 * which alone holds the interface. The application's half is port.c; bypass-fwd's, which believes nothing of what
 * stands here, is peer.c.
 *
 *   application                                  bypass-fwd
 *   rx ring: posts empty frames   -- slots -->   copies a received frame into each, in order, and fills the slot in
 *   tx ring: posts frames to send -- slots -->   copies each into its own memory, in order; then it checks and sends
 *
 * Both rings have two positions, free-running numbers of 32 bits: what the application posted, and what bypass-fwd is
 * done with. Since it works in order, the second is also the completion: a frame sent is the application's again when
 * it is copied.
 *
 *   memory:  | struct port_shared | rx slots | tx slots | free list | metadata, 64 bytes a frame | frames, frame_size each |
 *
 * All state lies in that memory without pointers: relatives by fork use one device, one caller at a time, each
 * with its own `struct port`. No memory is allocated here.
 *
 * Sleep and wake-up. Who is about to sleep says so in the memory and then looks at the ring once more; the other side
 * writes to the doorbell only when it finds that said. Between two that are busy no system call is made.
 *   to wake bypass-fwd:      an eventfd. bypass-fwd never reads it (it waits for edges).
 *   to wake the application: one end of a pair of Unix datagram sockets. Not an eventfd: the application could make
 *                            the write of bypass-fwd block, by filling it up and clearing O_NONBLOCK, which both share.
 */
#ifndef BYPASS_FWD_PORT_H
#define BYPASS_FWD_PORT_H

#include <stdbool.h>

#include "bypass.h"
#include "frames.h"

enum {
    PORT_STRIDE = 2048, /* a frame is one or several of these */
    PORT_MAX_STRIDE = 32768,
    PORT_HEADROOM = 256,
    PORT_ETH_HEADER = 14,
    PORT_MAX_FRAMES = 65536, /* 128 MiB, where a frame is one */
};

struct port_config {
    uint32_t frames;           /* at least 64 */
    uint32_t rx_ring, tx_ring; /* slots, powers of two from 16 on */
    uint32_t fill_target;      /* frames kept posted for reception; 0: as many as ring and half of the frames allow */
    uint32_t caps;             /* BYPASS_CAP_* of the interface */
    uint16_t mtu;
    uint16_t queues;     /* of the interface: answers go out by the queue that the question came by */
    uint8_t mac[6];      /* the interface's */
    uint16_t frame_size; /* bytes of a frame, PORT_HEADROOM included, a multiple of PORT_STRIDE; 0: PORT_STRIDE */
};

struct port_counters { /* of the application's half, since port_init() */
    uint64_t rx_packets, rx_bytes;
    uint64_t tx_packets, tx_bytes; /* handed to bypass-fwd */
    uint64_t tx_completed;
    uint64_t tx_full;      /* tx_burst stopped at a full ring */
    uint64_t tx_invalid;   /* refused: bad length or offset, or a frame that is not the caller's to send */
    uint64_t tx_abandoned; /* given up when the interface or bypass-fwd was gone */
    uint64_t rx_bad;       /* slots of bypass-fwd that make no sense */
    uint64_t fill_starved; /* a refill found too few free frames */
    uint64_t rings;        /* system calls to wake bypass-fwd */
    uint64_t rings_saved;  /* there was something to send, and it was awake */
    uint64_t woken;        /* wake-ups taken from the doorbell */
};

/* One process's view. */
struct port {
    struct bypass_netdev nd; /* first */
    struct port_shared *sh;
    struct port_rx_slot *rx;
    struct port_tx_slot *tx;
    uint32_t *free_list;
    int doorbell_out, doorbell_in;
    bool defer, owed; /* port_defer() */
    uint64_t about;   /* what was last seen of the device's MAC address and MTU */
};

/* Bytes of memory for cfg; 0: it makes no sense. */
BYPASS_API size_t port_mem_size(const struct port_config *cfg);
/* Makes a device in zeroed memory, aligned to a page: the broker's part. 0, -EINVAL, -ENOMEM (size). */
BYPASS_API int port_init(void *mem, size_t size, const struct port_config *cfg);
/* A view of it. doorbell_out: the eventfd that wakes bypass-fwd; doorbell_in: the socket by which it wakes us; -1: none
 * (who never sleeps). They stay the caller's. The view may be forgotten at any time. -EINVAL: there is no device. */
BYPASS_API int port_attach(struct port *port, void *mem, size_t size, int doorbell_out, int doorbell_in);
BYPASS_API struct bypass_netdev *port_netdev(struct port *port);

/* What relatives did meanwhile: brings port->nd.free_frames up to date. Every operation of the device does this too. */
BYPASS_API void port_sync(struct port *port);
/* As afxdp_defer(), afxdp_owed() and afxdp_kick_owed() (afxdp/afxdp.h): the system call that wakes bypass-fwd. */
BYPASS_API void port_defer(struct port *port, int on);
BYPASS_API bool port_owed(struct port *port);
BYPASS_API void port_kick_owed(struct port *port);
/* The embedder's lock was a process' that was killed, in the middle of any operation or with frames in hand: every frame
 * that the caller held is free, what is posted stays posted, and the books are right again. May be called again when it
 * was itself interrupted. 0, or -EBADMSG: the memory is damaged otherwise than by that. */
BYPASS_API int port_reclaim(struct port *port);
/* How the application sleeps on wait_fd(). Without being told, a receive call that finds fewer frames than asked for asks
 * for a wake-up, which costs who polls on a system call for what comes next. announced 1: only port_wait_begin() asks; all
 * processes of the application have to call it before they sleep. */
BYPASS_API void port_wait_announced(struct port *port, int announced);
/* 1: there are frames, do not sleep. 0: asked for; the next receive call takes it back. */
BYPASS_API int port_wait_begin(struct port *port);
/* The interface or bypass-fwd is gone for good: operations fail with -ENXIO, and reap gives everything back. */
BYPASS_API void port_set_gone(struct port *port);

BYPASS_API void port_counters(const struct port *port, struct port_counters *out);
/* Counts by walking all frames. 0, or -EIO when the places do not add up. */
BYPASS_API int port_audit(struct port *port, struct frame_audit *out);

#endif
