/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_timer.c - what time alone causes: retransmission (RFC 6298 5), window probes (RFC 9293 3.8.6.1),
 * delayed ACK, keepalive (3.8.4), user timeout (RFC 5482), the end of TIME_WAIT and FIN_WAIT_2.
 */
#include <errno.h>

#include "tcp.h"

void tcp_timer_update(struct bypass_stack *s, struct tcp_conn *c)
{
    uint64_t at = NO_DEADLINE;
    if (c->rtx_at)
        at = c->rtx_at;
    if (c->ack_at)
        at = min_u64(at, c->ack_at);
    if (c->keep_at)
        at = min_u64(at, c->keep_at);
    if (unlikely(c->feat & TX_PACE_WAIT))
        at = min_u64(at, tcp_pace_deadline(s, c));
    if (at != NO_DEADLINE)
        wheel_arm(s, &tcp_head(s)->wheel, conn_index(s, c), at);
}

static uint64_t backed_off_ns(const struct tcp_conn *c)
{
    uint64_t us = (uint64_t)c->rto_us << min_u32(c->backoff, 16);
    return min_u64(us, RTO_MAX_US) * 1000;
}

static void arm_rtx(struct bypass_stack *s, struct tcp_conn *c, uint64_t at, uint8_t kind)
{
    c->rtx_at = at;
    c->rtx_kind = kind;
    if (!wheel_covers(&c->timer, at))
        tcp_timer_update(s, c);
}

/* RFC 8985 7.2: is a tail loss probe the next thing to do, when no ACK comes? */
static bool wants_probe(const struct bypass_stack *s, const struct tcp_conn *c)
{
    if (!(c->feat & TX_SACK))
        return false;
    if (!has_flight(c))
        return c->feat & TX_LONE;
    const struct tcp_flight *fl = conn_flight(s, c);
    return (fl->ca_state == CA_OPEN || (fl->ca_state == CA_CWR && fl->sacked_frames == 0)) && !fl->tlp_out;
}

void tcp_rtx_restart(struct bypass_stack *s, struct tcp_conn *c)
{
    uint64_t ns = backed_off_ns(c);
    bool probe = wants_probe(s, c);
    if (probe)
        ns = min_u64(ns, tcp_tlp_timeout_us(c) * 1000);
    arm_rtx(s, c, now_ns(s) + ns, probe ? RTX_TLP : RTX_NONE);
}

void tcp_rtx_arm_rto(struct bypass_stack *s, struct tcp_conn *c)
{
    arm_rtx(s, c, now_ns(s) + backed_off_ns(c), RTX_NONE);
}

static uint64_t head_expires_ns(const struct bypass_stack *s, const struct tcp_conn *c)
{
    bool frame = c->sndq_head != BYPASS_PKT_NONE && c->sndq_head != c->sndq_next;
    return (frame ? pkt_meta(s, c->sndq_head)->time_ns : now_ns(s)) + backed_off_ns(c);
}

void tcp_rtx_rearm_rto(struct bypass_stack *s, struct tcp_conn *c)
{
    arm_rtx(s, c, max_u64(head_expires_ns(s, c), now_ns(s) + MSEC_NS), RTX_NONE);
}

/* RFC 8985 7.2: the probe comes after the newest data, but not later than the oldest data's timeout. */
void tcp_rtx_put_off(struct bypass_stack *s, struct tcp_conn *c)
{
    arm_rtx(s, c, min_u64(now_ns(s) + tcp_tlp_timeout_us(c) * 1000, head_expires_ns(s, c)), RTX_TLP);
}

void tcp_rtx_reorder(struct bypass_stack *s, struct tcp_conn *c, uint64_t at)
{
    if (c->rtx_at == 0 || at < c->rtx_at)
        arm_rtx(s, c, at, RTX_REORDER);
}

void tcp_rtx_early(struct bypass_stack *s, struct tcp_conn *c, uint32_t us)
{
    uint64_t at = now_ns(s) + 1000ull * us;
    if (c->rtx_at == 0 || at < c->rtx_at || c->rtx_kind != RTX_NONE)
        arm_rtx(s, c, at, RTX_NONE);
}

void tcp_ack_delayed(struct bypass_stack *s, struct tcp_conn *c)
{
    if (c->flags & TF_ACK_LATER)
        return;
    uint32_t ms = core(s)->cfg.delack_ms;
    if (unlikely(!(c->feat & (TX_ANSWERS | TX_LISTENS))))
        ms = min_u32(ms, DELACK_FIRST_MS);
    c->flags |= TF_ACK_LATER;
    c->ack_at = now_ns(s) + ms * MSEC_NS;
    if (!wheel_covers(&c->timer, c->ack_at))
        tcp_timer_update(s, c);
}

/* ---- Each deadline ------------------------------------------------------------------------------------ */
static void give_up(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    STAT(s, tcp_timed_out);
    conn_drop(s, c, k->soft_error ? k->soft_error : ETIMEDOUT);
}

/* RFC 5482, as TCP_USER_TIMEOUT has it: absolute, or NO_DEADLINE. */
static uint64_t user_deadline(const struct bypass_stack *s, const struct tcp_conn *c)
{
    const struct tcp_cold *k = conn_cold(s, c);
    return k->opt.user_timeout_ms ? k->unacked_since + k->opt.user_timeout_ms * MSEC_NS : NO_DEADLINE;
}

/* Something was tried again at least once; a program that says how long means that, however often it is. */
static bool user_timeout_over(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return now_ns(s) >= user_deadline(s, c) && (c->rtx_count > 0 || c->backoff > 0);
}

/* The next try comes no later than the end of the user timeout. */
static void end_with_user_timeout(struct bypass_stack *s, struct tcp_conn *c)
{
    uint64_t end = user_deadline(s, c);
    if (c->rtx_at == 0 || c->rtx_kind != RTX_NONE || c->rtx_at <= end)
        return;
    c->rtx_at = max_u64(end, now_ns(s) + MSEC_NS);
    tcp_timer_update(s, c);
}

static void syn_timeout(struct bypass_stack *s, struct tcp_conn *c)
{
    uint32_t most = c->state == BYPASS_SYN_SENT ? conn_cold(s, c)->opt.syn_retries : (uint32_t)SYNACK_RETRIES;
    if (c->rtx_count >= most || (c->state == BYPASS_SYN_SENT && user_timeout_over(s, c))) {
        give_up(s, c);
        return;
    }
    c->rtx_count++;
    c->backoff++;
    c->flags |= TF_SYN_RTX;
    STAT(s, tcp_out_retransmits);
    tcp_send_syn(s, c);
    if (c->state == BYPASS_SYN_SENT)
        end_with_user_timeout(s, c);
}

/* No program holds it, nor will. */
static bool orphan(const struct tcp_conn *c) { return c->sock == NO_INDEX && !(c->flags & TF_ACCEPTABLE); }

/* The peer took back the window that data in flight was sent into, but answers: then its retransmissions
 * are window probes, and no number of them is too many (RFC 9293 3.8.6, RFC 1122 4.2.2.17). */
static bool window_taken_back(struct bypass_stack *s, const struct tcp_conn *c)
{
    return c->snd_wnd == 0 && !orphan(c) && now_ns(s) - conn_cold(s, c)->last_in < RTO_MAX_US * 1000ull;
}

static void data_timeout(struct bypass_stack *s, struct tcp_conn *c)
{
    uint32_t most = orphan(c) ? ORPHAN_RETRIES : DATA_RETRIES;
    if (user_deadline(s, c) == NO_DEADLINE ? c->rtx_count >= most : user_timeout_over(s, c)) {
        give_up(s, c);
        return;
    }
    STAT(s, tcp_timeouts);
    conn_cold(s, c)->timeouts++;
    if (unlikely(c->rtx_count >= 3 || (c->feat & TX_PMTU_PROBE)))
        tcp_pmtu_timeout(s, c);
    tcp_enter_loss(s, c);
    c->rtx_count = (uint8_t)min_u32(c->rtx_count + !window_taken_back(s, c), UINT8_MAX);
    c->backoff = (uint8_t)min_u32(c->backoff + 1u, UINT8_MAX);
    tcp_rtx_restart(s, c);
    tcp_output(s, c);
    end_with_user_timeout(s, c);
}

static void flight_due(struct bypass_stack *s, struct tcp_conn *c)
{
    if (c->rtx_kind == RTX_NONE) {
        data_timeout(s, c);
        return;
    }
    if (c->rtx_kind == RTX_REORDER)
        tcp_recover_reorder_due(s, c);
    else
        tcp_tlp_due(s, c);
    tcp_output(s, c);
}

/* The window is closed, or a partial segment waits for more that never came. */
static void probe_timeout(struct bypass_stack *s, struct tcp_conn *c)
{
    uint32_t most = orphan(c) ? ORPHAN_RETRIES : DATA_RETRIES;
    if (c->snd_wnd > 0) { /* TF_PROBING with TF_PUSH_ALL: the override timeout of RFC 9293 3.8.6.2.1 */
        c->flags = (c->flags & ~(uint32_t)TF_MORE) | TF_PUSH_ALL;
        tcp_output(s, c);
        c->flags &= ~(uint32_t)TF_PUSH_ALL;
        if (c->snd_nxt.v != c->snd_una.v)
            return;
    }
    /* a peer that answers for ever with a closed window must not keep what no program owns */
    bool enough = orphan(c) && c->backoff >= ORPHAN_RETRIES;
    if (c->probes >= most || enough || user_timeout_over(s, c)) {
        give_up(s, c);
        return;
    }
    c->flags |= TF_PROBING;
    c->backoff = (uint8_t)min_u32(c->backoff + 1u, UINT8_MAX); /* also when they are answered (SHLD-30) */
    c->rtx_at = now_ns(s) + max_u64(backed_off_ns(c), RTO_MIN_US * 1000ull);
    end_with_user_timeout(s, c);
    c->probes++;
    STAT(s, tcp_out_probes);
    tcp_send_probe(s, c);
}

static void rtx_due(struct bypass_stack *s, struct tcp_conn *c)
{
    c->rtx_at = 0;
    if (c->feat & TX_LONE)
        tcp_flight_late(s, c);
    switch (c->state) {
    case BYPASS_SYN_SENT:
    case BYPASS_SYN_RECEIVED:
        syn_timeout(s, c);
        break;
    case BYPASS_TIME_WAIT:
        conn_drop(s, c, 0);
        break;
    case BYPASS_FIN_WAIT_2:
        conn_drop(s, c, 0); /* the peer never closed; only without a program is this timer set */
        break;
    default:
        if (c->flags & TF_PROBING)
            probe_timeout(s, c);
        else if (c->snd_nxt.v != c->snd_una.v)
            flight_due(s, c);
    }
}

/* tcp(7): a user timeout decides in place of TCP_KEEPCNT. */
static bool keepalive_failed(const struct bypass_stack *s, const struct tcp_conn *c, const struct tcp_cold *k)
{
    if (k->opt.user_timeout_ms == 0)
        return c->probes >= k->opt.keep_cnt;
    return c->probes > 0 && now_ns(s) - k->last_in >= k->opt.user_timeout_ms * MSEC_NS;
}

static void keepalive_due(struct bypass_stack *s, struct tcp_conn *c)
{
    const struct tcp_cold *k = conn_cold(s, c);
    uint64_t idle_end = k->last_in + k->opt.keep_idle_s * SEC_NS;
    c->keep_at = 0;
    if (!(c->flags & TF_KEEPALIVE) || c->state == BYPASS_TIME_WAIT)
        return;
    if (idle_end > now_ns(s)) {
        c->keep_at = idle_end;
        return;
    }
    if (c->snd_queued > 0 || c->snd_nxt.v != c->snd_una.v) { /* other timers watch those */
        c->keep_at = now_ns(s) + SEC_NS;
        return;
    }
    if (keepalive_failed(s, c, k)) {
        STAT(s, tcp_keepalive_timeouts);
        conn_reset(s, c, ETIMEDOUT);
        return;
    }
    c->probes = (uint8_t)min_u32(c->probes + 1u, UINT8_MAX);
    c->keep_at = now_ns(s) + k->opt.keep_intvl_s * SEC_NS;
    STAT(s, tcp_out_keepalives);
    tcp_send_probe(s, c);
}

/* The connection may be gone afterwards; its slot's generation tells. */
static void conn_due(struct bypass_stack *s, uint32_t i)
{
    struct tcp_conn *c = conn_at(s, i);
    if (!c->rtx_at && !c->ack_at && !c->keep_at && !(c->feat & TX_PACE_WAIT))
        return; /* lazily armed, and done with since: its other lines stay where they are */
    const uint32_t gen = cold_at(s, i)->gen;
    if (c->ack_at && c->ack_at <= now_ns(s)) {
        c->ack_at = 0;
        tcp_ack_due(s, c);
    }
    if (unlikely(c->feat & TX_PACE_WAIT))
        tcp_pace_due(s, c);
    if (c->rtx_at && c->rtx_at <= now_ns(s))
        rtx_due(s, c);
    if (cold_at(s, i)->gen != gen || c->state == BYPASS_CLOSED)
        return;
    if (c->keep_at && c->keep_at <= now_ns(s))
        keepalive_due(s, c);
    if (c->state != BYPASS_CLOSED)
        tcp_timer_update(s, c);
}

void tcp_timers_run(struct bypass_stack *s)
{
    struct wheel *w = &tcp_head(s)->wheel;
    uint32_t i;
    while ((i = wheel_expire(s, w, now_ns(s))) != NO_INDEX)
        conn_due(s, i);
}

/* When to look again for those that wait for a frame. The device completes soon, but says so to nobody: after 50 us.
 * But frames may be held by a connection whose peer is silent, for a quarter of an hour: then ever more rarely. */
static uint64_t retry_ns(const struct bypass_stack *s)
{
    uint64_t waited = now_ns(s) - min_u64(tcp_head(s)->blocked_since, now_ns(s));
    return max_u64(min_u64(waited / 8, 50 * MSEC_NS), MSEC_NS / 20);
}

uint64_t tcp_deadline(const struct bypass_stack *s)
{
    uint64_t at = min_u64(wheel_next(&tcp_head(s)->wheel), tcp_head(s)->req_due);
    if (tcp_head(s)->resume_all)
        return 0;
    if (tcp_head(s)->blocked_head[0] != NO_INDEX)
        at = min_u64(at, now_ns(s) + retry_ns(s));
    return at;
}
