/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_cc.c - congestion control: a table of algorithms reached by index, so that no other file names
 * one. NewReno's window (RFC 5681 3.1 with appropriate byte counting, RFC 3465); what is lost and when
 * to send it again is tcp_ack.c's.
 */
#include "tcp.h"

uint32_t tcp_initial_window(const struct tcp_conn *c)
{
    uint32_t mss = c->snd_mss;
    return min_u32(10 * mss, max_u32(2 * mss, 14600)); /* RFC 6928 2 */
}

static void reno_init(struct tcp_conn *c)
{
    c->cwnd = tcp_initial_window(c);
    c->ssthresh = UINT32_MAX;
}

static void reno_acked(struct tcp_conn *c, struct tcp_flight *fl, uint32_t bytes)
{
    const uint32_t limit = 1u << 30;
    if (c->cwnd < c->ssthresh) { /* slow start, at most two segments an ACK (RFC 3465 2.2) */
        uint32_t most = c->flags & TF_LOSS ? c->snd_mss : 2u * c->snd_mss;
        c->cwnd = min_u32(c->cwnd + min_u32(bytes, most), limit);
        return;
    }
    fl->acked_rest += bytes;
    if (fl->acked_rest >= c->cwnd) {
        fl->acked_rest -= c->cwnd;
        c->cwnd = min_u32(c->cwnd + c->snd_mss, limit);
    }
}

static uint32_t reno_ssthresh(const struct tcp_conn *c, uint32_t flight)
{
    return max_u32(flight / 2, 2u * c->snd_mss); /* RFC 5681 equation 4 */
}

static const struct tcp_cc algorithms[] = {
    {"reno", reno_init, reno_acked, reno_ssthresh},
};

const struct tcp_cc *tcp_cc(const struct tcp_conn *c) { return &algorithms[c->cc]; }
