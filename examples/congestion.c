/* SPDX-License-Identifier: Apache-2.0 */
/*
 * congestion.c - a congestion control of your own: what bypass_cc_register() takes (bypass.h, "Congestion control").
 *
 *   cc -shared -fPIC -Ibypass/include examples/congestion.c -o congestion.so
 *
 * It grows by one segment in a round trip while the queue on the path is short, and shrinks by one when it is not: the
 * round trip's excess over the shortest, times what is in flight, tells how many bytes wait there. That is the idea of
 * TCP Vegas (Brakmo, Peterson 1995) in few lines; it gives way to senders that fill queues until they lose.
 */
#include "bypass.h"

struct delay {
    uint32_t round_end; /* snd_nxt when this round trip began */
    uint32_t shortest_us;
    uint32_t min_us; /* of this round trip */
};

static uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

static void init(struct bypass_cc *cc)
{
    struct delay *d = cc->state; /* 128 bytes, all zero, kept for us */
    d->round_end = cc->snd_nxt;
    d->shortest_us = d->min_us = UINT32_MAX;
}

static void acked(struct bypass_cc *cc, const struct bypass_cc_sample *sm)
{
    struct delay *d = cc->state;
    if (sm->rtt_us != 0) {
        d->min_us = least(d->min_us, (uint32_t)sm->rtt_us);
        d->shortest_us = least(d->shortest_us, d->min_us);
    }
    if ((int32_t)(cc->snd_una - d->round_end) < 0 || d->min_us == UINT32_MAX)
        return; /* once a round trip */
    uint64_t waiting = (uint64_t)cc->cwnd * (d->min_us - d->shortest_us) / d->min_us;
    if (cc->cwnd < cc->ssthresh && waiting < cc->mss)
        cc->cwnd += cc->cwnd; /* slow start */
    else if (waiting < 4 * cc->mss)
        cc->cwnd += cc->mss;
    else
        cc->cwnd -= cc->cwnd > 8 * cc->mss && waiting > 16 * cc->mss ? cc->cwnd / 8 : cc->mss;
    if (waiting >= cc->mss)
        cc->ssthresh = least(cc->ssthresh, cc->cwnd);
    d->round_end = cc->snd_nxt;
    d->min_us = UINT32_MAX;
}

/* ssthresh and event may be missing: half of what is in flight. */
const struct bypass_cc_ops example_congestion = {
    .name = "delay", .flags = BYPASS_CC_KEEP, .init = init, .acked = acked};
