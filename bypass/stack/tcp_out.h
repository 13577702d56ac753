/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_out.h - what leaves and when: the send queue (tcp_snd.c), segments and their headers (tcp_out.c), timers
 * (tcp_timer.c).
 */
#ifndef BYPASS_STACK_TCP_OUT_H
#define BYPASS_STACK_TCP_OUT_H

#include "tcp_ack.h"
#include "tcp_listen.h"

/* tcp_snd.c */
int64_t tcp_send(struct bypass_stack *s, struct tcp_conn *c, const void *buf, size_t n, int flags);
uint32_t tcp_snd_ack(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, struct tcp_sample *sm);
/* Fills never-sent frame p up to len bytes from those behind it. false: they have fewer, or it has no room. */
bool tcp_snd_merge(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, uint32_t len);
/* Whole frames of the program's (sock_zc.c) join the queue. How many, or -errno. */
int tcp_send_frames(struct bypass_stack *s, struct tcp_conn *c, const struct bypass_buf *bufs, int n, int flags);
bool tcp_snd_split(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, uint32_t len);
void tcp_snd_clear(struct bypass_stack *s, struct tcp_conn *c);
size_t tcp_snd_queue(struct bypass_stack *s, struct tcp_conn *c, const uint8_t *buf, size_t n); /* how many fitted */
void tcp_snd_skip(struct bypass_stack *s, struct tcp_conn *c, uint32_t n); /* the first n bytes have arrived */
uint32_t tcp_snd_room(const struct bypass_stack *s, const struct tcp_conn *c);

/* tcp_out.c */
void tcp_output_now(struct bypass_stack *s, struct tcp_conn *c);
static inline bool tcp_has_output(const struct tcp_conn *c)
{
    return c->sndq_next != BYPASS_PKT_NONE || c->lost_bytes > 0 || (c->flags & (TF_FIN_QUEUED | TF_FIN_LOST));
}
static inline void tcp_output(struct bypass_stack *s, struct tcp_conn *c) /* all that may go now */
{
    if (tcp_has_output(c) || (c->flags & TF_ACK_NOW))
        tcp_output_now(s, c);
}
void tcp_resume(struct bypass_stack *s, struct tcp_conn *c);          /* after conn_blocked() */
void tcp_retransmit_head(struct bypass_stack *s, struct tcp_conn *c); /* at once, whatever cwnd says */
enum tcp_probe { PROBE_NONE, PROBE_NEW, PROBE_RTX };
enum tcp_probe tcp_output_tail_probe(struct bypass_stack *s, struct tcp_conn *c); /* RFC 8985 7.3 */
void tcp_send_ack(struct bypass_stack *s, struct tcp_conn *c);
void tcp_send_syn(struct bypass_stack *s, struct tcp_conn *c); /* SYN or SYN-ACK by state */
void tcp_send_rst(struct bypass_stack *s, struct tcp_conn *c);
void tcp_send_probe(struct bypass_stack *s, struct tcp_conn *c);     /* one old sequence number: draws an ACK */
void tcp_reply_rst(struct bypass_stack *s, const struct segment *g); /* to a segment of no connection */
void tcp_challenge(struct bypass_stack *s, struct tcp_conn *c);      /* RFC 5961, rate-limited */
bool tcp_challenge_token(struct bypass_stack *s);                    /* of those of the whole stack */
/* A segment of no connection, or of one that is only half there. */
struct tcp_bare {
    const addr_t *src, *dst;
    uint16_t sport, dport, wnd, queue;
    seq_t seq, ack;
    uint8_t flags, ttl, tos;
    const struct tcp_opts *opts; /* of a SYN all, of another segment the timestamps; may be NULL */
};
/* mac: as of ip_out_back(). false: no frame, or nobody to send it to. */
bool tcp_send_bare(struct bypass_stack *s, const struct tcp_bare *b, const uint8_t *mac);

/* connections that waited for a frame or a next hop, or owe an ACK for a batch */
void tcp_resume_all(struct bypass_stack *s);
static inline void tcp_output_pending(struct bypass_stack *s)
{
    if (tcp_head(s)->blocked_head[0] != NO_INDEX || tcp_head(s)->resume_all)
        tcp_resume_all(s);
}

/* tcp_timer.c */
void tcp_timers_run(struct bypass_stack *s);
static inline void tcp_timers(struct bypass_stack *s)
{
    if (!wheel_at_rest(&tcp_head(s)->wheel, now_ns(s)))
        tcp_timers_run(s);
    if (tcp_req_due(s))
        tcp_req_timers(s);
}
void tcp_timer_update(struct bypass_stack *s, struct tcp_conn *c);  /* after any deadline was set */
void tcp_rtx_restart(struct bypass_stack *s, struct tcp_conn *c);   /* probe or timeout, counted from now */
void tcp_rtx_arm_rto(struct bypass_stack *s, struct tcp_conn *c);   /* timeout, from now */
void tcp_rtx_rearm_rto(struct bypass_stack *s, struct tcp_conn *c); /* timeout, from when the head was sent */
void tcp_rtx_reorder(struct bypass_stack *s, struct tcp_conn *c, uint64_t at); /* RTX_REORDER, unless later */
void tcp_rtx_put_off(struct bypass_stack *s, struct tcp_conn *c);              /* a probe: more was sent */
void tcp_rtx_early(struct bypass_stack *s, struct tcp_conn *c, uint32_t us);   /* the timeout comes sooner */
void tcp_ack_delayed(struct bypass_stack *s, struct tcp_conn *c);

enum {
    RTO_MIN_US = 200000, /* as Linux; RFC 6298 2.4 says one second, which no one keeps */
    RTO_MAX_US = 120000000,
    RTO_INIT_US = 1000000,     /* RFC 6298 2.1 */
    RTO_FALLBACK_US = 3000000, /* RFC 6298 5.7: after a SYN that was repeated */
    DELACK_MS = 40,
    DELACK_FIRST_MS = 5, /* ... as long as nobody knows whether data will go with it */
    TIME_WAIT_S = 60,
    FIN_WAIT_S = 60,
    SYN_RETRIES = 6,
    DATA_RETRIES = 15,
    ORPHAN_RETRIES = 8,
    QUICK_ACKS = 16,
    ACK_BATCH_MAX = 8, /* segments of one batch that one ACK may stand for */
    CHALLENGE_PER_S = 1000,
    MIN_RTT_HALF_S = 150, /* as Linux, whose window is 300 s */
    RENEGED_US = 10000,   /* patience with a peer that seems to have thrown away what it SACKed, as Linux */
    BACKLOG_MAX = 65535,
    SNDBUF_SPARE = 65536,  /* bytes queued beyond what the congestion window can use */
    PRESSURE_SEGMENTS = 4, /* what a connection may have unread when memory is short */
    WINDOW_LOW = 32768,    /* bytes: with less on offer the peer may be waiting */
};

#endif
