/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_tw.c - TIME_WAIT (RFC 9293 3.6.1): a list of them in order of time, its bound, and who may take a place before the
 * minute is over: a newer SYN of the same flow, a connect() to the same peer when timestamps tell old segments from new
 * ones (RFC 6191), and anybody when the pool is empty.
 */
#include "tcp.h"

void tcp_tw_unlink(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp *t = tcp_head(s);
    struct tcp_cold *k = conn_cold(s, c);
    *(k->tw_prev != NO_INDEX ? &cold_at(s, k->tw_prev)->tw_next : &t->tw_head) = k->tw_next;
    *(k->tw_next != NO_INDEX ? &cold_at(s, k->tw_next)->tw_prev : &t->tw_tail) = k->tw_prev;
    t->tw_count--;
}

uint32_t tcp_tw_oldest(const struct bypass_stack *s)
{
    uint32_t i = tcp_head(s)->tw_head;
    while (i != NO_INDEX && conn_at(s, i)->sock != NO_INDEX)
        i = cold_at(s, i)->tw_next;
    return i;
}

bool tcp_tw_drop_oldest(struct bypass_stack *s)
{
    uint32_t i = tcp_tw_oldest(s);
    if (i == NO_INDEX)
        return false;
    conn_drop(s, conn_at(s, i), 0);
    return true;
}

void conn_time_wait(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp *t = tcp_head(s);
    struct tcp_cold *k = conn_cold(s, c);
    uint32_t self = conn_index(s, c);
    STAT(s, tcp_time_wait);
    if (t->tw_count >= core(s)->cfg.max_time_wait &&
        tcp_tw_drop_oldest(s)) /* it has waited longest, so needs it least */
        STAT(s, tcp_time_wait_overflow);
    tcp_snd_clear(s, c);
    c->state = BYPASS_TIME_WAIT;
    k->tw_prev = t->tw_tail;
    k->tw_next = NO_INDEX;
    *(t->tw_tail != NO_INDEX ? &cold_at(s, t->tw_tail)->tw_next : &t->tw_head) = self;
    t->tw_tail = self;
    t->tw_count++;
    c->keep_at = 0;
    c->rtx_at = now_ns(s) + TIME_WAIT_S * SEC_NS;
    tcp_timer_update(s, c);
    conn_event(s, c, BYPASS_HUP);
}

/* RFC 9293 3.6.1, RFC 6191: a new SYN may replace a connection in TIME_WAIT when it is certainly newer. */
bool tcp_tw_replaced_by(const struct tcp_conn *c, const struct segment *g)
{
    if (c->state != BYPASS_TIME_WAIT || (g->flags & (TCP_SYN | TCP_ACK | TCP_RST)) != TCP_SYN)
        return false;
    if ((c->flags & TF_TS) && g->opt.has_ts)
        return (int32_t)(g->opt.ts_val - c->ts_recent) > 0 ||
               (g->opt.ts_val == c->ts_recent && seq_gt(g->seq, c->rcv_nxt));
    return seq_gt(g->seq, c->rcv_nxt);
}

/* More than a second after the peer's last word our clock of timestamps has moved on for sure. */
bool tcp_tw_reusable(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return c->state == BYPASS_TIME_WAIT && c->sock == NO_INDEX && (c->flags & TF_TS) && core(s)->cfg.tw_reuse &&
           conn_now_ms(s) - c->ts_recent_ms > 1000;
}

void tcp_tw_reuse(struct bypass_stack *s, struct tcp_conn *c)
{
    STAT(s, tcp_time_wait_reused);
    conn_drop(s, c, 0);
}
