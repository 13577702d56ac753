/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_rate.c - how fast data was delivered (draft-cheng-iccrg-delivery-rate-estimation). Each frame remembers what had
 * been delivered, and when, as it was sent; the ACK that delivers it gives a rate, over the longer of the time that
 * sending took and the time that the ACKs took. A sample from while the program wrote too little to fill the path is
 * marked so: it tells about the program.
 *
 * Times are ticks of 1024 ns and counts 32 bits in the frames (struct bypass_pkt_meta: entry, rule, hash, which mean
 * something else in received frames only).
 */
#include "tcp.h"

/* 3.2: before the frame's own bytes count as sent. */
void tcp_rate_sent(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p)
{
    struct tcp_flight *fl = conn_flight(s, c);
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    if (c->snd_nxt.v == c->snd_una.v)
        fl->first_tx_at = fl->delivered_at = tcp_rate_tick(now_ns(s));
    m->entry = (uint32_t)fl->delivered;
    m->rule = fl->delivered_at;
    m->hash = fl->first_tx_at;
    m->seg_flags = (uint16_t)((m->seg_flags & ~SEG_APP_LIMITED) | (fl->app_limited ? SEG_APP_LIMITED : 0));
}

/* 3.3: of all that this ACK delivered, the frame that was sent last. */
void tcp_rate_delivered(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, struct tcp_sample *sm)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    uint32_t tx_at = tcp_rate_tick(m->time_ns);
    if (sm->prior && (int32_t)(tx_at - sm->tx_at) < 0)
        return;
    sm->prior = true;
    sm->tx_at = tx_at;
    sm->prior_entry = m->entry;
    sm->prior_at = m->rule;
    sm->first_tx_at = m->hash;
    sm->rtx = m->seg_flags & SEG_RTX;
    sm->app_limited = m->seg_flags & SEG_APP_LIMITED;
    conn_flight(s, c)->first_tx_at = tx_at;
}

void tcp_rate_done(struct bypass_stack *s, struct tcp_conn *c, struct tcp_sample *sm)
{
    struct tcp_flight *fl = conn_flight(s, c);
    if (sm->delivered == 0)
        return;
    fl->delivered += sm->delivered;
    fl->delivered_at = tcp_rate_tick(now_ns(s));
    if (fl->app_limited && fl->delivered > fl->app_limited)
        fl->app_limited = 0; /* the bubble has left the path */
    if (!sm->prior)
        return;
    sm->rate_bytes = (uint32_t)fl->delivered - sm->prior_entry;
    sm->prior_delivered = fl->delivered - sm->rate_bytes;
    uint32_t ticks = max_u32(sm->tx_at - sm->first_tx_at, fl->delivered_at - sm->prior_at);
    uint32_t us = (uint32_t)((uint64_t)ticks * 1024 / 1000);
    /* less than a round trip: an ACK of the first of two transmissions, or compressed ACKs */
    if (us == 0 || (c->min_rtt_us != UINT32_MAX && us + 1 < c->min_rtt_us))
        return;
    sm->interval_us = us;
    if (!sm->app_limited || sm->rate_bytes * fl->rate_us >= (uint64_t)fl->rate_bytes * us) {
        fl->rate_bytes = (uint32_t)min_u64(sm->rate_bytes, UINT32_MAX);
        fl->rate_us = us;
    }
}

/* 3.4, before the program's bytes are queued: less than a segment waits to be sent, nothing to be sent again, and more
 * could have been in flight. Where half of the send buffer is in flight it is the buffer that limits, as steadily as a
 * path does; a program that waits for room in it would be called idle for ever. */
void tcp_rate_gap(struct bypass_stack *s, struct tcp_conn *c)
{
    uint32_t unsent = c->snd_queued - (c->snd_nxt.v - c->snd_una.v);
    if (unsent >= c->snd_mss || c->lost_bytes > 0 || c->snd_queued >= c->sndbuf / 2)
        return;
    struct tcp_flight *fl = conn_flight(s, c);
    uint32_t pipe = tcp_pipe(s, c);
    if (pipe < c->cwnd)
        fl->app_limited = max_u64(fl->delivered + pipe, 1);
}

uint64_t tcp_rate(const struct bypass_stack *s, const struct tcp_conn *c)
{
    if (!has_flight(c) || conn_flight(s, c)->rate_us == 0)
        return 0;
    const struct tcp_flight *fl = conn_flight(s, c);
    return (uint64_t)fl->rate_bytes * 1000000 / fl->rate_us;
}
