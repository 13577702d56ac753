/* SPDX-License-Identifier: Apache-2.0 */
/* udp.h - the UDP socket, shared by udp.c (naming, options), udp_in.c (receiving) and udp_out.c (sending). */
#ifndef BYPASS_STACK_UDP_H
#define BYPASS_STACK_UDP_H

#include "net.h"

enum { /* udp.flags */
       UDP_IN_USE = 1,
       UDP_CONNECTED = 2,
       UDP_ADDR_AUTO = 4, /* connect() chose the local address, the next one may choose another */
       UDP_REUSE = 8,
       UDP_BROADCAST = 16,
       UDP_SHUT_RD = 32,
       UDP_SHUT_WR = 64,
       UDP_BLOCKED = 128, /* was told -EAGAIN on sending: is in the list of the blocked */
       UDP_REUSEPORT = 256,
       UDP_KEEPALIVE = 512, /* kept only, as on Linux: datagrams have neither */
       UDP_OOBINLINE = 1024,
};

enum { MTU_DONT, MTU_WANT, MTU_DO, MTU_PROBE }; /* cut, cut but say so, never cut, never cut nor ask the path */

/* Received datagrams stand in a list. Those in frames are linked by meta.next, their payload is at meta.data_off from
 * the frame's start; those in chunks start with struct udp_stored and are linked by chunk.owner[0]. A link is a frame's
 * number, or a chunk's with this bit. */
enum { UDP_Q_NONE = 0xffffffff, UDP_Q_CHUNK = 0x80000000 };

struct udp {
    uint32_t link;
    uint32_t flags;
    uint32_t sock;      /* its handle entry, for events */
    uint32_t hash_next; /* same local port's bucket; index plus one */
    uint32_t blocked_next;
    uint16_t local_port, peer_port; /* 0: none */
    addr_t local, peer;             /* 0.0.0.0: any, none */
    uint32_t rcvbuf, sndbuf;
    uint32_t charged; /* bytes of frames and chunks that wait to be read */
    uint32_t q_head, q_tail;
    int32_t err;
    struct dst_ref dst; /* of the last datagram sent */
    addr_t from;        /* and its source, as long as the reference holds */
    uint16_t queue;     /* the last datagram read came by it; answers leave by it */
    uint8_t ttl, tos;
    int32_t linger_s; /* kept only, as on Linux: one datagram makes a socket readable, and close() never waits */
    uint32_t rcvlowat;
    uint8_t mtu_discover; /* MTU_*, ip(7) IP_MTU_DISCOVER */
    uint8_t pad[3];
};

struct udp_stored { /* in front of a datagram in chunks */
    addr_t src;
    uint32_t len;
    uint16_t port, queue;
};

static inline struct udp *udp_at(const struct bypass_stack *s, uint32_t i) { return pool_at(s, &core(s)->udps, i); }
static inline bool udp_has_addr(const struct udp *u) { return load_be32(addr_v4(&u->local)) != 0; }

/* udp.c */
uint32_t *udp_bucket(const struct bypass_stack *s, uint16_t port); /* index plus one */
int udp_bind_any(struct bypass_stack *s, uint32_t idx);            /* an ephemeral port, if it has none */
/* udp_in.c */
void udp_queue_free(struct bypass_stack *s, struct udp *u);
/* udp_out.c */
void udp_unblock(struct bypass_stack *s, uint32_t idx);
bool udp_may_send(const struct bypass_stack *s);

#endif
