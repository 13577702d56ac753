/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_cc.c - congestion control: algorithms are tables of functions reached by index, so that no other file names
 * one. Here: the registry, the view of a connection that they get, and when which of their functions is called. What
 * is lost and when to send it again is recovery's.
 *
 * Names are the arena's, pointers the process's (struct bypass_stack): index i of conn.cc means the same algorithm in
 * every process, and one that this process does not know leaves the window alone.
 */
#include <errno.h>

#include "tcp.h"
#include "tcp_cc.h"

enum { CWND_MAX = 1u << 30 };

/* ---- Registry ------------------------------------------------------------------------------------------- */
static const struct bypass_cc_ops *const builtin[] = {&tcp_cubic, &tcp_reno, &tcp_dctcp, &tcp_bbr};
enum { BUILTINS = ARRAY_LEN(builtin) };
static_assert((int)BUILTINS == (int)TCP_CC_BUILTINS, "tcp_cc.h says how many there are");

const char *tcp_cc_builtin(uint32_t i) { return i < BUILTINS ? builtin[i]->name : NULL; }

static const struct bypass_cc_ops *ops_at(const struct bypass_stack *s, uint32_t i)
{
    static const struct bypass_cc_ops unknown = {.name = "?"};
    if (likely(i < BUILTINS))
        return builtin[i];
    const struct bypass_cc_ops *ops = s->cc[i - BUILTINS];
    return ops ? ops : &unknown;
}

static const struct bypass_cc_ops *cc_ops(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return ops_at(s, c->cc);
}

const char *bypass_cc_name(const struct bypass_stack *s, int i)
{
    const struct tcp *t = tcp_head(s);
    if (i < 0 || i >= (int)(BUILTINS + t->cc_count))
        return NULL;
    return i < (int)BUILTINS ? builtin[i]->name : t->cc_names[i - (int)BUILTINS];
}

static int cc_find(const struct bypass_stack *s, const char *name)
{
    const char *have;
    for (int i = 0; (have = bypass_cc_name(s, i)) != NULL; i++)
        if (strcmp(have, name) == 0)
            return i;
    return -ENOENT;
}

int bypass_cc_register(struct bypass_stack *s, const struct bypass_cc_ops *ops)
{
    struct tcp *t = tcp_head(s);
    if (!ops->name || ops->name[0] == 0 || strlen(ops->name) >= BYPASS_CC_NAME)
        return -EINVAL;
    int i = cc_find(s, ops->name);
    if (i >= 0 && (i < (int)BUILTINS || s->cc[i - (int)BUILTINS]))
        return -EEXIST;
    if (i < 0) {
        if (s->attached)
            return -EINVAL;
        if (t->cc_count == BYPASS_CC_MAX)
            return -ENOSPC;
        memcpy(t->cc_names[t->cc_count], ops->name, strlen(ops->name) + 1);
        i = (int)(BUILTINS + t->cc_count++);
    }
    s->cc[i - (int)BUILTINS] = ops;
    return 0;
}

bool tcp_cc_complete(const struct bypass_stack *s)
{
    for (uint32_t i = 0; i < tcp_head(s)->cc_count; i++)
        if (!s->cc[i])
            return false;
    return true;
}

const struct bypass_cc_ops *bypass_cc_table(const struct bypass_stack *s, const char *name)
{
    int i = cc_find(s, name);
    return i < 0 || (i >= (int)BUILTINS && !s->cc[i - (int)BUILTINS]) ? NULL : ops_at(s, (uint32_t)i);
}

int bypass_cc_default(struct bypass_stack *s, const char *name)
{
    int i = cc_find(s, name);
    if (i < 0)
        return i;
    tcp_head(s)->cc_default = (uint8_t)i;
    return 0;
}

/* ---- The view ------------------------------------------------------------------------------------------- */
static struct bypass_cc view(const struct bypass_stack *s, const struct tcp_conn *c, struct tcp_flight *fl)
{
    return (struct bypass_cc){
        .state = fl->cc_state,
        .pacing_rate = fl->pace_rate,
        .cwnd = c->cwnd,
        .ssthresh = c->ssthresh,
        .mss = c->snd_mss,
        .srtt_us = c->srtt_us,
        .min_rtt_us = c->min_rtt_us,
        .in_flight = tcp_pipe(s, c),
        .flight_size = c->snd_nxt.v - c->snd_una.v,
        .ca_state = fl->ca_state,
        .snd_una = c->snd_una.v,
        .snd_nxt = c->snd_nxt.v,
        .now_us = now_ns(s) / 1000,
    };
}

/* Takes what the algorithm changed. */
static void view_store(struct tcp_conn *c, struct tcp_flight *fl, const struct bypass_cc *v, bool window)
{
    if (window) {
        c->cwnd = max_u32(min_u32(v->cwnd, CWND_MAX), c->snd_mss);
        c->ssthresh = v->ssthresh;
    }
    fl->pace_rate = v->pacing_rate;
}

/* ---- The window is used, or not (RFC 2861) ----------------------------------------------------------------- */
uint32_t tcp_initial_window(const struct tcp_conn *c)
{
    uint32_t mss = c->snd_mss;
    return min_u32(10 * mss, max_u32(2 * mss, 14600)); /* RFC 6928 2 */
}

bool tcp_cc_own_window(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return cc_ops(s, c)->flags & BYPASS_CC_OWN_WINDOW;
}

/* What was used of a window tells for how much of it the network was asked. It was asked for all of it now. */
static void window_used(const struct bypass_stack *s, struct tcp_flight *fl)
{
    fl->validated_ms = conn_now_ms(s);
    fl->used_since = 0;
}

/* 3.1, 3.2: it shrinks, and slow start may bring back most of it. */
static void window_decays(struct tcp_conn *c, uint32_t to)
{
    if (to >= c->cwnd)
        return;
    if (c->ssthresh != UINT32_MAX)
        c->ssthresh = max_u32(c->ssthresh, c->cwnd - c->cwnd / 4);
    c->cwnd = to;
}

/* The most that was in flight in this round trip. */
void tcp_cc_sent(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_flight *fl = conn_flight(s, c);
    uint32_t flight = c->snd_nxt.v - c->snd_una.v;
    if (flight > fl->used_most || seq_geq(c->snd_una, fl->used_end)) {
        fl->used_most = flight;
        fl->used_end = c->snd_nxt;
        fl->used_since = max_u32(fl->used_since, flight);
    }
}

/* Would a larger window have been used? In slow start, where it doubles, half of it is enough. */
static bool window_limits(const struct tcp_conn *c, const struct tcp_flight *fl)
{
    return fl->used_most + c->snd_mss > c->cwnd || (c->cwnd < c->ssthresh && c->cwnd < 2 * fl->used_most);
}

/* 3.2: not for as long as a timeout: half of what was not used goes. */
static void window_unused(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl)
{
    if (conn_now_ms(s) - fl->validated_ms < c->rto_us / 1000)
        return;
    uint32_t used = max_u32(fl->used_since, tcp_initial_window(c));
    if (!tcp_cc_own_window(s, c) && !core(s)->cfg.keep_idle_window && used < c->cwnd)
        window_decays(c, used + (c->cwnd - used) / 2);
    window_used(s, fl);
}

/* RFC 5681 4.1, 3.1: after a pause the window says less and less about the network. It is halved for each timeout that
 * the pause lasted, down to what a new connection has. */
void tcp_cc_restart(struct bypass_stack *s, struct tcp_conn *c, uint64_t idle_ns)
{
    uint64_t rtos = idle_ns / (c->rto_us * 1000ull);
    if (!tcp_cc_own_window(s, c) && !core(s)->cfg.keep_idle_window)
        window_decays(c, max_u32(rtos > 31 ? 0 : c->cwnd >> rtos, tcp_initial_window(c)));
}

/* ---- A connection's life --------------------------------------------------------------------------------- */
bool tcp_cc_exact_ecn(const struct bypass_stack *s, uint8_t cc) { return ops_at(s, cc)->flags & BYPASS_CC_EXACT_ECN; }

/* What the short ways ask about, in one word. Lazy: no flag, so it is told of ACKs only when the window limits, keeps
 * nothing, and is not paced. */
static void note_kind(const struct bypass_stack *s, struct tcp_conn *c)
{
    c->feat &= ~(uint32_t)(TX_ECN_EXACT | TX_CC_LAZY);
    if (tcp_cc_exact_ecn(s, c->cc))
        c->feat |= TX_ECN_EXACT;
    if (cc_ops(s, c)->flags == 0)
        c->feat |= TX_CC_LAZY;
}

void tcp_cc_init(struct bypass_stack *s, struct tcp_conn *c)
{
    note_kind(s, c);
    c->cwnd = tcp_initial_window(c);
    c->ssthresh = UINT32_MAX;
}

void tcp_cc_begin(struct bypass_stack *s, struct tcp_conn *c)
{
    const struct bypass_cc_ops *ops = cc_ops(s, c);
    struct tcp_flight *fl = conn_flight(s, c);
    fl->app_limited = 1; /* until the program has filled the window once */
    window_used(s, fl);
    if (ops->flags & BYPASS_CC_KEEP)
        fl->keep |= FK_CC;
    tcp_pace_begin(s, c, ops->flags & BYPASS_CC_PACED);
    if (!ops->init)
        return;
    struct bypass_cc v = view(s, c, fl);
    v.random = (uint32_t)core_random(s);
    ops->init(&v);
    view_store(c, fl, &v, true);
}

void tcp_cc_repace(struct bypass_stack *s, struct tcp_conn *c)
{
    if (has_flight(c))
        tcp_pace_begin(s, c, cc_ops(s, c)->flags & BYPASS_CC_PACED);
    else if (conn_cold(s, c)->opt.max_pacing != 0)
        c->feat |= TX_PACED; /* the short way out does not look at rates */
    tcp_output(s, c);
}

/* Something is sent after nothing was in flight, and the record of before is still there. */
void tcp_cc_resume(struct bypass_stack *s, struct tcp_conn *c)
{
    conn_flight(s, c)->paused = 1;
    window_used(s, conn_flight(s, c));
    if (cc_ops(s, c)->flags & BYPASS_CC_KEEP)
        tcp_cc_event(s, c, CC_EV_RESTART);
}

static bool window_is_recoverys(const struct tcp_flight *fl, const struct bypass_cc_ops *ops)
{
    return (fl->ca_state == CA_RECOVERY || fl->ca_state == CA_CWR) && !(ops->flags & BYPASS_CC_OWN_WINDOW);
}

static void call_acked(struct bypass_stack *s, struct tcp_conn *c, const struct tcp_sample *sm, bool limited)
{
    const struct bypass_cc_ops *ops = cc_ops(s, c);
    struct tcp_flight *fl = conn_flight(s, c);
    struct bypass_cc v = view(s, c, fl);
    v.limited = limited;
    v.paused = fl->paused;
    fl->paused = 0;
    const struct bypass_cc_sample told = {
        .delivered_all = fl->delivered,
        .prior_delivered = sm->prior_delivered,
        .rate_bytes = sm->rate_bytes,
        .rtt_us = sm->rtt_us,
        .interval_us = sm->interval_us,
        .acked = sm->acked,
        .delivered = sm->delivered,
        .lost = sm->lost,
        .prior_in_flight = sm->flight,
        .ece = sm->ece,
        .app_limited = sm->app_limited,
    };
    ops->acked(&v, &told);
    view_store(c, fl, &v, !window_is_recoverys(fl, ops));
    if (v.held_back)
        fl->app_limited = max_u64(fl->delivered + tcp_pipe(s, c), 1);
}

void tcp_cc_acked(struct bypass_stack *s, struct tcp_conn *c, const struct tcp_sample *sm)
{
    const struct bypass_cc_ops *ops = cc_ops(s, c);
    struct tcp_flight *fl = conn_flight(s, c);
    bool limited = window_limits(c, fl);
    if (limited || fl->ca_state != CA_OPEN)
        window_used(s, fl);
    else
        window_unused(s, c, fl);
    if (!(ops->flags & BYPASS_CC_EVERY_ACK)) {
        bool slow_start = fl->ca_state == CA_LOSS;
        if (!limited && !slow_start) {
            fl->paused = 1;
            return;
        }
        if (sm->acked == 0 || window_is_recoverys(fl, ops))
            return;
    }
    if (ops->acked)
        call_acked(s, c, sm, limited);
}

void tcp_cc_event(struct bypass_stack *s, struct tcp_conn *c, enum tcp_cc_ev ev)
{
    const struct bypass_cc_ops *ops = cc_ops(s, c);
    struct tcp_flight *fl = conn_flight(s, c);
    struct bypass_cc v = view(s, c, fl);
    if (ev <= CC_EV_ECN) {
        /* what limited transmit sent beyond cwnd does not count (RFC 5681 3.2 step 2) */
        if (ev == CC_EV_ECN) /* the ACK that told is taken off already */
            v.flight_size = max_u32(v.flight_size, fl->used_most);
        if (ev != CC_EV_RTO)
            v.flight_size = min_u32(v.flight_size, v.cwnd);
        if (c->feat & TX_ECN)
            c->feat |= TX_CWR; /* RFC 3168 6.1.2: whatever the reason is */
        v.ssthresh = (ops->ssthresh ? ops->ssthresh : tcp_reno_ssthresh)(&v, (int)ev);
    }
    if (ops->event)
        ops->event(&v, (int)ev);
    view_store(c, fl, &v, true);
}

/* ---- Which one ------------------------------------------------------------------------------------------- */
/* A live connection goes on with the window that the old algorithm left. */
static void cc_switch(struct bypass_stack *s, struct tcp_conn *c, int i)
{
    if (c->feat & TX_LONE)
        tcp_flight_late(s, c);
    c->cc = (uint8_t)i;
    note_kind(s, c);
    if (!has_flight(c))
        return;
    struct tcp_flight *fl = conn_flight(s, c);
    fl->keep &= (uint8_t)~FK_CC;
    fl->pace_rate = 0;
    memset(fl->cc_state, 0, sizeof fl->cc_state);
    tcp_cc_begin(s, c);
    if (c->snd_nxt.v == c->snd_una.v)
        tcp_flight_end(s, c);
}

int tcp_cc_set(struct bypass_stack *s, struct tcp_endpoint *ep, struct tcp_conn *c, const char *name)
{
    int i = cc_find(s, name);
    if (i < 0)
        return i;
    if (ep)
        ep->cc = (uint8_t)i;
    else if (c->cc != i)
        cc_switch(s, c, i);
    return 0;
}

int tcp_cc_get(const struct bypass_stack *s, uint8_t cc, char *out, size_t n)
{
    const char *name = bypass_cc_name(s, cc);
    if (strlen(name) >= n)
        return -ERANGE;
    memcpy(out, name, strlen(name) + 1);
    return 0;
}
