/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_listen.h - before a connection is one: endpoints and their ports (tcp_listen.c, tcp_port.c), requests (tcp_req.c),
 * SYN cookies (tcp_cookie.c) and Fast Open (tcp_fastopen.c).
 */
#ifndef BYPASS_STACK_TCP_LISTEN_H
#define BYPASS_STACK_TCP_LISTEN_H

#include "tcp_conn.h"

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

static inline struct tcp_endpoint *endpoint_at(const struct bypass_stack *s, uint32_t i)
{
    return pool_at(s, &core(s)->listeners, i);
}
static inline struct tcp_req *req_at(const struct bypass_stack *s, uint32_t i) { return pool_at(s, &core(s)->reqs, i); }
static inline uint32_t endpoint_index(const struct bypass_stack *s, const struct tcp_endpoint *ep)
{
    return (uint32_t)(ep - endpoint_at(s, 0));
}

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

/* sock_opt.c */
void tcp_options_default(struct tcp_endpoint *ep, const struct bypass_config *cfg);
void tcp_options_inherit(struct tcp_conn *c, struct tcp_cold *k, const struct tcp_endpoint *ep);
void tcp_options_return(struct tcp_endpoint *ep, const struct tcp_conn *c, const struct tcp_cold *k); /* disconnected */

#endif
