/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp.h - what the tcp_*.c files include: all parts of the protocol, and what it does for sock.c and poll.c.
 *
 * Each part is a header for some files; a part includes only those that stand above it here.
 *
 * tcp_segment.h     a segment as it came
 *   tcp_opt.c         options, both ways
 * tcp_conn.h        a connection's memory, the protocol's own
 *   tcp_conn.c        connections: table, open, close
 *   tcp_tw.c          TIME_WAIT: how long, how many, who may take its place
 * tcp_listen.h      before there is a connection
 *   tcp_listen.c      endpoints that are not connected: bind, listen, accept
 *   tcp_port.c        their names: bind conflicts, which port, which listener
 *   tcp_req.c         half-open connections: a SYN that was answered, until its ACK comes
 *   tcp_cookie.c      SYN cookies: not even that is kept
 *   tcp_fastopen.c    data in the SYN (RFC 7413)
 *   sock_opt.c        what a program may set: one table
 * tcp_flight.h      the record of what is in flight
 * tcp_ack.h         what came back
 *   tcp_ack.c         what an acknowledgment does: window, round trip (RFC 6298); the common case in full
 *   tcp_sack.c        the scoreboard: what the peer has, what is lost, what was sent again (RFC 2018, 2883)
 *   tcp_rack.c        which frames are lost, and the tail loss probe (RFC 8985)
 *   tcp_recover.c     states of recovery, its window (RFC 9937), its end, its undoing (RFC 5682, 3522, 3708); NewReno
 * tcp_pace.h        how much may be sent, and how fast
 *   tcp_cc.c          congestion control: the table of algorithms (tcp_cc.h), and when their functions are called
 *   tcp_rate.c        how fast data was delivered (delivery rate estimation)
 *   tcp_pace.c        pacing
 *   tcp_ecn.c         explicit congestion notification (RFC 3168)
 *   tcp_pmtu.c        how large packets may be (RFC 4821)
 * tcp_rcv.h         what was received
 *   tcp_rcv.c         received bytes: in order, the window we offer
 *   tcp_ooo.c         ... and those ahead of it; tcp_item.h: what holds them
 *   tcp_sack_rcv.c    the SACK blocks that our ACKs carry (RFC 2018, RFC 2883)
 *   tcp_urg.c         urgent data
 *   tcp_tune.c        how large buffers grow, and what happens when memory is short
 * tcp_out.h         what leaves, and when
 *   tcp_snd.c         written bytes: the send queue
 *   tcp_out.c         which segment goes out now, and its header
 *   tcp_timer.c       what time alone causes
 * tcp.h             all of them together
 *   tcp_fast.c        the short way of the usual segment
 *   tcp_in.c          a segment arrives: RFC 9293 3.10.7, in its order
 *   tcp_info.c        what a connection tells of itself (TCP_INFO)
 *   inspect.c         the same, to a tool that reads an arena which may hold anything
 *   sock_zc.c         payload that is not copied
 */
#ifndef BYPASS_STACK_TCP_H
#define BYPASS_STACK_TCP_H

#include "tcp_ack.h"
#include "tcp_conn.h"
#include "tcp_flight.h"
#include "tcp_listen.h"
#include "tcp_out.h"
#include "tcp_pace.h"
#include "tcp_rcv.h"
#include "tcp_segment.h"

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

/* tcp_info.c: what is told of a connection, from wherever its parts lie (inspect.c has copies). */
struct tcp_told {
    const struct tcp_conn *c;
    const struct tcp_cold *k;
    const struct tcp_flight *fl;             /* NULL: it has none */
    uint16_t mtu;                            /* of the device */
    uint32_t unacked, sacked, lost, retrans; /* segments of the send queue */
};
void tcp_info_fill(const struct tcp_told *t, struct bypass_tcp_info *out);

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
