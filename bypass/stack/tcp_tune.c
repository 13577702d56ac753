/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_tune.c - how large buffers and windows are, where the program did not say it (SO_RCVBUF, SO_SNDBUF).
 *
 * Receiving (dynamic right-sizing, Fisk and Feng 2001): a sender may have a window in flight each round trip, so the
 * buffer is kept at twice of what the program reads in one. The receiver has no acknowledgments to time: it takes the
 * echoes of its own timestamps in the peer's segments, or else how long a whole window takes to come.
 * Sending: the buffer follows what the congestion window can use.
 *
 * Memory is the device's frames and the arena's chunks, and everybody's. While it is plenty buffers grow; when it is
 * half used they stop; when little is left (pressure) windows open by a few segments only and no new connection is
 * taken; a window that was offered is never taken back (RFC 9293 3.8.6), and what it lets in is stored as long as
 * there is any memory, at last in place of data held out of order, on this connection or on another.
 */
#include "tcp_item.h"

enum {
    START_SEGMENTS = 10, /* what the first round trip is thought to bring (RFC 6928) */
    MAX_RTT_US = 10000000,
};

static uint32_t now_us(const struct bypass_stack *s) { return (uint32_t)(now_ns(s) / 1000); }

/* Half of the frames: what one connection may grow to hold, as payload of full segments. */
static uint32_t memory_share(const struct bypass_stack *s, const struct tcp_conn *c)
{
    uint64_t bytes = (uint64_t)(s->dev->frames / 2) * max_u32(c->rcv_mss, TCP_DEFAULT_MSS);
    return (uint32_t)min_u64(bytes, 1u << 30);
}

static bool plenty(const struct bypass_stack *s) { return s->dev->free_frames >= s->dev->frames / 2; }

uint8_t tcp_tune_wscale(const struct bypass_stack *s, uint32_t rcvbuf, uint32_t feat)
{
    uint32_t most = feat & TX_RCVBUF_SET ? rcvbuf : max_u32(rcvbuf, core(s)->cfg.rcvbuf_max);
    uint8_t shift = 0;
    while (most >> shift > 65535 && shift < 14)
        shift++;
    return shift;
}

/* ---- Receiving -------------------------------------------------------------------------------------------- */
void tcp_tune_begin(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    k->space_seq = c->rcv_nxt;
    k->space_at_us = now_us(s);
    k->space_bytes = START_SEGMENTS * c->snd_mss;
    k->rcv_rtt_us = k->rcv_rtt_at_us = 0;
}

/* Round trips seen from here include the sender's pauses: a shorter one is believed at once, a longer one slowly. */
static void rtt_sample(struct tcp_cold *k, uint32_t us)
{
    if (us > MAX_RTT_US)
        return;
    if (k->rcv_rtt_us == 0 || us < k->rcv_rtt_us)
        k->rcv_rtt_us = max_u32(us, 1);
    else
        k->rcv_rtt_us += (us - k->rcv_rtt_us) / 8;
}

/* A segment of some size has come in order. rcv_rtt_seq: the echo that was looked at last (each is timed once: the
 * first segment that carries it came soonest); without timestamps the right edge when rcv_rtt_at_us began. */
void tcp_tune_rtt(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (c->feat & TX_RCVBUF_SET)
        return;
    if (c->flags & TF_TS) {
        if (g->opt.ts_ecr != 0 && g->opt.ts_ecr != k->rcv_rtt_seq.v)
            rtt_sample(k, max_u32(min_u32(tcp_ts_now(s, c) - g->opt.ts_ecr, MAX_RTT_US), 1) * 1000);
        k->rcv_rtt_seq = seq(g->opt.ts_ecr);
        return;
    }
    if (k->rcv_rtt_at_us != 0) {
        if (seq_lt(c->rcv_nxt, k->rcv_rtt_seq))
            return;
        rtt_sample(k, now_us(s) - k->rcv_rtt_at_us);
    }
    k->rcv_rtt_at_us = now_us(s) | 1;
    k->rcv_rtt_seq = c->rcv_adv;
}

/* In slow start twice as much comes each round trip, and what is offered now is used one later. */
static void grow_rcvbuf(struct bypass_stack *s, struct tcp_conn *c, uint32_t copied, uint32_t before)
{
    uint64_t want = 2ull * copied + 4ull * min_u32(copied - before, copied) + 16ull * max_u32(c->rcv_mss, WORTH_TUNING);
    uint32_t most = min_u32(core(s)->cfg.rcvbuf_max, memory_share(s, c));
    most = min_u32(most, 65535u << c->rcv_wscale);
    want = min_u64(want, most);
    if (want <= c->rcvbuf)
        return;
    if (!plenty(s)) {
        STAT(s, tcp_tune_held_back);
        return;
    }
    STAT(s, tcp_tune_rcvbuf);
    c->rcvbuf = (uint32_t)want;
}

/* The program has read. */
void tcp_tune_read(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    uint32_t elapsed = now_us(s) - k->space_at_us;
    if ((c->feat & TX_RCVBUF_SET) || k->rcv_rtt_us == 0 || elapsed < k->rcv_rtt_us)
        return;
    seq_t read = seq_add(c->rcv_nxt, 0u - c->rcv_queued);
    uint32_t copied = read.v - k->space_seq.v;
    if (copied > k->space_bytes) {
        grow_rcvbuf(s, c, copied, k->space_bytes);
        k->space_bytes = copied;
    }
    k->space_seq = read;
    k->space_at_us = now_us(s);
}

/* ---- Sending ---------------------------------------------------------------------------------------------- */
/* The program has more than the buffer takes. */
void tcp_tune_write(struct bypass_stack *s, struct tcp_conn *c)
{
    uint32_t want = min_u32(2 * min_u32(c->cwnd, 1u << 29) + SNDBUF_SPARE, core(s)->cfg.sndbuf_max);
    if ((c->feat & TX_SNDBUF_SET) || want <= c->sndbuf)
        return;
    if (!plenty(s)) {
        STAT(s, tcp_tune_held_back);
        return;
    }
    STAT(s, tcp_tune_sndbuf);
    c->sndbuf = want;
}

/* ---- Memory ----------------------------------------------------------------------------------------------- */
/* There is no chunk for data in order. true: something held out of order was thrown away, try again. */
bool tcp_tune_reclaim(struct bypass_stack *s, struct tcp_conn *c)
{
    if (c->ooo == NO_INDEX)
        return tcp_ooo_prune_any(s);
    tcp_ooo_prune(s, c);
    return true;
}
