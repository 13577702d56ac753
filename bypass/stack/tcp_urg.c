/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_urg.c - urgent data (RFC 9293 3.8.5) in Linux' reading of it: a mark in the stream, and the one byte before it out
 * of band. RFC 6093 says what the world does and advises against new uses: the pointer names the byte behind the urgent
 * one (2.1); several marks become the last (2.2), a byte that was not fetched by then is lost; middleboxes may clear
 * it all (3.2). A program that wants none of it sets BYPASS_SO_OOBINLINE, and the byte stays in the stream (4.2).
 *
 *     read       mark: cold.rcv_up            a read stops in front of the mark; the next one passes over the byte
 *     | - - - - - - - [u] - - - - |           (unless it is in line)
 */
#include <errno.h>

#include "tcp_item.h"

static seq_t read_seq(const struct tcp_conn *c)
{
    return seq_add(c->rcv_nxt, 0u - c->rcv_queued - !!(c->flags & TF_FIN_IN));
}

static bool in_line(const struct tcp_cold *k) { return (k->opt.bits & OPT_OOBINLINE) != 0; }

static void mark_passed(struct tcp_conn *c, struct tcp_cold *k)
{
    k->urg_state = URG_NONE;
    c->feat &= ~(uint32_t)TX_URG_IN;
}

/* ---- Receiving ------------------------------------------------------------------------------------------- */
/* A pointer that is news moves the mark; an urgent byte at which the program stands already is passed over. */
static void take_pointer(struct bypass_stack *s, struct tcp_conn *c, struct tcp_cold *k, const struct segment *g)
{
    seq_t up = seq_add(g->seq, g->urg > 0 ? g->urg - 1u : 0);
    if (seq_lt(up, c->rcv_nxt) || (k->urg_state != URG_NONE && seq_leq(up, k->rcv_up)))
        return;
    if (k->urg_state != URG_NONE && seq_eq(k->rcv_up, read_seq(c)) && !in_line(k) && c->rcv_queued > 0)
        tcp_rcv_skip(s, c, 1);
    k->rcv_up = up;
    k->urg_state = URG_AHEAD;
    c->feat |= TX_URG_IN;
}

/* Sixth step of 3.10.7.4. Called for segments with URG, and for all while the urgent byte has not come. */
void tcp_urg_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (g->flags & TCP_URG)
        take_pointer(s, c, k, g);
    if (k->urg_state != URG_AHEAD)
        return;
    uint32_t at = k->rcv_up.v - g->seq.v;
    if (at >= g->len)
        return;
    k->urg_byte = pkt_data(s, g->pkt)[g->data_off + at];
    k->urg_state = URG_HERE;
    conn_event(s, c, BYPASS_PRI);
}

/* How many of n bytes a read may take, after the urgent byte at the mark was passed over. *skip: bytes that a look ahead
 * has to pass over itself. */
size_t tcp_urg_limit(struct bypass_stack *s, struct tcp_conn *c, size_t n, bool peek, uint32_t *skip)
{
    struct tcp_cold *k = conn_cold(s, c);
    uint32_t ahead = k->rcv_up.v - read_seq(c).v;
    if (k->urg_state == URG_NONE || ahead > c->rcv_queued || n == 0) /* a read of nothing passes nothing over */
        return n;
    if (ahead > 0)
        return n < ahead ? n : ahead;
    if (in_line(k) || c->rcv_queued == 0)
        return n;
    if (peek) {
        *skip = 1;
        return n;
    }
    tcp_rcv_skip(s, c, 1);
    mark_passed(c, k);
    return n;
}

/* The program has read: is the mark behind it? */
void tcp_urg_after_read(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (k->urg_state != URG_NONE && seq_gt(read_seq(c), k->rcv_up))
        mark_passed(c, k);
}

/* BYPASS_OOB. */
int64_t tcp_urg_recv(struct bypass_stack *s, struct tcp_conn *c, void *buf, size_t n, int flags)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (in_line(k) || k->urg_state == URG_NONE || k->urg_state == URG_TAKEN)
        return -EINVAL;
    if (conn_over(c) && !(c->flags & TF_FIN_IN))
        return -ENOTCONN;
    if (k->urg_state == URG_AHEAD)
        return c->flags & (TF_FIN_IN | TF_RCV_SHUT | TF_DEAD) ? 0 : -EAGAIN;
    if (!(flags & BYPASS_PEEK))
        k->urg_state = URG_TAKEN;
    if (n > 0 && !(flags & BYPASS_TRUNC))
        *(uint8_t *)buf = k->urg_byte;
    return n > 0;
}

bool tcp_urg_at_mark(const struct bypass_stack *s, const struct tcp_conn *c)
{
    const struct tcp_cold *k = conn_cold(s, c);
    return k->urg_state != URG_NONE && seq_eq(k->rcv_up, read_seq(c));
}

/* Bytes of what is queued that do not count as readable: the urgent one, when it is next. */
uint32_t tcp_urg_hidden(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return tcp_urg_at_mark(s, c) && !in_line(conn_cold(s, c)) && c->rcv_queued > 0;
}

bool tcp_urg_ready(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return conn_cold(s, c)->urg_state == URG_HERE;
}

/* ---- Sending --------------------------------------------------------------------------------------------- */
/* All that is queued is urgent; the pointer will name the byte behind it (RFC 6093 2.1). */
void tcp_urg_mark(struct bypass_stack *s, struct tcp_conn *c)
{
    conn_cold(s, c)->snd_up = seq_add(c->snd_una, c->snd_queued);
    c->feat |= TX_URG_OUT;
}

/* The urgent pointer of a segment that begins at `at`; 0: it carries none. A mark further ahead than the field reaches is
 * told as far as it goes, when what has left does not say better (Linux). */
uint16_t tcp_urg_pointer(struct bypass_stack *s, struct tcp_conn *c, seq_t at)
{
    seq_t up = conn_cold(s, c)->snd_up;
    if (seq_geq(c->snd_una, up)) {
        c->feat &= ~(uint32_t)TX_URG_OUT;
        return 0;
    }
    if (!seq_lt(at, up))
        return 0;
    if (up.v - at.v <= UINT16_MAX)
        return (uint16_t)(up.v - at.v);
    return seq_gt(seq_add(at, UINT16_MAX), c->snd_nxt) ? UINT16_MAX : 0;
}
