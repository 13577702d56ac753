/* SPDX-License-Identifier: Apache-2.0 */
/*
 * core.h - what every file of the stack shares: the arena's head, pools, frames, the clock, counters,
 * and the seams between protocols. A packet meets, in order:
 *
 *   poll.c  -> tcp_fast.c (the usual TCP segment)
 *           -> eth.c -> arp.c
 *                    -> ipv4.c (reass.c) -> icmp.c
 *                                        -> udp.c
 *                                        -> tcp_in.c -> tcp_rcv.c, tcp_out.c ... -> sock.c (events)
 *   sock.c  -> tcp_*.c, udp.c -> ipv4.c (ip_out) -> dst.c -> eth header -> poll.c (transmit queue)
 */
#ifndef BYPASS_STACK_CORE_H
#define BYPASS_STACK_CORE_H

#include "counters.h"
#include "types.h"

/* ---- Pools: fixed arrays in the arena, named by index. Untouched entries stay untouched. -------- */
struct pool {
    uint64_t off;  /* bytes from the arena's start */
    uint32_t size; /* bytes an entry; the first four of a free entry link the free list */
    uint32_t cap;
    uint32_t used;
    uint32_t bump; /* entries below were handed out at least once */
    uint32_t free; /* head of the free list, NO_INDEX: empty */
    uint32_t pad;
};

/* 512-byte pieces for received payload that was copied out of its frame. */
enum { CHUNK_SIZE = 512, CHUNK_DATA = CHUNK_SIZE - 16, COPY_BREAK = 256 };
struct chunk {
    uint32_t next;
    uint16_t off, len; /* valid bytes: data[off .. off + len) */
    uint32_t owner[2]; /* the holder's own */
    uint8_t data[CHUNK_DATA];
};

enum { MAX_ADDRS = 16, RX_BATCH = 64 };
enum { UNCONNECTED_MAX = 65536 }; /* UDP sockets; TCP sockets that listen or are not connected yet: a port each */

struct local_addr {
    addr_t addr;
    int32_t prefix_len;
    uint32_t used;
};

struct core {
    uint32_t magic, abi;
    uint64_t size;
    struct bypass_config cfg;
    uint64_t now_ns;
    uint32_t now_ms, pad0;    /* the same, for timestamps: modulo 2^32 */
    uint64_t hash_key[2];     /* SipHash key of all flow tables */
    uint64_t flow_key[4];     /* of hash_flow() */
    uint32_t flow_aes, pad;   /* how hash_flow() hashes: decided once, all who attach do the same */
    uint64_t isn_key[2];      /* RFC 6528 secret */
    uint64_t port_key[2];     /* RFC 6056 secret */
    uint64_t fastopen_key[2]; /* RFC 7413 secret: its cookies */
    uint64_t rand_state[4];   /* expanded from env->random at creation */
    uint64_t stats[ST_COUNT];

    struct local_addr addrs[MAX_ADDRS];
    addr_t gateway;
    uint32_t has_gateway;
    uint16_t ip_id;
    uint16_t kick_again; /* errno of the last kick, 0 when the device took all: it holds frames to be told of again */

    /* transmit queue: frames handed to the device at the next flush; ring of txq_cap (power of two,
     * at least the number of frames, so that it cannot overflow) */
    uint64_t txq_off;
    uint32_t txq_cap, txq_head, txq_tail;

    uint32_t lent, writing; /* frames and chunks that a program holds; of these to be written (sock_zc.c) */
    uint32_t lend_serial, pad1;
    uint64_t lend_id; /* of this stack, among those that use the device one after the other */

    struct pool chunks;
    struct pool socks;
    uint32_t ev_head, ev_tail; /* sockets with unreported events */

    struct pool dsts, frags, udps, listeners, conns, colds, flights, ooos, ranges, reqs;
    uint64_t dst_state[16];  /* dst.c, arp.c: their own words (hash table offsets, clocks) */
    uint64_t frag_state[8];  /* reass.c */
    uint64_t icmp_state[8];  /* icmp.c: rate limit */
    uint64_t udp_state[16];  /* udp.c */
    uint64_t tcp_state[64];  /* tcp_*.c */
    uint64_t wheel_state[8]; /* wheel.c */
};

static inline struct core *core(const struct bypass_stack *s) { return s->arena; }
static inline void *at(const struct bypass_stack *s, uint64_t off) { return (uint8_t *)s->arena + off; }
enum { CORE_MAGIC = 0x42595041 }; /* "BYPA" */
static inline bool core_alive(const struct bypass_stack *s) { return core(s)->magic == CORE_MAGIC; }
static inline uint64_t now_ns(const struct bypass_stack *s) { return core(s)->now_ns; }
#define STAT(s, name) (core(s)->stats[ST_##name]++)
#define STAT_ADD(s, name, n) (core(s)->stats[ST_##name] += (n))

static inline void *pool_at(const struct bypass_stack *s, const struct pool *p, uint32_t i)
{
    return at(s, p->off + (uint64_t)i * p->size);
}
uint32_t pool_alloc(struct bypass_stack *s, struct pool *p); /* NO_INDEX when empty; contents are stale */
void pool_free(struct bypass_stack *s, struct pool *p, uint32_t i);

/* ---- Layout of the arena: each module reserves its share, in both size and create passes --------- */
struct layout {
    uint64_t next; /* bytes used so far */
};
uint64_t layout_bytes(struct layout *l, uint64_t bytes); /* offset, 64-byte aligned */
void layout_pool(struct layout *l, struct pool *p, uint32_t entry_size, uint32_t cap);
/* Each module: reserves, and sets offsets in *c (which is scratch in the size pass). Memory is zero. */
void dst_layout(struct layout *l, struct core *c);
void reass_layout(struct layout *l, struct core *c);
void udp_layout(struct layout *l, struct core *c);
void tcp_layout(struct layout *l, struct core *c);
void sock_layout(struct layout *l, struct core *c);

/* ---- Frames ------------------------------------------------------------------------------------ */
enum { /* meta.seg_flags: which queues of the stack a frame is in. It is freed when it is in none. */
       IN_TXQ = 1,
       IN_TCP = 2,   /* in a connection's send queue: kept until acknowledged */
       IN_LENT = 4,  /* the program's: received and lent, or being written (sock_zc.c) */
       IN_TAKEN = 8, /* ... about to be sent */
};
static inline struct bypass_pkt_meta *pkt_meta(const struct bypass_stack *s, bypass_pkt p)
{
    return (struct bypass_pkt_meta *)((uint8_t *)s->dev->meta + (size_t)p * s->dev->meta_stride);
}
static inline uint8_t *pkt_frame(const struct bypass_stack *s, bypass_pkt p)
{
    return s->dev->mem + (size_t)p * s->dev->stride;
}
static inline uint8_t *pkt_data(const struct bypass_stack *s, bypass_pkt p)
{
    return pkt_frame(s, p) + pkt_meta(s, p)->off;
}
/* The device completes TCP and UDP checksums from the pseudo-header's: payload is copied without being summed. */
static inline bool tx_csum_offload(const struct bypass_stack *s) { return (s->dev->caps & BYPASS_CAP_TX_CSUM) != 0; }
/* A frame for sending: off = headroom, len 0, seg_flags 0. PKT_NONE (counted) when there is none. */
bypass_pkt pkt_alloc(struct bypass_stack *s);
void pkt_free(struct bypass_stack *s, bypass_pkt p);
/* Room in front of / behind the packet. NULL when there is not enough. */
uint8_t *pkt_push(struct bypass_stack *s, bypass_pkt p, uint16_t n);
uint8_t *pkt_put(struct bypass_stack *s, bypass_pkt p, uint16_t n);
/* Received payload goes to chunks when it is small or frames are short (less than a quarter free). */
static inline bool pkt_should_copy(const struct bypass_stack *s, uint32_t payload_len)
{
    return payload_len <= COPY_BREAK || s->dev->free_frames < s->dev->frames / 4;
}
/* Frames are so few that new data has to wait: the rest is for acknowledgments, probes and resets. */
static inline bool pkt_scarce(const struct bypass_stack *s) { return s->dev->free_frames <= s->dev->frames / 16; }
uint32_t chunk_alloc(struct bypass_stack *s); /* NO_INDEX (counted) when there is none */
void chunk_free(struct bypass_stack *s, uint32_t i);
static inline struct chunk *chunk_at(const struct bypass_stack *s, uint32_t i)
{
    return (struct chunk *)at(s, core(s)->chunks.off) + i; /* the size is known here: a shift, no multiplication */
}
/* Queues a complete Ethernet frame for transmission. Takes over the stack's hold unless IN_TCP. */
static inline void tx_queue(struct bypass_stack *s, bypass_pkt p)
{
    struct core *c = core(s);
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->seg_flags |= IN_TXQ;
    STAT(s, tx_frames);
    STAT_ADD(s, tx_bytes, m->len);
    ((bypass_pkt *)at(s, c->txq_off))[c->txq_tail++ & (c->txq_cap - 1)] = p;
}

/* ---- Randomness, hashing ------------------------------------------------------------------------ */
uint64_t core_random(struct bypass_stack *s); /* unpredictable, from the secrets of creation */
/* hash.c */
void hash_init(struct core *c, const uint64_t secret[2]);
uint64_t siphash13(const uint64_t key[2], const void *data, size_t len);
uint64_t siphash13_12(const uint64_t key[2], uint64_t first, uint32_t rest);
bool hash_has_aes(void);
uint32_t hash_flow_aes(const uint64_t key[4], uint64_t hosts, uint32_t ports);
/* Of an IPv4 flow, as it lies on the wire from the peer's side: source and destination address, both ports. */
static inline uint32_t hash_flow(const struct bypass_stack *s, uint64_t hosts, uint32_t ports)
{
    const struct core *c = core(s);
    return likely(c->flow_aes) ? hash_flow_aes(c->flow_key, hosts, ports)
                               : (uint32_t)siphash13_12(c->flow_key, hosts, ports);
}
void core_log(const struct bypass_stack *s, int level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* ---- In: each consumes the frame (keeps or frees it) -------------------------------------------- */
struct rx_info { /* of the packet being processed; filled by eth_in and ipv4_in */
    addr_t src, dst;
    uint16_t l4_off; /* from meta.off */
    uint16_t l4_len;
    uint8_t proto, ttl, tos;
    bool multicast;     /* sent to a group or broadcast, on either layer */
    uint32_t flow_hash; /* of a TCP segment, when has_hash */
    bool has_hash;
};
/* 1: a TCP segment for a local address, unfragmented or reassembled, header checksum verified; ri is
 * filled and *p is the frame (a reassembled datagram may be another one). 0: consumed. */
int eth_in(struct bypass_stack *s, bypass_pkt *p, struct rx_info *ri);
void arp_in(struct bypass_stack *s, bypass_pkt p);
void icmp_in(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri);
void udp_in(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri);
void tcp_in(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri);

/* ICMP errors, to the flow they quote. src is ours (the quoted packet's source). */
struct icmp_error {
    addr_t src, dst;
    uint16_t src_port, dst_port;
    uint8_t type, code, proto;
    uint32_t seq; /* TCP: the quoted sequence number */
    uint16_t mtu; /* of code 4 */
    int err;      /* positive errno as Linux maps it; soft ones too */
    bool hard;    /* protocol/port unreachable (RFC 1122 4.2.3.9) */
};
void udp_icmp_error(struct bypass_stack *s, const struct icmp_error *e);
void tcp_icmp_error(struct bypass_stack *s, const struct icmp_error *e);

/* ---- Next hops ----------------------------------------------------------------------------------- */
enum { DST_PENDING, DST_OK, DST_FAILED };
struct dst {
    addr_t addr;
    uint32_t gen;  /* changes when the entry is reused */
    uint8_t state; /* DST_* */
    uint8_t mac[6];
    uint8_t in_use;
    uint16_t mtu;                  /* largest IP packet for this destination, bytes */
    uint16_t waiting;              /* datagrams queued on it, bounded */
    uint32_t wait_head, wait_tail; /* by meta.next */
    /* the rest is dst.c's */
    uint32_t hash_next;
    uint32_t via; /* entry of the gateway that it is reached by, or NO_INDEX */
    uint32_t ask_prev, ask_next;
    uint64_t used_ns;  /* last use: the longest unused is evicted */
    uint64_t due_ns;   /* when the question is asked again; answered: until when announcements are not believed */
    uint64_t check_ns; /* when the next use has to look closer: stale, failed long enough ago, old MTU */
    uint64_t pmtu_until_ns;
    uint16_t link_mtu; /* before ICMP said otherwise */
    uint8_t ask_list, tries;
    uint32_t fixed; /* the embedder said so: ARP has no say */
};
struct dst_ref { /* what a connection keeps; zero is none */
    uint32_t idx, gen;
};
/* The entry for dst (made and asked for when new), through the cached ref. NULL: table full. An entry
 * in state DST_PENDING asks; when it is answered tcp_dst_changed() runs. */
struct dst *dst_get(struct bypass_stack *s, struct dst_ref *ref, const addr_t *dst);
/* The path takes packets of mtu bytes only (RFC 1191 6.3: believed for ten minutes). The caller has checked that the
 * report is about a packet of its own. Values that no path has are ignored. */
void dst_lower_mtu(struct bypass_stack *s, struct dst *d, uint16_t mtu);
void tcp_dst_changed(struct bypass_stack *s); /* some entry was answered: blocked connections try again */
/* Source address for dst: the local address whose subnet holds it, else the first. false: none. */
bool addr_for(struct bypass_stack *s, const addr_t *dst, addr_t *src);
bool addr_is_local(const struct bypass_stack *s, const addr_t *a);
/* Adds the IPv4 and Ethernet headers in front of meta.off and queues. For packets that may wait for
 * their next hop (UDP, ICMP, resets): takes over the frame always, unless IN_TCP. 0, -EHOSTUNREACH,
 * -EMSGSIZE (only for DF packets larger than the path's MTU; dst's mtu tells). `df`: Don't Fragment. */
struct ip_tx {
    const addr_t *src, *dst;
    struct dst_ref *ref; /* may be NULL */
    uint8_t proto, ttl, tos;
    bool df;
};
int ip_out(struct bypass_stack *s, bypass_pkt p, const struct ip_tx *tx);
/* The fast half of ip_out for TCP: the entry is DST_OK and the packet fits. */
void ip_out_ready(struct bypass_stack *s, bypass_pkt p, const struct ip_tx *tx, const struct dst *d);

/* An answer to a stranger: a destination that is known is reached as ever, another by the link address that its packet
 * came from, and nothing is remembered for it. A flood of forged sources must not fill the cache of next hops, nor make
 * anybody ask for them. mac NULL: as ip_out(), whose results it has. Takes over the frame. */
int ip_out_back(struct bypass_stack *s, bypass_pkt p, const struct ip_tx *tx, const uint8_t *mac);
const uint8_t *pkt_came_from(const struct bypass_stack *s, bypass_pkt p); /* the sender's link address, or NULL */

/* ICMP destination unreachable (RFC 792) that quotes packet p (an IPv4 packet at meta.off, left as it
 * is), rate-limited. code 3: port. */
void icmp_unreachable(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri, int code);

/* Timers of dst.c, arp.c, reass.c together; and of tcp. */
uint64_t net_deadline(const struct bypass_stack *s);
uint64_t tcp_deadline(const struct bypass_stack *s);

/* ---- Sockets: handle table and events; a handle names an entry that names a protocol's object ------ */
enum { SOCK_FREE, SOCK_TCP, SOCK_LISTEN, SOCK_UDP };
/* How far the program has come with connect(), which is not how far the connection has: the first call after the
 * handshake ended reports that, later ones say EISCONN. As Linux' socket_state. */
enum { BOUND_ADDR = 1, BOUND_PORT = 2 };
enum { SS_UNCONNECTED, SS_CONNECTING, SS_CONNECTED, SS_DISCONNECTING };
struct sock {
    uint32_t link; /* free list; first by the rule of pools */
    uint32_t gen;
    uint32_t idx; /* of the connection, listener or UDP socket */
    uint32_t ev_next;
    uint8_t type;
    uint8_t ev_queued;
    uint16_t ev_mask;
    uint8_t phase; /* SS_*, of a TCP socket */
    uint8_t bound; /* BOUND_*: what the program chose stays when a connection attempt fails */
    uint16_t pad;
    uint64_t user;
};
uint32_t sock_alloc(struct bypass_stack *s, int type, uint32_t idx); /* index into socks, or NO_INDEX */
void sock_free(struct bypass_stack *s, uint32_t si);
void sock_event_queue(struct bypass_stack *s, uint32_t si);         /* behind those that wait to be reported */
struct sock *sock_get(const struct bypass_stack *s, bypass_sock h); /* NULL: stale */
static inline struct sock *sock_at(const struct bypass_stack *s, uint32_t si)
{
    return (struct sock *)at(s, core(s)->socks.off) + si;
}

static inline void sock_event(struct bypass_stack *s, uint32_t si, uint32_t mask) /* si may be NO_INDEX: no-op */
{
    if (si == NO_INDEX || mask == 0)
        return;
    struct sock *k = sock_at(s, si);
    k->ev_mask |= (uint16_t)mask;
    if (!k->ev_queued)
        sock_event_queue(s, si);
}

/* UDP, by index of its socket; results as the public calls of the same name. `si`: its handle entry. */
int udp_create(struct bypass_stack *s, uint32_t *idx);
void udp_set_sock(struct bypass_stack *s, uint32_t idx, uint32_t si);
int udp_bind(struct bypass_stack *s, uint32_t idx, const struct bypass_endpoint *local);
int udp_connect(struct bypass_stack *s, uint32_t idx, const struct bypass_endpoint *peer);
int64_t udp_sendto(struct bypass_stack *s, uint32_t idx, const void *buf, size_t n, int flags,
                   const struct bypass_endpoint *to);
int64_t udp_recvfrom(struct bypass_stack *s, uint32_t idx, void *buf, size_t n, int flags,
                     struct bypass_endpoint *from);
int udp_shutdown(struct bypass_stack *s, uint32_t idx, int how);
void udp_close(struct bypass_stack *s, uint32_t idx);
int udp_local(struct bypass_stack *s, uint32_t idx, struct bypass_endpoint *out);
int udp_peer(struct bypass_stack *s, uint32_t idx, struct bypass_endpoint *out);
int udp_setopt(struct bypass_stack *s, uint32_t idx, int opt, int64_t value);
int64_t udp_getopt(struct bypass_stack *s, uint32_t idx, int opt);
int udp_error(struct bypass_stack *s, uint32_t idx);
int udp_ready(struct bypass_stack *s, uint32_t idx);
int udp_port_users(struct bypass_stack *s, const addr_t *addr, uint16_t port);

/* Tear-down and audit of the network half: frames, waiting packets, reassembly. */
void net_destroy(struct bypass_stack *s);
void udp_destroy(struct bypass_stack *s);
void net_audit(const struct bypass_stack *s, struct bypass_audit *a);
void udp_audit(const struct bypass_stack *s, struct bypass_audit *a);

#endif
