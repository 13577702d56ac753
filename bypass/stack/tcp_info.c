/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_info.c - what a connection tells of itself: struct bypass_tcp_info, and the same as Linux' TCP_INFO. Little is
 * counted for it; most is told from sequence numbers (RFC 4898) and by a walk over the send queue.
 */
#include <errno.h>

#include "core.h"
#include "tcp.h"

/* Bytes from where a sequence number began. */
static uint64_t bytes_since(uint16_t laps, seq_t at, seq_t from)
{
    return (uint64_t)(seq_laps(laps, at, from) >> 1) << 32 | (at.v - from.v);
}

/* Segments in flight, and what is known of each. */
static void count_flight(const struct bypass_stack *s, const struct tcp_conn *c, struct tcp_told *out)
{
    for (uint32_t p = c->sndq_head; p != BYPASS_PKT_NONE && p != c->sndq_next; p = pkt_meta(s, p)->next) {
        uint16_t marks = pkt_meta(s, p)->seg_flags;
        out->unacked++;
        out->sacked += (marks & SEG_SACKED) != 0;
        out->lost += !(marks & SEG_SACKED) && (marks & (SEG_LOST | SEG_RTX));
        out->retrans += !(marks & SEG_SACKED) && (marks & SEG_RTX) && !(marks & SEG_LOST);
    }
    if (c->snd_una.v != c->snd_nxt.v && ((c->flags & TF_FIN_SENT) || c->state == BYPASS_SYN_SENT))
        out->unacked++; /* FIN and SYN take no frame */
}

static void fill_sender(const struct tcp_told *t, struct bypass_tcp_info *out)
{
    const struct tcp_conn *c = t->c;
    const struct tcp_cold *k = t->k;
    bool opening = tcp_opening(c);
    bool fin = (c->flags & TF_FIN_SENT) != 0;
    uint32_t sent = c->snd_nxt.v - c->snd_una.v - (fin && out->unacked > 0); /* bytes in flight */
    if (!opening)
        out->notsent = c->snd_queued > sent ? c->snd_queued - sent : 0;
    out->bytes_acked = bytes_since(k->una_laps, c->snd_una, k->iss) - ((c->flags & TF_PASSIVE) && !opening);
    out->bytes_retrans = k->rtx_bytes;
    if (!opening && out->state != BYPASS_CLOSED)
        out->bytes_sent = bytes_since(k->una_laps, c->snd_una, k->iss) - 1 - (fin && out->unacked == 0) + sent;
    out->bytes_sent += k->rtx_bytes;
    out->retransmits = k->retransmits;
    out->data_segs_out = k->data_segs_out;
    uint32_t first_time = k->data_segs_out - k->retransmits;
    uint32_t missing = out->unacked - out->sacked;
    out->delivered = opening ? 0 : 1 + (first_time + fin > missing ? first_time + fin - missing : 0);
    out->timeouts_total = k->timeouts;
    out->max_pacing_rate = tcp_pace_limit(&k->opt);
    const struct tcp_flight *fl = t->fl;
    if (!fl)
        return;
    out->pacing_rate = fl->pace_rate;
    out->delivery_rate = fl->rate_us ? (uint64_t)fl->rate_bytes * 1000000 / fl->rate_us : 0;
    out->ca_state = fl->ca_state;
    if (fl->app_limited != 0)
        out->flags |= BYPASS_INFO_APP_LIMITED;
}

static void fill_receiver(const struct tcp_told *t, struct bypass_tcp_info *out)
{
    const struct tcp_conn *c = t->c;
    const struct tcp_cold *k = t->k;
    if (c->state != BYPASS_SYN_SENT && k->irs.v != c->rcv_nxt.v)
        out->bytes_received = bytes_since(k->nxt_laps, c->rcv_nxt, k->irs) - 1;
    out->rcv_wnd = seq_lt(c->rcv_nxt, c->rcv_adv) ? (uint32_t)seq_diff(c->rcv_adv, c->rcv_nxt) : 0;
    out->rcv_queued = c->rcv_queued;
    out->rcv_mss = c->rcv_mss;
    out->rcv_limit = min_u32(c->rcvbuf, 65535u << c->rcv_wscale);
    out->rcv_rtt_us = k->rcv_rtt_us;
    out->rcv_space = k->space_bytes;
    out->ato_us = DELACK_MS * 1000;
    out->segs_in = k->segs_in;
    out->data_segs_in = k->data_segs_in;
}

static uint32_t info_flags(const struct tcp_conn *c)
{
    return (c->flags & TF_TS ? BYPASS_INFO_TIMESTAMPS : 0u) | (c->flags & TF_WSCALE ? BYPASS_INFO_WSCALE : 0u) |
           (c->feat & TX_SACK ? BYPASS_INFO_SACK : 0u) | (c->feat & TX_ECN ? BYPASS_INFO_ECN : 0u) |
           (c->feat & TX_FASTOPEN ? BYPASS_INFO_FASTOPEN : 0u);
}

void tcp_info_fill(const struct tcp_told *t, struct bypass_tcp_info *out)
{
    const struct tcp_conn *c = t->c;
    uint32_t maxseg = t->k->opt.maxseg;
    *out = (struct bypass_tcp_info){
        .local = {.addr = c->laddr, .port = c->lport},
        .peer = {.addr = c->raddr, .port = c->rport},
        .state = c->state,
        .snd_una = c->snd_una.v,
        .snd_nxt = c->snd_nxt.v,
        .rcv_nxt = c->rcv_nxt.v,
        .snd_wnd = c->snd_wnd,
        .cwnd = c->cwnd,
        .ssthresh = c->ssthresh,
        .snd_mss = c->snd_mss,
        .snd_queued = c->snd_queued,
        .srtt_us = c->srtt_us,
        .rttvar_us = c->rttvar_us,
        .rto_us = c->rto_us,
        .min_rtt_us = c->min_rtt_us,
        .flags = info_flags(c),
        .snd_wscale = c->snd_wscale,
        .rcv_wscale = c->rcv_wscale,
        .timeouts = c->rtx_count,
        .probes = c->probes,
        .backoff = c->backoff,
        .pmtu = c->path_mtu ? c->path_mtu : t->mtu,
        .advmss = min_u32((uint32_t)t->mtu - 40, maxseg ? maxseg : UINT32_MAX),
        .segs_out = t->k->segs_out,
        .unacked = t->unacked,
        .sacked = t->sacked,
        .lost = t->lost,
        .retrans = t->retrans,
    };
    fill_sender(t, out);
    fill_receiver(t, out);
}

static void fill(const struct bypass_stack *s, const struct tcp_conn *c, struct bypass_tcp_info *out)
{
    struct tcp_told t = {
        .c = c, .k = conn_cold(s, c), .fl = has_flight(c) ? conn_flight(s, c) : NULL, .mtu = s->dev->mtu};
    count_flight(s, c, &t);
    tcp_info_fill(&t, out);
}

int bypass_tcp_info(struct bypass_stack *s, bypass_sock h, struct bypass_tcp_info *out)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return -EOPNOTSUPP;
    if (k->type == SOCK_TCP) {
        if (conn_at(s, k->idx)->feat & TX_LONE)
            tcp_flight_late(s, conn_at(s, k->idx));
        fill(s, conn_at(s, k->idx), out);
        return 0;
    }
    const struct tcp_endpoint *ep = endpoint_at(s, k->idx);
    *out = (struct bypass_tcp_info){
        .local = {.addr = ep->addr, .port = ep->port},
        .state = ep->listening ? BYPASS_LISTEN : BYPASS_CLOSED,
        .rcv_queued = ep->accept_count,
        .snd_queued = ep->listening ? ep->backlog : 0,
        .snd_mss = TCP_DEFAULT_MSS,
        .cwnd = 10 * TCP_DEFAULT_MSS, /* RFC 6928 */
        .max_pacing_rate = tcp_pace_limit(&ep->opt),
        .rto_us = RTO_INIT_US,
        .ssthresh = UINT32_MAX,
        .min_rtt_us = UINT32_MAX,
    };
    return 0;
}

int bypass_conn_next(struct bypass_stack *s, uint32_t *cursor, struct bypass_tcp_info *out)
{
    const struct flow_slot *table = flow_table(s);
    for (; *cursor <= tcp_head(s)->table_mask; (*cursor)++) {
        if (table[*cursor].idx == 0)
            continue;
        fill(s, conn_at(s, table[*cursor].idx - 1), out);
        (*cursor)++;
        return 1;
    }
    for (uint32_t i; (i = *cursor - tcp_head(s)->table_mask - 1) < core(s)->reqs.bump;) {
        (*cursor)++;
        if (tcp_req_info(s, i, out))
            return 1;
    }
    return 0;
}

/* ---- Linux' layout ---------------------------------------------------------------------------------------- */
struct linux_tcp_info { /* linux/tcp.h: struct tcp_info */
    uint8_t state, ca_state, retransmits, probes, backoff, options, wscales, app_limited;
    uint32_t rto, ato, snd_mss, rcv_mss;
    uint32_t unacked, sacked, lost, retrans, fackets;
    uint32_t last_data_sent, last_ack_sent, last_data_recv, last_ack_recv;
    uint32_t pmtu, rcv_ssthresh, rtt, rttvar, snd_ssthresh, snd_cwnd, advmss, reordering;
    uint32_t rcv_rtt, rcv_space;
    uint32_t total_retrans;
    uint64_t pacing_rate, max_pacing_rate, bytes_acked, bytes_received;
    uint32_t segs_out, segs_in;
    uint32_t notsent_bytes, min_rtt, data_segs_in, data_segs_out;
    uint64_t delivery_rate;
    uint64_t busy_time, rwnd_limited, sndbuf_limited;
    uint32_t delivered, delivered_ce;
    uint64_t bytes_sent, bytes_retrans;
    uint32_t dsack_dups, reord_seen, rcv_ooopack, snd_wnd;
    uint32_t rcv_wnd, rehash;
    uint16_t total_rto, total_rto_recoveries;
    uint32_t total_rto_time;
};
static_assert(offsetof(struct linux_tcp_info, pacing_rate) == 104, "as Linux lays it out");
static_assert(offsetof(struct linux_tcp_info, delivery_rate) == 160, "as Linux lays it out");
static_assert(sizeof(struct linux_tcp_info) == 248, "as Linux lays it out");

static uint8_t linux_options(uint32_t flags)
{
    enum { TIMESTAMPS = 1, SACK = 2, WSCALE = 4, ECN = 8, SYN_DATA = 32 };
    return (uint8_t)((flags & BYPASS_INFO_TIMESTAMPS ? TIMESTAMPS : 0) | (flags & BYPASS_INFO_SACK ? SACK : 0) |
                     (flags & BYPASS_INFO_WSCALE ? WSCALE : 0) | (flags & BYPASS_INFO_ECN ? ECN : 0) |
                     (flags & BYPASS_INFO_FASTOPEN ? SYN_DATA : 0));
}

int bypass_tcp_info_linux(const struct bypass_tcp_info *i, void *out, size_t n)
{
    enum { INFINITE_SSTHRESH = 0x7fffffff, REORDERING = 3, TS_BYTES = 12 };
    uint32_t mss = max_u32(i->snd_mss, 1);
    bool stamped = (i->flags & BYPASS_INFO_TIMESTAMPS) && i->advmss > TS_BYTES; /* Linux counts payload then */
    struct linux_tcp_info l = {
        .state = (uint8_t)(i->state == BYPASS_TIME_WAIT ? BYPASS_CLOSED : i->state), /* its socket has none on Linux */
        .ca_state = i->ca_state,
        .retransmits = i->timeouts,
        .probes = i->probes,
        .backoff = i->backoff,
        .options = linux_options(i->flags),
        .wscales = (uint8_t)(i->snd_wscale | i->rcv_wscale << 4),
        .app_limited = (i->flags & BYPASS_INFO_APP_LIMITED) != 0,
        .rto = i->rto_us,
        .ato = i->ato_us,
        .snd_mss = i->snd_mss,
        .rcv_mss = i->rcv_mss,
        .unacked = i->state == BYPASS_LISTEN ? i->rcv_queued : i->unacked,
        .sacked = i->state == BYPASS_LISTEN ? i->snd_queued : i->sacked,
        .lost = i->lost,
        .retrans = i->retrans,
        .pmtu = i->pmtu,
        .rcv_ssthresh = i->rcv_limit,
        .rtt = i->srtt_us,
        .rttvar = i->rttvar_us,
        .snd_ssthresh = i->ssthresh == UINT32_MAX ? INFINITE_SSTHRESH : i->ssthresh / mss,
        .snd_cwnd = i->cwnd / mss,
        .advmss = i->advmss - (stamped ? TS_BYTES : 0),
        .reordering = REORDERING,
        .rcv_rtt = i->rcv_rtt_us,
        .rcv_space = i->rcv_space,
        .total_retrans = i->retransmits,
        .pacing_rate = i->pacing_rate ? i->pacing_rate : UINT64_MAX,
        .max_pacing_rate = i->max_pacing_rate ? i->max_pacing_rate : UINT64_MAX,
        .bytes_acked = i->bytes_acked,
        .bytes_received = i->bytes_received,
        .segs_out = i->segs_out,
        .segs_in = i->segs_in,
        .notsent_bytes = i->notsent,
        .min_rtt = i->min_rtt_us,
        .data_segs_in = i->data_segs_in,
        .data_segs_out = i->data_segs_out,
        .delivery_rate = i->delivery_rate,
        .delivered = i->delivered,
        .bytes_sent = i->bytes_sent,
        .bytes_retrans = i->bytes_retrans,
        .snd_wnd = i->snd_wnd,
        .rcv_wnd = i->rcv_wnd,
        .total_rto = (uint16_t)i->timeouts_total,
    };
    if (i->state == BYPASS_LISTEN) /* Linux tells no more of a listener */
        l = (struct linux_tcp_info){.state = l.state,
                                    .unacked = l.unacked,
                                    .sacked = l.sacked,
                                    .snd_cwnd = l.snd_cwnd,
                                    .reordering = l.reordering,
                                    .pacing_rate = l.pacing_rate,
                                    .max_pacing_rate = l.max_pacing_rate};
    n = n < sizeof l ? n : sizeof l;
    memcpy(out, &l, n);
    return (int)n;
}
