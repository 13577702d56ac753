/* SPDX-License-Identifier: Apache-2.0 */
/*
 * classify_parse.h - from the bytes of a frame to the flow that it belongs to, check by check as the steering program does
 * it (bypass/bpf/xdp_steer.c, where the reasons for each of them stand). Nothing here knows rules or entries.
 */
#ifndef BYPASS_DPDK_CLASSIFY_PARSE_H
#define BYPASS_DPDK_CLASSIFY_PARSE_H

#include "classify_mem.h"

enum {
    GO_ON = REASON_ALL,  /* no reason yet: the next check decides */
    MAX_EXT_HEADERS = 6, /* of IPv6, looked behind */
    ETH_BYTES = 14,
    TAG_BYTES = 4,
    IP4_MIN = 20,
    IP6_BYTES = 40,
    EXT_BYTES = 8,
    TCP_HEADER_MIN = 20,
    PORTS_BYTES = 8,
    FRAGMENT_MIN = 8,

    TYPE_IP = 0x0800,
    TYPE_IP6 = 0x86dd,
    TYPE_8021Q = 0x8100,
    TYPE_8021AD = 0x88a8,

    PROTO_HOPOPTS = 0,
    PROTO_ICMP = 1,
    PROTO_TCP = 6,
    PROTO_UDP = 17,
    PROTO_ROUTING = 43,
    PROTO_FRAGMENT = 44,
    PROTO_AH = 51,
    PROTO_DSTOPTS = 60,

    /* packet.part; the last two have no ports */
    WHOLE = 0,
    FIRST_FRAGMENT,
    LATER_FRAGMENT,
    CUT_SHORT,
};

/* Addresses and ports in network order. IPv4: in the last word; the words before it say so where keys have 16 bytes. */
struct flow {
    uint32_t local[4], remote[4];
    uint16_t local_port, remote_port;
    uint16_t vlan;
    uint8_t proto, family;
};

struct packet {
    const uint8_t *data;
    uint32_t len;
    uint32_t l3, l4, end; /* offsets: network header, transport header, end of the IP packet (padding excluded) */
    uint16_t ethertype;
    uint8_t tagged, group, part, syn, icmp; /* group: to a joined group's MAC. icmp: flow is the one that is quoted */
    struct flow flow;
};

/* What a policy wants to have parsed. */
struct parse_depth {
    bool key_v6, with_v6;
    uint32_t vlan_depth;
};

static inline uint16_t raw16(const uint8_t *p) /* as it lies there */
{
    uint16_t v;

    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint32_t raw32(const uint8_t *p)
{
    uint32_t v;

    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint16_t read16(const uint8_t *p) { return __builtin_bswap16(raw16(p)); }

/* The bytes of a header at an offset, or NULL when the frame ends before it does. */
static inline const uint8_t *header(const struct packet *p, uint32_t off, uint32_t bytes)
{
    return off > p->len || p->len - off < bytes ? NULL : p->data + off;
}

static inline bool in_set(const struct classifier *c, int set, const uint8_t *member, size_t bytes)
{
    uint64_t words[2] = {0, 0}, value;

    memcpy(words, member, bytes);
    return table_find(c, &c->set[set], words, &value);
}

static inline int check_mac(const struct classifier *c, struct packet *p)
{
    uint64_t mac = 0;

    if (p->data[0] & 1) {
        p->group = 1;
        return in_set(c, CLASSIFY_GROUPS, p->data, 6) ? GO_ON : REASON_GROUP;
    }
    memcpy(&mac, p->data, 6);
    return mac == LOAD(&head_of(c)->mac) || mac == LOAD(&head_of(c)->old_mac) ? GO_ON : REASON_OTHER_MAC;
}

static inline bool is_tag(uint16_t ethertype) { return ethertype == TYPE_8021Q || ethertype == TYPE_8021AD; }

static inline int parse_ethernet(const struct classifier *c, struct packet *p, const struct parse_depth *depth)
{
    int reason;

    if (p->len < ETH_BYTES) {
        return REASON_MALFORMED;
    }
    reason = check_mac(c, p);
    if (reason != GO_ON) {
        return reason;
    }
    p->ethertype = read16(p->data + 12);
    p->l3 = ETH_BYTES;
    for (uint32_t i = 0; i < depth->vlan_depth && is_tag(p->ethertype); i++) {
        const uint8_t *tag = header(p, p->l3, TAG_BYTES);

        if (!tag) {
            return REASON_MALFORMED;
        }
        if (!p->tagged) {
            p->flow.vlan = read16(tag) & 0xfff;
        }
        p->tagged = 1;
        p->ethertype = read16(tag + 2);
        p->l3 += TAG_BYTES;
    }
    return is_tag(p->ethertype) ? REASON_VLAN : GO_ON;
}

static inline int parse_transport(struct packet *p)
{
    const uint8_t *ports, *tcp;
    uint32_t bytes;

    if (p->flow.proto != PROTO_TCP && p->flow.proto != PROTO_UDP) {
        return GO_ON;
    }
    ports = header(p, p->l4, PORTS_BYTES);
    if (!ports || p->l4 + FRAGMENT_MIN > p->end) {
        return REASON_MALFORMED;
    }
    p->flow.local_port = raw16(ports + 2);
    p->flow.remote_port = raw16(ports);
    if (p->flow.proto == PROTO_UDP || p->part == FIRST_FRAGMENT) {
        return GO_ON;
    }
    tcp = header(p, p->l4, TCP_HEADER_MIN);
    bytes = tcp ? (tcp[12] >> 4) * 4u : 0;
    if (bytes < TCP_HEADER_MIN || p->l4 + bytes > p->end) {
        return REASON_MALFORMED;
    }
    p->syn = (tcp[13] & 0x12) == 0x02;
    return GO_ON;
}

static inline void flow_set_ipv4(struct flow *f, uint32_t local, uint32_t remote, uint8_t proto)
{
    f->local[0] = f->local[1] = f->remote[0] = f->remote[1] = 0;
    f->local[2] = f->remote[2] = __builtin_bswap32(0xffff); /* RFC 4291 2.5.5.2 */
    f->local[3] = local;
    f->remote[3] = remote;
    f->proto = proto;
    f->family = 4;
}

static inline int parse_ipv4(const struct classifier *c, struct packet *p)
{
    const uint8_t *ip = header(p, p->l3, IP4_MIN);
    uint32_t bytes, length;
    uint16_t fragment;

    if (!ip || ip[0] >> 4 != 4 || (ip[0] & 15) < 5) {
        return REASON_MALFORMED;
    }
    bytes = (ip[0] & 15) * 4u;
    length = read16(ip + 2);
    if (length < bytes || length > p->len - p->l3) {
        return REASON_MALFORMED;
    }
    if (!in_set(c, CLASSIFY_LOCALS4, ip + 16, 4)) {
        return REASON_NOT_LOCAL;
    }
    flow_set_ipv4(&p->flow, raw32(ip + 16), raw32(ip + 12), ip[9]);
    p->l4 = p->l3 + bytes;
    p->end = p->l3 + length;
    fragment = read16(ip + 6);
    if (fragment & 0x1fff) {
        p->part = LATER_FRAGMENT;
        return GO_ON;
    }
    if (fragment & 0x2000) {
        p->part = FIRST_FRAGMENT;
    }
    return parse_transport(p);
}

static inline bool is_ext_header(uint8_t next)
{
    return next == PROTO_HOPOPTS || next == PROTO_ROUTING || next == PROTO_FRAGMENT || next == PROTO_DSTOPTS ||
           next == PROTO_AH;
}

static inline int skip_ext_header(struct packet *p)
{
    const uint8_t *ext = header(p, p->l4, EXT_BYTES);
    uint32_t length;

    if (!ext) {
        return REASON_MALFORMED;
    }
    length = (ext[1] + 1u) * 8;
    if (p->flow.proto == PROTO_AH) {
        length = (ext[1] + 2u) * 4; /* RFC 4302 2.2 */
    } else if (p->flow.proto == PROTO_FRAGMENT) {
        length = EXT_BYTES;
        if (read16(ext + 2) & 0xfff8) {
            p->part = LATER_FRAGMENT;
        } else if (read16(ext + 2) & 1) {
            p->part = FIRST_FRAGMENT;
        }
    }
    p->l4 += length;
    p->flow.proto = ext[0];
    return p->l4 > p->end ? REASON_MALFORMED : GO_ON;
}

static inline int parse_ipv6(const struct classifier *c, struct packet *p, const struct parse_depth *depth)
{
    const uint8_t *ip = header(p, p->l3, IP6_BYTES);
    int reason;

    if (!ip || ip[0] >> 4 != 6) {
        return REASON_MALFORMED;
    }
    p->l4 = p->l3 + IP6_BYTES;
    p->end = p->l4 + read16(ip + 4);
    if (p->end > p->len) {
        return REASON_MALFORMED;
    }
    if (!in_set(c, CLASSIFY_LOCALS6, ip + 24, 16)) {
        return REASON_NOT_LOCAL;
    }
    if (depth->key_v6) { /* else its addresses are zeroes in the match */
        memcpy(p->flow.local, ip + 24, 16);
        memcpy(p->flow.remote, ip + 8, 16);
    }
    p->flow.family = 6;
    p->flow.proto = ip[6];
    for (int i = 0; i < MAX_EXT_HEADERS && p->part != LATER_FRAGMENT && is_ext_header(p->flow.proto); i++) {
        reason = skip_ext_header(p);
        if (reason != GO_ON) {
            return reason;
        }
    }
    if (p->part == LATER_FRAGMENT) {
        return GO_ON;
    }
    if (is_ext_header(p->flow.proto)) {
        p->part = CUT_SHORT;
        return GO_ON;
    }
    return parse_transport(p);
}

/* GO_ON, or the reason. */
static inline int parse_packet(const struct classifier *c, struct packet *p, const struct parse_depth *depth)
{
    int reason = parse_ethernet(c, p, depth);

    if (reason != GO_ON) {
        return reason;
    }
    if (p->ethertype == TYPE_IP) {
        return parse_ipv4(c, p);
    }
    if (p->ethertype == TYPE_IP6) {
        return depth->with_v6 ? parse_ipv6(c, p, depth) : REASON_IPV6;
    }
    return REASON_NOT_IP;
}

/* The flow that an ICMP error is about: it quotes a packet that we sent (RFC 792; RFC 1122 3.2.2). */
static inline bool parse_quote(const struct packet *p, struct flow *quoted)
{
    const uint8_t *type = header(p, p->l4, 1), *ip, *ports;
    uint32_t l4;

    if (p->flow.family != 4 || p->flow.proto != PROTO_ICMP || p->part != WHOLE || !type) {
        return false;
    }
    if (*type != 3 && *type != 4 && *type != 11 && *type != 12) { /* unreachable, quench, time exceeded, parameter */
        return false;
    }
    ip = header(p, p->l4 + 8, IP4_MIN);
    if (!ip || ip[0] >> 4 != 4 || (ip[0] & 15) < 5 || (read16(ip + 6) & 0x1fff) ||
        (ip[9] != PROTO_TCP && ip[9] != PROTO_UDP) || raw32(ip + 12) != p->flow.local[3]) {
        return false;
    }
    l4 = p->l4 + 8 + (ip[0] & 15) * 4u;
    ports = header(p, l4, PORTS_BYTES);
    if (!ports || l4 + PORTS_BYTES > p->end) {
        return false;
    }
    flow_set_ipv4(quoted, raw32(ip + 12), raw32(ip + 16), ip[9]);
    quoted->vlan = p->flow.vlan;
    quoted->local_port = raw16(ports);
    quoted->remote_port = raw16(ports + 2);
    return true;
}

#endif
