/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_out.c - which segment goes out now (RFC 9293 3.8.6: windows, silly-window avoidance, Nagle), and
 * how its header looks. Retransmissions go first, then new data, then the FIN, then a bare ACK if
 * nothing carried one.
 */
#include <errno.h>

#include "csum.h"
#include "tcp.h"
#include "wire.h"

/* ---- Building a segment ---------------------------------------------------------------------------- */
struct header {
    seq_t seq, ack;
    uint8_t flags;
    uint16_t wnd, urg;
    uint16_t src_port, dst_port;
    bool has_ts; /* timestamps are the only options; else opts */
    uint32_t ts_val, ts_ecr;
    const uint8_t *opts;
    uint32_t opts_len;
};

/* The first 16 bytes, as they lie in memory. Built and summed in registers: reading back what was just written
 * in smaller pieces would wait for the stores. */
static inline void header_words(const struct header *h, uint32_t len, uint64_t w[2])
{
    w[0] = (uint64_t)__builtin_bswap32(h->seq.v) << 32 | (uint32_t)__builtin_bswap16(h->dst_port) << 16 |
           __builtin_bswap16(h->src_port);
    w[1] = (uint64_t)__builtin_bswap16(h->wnd) << 48 | (uint64_t)h->flags << 40 | (uint64_t)(len << 2) << 32 |
           __builtin_bswap32(h->ack.v);
}

/* With timestamps and nothing else: what nearly every segment carries. sum: of the pseudo-header and payload. */
static inline void header_put_ts(uint8_t *b, const struct header *h, uint32_t sum)
{
    uint64_t w[4];
    header_words(h, TCP_HDR + TCP_TS_BYTES, w);
    w[2] = (uint64_t)TCP_TS_PREFIX << 32; /* behind checksum and urgent pointer */
    w[3] = (uint64_t)__builtin_bswap32(h->ts_ecr) << 32 | __builtin_bswap32(h->ts_val);
    w[2] |= csum_fold(csum_words(w, 4, sum));
    memcpy(b, w, sizeof w);
}

static void header_put(uint8_t *b, const struct header *h, uint32_t sum)
{
    uint64_t w[2];
    uint32_t len = TCP_HDR + h->opts_len;
    header_words(h, len, w);
    memcpy(b, w, sizeof w);
    memset(b + 16, 0, 2);
    wr16(b + 18, h->urg);
    if (h->opts_len > 0)
        memcpy(b + TCP_HDR, h->opts, h->opts_len);
    uint16_t check = csum_fold(csum_bytes(b, len, sum));
    memcpy(b + 16, &check, 2);
}

/* Writes the TCP header in front of meta.off and the checksum over it and the payload, whose partial sum
 * the caller knows. */
static void push_header(struct bypass_stack *s, bypass_pkt p, const struct header *h, const addr_t *src,
                        const addr_t *dst, uint32_t payload_sum)
{
    uint32_t payload = pkt_meta(s, p)->len, len = TCP_HDR + (h->has_ts ? TCP_TS_BYTES : h->opts_len);
    uint32_t pseudo = csum_pseudo(src, dst, 6, len + payload), sum = csum_add(pseudo, payload_sum);
    uint8_t *b = pkt_push(s, p, (uint16_t)len);
    if (likely(h->has_ts))
        header_put_ts(b, h, sum);
    else
        header_put(b, h, sum);
    if (tx_csum_offload(s))
        csum_leave(pkt_meta(s, p), b + TCP_CSUM, pseudo, NET_HEADERS, TCP_CSUM);
    STAT(s, tcp_out);
}

/* Bytes for options beside `payload` bytes in a packet that is no larger than a full segment's. */
static uint32_t conn_option_room(const struct tcp_conn *c, uint32_t payload)
{
    uint32_t full = c->snd_mss + (c->flags & TF_TS ? TCP_TS_BYTES : 0u);
    return payload < full ? min_u32(full - payload, TCP_OPTS_MAX) : 0;
}

/* What few headers carry besides: the urgent pointer, selective acknowledgments as far as the packet has room. true: all
 * was said. */
static bool special_header(struct bypass_stack *s, struct tcp_conn *c, struct header *h, uint8_t *opts, uint32_t room)
{
    bool blocks = c->ooo != NO_INDEX || (c->feat & TX_DSACK);
    uint32_t len = h->has_ts ? tcp_opt_write_ts(opts, h->ts_val, h->ts_ecr) : 0;
    uint32_t sack = blocks && room > len ? tcp_sack_write(s, c, opts + len, room - len) : 0;
    if (c->feat & TX_URG_OUT)
        h->urg = tcp_urg_pointer(s, c, h->seq);
    if (h->urg != 0)
        h->flags |= TCP_URG;
    h->has_ts = false;
    h->opts = opts;
    h->opts_len = len + sack;
    return sack > 0 || !blocks;
}

/* The connection's own half of a header: ACK, window, options. It counts as an acknowledgment. payload: bytes behind
 * it; opts: memory for options, 40 bytes, used until the header is written. */
static void conn_header(struct bypass_stack *s, struct tcp_conn *c, struct header *h, uint8_t flags, uint32_t payload,
                        uint8_t *opts)
{
    uint32_t answered = TF_ACK_NOW | TF_ACK_LATER | TF_ACK_BATCH;
    h->src_port = c->lport;
    h->dst_port = c->rport;
    h->ack = c->rcv_nxt;
    h->flags = flags | TCP_ACK;
    h->wnd = (uint16_t)min_u32(tcp_rcv_window(s, c) >> c->rcv_wscale, 65535);
    if (likely(c->flags & TF_TS)) {
        h->has_ts = true;
        h->ts_val = tcp_ts_now(s, c);
        h->ts_ecr = c->ts_recent;
    }
    if (unlikely(c->feat & TX_ECE) && !(flags & TCP_RST))
        h->flags |= TCP_ECE;
    if (unlikely(tcp_header_special(c)) && !(flags & TCP_RST) &&
        !special_header(s, c, h, opts, conn_option_room(c, payload)) && (c->feat & TX_SACK))
        answered &= ~(uint32_t)TF_ACK_NOW; /* a full segment: the blocks go in an ACK of their own behind it */
    conn_cold(s, c)->segs_out++;
    c->last_ack_sent = c->rcv_nxt;
    if (payload > 0)
        tcp_data_out(c);
    c->flags &= ~answered;
    c->ack_at = 0;
}

static struct ip_tx conn_ip(const struct bypass_stack *s, struct tcp_conn *c)
{
    const struct tcp_cold *k = conn_cold(s, c);
    return (struct ip_tx){.src = &c->laddr,
                          .dst = &c->raddr,
                          .ref = &c->dst,
                          .proto = 6,
                          .ttl = k->opt.ttl,
                          .tos = k->opt.tos,
                          .df = true};
}

/* The next hop, or NULL: then the connection waits for it and tries again. An unreachable one is tried
 * again by the retransmission timer; a connection that is only being opened ends (tcp_resume). */
static struct dst *conn_dst(struct bypass_stack *s, struct tcp_conn *c)
{
    struct dst *d = dst_get(s, &c->dst, &c->raddr);
    if (likely(d && d->state == DST_OK))
        return d;
    if (d && d->state == DST_FAILED)
        conn_cold(s, c)->soft_error = EHOSTUNREACH;
    else
        conn_blocked(s, c, d != NULL);
    return NULL;
}

/* A segment without payload in a frame of its own. false: no frame, or no next hop yet. */
static bool send_bare(struct bypass_stack *s, struct tcp_conn *c, seq_t at, uint8_t flags)
{
    struct dst *d = conn_dst(s, c);
    if (!d)
        return false;
    bypass_pkt p = pkt_alloc(s);
    if (p == BYPASS_PKT_NONE) {
        conn_blocked(s, c, false);
        return false;
    }
    uint8_t opts[TCP_OPTS_MAX];
    struct header h = {.seq = at};
    conn_header(s, c, &h, flags, 0, opts);
    push_header(s, p, &h, &c->laddr, &c->raddr, 0);
    pkt_meta(s, p)->queue = c->queue;
    struct ip_tx tx = conn_ip(s, c);
    ip_out_ready(s, p, &tx, d);
    return true;
}

void tcp_send_ack(struct bypass_stack *s, struct tcp_conn *c)
{
    c->flags |= TF_ACK_NOW; /* stays set when there is no frame: sent when there is one */
    if (send_bare(s, c, c->snd_nxt, 0))
        STAT(s, tcp_out_acks);
}

void tcp_send_probe(struct bypass_stack *s, struct tcp_conn *c)
{
    (void)send_bare(s, c, seq_add(c->snd_una, (uint32_t)-1), 0);
}

void tcp_send_rst(struct bypass_stack *s, struct tcp_conn *c)
{
    struct dst *d = dst_get(s, &c->dst, &c->raddr);
    if (d && d->state == DST_OK && send_bare(s, c, c->snd_nxt, TCP_RST))
        STAT(s, tcp_out_resets);
}

void tcp_send_syn(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    struct dst *d = conn_dst(s, c);
    bool answer = c->state == BYPASS_SYN_RECEIVED;
    uint8_t opts[40];
    tcp_rtx_arm_rto(s, c);
    if (seq_eq(c->snd_nxt, k->iss))
        c->snd_nxt = seq_add(k->iss, 1);
    if (!d)
        return;
    bypass_pkt p = pkt_alloc(s);
    if (p == BYPASS_PKT_NONE) {
        conn_blocked(s, c, false);
        return;
    }
    uint32_t mss = min_u32((d->mtu ? d->mtu : s->dev->mtu) - 40u, k->opt.maxseg ? k->opt.maxseg : UINT32_MAX);
    struct header h = {.seq = k->iss, .src_port = c->lport, .dst_port = c->rport, .opts = opts};
    h.flags = (uint8_t)((answer ? TCP_SYN | TCP_ACK : TCP_SYN) |
                        (c->feat & TX_FO_PENDING ? (c->feat & TX_ECN ? TCP_ECE : 0) : tcp_ecn_syn(s, c)));
    h.ack = answer ? c->rcv_nxt : seq(0);
    h.wnd = (uint16_t)min_u32(c->rcvbuf, 65535); /* never scaled, RFC 7323 2.2 */
    struct tcp_opts offer = {.mss = (uint16_t)mss,
                             .has_wscale = (c->flags & TF_WSCALE) != 0,
                             .wscale = c->rcv_wscale,
                             .has_ts = (c->flags & TF_TS) != 0,
                             .ts_val = tcp_ts_now(s, c),
                             .ts_ecr = answer ? c->ts_recent : 0,
                             .sack_ok = (c->feat & TX_SACK) != 0};
    uint32_t sum = 0;
    if (unlikely(c->feat & TX_FO_ASK))
        (void)tcp_fastopen_syn_out(s, c, &offer, p, &sum);
    h.opts_len = tcp_opt_write_syn(opts, &offer);
    c->rcv_adv = seq_add(c->rcv_nxt, h.wnd);
    k->syn_sent_ns = now_ns(s);
    k->segs_out++;
    push_header(s, p, &h, &c->laddr, &c->raddr, sum);
    pkt_meta(s, p)->queue = c->queue;
    struct ip_tx tx = conn_ip(s, c);
    ip_out_ready(s, p, &tx, d);
}

/* RFC 9293 3.10.7.1: a reset that the sender of the segment will believe. */
void tcp_reply_rst(struct bypass_stack *s, const struct segment *g)
{
    if ((g->flags & TCP_RST) || g->ri->multicast || !(core(s)->cfg.flags & BYPASS_F_RST))
        return;
    struct tcp_bare b = {.src = &g->ri->dst, .dst = &g->ri->src, .sport = g->dst_port, .dport = g->src_port, .ttl = 64};
    if (g->flags & TCP_ACK) {
        b.seq = g->ack;
        b.flags = TCP_RST;
    } else {
        b.ack = seq_add(g->seq, seg_len(g));
        b.flags = TCP_RST | TCP_ACK;
    }
    if (g->pkt != BYPASS_PKT_NONE)
        b.queue = pkt_meta(s, g->pkt)->queue;
    if (tcp_send_bare(s, &b, g->pkt != BYPASS_PKT_NONE ? pkt_came_from(s, g->pkt) : NULL))
        STAT(s, tcp_out_resets);
}

bool tcp_send_bare(struct bypass_stack *s, const struct tcp_bare *b, const uint8_t *mac)
{
    bypass_pkt p = pkt_alloc(s);
    uint8_t opts[40];
    if (p == BYPASS_PKT_NONE)
        return false;
    struct header h = {.seq = b->seq, .ack = b->ack, .flags = b->flags, .wnd = b->wnd, .opts = opts};
    h.src_port = b->sport;
    h.dst_port = b->dport;
    if (b->opts && (b->flags & TCP_SYN)) {
        h.opts_len = tcp_opt_write_syn(opts, b->opts);
    } else if (b->opts && b->opts->has_ts) {
        h.has_ts = true;
        h.ts_val = b->opts->ts_val;
        h.ts_ecr = b->opts->ts_ecr;
    }
    push_header(s, p, &h, b->src, b->dst, 0);
    pkt_meta(s, p)->queue = b->queue;
    struct ip_tx tx = {.src = b->src, .dst = b->dst, .proto = 6, .ttl = b->ttl, .tos = b->tos, .df = true};
    return ip_out_back(s, p, &tx, mac) == 0;
}

/* RFC 5961 7: an ACK that a blind attacker cannot use, and cannot draw without limit. */
bool tcp_challenge_token(struct bypass_stack *s)
{
    struct tcp *t = tcp_head(s);
    if (now_ns(s) - t->challenge_ns >= SEC_NS) {
        t->challenge_ns = now_ns(s);
        /* not a constant: a counter others can watch would be a side channel (CVE-2016-5696) */
        t->challenge_tokens = CHALLENGE_PER_S / 2 + (uint32_t)(core_random(s) % CHALLENGE_PER_S);
    }
    if (t->challenge_tokens == 0)
        return false;
    t->challenge_tokens--;
    return true;
}

void tcp_challenge(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    bool soon = k->challenge_ms != 0 && conn_now_ms(s) - k->challenge_ms < 500;
    if (soon || !tcp_challenge_token(s)) {
        STAT(s, tcp_out_challenge_limited);
        return;
    }
    k->challenge_ms = conn_now_ms(s) | 1;
    STAT(s, tcp_out_challenge_acks);
    tcp_send_ack(s, c);
}

/* ---- Payload ------------------------------------------------------------------------------------------- */
enum sent { SENT, BUSY };

/* The device keeps what it was given until it is given more, which this may be waiting for: a copy goes in its place. It is
 * nobody's but the transmit queue's. */
static __attribute__((noinline)) bypass_pkt held_copy(struct bypass_stack *s, bypass_pkt p)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    if ((m->seg_flags & IN_TXQ) || !(s->dev->caps & BYPASS_CAP_TX_LAZY))
        return BYPASS_PKT_NONE;
    bypass_pkt copy = pkt_alloc(s);
    if (copy != BYPASS_PKT_NONE)
        memcpy(pkt_data(s, copy), pkt_frame(s, p) + m->data_off, m->data_len);
    return copy;
}

/* What a frame of the send queue is sent from: itself, most of the time. PKT_NONE: it cannot go now. */
static inline bypass_pkt sendable(struct bypass_stack *s, bypass_pkt p)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    return likely(!(m->holders & BYPASS_HOLD_DEV) && !(m->seg_flags & IN_TXQ)) ? p : held_copy(s, p);
}

/* Sends one frame of the send queue, from `out`. */
static void send_as(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, bypass_pkt out, struct dst *d, bool fin)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p), *o = pkt_meta(s, out);
    uint8_t opts[TCP_OPTS_MAX];
    struct header h = {.seq = seq(m->seq)};
    conn_header(s, c, &h, (uint8_t)((m->seg_flags & SEG_PSH ? TCP_PSH : 0) | (fin ? TCP_FIN : 0)), m->data_len, opts);
    o->off = likely(out == p) ? m->data_off : o->off;
    o->len = m->data_len;
    o->queue = c->queue;
    m->time_ns = tcp_stamp(s, c);
    tcp_rate_sent(s, c, p);
    struct ip_tx tx = conn_ip(s, c);
    if (c->feat & TX_ECN)
        h.flags |= tcp_ecn_out(c, !(m->seg_flags & SEG_RTX), &tx.tos);
    push_header(s, out, &h, &c->laddr, &c->raddr, m->csum);
    ip_out_ready(s, out, &tx, d);
    conn_cold(s, c)->data_segs_out++;
    STAT(s, tcp_out_data_segments);
}

/* BUSY: the device still holds it from last time. */
static enum sent send_frame(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, struct dst *d, bool fin)
{
    bypass_pkt out = sendable(s, p);
    if (out == BYPASS_PKT_NONE)
        return BUSY;
    send_as(s, c, p, out, d, fin);
    return SENT;
}

static bool fin_goes_with(const struct tcp_conn *c, bypass_pkt p)
{
    return p == c->sndq_tail && (c->flags & TF_FIN_QUEUED) && !(c->flags & TF_CORK);
}

static enum sent retransmit(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, struct dst *d)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    if ((m->seg_flags & IN_TXQ) || ((m->holders & BYPASS_HOLD_DEV) && !(s->dev->caps & BYPASS_CAP_TX_LAZY)))
        return BUSY;
    if (m->data_len > c->snd_mss && !tcp_snd_split(s, c, p, c->snd_mss))
        return BUSY; /* the path's MTU shrank and no frame is left to split into */
    bypass_pkt out = sendable(s, p);
    if (out == BYPASS_PKT_NONE)
        return BUSY;
    bool fin = p == c->sndq_tail && (c->flags & TF_FIN_SENT);
    tcp_recover_resent(s, c, p);
    if (fin)
        c->flags &= ~(uint32_t)TF_FIN_LOST;
    STAT(s, tcp_out_retransmits);
    conn_cold(s, c)->retransmits++;
    conn_cold(s, c)->rtx_bytes += m->data_len;
    send_as(s, c, p, out, d, fin);
    return SENT;
}

/* What is marked lost, oldest first, as far as the congestion window goes. */
static bool output_lost(struct bypass_stack *s, struct tcp_conn *c, struct dst *d)
{
    struct tcp_flight *fl = has_flight(c) ? conn_flight(s, c) : NULL;
    if (fl && unlikely(fl->frto >= FRTO_SEND))
        return true; /* new data first: its ACKs tell whether anything is lost */
    while (c->lost_bytes > 0) {
        bypass_pkt p = tcp_sack_next_lost(s, fl);
        bool head = p == c->sndq_head;
        bool at_once = head && (c->flags & TF_RECOVERY) && !(c->feat & TX_SACK); /* RFC 6582 3.2: whatever cwnd says */
        if (!at_once && tcp_pipe(s, c) + min_u32(pkt_meta(s, p)->data_len, c->snd_mss) > c->cwnd && tcp_pipe(s, c) > 0)
            return false;
        if (!at_once && !tcp_pace_may_send(s, c))
            return false;
        if (retransmit(s, c, p, d) != SENT) {
            conn_blocked(s, c, false);
            return false;
        }
        tcp_pace_sent(s, c, pkt_meta(s, p)->data_len);
        if (head)
            tcp_rtx_arm_rto(s, c);
    }
    if ((c->flags & TF_FIN_LOST) && c->sndq_head == BYPASS_PKT_NONE &&
        send_bare(s, c, seq_add(c->snd_nxt, (uint32_t)-1), TCP_FIN)) {
        STAT(s, tcp_out_retransmits);
        c->flags &= ~(uint32_t)TF_FIN_LOST;
    }
    return true;
}

void tcp_retransmit_head(struct bypass_stack *s, struct tcp_conn *c)
{
    struct dst *d = conn_dst(s, c);
    if (!d)
        return;
    if (c->sndq_head == BYPASS_PKT_NONE || c->sndq_head == c->sndq_next) {
        (void)output_lost(s, c, d); /* only the FIN is left */
        return;
    }
    if (retransmit(s, c, c->sndq_head, d) != SENT)
        conn_blocked(s, c, false);
    tcp_rtx_restart(s, c);
}

/* May this never-sent frame go? *len: how much of it. RFC 9293 3.8.6.2.1 (sender's silly-window
 * avoidance) and 3.7.4 (Nagle). */
static bool may_send(const struct tcp_conn *c, bypass_pkt p, uint32_t frame_len, uint32_t usable, uint32_t *len)
{
    bool last = p == c->sndq_tail;
    bool flight = c->snd_nxt.v != c->snd_una.v;
    *len = min_u32(min_u32(frame_len, c->snd_mss), usable);
    if (*len == 0)
        return false;
    if (*len == c->snd_mss || (*len == frame_len && !last))
        return true;
    if (*len == frame_len) { /* all that is written, less than a segment */
        if ((c->flags & (TF_FIN_QUEUED | TF_PUSH_ALL)) || (c->feat & TX_URG_OUT))
            return true;
        if (c->flags & (TF_CORK | TF_MORE))
            return false;
        return !flight || (c->flags & TF_NODELAY);
    }
    return *len >= c->snd_wnd_max / 2 || (c->flags & (TF_PUSH_ALL | TF_PROBING)) == (TF_PUSH_ALL | TF_PROBING);
}

/* The next frame that was never sent. probe: whatever cwnd says. false: there is none, or it has to wait. */
static bool output_next(struct bypass_stack *s, struct tcp_conn *c, struct dst *d, bool probe)
{
    bypass_pkt p = c->sndq_next;
    if (p == BYPASS_PKT_NONE)
        return false;
    uint32_t frame_len = pkt_meta(s, p)->data_len, len;
    int32_t usable = seq_diff(seq_add(c->snd_una, c->snd_wnd), c->snd_nxt);
    if (usable <= 0 || !may_send(c, p, frame_len, (uint32_t)usable, &len))
        return false;
    if (c->snd_nxt.v == c->snd_una.v) {
        tcp_cc_wake(s, c);
        tcp_flight_begin(s, c);
    }
    if (!probe && tcp_pipe(s, c) + len > c->cwnd && tcp_pipe(s, c) > 0)
        return false;
    if (!probe && !tcp_pace_may_send(s, c))
        return false;
    uint32_t larger = unlikely(c->feat & TX_PMTU_SEARCH) && !probe ? tcp_pmtu_probe(s, c) : 0;
    if (larger == TCP_PMTU_HOLD)
        return false;
    if (larger)
        len = frame_len = larger;
    bool fin = fin_goes_with(c, p) && (uint32_t)usable > len && len == frame_len;
    if ((len < frame_len && !tcp_snd_split(s, c, p, len)) || send_frame(s, c, p, d, fin) != SENT) {
        conn_blocked(s, c, false);
        return false;
    }
    if (c->snd_nxt.v == c->snd_una.v)
        conn_cold(s, c)->unacked_since = now_ns(s);
    tcp_pace_sent(s, c, len);
    if (larger)
        tcp_pmtu_probe_sent(s, c, c->snd_nxt);
    tcp_sack_sent(s, c, p);
    conn_flight(s, c)->prr_out += len;
    c->sndq_next = pkt_meta(s, p)->next;
    c->snd_nxt = seq_add(c->snd_nxt, len + fin);
    if (fin)
        c->flags |= TF_FIN_SENT;
    tcp_cc_sent(s, c);
    return true;
}

static void output_new(struct bypass_stack *s, struct tcp_conn *c, struct dst *d)
{
    if (output_next(s, c, d, false)) {
        tcp_fast_burst(s, c, d);
        while (output_next(s, c, d, false))
            ;
    }
    if (c->sndq_next == BYPASS_PKT_NONE)
        c->flags &= ~(uint32_t)TF_PUSH_ALL;
}

/* New data when there is some, else the last segment again. */
enum tcp_probe tcp_output_tail_probe(struct bypass_stack *s, struct tcp_conn *c)
{
    struct dst *d = conn_dst(s, c);
    uint32_t push = c->flags & TF_PUSH_ALL;
    if (!d)
        return PROBE_NONE;
    c->flags |= TF_PUSH_ALL; /* Nagle's silence is over */
    bool sent = output_next(s, c, d, true);
    c->flags = (c->flags & ~(uint32_t)TF_PUSH_ALL) | push;
    if (sent)
        return PROBE_NEW;
    bypass_pkt p = tcp_sack_last_sent(s, c);
    if (p != BYPASS_PKT_NONE)
        return retransmit(s, c, p, d) == SENT ? PROBE_RTX : PROBE_NONE;
    if (!send_bare(s, c, seq_add(c->snd_nxt, (uint32_t)-1), TCP_FIN)) /* nothing else is out */
        return PROBE_NONE;
    STAT(s, tcp_out_retransmits);
    return PROBE_RTX;
}

static void output_fin(struct bypass_stack *s, struct tcp_conn *c)
{
    if (!(c->flags & TF_FIN_QUEUED) || (c->flags & TF_FIN_SENT) || c->sndq_next != BYPASS_PKT_NONE)
        return;
    if (!send_bare(s, c, c->snd_nxt, TCP_FIN))
        return;
    if (c->snd_nxt.v == c->snd_una.v)
        tcp_flight_begin(s, c);
    c->flags |= TF_FIN_SENT;
    c->snd_nxt = seq_add(c->snd_nxt, 1);
}

static inline bool sends_data(const struct tcp_conn *c)
{
    static const uint16_t mask = 1u << BYPASS_ESTABLISHED | 1u << BYPASS_CLOSE_WAIT | 1u << BYPASS_FIN_WAIT_1 |
                                 1u << BYPASS_CLOSING | 1u << BYPASS_LAST_ACK;
    return (mask >> c->state & 1) || (c->feat & TX_FO_PENDING);
}

/* RFC 5682 2.1 step 2: was there new data to send, and a window for it? Else recovery goes on as usual. */
static void frto_sent(struct bypass_stack *s, struct tcp_conn *c, struct dst *d)
{
    struct tcp_flight *fl = conn_flight(s, c);
    fl->frto = seq_gt(c->snd_nxt, fl->recover) ? FRTO_WAIT : FRTO_OFF;
    if (fl->frto == FRTO_OFF)
        (void)output_lost(s, c, d);
}

/* A timer runs while something is in flight; while nothing is but data waits, it probes the window
 * (RFC 9293 3.8.6.1). Data that waits for the program (cork, MSG_MORE) goes after 200 ms, as on Linux. */
static void arm_after_output(struct bypass_stack *s, struct tcp_conn *c, bool sent_new)
{
    if (c->snd_nxt.v != c->snd_una.v) {
        if (c->rtx_at == 0 || (c->flags & TF_PROBING)) {
            c->flags &= ~(uint32_t)TF_PROBING;
            tcp_rtx_restart(s, c);
        } else if (sent_new && c->rtx_kind == RTX_TLP) {
            tcp_rtx_put_off(s, c);
        }
    } else if (c->sndq_next != BYPASS_PKT_NONE && c->rtx_at == 0) {
        if (!(c->flags & TF_PROBING)) /* else a try that found no next hop: it waits for longer than this */
            conn_cold(s, c)->unacked_since = now_ns(s);
        c->flags |= TF_PROBING;
        c->rtx_at = now_ns(s) + max_u32(c->rto_us, RTO_MIN_US) * 1000ull;
        tcp_timer_update(s, c);
    }
}

void tcp_output_now(struct bypass_stack *s, struct tcp_conn *c)
{
    if (sends_data(c) && tcp_has_output(c)) {
        if (c->feat & TX_LONE)
            tcp_flight_late(s, c);
        struct dst *d = conn_dst(s, c);
        if (d && d->mtu && c->path_mtu != d->mtu) {
            c->path_mtu = d->mtu;
            conn_update_mss(s, c, d->mtu);
        }
        seq_t before = c->snd_nxt;
        if (d && output_lost(s, c, d)) {
            output_new(s, c, d);
            output_fin(s, c);
            if (has_flight(c) && unlikely(conn_flight(s, c)->frto == FRTO_SEND))
                frto_sent(s, c, d);
        }
        arm_after_output(s, c, !seq_eq(c->snd_nxt, before));
    }
    if (c->flags & TF_ACK_NOW)
        tcp_send_ack(s, c);
}

void tcp_resume(struct bypass_stack *s, struct tcp_conn *c)
{
    const struct dst *d = dst_get(s, &c->dst, &c->raddr);
    if (c->flags & TF_ACK_BATCH)
        c->flags = (c->flags & ~(uint32_t)TF_ACK_BATCH) | TF_ACK_NOW;
    bool opening = c->state == BYPASS_SYN_SENT || c->state == BYPASS_SYN_RECEIVED;
    if (opening && d && d->state == DST_FAILED) {
        conn_drop(s, c, EHOSTUNREACH);
        return;
    }
    if (opening && (tcp_opening(c) || conn_cold(s, c)->syn_sent_ns == 0))
        tcp_send_syn(s, c);
    if (!tcp_opening(c))
        tcp_output(s, c);
    if ((c->flags & TF_WANT_OUT) && tcp_snd_room(s, c) > 0 && !(c->flags & TF_BLOCKED)) {
        if (pkt_scarce(s)) {
            conn_blocked(s, c, false);
            return;
        }
        c->flags &= ~(uint32_t)TF_WANT_OUT;
        conn_event(s, c, BYPASS_OUT);
    }
}
