/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_flight.h - what is in flight: the record of a connection that has sent something, and the marks of its frames.
 * Who changes it is in tcp_ack.h and tcp_pace.h.
 */
#ifndef BYPASS_STACK_TCP_FLIGHT_H
#define BYPASS_STACK_TCP_FLIGHT_H

#include "tcp_conn.h"

enum { SACK_HINTS = 4 };
struct frame_list { /* by meta.prev and meta.after */
    uint32_t head, tail;
};
struct sack_hint { /* a frame of the send queue: it is there as long as `at` is not acknowledged (tcp_hint_ok) */
    uint32_t pkt;
    seq_t at; /* its sequence number */
};

/* What only a connection with data in flight needs, or one whose loss recovery or congestion control has
 * learned something (keep). From a pool whose entries go round last in, first out, so that a million idle
 * connections hold none, and those with a request in flight share a few that stay in the cache. Rules:
 * tcp_flight_begin() before the first byte leaves; from then until snd_una == snd_nxt the record exists;
 * tcp_flight_end() lets go of it unless `keep` is set. */
struct tcp_flight {
    uint32_t link;
    uint8_t keep;     /* FK_*: who wants to remember; 0: freed when nothing is in flight */
    uint8_t ca_state; /* CA_* */
    uint16_t dupacks;
    uint8_t frto;                    /* FRTO_*: steps of RFC 5682 */
    bool tlp_out, tlp_rtx;           /* a tail loss probe awaits its ACK; it was a retransmission */
    bool undo;                       /* what recovery did to the window can be undone */
    bool undone;                     /* ... was, and `recover` is not passed yet */
    bool rtx_stamped;                /* rtx_ts is valid */
    bool hold;                       /* no recovery by duplicate ACKs until `recover` is passed (RFC 6582 3.2) */
    bool reordering, in_dsack_round; /* RFC 8985 6.2: it was seen; dsack_round is valid */
    /* scoreboard (tcp_sack.c) */
    struct frame_list lost_list, again_list, resent_list;
    uint32_t resent_frames;
    uint32_t sacked_bytes, sacked_frames; /* SACKed above snd_una */
    seq_t recover;                        /* recovery ends when this is acknowledged */
    uint32_t landmark, unlandmarked;      /* the last one; frames sent since */
    seq_t landmark_seq;
    uint32_t hint_next;
    struct sack_hint hint[SACK_HINTS];   /* where blocks ended */
    struct sack_block seen[SACK_BLOCKS]; /* of the last ACK that had any */
    /* RACK-TLP (RFC 8985) */
    uint64_t stamp_ns; /* of the last transmission */
    uint64_t rack_xmit_ns;
    seq_t rack_end;
    uint32_t rack_rtt_us;
    seq_t fack;              /* the highest sequence number that was delivered */
    struct sack_hint cursor; /* no frame up to it can become lost but by being sent again */
    uint64_t reorder_at;     /* of the ACK at hand: when a frame will be called lost, or NO_DEADLINE */
    seq_t dsack_round;       /* the reordering window grows once a round */
    uint8_t reo_mult, reo_persist;
    seq_t tlp_end;
    /* PRR (RFC 9937) and undo */
    uint32_t prr_delivered, prr_out, recover_fs;
    uint32_t prior_cwnd, prior_ssthresh; /* 0: nothing to go back to */
    seq_t undo_una;
    uint32_t undo_rtx;  /* retransmissions that no D-SACK has called needless, or UNDO_NONE_SENT */
    uint32_t rtx_ts;    /* our timestamp when recovery's first retransmission left (Eifel, RFC 3522) */
    uint32_t lost_told; /* `lost` when the last ACK had been processed */
    /* delivery rate (tcp_rate.c) and pacing */
    uint64_t delivered;                 /* bytes, since the record began */
    uint64_t lost;                      /* bytes ever marked lost */
    uint32_t delivered_at, first_tx_at; /* ticks: of the last delivery; of the first frame of the sample */
    uint64_t app_limited;               /* value of `delivered` at which the bubble ends; 0: limited by cwnd */
    uint32_t rate_bytes, rate_us;       /* the last delivery rate, as a fraction */
    uint32_t used_most;                 /* most that was in flight in this round, until used_end is acknowledged */
    seq_t used_end;
    uint32_t used_since, validated_ms; /* most since the window was used in full, and when that was */
    uint64_t pace_rate;                /* bytes a second; 0: not paced */
    uint64_t pace_at;                  /* earliest time of the next segment */
    uint8_t paused; /* the window was not used all the time since the congestion control was asked last */
    uint8_t pad[3];
    seq_t probe_seq;                        /* TX_PMTU_PROBE */
    uint64_t cc_state[BYPASS_CC_BYTES / 8]; /* the congestion control's own; zero when the record begins */
};
enum { FK_CC = 1, FK_RACK = 2, FK_PACE = 4, FK_PROBE = 8 };
enum { FRTO_OFF, FRTO_ON, FRTO_SEND, FRTO_WAIT }; /* after a timeout; send new data; its ACKs will tell */
enum { UNDO_NONE_SENT = 0xffffffffu };
enum { CA_OPEN, CA_DISORDER, CA_CWR, CA_RECOVERY, CA_LOSS }; /* in Linux' order, as TCP_INFO shows them */

enum {                /* meta.seg_flags beyond core.h's */
       SEG_LOST = 16, /* counts in lost_bytes; to be sent again */
       SEG_RTX = 32,  /* was sent more than once: no round trip from it (Karn) */
       SEG_PSH = 64,
       SEG_SACKED = 128,
       SEG_LANDMARK = 512, /* meta.skip is valid (tcp_sack.c) */
       SEG_MARKS = SEG_LOST | SEG_RTX | SEG_SACKED,
       SEG_APP_LIMITED = 256, /* sent while the program was the limit (tcp_rate.c) */
};

static inline struct tcp_flight *flight_at(const struct bypass_stack *s, uint32_t i)
{
    return pool_at(s, &core(s)->flights, i);
}
static inline struct tcp_flight *conn_flight(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return flight_at(s, c->flight); /* only while there is one */
}
static inline bool tcp_hint_ok(const struct tcp_conn *c, const struct sack_hint *h)
{
    return h->pkt != BYPASS_PKT_NONE && seq_geq(h->at, c->snd_una);
}
static inline bool has_flight(const struct tcp_conn *c) { return c->flight != NO_INDEX; }
/* The time of this transmission. The clock stands while a batch is processed; what is sent then has its order by a
 * nanosecond each (RFC 8985 6.2 asks which of two was sent later). */
static inline uint64_t tcp_stamp(const struct bypass_stack *s, const struct tcp_conn *c)
{
    struct tcp_flight *fl = conn_flight(s, c);
    fl->stamp_ns = max_u64(now_ns(s), fl->stamp_ns + 1);
    return fl->stamp_ns;
}
static inline uint64_t tcp_frame_age_us(const struct bypass_stack *s, const struct bypass_pkt_meta *m)
{
    return now_ns(s) > m->time_ns ? (now_ns(s) - m->time_ns) / 1000 : 0;
}

/* tcp_ack.c */
void tcp_flight_begin(struct bypass_stack *s, struct tcp_conn *c);
void tcp_flight_late(struct bypass_stack *s, struct tcp_conn *c); /* TX_LONE: the record is needed after all */
void tcp_flight_end(struct bypass_stack *s,
                    struct tcp_conn *c); /* nothing is in flight: frees it unless it is to be kept */
void tcp_flight_drop(struct bypass_stack *s, struct tcp_conn *c);

#endif
