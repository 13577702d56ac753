/* SPDX-License-Identifier: Apache-2.0 */
/*
 * icmp.c - ICMP for IPv4 (RFC 792, RFC 1122 3.2.2, RFC 1191): answers echo requests in their own frame, brings errors
 * to the flow that they quote, and reports errors of others, rarely enough.
 * What an error means for a socket is udp.c's and tcp_*.c's business.
 */
#include <errno.h>

#include "csum.h"
#include "net.h"

/* ---- Out: errors -------------------------------------------------------------------------------- */

enum { ERRORS_PER_SECOND = 1000, ERRORS_BURST = 50 };

/* A bucket of tokens, RFC 1812 4.3.2.8. */
static bool may_send(struct bypass_stack *s)
{
    uint64_t *tokens = &core(s)->icmp_state[0], *filled_ns = &core(s)->icmp_state[1], *begun = &core(s)->icmp_state[2];
    uint64_t now = now_ns(s), gained = (now - *filled_ns) / (SEC_NS / ERRORS_PER_SECOND);
    if (!*begun || gained >= ERRORS_BURST) {
        *begun = 1;
        *tokens = ERRORS_BURST;
        *filled_ns = now;
    } else {
        *tokens = min_u64(*tokens + gained, ERRORS_BURST);
        *filled_ns += gained * (SEC_NS / ERRORS_PER_SECOND);
    }
    if (*tokens == 0) {
        STAT(s, icmp_out_limited);
        return false;
    }
    (*tokens)--;
    return true;
}

void icmp_error_out(struct bypass_stack *s, bypass_pkt p, uint8_t type, uint8_t code)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    const uint8_t *ip = pkt_data(s, p);
    if (ip[IP4_PROTO] == PROTO_ICMP || (rd16(ip + IP4_FRAG) & IP4_OFFSET_MASK) != 0 || !may_send(s)) {
        return; /* RFC 1122 3.2.2: not about ICMP (errors), not about later fragments */
    }
    bypass_pkt reply = pkt_alloc(s);
    if (reply == BYPASS_PKT_NONE) {
        return;
    }
    uint32_t quote_len = min_u32(m->len, ICMP_ERROR_MAX - IP4_LEN - ICMP_LEN);
    uint8_t *icmp = pkt_put(s, reply, (uint16_t)(ICMP_LEN + quote_len));
    if (icmp == NULL) {
        pkt_free(s, reply);
        return;
    }
    memset(icmp, 0, ICMP_LEN);
    icmp[ICMP_TYPE] = type;
    icmp[ICMP_CODE] = code;
    uint16_t csum = csum_fold(csum_copy(icmp + ICMP_LEN, ip, quote_len, csum_bytes(icmp, ICMP_LEN, 0)));
    memcpy(icmp + ICMP_CSUM, &csum, 2);
    pkt_meta(s, reply)->queue = m->queue;
    addr_t from = addr_from_v4(ip + IP4_DST), to = addr_from_v4(ip + IP4_SRC);
    struct ip_tx tx = {.src = &from, .dst = &to, .proto = PROTO_ICMP, .tos = 0xc0}; /* RFC 1812 4.3.2.5 */
    STAT_ADD(s, icmp_out_unreachable, type == ICMP_UNREACHABLE);
    STAT_ADD(s, icmp_out_time_exceeded, type == ICMP_TIME_EXCEEDED);
    (void)ip_out(s, reply, &tx); /* an error that cannot be reported is not reported; ip_out() counts it */
}

void icmp_unreachable(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri, int code)
{
    if (!ri->multicast) {
        icmp_error_out(s, p, ICMP_UNREACHABLE, (uint8_t)code);
    }
}

/* ---- In: errors --------------------------------------------------------------------------------- */

struct meaning { /* as Linux maps them */
    int err;
    bool hard;
};

static const struct meaning unreachable[] = {
    {ENETUNREACH, false},  /* 0 net */
    {EHOSTUNREACH, false}, /* 1 host */
    {ENOPROTOOPT, true},   /* 2 protocol */
    {ECONNREFUSED, true},  /* 3 port */
    {EMSGSIZE, false},     /* 4 fragmentation needed */
    {EOPNOTSUPP, false},   /* 5 source route failed */
    {ENETUNREACH, true},   /* 6 net unknown */
    {EHOSTDOWN, true},     /* 7 host unknown */
    {ENONET, true},        /* 8 source host isolated */
    {ENETUNREACH, true},   /* 9 net prohibited */
    {EHOSTUNREACH, true},  /* 10 host prohibited */
    {ENETUNREACH, false},  /* 11 net, for this type of service */
    {EHOSTUNREACH, false}, /* 12 host, for this type of service */
    {EHOSTUNREACH, true},  /* 13 filtered */
    {EHOSTUNREACH, true},  /* 14 precedence violation */
    {EHOSTUNREACH, true},  /* 15 precedence cutoff */
};

/* RFC 1191 7.1: old routers do not name the next hop's MTU; the next plateau below the packet's size. */
static uint16_t plateau(uint16_t total)
{
    static const uint16_t plateaus[] = {32000, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296, IP4_MIN_MTU};
    for (size_t i = 0; i < ARRAY_LEN(plateaus); i++) {
        if (plateaus[i] < total) {
            return plateaus[i];
        }
    }
    return IP4_MIN_MTU;
}

static bool error_meaning(struct icmp_error *e, const uint8_t *icmp)
{
    e->type = icmp[ICMP_TYPE];
    e->code = icmp[ICMP_CODE];
    if (e->type == ICMP_UNREACHABLE && e->code < ARRAY_LEN(unreachable)) {
        e->err = unreachable[e->code].err;
        e->hard = unreachable[e->code].hard;
        if (e->code == ICMP_UNREACH_FRAG) {
            e->mtu = rd16(icmp + ICMP_MTU);
            e->mtu = e->mtu != 0 ? e->mtu : plateau(rd16(icmp + ICMP_LEN + IP4_TOTAL));
            return e->mtu >= IP4_MIN_MTU;
        }
        return true;
    }
    e->err = e->type == ICMP_TIME_EXCEEDED ? EHOSTUNREACH : EPROTO;
    e->hard = e->type == ICMP_PARAMETER;
    return e->type != ICMP_UNREACHABLE;
}

/* The quoted packet is one of ours, and enough of it is there to tell its flow. */
static bool error_flow(struct bypass_stack *s, struct icmp_error *e, const uint8_t *quote, uint32_t len)
{
    if (len < IP4_LEN || quote[IP4_VER_IHL] >> 4 != 4) {
        return false;
    }
    uint32_t hlen = (quote[IP4_VER_IHL] & 15u) * 4;
    if (hlen < IP4_LEN || len < hlen + ICMP_QUOTE_MIN || (rd16(quote + IP4_FRAG) & IP4_OFFSET_MASK) != 0) {
        return false;
    }
    enum addr_kind to = addr_kind(s, quote + IP4_DST);
    if (addr_kind(s, quote + IP4_SRC) != ADDR_LOCAL || (to != ADDR_UNICAST && !(loops(s) && to == ADDR_LOCAL))) {
        return false;
    }
    e->src = addr_from_v4(quote + IP4_SRC);
    e->dst = addr_from_v4(quote + IP4_DST);
    e->proto = quote[IP4_PROTO];
    e->src_port = rd16(quote + hlen); /* the same places in TCP and UDP */
    e->dst_port = rd16(quote + hlen + 2);
    e->seq = rd32(quote + hlen + 4);
    return true;
}

static void error_in(struct bypass_stack *s, const uint8_t *icmp, uint32_t len)
{
    struct icmp_error e = {0};
    STAT(s, icmp_in_error);
    if (!error_flow(s, &e, icmp + ICMP_LEN, len - ICMP_LEN) || !error_meaning(&e, icmp)) {
        STAT(s, icmp_in_error_bad);
    } else if (e.proto == PROTO_TCP) {
        tcp_icmp_error(s, &e);
    } else if (e.proto == PROTO_UDP) {
        udp_icmp_error(s, &e);
    }
}

/* ---- In: echo ----------------------------------------------------------------------------------- */

static void echo_reply(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->off = (uint16_t)(m->off + ri->l4_off);
    m->len = ri->l4_len;
    m->flags = 0;
    uint8_t *icmp = pkt_data(s, p);
    icmp[ICMP_TYPE] = ICMP_ECHO_REPLY;
    wr16(icmp + ICMP_CSUM, 0);
    uint16_t csum = csum_fold(csum_bytes(icmp, m->len, 0));
    memcpy(icmp + ICMP_CSUM, &csum, 2);
    struct ip_tx tx = {.src = &ri->dst, .dst = &ri->src, .proto = PROTO_ICMP, .tos = ri->tos}; /* RFC 1122 3.2.2.6 */
    if (ip_out(s, p, &tx) == 0) {
        STAT(s, icmp_out_echo_reply);
    }
}

void icmp_in(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri)
{
    const uint8_t *icmp = pkt_data(s, p) + ri->l4_off;
    if (ri->l4_len < ICMP_LEN) {
        STAT(s, icmp_in_short);
    } else if (csum_fold(csum_bytes(icmp, ri->l4_len, 0)) != 0) {
        STAT(s, icmp_in_bad_checksum);
    } else if (icmp[ICMP_TYPE] == ICMP_ECHO && icmp[ICMP_CODE] == 0) {
        STAT(s, icmp_in_echo);
        if (core(s)->cfg.flags & BYPASS_F_PING) {
            echo_reply(s, p, ri);
            return;
        }
    } else if (icmp[ICMP_TYPE] == ICMP_UNREACHABLE || icmp[ICMP_TYPE] == ICMP_TIME_EXCEEDED ||
               icmp[ICMP_TYPE] == ICMP_PARAMETER) {
        error_in(s, icmp, ri->l4_len);
    } else {
        STAT(s, icmp_in_ignored); /* redirects (routes are not ours to learn), source quench (RFC 6633), the rest */
    }
    pkt_free(s, p);
}
