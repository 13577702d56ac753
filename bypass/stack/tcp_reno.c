/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_reno.c - Reno's window (RFC 5681 3.1) with appropriate byte counting (RFC 3465). The state is the
 * number of bytes acknowledged towards the next segment of congestion avoidance.
 */
#include "tcp_cc.h"

uint32_t tcp_reno_ssthresh(struct bypass_cc *cc, int event)
{
    (void)event;
    return max_u32(cc->flight_size / 2, 2 * cc->mss);
}

uint32_t tcp_reno_slow_start(struct bypass_cc *cc, uint32_t acked, uint32_t segments)
{
    /* RFC 3465 2.3: after a timeout one segment, as the ACK may cover what had arrived before */
    uint32_t most = cc->ca_state == BYPASS_CA_LOSS ? cc->mss : segments * cc->mss;
    uint32_t grow = min_u32(min_u32(acked, most), cc->ssthresh - cc->cwnd);
    cc->cwnd += grow;
    return cc->cwnd < cc->ssthresh ? 0 : acked - grow;
}

void tcp_reno_grow(struct bypass_cc *cc, uint32_t acked, uint64_t *rest)
{
    if (cc->cwnd < cc->ssthresh)
        acked = tcp_reno_slow_start(cc, acked, 2);
    if (acked == 0 || cc->cwnd < cc->ssthresh)
        return;
    *rest += acked;
    if (*rest >= cc->cwnd) { /* RFC 3465 2.1: one segment for each window acknowledged */
        *rest -= cc->cwnd;
        cc->cwnd += cc->mss;
    }
}

static void reno_acked(struct bypass_cc *cc, const struct bypass_cc_sample *sm)
{
    tcp_reno_grow(cc, sm->acked, cc->state);
}

static void reno_event(struct bypass_cc *cc, int event)
{
    if (event == BYPASS_CC_EV_RTO)
        *(uint64_t *)cc->state = 0;
}

const struct bypass_cc_ops tcp_reno = {
    .name = "reno", .acked = reno_acked, .ssthresh = tcp_reno_ssthresh, .event = reno_event};
