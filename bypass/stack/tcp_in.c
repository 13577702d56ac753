/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_in.c - a segment arrives. Follows RFC 9293 3.10.7 step by step: closed and LISTEN (3.10.7.1, .2),
 * SYN-SENT (.3), all others (.4), with PAWS (RFC 7323 5), and RFC 5961 for resets, SYNs and ACKs that a
 * blind attacker might send.
 */
#include <errno.h>

#include "csum.h"
#include "tcp.h"

/* ---- Parsing ------------------------------------------------------------------------------------------ */
static bool checksum_ok(const struct bypass_stack *s, const struct segment *g, const uint8_t *h)
{
    const struct rx_info *ri = g->ri;
    if (pkt_meta(s, g->pkt)->flags & BYPASS_RX_CSUM_OK)
        return true;
    uint32_t sum = csum_pseudo(&ri->src, &ri->dst, 6, ri->l4_len);
    return csum_fold(csum_bytes(h, ri->l4_len, sum)) == 0;
}

static bool parse(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri, struct segment *g)
{
    const uint8_t *h = pkt_data(s, p) + ri->l4_off;
    *g = (struct segment){.ri = ri, .pkt = p};
    if (ri->l4_len < TCP_HDR) {
        STAT(s, tcp_in_short);
        return false;
    }
    uint32_t hdr_len = (uint32_t)(h[12] >> 4) * 4;
    if (hdr_len < TCP_HDR || hdr_len > ri->l4_len) {
        STAT(s, tcp_in_bad_offset);
        return false;
    }
    if (!checksum_ok(s, g, h)) {
        STAT(s, tcp_in_bad_checksum);
        return false;
    }
    g->src_port = rd16(h);
    g->dst_port = rd16(h + 2);
    g->seq = seq(rd32(h + 4));
    g->ack = seq(rd32(h + 8));
    g->flags = h[13];
    g->wnd = rd16(h + 14);
    g->urg = rd16(h + 18);
    g->data_off = (uint16_t)(ri->l4_off + hdr_len);
    g->len = ri->l4_len - hdr_len;
    uint32_t opt_len = hdr_len - TCP_HDR;
    if (opt_len > 0 && !tcp_opt_parse_ts(h + TCP_HDR, opt_len, &g->opt) &&
        !tcp_opt_parse(h + TCP_HDR, opt_len, &g->opt)) {
        STAT(s, tcp_in_bad_options);
        return false;
    }
    return true;
}

/* ---- The first round trip ------------------------------------------------------------------------------- */
/* Of a SYN that was repeated only timestamps tell (RFC 7323 4); without them it stays unknown (Karn). */
static void handshake_rtt(const struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    uint64_t sent_ns = conn_cold(s, c)->syn_sent_ns; /* 0: it was a cookie, and nobody remembers */
    if (!(c->flags & TF_SYN_RTX)) {
        if (sent_ns != 0)
            tcp_rtt_sample(c, max_u64((now_ns(s) - sent_ns) / 1000, 1));
    } else if ((c->flags & TF_TS) && g->opt.has_ts && g->opt.ts_ecr != 0) {
        uint32_t ms = tcp_ts_now(s, c) - g->opt.ts_ecr;
        if (ms < RTO_MAX_US / 1000)
            tcp_rtt_sample(c, max_u64(ms * 1000ull, 1));
    }
}

/* ---- SYN-SENT (3.10.7.3) -------------------------------------------------------------------------------- */
static void syn_sent_established(struct bypass_stack *s, struct tcp_conn *c, struct segment *g)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (unlikely(c->feat & TX_FO_ASK))
        tcp_fastopen_syn_ack_in(s, c, g);
    c->snd_una = g->ack;
    handshake_rtt(s, c, g);
    k->soft_error = 0;
    conn_established(s, c);
    c->flags |= TF_ACK_NOW;
    g->seq = seq_add(g->seq, 1); /* the SYN is taken; what follows is the sixth step's */
    g->flags &= (uint8_t)~TCP_SYN;
    if (g->len > 0 || (g->flags & TCP_FIN))
        tcp_rcv_data(s, c, g);
    tcp_output(s, c);
}

static void syn_sent_in(struct bypass_stack *s, struct tcp_conn *c, struct segment *g)
{
    bool ack_ok = false;
    if (g->flags & TCP_ACK) { /* first */
        if (seq_leq(g->ack, conn_cold(s, c)->iss) || seq_gt(g->ack, c->snd_nxt)) {
            tcp_reply_rst(s, g);
            return;
        }
        ack_ok = true;
    }
    if (g->flags & TCP_RST) { /* second */
        if (!ack_ok) {
            STAT(s, tcp_in_reset_ignored);
            return;
        }
        STAT(s, tcp_in_reset);
        conn_drop(s, c, ECONNREFUSED);
        return;
    }
    if (!(g->flags & TCP_SYN)) /* fourth; the third, security, is not ours */
        return;
    tcp_take_syn(s, c, g);
    tcp_ecn_syn_ack_in(c, g);
    c->rcv_adv = seq_add(c->rcv_nxt, min_u32(c->rcvbuf, 65535)); /* what our SYN offered */
    if (ack_ok) {
        syn_sent_established(s, c, g);
        return;
    }
    c->state = BYPASS_SYN_RECEIVED; /* simultaneous open */
    c->rtx_count = c->backoff = 0;
    if (c->feat & TX_FO_ASK)
        tcp_fastopen_crossed(s, c);
    tcp_send_syn(s, c);
}

/* ---- Other states (3.10.7.4) ------------------------------------------------------------------------------ */
enum next_step { GO_ON, STOP };

/* RFC 7323 5.3 R1: an old timestamp marks an old duplicate. After 24 days of silence it says nothing. */
static bool paws_rejects(const struct bypass_stack *s, const struct tcp_conn *c, const struct segment *g)
{
    const uint32_t days24_ms = 24u * 24 * 3600 * 1000;
    if (!(c->flags & TF_TS) || !g->opt.has_ts || (g->flags & TCP_RST))
        return false;
    return (int32_t)(g->opt.ts_val - c->ts_recent) < 0 && conn_now_ms(s) - c->ts_recent_ms < days24_ms;
}

/* Table 6 of 3.10.7.4. With a closed window a segment at rcv_nxt still has its ACK processed. */
static bool acceptable(const struct tcp_conn *c, const struct segment *g)
{
    uint32_t wnd = seq_lt(c->rcv_nxt, c->rcv_adv) ? (uint32_t)seq_diff(c->rcv_adv, c->rcv_nxt) : 0;
    uint32_t len = seg_len(g);
    uint32_t ahead = g->seq.v - c->rcv_nxt.v;
    if (wnd == 0)
        return ahead == 0 || (len > 0 && g->seq.v + len == c->rcv_nxt.v + 1 && (g->flags & TCP_FIN));
    if (len == 0)
        return ahead < wnd;
    return ahead < wnd || seq_add(g->seq, len - 1).v - c->rcv_nxt.v < wnd;
}

/* Tells the sender of an unacceptable segment where we are; two sides that each find the other's bare
 * ACKs unacceptable must not go on for ever. */
static void acknowledge(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    if (seg_len(g) > 0)
        tcp_send_ack(s, c);
    else
        tcp_challenge(s, c);
}

static void take_timestamp(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    /* RFC 7323 4.3 (2): of the segment that holds the last byte acknowledged, not of later ones */
    if ((c->flags & TF_TS) && g->opt.has_ts && seq_leq(g->seq, c->last_ack_sent) &&
        (int32_t)(g->opt.ts_val - c->ts_recent) >= 0) {
        c->ts_recent = g->opt.ts_val;
        c->ts_recent_ms = conn_now_ms(s);
    }
}

/* First: sequence number, with PAWS before it. */
static enum next_step check_sequence(struct bypass_stack *s, struct tcp_conn *c, struct segment *g)
{
    if (unlikely(paws_rejects(s, c, g))) {
        STAT(s, tcp_in_paws);
        acknowledge(s, c, g);
        return STOP;
    }
    if (likely(acceptable(c, g)))
        return GO_ON;
    if (g->flags & TCP_RST) {
        STAT(s, tcp_in_reset_ignored);
        return STOP;
    }
    if (c->state == BYPASS_SYN_RECEIVED && (g->flags & TCP_SYN)) {
        if ((g->flags & TCP_ACK) && seq_eq(g->seq, conn_cold(s, c)->irs) && seq_eq(g->ack, c->snd_nxt)) {
            g->flags &= (uint8_t)~TCP_SYN; /* simultaneous open: the SYN came before, the ACK is news */
            g->seq = seq_add(g->seq, 1);
            g->wnd >>= c->snd_wscale; /* not scaled beside a SYN, RFC 7323 2.2 */
            return GO_ON;
        }
        if (seq_eq(g->seq, conn_cold(s, c)->irs)) {
            c->flags |= TF_SYN_RTX; /* our SYN-ACK was lost, or is late */
            tcp_send_syn(s, c);
            return STOP;
        }
    }
    if (seg_len(g) > 0 && seq_leq(seq_add(g->seq, seg_len(g)), c->rcv_nxt)) {
        STAT(s, tcp_in_duplicate);
        if (c->state == BYPASS_TIME_WAIT && (g->flags & TCP_FIN)) {
            c->rtx_at = now_ns(s) + TIME_WAIT_S * SEC_NS; /* eighth: our last ACK was lost, the wait starts over */
            tcp_timer_update(s, c);
        }
        /* Its timestamp is not the one to echo (RFC 7323 5.3 R2): the older one lets its sender see that it sent again
         * needlessly (RFC 3522), and an old sequence number is easy to forge. */
        tcp_sack_old(s, c, g);
        tcp_send_ack(s, c); /* its sender waits for this */
        return STOP;
    }
    STAT(s, tcp_in_out_of_window);
    tcp_challenge(s, c);
    return STOP;
}

/* Second: RST. Only the exact next sequence number resets (RFC 5961 3.2), and never TIME_WAIT: there it answers an old
 * duplicate, and the wait is there against those (RFC 1337 3, F1). */
static void reset_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    if (c->state == BYPASS_TIME_WAIT) {
        STAT(s, tcp_in_reset_ignored);
        return;
    }
    if (!seq_eq(g->seq, c->rcv_nxt)) {
        STAT(s, tcp_in_reset_ignored);
        tcp_challenge(s, c);
        return;
    }
    STAT(s, tcp_in_reset);
    int err = ECONNRESET;
    if (c->feat & TX_FO_PENDING)
        tcp_fastopen_reset(s, c);
    else if (c->state == BYPASS_SYN_RECEIVED)
        err = ECONNREFUSED;
    else if (c->state == BYPASS_CLOSE_WAIT)
        err = EPIPE;
    else if (c->state == BYPASS_TIME_WAIT)
        err = 0;
    conn_drop(s, c, err);
}

/* Fifth, in SYN-RECEIVED. */
static enum next_step handshake_ack(struct bypass_stack *s, struct tcp_conn *c, struct segment *g)
{
    bool early = (c->feat & TX_FO_PENDING) != 0; /* accepted, and data may be in flight: tcp_ack_in() does the rest */
    if (early ? seq_lt(g->ack, c->snd_una) || seq_gt(g->ack, c->snd_nxt) : !seq_eq(g->ack, c->snd_nxt)) {
        tcp_reply_rst(s, g);
        return STOP;
    }
    if ((c->flags & TF_PASSIVE) && !early && !tcp_listen_ready(s, c))
        return STOP; /* nobody can take it now; the SYN-ACK goes again */
    if (!early) {
        c->snd_una = g->ack;
        c->snd_wnd = g->wnd << c->snd_wscale;
        c->snd_wnd_max = c->snd_wnd;
        c->snd_wl1 = g->seq;
        c->snd_wl2 = g->ack;
    }
    handshake_rtt(s, c, g);
    conn_established(s, c);
    if (early && !seq_eq(c->snd_una, c->snd_nxt))
        tcp_rtx_restart(s, c);
    if (unlikely(c->feat & TX_FO_FIN))
        conn_close_late(s, c);
    return GO_ON;
}

/* Fifth, its last part: what an acknowledged FIN changes. */
static enum next_step fin_acked(struct bypass_stack *s, struct tcp_conn *c)
{
    if (!(c->flags & TF_FIN_SENT) || !seq_eq(c->snd_una, c->snd_nxt) || c->sndq_head != BYPASS_PKT_NONE)
        return GO_ON;
    conn_event(s, c, BYPASS_OUT); /* who lingers has waited for it, as on Linux */
    if (c->state == BYPASS_FIN_WAIT_1) {
        c->state = BYPASS_FIN_WAIT_2;
        if (c->sock == NO_INDEX && !conn_fin_wait(s, c))
            return STOP;
    } else if (c->state == BYPASS_CLOSING) {
        conn_time_wait(s, c);
    } else if (c->state == BYPASS_LAST_ACK) {
        conn_drop(s, c, 0);
        return STOP;
    }
    return GO_ON;
}

/* RFC 1122 4.2.2.13: the program is gone, data that comes now is lost: say so. */
static bool data_after_close(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    bool reader = (c->sock != NO_INDEX || (c->flags & TF_ACCEPTABLE)) && !(c->flags & TF_RCV_SHUT);
    if (reader || g->len == 0)
        return false;
    if (c->state != BYPASS_FIN_WAIT_1 && c->state != BYPASS_FIN_WAIT_2)
        return false;
    if (seq_leq(seq_add(g->seq, g->len), c->rcv_nxt))
        return false;
    STAT(s, tcp_in_after_close);
    conn_reset(s, c, ECONNRESET); /* a program that only shut down both directions is told */
    return true;
}

static void synchronised_in(struct bypass_stack *s, struct tcp_conn *c, struct segment *g)
{
    if (check_sequence(s, c, g) == STOP)
        return;
    if (unlikely(g->flags & TCP_RST)) {
        reset_in(s, c, g);
        return;
    }
    if (unlikely(g->flags & TCP_SYN)) { /* fourth; RFC 5961 4.2 */
        STAT(s, tcp_in_syn_in_window);
        tcp_challenge(s, c);
        return;
    }
    if (!(g->flags & TCP_ACK))
        return;
    take_timestamp(s, c, g);
    if (c->state == BYPASS_SYN_RECEIVED && handshake_ack(s, c, g) == STOP)
        return;
    if (c->state == BYPASS_TIME_WAIT)
        return; /* both directions are complete; a repeated FIN was answered above */
    if (!tcp_ack_in(s, c, g) || fin_acked(s, c) == STOP)
        return;
    if (unlikely(c->feat & TX_ECN) && seg_len(g) > 0)
        tcp_ecn_in(s, c, g);
    if (unlikely((g->flags & TCP_URG) || (c->feat & TX_URG_IN)) && !(c->flags & TF_FIN_IN))
        tcp_urg_in(s, c, g); /* sixth */
    if (data_after_close(s, c, g))
        return;
    if ((g->len > 0 || (g->flags & TCP_FIN)) && !(c->flags & TF_FIN_IN)) /* nothing comes after a FIN */
        tcp_rcv_data(s, c, g);                                           /* seventh, eighth */
    tcp_output(s, c);
}

/* ---- Entry --------------------------------------------------------------------------------------------------- */
static __attribute__((noinline)) void unconnected_in(struct bypass_stack *s, struct segment *g)
{
    struct tcp_req *r = tcp_req_find(s, g);
    struct tcp_endpoint *ep = r ? NULL : endpoint_find(s, &g->ri->dst, g->dst_port, g->hash);
    struct tcp_conn *c = r ? tcp_req_in(s, r, g) : ep ? tcp_listen_in(s, ep, g) : NULL;
    if (c) { /* the ACK of a handshake made it: it is this connection's first segment */
        synchronised_in(s, c, g);
    } else if (!r && !ep) {
        STAT(s, tcp_in_no_socket);
        tcp_reply_rst(s, g);
    }
}

static void dispatch(struct bypass_stack *s, struct segment *g)
{
    const struct rx_info *ri = g->ri;
    g->hash = ri->has_hash ? ri->flow_hash : flow_hash(s, &ri->dst, &ri->src, g->dst_port, g->src_port);
    struct tcp_conn *c = conn_find(s, g->hash, &g->ri->dst, &g->ri->src, g->dst_port, g->src_port);
    if (c && unlikely(tcp_tw_replaced_by(c, g)) && endpoint_find(s, &g->ri->dst, g->dst_port, g->hash)) {
        g->follows = true;
        g->old_snd_nxt = c->snd_nxt;
        conn_drop(s, c, 0);
        c = NULL;
    }
    if (likely(c != NULL)) {
        c->queue = pkt_meta(s, g->pkt)->queue;
        conn_count_in(s, c, conn_cold(s, c), g->len);
        if (unlikely(c->state == BYPASS_SYN_SENT))
            syn_sent_in(s, c, g);
        else
            synchronised_in(s, c, g);
        return;
    }
    unconnected_in(s, g);
}

void tcp_in(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri)
{
    struct segment g;
    STAT(s, tcp_in);
    if (parse(s, p, ri, &g) && !ri->multicast) /* RFC 9293 3.9.2.3: never to a group */
        dispatch(s, &g);
    if (g.pkt != BYPASS_PKT_NONE)
        pkt_free(s, g.pkt);
}

/* ---- ICMP errors (RFC 5927: believed only when they quote what is really in flight) ---------------------------- */
void tcp_icmp_error(struct bypass_stack *s, const struct icmp_error *e)
{
    uint32_t hash = flow_hash(s, &e->src, &e->dst, e->src_port, e->dst_port);
    struct tcp_conn *c = conn_find(s, hash, &e->src, &e->dst, e->src_port, e->dst_port);
    if (!c)
        tcp_req_icmp(s, e, hash);
    if (!c || c->state == BYPASS_TIME_WAIT)
        return;
    seq_t first = c->feat & TX_FO_PENDING ? conn_cold(s, c)->iss : c->snd_una;
    if (seq_lt(seq(e->seq), first) || seq_geq(seq(e->seq), c->snd_nxt))
        return;
    STAT(s, tcp_in_error_quoted);
    if (e->type == 3 && e->code == 4) {
        tcp_pmtu_icmp(s, c, e);
        return;
    }
    if (c->state == BYPASS_SYN_SENT || c->state == BYPASS_SYN_RECEIVED) {
        if (e->hard || c->state == BYPASS_SYN_SENT)
            conn_drop(s, c, e->err);
        return;
    }
    conn_cold(s, c)->soft_error = (int16_t)e->err; /* RFC 1122 4.2.3.9: established ones live on */
}
