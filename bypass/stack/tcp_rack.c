/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_rack.c - RACK-TLP (RFC 8985): losses by time. A frame is lost when one that was sent later has arrived and
 * a reordering window has passed; at the tail, where nothing is sent later, a probe draws the ACK that tells.
 * Read section 6.2 beside the first half, section 7 beside the second.
 *
 * Frames carry the time of their last transmission in meta.time_ns. Those that were sent once stand in the send
 * queue in the order of sending, those that were sent again in flight.resent in theirs, so that step 5 looks at
 * no frame that it looked at before, except at the one that it stopped at.
 */
#include "tcp.h"

enum {
    DUP_THRESH = 3,            /* 6.2 step 4 */
    REO_PERSIST = 16,          /* recoveries for which a widened window stays */
    TLP_INIT_US = 1000000,     /* 7.2: no round trip is known yet */
    TLP_ACK_DELAY_US = 200000, /* 7.2: the longest that a peer delays an ACK, as Linux takes it */
    TLP_SLACK_US = 2000,       /* a clock tick of either end */
};

/* ---- What was delivered (6.2 steps 1 to 3) ------------------------------------------------------------------ */
static bool sent_after(uint64_t at1, seq_t end1, uint64_t at2, seq_t end2)
{
    return at1 > at2 || (at1 == at2 && seq_gt(end1, end2));
}

static seq_t frame_end(const struct bypass_pkt_meta *m) { return seq_add(seq(m->seq), m->data_len); }

/* The ACK may answer an earlier transmission (6.2 step 2): it echoes an older timestamp, or came too soon. */
static bool answers_original(const struct bypass_stack *s, const struct tcp_conn *c, const struct bypass_pkt_meta *m,
                             const struct segment *g, uint64_t rtt_us)
{
    uint32_t sent_ms = (uint32_t)(m->time_ns / MSEC_NS) + conn_cold(s, c)->ts_offset;
    if ((c->flags & TF_TS) && g->opt.has_ts && (int32_t)(g->opt.ts_ecr - sent_ms) < 0)
        return true;
    return c->min_rtt_us != UINT32_MAX && rtt_us < c->min_rtt_us;
}

/* A frame was acknowledged or SACKed for the first time. */
void tcp_rack_delivered(struct bypass_stack *s, struct tcp_conn *c, const struct bypass_pkt_meta *m,
                        const struct segment *g, struct tcp_sample *sm)
{
    struct tcp_flight *fl = conn_flight(s, c);
    uint64_t rtt_us = tcp_frame_age_us(s, m);
    seq_t end = frame_end(m);
    bool again = m->seg_flags & SEG_RTX;
    if (!again && seq_lt(end, sm->prior_fack) && fl->ca_state != CA_OPEN && !fl->reordering) { /* step 3 */
        fl->reordering = true;
        fl->keep |= FK_RACK;
        STAT(s, tcp_reordered);
    }
    if (seq_gt(end, fl->fack))
        fl->fack = end;
    if (!again && seq_leq(end, fl->recover))
        sm->original = true;
    if (again && answers_original(s, c, m, g, rtt_us))
        return;
    fl->rack_rtt_us = (uint32_t)min_u64(rtt_us, RTO_MAX_US);
    if (sent_after(m->time_ns, end, fl->rack_xmit_ns, fl->rack_end)) {
        fl->rack_xmit_ns = m->time_ns;
        fl->rack_end = end;
    }
}

/* ---- The reordering window (6.2 step 4) -------------------------------------------------------------------- */
/* It grows by a quarter of the smallest round trip in each round in which a D-SACK says that something was sent
 * again needlessly. */
void tcp_rack_dsack_round(struct tcp_conn *c, struct tcp_flight *fl)
{
    if (fl->in_dsack_round && seq_lt(c->snd_una, fl->dsack_round))
        return;
    fl->in_dsack_round = true;
    fl->dsack_round = c->snd_nxt;
    fl->reo_persist = REO_PERSIST;
    if (fl->reo_mult < UINT8_MAX)
        fl->reo_mult++;
    fl->keep |= FK_RACK;
}

/* A recovery ended. */
void tcp_rack_recovered(struct tcp_flight *fl)
{
    if (fl->reo_persist > 0 && --fl->reo_persist == 0)
        fl->reo_mult = 1;
}

static uint32_t reorder_window_us(const struct tcp_conn *c, const struct tcp_flight *fl)
{
    if (!fl->reordering && (fl->ca_state >= CA_RECOVERY || fl->sacked_frames >= DUP_THRESH))
        return 0;
    uint64_t quarter = min_u32(c->min_rtt_us, c->srtt_us) / 4;
    return (uint32_t)min_u64(fl->reo_mult * quarter, c->srtt_us);
}

/* ---- Losses (6.2 step 5) ------------------------------------------------------------------------------------- */
static uint64_t overdue_at_ns(const struct tcp_conn *c, const struct tcp_flight *fl, const struct bypass_pkt_meta *m)
{
    return m->time_ns + 1000ull * fl->rack_rtt_us + 1000ull * reorder_window_us(c, fl);
}

bool tcp_rack_overdue(const struct bypass_stack *s, const struct tcp_conn *c, const struct bypass_pkt_meta *m)
{
    return overdue_at_ns(c, conn_flight(s, c), m) <= now_ns(s);
}

/* Marks p when it is lost. *at: lowered to the time at which it will be. false: neither it nor what was sent after it
 * is lost now. */
static bool judge(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, bypass_pkt p, uint64_t *at)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    if (!sent_after(fl->rack_xmit_ns, fl->rack_end, m->time_ns, frame_end(m)))
        return false;
    uint64_t due = overdue_at_ns(c, fl, m);
    if (due > now_ns(s)) {
        *at = min_u64(*at, due);
        return false;
    }
    tcp_sack_mark_lost(s, c, p);
    return true;
}

/* Marks what is lost. Returns when the next frame will be unless its ACK comes, or NO_DEADLINE. */
uint64_t tcp_rack_detect(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_flight *fl = conn_flight(s, c);
    uint64_t at = NO_DEADLINE;
    bypass_pkt p = tcp_hint_ok(c, &fl->cursor) ? pkt_meta(s, fl->cursor.pkt)->next : c->sndq_head;
    while (p != BYPASS_PKT_NONE && p != c->sndq_next) {
        const struct bypass_pkt_meta *m = pkt_meta(s, p);
        if (!(m->seg_flags & (SEG_SACKED | SEG_LOST | SEG_RTX)) && !judge(s, c, fl, p, &at))
            break;
        fl->cursor = (struct sack_hint){p, seq(m->seq)};
        p = m->next;
    }
    while (fl->resent_list.head != BYPASS_PKT_NONE && judge(s, c, fl, fl->resent_list.head, &at))
        ;
    return at;
}

/* ---- Tail loss probe (7) --------------------------------------------------------------------------------------- */
/* 7.2: microseconds from now until the probe of what is in flight. */
uint64_t tcp_tlp_timeout_us(const struct tcp_conn *c)
{
    if (unlikely(c->srtt_us == 0))
        return TLP_INIT_US;
    bool one = c->snd_nxt.v - c->snd_una.v <= c->snd_mss;
    return 2ull * c->srtt_us + (one ? TLP_ACK_DELAY_US : TLP_SLACK_US);
}

void tcp_tlp_end(struct tcp_flight *fl)
{
    fl->tlp_out = false;
    fl->keep &= (uint8_t)~FK_PROBE;
}

/* 7.3: the probe timer has expired. */
void tcp_tlp_due(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_flight *fl = conn_flight(s, c);
    if ((fl->ca_state == CA_OPEN || fl->ca_state == CA_CWR) && fl->sacked_frames == 0 && !fl->tlp_out) {
        enum tcp_probe sent = tcp_output_tail_probe(s, c);
        if (sent != PROBE_NONE) {
            fl->tlp_out = true;
            fl->keep |= FK_PROBE; /* its answer may come when nothing is in flight any more */
            fl->tlp_rtx = sent == PROBE_RTX;
            fl->tlp_end = c->snd_nxt;
            STAT(s, tcp_out_loss_probes);
        }
    }
    tcp_rtx_arm_rto(s, c);
}

/* 7.4: does the ACK end the probe's episode? Something was lost, and the probe has repaired it, when the ACK covers
 * a probe that was a retransmission and neither a D-SACK nor a second, duplicate ACK tells that the original came as
 * well. true: so it is, and congestion control has to be told. */
bool tcp_tlp_ack(struct tcp_flight *fl, const struct segment *g, const struct tcp_sample *sm, bool duplicate)
{
    if (!fl->tlp_out || seq_lt(g->ack, fl->tlp_end))
        return false;
    bool lost = fl->tlp_rtx && !sm->dsack_tlp && seq_gt(g->ack, fl->tlp_end);
    if (!fl->tlp_rtx || sm->dsack_tlp || lost || (duplicate && sm->sacked == 0))
        tcp_tlp_end(fl);
    return lost;
}
