/* SPDX-License-Identifier: Apache-2.0 */
/*
 * net.h - what eth.c, arp.c, ipv4.c, reass.c, icmp.c, udp.c, addr.c and dst.c share among themselves: the state of the
 * network half and the seams that TCP and the socket layer do not see (those are in core.h).
 *
 * Links in hash tables and lists that start in zeroed memory hold an index plus one; 0 is none.
 */
#ifndef BYPASS_STACK_NET_H
#define BYPASS_STACK_NET_H

#include "core.h"
#include "wire.h"

struct net_local { /* a local IPv4 address, all as on the wire: what each packet is compared with */
    uint32_t addr;
    uint32_t bcast; /* of its subnet; the limited broadcast where the subnet has none (RFC 3021) */
    uint32_t mask;
};

/* Lists of destinations whose next hop is in question, in order of dst.due_ns. */
enum { ASK_NONE, ASK_NEW, ASK_SENT, ASK_LISTS };

struct net { /* lies in the arena at core.dst_state[0]; the hash table of destinations at [1], its mask is [2] */
    uint32_t clock_hand;     /* eviction starts looking here */
    uint32_t waiting_frames; /* on all destinations together */
    uint32_t locals;
    struct {
        uint32_t head, tail; /* index plus one */
    } ask[ASK_LISTS];
    struct net_local local[MAX_ADDRS];
};

static inline struct net *net(const struct bypass_stack *s) { return at(s, core(s)->dst_state[0]); }

static inline uint32_t load_be32(const void *wire)
{
    uint32_t v;
    memcpy(&v, wire, 4);
    return v;
}

static inline bool loops(const struct bypass_stack *s) { return (core(s)->cfg.flags & BYPASS_F_LOOPBACK) != 0; }

/* addr.c. Addresses of one IPv4 packet on the wire. */
enum addr_kind { ADDR_LOCAL, ADDR_BROADCAST, ADDR_MULTICAST, ADDR_UNICAST, ADDR_INVALID };
enum addr_kind addr_kind(const struct bypass_stack *s, const uint8_t *wire);
bool addr_on_link(const struct bypass_stack *s, const uint8_t *wire);

/* dst.c */
/* Datagrams that wait for one next hop: as Linux' unres_qlen_bytes counts full frames. A few of each may use all the room
 * that there is for all; beyond them only half of it, so that silent neighbours do not take it from the others. */
enum { WAIT_MAX = 101, WAIT_FEW = 3 };
void dst_purge(struct bypass_stack *s); /* all entries: addresses or routes changed */
/* The short half of dst_get(): the entry that ref names, if it is this address's and nothing is to be looked at. */
struct dst *dst_hit(const struct bypass_stack *s, const struct dst_ref *ref, const addr_t *addr);
struct dst *dst_find(const struct bypass_stack *s, const addr_t *addr);
/* The neighbour d is at mac. */
void dst_answer(struct bypass_stack *s, struct dst *d, const uint8_t *mac);
/* Queues a datagram, one frame or fragments linked by meta.next, complete but for the Ethernet header. Takes them. */
void dst_wait(struct bypass_stack *s, struct dst *d, bypass_pkt head, uint32_t frames);
void dst_timers(struct bypass_stack *s);
uint64_t dst_deadline(const struct bypass_stack *s);

/* arp.c. mac NULL: broadcast. */
void arp_ask(struct bypass_stack *s, const addr_t *target, const uint8_t *mac);

/* eth.c */
void eth_out(struct bypass_stack *s, bypass_pkt p, const struct dst *d);

/* ipv4.c. The packet at meta.off, which is `ip`; results as of eth_in(). */
int ipv4_in(struct bypass_stack *s, bypass_pkt *p, struct bypass_pkt_meta *m, const uint8_t *ip, struct rx_info *ri);
/* Sends one datagram in pieces: frames linked by meta.next, each but the last a multiple of 8 bytes.
 * Takes them all. 0 or -EHOSTUNREACH. */
int ip_out_fragments(struct bypass_stack *s, bypass_pkt head, const struct ip_tx *tx);
void pkt_free_list(struct bypass_stack *s, bypass_pkt head); /* linked by meta.next */
void ipv4_checksum_set(uint8_t *ip, uint32_t hlen);

struct reass { /* lies in core.frag_state */
    uint64_t table_off;
    uint32_t mask;
    uint32_t oldest, newest; /* index plus one */
    uint32_t frames;         /* held by all datagrams together */
};
static_assert(sizeof(struct reass) <= sizeof(((struct core *)0)->frag_state), "fits the core's words");

static inline struct reass *reass(const struct bypass_stack *s) { return (struct reass *)core(s)->frag_state; }

/* Senders that wait for a frame: the first's index plus one. */
static inline uint64_t *udp_blocked_head(const struct bypass_stack *s) { return &core(s)->udp_state[2]; }

/* Timers of dst.c, reass.c and udp_out.c. Nearly always nothing waits anywhere: three words tell. */
void net_timers_run(struct bypass_stack *s);
static inline void net_timers(struct bypass_stack *s)
{
    if (unlikely(net(s)->ask[ASK_SENT].head != 0 || reass(s)->oldest != 0 || *udp_blocked_head(s) != 0))
        net_timers_run(s);
}

/* reass.c. Consumes *p. 0: held or dropped. 1: *p is the whole datagram in one frame. 2: *p heads a list of frames
 * (meta.next), meta.off at the IP header and meta.data_len bytes behind it in each: too large for one frame. */
int reass_in(struct bypass_stack *s, bypass_pkt *p, struct rx_info *ri);
void reass_timers(struct bypass_stack *s);
uint64_t reass_deadline(const struct bypass_stack *s);
void reass_destroy(struct bypass_stack *s);

/* icmp.c. An error about the IPv4 packet at meta.off of p, which is left as it is. */
void icmp_error_out(struct bypass_stack *s, bypass_pkt p, uint8_t type, uint8_t code);

/* udp.c. A datagram in a list of frames, as reass_in() leaves it. Consumes them. */
void udp_in_large(struct bypass_stack *s, bypass_pkt head, const struct rx_info *ri);
void udp_timers(struct bypass_stack *s); /* senders that waited for a frame */
uint64_t udp_deadline(const struct bypass_stack *s);

#endif
