/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_sack_rcv.c - the selective acknowledgments that we send: which blocks an ACK reports (RFC 2018 4), and which
 * duplicate it reports first (RFC 2883). What the peer's blocks do to our sending is tcp_sack.c's.
 */
#include "tcp.h"

/* first..end-1 came twice. Reported once, in the next ACK (RFC 2883 4): of several only the first, but pieces that
 * touch become one. */
void tcp_sack_duplicate(struct bypass_stack *s, struct tcp_conn *c, seq_t first, seq_t end)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (!(c->feat & TX_SACK) || seq_geq(first, end))
        return;
    if (!(c->feat & TX_DSACK)) {
        c->feat |= TX_DSACK;
        k->dsack_first = first;
        k->dsack_end = end;
    } else if (seq_leq(first, k->dsack_end) && seq_geq(end, k->dsack_first)) {
        if (seq_lt(first, k->dsack_first))
            k->dsack_first = first;
        if (seq_gt(end, k->dsack_end))
            k->dsack_end = end;
    }
}

/* The duplicate half of a segment that lies below rcv_nxt, wholly or in part. */
void tcp_sack_old(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    seq_t end = seq_add(g->seq, g->len);
    if (seq_lt(g->seq, c->rcv_nxt))
        tcp_sack_duplicate(s, c, g->seq, seq_lt(end, c->rcv_nxt) ? end : c->rcv_nxt);
}

/* Writes the SACK option of this ACK into at most `room` bytes; returns its length. 0: there is nothing to say, or no
 * room to say it. The first block is the duplicate's; then the block that changed last, and those reported before it,
 * so that each is repeated in the next ACKs (RFC 2018 4). */
uint32_t tcp_sack_write(struct bypass_stack *s, struct tcp_conn *c, uint8_t *opt, uint32_t room)
{
    struct sack_block b[SACK_BLOCKS + 1];
    uint32_t n = 0;
    if (c->feat & TX_DSACK)
        b[n++] = (struct sack_block){conn_cold(s, c)->dsack_first, conn_cold(s, c)->dsack_end};
    if ((c->feat & TX_SACK) && c->ooo != NO_INDEX) {
        const struct tcp_ooo *o = tcp_ooo_of(s, c);
        for (uint32_t i = 0; i < o->recents; i++) {
            const struct tcp_range *r = tcp_ooo_range(s, o->recent[i]);
            b[n++] = (struct sack_block){r->first, r->end};
        }
    }
    uint32_t len = tcp_opt_write_sack(opt, room, b, n);
    if (len == 0)
        return 0;
    if (c->feat & TX_DSACK)
        STAT(s, tcp_out_dsacks);
    STAT(s, tcp_out_sacks);
    c->feat &= ~(uint32_t)TX_DSACK;
    return len;
}
