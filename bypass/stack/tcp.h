/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp.h - a TCP connection's memory, and the seams between the tcp_*.c files:
 *
 *   tcp_fast.c      the short way of the usual segment
 *   tcp_in.c        a segment arrives: RFC 9293 3.10.7, in its order
 *   tcp_opt.c       options, both ways
 *   tcp_ack.c       what an acknowledgment does: window, round trip (RFC 6298); the common case in full
 *   tcp_sack.c      the scoreboard: what the peer has, what is lost, what was sent again (RFC 2018, 2883)
 *   tcp_rack.c      which frames are lost, and the tail loss probe (RFC 8985)
 *   tcp_recover.c   states of recovery, its window (RFC 9937), its end, its undoing (RFC 5682, 3522, 3708); NewReno
 *   tcp_cc.c        congestion control: the table of algorithms, and when which of their functions is called
 *   tcp_rate.c      how fast data was delivered (delivery rate estimation)
 *   tcp_pace.c      pacing
 *   tcp_ecn.c       explicit congestion notification (RFC 3168)
 *   tcp_rcv.c       received bytes: in order, the window we offer
 *   tcp_ooo.c       ... and those ahead of it; tcp_item.h: what holds them
 *   tcp_sack_rcv.c  the SACK blocks that our ACKs carry (RFC 2018, RFC 2883)
 *   tcp_urg.c       urgent data
 *   tcp_snd.c       written bytes: the send queue
 *   tcp_tune.c      how large buffers grow, and what happens when memory is short
 *   tcp_out.c       which segment goes out now, and its header
 *   tcp_timer.c     what time alone causes
 *   tcp_conn.c      connections: table, open, close
 *   tcp_listen.c    endpoints that are not connected: bind, listen, accept
 *   tcp_port.c      their names: bind conflicts, which port, which listener
 *   tcp_req.c       half-open connections: a SYN that was answered, until its ACK comes
 *   tcp_tw.c        TIME_WAIT: how long, how many, who may take its place
 *   tcp_cookie.c    SYN cookies: not even that is kept
 *   tcp_fastopen.c  data in the SYN (RFC 7413)
 *   tcp_info.c      what a connection tells of itself (TCP_INFO)
 *   inspect.c       the same, to a tool that reads an arena which may hold anything
 *   sock_zc.c       payload that is not copied
 *   sock_opt.c      what a program may set: one table
 *
 * Hot state is four cache lines a connection, in a pool of its own; what only set-up, tear-down and
 * introspection need lies in a second pool at the same index (struct tcp_cold).
 */
#ifndef BYPASS_STACK_TCP_H
#define BYPASS_STACK_TCP_H

#include "core.h"
#include "wheel.h"

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

/* What only a connection with data in flight needs, or one whose loss recovery or congestion control has
 * learned something (keep). From a pool whose entries go round last in, first out, so that a million idle
 * connections hold none, and those with a request in flight share a few that stay in the cache. Rules:
 * tcp_flight_begin() before the first byte leaves; from then until snd_una == snd_nxt the record exists;
 * tcp_flight_end() lets go of it unless `keep` is set. */
enum { SACK_BLOCKS = 4, SACK_HINTS = 4 };
struct sack_block {
    seq_t first, end; /* received: first..end-1 */
};
struct frame_list { /* by meta.prev and meta.after */
    uint32_t head, tail;
};
struct sack_hint { /* a frame of the send queue: it is there as long as `at` is not acknowledged (tcp_hint_ok) */
    uint32_t pkt;
    seq_t at; /* its sequence number */
};
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
    uint32_t tw_next, tw_prev; /* list of TIME_WAIT, oldest first */
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

/* An endpoint that is not connected: fresh, bound, or listening. */
struct tcp_endpoint {
    uint32_t link;
    uint32_t sock;
    addr_t addr;
    uint16_t port; /* 0: not bound */
    uint8_t listening;
    uint8_t used;
    uint32_t gen;
    uint32_t hash_next;
    uint32_t backlog, accept_count, syn_count;
    uint64_t cookie_ns; /* when the last SYN cookie went out for it; 0: none did */
    uint32_t accept_head, accept_tail;
    /* options that connections inherit */
    uint32_t sndbuf, rcvbuf, flags, feat;
    struct tcp_options opt;
    int16_t error; /* of the connection that it was, positive errno */
    uint8_t cc;    /* index of the congestion control */
    uint8_t pad[3];
    uint16_t fo_max;                /* TCP_FASTOPEN: connections before the end of their handshake; 0: off */
    uint16_t fo_pending, fo_resets; /* there are so many; so many were reset, */
    uint64_t fo_resets_end;         /* and count until then */
};

enum { TCP_PORT_BUCKETS = 256, TCP_PORT_CLOCKS = 1024 };

/* A SYN that was answered, and nothing more: what a flood of SYNs costs is this, and at most max_syn_backlog of it.
 * The ACK that ends the handshake makes it a connection. */
enum { REQ_TS = 1, REQ_WSCALE = 2, REQ_SACK = 4, REQ_ECN = 8, REQ_USED = 16 };
struct tcp_req {
    uint32_t link; /* in use: next in its bucket, index plus one */
    addr_t laddr, raddr;
    uint16_t lport, rport;
    uint32_t hash;
    uint32_t listener;
    uint32_t prev, next; /* list of those whose SYN-ACK went equally often: all wait equally long, so it is in order */
    seq_t iss, irs;
    uint32_t ts_recent;
    uint32_t challenge_ms;    /* when the last challenge ACK went; 0: none did */
    uint64_t sent_ns;         /* the last SYN-ACK */
    uint16_t mss, wnd, queue; /* of the SYN; mss 0: it had none */
    uint8_t flags, wscale, tries;
    uint8_t rcv_wscale;
    uint8_t mac[6]; /* that the SYN came from; zero: not known */
};
static_assert(sizeof(struct tcp_req) == 96, "a cache line and a half");
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
static inline struct tcp_endpoint *endpoint_at(const struct bypass_stack *s, uint32_t i)
{
    return pool_at(s, &core(s)->listeners, i);
}
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
/* Nothing can be read or written yet. */
static inline bool tcp_opening(const struct tcp_conn *c)
{
    return c->state == BYPASS_SYN_SENT || (c->state == BYPASS_SYN_RECEIVED && !(c->feat & TX_FO_PENDING));
}
static inline bool has_flight(const struct tcp_conn *c) { return c->flight != NO_INDEX; }
static inline struct tcp_req *req_at(const struct bypass_stack *s, uint32_t i) { return pool_at(s, &core(s)->reqs, i); }
static inline uint32_t endpoint_index(const struct bypass_stack *s, const struct tcp_endpoint *ep)
{
    return (uint32_t)(ep - endpoint_at(s, 0));
}
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

/* ---- A segment, parsed (host order) --------------------------------------------------------------- */
enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_PSH = 8, TCP_ACK = 16, TCP_URG = 32, TCP_ECE = 64, TCP_CWR = 128 };
enum { TCP_HDR = 20, TCP_OPTS_MAX = 40, TCP_TS_BYTES = 12, TCP_MIN_MSS = 48, TCP_DEFAULT_MSS = 536 };
enum { TCP_TS_PREFIX = 0x0a080101 }; /* NOP NOP, timestamps, 10 bytes (RFC 7323 appendix A), as it lies in memory */

enum { FO_COOKIE_MAX = 16 };
struct tcp_opts {
    uint16_t mss; /* 0: absent */
    uint8_t wscale;
    bool has_wscale, has_ts;
    uint32_t ts_val, ts_ecr;
    bool sack_ok;  /* SACK-permitted */
    bool has_fo;   /* Fast Open: cookie_len 0 asks for one (RFC 7413 4.1.1) */
    uint8_t sacks; /* blocks in sack[] */
    uint8_t cookie_len;
    struct sack_block sack[SACK_BLOCKS];
    uint8_t cookie[FO_COOKIE_MAX];
};
struct segment {
    const struct rx_info *ri;
    bypass_pkt pkt; /* BYPASS_PKT_NONE once it was kept or freed */
    uint16_t src_port, dst_port;
    seq_t seq, ack;
    uint32_t wnd;      /* as on the wire, not scaled */
    uint32_t len;      /* payload bytes */
    uint16_t data_off; /* from meta.off */
    uint8_t flags;
    uint16_t urg; /* urgent pointer */
    bool follows; /* a SYN that replaces a connection in TIME_WAIT, which had sent up to old_snd_nxt */
    seq_t old_snd_nxt;
    uint32_t hash;
    struct tcp_opts opt;
};
/* Sequence space it takes: payload, SYN, FIN. */
static inline uint32_t seg_len(const struct segment *g)
{
    return g->len + !!(g->flags & TCP_SYN) + !!(g->flags & TCP_FIN);
}

/* tcp_opt.c. false: malformed. */
bool tcp_opt_parse(const uint8_t *p, uint32_t len, struct tcp_opts *out);
bool tcp_opt_parse_ts(const uint8_t *p, uint32_t len, struct tcp_opts *out); /* the common layout only */
/* Writes what `o` holds (MSS always), padded to a multiple of four; at most 40 bytes. Returns their number. */
uint32_t tcp_opt_write_syn(uint8_t *p, const struct tcp_opts *o);
uint32_t tcp_opt_write_ts(uint8_t *p, uint32_t val, uint32_t ecr);
/* As many of the blocks as `room` bytes hold; 0: none. */
uint32_t tcp_opt_write_sack(uint8_t *p, uint32_t room, const struct sack_block *b, uint32_t n);

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

/* tcp_fast.c */
struct rx_flow {
    uint32_t hash; /* of the flow, when plain */
    uint32_t idx;  /* of its connection, if it stands where it should: plus one; a guess, for prefetching */
    bool plain;    /* a TCP segment in an IPv4 packet without options */
};
void tcp_fast_prefetch(struct bypass_stack *s, const bypass_pkt *pkts, struct rx_flow *flows, int n);
void tcp_fast_prefetch_conn(const struct bypass_stack *s, struct rx_flow *f);
static inline void tcp_fast_prefetch_handle(const struct bypass_stack *s, const struct rx_flow *f)
{
    if (f->idx != 0 && conn_at(s, f->idx - 1)->sock != NO_INDEX)
        __builtin_prefetch(sock_at(s, conn_at(s, f->idx - 1)->sock));
}
/* How many of the n frames it took: those of one connection that follow each other go together. 0: the first one is
 * unusual, nothing was done. */
int tcp_fast_in(struct bypass_stack *s, const bypass_pkt *pkts, const struct rx_flow *flows, int n);
/* Sends n bytes in one segment when nothing stands before them; 0: the long way, nothing was done. */
int64_t tcp_fast_send(struct bypass_stack *s, struct tcp_conn *c, const void *buf, size_t n);
void tcp_fast_burst(struct bypass_stack *s, struct tcp_conn *c, const struct dst *d); /* new full segments */

uint32_t conn_port_count(const struct bypass_stack *s, uint16_t port);

/* tcp_tw.c */
void conn_time_wait(struct bypass_stack *s, struct tcp_conn *c);
void tcp_tw_unlink(struct bypass_stack *s, struct tcp_conn *c);
uint32_t tcp_tw_oldest(const struct bypass_stack *s); /* that no program holds; NO_INDEX: none */
bool tcp_tw_drop_oldest(struct bypass_stack *s);
bool tcp_tw_replaced_by(const struct tcp_conn *c, const struct segment *syn);
bool tcp_tw_reusable(const struct bypass_stack *s, const struct tcp_conn *c); /* connect() may take its place */
void tcp_tw_reuse(struct bypass_stack *s, struct tcp_conn *c);                /* it does: c is gone */

/* tcp_port.c */
bool tcp_port_taken(const struct bypass_stack *s, const struct tcp_endpoint *self, const addr_t *addr, uint16_t port);
void tcp_port_take(struct bypass_stack *s, struct tcp_endpoint *ep, uint16_t port); /* ep->addr is set */
void tcp_port_release(struct bypass_stack *s, struct tcp_endpoint *ep);
uint16_t tcp_port_choose(struct bypass_stack *s, const addr_t *laddr, const struct bypass_endpoint *peer); /* 0: none */
/* Who listens there. hash: of the flow, which chooses among those that share a port (SO_REUSEPORT). */
struct tcp_endpoint *endpoint_find(const struct bypass_stack *s, const addr_t *addr, uint16_t port, uint32_t hash);

/* tcp_listen.c */
void tcp_take_syn(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g); /* peer's SYN: names, options */
struct tcp_conn *tcp_listen_in(struct bypass_stack *s, struct tcp_endpoint *ep, struct segment *g);
bool tcp_accept_full(const struct tcp_endpoint *ep);                /* holds backlog + 1, as Linux' */
bool tcp_listen_ready(struct bypass_stack *s, struct tcp_conn *c);  /* the handshake ended; false: queue full */
void tcp_listen_forget(struct bypass_stack *s, struct tcp_conn *c); /* c dies before it was accepted */

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

/* tcp_req.c */
void tcp_req_layout(struct layout *l, struct core *c);
void tcp_req_init(struct bypass_stack *s);
struct tcp_req *tcp_req_find(const struct bypass_stack *s, const struct segment *g);
/* Answers a SYN and keeps a request. false: there is no room. */
bool tcp_req_new(struct bypass_stack *s, struct tcp_endpoint *ep, const struct segment *g);
/* A segment for a request. The connection that it has become, in SYN_RECEIVED, for which the segment is then to be
 * processed, or NULL. */
struct tcp_conn *tcp_req_in(struct bypass_stack *s, struct tcp_req *r, const struct segment *g);
/* A connection in SYN_RECEIVED out of what a SYN said, our answer to it having been iss. NULL: no room. */
struct tcp_conn *tcp_req_promote(struct bypass_stack *s, struct tcp_endpoint *ep, const struct segment *syn, seq_t iss);
seq_t tcp_req_iss(const struct bypass_stack *s, const struct segment *syn); /* our first number to answer it */
void tcp_req_icmp(struct bypass_stack *s, const struct icmp_error *e, uint32_t hash);
void tcp_req_reset_all(struct bypass_stack *s, struct tcp_endpoint *ep); /* the listener goes */
void tcp_req_timers(struct bypass_stack *s);
bool tcp_req_info(const struct bypass_stack *s, uint32_t i, struct bypass_tcp_info *out); /* false: i is not in use */
static inline bool tcp_req_due(const struct bypass_stack *s) { return unlikely(now_ns(s) >= tcp_head(s)->req_due); }
static inline uint32_t tcp_syn_window(uint32_t rcvbuf) { return min_u32(rcvbuf, 65535); } /* RFC 7323 2.2: not scaled */
/* tcp_cookie.c */
void tcp_cookie_init(struct bypass_stack *s);
void tcp_cookie_send(struct bypass_stack *s, struct tcp_endpoint *ep, const struct segment *g);
/* An ACK that might bring a cookie back: the connection that it makes, in SYN_RECEIVED, or NULL: *good tells whether it
 * was one. */
struct tcp_conn *tcp_cookie_in(struct bypass_stack *s, struct tcp_endpoint *ep, const struct segment *g, bool *good);

/* tcp_fastopen.c */
void tcp_fastopen_layout(struct layout *l, struct core *c);
/* A SYN with a good cookie has become a connection. false: it is to be treated as if it had no data. */
bool tcp_fastopen_syn_in(struct bypass_stack *s, struct tcp_endpoint *ep, struct segment *g);
void tcp_fastopen_offer(struct bypass_stack *s, struct tcp_endpoint *ep, const struct segment *g, struct tcp_opts *o);
void tcp_fastopen_done(struct bypass_stack *s, struct tcp_conn *c);  /* TX_FO_PENDING ends */
void tcp_fastopen_reset(struct bypass_stack *s, struct tcp_conn *c); /* ... by a reset: before conn_drop() */
/* Sends the SYN, with as much of the data as may go. Its bytes; -EINPROGRESS: none */
int64_t tcp_fastopen_connect(struct bypass_stack *s, struct tcp_conn *c, const void *buf, size_t n);
int tcp_fastopen_defer(struct bypass_stack *s, struct tcp_conn *c); /* 0: TX_FO_DEFER, or -EINPROGRESS */
int64_t tcp_fastopen_first_write(struct bypass_stack *s, struct tcp_conn *c, const void *buf, size_t n);
uint32_t tcp_fastopen_syn_out(struct bypass_stack *s, struct tcp_conn *c, struct tcp_opts *o, bypass_pkt p,
                              uint32_t *sum);
void tcp_fastopen_syn_ack_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g); /* TX_FO_ASK */
void tcp_fastopen_crossed(struct bypass_stack *s, struct tcp_conn *c); /* TX_FO_ASK, and the peer's SYN came */

/* tcp_ack.c */
bool tcp_ack_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g); /* false: drop the segment */
void tcp_ack_lone(struct bypass_stack *s, struct tcp_conn *c, uint32_t wnd); /* TX_LONE: the segment has arrived */
void tcp_rtt_sample(struct tcp_conn *c, uint64_t rtt_us);
uint32_t tcp_pipe(const struct bypass_stack *s, const struct tcp_conn *c); /* bytes thought to be in the network */
void tcp_flight_begin(struct bypass_stack *s, struct tcp_conn *c);
void tcp_flight_late(struct bypass_stack *s, struct tcp_conn *c); /* TX_LONE: the record is needed after all */
void tcp_flight_end(struct bypass_stack *s,
                    struct tcp_conn *c); /* nothing is in flight: frees it unless it is to be kept */
void tcp_flight_drop(struct bypass_stack *s, struct tcp_conn *c);

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

/* tcp_rate.c. A tick is 1024 ns; counts modulo 2^32. */
bool tcp_cc_exact_ecn(const struct bypass_stack *s, uint8_t cc);                /* index */
bool tcp_cc_own_window(const struct bypass_stack *s, const struct tcp_conn *c); /* also in recovery (BBR) */
void tcp_cc_sent(struct bypass_stack *s, struct tcp_conn *c); /* new data went out: was the window used? (RFC 7661) */
bool tcp_cc_complete(const struct bypass_stack *s);           /* this process knows all that the arena names */
int tcp_cc_set(struct bypass_stack *s, struct tcp_endpoint *ep, struct tcp_conn *c, const char *name); /* ep or c */
int tcp_cc_get(const struct bypass_stack *s, uint8_t cc, char *out, size_t n);
uint32_t tcp_initial_window(const struct tcp_conn *c); /* bytes, RFC 6928 */

/* tcp_ooo.c */
enum { OOO_RANGES_MAX = 512, OOO_SEARCH_MAX = 64 };
struct tcp_range {
    uint32_t link, prev; /* in order of sequence numbers */
    seq_t first, end;    /* first..end-1 */
    uint32_t head, tail; /* items */
};
struct tcp_ooo {
    uint32_t link;
    uint32_t conn;        /* NO_INDEX: the record is free */
    uint32_t first, last; /* ranges */
    uint32_t hint;        /* where an insertion was that was not at the end; NO_INDEX: nowhere */
    uint32_t ranges;
    uint32_t recents, recent[SACK_BLOCKS]; /* ranges that changed last, the latest first */
};
struct tcp_ooo *tcp_ooo_of(const struct bypass_stack *s, const struct tcp_conn *c); /* only while c->ooo is one */
struct tcp_range *tcp_ooo_range(const struct bypass_stack *s, uint32_t i);
void tcp_ooo_insert(struct bypass_stack *s, struct tcp_conn *c, uint32_t item);
uint32_t tcp_ooo_fill(struct bypass_stack *s, struct tcp_conn *c, const uint8_t *data, uint32_t len, seq_t first);
bool tcp_ooo_collect(struct bypass_stack *s, struct tcp_conn *c);
void tcp_ooo_prune(struct bypass_stack *s, struct tcp_conn *c);
bool tcp_ooo_prune_any(struct bypass_stack *s); /* of some connection; false: none was found */
void tcp_ooo_clear(struct bypass_stack *s, struct tcp_conn *c);

/* tcp_sack_rcv.c */
void tcp_sack_duplicate(struct bypass_stack *s, struct tcp_conn *c, seq_t first, seq_t end);
void tcp_sack_old(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g);
uint32_t tcp_sack_write(struct bypass_stack *s, struct tcp_conn *c, uint8_t *opt, uint32_t room);
/* Headers of this connection carry more than an ACK, a window and timestamps. */
static inline bool tcp_header_special(const struct tcp_conn *c)
{
    return c->ooo != NO_INDEX || (c->feat & (TX_DSACK | TX_URG_OUT));
}
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

/* tcp_urg.c */
enum {
    URG_NONE,
    URG_AHEAD,
    URG_HERE,
    URG_TAKEN
}; /* cold.urg_state: no mark, its byte is to come, waits, was fetched */
void tcp_urg_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g);
size_t tcp_urg_limit(struct bypass_stack *s, struct tcp_conn *c, size_t n, bool peek, uint32_t *skip);
void tcp_urg_after_read(struct bypass_stack *s, struct tcp_conn *c);
int64_t tcp_urg_recv(struct bypass_stack *s, struct tcp_conn *c, void *buf, size_t n, int flags);
bool tcp_urg_at_mark(const struct bypass_stack *s, const struct tcp_conn *c);
bool tcp_urg_ready(const struct bypass_stack *s, const struct tcp_conn *c);
uint32_t tcp_urg_hidden(const struct bypass_stack *s, const struct tcp_conn *c);
void tcp_urg_mark(struct bypass_stack *s, struct tcp_conn *c);
uint16_t tcp_urg_pointer(struct bypass_stack *s, struct tcp_conn *c, seq_t at);

/* tcp_tune.c */
enum { WORTH_TUNING = TCP_DEFAULT_MSS };                         /* shorter segments and reads are no bulk transfer */
void tcp_tune_begin(struct bypass_stack *s, struct tcp_conn *c); /* established */
void tcp_tune_rtt(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g);
void tcp_tune_read(struct bypass_stack *s, struct tcp_conn *c);
void tcp_tune_write(struct bypass_stack *s, struct tcp_conn *c);
bool tcp_tune_reclaim(struct bypass_stack *s, struct tcp_conn *c);
/* RFC 7323 2.3: from the largest buffer that there may be, for it cannot change later. */
uint8_t tcp_tune_wscale(const struct bypass_stack *s, uint32_t rcvbuf, uint32_t feat);
/* Little memory is left: windows open by a few segments only, no new connection is taken. */
static inline bool tcp_tune_pressure(const struct bypass_stack *s)
{
    const struct pool *p = &core(s)->chunks;
    return unlikely(s->dev->free_frames < s->dev->frames / 4) && p->used > p->cap - p->cap / 4;
}

/* tcp_rcv.c */
void tcp_rcv_small(struct bypass_stack *s, struct tcp_conn *c, struct segment *g); /* the usual request */
/* n frames of full segments in order; meta.data_off and data_len are set. `len`: the largest one's payload. */
void tcp_rcv_train(struct bypass_stack *s, struct tcp_conn *c, const struct segment *first, const bypass_pkt *pkts,
                   int n, uint32_t len);
void tcp_rcv_data(struct bypass_stack *s, struct tcp_conn *c, struct segment *g); /* payload and FIN */
uint32_t tcp_rcv_window(const struct bypass_stack *s,
                        struct tcp_conn *c); /* bytes to offer; never less than was offered */
/* Enough is there to tell the program (SO_RCVLOWAT). */
static inline bool tcp_readable(const struct bypass_stack *s, const struct tcp_conn *c)
{
    if (unlikely(c->feat & TX_URG_IN) && c->rcv_queued <= tcp_urg_hidden(s, c))
        return false;
    if (unlikely(c->feat & TX_RCVLOWAT)) /* no more than the buffer is sure to hold */
        return c->rcv_queued >= min_u32(conn_cold(s, c)->opt.rcvlowat, c->rcvbuf / 2);
    return c->rcv_queued > 0;
}
void tcp_rcv_window_update(struct bypass_stack *s, struct tcp_conn *c); /* something was read */
void tcp_ack_due(struct bypass_stack *s, struct tcp_conn *c);           /* the delay of an ACK has passed */
void tcp_ack_carried(struct tcp_conn *c);
static inline void tcp_data_out(struct tcp_conn *c) /* data leaves, and with it what is to be acknowledged */
{
    uint32_t known = c->feat & (TX_ANSWERS | TX_LISTENS);
    if (unlikely(known != TX_ANSWERS && (known || (c->flags & TF_ACK_LATER))))
        tcp_ack_carried(c);
}
int64_t tcp_recv(struct bypass_stack *s, struct tcp_conn *c, void *buf, size_t n, int flags);
void tcp_rcv_after_read(struct bypass_stack *s, struct tcp_conn *c, bool bulk); /* bulk: much had been queued */
/* The first item leaves the queue; it stays charged. */
uint32_t tcp_rcv_take(struct bypass_stack *s, struct tcp_conn *c);
void tcp_rcv_skip(struct bypass_stack *s, struct tcp_conn *c, uint32_t n); /* n <= rcv_queued bytes are passed over */
void tcp_rcv_discard(struct bypass_stack *s, struct tcp_conn *c);          /* what waits to be read */
void tcp_rcv_clear(struct bypass_stack *s, struct tcp_conn *c);
/* Items head..tail with `len` bytes from rcv_nxt on become readable. */
void tcp_rcv_append(struct bypass_stack *s, struct tcp_conn *c, uint32_t head, uint32_t tail, uint32_t len);

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
enum {                /* meta.seg_flags beyond core.h's */
       SEG_LOST = 16, /* counts in lost_bytes; to be sent again */
       SEG_RTX = 32,  /* was sent more than once: no round trip from it (Karn) */
       SEG_PSH = 64,
       SEG_SACKED = 128,
       SEG_LANDMARK = 512, /* meta.skip is valid (tcp_sack.c) */
       SEG_MARKS = SEG_LOST | SEG_RTX | SEG_SACKED,
       SEG_APP_LIMITED = 256, /* sent while the program was the limit (tcp_rate.c) */
};

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

/* tcp_info.c: what is told of a connection, from wherever its parts lie (inspect.c has copies). */
struct tcp_told {
    const struct tcp_conn *c;
    const struct tcp_cold *k;
    const struct tcp_flight *fl;             /* NULL: it has none */
    uint16_t mtu;                            /* of the device */
    uint32_t unacked, sacked, lost, retrans; /* segments of the send queue */
};
void tcp_info_fill(const struct tcp_told *t, struct bypass_tcp_info *out);

/* sock_opt.c */
void tcp_options_default(struct tcp_endpoint *ep, const struct bypass_config *cfg);
void tcp_options_inherit(struct tcp_conn *c, struct tcp_cold *k, const struct tcp_endpoint *ep);
void tcp_options_return(struct tcp_endpoint *ep, const struct tcp_conn *c, const struct tcp_cold *k); /* disconnected */

/* Public calls on a TCP object by sock.c */
int tcp_create(struct bypass_stack *s, uint32_t *idx);
int tcp_bind(struct bypass_stack *s, uint32_t idx, const struct bypass_endpoint *local);
int tcp_listen(struct bypass_stack *s, uint32_t idx, int backlog);
void tcp_unlisten(struct bypass_stack *s, uint32_t idx, int bound); /* back to what BOUND_* says */
/* A bound endpoint for what was a connection, with its options. -ENFILE. port 0: not bound. */
int tcp_recreate(struct bypass_stack *s, uint32_t *idx, const struct tcp_conn *c, const addr_t *addr, uint16_t port);
int64_t tcp_accept(struct bypass_stack *s, uint32_t idx); /* connection index or -errno */
int64_t tcp_connect(struct bypass_stack *s, uint32_t idx, const struct bypass_endpoint *peer);
void tcp_shutdown(struct bypass_stack *s, struct tcp_conn *c, int how);
void tcp_close(struct bypass_stack *s, struct tcp_conn *c);
void tcp_endpoint_close(struct bypass_stack *s, uint32_t idx);
int tcp_conn_ready(const struct bypass_stack *s, const struct tcp_conn *c);
/* Over, as a program sees it: on Linux the socket of a connection in TIME_WAIT is closed. */
static inline bool conn_over(const struct tcp_conn *c) { return (c->flags & TF_DEAD) || c->state == BYPASS_TIME_WAIT; }
int tcp_listen_users(struct bypass_stack *s, const addr_t *addr, uint16_t port);
int tcp_port_users(struct bypass_stack *s, const addr_t *addr, uint16_t port);

/* sock.c, poll.c */
void sock_destroy(struct bypass_stack *s);
void tx_drop_all(struct bypass_stack *s);

#endif
