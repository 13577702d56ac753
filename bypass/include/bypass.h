/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bypass.h - the public contract of the bypass core: a TCP/IP stack without I/O, clock or threads.
 *
 * Read it in this order: frames and netdev (how packets come in and go out), environment, creation,
 * driving the stack, sockets, introspection.
 *
 * Rules that hold everywhere:
 *  - All state of a stack lies in one memory range that the caller supplies (the arena). It holds no
 *    pointers and no callbacks, so it may be mapped at different addresses by different processes.
 *    `struct bypass_stack` is the process-local view of it: pointers live there and only there.
 *  - Nothing here allocates, blocks, exits, reads a clock or makes a system call. Time is an argument
 *    in nanoseconds of any monotonic clock; randomness and logging come through `bypass_env`; packets
 *    come through `bypass_netdev`.
 *  - Results are >= 0, or -errno (Linux numbering). No function sets errno.
 *  - One caller at a time per stack. Calls for different stacks are independent.
 *  - Addresses are 16 bytes in network order: IPv6, or IPv4 as ::ffff:a.b.c.d (RFC 4291 2.5.5.2).
 *    Ports are in host order.
 *  - Everything named `bypass_*` is exported from libbypass.so; nothing else is.
 */
#ifndef BYPASS_H
#define BYPASS_H

#ifndef BYPASS_CDEF /* the Python build reads this header with a parser that knows these types */
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#define BYPASS_API __attribute__((visibility("default")))
#else
#define BYPASS_API
#endif

enum {
    BYPASS_ABI = 3, /* changes whenever a struct of this header changes its layout */
};

/* ---- Frames ------------------------------------------------------------------------------------
 *
 * A frame is a fixed-size piece of packet memory, named by its number. The bytes of frame f lie at
 * dev->mem + f * dev->stride; its metadata lies beside the memory, never in it, at
 * dev->meta + f * dev->meta_stride.
 *
 *     frame f:  | headroom ........ | packet: meta.len bytes | tailroom |
 *               0                   meta.off                            stride
 *
 * A frame has at most one device holder and one stack holder (meta.holders). Transmitted TCP data has
 * both: the stack keeps it until the peer acknowledges, the device until it is reaped. A frame that
 * the device holds is neither written to nor submitted again. It returns to the free pool when its
 * last holder lets go.
 */
typedef uint32_t bypass_pkt;

enum {
    BYPASS_PKT_NONE = 0xffffffff,

    /* meta.holders */
    BYPASS_HOLD_STACK = 1, /* the stack (or another caller of alloc or rx_burst) */
    BYPASS_HOLD_DEV = 2,   /* the device, for transmission */
    BYPASS_HOLD_RX = 4,    /* the device, for reception (fill or rx ring) */

    /* meta.flags, receive */
    BYPASS_RX_CSUM_OK = 1, /* the device or the medium vouches for the TCP/UDP checksum */
    BYPASS_RX_VERDICT = 2, /* entry, rule and hash are the steering program's */
    /* meta.flags, transmit */
    BYPASS_TX_CSUM = 16, /* the device completes the checksum from csum_start and csum_off */
};

struct bypass_pkt_meta {
    uint16_t off;   /* first packet byte, from the frame's start */
    uint16_t len;   /* packet bytes */
    uint16_t queue; /* rx: the queue it came by; tx: the queue to send by */
    uint8_t flags;
    uint8_t holders;
    uint32_t entry;      /* steering verdict: live entry (endpoint) number */
    uint32_t rule;       /* steering verdict: number of the policy rule, in file order from 0 */
    uint32_t hash;       /* steering verdict: flow hash, not keyed: never use it for lookup tables */
    uint16_t csum_start; /* BYPASS_TX_CSUM: start of the checksummed bytes, from meta.off */
    uint16_t csum_off;   /* BYPASS_TX_CSUM: where the checksum goes, from csum_start */
    uint32_t next;       /* the rest belongs to the stack holder */
    uint32_t seq;
    uint32_t csum;
    uint16_t data_off;
    uint16_t data_len;
    uint64_t time_ns;
    uint32_t prev;
    uint16_t seg_flags;
    uint16_t seg_count;
    uint32_t after, skip; /* to a cache line */
};

/* ---- Network device ----------------------------------------------------------------------------
 *
 * A backend embeds `struct bypass_netdev` as the first member of its own struct. Every operation
 * works on batches and returns how many it did, or -errno; it never blocks.
 */
struct bypass_netdev;

struct bypass_netdev_ops {
    /* Takes up to n frames out of the free pool. The caller holds out[0..ret) (HOLD_STACK). */
    int (*alloc)(struct bypass_netdev *dev, bypass_pkt *out, int n);
    /* Lets go of the caller's hold. A frame that the device still transmits is freed when reaped. */
    void (*free)(struct bypass_netdev *dev, const bypass_pkt *pkts, int n);
    /* Received frames, in order per queue; meta off, len, queue, flags and verdict are set. The caller
     * holds out[0..ret). */
    int (*rx_burst)(struct bypass_netdev *dev, bypass_pkt *out, int max);
    /* Queues frames for transmission, in order. The device holds pkts[0..ret) until they are reaped;
     * the caller's hold is unchanged. Fewer than n: the ring is full, try after a reap. */
    int (*tx_burst)(struct bypass_netdev *dev, const bypass_pkt *pkts, int n);
    /* Completed transmissions: the device's hold ends. Frames that the stack holds too are written to
     * `done`; frames that nobody holds any more went to the free pool and count in the result only
     * by their absence. Returns the number written to `done`. */
    int (*reap)(struct bypass_netdev *dev, bypass_pkt *done, int max);
    /* Makes the device transmit and refill. 0, -EAGAIN (call again), -ENETDOWN, -ENXIO (gone). */
    int (*kick)(struct bypass_netdev *dev);
    /* A descriptor that becomes readable when frames arrive, or -ENOTSUP. */
    int (*wait_fd)(struct bypass_netdev *dev);
    /* May be NULL. The caller has found nothing and is about to sleep on wait_fd: the device switches on what wakes it.
     * > 0: frames have come meanwhile, do not sleep. Who has called it once calls it before each sleep. */
    int (*sleep)(struct bypass_netdev *dev);
};

enum {
    BYPASS_CAP_RX_CSUM = 1, /* sets BYPASS_RX_CSUM_OK where it may */
    BYPASS_CAP_TX_CSUM = 2, /* honours BYPASS_TX_CSUM */
    BYPASS_CAP_TX_LAZY = 4, /* may keep a frame it has sent until others follow: nobody may wait for its reaping */
};

struct bypass_netdev {
    const struct bypass_netdev_ops *ops;
    uint8_t *mem;
    struct bypass_pkt_meta *meta;
    uint32_t stride;      /* bytes from frame to frame */
    uint32_t meta_stride; /* bytes from metadata to metadata; at least sizeof(struct bypass_pkt_meta) */
    uint32_t frames;      /* number of frames */
    uint32_t free_frames; /* frames in the free pool now, kept by the backend */
    uint32_t caps;
    uint16_t queues;
    uint16_t mtu;      /* largest IP packet, bytes */
    uint16_t headroom; /* meta.off of a frame fresh from alloc: room for all headers, at least 128 */
    uint8_t mac[6];
};

/* ---- Environment ------------------------------------------------------------------------------ */
struct bypass_env {
    /* Fills buf with n unpredictable bytes; 0 or -errno. Called at creation only: the stack expands
     * its own secrets from it. */
    int (*random)(void *ctx, void *buf, size_t n);
    /* May be NULL. level: 0 debug, 1 info, 2 warning, 3 error. msg is valid during the call only. */
    void (*log)(void *ctx, int level, const char *msg);
    void *ctx;
};

/* ---- Creation --------------------------------------------------------------------------------- */
enum {
    /* bypass_config.flags */
    BYPASS_F_ARP = 1,  /* resolve next hops by ARP and answer ARP; else ask bypass_nexthop_wanted() */
    BYPASS_F_PING = 2, /* answer ICMP echo requests */
    BYPASS_F_RST = 4,  /* answer TCP for which no socket exists with a reset, UDP with unreachable */
    BYPASS_F_LOOPBACK =
        8, /* the device gives back what is sent to an own address: it is sent there, and taken from there.
                            * Addresses of 127.0.0.0/8 may be added. Without it nothing of the kind leaves or comes in */

    /* bypass_config.syn_cookies: a SYN that is answered without keeping anything about it (RFC 4987 3.6) */
    BYPASS_COOKIES_OFF = 0,
    BYPASS_COOKIES_WHEN_FULL = 1, /* only while the queue of half-open connections is full (default) */
    BYPASS_COOKIES_ALWAYS = 2,

    /* bypass_config.mtu_probing: packetization-layer path MTU discovery (RFC 4821) */
    BYPASS_MTU_PROBING_OFF = 0,
    BYPASS_MTU_PROBING_BLACKHOLE = 1, /* once a path has swallowed large segments (default) */
    BYPASS_MTU_PROBING_ALWAYS = 2,    /* on every connection, from a small MTU upwards */

    /* bypass_config.fastopen (RFC 7413), a set of bits */
    BYPASS_FASTOPEN_CLIENT = 1,
    BYPASS_FASTOPEN_SERVER = 2, /* on listeners that ask for it by BYPASS_TCP_FASTOPEN */
};

struct bypass_config {
    uint32_t abi;             /* BYPASS_ABI */
    uint32_t flags;           /* BYPASS_F_* */
    uint32_t max_conns;       /* TCP connections, in all states */
    uint32_t max_socks;       /* handles: listeners, UDP sockets, connections that a program holds */
    uint32_t max_chunks;      /* 512-byte pieces for received data that is copied out of frames */
    uint32_t max_dsts;        /* destinations in the next-hop cache */
    uint32_t max_frags;       /* IPv4 datagrams under reassembly */
    uint32_t sndbuf;          /* send buffer of a new socket, bytes */
    uint32_t rcvbuf;          /* receive buffer of a new socket, bytes */
    uint32_t max_syn_backlog; /* half-open connections of all listeners; one has at most its backlog, or 128 */
    uint32_t max_time_wait;   /* connections in TIME_WAIT; of more the oldest ends early */
    uint8_t syn_cookies;      /* BYPASS_COOKIES_* */
    uint8_t mtu_probing;      /* BYPASS_MTU_PROBING_* */
    uint8_t fastopen;         /* BYPASS_FASTOPEN_* */
    uint8_t tw_reuse;         /* 1: connect() may take over a TIME_WAIT older than a second, when timestamps guard it */
    uint32_t sndbuf_max;      /* sizes that a TCP socket's buffers grow to when the program does not set them; */
    uint32_t rcvbuf_max;      /* at least the defaults, at most 1 GiB; the window scale follows from rcvbuf_max */
    uint32_t delack_ms;       /* longest delay of an ACK, 1 to 500 */
    uint8_t ecn;              /* explicit congestion notification: default of BYPASS_TCP_ECN (2) */
    uint8_t keep_idle_window; /* 1: the congestion window stays after a pause; else it is reduced (RFC 5681 4.1) */
    uint16_t reserved;        /* 0 */
};

struct bypass_cc_ops;
enum {
    BYPASS_CC_MAX = 8 /* algorithms that a program may add */,
    BYPASS_CC_NAME = 16 /* bytes of a name, with its 0 */
};

struct bypass_stack { /* process-local; treat as opaque */
    void *arena;
    struct bypass_netdev *dev;
    struct bypass_env env;
    const struct bypass_cc_ops *cc[BYPASS_CC_MAX]; /* bypass_cc_register() */
    uint32_t attached;                             /* not the process that created it */
};

/* Fills cfg with defaults for `max_conns` connections. */
BYPASS_API void bypass_config_default(struct bypass_config *cfg, uint32_t max_conns);
/* Bytes of arena that cfg needs; 0 when cfg makes no sense. Untouched parts stay untouched, so memory
 * of untouched pages need not exist. */
BYPASS_API size_t bypass_arena_size(const struct bypass_config *cfg);
/* Creates a stack in zeroed memory, aligned to 64 bytes. -EINVAL (cfg, alignment), -ENOMEM (size),
 * or what env->random returned. `dev` must outlive the stack. */
BYPASS_API int bypass_create(struct bypass_stack *s, void *arena, size_t size, const struct bypass_config *cfg,
                             struct bypass_netdev *dev, const struct bypass_env *env, uint64_t now_ns);
/* Views an existing arena from another mapping or process. -EINVAL when it is not one. */
BYPASS_API int bypass_attach(struct bypass_stack *s, void *arena, size_t size, struct bypass_netdev *dev,
                             const struct bypass_env *env);
/* Resets live connections (a RST each), frees every socket, frame and timer. The arena may be reused
 * after it. */
BYPASS_API void bypass_destroy(struct bypass_stack *s);

/* ---- Addresses, routes, next hops -------------------------------------------------------------- */
struct bypass_addr {
    uint8_t b[16];
};
struct bypass_endpoint {
    struct bypass_addr addr;
    uint16_t port;
    uint16_t reserved[3];
};
/* A local address. prefix_len: of its subnet, 0..32 for IPv4. -EEXIST, -ENOSPC, -EAFNOSUPPORT. */
BYPASS_API int bypass_addr_add(struct bypass_stack *s, const struct bypass_addr *addr, int prefix_len);
BYPASS_API int bypass_addr_del(struct bypass_stack *s, const struct bypass_addr *addr);
/* The gateway for destinations on no local subnet (with BYPASS_F_ARP). NULL removes it. */
BYPASS_API int bypass_gateway_set(struct bypass_stack *s, const struct bypass_addr *gateway);
/* Without BYPASS_F_ARP: destinations whose next hop the stack wants to know. Each is reported once
 * until it is answered, or asked again after a second. Returns the number written. */
BYPASS_API int bypass_nexthop_wanted(struct bypass_stack *s, struct bypass_addr *out, int max);
/* The answer: frames for dst go to mac; mtu is the path's, 0 for the device's. mac NULL: unreachable
 * (waiting packets are dropped, connecting sockets get EHOSTUNREACH). -ENOSPC. */
BYPASS_API int bypass_nexthop_set(struct bypass_stack *s, const struct bypass_addr *dst, const uint8_t *mac,
                                  uint16_t mtu);
/* Forgets one next hop (NULL: all), so that its next use asks again. Connections are kept. */
BYPASS_API void bypass_nexthop_forget(struct bypass_stack *s, const struct bypass_addr *dst);

/* ---- Driving ----------------------------------------------------------------------------------- */
/* Receives, runs due timers, sends. At most `budget` frames are received. Returns how many were; -errno
 * of the device (-ENETDOWN, -ENXIO) after timers have run all the same. */
BYPASS_API int bypass_poll(struct bypass_stack *s, uint64_t now_ns, int budget);
/* Hands what socket calls produced to the device now. bypass_poll() does this too. */
BYPASS_API int bypass_flush(struct bypass_stack *s);
/* Moves the stack's clock without I/O (it never goes back). Socket calls use the time of the last
 * bypass_poll() or bypass_now(). */
BYPASS_API void bypass_now(struct bypass_stack *s, uint64_t now_ns);
/* When bypass_poll() must run next, absolute ns; UINT64_MAX: only when a frame arrives; a time in the
 * past: at once. */
BYPASS_API uint64_t bypass_deadline(const struct bypass_stack *s);

/* ---- Sockets ----------------------------------------------------------------------------------
 *
 * Handles carry a generation: a stale one gives -EBADF, never another socket. No call blocks: what
 * would block gives -EAGAIN, and an event tells when to try again.
 */
typedef int64_t bypass_sock; /* >= 0: a handle; < 0: -errno */

enum {
    BYPASS_STREAM = 1, /* TCP */
    BYPASS_DGRAM = 2,  /* UDP */

    /* readiness, in the spirit of poll(2) */
    BYPASS_IN = 1,     /* data, a connection to accept, or end of stream */
    BYPASS_OUT = 2,    /* room to send, or connected */
    BYPASS_ERR = 4,    /* bypass_error() has something */
    BYPASS_HUP = 8,    /* both directions are closed */
    BYPASS_RDHUP = 16, /* the peer closed its direction */
    BYPASS_PRI = 32,   /* an urgent byte waits for bypass_recv(BYPASS_OOB) */

    /* bypass_shutdown() */
    BYPASS_SHUT_RD = 0,
    BYPASS_SHUT_WR = 1,
    BYPASS_SHUT_RDWR = 2,

    /* bypass_recv() flags */
    BYPASS_PEEK = 1,
    BYPASS_TRUNC = 2, /* UDP: return the datagram's real size; TCP: throw bytes away without copying them */
    BYPASS_OOB = 8,   /* recv: the urgent byte, -EINVAL: there is none; send: the last byte is urgent (RFC 6093) */
    /* bypass_send() flags */
    BYPASS_MORE = 4,      /* more follows: do not send a partial segment yet. UDP: -EOPNOTSUPP */
    BYPASS_FASTOPEN = 16, /* bypass_sendto() on a TCP socket that is not connected: connects, and the data goes with
                           * the SYN where a cookie of the peer's is known (RFC 7413) */

    /* options (value is int64) */
    BYPASS_SO_SNDBUF = 1,
    BYPASS_SO_RCVBUF = 2,
    BYPASS_SO_KEEPALIVE = 3, /* 0 or 1 */
    BYPASS_SO_LINGER = 4,    /* seconds, -1 off; 0: close() resets */
    BYPASS_SO_REUSEADDR = 5,
    BYPASS_SO_BROADCAST = 6,
    BYPASS_IP_TTL = 7,
    BYPASS_IP_TOS = 8,
    BYPASS_SO_REUSEPORT = 9,
    BYPASS_SO_OOBINLINE = 10,
    BYPASS_SO_RCVLOWAT = 11,   /* bytes that make BYPASS_IN */
    BYPASS_SO_TYPE = 12,       /* cannot be set; BYPASS_STREAM */
    BYPASS_SO_ACCEPTCONN = 13, /* cannot be set; listening? */
    BYPASS_IP_MTU = 14,        /* cannot be set; of a connection's path. -ENOTCONN */
    BYPASS_IP_MTU_DISCOVER = 15,
    BYPASS_TCP_NODELAY = 16,
    BYPASS_TCP_MAXSEG = 17,
    BYPASS_TCP_QUICKACK = 18,
    BYPASS_TCP_CORK = 19,
    BYPASS_TCP_KEEPIDLE = 20, /* seconds */
    BYPASS_TCP_KEEPINTVL = 21,
    BYPASS_TCP_KEEPCNT = 22,
    BYPASS_TCP_USER_TIMEOUT = 23, /* milliseconds */
    BYPASS_TCP_SYNCNT = 24,
    BYPASS_TCP_LINGER2 = 25,        /* seconds; -1: FIN_WAIT_2 ends with close() */
    BYPASS_TCP_NOTSENT_LOWAT = 26,  /* bytes that may wait to be sent; 0: no limit */
    BYPASS_SO_MAX_PACING_RATE = 27, /* bytes a second that leave at most; 0 or negative: no limit. Turns pacing on */
    BYPASS_TCP_ECN = 28,            /* 0: never, 1: asked for and agreed to, 2: agreed to when the peer asks */
    BYPASS_TCP_KEEP_FRAMES = 29,    /* short payloads stay in their frames too, for bypass_recv_zc() */
    BYPASS_TCP_FASTOPEN = 30, /* of a listener: connections that may be open before their handshake ends; 0: none */
    BYPASS_TCP_FASTOPEN_CONNECT = 31, /* 1: connect() waits for the first send() where a cookie is known */
    BYPASS_OPT_COUNT,
};

BYPASS_API bypass_sock bypass_socket(struct bypass_stack *s, int type);
/* Port 0 chooses one. -EADDRINUSE, -EADDRNOTAVAIL, -EINVAL (bound already). */
BYPASS_API int bypass_bind(struct bypass_stack *s, bypass_sock sock, const struct bypass_endpoint *local);
BYPASS_API int bypass_listen(struct bypass_stack *s, bypass_sock sock, int backlog);
/* A handle of an established connection, -EAGAIN, -EINVAL (not listening), -ENFILE. */
BYPASS_API bypass_sock bypass_accept(struct bypass_stack *s, bypass_sock sock);
/* TCP: -EINPROGRESS, then BYPASS_OUT or BYPASS_ERR. Called again: -EALREADY, 0 once when it is open, or why it failed;
 * then the socket is as it was before and may connect elsewhere. 0: BYPASS_TCP_FASTOPEN_CONNECT. UDP: 0. -EADDRNOTAVAIL, -EISCONN, -ENETUNREACH. */
BYPASS_API int bypass_connect(struct bypass_stack *s, bypass_sock sock, const struct bypass_endpoint *peer);
/* Bytes queued (may be fewer than n), -EAGAIN, -EPIPE, -ENOTCONN, -ECONNRESET, -ETIMEDOUT, ... */
BYPASS_API int64_t bypass_send(struct bypass_stack *s, bypass_sock sock, const void *buf, size_t n, int flags);
/* Bytes read; 0: the peer closed its direction; -EAGAIN, -ENOTCONN, -ECONNRESET, -ETIMEDOUT, ... */
BYPASS_API int64_t bypass_recv(struct bypass_stack *s, bypass_sock sock, void *buf, size_t n, int flags);
/* UDP. One datagram each. to/from may be NULL on a connected socket. -EMSGSIZE, -EAGAIN,
 * -EDESTADDRREQ, -ECONNREFUSED, -EHOSTUNREACH. */
/* With BYPASS_FASTOPEN: bytes that went with the SYN; -EINPROGRESS: it went without, send them when it is connected;
 * -EOPNOTSUPP: not enabled; and what bypass_connect() gives. */
BYPASS_API int64_t bypass_sendto(struct bypass_stack *s, bypass_sock sock, const void *buf, size_t n, int flags,
                                 const struct bypass_endpoint *to);
BYPASS_API int64_t bypass_recvfrom(struct bypass_stack *s, bypass_sock sock, void *buf, size_t n, int flags,
                                   struct bypass_endpoint *from);

/* ---- Without copying (TCP) ---------------------------------------------------------------------
 *
 * Receiving lends the memory that the packet came in, sending takes the memory that the program wrote in. A buffer is out
 * from the call that gave it until bypass_release() or bypass_send_zc(), one of them, once; `token` names it:
 *
 *     bypass_recv_zc()    stack -> program: to read, until bypass_release()
 *     bypass_buf_alloc()  stack -> program: to write, until bypass_send_zc() or bypass_release()
 *     bypass_send_zc()    program -> stack: it must not be touched again
 *
 *  - Any process that has the stack may release or send a buffer, for any socket; `data` is its own process' address.
 *  - What is lent counts as unread: against the receive window, SO_RCVBUF, and the frames that a connection may hold. A
 *    program that never releases stops the connection's peer, and nobody else. All sockets together may have a quarter of
 *    the frames out for writing. bypass_audit.lent counts what is out.
 *  - Buffers outlive their socket and their connection: closing either changes nothing for them. They outlive
 *    bypass_destroy() too, while arena and device have their memory: bypass_release() still takes them then.
 *  - A token is good once and for this stack. Any other (released, sent, another stack's, invented) is -EINVAL and
 *    changes nothing.
 *  - Received payload lies in chunks of the arena instead, copied once, when it is short (BYPASS_TCP_KEEP_FRAMES: not
 *    then), and when frames are short or the program is slow; the calls are the same.
 */
struct bypass_buf {
    uint8_t *data;
    uint32_t len;
    uint32_t cap; /* of bypass_buf_alloc(): write at most so many bytes, and say in len how many */
    uint64_t token;
};
/* Lends what was received, in order, in up to max pieces of any length. The number of pieces; 0 and -errno as of
 * bypass_recv(). -EMSGSIZE: the mark of urgent data lies inside of the first piece, bypass_recv() reads up to it.
 * -EINVAL: max is not positive. -EOPNOTSUPP: not TCP. */
BYPASS_API int bypass_recv_zc(struct bypass_stack *s, bypass_sock sock, struct bypass_buf *out, int max);
/* Gives buffers back unused. 0; -EINVAL: one was not out, the others were released all the same. */
BYPASS_API int bypass_release(struct bypass_stack *s, const uint64_t *tokens, int n);
/* Up to max buffers to write payload in; cap is what one segment of this connection carries now. Their number;
 * -ENOBUFS: frames are short, or a quarter of them is out. -ENOTCONN, -EOPNOTSUPP, -EBADF, -EINVAL. */
BYPASS_API int bypass_buf_alloc(struct bypass_stack *s, bypass_sock sock, struct bypass_buf *out, int max);
/* Sends buffers, in order: bufs[0..result) are the stack's and cleared, the rest stays the program's. Each becomes a
 * segment as it is: small ones are not joined, and Nagle's algorithm holds only the last one back. One that has become
 * longer than a segment is split, which copies. Flags and errors as of bypass_send(); -EINVAL, and nothing is taken:
 * one is not out for writing, or comes twice, or len is 0 or more than cap. */
BYPASS_API int bypass_send_zc(struct bypass_stack *s, bypass_sock sock, struct bypass_buf *bufs, int n, int flags);

/* 1: what is read next is the urgent byte, or lies behind it (SIOCATMARK). 0, -EBADF, -EINVAL (not a TCP connection). */
BYPASS_API int bypass_at_mark(struct bypass_stack *s, bypass_sock sock);
/* TCP: ends what there is, with a reset, and the socket is fresh, as connect() to AF_UNSPEC does on Linux. */
BYPASS_API int bypass_disconnect(struct bypass_stack *s, bypass_sock sock);
BYPASS_API int bypass_shutdown(struct bypass_stack *s, bypass_sock sock, int how);
/* The handle is invalid afterwards; queued data is still delivered, unless unread data was thrown away
 * or linger is 0: then the peer gets a reset (RFC 9293 3.10.4, RFC 2525 2.17). */
BYPASS_API int bypass_close(struct bypass_stack *s, bypass_sock sock);
/* Resets the connection and closes. */
BYPASS_API int bypass_abort(struct bypass_stack *s, bypass_sock sock);
BYPASS_API int bypass_local(struct bypass_stack *s, bypass_sock sock, struct bypass_endpoint *out);
BYPASS_API int bypass_peer(struct bypass_stack *s, bypass_sock sock, struct bypass_endpoint *out);
BYPASS_API int bypass_setopt(struct bypass_stack *s, bypass_sock sock, int opt, int64_t value);
BYPASS_API int64_t bypass_getopt(struct bypass_stack *s, bypass_sock sock, int opt);
/* Pending error (positive errno) and clears it, like SO_ERROR; 0 none; -EBADF. */
BYPASS_API int bypass_error(struct bypass_stack *s, bypass_sock sock);
/* Readiness now (level). */
BYPASS_API int bypass_ready(struct bypass_stack *s, bypass_sock sock);
/* A value of the caller's, returned with each event. */
BYPASS_API int bypass_set_user(struct bypass_stack *s, bypass_sock sock, uint64_t user);

struct bypass_event {
    bypass_sock sock;
    uint64_t user;
    uint32_t mask; /* what became ready since the last report (edge), BYPASS_IN ... */
    uint32_t reserved;
};
/* Takes up to max events, oldest first. Returns the number. */
BYPASS_API int bypass_events(struct bypass_stack *s, struct bypass_event *out, int max);

/* ---- Congestion control --------------------------------------------------------------------------
 *
 * An algorithm is a table of functions. Built in: "cubic" (RFC 9438, the default), "reno" (RFC 5681), "dctcp"
 * (RFC 8257), "bbr". A program adds its own with bypass_cc_register(). What is lost, and when to send it again, is
 * the stack's business; an algorithm says how much may be in flight and, if it likes, how fast it leaves.
 *
 * Functions run inside of bypass_poll() and the socket calls. They must not call the stack, block, or keep a pointer
 * to what they are given beyond their return. Any of them may be NULL. They need no locking beyond the stack's own.
 */
enum {                           /* bypass_cc_ops.flags */
       BYPASS_CC_EVERY_ACK = 1,  /* acked() also when the window was not used, and in recovery; else only when a
                                   * larger window would have been used, outside recovery (RFC 7661) */
       BYPASS_CC_OWN_WINDOW = 2, /* cwnd is the algorithm's in recovery too; else proportional rate reduction
                                   * (RFC 6937) sets it there and what acked() writes to it is not taken */
       BYPASS_CC_KEEP = 4,       /* `state` outlives pauses with nothing in flight. Else it ends with them, as long as
                                   * ssthresh is UINT32_MAX, and init() begins anew: idle connections cost less */
       BYPASS_CC_PACED = 8,      /* segments leave at pacing_rate; init() has to set it */
       BYPASS_CC_EXACT_ECN = 16, /* asks for ECN, and marks are answered as RFC 8257 3 says, not as RFC 3168 */
};
enum { /* bypass_cc.ca_state */
       BYPASS_CA_OPEN = 0,
       BYPASS_CA_DISORDER = 1, /* duplicate ACKs or SACKs, nothing is lost yet */
       BYPASS_CA_CWR = 2,      /* reducing the window for an ECN mark */
       BYPASS_CA_RECOVERY = 3, /* fast recovery */
       BYPASS_CA_LOSS = 4,     /* after a retransmission timeout */
};
enum {                        /* event() */
       BYPASS_CC_EV_LOSS = 0, /* recovery begins; ssthresh() was asked before */
       BYPASS_CC_EV_RTO = 1,  /* a retransmission timeout; ssthresh() was asked before, unless the same data was hit
                                    * again. cwnd becomes one segment after it */
       BYPASS_CC_EV_ECN = 2,  /* the peer says that a segment was marked; ssthresh() was asked before */
       BYPASS_CC_EV_RECOVERED = 3, /* the three above are over */
       BYPASS_CC_EV_UNDO = 4,      /* they were a mistake: cwnd and ssthresh have their values from before */
       BYPASS_CC_EV_RESTART = 5,   /* with BYPASS_CC_KEEP: sending begins again after nothing was in flight */
};

enum { BYPASS_CC_BYTES = 128 };
struct bypass_cc { /* one connection, as a congestion control sees it; valid during the call */
    /* may be changed */
    void *state; /* BYPASS_CC_BYTES of the algorithm's own, aligned to 8, zero at init(). In the arena: no pointers */
    uint64_t pacing_rate; /* bytes a second; 0: not paced. Above BYPASS_SO_MAX_PACING_RATE has no effect */
    uint32_t cwnd;        /* congestion window, bytes; kept within one mss and 2^30 */
    uint32_t ssthresh;    /* slow-start threshold, bytes; UINT32_MAX: none yet */
    uint32_t held_back;   /* 0 in acked(); 1: the algorithm keeps the path emptier than it could, so that rates of what
                           * is sent from now on are marked app_limited, until the next call that leaves it 0 */
    /* to read */
    uint32_t mss;         /* payload bytes of a full segment */
    uint32_t srtt_us;     /* smoothed round trip (RFC 6298), microseconds; 0: none yet */
    uint32_t min_rtt_us;  /* smallest round trip of the last minutes; UINT32_MAX: none yet */
    uint32_t in_flight;   /* bytes thought to be in the network now */
    uint32_t flight_size; /* bytes sent and not acknowledged (RFC 5681 2); in ssthresh() at LOSS no more than cwnd */
    uint32_t ca_state;    /* BYPASS_CA_* */
    uint32_t snd_una;     /* sequence numbers: first byte not acknowledged, */
    uint32_t snd_nxt;     /* and next to be sent. They wrap */
    uint32_t random;      /* in init(): unpredictable */
    uint32_t limited;     /* in acked(): the window was used in this round trip, a larger one would have been too */
    uint32_t paused;      /* in acked(): since the last call there was a time in which it was not */
    uint64_t now_us;      /* the stack's clock, microseconds */
};

struct bypass_cc_sample {     /* what one ACK told; bytes and microseconds */
    uint64_t delivered_all;   /* bytes delivered since init(), this ACK's included */
    uint64_t prior_delivered; /* its value when the newest segment that this ACK delivered was sent */
    uint64_t rate_bytes;      /* delivered since then: over interval_us the delivery rate */
    uint64_t rtt_us;          /* of the newest segment acknowledged; 0: it tells none (Karn) */
    uint32_t interval_us;     /* 0: no valid delivery rate */
    uint32_t acked;           /* bytes newly acknowledged in order */
    uint32_t delivered;       /* bytes that have left the network towards the peer, by ACK or SACK */
    uint32_t lost;            /* bytes newly thought lost */
    uint32_t prior_in_flight; /* bytes in flight before this ACK */
    uint32_t ece;             /* 1: the ACK carried ECE */
    uint32_t app_limited;     /* 1: the rate tells what the program wrote, not what the path takes */
    uint32_t reserved;
};

struct bypass_cc_ops {
    const char *name; /* at most BYPASS_CC_NAME - 1 bytes */
    uint32_t flags;   /* BYPASS_CC_* */
    /* Before the first segment. cwnd is the initial window (RFC 6928) or what was left of it. Also when a live
     * connection is switched to this algorithm: then cwnd and ssthresh are those of the old one. */
    void (*init)(struct bypass_cc *cc);
    /* An ACK that delivered something (flags say when). */
    void (*acked)(struct bypass_cc *cc, const struct bypass_cc_sample *sm);
    /* The new slow-start threshold, bytes, when a loss, a timeout or an ECN mark was found. NULL: half of
     * flight_size, at least two segments (RFC 5681 equation 4). */
    uint32_t (*ssthresh)(struct bypass_cc *cc, int event);
    void (*event)(struct bypass_cc *cc, int event);
};
/* Makes `ops` known to this view of the stack under its name; the table must outlive it. The arena remembers the name,
 * not the pointer: a process that attaches registers the same algorithms before it calls anything else, in any order
 * (bypass_poll() gives -EINVAL until it has). -EEXIST (built in, or registered), -ENOSPC, -EINVAL (no or too long a
 * name; an attached process, and the arena does not know the name). */
BYPASS_API int bypass_cc_register(struct bypass_stack *s, const struct bypass_cc_ops *ops);
/* By name, for a socket: a listener's connections inherit it, a live connection is switched at once. -ENOENT: unknown,
 * -EBADF, -EOPNOTSUPP (UDP). */
BYPASS_API int bypass_cc_set(struct bypass_stack *s, bypass_sock sock, const char *name);
/* The name, with its 0, into out[0..n). -ERANGE: n is too small. */
BYPASS_API int bypass_cc_get(const struct bypass_stack *s, bypass_sock sock, char *out, size_t n);
/* The table of an algorithm, built in or registered here, e.g. to build one's own upon it. NULL: unknown. */
BYPASS_API const struct bypass_cc_ops *bypass_cc_table(const struct bypass_stack *s, const char *name);
/* What sockets made from now on have. -ENOENT. */
BYPASS_API int bypass_cc_default(struct bypass_stack *s, const char *name);
/* Names there are, from i = 0 on; NULL behind the last. */
BYPASS_API const char *bypass_cc_name(const struct bypass_stack *s, int i);

/* ---- Introspection ------------------------------------------------------------------------------ */
enum { /* connection states, RFC 9293 3.3.2, in the numbering of Linux' tcp_states.h */
       BYPASS_ESTABLISHED = 1,
       BYPASS_SYN_SENT = 2,
       BYPASS_SYN_RECEIVED = 3,
       BYPASS_FIN_WAIT_1 = 4,
       BYPASS_FIN_WAIT_2 = 5,
       BYPASS_TIME_WAIT = 6,
       BYPASS_CLOSED = 7,
       BYPASS_CLOSE_WAIT = 8,
       BYPASS_LAST_ACK = 9,
       BYPASS_LISTEN = 10,
       BYPASS_CLOSING = 11,
};

enum { /* bypass_tcp_info.flags */
       BYPASS_INFO_TIMESTAMPS = 1,
       BYPASS_INFO_WSCALE = 2,
       BYPASS_INFO_SACK = 4,
       BYPASS_INFO_ECN = 8,
       BYPASS_INFO_FASTOPEN = 16,    /* data went with the SYN, or came with it */
       BYPASS_INFO_APP_LIMITED = 32, /* delivery_rate was limited by the program */
};

struct bypass_tcp_info {
    struct bypass_endpoint local, peer;
    uint32_t state;
    uint32_t snd_una, snd_nxt, rcv_nxt;
    uint32_t snd_wnd, rcv_wnd; /* bytes */
    uint32_t cwnd, ssthresh;   /* bytes; ssthresh UINT32_MAX: none yet */
    uint32_t snd_mss;
    uint32_t snd_queued, rcv_queued; /* bytes: written and unacknowledged; received and unread */
    uint32_t srtt_us, rttvar_us, rto_us;
    uint32_t retransmits; /* segments, since the connection began */
    uint32_t flags;       /* BYPASS_INFO_* */
    uint8_t snd_wscale, rcv_wscale;
    uint8_t ca_state; /* 0 open, 1 disorder, 2 CWR, 3 recovery, 4 loss, as Linux numbers them */
    uint8_t timeouts; /* in a row */
    uint8_t probes;   /* unanswered */
    uint8_t backoff;  /* doublings of the timeout */
    uint8_t reserved[2];
    uint32_t unacked, sacked, lost, retrans; /* segments in flight, and of these */
    uint32_t notsent;                        /* bytes written and never sent */
    uint32_t ato_us;                         /* delay of an acknowledgment */
    uint32_t rcv_mss, advmss, pmtu;          /* largest seen; what our SYN offered; bytes of IP packet */
    uint32_t rcv_limit;                      /* the most that the window may open to, bytes */
    uint32_t rcv_rtt_us, rcv_space;          /* receive autotuning: round trip seen from here; bytes read in one */
    uint32_t min_rtt_us;                     /* UINT32_MAX: none yet */
    uint32_t segs_in, segs_out;              /* since the connection began */
    uint32_t data_segs_in, data_segs_out;    /* of these with payload */
    uint32_t delivered;                      /* segments of ours that arrived, the SYN included */
    uint32_t timeouts_total;                 /* retransmission timeouts */
    uint64_t bytes_acked, bytes_received;    /* with FIN, and the SYN of an active open, as RFC 4898 counts */
    uint64_t bytes_sent, bytes_retrans;      /* payload; bytes_sent counts repetitions too */
    uint64_t pacing_rate, delivery_rate;     /* bytes a second; pacing_rate 0: not paced */
    uint64_t max_pacing_rate;                /* BYPASS_SO_MAX_PACING_RATE; 0: no limit */
};
BYPASS_API int bypass_tcp_info(struct bypass_stack *s, bypass_sock sock, struct bypass_tcp_info *out);
/* The same in the layout of Linux' struct tcp_info (linux/tcp.h, as of 6.7), at most n bytes of it. Returns the
 * number written. Times that Linux gives and this stack does not keep are 0. */
BYPASS_API int bypass_tcp_info_linux(const struct bypass_tcp_info *info, void *out, size_t n);
/* Connections in every state, also those that no handle owns: *cursor starts at 0; returns 1 and fills
 * out, or 0 at the end. */
BYPASS_API int bypass_conn_next(struct bypass_stack *s, uint32_t *cursor, struct bypass_tcp_info *out);
/* Connections (any state but LISTEN and CLOSED) and listeners that own this local port; addr NULL: any. */
BYPASS_API int bypass_port_users(struct bypass_stack *s, int type, const struct bypass_addr *addr, uint16_t port);

/* Counters: an array of 64-bit values in the arena, readable at any time. */
BYPASS_API int bypass_stat_count(void);
BYPASS_API const char *bypass_stat_name(int i);
BYPASS_API const uint64_t *bypass_stats(const struct bypass_stack *s);

/* What a stack holds, read by a tool from a mapping of its arena while it runs, without its help: nothing that stands there
 * is believed. Memory that was damaged, or that changes meanwhile, makes wrong numbers or -EINVAL, never an access
 * outside of arena[0..size), and no more work than its size is worth. The arena may be mapped read-only. */
struct bypass_inspect {
    int32_t type;    /* BYPASS_STREAM, BYPASS_DGRAM */
    uint32_t handle; /* low half of the handle that holds it; UINT32_MAX: no program does */
    /* BYPASS_DGRAM: local, peer, rcv_queued (memory that received datagrams take) only. Of what lies in frames nothing
     * is told: `unacked` is computed from bytes, sacked, lost and retrans are 0; pmtu 0: the device's. */
    struct bypass_tcp_info info;
    char congestion[16]; /* the algorithm's name; empty: none, or unknown here */
};
/* 0, -EBADF (there is no such socket), -EINVAL (this is no arena, or it is damaged). */
BYPASS_API int bypass_inspect_sock(const void *arena, size_t size, bypass_sock sock, struct bypass_inspect *out);
/* Connections in every state, as bypass_conn_next(): 1, 0 at the end, -EINVAL. */
BYPASS_API int bypass_inspect_conn(const void *arena, size_t size, uint32_t *cursor, struct bypass_inspect *out);

struct bypass_audit { /* everything that is in use; all zero after an orderly end */
    uint32_t conns, listeners, udp_socks, handles, timers, chunks, frags, dst_waiting, frames, tx_pending, flights;
    uint32_t lent; /* frames and chunks that a program has out (bypass_recv_zc(), bypass_buf_alloc()) */
};
BYPASS_API void bypass_audit(const struct bypass_stack *s, struct bypass_audit *out);

#ifndef BYPASS_CDEF
#ifdef __cplusplus
}
#endif
#endif
#endif
