/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_cubic.c - CUBIC (RFC 9438) with HyStart++ (RFC 9406).
 *
 * After a reduction the window follows W(t) = C (t - K)^3 + W_max: fast back to near W_max, slowly past it, then fast
 * again. Names of variables are the RFC's; windows are bytes. Time on the curve counts in units of 2^-10 s, so that a
 * cube needs only shifts: with t - K at most 2^19 units (8.5 minutes) nothing overflows 64 bits up to the largest
 * window and segment.
 */
#include "tcp_cc.h"

enum {
    C_NUM = 4, /* C = 0.4 segments / s^3 (RFC 9438 5) */
    C_DEN = 10,
    BETA_NUM = 7, /* beta = 0.7 (4.6) */
    BETA_DEN = 10,
    ALPHA_NUM = 9, /* alpha = 3 (1 - beta) / (1 + beta) = 9/17 (4.3) */
    ALPHA_DEN = 17,
    CURVE_MAX = 1 << 19,
    /* RFC 9406 4.3 */
    MIN_RTT_THRESH_US = 4000,
    MAX_RTT_THRESH_US = 16000,
    MIN_RTT_DIVISOR = 8,
    N_RTT_SAMPLE = 8,
    CSS_GROWTH_DIVISOR = 4,
    CSS_ROUNDS = 5,
    L_UNPACED = 8,
};

struct curve {         /* one congestion avoidance stage */
    uint64_t start_us; /* 0: it has not begun */
    uint32_t w_max, cwnd_prior;
    uint32_t origin; /* W_max of this stage: no less than cwnd_epoch */
    uint32_t k;      /* 2^-10 s */
    uint64_t w_est;
};
struct cubic {
    struct curve now, before; /* before: of the last reduction, in case it was a mistake (4.9) */
    uint64_t last_us;
    uint64_t grow_rest, est_rest;                      /* fractions of a byte that growth still owes */
    uint32_t round_end;                                /* HyStart++: snd_nxt when the round began */
    uint32_t last_min_us, cur_min_us, css_baseline_us; /* UINT32_MAX: infinity */
    uint8_t rtt_samples, css_rounds, in_css, in_round;
} __attribute__((may_alias));
static_assert(sizeof(struct cubic) <= BYPASS_CC_BYTES, "state");

/* The largest r with r^3 <= v; bit by bit, since it is needed once in a stage. */
static uint32_t cube_root(uint64_t v)
{
    uint64_t r = 0;
    for (int bit = 21; bit >= 0; bit--) {
        uint64_t try = r | 1ull << bit;
        if (try <= 2642245 && try * try * try <= v) /* (2^64 - 1)^(1/3) */
            r = try;
    }
    return (uint32_t)r;
}

/* ---- The curve ------------------------------------------------------------------------------------------ */
static uint64_t units(uint64_t us) { return (us << 10) / 1000000; }

/* C * mss * d^3 bytes. */
static uint64_t cube_bytes(uint64_t d, uint32_t mss)
{
    d = min_u64(d, CURVE_MAX);
    return ((d * d * d >> 10) * (mss * C_NUM / C_DEN)) >> 20;
}

/* 4.2. Without a W_max (first stage, after a timeout: 4.8) and above it the curve begins at its flat point. */
static void stage_begin(struct bypass_cc *cc, struct cubic *q)
{
    struct curve *v = &q->now;
    v->start_us = cc->now_us;
    v->w_est = cc->cwnd;
    v->k = 0;
    v->origin = cc->cwnd;
    if (v->w_max > cc->cwnd) {
        uint64_t diff = v->w_max - cc->cwnd; /* at most 2^30: the shift does not overflow */
        v->origin = v->w_max;
        v->k = cube_root((diff * C_DEN << 30) / ((uint64_t)C_NUM * cc->mss));
    }
    q->grow_rest = q->est_rest = 0;
}

/* W_cubic, t_us after the stage began, bytes. */
static uint64_t curve_at(const struct curve *v, uint64_t t_us, uint32_t mss)
{
    uint64_t t = units(t_us);
    if (t >= v->k)
        return v->origin + cube_bytes(t - v->k, mss);
    uint64_t below = cube_bytes(v->k - t, mss);
    return below < v->origin ? v->origin - below : 0;
}

/* 4.3: what Reno would have by now, were its increase so slow that it got as much as with halving. */
static void reno_estimate(struct bypass_cc *cc, struct cubic *q, uint32_t acked)
{
    bool faster = q->now.w_est < q->now.cwnd_prior;
    uint64_t num = (uint64_t)acked * cc->mss * (faster ? ALPHA_NUM : ALPHA_DEN) + q->est_rest;
    uint64_t den = (uint64_t)cc->cwnd * ALPHA_DEN;
    q->now.w_est += num / den;
    q->est_rest = num % den;
}

static void avoid_congestion(struct bypass_cc *cc, struct cubic *q, uint32_t acked)
{
    struct curve *v = &q->now;
    if (v->start_us == 0)
        stage_begin(cc, q);
    reno_estimate(cc, q, acked);
    uint64_t t = cc->now_us - v->start_us;
    if (curve_at(v, t, cc->mss) < v->w_est) { /* 4.3; after a pause that shrank the window, no faster than slow start */
        cc->cwnd = (uint32_t)max_u64(cc->cwnd, min_u64(v->w_est, (uint64_t)cc->cwnd + acked));
        return;
    }
    /* 4.4, 4.5: a round trip ahead, at most half as much again */
    uint64_t target = min_u64(curve_at(v, t + cc->srtt_us, cc->mss), cc->cwnd + cc->cwnd / 2);
    if (target <= cc->cwnd)
        return;
    uint64_t grow = (target - cc->cwnd) * acked + q->grow_rest;
    q->grow_rest = grow % cc->cwnd;
    cc->cwnd = (uint32_t)min_u64(cc->cwnd + grow / cc->cwnd, UINT32_MAX);
}

/* ---- HyStart++ ------------------------------------------------------------------------------------------- */
static void round_begin(struct bypass_cc *cc, struct cubic *q)
{
    q->round_end = cc->snd_nxt;
    q->last_min_us = q->in_round ? q->cur_min_us : UINT32_MAX;
    q->cur_min_us = UINT32_MAX;
    q->rtt_samples = 0;
    q->in_round = 1;
}

static void css_begin_or_end(struct cubic *q)
{
    if (q->rtt_samples < N_RTT_SAMPLE)
        return;
    if (q->in_css) {
        if (q->cur_min_us < q->css_baseline_us) /* it was jitter: back to slow start */
            q->in_css = q->css_rounds = 0;
    } else if (q->last_min_us != UINT32_MAX) {
        uint32_t thresh = min_u32(max_u32(q->last_min_us / MIN_RTT_DIVISOR, MIN_RTT_THRESH_US), MAX_RTT_THRESH_US);
        if (q->cur_min_us >= q->last_min_us + thresh) {
            q->css_baseline_us = q->cur_min_us;
            q->in_css = 1;
        }
    }
}

/* RFC 9406 4.2. true: conservative slow start has lasted long enough. */
static bool hystart(struct bypass_cc *cc, struct cubic *q, const struct bypass_cc_sample *sm)
{
    if (!q->in_round)
        round_begin(cc, q);
    if (sm->rtt_us != 0) {
        q->cur_min_us = min_u32(q->cur_min_us, (uint32_t)min_u64(sm->rtt_us, UINT32_MAX - 1));
        q->rtt_samples = (uint8_t)min_u32(q->rtt_samples + 1u, N_RTT_SAMPLE);
        css_begin_or_end(q);
    }
    if ((int32_t)(cc->snd_una - q->round_end) < 0)
        return false;
    if (q->in_css && ++q->css_rounds >= CSS_ROUNDS)
        return true;
    round_begin(cc, q);
    return false;
}

/* The first slow start; the later ones have a threshold that was learned (4.3). Returns the bytes not used up. */
static uint32_t first_slow_start(struct bypass_cc *cc, struct cubic *q, const struct bypass_cc_sample *sm)
{
    if (hystart(cc, q, sm)) {
        cc->ssthresh = cc->cwnd;
        return sm->acked;
    }
    uint32_t grow = cc->pacing_rate ? sm->acked : min_u32(sm->acked, L_UNPACED * cc->mss);
    cc->cwnd += q->in_css ? grow / CSS_GROWTH_DIVISOR : grow;
    return 0;
}

/* ---- Interface --------------------------------------------------------------------------------------------- */
static void cubic_acked(struct bypass_cc *cc, const struct bypass_cc_sample *sm)
{
    struct cubic *q = cc->state;
    uint32_t acked = sm->acked;
    if (cc->paused && q->now.start_us != 0) /* 4.2, 5.8: time in which the window was not used does not count */
        q->now.start_us += cc->now_us - q->last_us;
    q->last_us = cc->now_us;
    if (cc->ssthresh == UINT32_MAX && cc->ca_state != BYPASS_CA_LOSS)
        acked = first_slow_start(cc, q, sm);
    else if (cc->cwnd < cc->ssthresh)
        acked = tcp_reno_slow_start(cc, acked, L_UNPACED);
    if (acked > 0 && cc->cwnd >= cc->ssthresh)
        avoid_congestion(cc, q, acked);
}

/* 4.6, 4.7. */
static uint32_t cubic_ssthresh(struct bypass_cc *cc, int event)
{
    struct cubic *q = cc->state;
    q->before = q->now;
    q->now.cwnd_prior = cc->cwnd;
    if (cc->cwnd + cc->mss <= q->now.w_max) /* 4.7: it is getting less, by a segment or more: leave room for others */
        q->now.w_max = (uint32_t)((uint64_t)cc->cwnd * (BETA_DEN + BETA_NUM) / (2 * BETA_DEN));
    else
        q->now.w_max = cc->cwnd;
    if (event == BYPASS_CC_EV_RTO)
        q->now.w_max = 0; /* 4.8 */
    q->now.start_us = 0;
    return max_u32((uint32_t)((uint64_t)cc->flight_size * BETA_NUM / BETA_DEN), 2 * cc->mss);
}

static void cubic_event(struct bypass_cc *cc, int event)
{
    struct cubic *q = cc->state;
    if (event == BYPASS_CC_EV_UNDO) /* 4.9 */
        q->now = q->before;
}

const struct bypass_cc_ops tcp_cubic = {
    .name = "cubic", .acked = cubic_acked, .ssthresh = cubic_ssthresh, .event = cubic_event};
