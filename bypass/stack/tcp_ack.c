/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_ack.c - what an acknowledgment does: the send window, round-trip time (RFC 6298), frames freed. The usual one
 * is handled here in full: it acknowledges something new while nothing is lost, SACKed or doubtful (CA_OPEN). All
 * others go on to tcp_sack.c, which notes what the peer has, and tcp_recover.c, which draws the conclusions.
 *
 * What is in the network is estimated as `pipe`: bytes sent and not acknowledged, less those that the peer has
 * (SACKed; without SACK a segment for each duplicate ACK), less those that are lost and not sent again. Sending
 * compares pipe to cwnd, so cwnd needs no inflation in recovery.
 */
#include "tcp.h"

/* ---- The record of what is in flight ------------------------------------------------------------------------ */
void tcp_flight_begin(struct bypass_stack *s, struct tcp_conn *c)
{
    const struct frame_list none = {BYPASS_PKT_NONE, BYPASS_PKT_NONE};
    if (has_flight(c)) { /* what was learned before is kept */
        tcp_cc_resume(s, c);
        return;
    }
    c->flight = pool_alloc(s, &core(s)->flights); /* there are as many as connections */
    *conn_flight(s, c) = (struct tcp_flight){
        .link = NO_INDEX,
        .lost_list = none,
        .again_list = none,
        .resent_list = none,
        .landmark = BYPASS_PKT_NONE,
        .reo_mult = 1,
    };
    tcp_cc_begin(s, c);
}

/* As if the record had been there when the segment left. */
void tcp_flight_late(struct bypass_stack *s, struct tcp_conn *c)
{
    bypass_pkt p = c->sndq_head;
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    c->feat &= ~(uint32_t)TX_LONE;
    tcp_flight_begin(s, c);
    tcp_sack_sent(s, c, p);
    tcp_rate_sent(s, c, p);
    struct tcp_flight *fl = conn_flight(s, c);
    m->rule = m->hash = fl->delivered_at = fl->first_tx_at = tcp_rate_tick(m->time_ns);
    tcp_cc_sent(s, c);
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

/* RFC 6675 4, SetPipe(); what RACK calls lost is lost (RFC 8985 6.2). */
uint32_t tcp_pipe(const struct bypass_stack *s, const struct tcp_conn *c)
{
    if (!has_flight(c))
        return 0;
    const struct tcp_flight *fl = conn_flight(s, c);
    uint32_t out = c->snd_nxt.v - c->snd_una.v - c->lost_bytes - !!(c->flags & TF_FIN_LOST);
    if (likely(fl->ca_state == CA_OPEN))
        return out;
    /* without SACK, outside of recovery no more than RFC 3042 allows, however many come */
    uint32_t arrived = fl->ca_state >= CA_RECOVERY ? fl->dupacks : min_u32(fl->dupacks, 2);
    uint32_t left = fl->sacked_bytes + arrived * c->snd_mss;
    return out > left ? out - left : 0;
}

/* ---- Round trips ----------------------------------------------------------------------------------------------- */
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

/* The smallest round trip of the last minutes: of this half of the window and the one before, so that it follows when
 * the path gets longer. */
static void take_min_rtt(struct bypass_stack *s, struct tcp_conn *c, uint32_t us)
{
    struct tcp_cold *k = conn_cold(s, c);
    uint32_t now = (uint32_t)(now_ns(s) >> 30); /* about seconds */
    if (unlikely(now - k->min_rtt_since > MIN_RTT_HALF_S)) {
        c->min_rtt_us = k->min_rtt_half_us ? k->min_rtt_half_us : UINT32_MAX;
        k->min_rtt_half_us = 0;
        k->min_rtt_since = now;
    }
    if (us <= k->min_rtt_half_us - 1) { /* 0: none yet */
        k->min_rtt_half_us = us;
        c->min_rtt_us = min_u32(c->min_rtt_us, us);
    }
}

/* All that was acknowledged had been sent more than once. The echo tells which transmission it was (RFC 7323 4) - or that
 * an earlier one had arrived, whose ACK was lost or is late: its age is no round trip, and would double with each
 * timeout. With a D-SACK this ACK answers the last one; without, nobody knows (Karn). */
static void take_echoed_rtt(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g,
                            const struct tcp_sample *sm)
{
    uint64_t us = (tcp_ts_now(s, c) - g->opt.ts_ecr) * 1000ull;
    uint64_t last_us = sm->prior ? (uint64_t)(tcp_rate_tick(now_ns(s)) - sm->tx_at) * 1024 / 1000 : us;
    if (us > last_us + 2000) { /* either clock's tick */
        if (!sm->dsack && !sm->dsack_tlp)
            return;
        us = last_us;
    }
    if (us < RTO_MAX_US)
        tcp_rtt_sample(c, max_u64(us, 1));
}

static void take_rtt(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, const struct tcp_sample *sm)
{
    if (likely(sm->rtt_us != 0)) {
        take_min_rtt(s, c, (uint32_t)min_u64(sm->rtt_us, RTO_MAX_US));
        tcp_rtt_sample(c, sm->rtt_us);
    } else if (sm->acked > 0 && (c->flags & TF_TS) && g->opt.has_ts && g->opt.ts_ecr != 0) {
        take_echoed_rtt(s, c, g, sm);
    }
}

/* ---- Progress --------------------------------------------------------------------------------------------------- */
static void wake_writer(struct bypass_stack *s, struct tcp_conn *c)
{
    if ((c->flags & TF_WANT_OUT) && tcp_snd_room(s, c) >= c->snd_queued / 2) { /* a third is free */
        c->flags &= ~(uint32_t)TF_WANT_OUT;
        conn_event(s, c, BYPASS_OUT);
    }
}

/* snd_una has moved. */
static void progress(struct bypass_stack *s, struct tcp_conn *c)
{
    if (unlikely(c->feat & TX_PMTU_PROBE))
        tcp_pmtu_acked(s, c);
    struct tcp_cold *k = conn_cold(s, c);
    c->rtx_count = 0;
    if (unlikely(c->flags & TF_FIN_LOST) && seq_eq(c->snd_una, c->snd_nxt))
        c->flags &= ~(uint32_t)TF_FIN_LOST;
    k->unacked_since = now_ns(s);
    k->soft_error = 0; /* the path works again */
}

/* Nothing was wrong, and nothing is. */
static void usual_ack(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    uint32_t acked = g->ack.v - c->snd_una.v;
    struct tcp_sample sm = {.acked = acked, .delivered = acked, .flight = tcp_pipe(s, c)};
    (void)tcp_snd_ack(s, c, g, &sm);
    c->snd_una = g->ack;
    progress(s, c);
    take_rtt(s, c, g, &sm);
    tcp_rate_done(s, c, &sm);
    tcp_cc_acked(s, c, &sm);
    if (c->snd_una.v == c->snd_nxt.v) {
        c->rtx_at = 0; /* RFC 6298 5.2 */
        tcp_flight_end(s, c);
    } else {
        tcp_rtx_restart(s, c); /* 5.3 */
    }
    wake_writer(s, c);
}

static void unusual_ack(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, bool duplicate)
{
    struct tcp_flight *fl = conn_flight(s, c);
    struct tcp_sample sm = {.flight = tcp_pipe(s, c)};
    uint64_t sack_rtt_us;
    uint32_t frames = 0;
    if (fl->ca_state == CA_OPEN)
        tcp_sack_begin(c, fl);
    sm.prior_fack = fl->fack;
    if (g->opt.sacks > 0 && (c->feat & TX_SACK))
        tcp_sack_in(s, c, g, &sm);
    sack_rtt_us = sm.rtt_us;
    if (seq_gt(g->ack, c->snd_una)) {
        sm.acked = g->ack.v - c->snd_una.v;
        sm.delivered += sm.acked;
        frames = tcp_snd_ack(s, c, g, &sm);
        c->snd_una = g->ack;
        progress(s, c);
    }
    if (sm.rtt_us == 0)
        sm.rtt_us = sack_rtt_us;
    if (duplicate)
        STAT(s, tcp_dup_acks);
    take_rtt(s, c, g, &sm);
    tcp_ecn_ack_in(s, c, g, &sm);
    tcp_recover_ack(s, c, g, &sm, frames, duplicate && !sm.dsack && !sm.dsack_tlp);
    bool moved = sm.acked > 0;
    /* what was SACKed before has opened the window before; and the end of a recovery sets it once */
    sm.acked = sm.settled ? 0 : min_u32(sm.acked, sm.delivered);
    tcp_rate_done(s, c, &sm);
    if (sm.delivered > 0)
        tcp_cc_acked(s, c, &sm);
    if (moved && c->snd_una.v == c->snd_nxt.v) {
        c->rtx_at = 0;
        tcp_flight_end(s, c);
    }
    if (moved)
        wake_writer(s, c);
}

/* All that was in flight was one segment, and one ACK has come for it: nothing is left to remember. */
void tcp_ack_lone(struct bypass_stack *s, struct tcp_conn *c, uint32_t wnd)
{
    struct tcp_cold *k = conn_cold(s, c);
    bypass_pkt p = c->sndq_head;
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    uint32_t us = (uint32_t)min_u64(max_u64((now_ns(s) - m->time_ns) / 1000, 1), RTO_MAX_US);
    take_min_rtt(s, c, us);
    tcp_rtt_sample(c, us);
    m->seg_flags &= IN_TXQ;
    if (likely(m->seg_flags == 0))
        pkt_free(s, p);
    c->feat &= ~(uint32_t)TX_LONE;
    c->sndq_head = c->sndq_tail = BYPASS_PKT_NONE;
    c->snd_queued = 0;
    c->snd_una = c->snd_wl2 = c->snd_nxt;
    c->snd_wl1 = c->rcv_nxt;
    c->snd_wnd = wnd << c->snd_wscale;
    c->snd_wnd_max = max_u32(c->snd_wnd_max, c->snd_wnd);
    c->rtx_at = 0;
    c->rtx_count = c->probes = 0;
    k->unacked_since = now_ns(s);
    k->soft_error = 0;
}

/* Does it need more than the usual? With nothing in flight there may still be a D-SACK to listen to. */
static inline bool is_unusual(const struct bypass_stack *s, const struct tcp_conn *c, const struct segment *g)
{
    const struct tcp_flight *fl = conn_flight(s, c);
    return fl->ca_state != CA_OPEN || g->opt.sacks > 0 || fl->tlp_out || ((g->flags & TCP_ECE) && (c->feat & TX_ECN));
}

/* RFC 9293 3.10.7.4: the newest segment tells the window. What acknowledges more than any before it is new whatever its
 * sequence number, which may be a repeated one: to keep the old window with the new acknowledgment would move the right
 * edge where the peer has not offered it (Linux reads it so as well). */
static void update_window(struct tcp_conn *c, const struct segment *g, bool advances)
{
    if (advances || seq_lt(c->snd_wl1, g->seq) || (seq_eq(c->snd_wl1, g->seq) && seq_leq(c->snd_wl2, g->ack))) {
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
    if (unlikely(c->feat & TX_LONE))
        tcp_flight_late(s, c);
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
        update_window(c, g, advances);
    c->probes = 0;
    /* RFC 5681 2: a duplicate acknowledges nothing new, carries nothing, and changes no window */
    bool duplicate = current && g->len == 0 && !(g->flags & TCP_FIN) && c->snd_wnd == old_wnd &&
                     c->snd_nxt.v != c->snd_una.v && !(c->flags & TF_PROBING);
    if (advances && likely(!is_unusual(s, c, g)))
        usual_ack(s, c, g);
    else if (duplicate || (has_flight(c) && is_unusual(s, c, g)))
        unusual_ack(s, c, g, duplicate);
    if (old_wnd == 0 && c->snd_wnd > 0 && (c->flags & TF_PROBING)) {
        c->flags &= ~(uint32_t)TF_PROBING;
        c->rtx_at = 0;
        c->backoff = 0;
    }
    return true;
}
