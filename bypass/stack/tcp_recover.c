/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_recover.c - what follows from losses: the states of recovery, the window in them (PRR, RFC 6937 and its
 * revision RFC 9937), and how to find out that they were a mistake: F-RTO (RFC 5682), Eifel detection (RFC 3522) and
 * D-SACK (RFC 3708), with the response of RFC 4015. Without SACK losses are found by duplicate ACKs (RFC 5681, NewReno
 * RFC 6582, limited transmit RFC 3042); with it tcp_rack.c finds them.
 *
 *                     SACK, duplicate ACK           lost
 *             OPEN <----------------------> DISORDER ----> RECOVERY --- `recover` is acknowledged, or undone --> OPEN
 *              |  \__ ECE __ CWR __________________________/   |
 *              \______________ timeout ________________________|____> LOSS --- the same ----------------------> OPEN
 *
 * In CA_OPEN nothing is SACKed or lost, no duplicate ACK counts, and no ACK comes here.
 */
#include "tcp.h"

static void set_state(struct tcp_conn *c, struct tcp_flight *fl, uint8_t state)
{
    fl->ca_state = state;
    c->flags &= ~(uint32_t)(TF_RECOVERY | TF_LOSS);
    if (state == CA_RECOVERY)
        c->flags |= TF_RECOVERY;
    else if (state == CA_LOSS)
        c->flags |= TF_LOSS;
}

static bool with_sack(const struct tcp_conn *c) { return c->feat & TX_SACK; }

/* Recovery is over, or there was nothing to recover from: CA_OPEN, unless there are still gaps. */
static void settle(struct tcp_conn *c, struct tcp_flight *fl)
{
    /* RFC 6582 3.2 step 2, without SACK: duplicates of the ACK that ended a recovery answer what it sent needlessly */
    bool hold = !with_sack(c) && fl->hold && seq_leq(c->snd_una, fl->recover);
    fl->hold = hold;
    if (fl->sacked_frames > 0 || fl->dupacks > 0 || hold) {
        set_state(c, fl, CA_DISORDER);
        return;
    }
    set_state(c, fl, CA_OPEN);
    if (fl->resent_frames == 0)
        fl->rtx_stamped = false;
}

/* ---- Undo ------------------------------------------------------------------------------------------------- */
/* A window of data is undone once: a peer that lies could have all of it marked and unmarked with every other ACK. */
static void undo_begin(struct tcp_conn *c, struct tcp_flight *fl)
{
    fl->undone = fl->undone && seq_lt(c->snd_una, fl->recover);
    fl->undo = !fl->undone;
    fl->undo_una = c->snd_una;
    fl->undo_rtx = fl->resent_frames > 0 ? fl->resent_frames : UNDO_NONE_SENT;
}

/* RFC 3522 3.2: the ACK echoes a timestamp from before the first retransmission: the original has arrived. */
static bool eifel_detects(const struct tcp_conn *c, const struct tcp_flight *fl, const struct segment *g)
{
    return fl->rtx_stamped && (c->flags & TF_TS) && g->opt.has_ts && g->opt.ts_ecr != 0 &&
           (int32_t)(g->opt.ts_ecr - fl->rtx_ts) < 0;
}

/* RFC 3708: each retransmission was called a duplicate. */
static bool dsacks_detect(const struct tcp_flight *fl) { return fl->undo_rtx == 0; }

/* RFC 4015 3.2: as if nothing had been. */
static void undo(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, struct tcp_sample *sm)
{
    if (fl->ca_state == CA_LOSS)
        STAT(s, tcp_undone_timeouts);
    else
        STAT(s, tcp_undone_recoveries);
    if (fl->ca_state != CA_OPEN && fl->ca_state != CA_DISORDER)
        tcp_sack_unmark_lost(s, c);
    if (fl->prior_ssthresh != 0) {
        c->cwnd = max_u32(c->cwnd, fl->prior_cwnd);
        c->ssthresh = max_u32(c->ssthresh, fl->prior_ssthresh);
    }
    sm->settled = fl->ca_state != CA_LOSS; /* a timeout's was long ago: what has arrived since counts for growth */
    fl->undo = false;
    fl->undone = true;
    fl->frto = FRTO_OFF;
    c->feat &= ~(uint32_t)TX_CWR;
    tcp_cc_event(s, c, CC_EV_UNDO);
}

/* ---- The window in recovery ------------------------------------------------------------------------------- */
/* Sets ssthresh, and the state of PRR. */
static void reduction_begin(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl,
                            const struct tcp_sample *sm, enum tcp_cc_ev ev)
{
    uint32_t flight = c->snd_nxt.v - c->snd_una.v;
    fl->recover = c->snd_nxt;
    tcp_tlp_end(fl);
    fl->prior_cwnd = c->cwnd;
    fl->prr_delivered = fl->prr_out = 0;
    /* RFC 9937 6: what this recovery can see delivered, this ACK's part included */
    fl->recover_fs = max_u32(flight - fl->sacked_bytes + sm->sacked + sm->acked, c->snd_mss);
    tcp_cc_event(s, c, ev);
}

/* RFC 9937 6.2; in bytes. safe: SafeACK, the ACK makes progress and tells of no loss. */
static void proportional_reduction(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl,
                                   const struct tcp_sample *sm, bool safe)
{
    uint32_t pipe = tcp_pipe(s, c), send;
    if (sm->delivered == 0 || tcp_cc_own_window(s, c))
        return;
    fl->prr_delivered += sm->delivered;
    if (pipe > c->ssthresh) {
        uint64_t share = ((uint64_t)fl->prr_delivered * c->ssthresh + fl->recover_fs - 1) / fl->recover_fs;
        send = share > fl->prr_out ? (uint32_t)min_u64(share - fl->prr_out, 1u << 30) : 0;
    } else {
        send = fl->prr_delivered > fl->prr_out ? fl->prr_delivered - fl->prr_out : 0;
        send = max_u32(send, sm->delivered);
        if (safe)
            send += c->snd_mss;
        send = min_u32(send, c->ssthresh - pipe);
    }
    if (fl->prr_out == 0) /* the first retransmission does not wait */
        send = max_u32(send, c->snd_mss);
    c->cwnd = max_u32(pipe + send, c->snd_mss);
}

static void reduction_end(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, struct tcp_sample *sm)
{
    bool reduced = fl->ca_state == CA_CWR || fl->ca_state == CA_RECOVERY;
    if (reduced && !tcp_cc_own_window(s, c) && c->ssthresh != UINT32_MAX) {
        c->cwnd = c->ssthresh; /* RFC 9937 6.2, last paragraph: pipe is near it by now */
        sm->settled = true;
    }
    tcp_cc_event(s, c, CC_EV_RECOVERED);
}

/* ---- Beginnings ------------------------------------------------------------------------------------------- */
static void enter_recovery(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl,
                           const struct tcp_sample *sm)
{
    STAT(s, tcp_fast_retransmits);
    undo_begin(c, fl);
    if (fl->ca_state < CA_CWR) { /* else it has been reduced, for the same round trip */
        fl->prior_ssthresh = c->ssthresh;
        reduction_begin(s, c, fl, sm, CC_EV_LOSS);
    } else {
        fl->prior_ssthresh = 0;
    }
    set_state(c, fl, CA_RECOVERY);
}

/* ECE (RFC 3168 6.1.2): the window shrinks as for a loss, without one. */
void tcp_recover_enter_cwr(struct bypass_stack *s, struct tcp_conn *c)
{
    const struct tcp_sample none = {0};
    struct tcp_flight *fl = conn_flight(s, c);
    if (fl->ca_state >= CA_CWR)
        return;
    if (fl->ca_state == CA_OPEN)
        tcp_sack_begin(c, fl);
    fl->undo = false;
    reduction_begin(s, c, fl, &none, CC_EV_ECN);
    set_state(c, fl, CA_CWR);
}

/* RFC 6298 5.4 to 5.7, RFC 5681 3.1, RFC 8985 6.3. A second timeout of the same data does not lower ssthresh again. */
void tcp_enter_loss(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_flight *fl = conn_flight(s, c);
    bool fresh = fl->ca_state<CA_RECOVERY, repeated = c->rtx_count> 0;
    if (fl->ca_state == CA_OPEN)
        tcp_sack_begin(c, fl);
    if (fl->ca_state <= CA_DISORDER || seq_geq(c->snd_una, fl->recover) || (fl->ca_state == CA_LOSS && !repeated)) {
        fl->prior_cwnd = c->cwnd;
        fl->prior_ssthresh = c->ssthresh;
        tcp_cc_event(s, c, CC_EV_RTO);
        undo_begin(c, fl);
    }
    fl->dupacks = 0;
    tcp_tlp_end(fl);
    fl->recover = c->snd_nxt;
    tcp_sack_mark_all_lost(s, c, with_sack(c));
    fl->frto = fresh || repeated ? FRTO_ON : FRTO_OFF; /* RFC 5682 2.1: not when the timeout hits a recovery */
    set_state(c, fl, CA_LOSS);
    c->cwnd = tcp_pipe(s, c) + c->snd_mss;
}

/* The path's MTU shrank: what is out and too large for it will not arrive (RFC 1191 6.4). No sign of
 * congestion: cwnd stays. */
void tcp_mark_oversize(struct bypass_stack *s, struct tcp_conn *c)
{
    if (c->feat & TX_LONE)
        tcp_flight_late(s, c);
    for (uint32_t p = c->sndq_head; p != BYPASS_PKT_NONE && p != c->sndq_next; p = pkt_meta(s, p)->next)
        if (pkt_meta(s, p)->data_len > c->snd_mss)
            tcp_sack_mark_lost(s, c, p);
}

/* ---- Duplicate ACKs, for a peer without SACK (RFC 5681 3.2, RFC 6582) -------------------------------------------- */
static uint32_t arrived_bytes(const struct tcp_conn *c, const struct tcp_flight *fl)
{
    return fl->dupacks * c->snd_mss;
}

/* Each tells that a segment has left the network; no more of them count than can be out. */
static void count_duplicate(struct tcp_conn *c, struct tcp_flight *fl, struct tcp_sample *sm)
{
    if (fl->dupacks == UINT16_MAX || arrived_bytes(c, fl) >= c->snd_nxt.v - c->snd_una.v)
        return;
    fl->dupacks++;
    sm->delivered += c->snd_mss;
}

/* At once; marked as lost first, so that it is not forgotten when there is no frame or the device still
 * holds it. */
static void resend_head(struct bypass_stack *s, struct tcp_conn *c)
{
    if (c->sndq_head != BYPASS_PKT_NONE && c->sndq_head != c->sndq_next)
        tcp_sack_mark_lost(s, c, c->sndq_head);
    tcp_retransmit_head(s, c);
}

/* What is acknowledged now had been counted when a duplicate told of it, all but the frame that filled the hole. */
static void uncount_duplicates(struct tcp_conn *c, struct tcp_flight *fl, struct tcp_sample *sm, uint32_t frames)
{
    uint32_t before = arrived_bytes(c, fl), counted = frames > 0 ? frames - 1 : 0;
    fl->dupacks = (uint16_t)(fl->dupacks > counted ? fl->dupacks - counted : 0);
    uint32_t undone = before - arrived_bytes(c, fl);
    sm->delivered -= min_u32(undone, sm->delivered);
}

/* ---- Each state ------------------------------------------------------------------------------------------------- */
struct ack { /* what is asked of the ACK that is being processed */
    const struct segment *g;
    struct tcp_sample *sm;
    bool duplicate; /* RFC 5681 2 */
};

static bool find_losses(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl)
{
    uint64_t before = fl->lost;
    fl->reorder_at = tcp_rack_detect(s, c);
    return fl->lost != before;
}

/* CA_OPEN with news, CA_DISORDER, CA_CWR. */
static void watch(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, const struct ack *a)
{
    bool lost;
    if (fl->undo && dsacks_detect(fl)) /* it comes after the recovery that it is about has ended */
        undo(s, c, fl, a->sm);
    if (with_sack(c)) {
        lost = find_losses(s, c, fl);
    } else {
        if (a->sm->acked > 0)
            fl->dupacks = 0;
        else if (a->duplicate)
            count_duplicate(c, fl, a->sm);
        lost = fl->dupacks == 3 && a->duplicate && !(fl->hold && seq_leq(c->snd_una, fl->recover));
    }
    if (lost && unlikely(c->feat & TX_PMTU_PROBE) && tcp_pmtu_probe_lost(s, c)) {
        fl->dupacks = 0; /* RFC 4821 7.6.1: only the probe is missing, and what was sent behind it will say so again */
        fl->recover = c->snd_nxt;
        fl->hold = true;
        tcp_retransmit_head(s, c);
    } else if (lost) {
        enter_recovery(s, c, fl, a->sm);
        if (!with_sack(c))
            resend_head(s, c);
    } else if (fl->ca_state == CA_CWR && seq_geq(c->snd_una, fl->recover)) {
        reduction_end(s, c, fl, a->sm);
        settle(c, fl);
    } else if (fl->ca_state != CA_CWR) {
        settle(c, fl);
    }
}

/* All that was out when it began is acknowledged (RFC 6675 5, RFC 6582 3.2 step 3: a full acknowledgment). */
static void finish(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, const struct ack *a)
{
    if (fl->undo && (dsacks_detect(fl) || eifel_detects(c, fl, a->g)))
        undo(s, c, fl, a->sm);
    else
        reduction_end(s, c, fl, a->sm);
    tcp_rack_recovered(fl);
    fl->dupacks = 0;
    fl->frto = FRTO_OFF;
    fl->hold = true;
    settle(c, fl);
}

/* An original that arrived late has filled the hole (RFC 3522), or every retransmission was needless (RFC 3708). */
static bool undo_in_recovery(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, const struct ack *a)
{
    bool late = a->sm->acked > 0 && eifel_detects(c, fl, a->g);
    if (!fl->undo || (!late && !dsacks_detect(fl)))
        return false;
    if (late && with_sack(c)) { /* it was overtaken by more than we thought */
        fl->reordering = true;
        fl->keep |= FK_RACK;
    }
    if (late && fl->resent_frames > 0 && !dsacks_detect(fl))
        return true; /* other holes may be real: send new data, and nothing again, until their ACKs have come */
    undo(s, c, fl, a->sm);
    fl->dupacks = 0;
    settle(c, fl);
    return true;
}

/* RFC 6675 5 (A) to (C), with RACK's losses; without SACK RFC 6582 3.2. What leaves, tcp_output() decides. */
static void in_recovery(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, const struct ack *a)
{
    if (seq_geq(c->snd_una, fl->recover)) {
        finish(s, c, fl, a);
        return;
    }
    if (undo_in_recovery(s, c, fl, a))
        return;
    if (with_sack(c)) {
        (void)find_losses(s, c, fl);
    } else if (a->sm->acked > 0) { /* RFC 6582 3.2 step 3, partial: the next hole starts at snd_una */
        STAT(s, tcp_partial_acks);
        resend_head(s, c);
    } else if (a->duplicate) {
        count_duplicate(c, fl, a->sm);
    }
}

/* RFC 5682 2.1 and 3.1, steps 2 and 3: after the timeout's one retransmission new data goes first; what its ACKs say
 * decides. true: the timeout was spurious. */
static bool frto_detects(struct tcp_conn *c, struct tcp_flight *fl, const struct ack *a)
{
    const struct tcp_sample *sm = a->sm;
    /* without SACK an ACK that covers a retransmission tells nothing about what lies behind it */
    if (sm->original && (with_sack(c) || !sm->resent))
        return true;
    if (seq_gt(c->snd_nxt, fl->recover)) { /* step 3: new data is out */
        if (sm->sacked > 0 || a->duplicate)
            fl->frto = FRTO_OFF;                                   /* 3.a: it arrived behind a hole */
    } else if (sm->acked > 0 && seq_lt(c->snd_una, fl->recover)) { /* step 2.b */
        fl->recover = c->snd_nxt;
        fl->frto = FRTO_SEND;
    }
    return false;
}

/* After a timeout slow start, unless it turns out to be a mistake. */
static void in_loss(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, const struct ack *a)
{
    bool late = fl->undo && a->sm->acked > 0 && eifel_detects(c, fl, a->g);
    bool recovered = seq_geq(c->snd_una, fl->recover);
    bool spurious = late || (fl->undo && dsacks_detect(fl)) || (fl->frto != FRTO_OFF && frto_detects(c, fl, a));
    if (spurious && !recovered) {
        undo(s, c, fl, a->sm);
        settle(c, fl);
        return;
    }
    if (spurious)
        undo(s, c, fl, a->sm);
    if (recovered) {
        finish(s, c, fl, a);
        return;
    }
    if (fl->frto == FRTO_WAIT)
        fl->frto = FRTO_ON;
    if (with_sack(c))
        (void)find_losses(s, c, fl);
    else if (a->sm->acked > 0)
        fl->dupacks = 0;
    else if (a->duplicate && seq_gt(c->snd_nxt, fl->recover))
        count_duplicate(c, fl, a->sm);
}

/* ---- Entry -------------------------------------------------------------------------------------------------------- */
/* A frame goes out again. */
void tcp_recover_resent(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p)
{
    struct tcp_flight *fl = conn_flight(s, c);
    tcp_sack_mark_resent(s, c, p);
    fl->prr_out += pkt_meta(s, p)->data_len;
    if (fl->undo)
        fl->undo_rtx = fl->undo_rtx == UNDO_NONE_SENT ? 1 : fl->undo_rtx + 1;
    if (!fl->rtx_stamped) { /* RFC 3522 3.2 step 1 */
        fl->rtx_stamped = true;
        fl->rtx_ts = tcp_ts_now(s, c);
    }
}

/* RFC 8985 7.4.2: the probe repaired a loss that no other ACK told of. The window has to know. */
static void tail_was_lost(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, struct tcp_sample *sm)
{
    STAT(s, tcp_loss_probe_repairs);
    if (fl->ca_state >= CA_CWR)
        return;
    fl->undo = false;
    reduction_begin(s, c, fl, sm, CC_EV_LOSS);
    set_state(c, fl, CA_CWR);
    reduction_end(s, c, fl, sm);
    settle(c, fl);
}

static void set_timer(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, const struct tcp_sample *sm)
{
    if (c->snd_una.v == c->snd_nxt.v)
        return;
    if (sm->acked > 0)
        tcp_rtx_restart(s, c); /* RFC 6298 5.3 */
    if (fl->reorder_at != NO_DEADLINE)
        tcp_rtx_reorder(s, c, fl->reorder_at);
}

/* The peer has acknowledged up to a frame that it had SACKed, but not the frame: it must have thrown it away
 * (RFC 2018 8), and then a timeout forgets all that it SACKed. A little patience, since ACKs may have changed places. */
static bool reneges(struct bypass_stack *s, struct tcp_conn *c, const struct tcp_sample *sm)
{
    if (sm->acked == 0 || !tcp_sack_reneged(s, c))
        return false;
    tcp_rtx_early(s, c, max_u32(c->srtt_us / 2, RENEGED_US));
    return true;
}

void tcp_recover_ack(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, struct tcp_sample *sm,
                     uint32_t frames, bool duplicate)
{
    struct tcp_flight *fl = conn_flight(s, c);
    const struct ack a = {.g = g, .sm = sm, .duplicate = duplicate};
    const uint64_t lost = fl->lost;
    fl->reorder_at = NO_DEADLINE;
    if (unlikely(reneges(s, c, sm)))
        return;
    if (!with_sack(c) && sm->acked > 0)
        uncount_duplicates(c, fl, sm, frames);
    if (sm->dsack)
        tcp_rack_dsack_round(c, fl);
    if (unlikely(fl->tlp_out) && tcp_tlp_ack(fl, g, sm, duplicate))
        tail_was_lost(s, c, fl, sm);
    if (fl->ca_state == CA_RECOVERY)
        in_recovery(s, c, fl, &a);
    else if (fl->ca_state == CA_LOSS)
        in_loss(s, c, fl, &a);
    else
        watch(s, c, fl, &a);
    sm->lost = (uint32_t)fl->lost - fl->lost_told;
    fl->lost_told = (uint32_t)fl->lost;
    if (fl->ca_state == CA_RECOVERY || fl->ca_state == CA_CWR)
        proportional_reduction(s, c, fl, sm, sm->acked > 0 && fl->lost == lost);
    set_timer(s, c, fl, sm);
}

/* RTX_REORDER (RFC 8985 6.2 step 5): what was waited for has not come. */
void tcp_recover_reorder_due(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_flight *fl = conn_flight(s, c);
    if (find_losses(s, c, fl) && fl->ca_state < CA_RECOVERY && !tcp_pmtu_probe_lost(s, c)) {
        const struct tcp_sample one = {.delivered = 1};
        enter_recovery(s, c, fl, &one);
        proportional_reduction(s, c, fl, &one, false);
    }
    tcp_rtx_rearm_rto(s, c);
    if (fl->reorder_at != NO_DEADLINE)
        tcp_rtx_reorder(s, c, fl->reorder_at);
}
