/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_bbr.c - BBR, version 1 (draft-cardwell-iccrg-bbr-congestion-control-00; the numbers below are its sections), as
 * Linux has it under the name "bbr". It models the path by the most that it delivered (BtlBw) and the shortest round
 * trip (RTprop), sends at the one and keeps about two times their product in flight. Loss alone does not slow it.
 *
 *     STARTUP --(no faster for three rounds)--> DRAIN --(queue gone)--> PROBE_BW <--> PROBE_RTT
 *
 * All of the draft's section 4 is here, and two parts that Linux has beyond it: room for ACKs that come in bunches, and
 * the long-term rate of a path with a policer (a token bucket, which drops what is above its rate without a queue).
 * Nothing of versions 2 and 3 (reaction to loss and ECN, upper bounds of what is in flight). Rates are bytes a second,
 * gains in 256ths.
 */
#include "tcp_cc.h"

enum mode { STARTUP, DRAIN, PROBE_BW, PROBE_RTT };
enum {
    UNIT = 256,
    HIGH_GAIN = UNIT * 2885 / 1000 + 1, /* 2/ln 2 (4.3.2) */
    DRAIN_GAIN = UNIT * 1000 / 2885,
    CWND_GAIN = 2 * UNIT,
    CYCLE = 8,
    BW_ROUNDS = 10,
    MIN_RTT_US = 10 * 1000000, /* RTpropFilterLen (4.1.2.3) */
    PROBE_RTT_MS = 200,
    MIN_SEGMENTS = 4,
    FULL_ROUNDS = 3,
    MARGIN = 99, /* percent: what is sent stays below what the bottleneck takes */
    QUANTUM_MAX = 65536,
    CWND_MOST = 1 << 30,
    SLOW_RATE = 150000, /* 1.2 Mbit/s: below it single segments */
    BUNCH_ROUNDS = 5,
    BUNCH_US = 100000,
    BUNCH_RESTART = 1 << 30, /* bytes */
    POLICER_ROUNDS = 4,      /* the least that are judged; up to four times as many */
    POLICER_LOST = 50,       /* of 256 bytes delivered: so many more are lost */
    POLICER_RATIO = 8,       /* two intervals agree: their rates differ by an eighth at most, */
    POLICER_DIFF = 500,      /* or by 4 kbit/s */
    POLICED_ROUNDS = 48,     /* after so many it may have gone */
};
static const uint16_t cycle_gain[CYCLE] = {UNIT * 5 / 4, UNIT * 3 / 4, UNIT, UNIT, UNIT, UNIT, UNIT, UNIT};

struct bbr {
    uint64_t bw[3]; /* the largest samples of the last BW_ROUNDS rounds: best, second, third, each newer */
    uint32_t bw_round[3];
    uint32_t round;
    uint64_t round_end; /* value of `delivered` that ends the round */
    uint64_t full_bw;
    uint64_t policed_bw;              /* of the last interval; 0: there was none */
    uint32_t cycle_us, min_rtt_at_us; /* wrap */
    uint32_t probe_rtt_done_ms;       /* wraps; 0: not begun */
    uint32_t min_rtt_us, prior_cwnd;
    uint32_t random;
    uint32_t bunch_us, bunch_bytes; /* since when, and how much was acknowledged since */
    uint32_t bunch_most[2];         /* bytes above the rate: most in these rounds, and in those before */
    uint32_t policer_ms, policer_delivered,
        policer_lost; /* when the interval began; in units of 16 bytes; bytes since */
    uint8_t mode, cycle_idx, full_count, prior_state, bunch_rounds, policer_rounds;
    uint16_t full : 1, round_start : 1, idle_restart : 1, probe_rtt_round : 1, conserve : 1, seen_rtt : 1;
    uint16_t bunch_idx : 1, sampling : 1, policed : 1;
} __attribute__((may_alias));
static_assert(sizeof(struct bbr) <= BYPASS_CC_BYTES, "state");

/* ---- The largest of a sliding window, in three values (after Kathleen Nichols) ------------------------------- */
static void put(struct bbr *b, int from, uint64_t bw)
{
    for (int i = from; i < 3; i++) {
        b->bw[i] = bw;
        b->bw_round[i] = b->round;
    }
}

static void drop_best(struct bbr *b)
{
    for (int i = 0; i < 2; i++) {
        b->bw[i] = b->bw[i + 1];
        b->bw_round[i] = b->bw_round[i + 1];
    }
}

static void max_bw_update(struct bbr *b, uint64_t bw)
{
    if (bw >= b->bw[0] || b->round - b->bw_round[2] > BW_ROUNDS) {
        put(b, 0, bw);
        return;
    }
    if (bw >= b->bw[1])
        put(b, 1, bw);
    else if (bw >= b->bw[2])
        put(b, 2, bw);
    for (int i = 0; i < 2 && b->round - b->bw_round[0] > BW_ROUNDS; i++) { /* the best has aged out */
        drop_best(b);
        put(b, 2, bw);
    }
    uint32_t age = b->round - b->bw_round[0];
    if (b->bw_round[1] == b->bw_round[0] && age > BW_ROUNDS / 4)
        put(b, 1, bw); /* a second from the window's second quarter */
    else if (b->bw_round[2] == b->bw_round[1] && age > BW_ROUNDS / 2)
        put(b, 2, bw);
}

/* ---- The model ------------------------------------------------------------------------------------------------ */
static uint64_t bandwidth(const struct bbr *b) { return b->policed ? b->policed_bw : b->bw[0]; }

static uint32_t pacing_gain(const struct bbr *b)
{
    switch (b->mode) {
    case STARTUP:
        return HIGH_GAIN;
    case DRAIN:
        return DRAIN_GAIN;
    case PROBE_BW:
        return b->policed ? UNIT : cycle_gain[b->cycle_idx];
    default:
        return UNIT;
    }
}

static uint32_t window_gain(const struct bbr *b)
{
    return b->mode == PROBE_BW ? CWND_GAIN : b->mode == PROBE_RTT ? UNIT : HIGH_GAIN;
}

/* Bytes that leave in one piece: a millisecond's worth (4.2.2). */
static uint32_t quantum(const struct bypass_cc *cc)
{
    uint32_t least = cc->pacing_rate < SLOW_RATE ? cc->mss : 2 * cc->mss;
    return max_u32((uint32_t)min_u64(cc->pacing_rate >> 10, QUANTUM_MAX), least);
}

/* BBRInflight (4.2.3.2): gain times the bandwidth-delay product, and room for pieces and delayed ACKs. */
static uint32_t inflight(const struct bypass_cc *cc, const struct bbr *b, uint64_t bw, uint32_t gain)
{
    uint64_t bytes = 10 * cc->mss;
    if (b->min_rtt_us != UINT32_MAX) /* min_rtt_us < 2^27, bw < 2^36: no overflow */
        bytes = bw * b->min_rtt_us / 1000000 * gain / UNIT;
    bytes += 3 * quantum(cc);
    if (b->mode == PROBE_BW && b->cycle_idx == 0)
        bytes += 2 * cc->mss;
    return (uint32_t)min_u64(bytes, CWND_MOST);
}

/* ---- PROBE_BW's cycle (4.3.4) ----------------------------------------------------------------------------------- */
static void next_phase(struct bypass_cc *cc, struct bbr *b)
{
    b->cycle_idx = (b->cycle_idx + 1) % CYCLE;
    b->cycle_us = (uint32_t)cc->now_us;
}

static bool phase_is_over(struct bypass_cc *cc, const struct bbr *b, const struct bypass_cc_sample *sm)
{
    uint32_t gain = pacing_gain(b);
    bool long_enough = (uint32_t)cc->now_us - b->cycle_us > b->min_rtt_us;
    if (gain == UNIT)
        return long_enough;
    uint32_t goal = inflight(cc, b, b->bw[0], gain > UNIT ? gain : UNIT);
    if (gain > UNIT) /* until the pipe was really fuller, with the piece that goes next, or it cannot be */
        return long_enough && (sm->lost > 0 || sm->prior_in_flight + quantum(cc) >= goal);
    return long_enough || sm->prior_in_flight <= goal;
}

static void enter_probe_bw(struct bypass_cc *cc, struct bbr *b)
{
    b->mode = PROBE_BW;
    b->random = b->random * 1664525 + 1013904223; /* flows do not probe in step; any phase but the draining one */
    b->cycle_idx = (uint8_t)(CYCLE - 1 - (b->random >> 16) % (CYCLE - 1));
    next_phase(cc, b);
}

/* ---- Policers ------------------------------------------------------------------------------------------------------ */
static uint32_t now_ms(const struct bypass_cc *cc) { return (uint32_t)(cc->now_us / 1000); }

static void policer_interval(const struct bypass_cc *cc, struct bbr *b, const struct bypass_cc_sample *sm)
{
    b->sampling = 1;
    b->policer_ms = now_ms(cc);
    b->policer_delivered = (uint32_t)(sm->delivered_all >> 4);
    b->policer_lost = 0;
    b->policer_rounds = 0;
}

static void policer_forget(struct bbr *b)
{
    b->policed_bw = 0;
    b->sampling = b->policed = 0;
}

/* An interval from loss to loss, of a few rounds, is over when much was lost in it. The second that tells the same rate
 * as the one before it convicts. */
static void policer_judge(const struct bypass_cc *cc, struct bbr *b, const struct bypass_cc_sample *sm)
{
    uint64_t delivered = (uint64_t)((uint32_t)(sm->delivered_all >> 4) - b->policer_delivered) << 4;
    uint32_t ms = now_ms(cc) - b->policer_ms;
    if (delivered == 0 || ms == 0 || (uint64_t)b->policer_lost * 256 < delivered * POLICER_LOST)
        return;
    uint64_t bw = max_u64(delivered * 1000 / ms, 1), last = b->policed_bw;
    uint64_t diff = bw > last ? bw - last : last - bw;
    if (last != 0 && (diff * POLICER_RATIO <= last || diff <= POLICER_DIFF)) {
        b->policed_bw = (bw + last) / 2;
        b->policed = 1;
        b->policer_rounds = 0;
        return;
    }
    b->policed_bw = bw;
    policer_interval(cc, b, sm);
}

static void look_for_policer(struct bypass_cc *cc, struct bbr *b, const struct bypass_cc_sample *sm)
{
    b->policer_rounds += b->round_start;
    if (b->policed) {
        if (b->mode == PROBE_BW && b->policer_rounds >= POLICED_ROUNDS) {
            policer_forget(b);
            enter_probe_bw(cc, b);
        }
        return;
    }
    if (b->sampling)
        b->policer_lost = (uint32_t)min_u64((uint64_t)b->policer_lost + sm->lost, UINT32_MAX);
    else if (sm->lost > 0) /* its bucket is empty now */
        policer_interval(cc, b, sm);
    if (sm->app_limited || b->policer_rounds > 4 * POLICER_ROUNDS)
        policer_forget(b);
    else if (b->sampling && b->policer_rounds >= POLICER_ROUNDS && sm->lost > 0)
        policer_judge(cc, b, sm);
}

/* BBRUpdateRound, BBRUpdateBtlBw (4.1.1). */
static void update_bw(struct bypass_cc *cc, struct bbr *b, const struct bypass_cc_sample *sm)
{
    b->round_start = 0;
    if (sm->interval_us == 0)
        return;
    if (sm->prior_delivered >= b->round_end) {
        b->round_end = sm->delivered_all;
        b->round++;
        b->round_start = 1;
        b->conserve = 0;
    }
    look_for_policer(cc, b, sm);
    uint64_t bw = min_u64(sm->rate_bytes * 1000000 / sm->interval_us, (1ull << 36) - 1);
    if (!sm->app_limited || bw >= b->bw[0])
        max_bw_update(b, bw);
}

/* ---- STARTUP, DRAIN (4.3.2, 4.3.3) -------------------------------------------------------------------------------- */
static void check_full(struct bbr *b, const struct bypass_cc_sample *sm)
{
    if (b->full || !b->round_start || sm->app_limited)
        return;
    if (b->bw[0] >= b->full_bw + b->full_bw / 4) {
        b->full_bw = b->bw[0];
        b->full_count = 0;
        return;
    }
    b->full = ++b->full_count >= FULL_ROUNDS;
}

static void check_drain(struct bypass_cc *cc, struct bbr *b)
{
    if (b->mode == STARTUP && b->full) {
        b->mode = DRAIN;
        cc->ssthresh = inflight(cc, b, b->bw[0], UNIT);
    }
    if (b->mode == DRAIN && cc->in_flight <= inflight(cc, b, b->bw[0], UNIT))
        enter_probe_bw(cc, b);
}

/* ---- PROBE_RTT (4.3.5) ---------------------------------------------------------------------------------------------- */
static void save_cwnd(const struct bypass_cc *cc, struct bbr *b)
{
    if (b->prior_state < BYPASS_CA_RECOVERY && b->mode != PROBE_RTT)
        b->prior_cwnd = cc->cwnd;
    else
        b->prior_cwnd = max_u32(b->prior_cwnd, cc->cwnd);
}

static void check_probe_rtt_done(struct bypass_cc *cc, struct bbr *b)
{
    if (b->probe_rtt_done_ms == 0 || (int32_t)(now_ms(cc) - b->probe_rtt_done_ms) <= 0)
        return;
    b->min_rtt_at_us = (uint32_t)cc->now_us;
    cc->cwnd = max_u32(cc->cwnd, b->prior_cwnd);
    if (b->full)
        enter_probe_bw(cc, b);
    else
        b->mode = STARTUP;
}

static void probe_rtt(struct bypass_cc *cc, struct bbr *b, const struct bypass_cc_sample *sm)
{
    cc->held_back = 1; /* what is delivered now says nothing about the bottleneck */
    if (b->probe_rtt_done_ms == 0 && cc->in_flight <= MIN_SEGMENTS * cc->mss) {
        b->probe_rtt_done_ms = max_u32(now_ms(cc) + PROBE_RTT_MS, 1);
        b->probe_rtt_round = 0;
        b->round_end = sm->delivered_all;
    } else if (b->probe_rtt_done_ms != 0) {
        b->probe_rtt_round |= b->round_start;
        if (b->probe_rtt_round)
            check_probe_rtt_done(cc, b);
    }
}

static void update_min_rtt(struct bypass_cc *cc, struct bbr *b, const struct bypass_cc_sample *sm)
{
    bool expired = (uint32_t)cc->now_us - b->min_rtt_at_us > MIN_RTT_US;
    if (sm->rtt_us != 0 && (sm->rtt_us < b->min_rtt_us || expired)) {
        b->min_rtt_us = (uint32_t)min_u64(sm->rtt_us, (1u << 27) - 1);
        b->min_rtt_at_us = (uint32_t)cc->now_us;
    }
    if (expired && !b->idle_restart && b->mode != PROBE_RTT) {
        save_cwnd(cc, b);
        b->mode = PROBE_RTT;
        b->probe_rtt_done_ms = 0;
    }
    if (b->mode == PROBE_RTT)
        probe_rtt(cc, b, sm);
    b->idle_restart = 0;
}

/* ---- What follows from the model (4.2) --------------------------------------------------------------------------------- */
static uint64_t rate_for(uint64_t bw, uint32_t gain) { return bw * gain / UNIT * MARGIN / 100; }

static void first_rate(struct bypass_cc *cc, struct bbr *b)
{
    uint32_t rtt_us = cc->srtt_us ? cc->srtt_us : 1000;
    b->seen_rtt = cc->srtt_us != 0;
    cc->pacing_rate = max_u64(rate_for((uint64_t)cc->cwnd * 1000000 / rtt_us, HIGH_GAIN), 1);
}

static void set_rate(struct bypass_cc *cc, struct bbr *b)
{
    uint64_t rate = max_u64(rate_for(bandwidth(b), pacing_gain(b)), 1);
    if (!b->seen_rtt && cc->srtt_us != 0)
        first_rate(cc, b);
    if (b->full || rate > cc->pacing_rate)
        cc->pacing_rate = rate;
}

/* ACKs that come in bunches are paused between them: what a bunch brought beyond the rate, at most, has to be in flight
 * on top, so that there is something to send meanwhile. */
static void update_bunches(struct bypass_cc *cc, struct bbr *b, const struct bypass_cc_sample *sm)
{
    if (sm->interval_us == 0)
        return;
    b->bunch_rounds += b->round_start;
    if (b->bunch_rounds >= BUNCH_ROUNDS) {
        b->bunch_rounds = 0;
        b->bunch_idx ^= 1;
        b->bunch_most[b->bunch_idx] = 0;
    }
    uint64_t expected = bandwidth(b) * ((uint32_t)cc->now_us - b->bunch_us) / 1000000;
    if (b->bunch_bytes <= expected || b->bunch_bytes > BUNCH_RESTART) {
        b->bunch_us = (uint32_t)cc->now_us;
        b->bunch_bytes = 0;
        expected = 0;
    }
    b->bunch_bytes += sm->delivered;
    uint32_t extra = b->bunch_bytes > expected ? (uint32_t)(b->bunch_bytes - expected) : 0;
    b->bunch_most[b->bunch_idx] = max_u32(b->bunch_most[b->bunch_idx], min_u32(extra, cc->cwnd));
}

static uint32_t bunch_room(const struct bbr *b)
{
    uint32_t most = max_u32(b->bunch_most[0], b->bunch_most[1]);
    return b->full ? (uint32_t)min_u64(most, bandwidth(b) * BUNCH_US / 1000000) : 0;
}

/* BBRModulateCwndForRecovery (4.2.3.4): in the first round trip of a recovery no more goes than was delivered; what it
 * had before comes back at its end. true: it has decided. */
static bool modulate_for_recovery(struct bypass_cc *cc, struct bbr *b, const struct bypass_cc_sample *sm)
{
    uint32_t state = cc->ca_state;
    if (sm->lost > 0)
        cc->cwnd = cc->cwnd > sm->lost + cc->mss ? cc->cwnd - sm->lost : cc->mss;
    if (state == BYPASS_CA_RECOVERY && b->prior_state != BYPASS_CA_RECOVERY) {
        b->conserve = 1;
        b->round_end = sm->delivered_all;
        cc->cwnd = cc->in_flight + sm->delivered;
    } else if (b->prior_state >= BYPASS_CA_RECOVERY && state < BYPASS_CA_RECOVERY) {
        cc->cwnd = max_u32(cc->cwnd, b->prior_cwnd);
        b->conserve = 0;
    }
    b->prior_state = (uint8_t)state;
    if (b->conserve)
        cc->cwnd = max_u32(cc->cwnd, cc->in_flight + sm->delivered);
    return b->conserve;
}

/* BBRSetCwnd (4.2.3.6). */
static void set_cwnd(struct bypass_cc *cc, struct bbr *b, const struct bypass_cc_sample *sm)
{
    if (!modulate_for_recovery(cc, b, sm)) {
        uint32_t target = min_u32(inflight(cc, b, bandwidth(b), window_gain(b)) + bunch_room(b), CWND_MOST);
        if (b->full)
            cc->cwnd = min_u32(cc->cwnd + sm->delivered, target);
        else if (cc->cwnd < target || sm->delivered_all < 10 * cc->mss)
            cc->cwnd += sm->delivered;
        cc->cwnd = max_u32(cc->cwnd, MIN_SEGMENTS * cc->mss);
    }
    if (b->mode == PROBE_RTT)
        cc->cwnd = min_u32(cc->cwnd, MIN_SEGMENTS * cc->mss);
}

/* ---- Interface ------------------------------------------------------------------------------------------------------------ */
static void bbr_init(struct bypass_cc *cc)
{
    struct bbr *b = cc->state;
    b->random = cc->random;
    b->min_rtt_us = cc->min_rtt_us == UINT32_MAX && cc->srtt_us ? cc->srtt_us : cc->min_rtt_us;
    b->min_rtt_at_us = b->bunch_us = (uint32_t)cc->now_us;
    cc->ssthresh = UINT32_MAX;
    first_rate(cc, b);
}

static void bbr_acked(struct bypass_cc *cc, const struct bypass_cc_sample *sm)
{
    struct bbr *b = cc->state;
    update_bw(cc, b, sm);
    update_bunches(cc, b, sm);
    if (b->mode == PROBE_BW && phase_is_over(cc, b, sm))
        next_phase(cc, b);
    check_full(b, sm);
    check_drain(cc, b);
    update_min_rtt(cc, b, sm);
    set_rate(cc, b);
    set_cwnd(cc, b, sm);
}

static uint32_t bbr_ssthresh(struct bypass_cc *cc, int event)
{
    (void)event;
    save_cwnd(cc, cc->state);
    return cc->ssthresh; /* not used but by others */
}

static void bbr_event(struct bypass_cc *cc, int event)
{
    struct bbr *b = cc->state;
    if (event == BYPASS_CC_EV_RTO) { /* what is known of the path may be out of date */
        b->prior_state = BYPASS_CA_LOSS;
        b->full_bw = 0;
        b->round_start = 1;
    } else if (event == BYPASS_CC_EV_UNDO) {
        b->full_bw = 0;
        b->full_count = 0;
        policer_forget(b);
    } else if (event == BYPASS_CC_EV_RESTART) { /* 4.3.4.4: no burst to fill what drained in the pause */
        b->idle_restart = 1;
        b->bunch_us = (uint32_t)cc->now_us;
        b->bunch_bytes = 0;
        if (b->mode == PROBE_BW)
            cc->pacing_rate = max_u64(rate_for(bandwidth(b), UNIT), 1);
        else if (b->mode == PROBE_RTT)
            check_probe_rtt_done(cc, b);
    }
}

const struct bypass_cc_ops tcp_bbr = {.name = "bbr",
                                      .flags =
                                          BYPASS_CC_EVERY_ACK | BYPASS_CC_OWN_WINDOW | BYPASS_CC_KEEP | BYPASS_CC_PACED,
                                      .init = bbr_init,
                                      .acked = bbr_acked,
                                      .ssthresh = bbr_ssthresh,
                                      .event = bbr_event};
