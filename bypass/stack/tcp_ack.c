/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_ack.c - what an acknowledgment does: the send window, round-trip time (RFC 6298), congestion window,
 * and loss recovery (RFC 5681, NewReno RFC 6582, limited transmit RFC 3042).
 *
 * What is in the network is estimated as `pipe`: bytes sent and not acknowledged, less those marked lost,
 * less one segment for each duplicate ACK, since each tells that a segment has left the network. Sending
 * compares pipe to cwnd, so cwnd needs no inflation in recovery. A frame is marked SEG_LOST until it is
 * sent again.
 */
#include "tcp.h"

void tcp_flight_begin(struct bypass_stack *s, struct tcp_conn *c)
{
    if (has_flight(c)) { /* what was learned before is kept */
        tcp_cc_resume(s, c);
        return;
    }
    c->flight = pool_alloc(s, &core(s)->flights); /* there are as many as connections */
    *conn_flight(s, c) = (struct tcp_flight){
        .link = NO_INDEX,
        .rtx_next = BYPASS_PKT_NONE,
        .recover = seq_add(c->snd_una, (uint32_t)-1), /* RFC 6582 3.2 step 1 */
        .sack_high = c->snd_una,
    };
    tcp_cc_begin(s, c);
}

void tcp_flight_drop(struct bypass_stack *s, struct tcp_conn *c)
{
    if (!has_flight(c))
        return;
    pool_free(s, &core(s)->flights, c->flight);
    c->flight = NO_INDEX;
}

void tcp_flight_end(struct bypass_stack *s, struct tcp_conn *c)
{
    if (has_flight(c) && conn_flight(s, c)->keep == 0 && c->ssthresh == UINT32_MAX)
        tcp_flight_drop(s, c);
}

uint32_t tcp_pipe(const struct bypass_stack *s, const struct tcp_conn *c)
{
    if (!has_flight(c))
        return 0;
    const struct tcp_flight *fl = conn_flight(s, c);
    uint32_t out = c->snd_nxt.v - c->snd_una.v - c->lost_bytes - !!(c->flags & TF_FIN_LOST);
    /* outside of recovery no more than RFC 3042 allows, however many come */
    uint32_t arrived = c->flags & (TF_RECOVERY | TF_LOSS) ? fl->dupacks : min_u32(fl->dupacks, 2);
    uint32_t left = arrived * c->snd_mss;
    return out > left ? out - left : 0;
}

/* RFC 6298 2.2, 2.3; G is a microsecond. */
void tcp_rtt_sample(struct tcp_conn *c, uint64_t rtt_us)
{
    uint32_t r = (uint32_t)min_u64(rtt_us, RTO_MAX_US);
    if (c->srtt_us == 0) {
        c->srtt_us = max_u32(r, 1);
        c->rttvar_us = r / 2;
    } else {
        uint32_t err = r > c->srtt_us ? r - c->srtt_us : c->srtt_us - r;
        c->rttvar_us = c->rttvar_us - c->rttvar_us / 4 + err / 4;
        c->srtt_us = max_u32(c->srtt_us - c->srtt_us / 8 + r / 8, 1);
    }
    c->rto_us = min_u32(c->srtt_us + max_u32(4 * c->rttvar_us, RTO_MIN_US), RTO_MAX_US);
    c->backoff = 0; /* only now (Karn): an ACK of something that was sent twice says nothing about time */
}

/* ---- Loss ------------------------------------------------------------------------------------------------ */
static void mark_lost(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    if (m->seg_flags & SEG_LOST)
        return;
    m->seg_flags |= SEG_LOST;
    c->lost_bytes += m->data_len;
}

/* RFC 6298 5.4 to 5.7 and RFC 5681 3.1: all that is out counts as lost, sending starts over from one
 * segment. A second timeout of the same data does not lower ssthresh again. */
void tcp_enter_loss(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_flight *fl = conn_flight(s, c);
    if (!(c->flags & TF_LOSS) || seq_geq(c->snd_una, fl->recover))
        tcp_cc_event(s, c, CC_EV_RTO);
    c->flags = (c->flags & ~(uint32_t)TF_RECOVERY) | TF_LOSS;
    fl->recover = c->snd_nxt;
    c->cwnd = c->snd_mss;
    fl->dupacks = 0;
    for (uint32_t p = c->sndq_head; p != BYPASS_PKT_NONE && p != c->sndq_next; p = pkt_meta(s, p)->next)
        mark_lost(s, c, p);
    fl->rtx_next = c->sndq_head;
    if (c->flags & TF_FIN_SENT)
        c->flags |= TF_FIN_LOST;
}

/* The path's MTU shrank: what is out and too large for it will not arrive (RFC 1191 6.4). No sign of
 * congestion: cwnd stays. */
void tcp_mark_oversize(struct bypass_stack *s, struct tcp_conn *c)
{
    for (uint32_t p = c->sndq_head; p != BYPASS_PKT_NONE && p != c->sndq_next; p = pkt_meta(s, p)->next)
        if (pkt_meta(s, p)->data_len > c->snd_mss)
            mark_lost(s, c, p);
    if (has_flight(c))
        conn_flight(s, c)->rtx_next = c->sndq_head;
}

/* At once; marked as lost first, so that it is not forgotten when there is no frame or the device still
 * holds it. */
static void resend_head(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_flight *fl = conn_flight(s, c);
    if (c->sndq_head != BYPASS_PKT_NONE && c->sndq_head != c->sndq_next) {
        mark_lost(s, c, c->sndq_head);
        fl->rtx_next = c->sndq_head;
    }
    tcp_retransmit_head(s, c);
}

static void enter_recovery(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_flight *fl = conn_flight(s, c);
    STAT(s, tcp_fast_retransmits);
    tcp_cc_event(s, c, CC_EV_LOSS);
    c->cwnd = c->ssthresh;
    fl->recover = c->snd_nxt;
    c->flags |= TF_RECOVERY;
    resend_head(s, c);
}

/* RFC 5681 2: a duplicate acknowledges nothing new, carries nothing, and changes no window. */
static void duplicate_ack(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_flight *fl = conn_flight(s, c);
    STAT(s, tcp_dup_acks);
    if (fl->dupacks < UINT16_MAX && (uint32_t)fl->dupacks * c->snd_mss < c->snd_nxt.v - c->snd_una.v)
        fl->dupacks++;
    if (c->flags & (TF_RECOVERY | TF_LOSS))
        return;
    /* RFC 6582 3.2 step 2: only when more than the last recovery's data is acknowledged. Before that they
     * answer segments that it sent needlessly */
    if (fl->dupacks == 3 && seq_gt(c->snd_una, fl->recover))
        enter_recovery(s, c);
}

static void leave_recovery(struct tcp_conn *c, struct tcp_flight *fl)
{
    uint32_t flight = c->snd_nxt.v - c->snd_una.v;
    if (c->flags & TF_RECOVERY) /* RFC 6582 3.2 step 3, the form that does not burst */
        c->cwnd = min_u32(c->ssthresh, max_u32(flight, c->snd_mss) + c->snd_mss);
    c->flags &= ~(uint32_t)(TF_RECOVERY | TF_LOSS);
    fl->dupacks = 0;
}

/* RFC 6582 3.2 step 3, partial: the next hole starts at snd_una. `frames` left the network with this ACK;
 * all but the one that filled the hole had been counted by a duplicate. */
static void partial_ack(struct bypass_stack *s, struct tcp_conn *c, uint32_t frames)
{
    struct tcp_flight *fl = conn_flight(s, c);
    STAT(s, tcp_partial_acks);
    uint32_t counted = frames > 0 ? frames - 1 : 0;
    fl->dupacks = (uint16_t)(fl->dupacks > counted ? fl->dupacks - counted : 0);
    resend_head(s, c);
}

/* ---- Progress ----------------------------------------------------------------------------------------------- */
static void take_rtt(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, uint64_t rtt_us)
{
    if (rtt_us == 0 && (c->flags & TF_TS) && g->opt.has_ts && g->opt.ts_ecr != 0) {
        uint32_t ms = tcp_ts_now(s, c) - g->opt.ts_ecr; /* tells which transmission it was, RFC 7323 4 */
        if (ms < RTO_MAX_US / 1000)
            rtt_us = max_u64(ms * 1000ull, 1);
    }
    if (rtt_us != 0)
        tcp_rtt_sample(c, rtt_us);
}

static void wake_writer(struct bypass_stack *s, struct tcp_conn *c)
{
    if ((c->flags & TF_WANT_OUT) && tcp_snd_room(s, c) >= c->snd_queued / 2) { /* a third is free */
        c->flags &= ~(uint32_t)TF_WANT_OUT;
        conn_event(s, c, BYPASS_OUT);
    }
}

static void new_ack(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    struct tcp_flight *fl = conn_flight(s, c);
    uint32_t acked = g->ack.v - c->snd_una.v, frames;
    uint64_t rtt_us;
    struct tcp_sample sm = {.acked = acked, .delivered = acked, .flight = tcp_pipe(s, c)};
    tcp_snd_ack(s, c, g->ack, &sm, &frames);
    rtt_us = sm.rtt_us;
    if (rtt_us != 0)
        c->min_rtt_us = min_u32(c->min_rtt_us, (uint32_t)min_u64(rtt_us, RTO_MAX_US));
    c->snd_una = g->ack;
    c->rtx_count = 0;
    c->probes = 0;
    if (acked > 0 && (c->flags & TF_FIN_SENT) && seq_eq(c->snd_una, c->snd_nxt))
        c->flags &= ~(uint32_t)TF_FIN_LOST;
    take_rtt(s, c, g, rtt_us);
    if (c->flags & (TF_RECOVERY | TF_LOSS)) {
        if (seq_geq(c->snd_una, fl->recover))
            leave_recovery(c, fl);
        else if (c->flags & TF_RECOVERY)
            partial_ack(s, c, frames);
    } else {
        fl->dupacks = 0;
        if (seq_lt(fl->recover, c->snd_una))
            fl->recover = seq_add(c->snd_una, (uint32_t)-1); /* keeps it near: comparisons are modulo 2^32 */
    }
    tcp_rate_done(s, c, &sm);
    tcp_cc_acked(s, c, &sm);
    conn_cold(s, c)->unacked_since = now_ns(s);
    conn_cold(s, c)->soft_error = 0; /* the path works again */
    if (c->snd_una.v == c->snd_nxt.v) {
        c->rtx_at = 0; /* RFC 6298 5.2 */
        tcp_flight_end(s, c);
    } else {
        tcp_rtx_restart(s, c); /* 5.3 */
    }
    wake_writer(s, c);
}

/* RFC 9293 3.10.7.4: the newest segment tells the window. */
static void update_window(struct tcp_conn *c, const struct segment *g)
{
    if (seq_lt(c->snd_wl1, g->seq) || (seq_eq(c->snd_wl1, g->seq) && seq_leq(c->snd_wl2, g->ack))) {
        c->snd_wnd = g->wnd << c->snd_wscale;
        c->snd_wnd_max = max_u32(c->snd_wnd_max, c->snd_wnd);
        c->snd_wl1 = g->seq;
        c->snd_wl2 = g->ack;
    }
}

/* Fifth check, the ACK field, in the synchronised states. */
bool tcp_ack_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    if (seq_gt(g->ack, c->snd_nxt)) { /* something never sent */
        STAT(s, tcp_in_bad_ack);
        tcp_challenge(s, c);
        return false;
    }
    uint32_t oldest = max_u32(c->snd_wnd_max, 65535);
    if (seq_lt(seq_add(g->ack, oldest), c->snd_una)) { /* RFC 5961 5.2: too old to be a delayed one */
        STAT(s, tcp_in_bad_ack);
        tcp_challenge(s, c);
        return false;
    }
    uint32_t old_wnd = c->snd_wnd;
    bool advances = seq_gt(g->ack, c->snd_una);
    bool current = seq_eq(g->ack, c->snd_una);
    if (advances || current)
        update_window(c, g);
    c->probes = 0;
    if (advances)
        new_ack(s, c, g);
    else if (current && g->len == 0 && !(g->flags & TCP_FIN) && c->snd_wnd == old_wnd && c->snd_nxt.v != c->snd_una.v &&
             !(c->flags & TF_PROBING))
        duplicate_ack(s, c);
    if (old_wnd == 0 && c->snd_wnd > 0 && (c->flags & TF_PROBING)) {
        c->flags &= ~(uint32_t)TF_PROBING;
        c->rtx_at = 0;
        c->backoff = 0;
    }
    return true;
}
