/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_conn.h - a connection's memory, the protocol's own head, and who makes and ends connections: tcp_conn.c, tcp_tw.c.
 *
 * Hot state is four cache lines a connection, in a pool of its own; what only set-up, tear-down and introspection need
 * lies in a second pool at the same index (struct tcp_cold); what only data in flight needs is in tcp_flight.h.
 */
#ifndef BYPASS_STACK_TCP_CONN_H
#define BYPASS_STACK_TCP_CONN_H

#include "tcp_segment.h"
#include "wheel.h"

struct tcp_endpoint; /* tcp_listen.h */

enum {                     /* conn.flags */
       TF_TS = 1 << 0,     /* timestamps agreed (RFC 7323) */
       TF_WSCALE = 1 << 1, /* window scaling agreed */
       TF_NODELAY = 1 << 2,
       TF_CORK = 1 << 3,
       TF_FIN_QUEUED = 1 << 4, /* the program closed its direction */
       TF_FIN_SENT = 1 << 5,
       TF_FIN_LOST = 1 << 6,  /* to be sent again */
       TF_FIN_IN = 1 << 7,    /* the peer's FIN was taken in order */
       TF_FIN_AHEAD = 1 << 8, /* a FIN arrived ahead of missing data, at cold.fin_ahead */
       TF_ACK_NOW = 1 << 9,
       TF_ACK_LATER = 1 << 10, /* delayed */
       TF_RECOVERY = 1 << 11,  /* flight.ca_state is CA_RECOVERY, where that is not at hand */
       TF_LOSS = 1 << 12,      /* ... CA_LOSS */
       TF_BLOCKED = 1 << 13,   /* in the list of those that wait for a frame or a next hop */
       TF_WANT_OUT = 1 << 14,  /* the program was told there is no room */
       TF_RCV_SHUT = 1 << 15,  /* the program wants no more data */
       TF_PASSIVE = 1 << 16,   /* came from a listener */
       TF_KEEPALIVE = 1 << 17,
       TF_PUSH_ALL = 1 << 18,    /* send what is queued although it is less than a segment */
       TF_DEAD = 1 << 19,        /* closed by an error; only the handle keeps it */
       TF_PROBING = 1 << 20,     /* zero-window probes (RFC 9293 3.8.6.1) */
       TF_ACCEPTABLE = 1 << 21,  /* established, in its listener's queue */
       TF_SYN_RTX = 1 << 22,     /* a SYN was repeated: its round trip is ambiguous (Karn) */
       TF_MORE = 1 << 24,        /* MSG_MORE of the last send() */
       TF_ACK_BATCH = 1 << 25,   /* when the batch of received frames has been read */
       TF_BLOCKED_DST = 1 << 23, /* ... and it is a next hop that it waits for */
};

enum {                         /* conn.feat: what was agreed with the peer, and the marks of single mechanisms */
       TX_SACK = 1 << 0,       /* selective acknowledgments agreed (RFC 2018) */
       TX_ECN = 1 << 1,        /* ECN agreed (RFC 3168 6.1.1) */
       TX_ECE = 1 << 2,        /* receiver: ECE on every ACK until a CWR comes */
       TX_CWR = 1 << 3,        /* sender: CWR on the next new segment */
       TX_DSACK = 1 << 4,      /* the next ACK reports cold.dsack first (RFC 2883) */
       TX_SNDBUF_SET = 1 << 5, /* the program chose the size: no autotuning */
       TX_RCVBUF_SET = 1 << 6,
       TX_PACED = 1 << 7,        /* new segments leave at flight.pace_rate */
       TX_URG_OUT = 1 << 8,      /* urgent data up to cold.snd_up is not acknowledged */
       TX_URG_IN = 1 << 9,       /* cold.rcv_up is ahead of what was read */
       TX_FASTOPEN = 1 << 10,    /* data went with the SYN, or came with it (RFC 7413) */
       TX_PMTU_PROBE = 1 << 11,  /* a probe of packetization-layer discovery is in flight (RFC 4821) */
       TX_RCVLOWAT = 1 << 12,    /* cold.opt.rcvlowat is more than a byte */
       TX_NOTSENT = 1 << 13,     /* cold.opt.notsent_lowat limits what is queued */
       TX_FO_PENDING = 1 << 14,  /* data came with the SYN; the handshake's ACK did not come yet */
       TX_FO_ASK = 1 << 15,      /* our SYN or SYN-ACK carries the option of Fast Open */
       TX_PACE_WAIT = 1 << 16,   /* the next segment waits for flight.pace_at */
       TX_LENT = 1 << 17,        /* cold.rcv_lent */
       TX_LONE = 1 << 18,        /* what is in flight is one segment, sent by the short way without a record */
       TX_CC_LAZY = 1 << 19,     /* the congestion control wants to hear of no ACK but when the window limits */
       TX_ECN_EXACT = 1 << 20,   /* each mark is told by itself (RFC 8257 3.2) */
       TX_KEEP_FRAMES = 1 << 21, /* no copy break (sock_zc.c) */
       TX_PMTU_SEARCH = 1 << 22, /* packetization-layer discovery is at work */
       TX_FO_DEFER = 1 << 23,    /* the SYN waits for the first write */
       TX_FO_FIN = 1 << 24,      /* the program has closed a TX_FO_PENDING connection */
       TX_ANSWERS = 1 << 25,     /* data carries ACKs: they may wait for it (tcp_rcv.c: who talks) */
       TX_LISTENS = 1 << 26,     /* an ACK has waited in vain for data: what is read is acknowledged */
       TX_ACK_ALONE = 1 << 27,   /* ... one ACK has left without data since data left last */
       TX_ACKS_ALONE = 1 << 28,  /* ... several have */
       TX_SPARE = 1 << 29,       /* cold.spare: what came at rcv_nxt when memory was short */
};

enum {           /* conn.rtx_kind: what rtx_at stands for */
       RTX_NONE, /* decided by the state and TF_PROBING: retransmission, window probe, end of TIME_WAIT or FIN_WAIT_2 */
       RTX_REORDER, /* RACK: then what was not delivered counts as lost (RFC 8985 6.3) */
       RTX_TLP,     /* tail loss probe (RFC 8985 7) */
};

struct tcp_conn {
    /* line 0: who */
    uint32_t link; /* free list of the pool */
    uint32_t sock; /* handle entry, NO_INDEX: no program holds it */
    addr_t laddr, raddr;
    uint16_t lport, rport;
    uint32_t hash;
    struct dst_ref dst;
    uint8_t state; /* BYPASS_ESTABLISHED ... */
    uint8_t cc;    /* index of the congestion control */
    uint16_t queue;
    uint32_t flags;
    /* line 1: receiving */
    seq_t rcv_nxt;
    seq_t rcv_adv; /* right edge that we offered; never moves left */
    seq_t last_ack_sent;
    uint32_t ts_recent;
    uint32_t ts_recent_ms;
    uint32_t rcvq_head, rcvq_tail; /* items in order */
    uint32_t ooo;                  /* index of its struct tcp_ooo; NO_INDEX: nothing came ahead of rcv_nxt */
    uint32_t rcv_queued;           /* bytes to be read */
    uint32_t rcv_charged;          /* memory that received items hold */
    uint32_t rcvbuf;
    uint16_t rcv_mss;   /* largest segment seen: the unit of delayed ACK */
    uint8_t quick_acks; /* so many more ACKs without delay */
    uint8_t snd_wscale;
    uint8_t rcv_wscale;
    uint8_t rtx_count; /* timeouts in a row */
    uint8_t probes;    /* unanswered probes: window or keepalive */
    uint8_t backoff;   /* how often rto_us was doubled since the last valid round trip (RFC 6298 5.5) */
    uint16_t snd_mss;  /* payload bytes a segment, options subtracted */
    uint16_t syn_mss;  /* what the peer's MSS option allowed */
    /* line 2: sending */
    seq_t snd_una, snd_nxt, snd_wl1, snd_wl2;
    uint32_t snd_wnd, snd_wnd_max;
    uint32_t cwnd, ssthresh; /* bytes */
    uint32_t sndq_head;      /* first unacknowledged frame */
    uint32_t sndq_next;      /* first frame that was never sent */
    uint32_t sndq_tail;
    uint32_t snd_queued; /* bytes written and not acknowledged */
    uint32_t sndbuf;
    uint32_t lost_bytes; /* marked lost, not sent again yet */
    uint32_t flight;     /* index of its struct tcp_flight; NO_INDEX: nothing is in flight, and nothing was learned */
    uint32_t feat;       /* TX_* */
    uint16_t path_mtu;
    uint8_t rtx_kind; /* RTX_* */
    uint8_t pad;
    uint32_t min_rtt_us; /* smallest round trip of the last minutes; UINT32_MAX: none */
    /* line 3: time */
    struct wheel_node timer;
    uint64_t rtx_at;  /* retransmission, window probe, TIME_WAIT or FIN_WAIT_2 end; 0: off */
    uint64_t ack_at;  /* delayed ACK; 0: off */
    uint64_t keep_at; /* keepalive; 0: off */
    uint32_t srtt_us, rttvar_us, rto_us;
    uint32_t blocked_next;
};
static_assert(sizeof(struct tcp_conn) == 256, "hot state: four cache lines");
static_assert(offsetof(struct tcp_conn, rcv_nxt) == 64, "line 1");

/* What a program may set (sock_opt.c has the table): of an endpoint, and by one copy of the connections made from it. */
enum { /* tcp_options.bits */
       OPT_REUSEADDR = 1 << 0,
       OPT_REUSEPORT = 1 << 1,
       OPT_OOBINLINE = 1 << 2,
       OPT_BROADCAST = 1 << 3, /* means nothing to TCP; kept as Linux keeps it */
       OPT_FASTOPEN_CONNECT = 1 << 4,
};
struct tcp_options {
    uint8_t ttl, tos;     /* first: in the cache line of tcp_cold that each segment needs */
    uint8_t mtu_discover; /* as Linux numbers it */
    uint8_t ecn;          /* BYPASS_TCP_ECN */
    uint32_t max_pacing;  /* 0: no limit; bytes a second, from 2^31 on in units of 256 (tcp_pace_limit) */
    int32_t linger_s;     /* -1: off */
    uint32_t user_timeout_ms;
    uint32_t rcvlowat;
    uint32_t notsent_lowat; /* 0: no limit */
    uint16_t bits;          /* OPT_* */
    uint16_t maxseg;        /* 0: what the path allows */
    uint16_t keep_idle_s, keep_intvl_s;
    int16_t fin_wait_s; /* TCP_LINGER2: seconds in FIN_WAIT_2 without a program; -1: none at all */
    uint8_t keep_cnt;
    uint8_t syn_retries;
};
static_assert(sizeof(struct tcp_options) == 36, "in every connection's cold half");

struct tcp_cold { /* at its connection's index: the pool's free list is never used */
    /* line 0: what each segment needs */
    seq_t iss, irs;
    uint32_t ts_offset;
    int16_t error;          /* positive errno for the program */
    int16_t soft_error;     /* last ICMP error, the reason if the connection times out */
    uint64_t unacked_since; /* when the oldest data in flight began to wait; user timeout */
    uint64_t last_in;       /* when the last segment came */
    union {
        uint64_t syn_sent_ns; /* until it is established */
        struct {              /* of conn.min_rtt_us: that of this half of its window, 0: none; when that began */
            uint32_t min_rtt_half_us, min_rtt_since;
        };
    };
    /* counted for TCP_INFO; what can be told from sequence numbers is not */
    uint32_t segs_in, segs_out, data_segs_in, data_segs_out;
    uint16_t una_laps, nxt_laps; /* 2^31 bytes each, from iss to snd_una and from irs to rcv_nxt */
    struct tcp_options opt;
    /* the rest */
    seq_t fin_ahead;
    uint32_t retransmits;
    uint32_t listener, listener_gen;
    uint32_t accept_next;
    uint32_t tw_next; /* list of TIME_WAIT, oldest first */
    union {
        uint32_t tw_prev;
        uint32_t spare; /* TX_SPARE: a frame; before the peer's FIN, so never in TIME_WAIT */
    };
    uint32_t rtx_bytes;
    uint16_t timeouts;
    uint8_t urg_byte, urg_state;  /* URG_*: the last urgent byte that came, out of band */
    uint32_t challenge_ms;        /* when the last challenge ACK went; 0: none */
    uint32_t gen;                 /* counts uses of this slot: tells the program's handle from a reused one */
    seq_t dsack_first, dsack_end; /* TX_DSACK */
    seq_t snd_up, rcv_up;         /* urgent pointers */
    /* receive autotuning: the round trip as seen from here, and what the program read in one */
    uint32_t rcv_rtt_us;
    seq_t rcv_rtt_seq, space_seq;
    uint32_t rcv_rtt_at_us, space_at_us, space_bytes;
    /* packetization-layer path MTU discovery (RFC 4821), bytes of IP packet */
    uint16_t mtu_low, mtu_high;
    uint16_t mtu_probe; /* its size; when nothing is left to search: the second at which that was found */
    uint8_t mtu_state, mtu_fails;
    uint32_t rcv_lent; /* TX_LENT: bytes of buffer that the program holds by bypass_recv_zc() */
};
static_assert(sizeof(struct tcp_cold) <= 192, "three cache lines");
static_assert(offsetof(struct tcp_cold, opt.ecn) == 63, "line 0");

enum { TCP_PORT_BUCKETS = 256, TCP_PORT_CLOCKS = 1024 };
enum { SYNACK_RETRIES = 5 };
struct tcp {            /* in core.tcp_state's place: the protocol's own head */
    uint64_t table_off; /* flow table: struct flow_slot[table_mask + 1] */
    uint32_t table_mask;
    uint32_t blocked_head[2]; /* waiting for a frame or the device; for a next hop */
    uint64_t blocked_since;   /* the first list was not empty after a poll since then; 0: it was */
    uint32_t tw_head, tw_tail, tw_count;
    uint32_t challenge_tokens;
    uint32_t ooo_hand;   /* whose data out of order was thrown away last */
    uint32_t resume_all; /* a next hop was answered */
    uint64_t challenge_ns;
    uint64_t req_due; /* no request's time comes before; NO_DEADLINE: there is none */
    uint32_t req_head[SYNACK_RETRIES + 1], req_tail[SYNACK_RETRIES + 1];
    uint64_t cookie_key[2][2]; /* by the parity of cookie_period */
    uint64_t cookie_period;    /* in which cookie_key was last renewed */
    uint32_t ports[TCP_PORT_BUCKETS];
    uint32_t port_clock[TCP_PORT_CLOCKS]; /* RFC 6056 3.3.4 */
    uint32_t cc_count;                    /* algorithms that the program added: their names */
    uint32_t cc_default;
    char cc_names[BYPASS_CC_MAX][BYPASS_CC_NAME];
    struct wheel wheel;
};
struct flow_slot {
    uint32_t hash, idx; /* idx NO_INDEX+1 == 0 means empty: stored as index + 1 */
};

static inline struct tcp *tcp_head(const struct bypass_stack *s) { return at(s, core(s)->tcp_state[0]); }
static inline struct flow_slot *flow_table(const struct bypass_stack *s) { return at(s, tcp_head(s)->table_off); }
static inline struct tcp_conn *conn_at(const struct bypass_stack *s, uint32_t i)
{
    return (struct tcp_conn *)at(s, core(s)->conns.off) + i;
}
static inline struct tcp_cold *cold_at(const struct bypass_stack *s, uint32_t i)
{
    return (struct tcp_cold *)at(s, core(s)->colds.off) + i;
}
static inline uint32_t conn_index(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return (uint32_t)(c - conn_at(s, 0)); /* the entry's size is known here: a shift, no division */
}
static inline struct tcp_cold *conn_cold(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return cold_at(s, conn_index(s, c));
}
/* Nothing can be read or written yet. */
static inline bool tcp_opening(const struct tcp_conn *c)
{
    return c->state == BYPASS_SYN_SENT || (c->state == BYPASS_SYN_RECEIVED && !(c->feat & TX_FO_PENDING));
}
static inline uint32_t conn_now_ms(const struct bypass_stack *s) { return core(s)->now_ms; }
/* Half laps of a sequence number: the lowest bit is the distance's highest, so that a lap is noticed whenever this runs
 * once in 2^31 bytes. */
static inline uint16_t seq_laps(uint16_t laps, seq_t at, seq_t from)
{
    return (uint16_t)(laps + (((at.v - from.v) >> 31 ^ laps) & 1));
}
/* A segment of this connection came in. */
static inline void conn_count_in(const struct bypass_stack *s, const struct tcp_conn *c, struct tcp_cold *k,
                                 uint32_t len)
{
    k->last_in = now_ns(s);
    k->segs_in++;
    k->data_segs_in += len > 0;
    k->una_laps = seq_laps(k->una_laps, c->snd_una, k->iss);
    k->nxt_laps = seq_laps(k->nxt_laps, c->rcv_nxt, k->irs);
}

/* tcp_conn.c */
void tcp_init(struct bypass_stack *s);
void tcp_destroy(struct bypass_stack *s);
void tcp_audit(const struct bypass_stack *s, struct bypass_audit *a);
uint32_t flow_hash(const struct bypass_stack *s, const addr_t *laddr, const addr_t *raddr, uint16_t lport,
                   uint16_t rport);
struct tcp_conn *conn_find(const struct bypass_stack *s, uint32_t hash, const addr_t *laddr, const addr_t *raddr,
                           uint16_t lport, uint16_t rport);
/* A connection in CLOSED, in the flow table, with the endpoint's options; NULL when the pool is empty
 * even after the oldest TIME_WAIT made room. */
struct tcp_conn *conn_new(struct bypass_stack *s, const struct tcp_endpoint *ep, const addr_t *laddr, uint16_t lport,
                          const addr_t *raddr, uint16_t rport);
void conn_begin(struct bypass_stack *s, struct tcp_conn *c); /* data may be sent and received from now on */
void conn_established(struct bypass_stack *s, struct tcp_conn *c);
/* Frees queues and timers, leaves table and pool unless a handle still holds it (then it stays DEAD). */
void conn_drop(struct bypass_stack *s, struct tcp_conn *c, int err);
void conn_reset(struct bypass_stack *s, struct tcp_conn *c, int err); /* sends RST, then drops */
bool conn_fin_wait(struct bypass_stack *s, struct tcp_conn *c);
void conn_close_late(struct bypass_stack *s, struct tcp_conn *c);
void conn_event(struct bypass_stack *s, struct tcp_conn *c, uint32_t mask);
/* Tries again at the next poll (no frame, device busy) or when a next hop was answered. */
void conn_blocked(struct bypass_stack *s, struct tcp_conn *c, bool next_hop);
void conn_ack_batch(struct bypass_stack *s, struct tcp_conn *c); /* one ACK when this batch of frames is read */
void conn_update_mss(struct bypass_stack *s, struct tcp_conn *c, uint16_t mtu);
uint32_t tcp_ts_now(const struct bypass_stack *s, const struct tcp_conn *c);
struct flow_isn {
    seq_t iss;
    uint32_t ts_offset;
};
struct flow_isn tcp_flow_isn(const struct bypass_stack *s, const addr_t *laddr, uint16_t lport, const addr_t *raddr,
                             uint16_t rport);
bool conn_available(const struct bypass_stack *s); /* conn_new() would succeed */
uint32_t conn_port_count(const struct bypass_stack *s, uint16_t port);

/* tcp_tw.c */
void conn_time_wait(struct bypass_stack *s, struct tcp_conn *c);
void tcp_tw_unlink(struct bypass_stack *s, struct tcp_conn *c);
uint32_t tcp_tw_oldest(const struct bypass_stack *s); /* that no program holds; NO_INDEX: none */
bool tcp_tw_drop_oldest(struct bypass_stack *s);
bool tcp_tw_replaced_by(const struct tcp_conn *c, const struct segment *syn);
bool tcp_tw_reusable(const struct bypass_stack *s, const struct tcp_conn *c); /* connect() may take its place */
void tcp_tw_reuse(struct bypass_stack *s, struct tcp_conn *c);                /* it does: c is gone */

#endif
