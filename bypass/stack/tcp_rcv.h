/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_rcv.h - received bytes: in order (tcp_rcv.c) and ahead of it (tcp_ooo.c), what our ACKs say of them
 * (tcp_sack_rcv.c), urgent data (tcp_urg.c), sizes of buffers (tcp_tune.c). What holds the bytes is in tcp_item.h.
 */
#ifndef BYPASS_STACK_TCP_RCV_H
#define BYPASS_STACK_TCP_RCV_H

#include "tcp_conn.h"

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

#endif
