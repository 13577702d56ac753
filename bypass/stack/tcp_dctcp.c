/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_dctcp.c - DCTCP (RFC 8257), for data centres whose switches mark early: the window is reduced in proportion to
 * how much was marked in the last round trip, not to whether something was. Receiver's side and agreement are
 * tcp_ecn.c's. Losses are answered as Reno does (3.5).
 */
#include "tcp_cc.h"

enum {
    ALPHA_ONE = 1 << 20, /* DCTCP.Alpha of 1 */
    G_SHIFT = 4,         /* g = 1/16 (4.2) */
};

struct dctcp {
    uint64_t rest;          /* Reno's, between reductions */
    uint64_t acked, marked; /* bytes in this observation window (3.3) */
    uint32_t alpha;
    uint32_t window_end;
    uint8_t begun;
} __attribute__((may_alias));
static_assert(sizeof(struct dctcp) <= BYPASS_CC_BYTES, "state");

static void dctcp_init(struct bypass_cc *cc)
{
    struct dctcp *d = cc->state;
    d->alpha = ALPHA_ONE; /* 4.2: careful until something is known */
}

/* 3.3, steps 1 to 8: once a round trip. */
static void window_over(struct bypass_cc *cc, struct dctcp *d)
{
    if (d->acked > 0) {
        uint32_t share = (uint32_t)(d->marked * ALPHA_ONE / d->acked); /* M; a window is below 2^30, or a little more */
        uint32_t down = d->alpha >> G_SHIFT;
        if (down == 0)
            down = d->alpha; /* else alpha never comes down to 0 */
        d->alpha = min_u32(d->alpha - down + (share >> G_SHIFT), ALPHA_ONE);
    }
    d->acked = d->marked = 0;
    d->window_end = cc->snd_nxt;
    d->begun = 1;
}

static void dctcp_acked(struct bypass_cc *cc, const struct bypass_cc_sample *sm)
{
    struct dctcp *d = cc->state;
    d->acked += sm->acked;
    if (sm->ece)
        d->marked += sm->acked;
    if (!d->begun || (int32_t)(cc->snd_una - d->window_end) >= 0)
        window_over(cc, d);
    if (cc->limited && (cc->ca_state < BYPASS_CA_CWR || cc->ca_state == BYPASS_CA_LOSS) && sm->acked > 0)
        tcp_reno_grow(cc, sm->acked, &d->rest);
}

/* 3.3, last part: cwnd (1 - alpha / 2). A loss halves it (3.5). */
static uint32_t dctcp_ssthresh(struct bypass_cc *cc, int event)
{
    const struct dctcp *d = cc->state;
    if (event != BYPASS_CC_EV_ECN)
        return tcp_reno_ssthresh(cc, event);
    uint32_t cut = (uint32_t)((uint64_t)cc->cwnd * d->alpha / (2 * ALPHA_ONE));
    return max_u32(cc->cwnd - cut, 2 * cc->mss);
}

const struct bypass_cc_ops tcp_dctcp = {.name = "dctcp",
                                        .flags = BYPASS_CC_EVERY_ACK | BYPASS_CC_KEEP | BYPASS_CC_EXACT_ECN,
                                        .init = dctcp_init,
                                        .acked = dctcp_acked,
                                        .ssthresh = dctcp_ssthresh};
