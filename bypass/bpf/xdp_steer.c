/* SPDX-License-Identifier: (GPL-2.0 OR BSD-2-Clause) */
/*
 * The steering program: takes the packets of live endpoints that a policy grants out of the NIC's receive path into
 * AF_XDP sockets, and leaves every other packet to the kernel, untouched. One reason is counted for each packet
 * (reasons.h); a redirected frame carries its verdict in front (verdict.h).
 *
 *   Ethernet: for us?  ->  IPv4/IPv6: for us?  ->  rule of the highest rank  ->  drop
 *                                                                           ->  pass, or none: the kernel's
 *                                                                           ->  steer: live endpoint?  ->  its socket
 *
 * Two promises shape it. Only what is addressed to this host, by MAC and by IP, is ever ours: routed and bridged
 * traffic is not. And TCP of a live endpoint is redirected or dropped, never passed: the kernel has no connection for
 * it and would answer with a reset that the peer believes. What is malformed the kernel discards without an answer,
 * so it passes and is counted there.
 *
 * Maps and matching: steer.h. The kernel's own resets: tc_guard.c. Loading and layouts: bypass/steering.py.
 * Read first: kernel Documentation/bpf/redirect.rst and Documentation/networking/af_xdp.rst.
 */
#include "steer.h"

#include "reasons.h"
#include "verdict.h"

#define GO_ON REASON_MAX  /* no reason yet: the next check decides */
#define MAX_EXT_HEADERS 6 /* of IPv6, looked behind */
#define TCP_HEADER_MIN 20
#define FRAGMENT_MIN 8 /* a first fragment shorter than this has no whole 8-byte unit: the kernel discards it */
#define VLAN_ID_MASK 0xfff
#define IP_OFFSET_MASK 0x1fff
#define IP_MORE_FRAGMENTS 0x2000
#define IP6_OFFSET_MASK 0xfff8
#define IP6_MORE_FRAGMENTS 1

/* packet.part. The last two have no ports, so that only rules without ports match: they drop, or the packet passes. */
enum { WHOLE = 0, FIRST_FRAGMENT, LATER_FRAGMENT, CUT_SHORT };

struct packet {
    struct flow flow;
    u32 l3, l4, end; /* offsets: network header, transport header, end of the IP packet (padding excluded) */
    u16 ethertype;   /* behind the tags, network order */
    u8 tagged;
    u8 group; /* to a joined group's MAC */
    u8 part;  /* WHOLE ... */
    u8 syn;   /* TCP with SYN and without ACK */
    u8 icmp;  /* an ICMP error; flow is the quoted one */
};

struct vlan_tag { /* IEEE 802.1Q 9.6, behind the tag's own ethertype; network order */
    u16 control;
    u16 ethertype;
};

/* The bytes of a header at an offset, or 0 when the frame ends before it does. */
#define HEADER(type, off)                                                                                              \
    ({                                                                                                                 \
        type *_h = (void *)(long)ctx->data + (off);                                                                    \
        (void *)(_h + 1) > (void *)(long)ctx->data_end ? (type *)0 : _h;                                               \
    })

static inline int check_mac(const struct ethhdr *eth, const struct config *cfg, struct packet *p)
{
    if (eth->h_dest[0] & 1) {
        u64 mac = 0;
        __builtin_memcpy(&mac, eth->h_dest, ETH_ALEN);
        p->group = 1;
        return groups.lookup(&mac) ? GO_ON : REASON_GROUP;
    }
    const u16 *a = (const u16 *)eth->h_dest, *b = (const u16 *)cfg->mac;
    return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] ? GO_ON : REASON_OTHER_MAC;
}

static inline int is_tag(u16 ethertype) { return ethertype == be16(ETH_P_8021Q) || ethertype == be16(ETH_P_8021AD); }

static inline int parse_ethernet(struct xdp_md *ctx, const struct config *cfg, struct packet *p)
{
    struct ethhdr *eth = HEADER(struct ethhdr, 0);
    if (!eth) {
        return REASON_MALFORMED;
    }
    int reason = check_mac(eth, cfg, p);
    if (reason != GO_ON) {
        return reason;
    }
    p->ethertype = eth->h_proto;
    p->l3 = ETH_HLEN;
#pragma unroll
    for (int depth = 0; depth < VLAN_DEPTH; depth++) {
        if (is_tag(p->ethertype)) {
            struct vlan_tag *tag = HEADER(struct vlan_tag, p->l3);
            if (!tag) {
                return REASON_MALFORMED;
            }
            if (!p->tagged) {
                p->flow.vlan = __builtin_bswap16(tag->control) & VLAN_ID_MASK;
            }
            p->tagged = 1;
            p->ethertype = tag->ethertype;
            p->l3 += sizeof(*tag);
        }
    }
    return is_tag(p->ethertype) ? REASON_VLAN : GO_ON;
}

/* Ports, and the least that must be there: what is shorter the kernel discards without an answer. */
static inline int parse_transport(struct xdp_md *ctx, struct packet *p)
{
    if (p->flow.proto != IPPROTO_TCP && p->flow.proto != IPPROTO_UDP) {
        return GO_ON;
    }
    struct udphdr *ports = HEADER(struct udphdr, p->l4);
    if (!ports || p->l4 + FRAGMENT_MIN > p->end) {
        return REASON_MALFORMED;
    }
    p->flow.local_port = ports->dest;
    p->flow.remote_port = ports->source;
    if (p->flow.proto == IPPROTO_UDP || p->part == FIRST_FRAGMENT) {
        return GO_ON;
    }
    struct tcphdr *tcp = HEADER(struct tcphdr, p->l4);
    if (!tcp || tcp->doff * 4 < TCP_HEADER_MIN || p->l4 + tcp->doff * 4 > p->end) {
        return REASON_MALFORMED;
    }
    p->syn = tcp->syn && !tcp->ack;
    return GO_ON;
}

static inline int parse_ipv4(struct xdp_md *ctx, struct packet *p)
{
    struct iphdr *ip = HEADER(struct iphdr, p->l3);
    if (!ip || ip->version != 4 || ip->ihl < 5) {
        return REASON_MALFORMED;
    }
    u32 length = __builtin_bswap16(ip->tot_len), available = ctx->data_end - ctx->data - p->l3;
    if (length < ip->ihl * 4 || length > available) {
        return REASON_MALFORMED;
    }
    u32 local = ip->daddr;
    if (!locals4.lookup(&local)) {
        return REASON_NOT_LOCAL;
    }
    flow_set_ipv4(&p->flow, local, ip->saddr, ip->protocol);
    p->l4 = p->l3 + ip->ihl * 4;
    p->end = p->l3 + length;
    if (ip->frag_off & be16(IP_OFFSET_MASK)) {
        p->part = LATER_FRAGMENT;
        return GO_ON;
    }
    if (ip->frag_off & be16(IP_MORE_FRAGMENTS)) {
        p->part = FIRST_FRAGMENT;
    }
    return parse_transport(ctx, p);
}

#if WITH_V6
struct ext_header { /* what the extension headers have in common, RFC 8200 4.2 and 4.5 */
    u8 next;
    u8 length;
    u16 offset_flags; /* of a fragment header */
    u32 id;
};

static inline int is_ext_header(u8 next)
{
    return next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_FRAGMENT || next == IPPROTO_DSTOPTS ||
           next == IPPROTO_AH;
}

/* One extension header. Sets p->part when there is nothing to walk on to. */
static inline int skip_ext_header(struct xdp_md *ctx, struct packet *p)
{
    struct ext_header *ext = HEADER(struct ext_header, p->l4);
    if (!ext) {
        return REASON_MALFORMED;
    }
    u32 length = (ext->length + 1) * 8;
    if (p->flow.proto == IPPROTO_AH) {
        length = (ext->length + 2) * 4; /* RFC 4302 2.2 */
    } else if (p->flow.proto == IPPROTO_FRAGMENT) {
        length = sizeof(*ext);
        if (ext->offset_flags & be16(IP6_OFFSET_MASK)) {
            p->part = LATER_FRAGMENT;
        } else if (ext->offset_flags & be16(IP6_MORE_FRAGMENTS)) {
            p->part = FIRST_FRAGMENT;
        }
    }
    p->l4 += length;
    p->flow.proto = ext->next;
    return p->l4 > p->end ? REASON_MALFORMED : GO_ON;
}

static inline int parse_ipv6(struct xdp_md *ctx, struct packet *p)
{
    struct ipv6hdr *ip = HEADER(struct ipv6hdr, p->l3);
    if (!ip || ip->version != 6) {
        return REASON_MALFORMED;
    }
    p->l4 = p->l3 + sizeof(*ip);
    p->end = p->l4 + __builtin_bswap16(ip->payload_len);
    if (p->end > ctx->data_end - ctx->data) {
        return REASON_MALFORMED;
    }
    struct address6 local;
    __builtin_memcpy(&local, &ip->daddr, sizeof(local));
    if (!locals6.lookup(&local)) {
        return REASON_NOT_LOCAL;
    }
#if KEY_V6
    __builtin_memcpy(p->flow.local, &ip->daddr, sizeof(local));
    __builtin_memcpy(p->flow.remote, &ip->saddr, sizeof(local));
#endif
    p->flow.family = 6;
    p->flow.proto = ip->nexthdr;
#pragma unroll
    for (int i = 0; i < MAX_EXT_HEADERS; i++) {
        if (p->part != LATER_FRAGMENT && is_ext_header(p->flow.proto)) {
            int reason = skip_ext_header(ctx, p);
            if (reason != GO_ON) {
                return reason;
            }
        }
    }
    if (p->part == LATER_FRAGMENT) {
        return GO_ON;
    }
    if (is_ext_header(p->flow.proto)) {
        p->part = CUT_SHORT;
        return GO_ON;
    }
    return parse_transport(ctx, p);
}
#endif

/* The flow that an ICMP error is about: it quotes a packet that we sent (RFC 792; RFC 1122 3.2.2). */
static inline int parse_quote(struct xdp_md *ctx, const struct packet *p, struct flow *quoted)
{
    u8 *type = HEADER(u8, p->l4);
    if (p->flow.family != 4 || p->flow.proto != IPPROTO_ICMP || p->part != WHOLE || !type) {
        return 0;
    }
    if (*type != 3 && *type != 4 && *type != 11 && *type != 12) { /* unreachable, quench, time exceeded, parameter */
        return 0;
    }
    struct iphdr *ip = HEADER(struct iphdr, p->l4 + 8);
    if (!ip || ip->version != 4 || ip->ihl < 5 || (ip->frag_off & be16(IP_OFFSET_MASK)) ||
        (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP) || ip->saddr != p->flow.local[ADDR_LAST]) {
        return 0;
    }
    u32 l4 = p->l4 + 8 + ip->ihl * 4;
    struct udphdr *ports = HEADER(struct udphdr, l4);
    if (!ports || l4 + sizeof(*ports) > p->end) {
        return 0;
    }
    flow_set_ipv4(quoted, ip->saddr, ip->daddr, ip->protocol);
    quoted->vlan = p->flow.vlan;
    quoted->local_port = ports->source;
    quoted->remote_port = ports->dest;
    return 1;
}

/* The same flow, the same value; not keyed, so only good for spreading trusted work. */
static inline u32 flow_hash(const struct flow *f)
{
    u32 h = f->local[ADDR_LAST] * 0x9e3779b1 + f->remote[ADDR_LAST];
    h = (h ^ h >> 15) * 0x85ebca6b + ((u32)f->local_port << 16 | f->remote_port);
    h = (h ^ h >> 13) * 0xc2b2ae35 + f->proto;
    return h ^ h >> 16;
}

static inline int write_verdict(struct xdp_md *ctx, const struct flow *f, u32 entry, u32 rule)
{
    if (bpf_xdp_adjust_meta(ctx, -(int)sizeof(struct steer_verdict))) {
        return 0;
    }
    struct steer_verdict *v = (void *)(long)ctx->data_meta;
    if ((void *)(v + 1) > (void *)(long)ctx->data) {
        return 0;
    }
    v->magic = STEER_VERDICT_MAGIC;
    v->entry = entry;
    v->rule = rule;
    v->hash = flow_hash(f);
    return 1;
}

/* The last step: a packet of a live endpoint goes to its socket. */
static inline int redirect(struct xdp_md *ctx, const struct packet *p, struct endpoint *e, u32 rule, u64 bytes)
{
    int tcp = p->flow.proto == IPPROTO_TCP && !p->icmp;
    u32 queue = ctx->rx_queue_index, entry = e->entry;
    if (queue >= MAX_QUEUES || xsks.redirect_map(e->owner * MAX_QUEUES + queue, XDP_PASS) != XDP_REDIRECT) {
        return tcp ? REASON_TCP_NO_SOCKET : REASON_NO_SOCKET;
    }
    count_add(entry_count.lookup(&entry), bytes);
    if (!write_verdict(ctx, &p->flow, entry, rule)) {
        return REASON_STEERED_BARE;
    }
    return p->icmp ? REASON_STEERED_ICMP : REASON_STEERED;
}

static inline int steer(struct xdp_md *ctx, const struct config *cfg, const struct packet *p, u32 rule, u64 bytes)
{
    u8 proto = p->flow.proto;
    if (p->flow.family != 4 || (proto != IPPROTO_TCP && proto != IPPROTO_UDP)) {
        return REASON_NO_ENDPOINT;
    }
    if (p->tagged) { /* the kernel's, or a VLAN device's; resets of the kernel to a priority tag (VLAN 0): tc_guard.c */
        return REASON_VLAN;
    }
    if (p->group && (p->icmp || proto == IPPROTO_TCP)) { /* RFC 1122 3.2.1.3 */
        return REASON_GROUP;
    }
    struct endpoint *e = endpoint_find(&p->flow, cfg->kinds);
    if (!e) {
        return REASON_NO_ENDPOINT;
    }
    if ((e->flags & ENDPOINT_DRAIN) && proto == IPPROTO_TCP && kernel_holds(ctx, &p->flow, p->syn)) {
        return REASON_DRAINING;
    }
    if (p->part == FIRST_FRAGMENT) {
        return proto == IPPROTO_TCP ? REASON_TCP_FRAGMENT : REASON_FRAGMENT;
    }
    return redirect(ctx, p, e, rule, bytes);
}

/* What the winning rule says; rank 0: there is none. */
static inline int apply(struct xdp_md *ctx, const struct config *cfg, const struct packet *p,
                        const struct rule_value *best, u64 bytes)
{
    u32 rule = best->rule_action >> 2, action = best->rule_action & 3;
    if (p->part >= LATER_FRAGMENT && (!best->rank || action != ACTION_DROP)) {
        return p->part == CUT_SHORT ? REASON_TOO_DEEP : REASON_FRAGMENT;
    }
    if (!best->rank) {
        return REASON_NO_RULE;
    }
    count_add(rule_count.lookup(&rule), bytes);
    if (action == ACTION_STEER) {
        return steer(ctx, cfg, p, rule, bytes);
    }
    return action == ACTION_DROP ? REASON_RULE_DROP : REASON_RULE_PASS;
}

static inline int decide(struct xdp_md *ctx, u64 bytes)
{
    struct packet p = {};
    struct rule_value best = {};
    u32 zero = 0;
    struct config *cfg = config.lookup(&zero);
    if (!cfg) {
        return REASON_MALFORMED;
    }
    int reason = parse_ethernet(ctx, cfg, &p);
    if (reason == GO_ON) {
        if (p.ethertype == be16(ETH_P_IP)) {
            reason = parse_ipv4(ctx, &p);
        } else if (p.ethertype == be16(ETH_P_IPV6)) {
#if WITH_V6
            reason = parse_ipv6(ctx, &p);
#else
            reason = REASON_IPV6;
#endif
        } else {
            reason = REASON_NOT_IP;
        }
    }
    if (reason != GO_ON) {
        return reason;
    }
    struct flow quoted = {};
    if (parse_quote(ctx, &p, &quoted)) {
        match_rules(&quoted, &best);
        if (best.rank) {
            p.flow = quoted;
            p.icmp = 1;
            return apply(ctx, cfg, &p, &best, bytes);
        }
    }
    match_rules(&p.flow, &best);
    return apply(ctx, cfg, &p, &best, bytes);
}

#define DROP_BIT(name, verdict, text) | (u32)(XDP_##verdict == XDP_DROP) << REASON_##name
#define REDIRECT_BIT(name, verdict, text) | (u32)(XDP_##verdict == XDP_REDIRECT) << REASON_##name

int xdp_steer(struct xdp_md *ctx)
{
    u64 bytes = ctx->data_end - ctx->data;
    u32 reason = decide(ctx, bytes);
    count_add(reason_count.lookup(&reason), bytes);
    if ((0 STEER_REASONS(REDIRECT_BIT)) >> reason & 1) {
        return XDP_REDIRECT;
    }
    return (0 STEER_REASONS(DROP_BIT)) >> reason & 1 ? XDP_DROP : XDP_PASS;
}
