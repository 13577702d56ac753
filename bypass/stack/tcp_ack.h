/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_ack.h - what an acknowledgment tells and does: window and round trip (tcp_ack.c), the scoreboard (tcp_sack.c), what
 * is lost (tcp_rack.c), states of recovery (tcp_recover.c).
 */
#ifndef BYPASS_STACK_TCP_ACK_H
#define BYPASS_STACK_TCP_ACK_H

#include "tcp_flight.h"

/* What one ACK told. tcp_ack_in() keeps it on its stack, and whoever learns something fills it in. */
struct tcp_sample {
    uint32_t acked;     /* bytes by which snd_una moved */
    uint32_t sacked;    /* bytes that became SACKed */
    uint32_t delivered; /* bytes that left the network towards the peer: acked, less SACKed before, plus sacked */
    uint32_t lost;      /* bytes that were marked lost since the last ACK */
    uint32_t flight;    /* tcp_pipe() before this ACK */
    uint64_t rtt_us;    /* of the newest segment acknowledged that was sent once; 0: none */
    bool ece;           /* the ACK carried ECE */
    bool rtx;           /* the newest frame delivered was a retransmission */
    bool resent;        /* snd_una passed a frame that was sent more than once */
    bool original;      /* data below flight.recover was delivered that was sent once */
    bool dsack;         /* a D-SACK tells of a needless retransmission; dsack_tlp: of the tail loss probe */
    bool dsack_tlp;
    bool settled;     /* the window was set anew: recovery ended, or was a mistake and is undone */
    seq_t prior_fack; /* flight.fack before this ACK */
    bool app_limited; /* ... was sent while the program, not the window, was the limit */
    /* tcp_rate_*: of the newest frame delivered. interval_us 0: no valid rate */
    uint64_t prior_delivered; /* flight.delivered when it was sent */
    uint64_t rate_bytes;      /* delivered since then */
    uint32_t interval_us;
    uint32_t prior_entry;                  /* prior_delivered modulo 2^32 */
    uint32_t prior_at, first_tx_at, tx_at; /* ticks (tcp_rate_tick): delivered_at, first_tx_at, its own transmission */
    bool prior;                            /* a frame was delivered: these four are valid */
};

/* tcp_ack.c */
bool tcp_ack_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g); /* false: drop the segment */
void tcp_ack_lone(struct bypass_stack *s, struct tcp_conn *c, uint32_t wnd); /* TX_LONE: the segment has arrived */
void tcp_rtt_sample(struct tcp_conn *c, uint64_t rtt_us);
uint32_t tcp_pipe(const struct bypass_stack *s, const struct tcp_conn *c); /* bytes thought to be in the network */

/* tcp_sack.c */
void tcp_sack_begin(struct tcp_conn *c, struct tcp_flight *fl); /* CA_OPEN ends: nothing is SACKed or lost yet */
void tcp_sack_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, struct tcp_sample *sm);
/* snd_una passes a frame of a queue with marks. false: a SACK had told before that the peer has it. */
bool tcp_sack_acked(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, const struct segment *g,
                    struct tcp_sample *sm);
void tcp_sack_mark_lost(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p);
void tcp_sack_mark_all_lost(struct bypass_stack *s, struct tcp_conn *c, bool but_recent);
void tcp_sack_mark_resent(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p);
void tcp_sack_unmark_lost(struct bypass_stack *s, struct tcp_conn *c);
void tcp_sack_split(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, bypass_pkt rest);
bool tcp_sack_reneged(const struct bypass_stack *s, const struct tcp_conn *c);
bypass_pkt tcp_sack_next_lost(const struct bypass_stack *s, const struct tcp_flight *fl); /* NONE: no frame is lost */
bypass_pkt tcp_sack_last_sent(const struct bypass_stack *s, const struct tcp_conn *c);
enum { LANDMARK_EVERY = 64 };
void tcp_sack_landmark(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p);
static inline void tcp_sack_sent(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p) /* for the first time */
{
    if (unlikely(++conn_flight(s, c)->unlandmarked == LANDMARK_EVERY))
        tcp_sack_landmark(s, c, p);
}

/* tcp_rack.c */
void tcp_rack_delivered(struct bypass_stack *s, struct tcp_conn *c, const struct bypass_pkt_meta *m,
                        const struct segment *g, struct tcp_sample *sm);
void tcp_rack_dsack_round(struct tcp_conn *c, struct tcp_flight *fl);
void tcp_rack_recovered(struct tcp_flight *fl);
bool tcp_rack_overdue(const struct bypass_stack *s, const struct tcp_conn *c, const struct bypass_pkt_meta *m);
uint64_t tcp_rack_detect(struct bypass_stack *s, struct tcp_conn *c);
void tcp_tlp_end(struct tcp_flight *fl);
void tcp_tlp_due(struct bypass_stack *s, struct tcp_conn *c);
uint64_t tcp_tlp_timeout_us(const struct tcp_conn *c);
bool tcp_tlp_ack(struct tcp_flight *fl, const struct segment *g, const struct tcp_sample *sm, bool duplicate);

/* tcp_recover.c */
void tcp_recover_ack(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, struct tcp_sample *sm,
                     uint32_t frames, bool duplicate);
void tcp_recover_reorder_due(struct bypass_stack *s, struct tcp_conn *c);
void tcp_recover_resent(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p); /* is about to be sent again */
void tcp_recover_enter_cwr(struct bypass_stack *s, struct tcp_conn *c);
void tcp_enter_loss(struct bypass_stack *s, struct tcp_conn *c);
void tcp_mark_oversize(struct bypass_stack *s, struct tcp_conn *c); /* after snd_mss shrank */

#endif
