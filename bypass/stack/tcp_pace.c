/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_pace.c - pacing: segments leave at flight.pace_rate in place of in bursts. flight.pace_at is the time at which
 * the next one is due; sending one moves it on by what its bytes take at that rate. The timer wheel runs up to a tick
 * (1 ms) late, and then as much goes at once as that time was worth, so that the rate is kept on average; a pause of
 * the program saves up no more than that.
 */
#include "tcp.h"

enum { SAVED_NS = 3 << (WHEEL_TICK_SHIFT - 1) }; /* one and a half ticks */

bool tcp_pace_held(struct bypass_stack *s, struct tcp_conn *c)
{
    const struct tcp_flight *fl = conn_flight(s, c);
    if (fl->pace_at <= now_ns(s)) {
        c->feat &= ~(uint32_t)TX_PACE_WAIT;
        return false;
    }
    c->feat |= TX_PACE_WAIT;
    if (!wheel_covers(&c->timer, fl->pace_at))
        tcp_timer_update(s, c);
    return true;
}

/* Bytes a second; 0: at once. What the congestion control says; without a word of it, a little more than a window in
 * a round trip, or two in slow start, as Linux does when only a limit asks for pacing. */
static uint64_t pace_rate(const struct bypass_stack *s, const struct tcp_conn *c)
{
    const struct tcp_flight *fl = conn_flight(s, c);
    uint64_t most = tcp_pace_limit(&conn_cold(s, c)->opt), rate = fl->pace_rate;
    if (rate == 0 && c->srtt_us != 0)
        rate = (uint64_t)c->cwnd * 10000 * (c->cwnd < c->ssthresh / 2 ? 200 : 120) / c->srtt_us;
    return most != 0 && (rate == 0 || rate > most) ? most : rate;
}

/* The flight record begins, or another congestion control, or another limit. */
void tcp_pace_begin(struct bypass_stack *s, struct tcp_conn *c, bool wanted)
{
    struct tcp_flight *fl = conn_flight(s, c);
    bool limited = conn_cold(s, c)->opt.max_pacing != 0;
    fl->keep = (uint8_t)(limited ? fl->keep | FK_PACE : fl->keep & ~FK_PACE); /* a pause must not forgive a debt */
    c->feat = wanted || limited ? c->feat | TX_PACED : c->feat & ~(uint32_t)TX_PACED;
}

void tcp_pace_spend(struct bypass_stack *s, struct tcp_conn *c, uint32_t bytes)
{
    struct tcp_flight *fl = conn_flight(s, c);
    uint64_t rate = pace_rate(s, c);
    bool first_window = conn_cold(s, c)->data_segs_out < 10 && rate != tcp_pace_limit(&conn_cold(s, c)->opt);
    if (rate == 0 || first_window) /* RFC 6928 2 allows it at once, and a short transfer gains half a round trip */
        return;
    uint64_t saved = now_ns(s) > SAVED_NS ? now_ns(s) - SAVED_NS : 0;
    fl->pace_at = max_u64(fl->pace_at, saved) + bytes * SEC_NS / rate;
}

uint64_t tcp_pace_deadline(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return c->feat & TX_PACE_WAIT && has_flight(c) ? conn_flight(s, c)->pace_at : NO_DEADLINE;
}

/* Its time has come. */
void tcp_pace_due(struct bypass_stack *s, struct tcp_conn *c)
{
    if (tcp_pace_deadline(s, c) > now_ns(s))
        return;
    c->feat &= ~(uint32_t)TX_PACE_WAIT;
    tcp_output(s, c);
}
