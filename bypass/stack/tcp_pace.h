/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_pace.h - how much may be sent, and when: congestion control (tcp_cc.c; its algorithms are in tcp_cc.h), delivery
 * rate (tcp_rate.c), pacing (tcp_pace.c), congestion notification (tcp_ecn.c), path MTU (tcp_pmtu.c).
 */
#ifndef BYPASS_STACK_TCP_PACE_H
#define BYPASS_STACK_TCP_PACE_H

#include "tcp_ack.h"

/* tcp_cc.c. Of a connection in CA_RECOVERY and CA_CWR the window is PRR's, unless tcp_cc_own_window(). */
enum tcp_cc_ev {
    CC_EV_LOSS = BYPASS_CC_EV_LOSS,           /* recovery begins: sets ssthresh */
    CC_EV_RTO = BYPASS_CC_EV_RTO,             /* a retransmission timeout: sets ssthresh (the first for this data) */
    CC_EV_ECN = BYPASS_CC_EV_ECN,             /* CWR begins: sets ssthresh */
    CC_EV_RECOVERED = BYPASS_CC_EV_RECOVERED, /* recovery, CWR or loss is over, cwnd as recovery left it */
    CC_EV_UNDO = BYPASS_CC_EV_UNDO,           /* it was spurious; cwnd and ssthresh are restored already */
    CC_EV_RESTART = BYPASS_CC_EV_RESTART,     /* sending begins again after nothing was in flight */
};
void tcp_cc_init(struct bypass_stack *s, struct tcp_conn *c);   /* connection established */
void tcp_cc_begin(struct bypass_stack *s, struct tcp_conn *c);  /* its flight record begins */
void tcp_cc_repace(struct bypass_stack *s, struct tcp_conn *c); /* the program set another limit */
void tcp_cc_resume(struct bypass_stack *s, struct tcp_conn *c); /* ... or was kept, and something is sent again */
/* Every ACK that delivered something, after recovery has updated its state. */
void tcp_cc_acked(struct bypass_stack *s, struct tcp_conn *c, const struct tcp_sample *sm);
void tcp_cc_event(struct bypass_stack *s, struct tcp_conn *c, enum tcp_cc_ev ev);
void tcp_cc_restart(struct bypass_stack *s, struct tcp_conn *c,
                    uint64_t idle_ns); /* it was idle for longer than an RTO */
/* Before data when nothing is in flight. */
static inline void tcp_cc_wake(struct bypass_stack *s, struct tcp_conn *c)
{
    uint64_t idle_ns = now_ns(s) - conn_cold(s, c)->unacked_since;
    if (unlikely(idle_ns > c->rto_us * 1000ull))
        tcp_cc_restart(s, c, idle_ns);
}
bool tcp_cc_exact_ecn(const struct bypass_stack *s, uint8_t cc);                /* index */
bool tcp_cc_own_window(const struct bypass_stack *s, const struct tcp_conn *c); /* also in recovery (BBR) */
void tcp_cc_sent(struct bypass_stack *s, struct tcp_conn *c); /* new data went out: was the window used? (RFC 7661) */
bool tcp_cc_complete(const struct bypass_stack *s);           /* this process knows all that the arena names */
int tcp_cc_set(struct bypass_stack *s, struct tcp_endpoint *ep, struct tcp_conn *c, const char *name); /* ep or c */
int tcp_cc_get(const struct bypass_stack *s, uint8_t cc, char *out, size_t n);
uint32_t tcp_initial_window(const struct tcp_conn *c); /* bytes, RFC 6928 */

/* tcp_rate.c. A tick is 1024 ns; counts modulo 2^32. */
static inline uint32_t tcp_rate_tick(uint64_t ns) { return (uint32_t)(ns >> 10); }
void tcp_rate_sent(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p); /* at each transmission of a frame */
void tcp_rate_delivered(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p,
                        struct tcp_sample *sm); /* each frame newly acknowledged or SACKed: once in its life */
void tcp_rate_done(struct bypass_stack *s, struct tcp_conn *c, struct tcp_sample *sm); /* after all of this ACK's */
void tcp_rate_gap(struct bypass_stack *s, struct tcp_conn *c);
static inline void tcp_rate_write(struct bypass_stack *s, struct tcp_conn *c) /* the program writes */
{
    if (unlikely(has_flight(c)))
        tcp_rate_gap(s, c);
}
uint64_t tcp_rate(const struct bypass_stack *s, const struct tcp_conn *c); /* bytes a second, for TCP_INFO */

/* tcp_pace.c */
bool tcp_pace_held(struct bypass_stack *s, struct tcp_conn *c); /* TX_PACED: not now; the timer is set */
uint64_t tcp_pace_deadline(const struct bypass_stack *s, const struct tcp_conn *c); /* NO_DEADLINE: nothing is held */
void tcp_pace_begin(struct bypass_stack *s, struct tcp_conn *c, bool wanted);
/* The limit as it is kept: 31 bits, or beyond them the same times 256. */
static inline uint64_t tcp_pace_limit(const struct tcp_options *o)
{
    return o->max_pacing >> 31 ? (uint64_t)(o->max_pacing & INT32_MAX) << 8 : o->max_pacing;
}
void tcp_pace_due(struct bypass_stack *s, struct tcp_conn *c);
void tcp_pace_spend(struct bypass_stack *s, struct tcp_conn *c, uint32_t bytes);
static inline bool tcp_pace_may_send(struct bypass_stack *s, struct tcp_conn *c)
{
    return likely(!(c->feat & TX_PACED)) || !tcp_pace_held(s, c);
}
static inline void tcp_pace_sent(struct bypass_stack *s, struct tcp_conn *c, uint32_t bytes)
{
    if (unlikely(c->feat & TX_PACED))
        tcp_pace_spend(s, c, bytes);
}

/* tcp_ecn.c */
uint8_t tcp_ecn_syn(struct bypass_stack *s, struct tcp_conn *c); /* flags of our SYN */
void tcp_ecn_syn_ack_in(struct tcp_conn *c, const struct segment *g);
bool tcp_ecn_agreed(const struct bypass_stack *s, const struct tcp_endpoint *ep, const struct segment *g);
void tcp_ecn_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g); /* TX_ECN, data or FIN */
uint8_t tcp_ecn_out(struct tcp_conn *c, bool new_data, uint8_t *tos);                 /* TX_ECN: flags of a segment */
void tcp_ecn_ack_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, struct tcp_sample *sm);

/* tcp_pmtu.c */
uint16_t tcp_pmtu_limit(const struct tcp_cold *k, uint16_t mtu); /* what of it may be used */
void tcp_pmtu_icmp(struct bypass_stack *s, struct tcp_conn *c, const struct icmp_error *e);
void tcp_pmtu_established(struct bypass_stack *s, struct tcp_conn *c);
void tcp_pmtu_timeout(struct bypass_stack *s, struct tcp_conn *c);    /* before tcp_enter_loss() */
void tcp_pmtu_acked(struct bypass_stack *s, struct tcp_conn *c);      /* snd_una moved on while a probe is in flight */
bool tcp_pmtu_probe_lost(struct bypass_stack *s, struct tcp_conn *c); /* what is lost is only the probe */
/* Makes the next frame a probe. Its payload bytes; 0: not now; TCP_PMTU_HOLD: now, when there is room in cwnd for it. */
enum { TCP_PMTU_HOLD = 1 << 16 };
uint32_t tcp_pmtu_probe(struct bypass_stack *s, struct tcp_conn *c);
void tcp_pmtu_probe_sent(struct bypass_stack *s, struct tcp_conn *c, seq_t first);

#endif
