/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_cookie.c - SYN cookies (RFC 4987 3.6): a SYN that finds the queue of half-open connections full is answered all the
 * same, and nothing is kept about it. What the handshake's ACK has to bring back stands in our initial sequence number:
 *
 *     cookie = peer's first number + hash of the flow (RFC 6528's) + | secret: 1 | MSS: 3 | tag: 28 bits |
 *
 * The tag is a keyed hash of the flow, the peer's first number and the MSS; there are two secrets, one of which is new
 * each 69 s, so that a cookie lives for one to two such periods. Of 2^32 acknowledgments 16 pass: what a blind attacker
 * gets is a connection from 2^28 segments, on which nothing depends that a handshake does not prove anyway. The other
 * options come back in the low bits of our timestamp, if the peer sent one:
 *
 *     TSval = | ms clock, rounded down | ECN: 1 | SACK: 1 | window scale: 4 bits, 15: none |
 *
 * Cookies are believed only while a listener has lately sent some: else an ACK from nowhere costs nothing.
 */
#include "tcp.h"

enum { PERIOD_SHIFT = 36, TAG_BITS = 28, OPT_BITS = 6, NO_WSCALE = 15, OPT_SACK = 16, OPT_ECN = 32 };

/* Ascending. Common ones: minimum, default, PPPoE and tunnels, Ethernet, jumbo frames. */
static const uint16_t mss_table[8] = {216, 536, 1024, 1300, 1400, 1440, 1460, 8960};

/* The secrets' clock. One that is older than two periods must not verify anything. */
static uint64_t period_now(struct bypass_stack *s)
{
    struct tcp *t = tcp_head(s);
    uint64_t now = now_ns(s) >> PERIOD_SHIFT;
    while (t->cookie_period < now) {
        if (t->cookie_period + 2 < now)
            t->cookie_period = now - 2;
        uint64_t *key = t->cookie_key[++t->cookie_period & 1];
        key[0] = core_random(s);
        key[1] = core_random(s);
    }
    return now;
}

void tcp_cookie_init(struct bypass_stack *s)
{
    struct tcp *t = tcp_head(s);
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++)
            t->cookie_key[i][j] = core_random(s);
    t->cookie_period = now_ns(s) >> PERIOD_SHIFT;
}

static uint32_t tag(const struct bypass_stack *s, const struct segment *g, seq_t irs, uint32_t secret, uint32_t mss)
{
    struct {
        addr_t laddr, raddr;
        uint16_t lport, rport;
        uint32_t irs, mss;
    } id = {g->ri->dst, g->ri->src, g->dst_port, g->src_port, irs.v, mss};
    return (uint32_t)siphash13(tcp_head(s)->cookie_key[secret], &id, sizeof id) & ((1u << TAG_BITS) - 1);
}

static uint32_t mss_index(uint16_t mss)
{
    uint32_t i = ARRAY_LEN(mss_table) - 1;
    while (i > 0 && mss_table[i] > mss)
        i--;
    return i;
}

/* The flow's own part; not of the clock, which the ACK does not know. */
static struct flow_isn flow_part(const struct bypass_stack *s, const struct segment *g)
{
    struct flow_isn f = tcp_flow_isn(s, &g->ri->dst, g->dst_port, &g->ri->src, g->src_port);
    f.iss.v -= (uint32_t)(now_ns(s) >> 6);
    return f;
}

/* ---- Out -------------------------------------------------------------------------------------------------- */
/* Never ahead of the clock: the connection's timestamps must not go back (RFC 7323 5.2). */
static uint32_t ts_with_options(uint32_t ms, const struct tcp_opts *o, bool ecn)
{
    uint32_t bits = (o->has_wscale ? o->wscale : (uint32_t)NO_WSCALE) | (o->sack_ok ? (uint32_t)OPT_SACK : 0) |
                    (ecn ? (uint32_t)OPT_ECN : 0);
    uint32_t ts = (ms & ~((1u << OPT_BITS) - 1)) | bits;
    return (int32_t)(ts - ms) > 0 ? ts - (1u << OPT_BITS) : ts;
}

void tcp_cookie_send(struct bypass_stack *s, struct tcp_endpoint *ep, const struct segment *g)
{
    uint32_t secret = period_now(s) & 1, mss = mss_index(g->opt.mss ? g->opt.mss : (uint16_t)TCP_DEFAULT_MSS);
    struct flow_isn f = flow_part(s, g);
    uint32_t bits = secret << 31 | mss << TAG_BITS | tag(s, g, g->seq, secret, mss);
    bool ts = g->opt.has_ts, ecn = ts && tcp_ecn_agreed(s, ep, g);
    const struct tcp_opts o = {.mss =
                                   (uint16_t)min_u32(s->dev->mtu - 40u, ep->opt.maxseg ? ep->opt.maxseg : UINT32_MAX),
                               .has_ts = ts,
                               .ts_val = ts_with_options(conn_now_ms(s), &g->opt, ecn) + f.ts_offset,
                               .ts_ecr = g->opt.ts_val,
                               .has_wscale = ts && g->opt.has_wscale,
                               .wscale = tcp_tune_wscale(s, ep->rcvbuf, ep->feat),
                               .sack_ok = ts && g->opt.sack_ok};
    const struct tcp_bare b = {.src = &g->ri->dst,
                               .dst = &g->ri->src,
                               .sport = g->dst_port,
                               .dport = g->src_port,
                               .wnd = (uint16_t)tcp_syn_window(ep->rcvbuf),
                               .queue = pkt_meta(s, g->pkt)->queue,
                               .seq = seq(g->seq.v + f.iss.v + bits),
                               .ack = seq_add(g->seq, 1),
                               .flags = (uint8_t)(TCP_SYN | TCP_ACK | (ecn ? TCP_ECE : 0)),
                               .ttl = ep->opt.ttl,
                               .tos = ep->opt.tos,
                               .opts = &o};
    ep->cookie_ns = now_ns(s);
    if (tcp_send_bare(s, &b, pkt_came_from(s, g->pkt)))
        STAT(s, tcp_cookies_sent);
}

/* ---- In --------------------------------------------------------------------------------------------------- */
/* MSS of a good cookie, else 0. */
static uint16_t cookie_mss(struct bypass_stack *s, const struct segment *g, struct flow_isn f)
{
    seq_t irs = seq_add(g->seq, (uint32_t)-1);
    uint32_t bits = g->ack.v - 1 - irs.v - f.iss.v;
    uint32_t secret = bits >> 31, mss = bits >> TAG_BITS & 7;
    (void)period_now(s); /* a secret whose time is over is gone */
    return (bits & ((1u << TAG_BITS) - 1)) == tag(s, g, irs, secret, mss) ? mss_table[mss] : 0;
}

/* What the peer's echo brings back. Returns TX_ECN, if that was agreed. */
static uint32_t options_of(struct tcp_opts *o, uint16_t mss, const struct segment *g, struct flow_isn f)
{
    uint32_t bits = g->opt.ts_ecr - f.ts_offset;
    *o = (struct tcp_opts){.mss = mss, .has_ts = g->opt.has_ts, .ts_val = g->opt.ts_val};
    if (!g->opt.has_ts)
        return 0;
    o->has_wscale = (bits & NO_WSCALE) != NO_WSCALE;
    o->wscale = o->has_wscale ? bits & NO_WSCALE : 0;
    o->sack_ok = (bits & OPT_SACK) != 0;
    return bits & OPT_ECN ? TX_ECN : 0;
}

struct tcp_conn *tcp_cookie_in(struct bypass_stack *s, struct tcp_endpoint *ep, const struct segment *g, bool *good)
{
    const uint64_t alive_ns = 2ull << PERIOD_SHIFT;
    *good = false;
    if (ep->cookie_ns == 0 || now_ns(s) - ep->cookie_ns > alive_ns || (g->flags & (TCP_SYN | TCP_RST | TCP_FIN)))
        return NULL;
    struct flow_isn f = flow_part(s, g);
    uint16_t mss = cookie_mss(s, g, f);
    if (mss == 0) {
        STAT(s, tcp_cookies_bad);
        return NULL;
    }
    *good = true;
    STAT(s, tcp_cookies_good);
    if (tcp_accept_full(ep)) {
        STAT(s, tcp_listen_overflow); /* its peer sends data again until somebody accepts */
        return NULL;
    }
    struct segment syn = *g;
    syn.seq = seq_add(g->seq, (uint32_t)-1);
    syn.flags = TCP_SYN;
    uint32_t feat = options_of(&syn.opt, mss, g, f);
    struct tcp_conn *c = tcp_req_promote(s, ep, &syn, seq_add(g->ack, (uint32_t)-1));
    if (c) {
        STAT(s, tcp_passive_opens);
        conn_cold(s, c)->last_in = now_ns(s);
        c->feat |= feat;
    }
    return c;
}
