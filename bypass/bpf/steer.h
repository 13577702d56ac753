/* SPDX-License-Identifier: (GPL-2.0 OR BSD-2-Clause) */
/*
 * What the steering program (xdp_steer.c) and the reset guard (tc_guard.c) share: maps, the match of a flow against
 * the policy's rules, and the search for the live endpoint of a flow. The layouts are repeated in bypass/steering.py.
 *
 * build.py compiles this with constants of the policy, so that what a policy does not use costs nothing:
 *   MASKS(M)     one M(...) per mask, by descending highest rank; see match_mask() for its arguments
 *   KEY_V6       addresses in rule keys have 16 bytes (IPv4 as ::ffff:a.b.c.d); else 4
 *   WITH_V6      IPv6 packets are parsed
 *   VLAN_DEPTH   tags that are looked behind, 0..2
 * Map sizes below are those of the throw-away maps that bcc creates while it compiles; steering.py creates the real
 * ones, so that a program can be exchanged under the same endpoints and sockets.
 */
#ifndef BYPASS_BPF_STEER_H
#define BYPASS_BPF_STEER_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/types.h>
#include <linux/udp.h>

#define be16(x) ((u16)__builtin_bswap16(x)) /* of constants; both supported architectures are little-endian */

#define ADDR_WORDS (KEY_V6 ? 4 : 1)
#define ADDR_LAST (ADDR_WORDS - 1) /* the word that holds an IPv4 address */
#define MAX_MASKS 16
#define MAX_QUEUES 256 /* slots of one owner in xsks */

enum { ACTION_STEER = 0, ACTION_PASS = 1, ACTION_DROP = 2 };           /* low two bits of rule_value.rule_action */
enum { ENDPOINT_DRAIN = 1 };                                           /* endpoint.flags */
enum { KIND_EXACT = 1, KIND_LOCAL = 2, KIND_ANY = 4, KIND_BLOCK = 8 }; /* config.kinds: which lookups can hit */
enum { BLOCK_MASK = 0xff00, KEY_BLOCK = 1 << 8 };                      /* of a port; in endpoint_key.proto */

/* Addresses and ports in network order, the rest in host order. */
struct flow {
    u32 local[ADDR_WORDS];
    u32 remote[ADDR_WORDS];
    u16 local_port; /* 0 for packets without ports, as is remote_port */
    u16 remote_port;
    u16 vlan; /* identifier of the outermost tag, 0 without */
    u8 proto;
    u8 family; /* 4 or 6 */
};

struct rule_key { /* 16 bytes, 40 with KEY_V6 */
    u32 local[ADDR_WORDS];
    u32 remote[ADDR_WORDS];
    u16 local_port;
    u16 remote_port;
    u16 vlan;
    u8 proto;
    u8 family_mask; /* family (0: not compared) << 4 | number of the mask */
};

struct rule_value {
    u32 rank;        /* larger wins; unique to the rule, from 1 */
    u32 rule_action; /* rule number << 2 | ACTION_* */
};

struct endpoint_key { /* IPv4 */
    u32 local;        /* 0: any */
    u32 remote;       /* 0, as is remote_port: not connected */
    u16 local_port;   /* with KEY_BLOCK the first of the block */
    u16 remote_port;
    u32 proto; /* with KEY_BLOCK, or not */
};

struct endpoint {
    u32 entry; /* index into entry_count */
    u32 owner; /* its sockets lie at owner * MAX_QUEUES of xsks */
    u32 flags;
    u32 reserved;
};

struct config {
    u8 mac[6];
    u16 kinds;
};

struct ranks {
    u32 max[MAX_MASKS];
};

struct count {
    u64 packets;
    u64 bytes;
};

struct address6 {
    u32 word[4];
};

/* Of one policy: a swap brings new ones. */
BPF_TABLE("hash", struct rule_key, struct rule_value, rules, 1);
BPF_TABLE("array", u32, struct ranks, ranks, 1);
BPF_TABLE("percpu_array", u32, struct count, rule_count, 1);
/* Of the interface: they outlive the policy. */
BPF_TABLE("hash", struct endpoint_key, struct endpoint, endpoints, 1);
BPF_TABLE("array", u32, struct config, config, 1);
BPF_TABLE("hash", u32, u8, locals4, 1);
BPF_TABLE("hash", struct address6, u8, locals6, 1);
BPF_TABLE("hash", u64, u8, groups, 1);
BPF_TABLE("percpu_array", u32, struct count, entry_count, 1);
BPF_TABLE("percpu_array", u32, struct count, reason_count, 1);
BPF_TABLE("percpu_array", u32, struct count, guard_count, 1);
BPF_XSKMAP(xsks, 1);

/* One mask: a lookup with the fields that it compares. All arguments but the first two are constants. */
static inline void match_mask(const struct flow *f, struct rule_value *best, u8 mask, u8 family, u32 l0, u32 l1, u32 l2,
                              u32 l3, u32 r0, u32 r1, u32 r2, u32 r3, u16 local_port, u16 remote_port, u16 vlan,
                              u8 proto)
{
    const u32 local[4] = {l0, l1, l2, l3}, remote[4] = {r0, r1, r2, r3};
    struct rule_key key;
#pragma unroll
    for (int i = 0; i < ADDR_WORDS; i++) {
        key.local[i] = f->local[i] & local[4 - ADDR_WORDS + i];
        key.remote[i] = f->remote[i] & remote[4 - ADDR_WORDS + i];
    }
    key.local_port = f->local_port & local_port;
    key.remote_port = f->remote_port & remote_port;
    key.vlan = f->vlan & vlan;
    key.proto = f->proto & proto;
    key.family_mask = (f->family & family) << 4 | mask;
    struct rule_value *v = rules.lookup(&key);
    if (v && v->rank > best->rank) {
        *best = *v;
    }
}

/* The rule of the highest rank that matches, or rank 0. A mask is not tried when what was found outranks all of it. */
static inline void match_rules(const struct flow *f, struct rule_value *best)
{
    u32 zero = 0;
    struct ranks *highest = ranks.lookup(&zero);
    best->rank = 0;
    best->rule_action = 0;
    if (!highest) {
        return;
    }
#define TRY_MASK(i, ...)                                                                                               \
    if (best->rank >= highest->max[i])                                                                                 \
        return;                                                                                                        \
    match_mask(f, best, i, __VA_ARGS__);
    MASKS(TRY_MASK)
}

static inline void flow_set_ipv4(struct flow *f, u32 local, u32 remote, u8 proto)
{
#if KEY_V6
    f->local[0] = f->local[1] = f->remote[0] = f->remote[1] = 0;
    f->local[2] = f->remote[2] = be16(0xffff) << 16; /* RFC 4291 2.5.5.2 */
#endif
    f->local[ADDR_LAST] = local;
    f->remote[ADDR_LAST] = remote;
    f->proto = proto;
    f->family = 4;
}

/* The live endpoint of an IPv4 flow: the connected one, then the block that its local port is in, then the one bound to
 * the address, then the one bound to any. */
static inline struct endpoint *endpoint_find(const struct flow *f, u32 kinds)
{
    struct endpoint_key key = {.local = f->local[ADDR_LAST],
                               .remote = f->remote[ADDR_LAST],
                               .local_port = f->local_port,
                               .remote_port = f->remote_port,
                               .proto = f->proto};
    struct endpoint *e = 0;
    if (kinds & KIND_EXACT) {
        e = endpoints.lookup(&key);
        if (e) {
            return e;
        }
    }
    key.remote = 0;
    key.remote_port = 0;
    if (kinds & KIND_BLOCK) {
        key.local_port = f->local_port & be16(BLOCK_MASK);
        key.proto |= KEY_BLOCK;
        e = endpoints.lookup(&key);
        if (e) {
            return e;
        }
        key.local_port = f->local_port;
        key.proto = f->proto;
    }
    if (kinds & KIND_LOCAL) {
        e = endpoints.lookup(&key);
        if (e) {
            return e;
        }
    }
    key.local = 0;
    if (kinds & KIND_ANY) {
        e = endpoints.lookup(&key);
    }
    return e;
}

/* Does the kernel hold a TCP connection of this flow? A listener is none; nor is TIME_WAIT to a new SYN, which the
 * kernel, without a listener, would leave unanswered for up to a minute (RFC 9293 3.10.7.4 lets it be reused). */
static inline int kernel_holds(void *ctx, const struct flow *f, int syn)
{
    struct bpf_sock_tuple tuple = {};
    tuple.ipv4.saddr = f->remote[ADDR_LAST];
    tuple.ipv4.sport = f->remote_port;
    tuple.ipv4.daddr = f->local[ADDR_LAST];
    tuple.ipv4.dport = f->local_port;
    struct bpf_sock *sk = bpf_skc_lookup_tcp(ctx, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
    if (!sk) {
        return 0;
    }
    u32 state = sk->state;
    bpf_sk_release(sk);
    return state != BPF_TCP_LISTEN && !(state == BPF_TCP_TIME_WAIT && syn);
}

static inline void count_add(struct count *c, u64 bytes)
{
    if (c) {
        c->packets++;
        c->bytes += bytes;
    }
}

#endif
