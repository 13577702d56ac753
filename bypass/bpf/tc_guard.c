/* SPDX-License-Identifier: (GPL-2.0 OR BSD-2-Clause) */
/*
 * The reset guard, on the interface's tcx egress: drops the TCP resets that the kernel sends for flows which the
 * steering program would take. The kernel has no connection for them, so whatever of them reaches it (a fragment it
 * reassembled, a packet through another interface) draws a reset that the peer believes. What AF_XDP transmits does
 * not pass here. Steering itself: xdp_steer.c; read it first.
 *
 * A reset is the kernel's own business, and passes, when a connection of the kernel's sent it, or when the endpoint
 * drains and the kernel holds that connection.
 */
#include "steer.h"

#define TCX_NEXT_PROGRAM (-1) /* TCX_NEXT, TCX_DROP of linux/bpf.h 6.6 */
#define TCX_DROP_PACKET 2
#define IP_OFFSET 0x1fff
#define SOCK_TYPE_STREAM 1 /* SOCK_STREAM, which no UAPI header has */

enum { GUARD_SILENCED = 0, GUARD_CONNECTION, GUARD_DRAINING, GUARD_OTHER };

/* Fills the flow that a TCP reset resets, seen from this host; 0 when the packet is no such reset. */
static inline int guard_parse(struct __sk_buff *skb, struct flow *f)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    struct iphdr *ip = data + ETH_HLEN;
    if ((void *)(ip + 1) > end || ip->version != 4 || ip->ihl < 5 || ip->protocol != IPPROTO_TCP ||
        (ip->frag_off & be16(IP_OFFSET))) {
        return 0;
    }
    struct tcphdr *tcp = (void *)ip + ip->ihl * 4;
    if ((void *)(tcp + 1) > end || !tcp->rst) {
        return 0;
    }
    flow_set_ipv4(f, ip->saddr, ip->daddr, IPPROTO_TCP);
    f->local_port = tcp->source;
    f->remote_port = tcp->dest;
    return 1;
}

/* Sent on behalf of a connection? Resets without one come from a raw socket that the kernel keeps for them, or carry
 * the listener that refused the segment (6.14 and later). A connection that is being reset has no port any more. */
static inline int guard_has_connection(struct __sk_buff *skb)
{
    struct bpf_sock *sk = skb->sk;
    if (!sk) {
        return 0;
    }
    sk = bpf_sk_fullsock(sk);
    return sk && sk->type == SOCK_TYPE_STREAM && sk->protocol == IPPROTO_TCP && sk->state != BPF_TCP_LISTEN;
}

static inline u32 guard_decide(struct __sk_buff *skb, const struct flow *f)
{
    u32 zero = 0, local = f->local[ADDR_LAST];
    struct config *cfg = config.lookup(&zero);
    struct rule_value best = {};
    if (!cfg || !locals4.lookup(&local)) {
        return GUARD_OTHER;
    }
    match_rules(f, &best);
    if (!best.rank || (best.rule_action & 3) != ACTION_STEER) {
        return GUARD_OTHER;
    }
    struct endpoint *e = endpoint_find(f, cfg->kinds);
    if (!e) {
        return GUARD_OTHER;
    }
    if (guard_has_connection(skb)) {
        return GUARD_CONNECTION;
    }
    return (e->flags & ENDPOINT_DRAIN) && kernel_holds(skb, f, 0) ? GUARD_DRAINING : GUARD_SILENCED;
}

int tc_guard(struct __sk_buff *skb)
{
    struct flow f = {};
    if (skb->protocol != be16(ETH_P_IP) || !guard_parse(skb, &f)) {
        return TCX_NEXT_PROGRAM;
    }
    u32 kind = guard_decide(skb, &f);
    count_add(guard_count.lookup(&kind), skb->len);
    return kind == GUARD_SILENCED ? TCX_DROP_PACKET : TCX_NEXT_PROGRAM;
}
