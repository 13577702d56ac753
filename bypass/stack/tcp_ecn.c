/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_ecn.c - explicit congestion notification (RFC 3168 6.1): who agrees to it, what is marked as capable, how marks
 * are reported by the receiver and answered by the sender. With a congestion control that counts marks (DCTCP, RFC 8257)
 * the receiver tells of each, in place of once until the sender says CWR.
 *
 * TX_ECN: agreed; while the SYN is out, asked for. TX_ECE: our ACKs carry ECE. TX_CWR: our next new segment carries CWR.
 */
#include "tcp.h"

enum { ECT0 = 2, CE = 3 };

/* ---- Agreement (6.1.1) -------------------------------------------------------------------------------- */
/* Flags of a SYN. One that is repeated goes without: a middle box may drop the others (6.1.1.1). */
uint8_t tcp_ecn_syn(struct bypass_stack *s, struct tcp_conn *c)
{
    bool wanted = conn_cold(s, c)->opt.ecn == 1 || tcp_cc_exact_ecn(s, c->cc);
    c->feat &= ~(uint32_t)TX_ECN;
    if (c->state != BYPASS_SYN_SENT || (c->flags & TF_SYN_RTX) || !wanted)
        return 0;
    c->feat |= TX_ECN;
    return TCP_ECE | TCP_CWR;
}

/* Both flags of a SYN-ACK would be the echo of one who does not know them. */
void tcp_ecn_syn_ack_in(struct tcp_conn *c, const struct segment *g)
{
    if ((g->flags & (TCP_ACK | TCP_ECE | TCP_CWR)) != (TCP_ACK | TCP_ECE))
        c->feat &= ~(uint32_t)TX_ECN;
}

/* Does this SYN ask for it, and does the listener agree? A SYN that is marked capable breaks 6.1.1: somebody on the path
 * changes these bits. */
bool tcp_ecn_agreed(const struct bypass_stack *s, const struct tcp_endpoint *ep, const struct segment *g)
{
    bool exact = tcp_cc_exact_ecn(s, ep->cc);
    if ((g->flags & (TCP_ECE | TCP_CWR)) != (TCP_ECE | TCP_CWR) || (ep->opt.ecn == 0 && !exact))
        return false;
    return (g->ri->tos & CE) == 0 || exact;
}

/* ---- Receiver (6.1.3; RFC 8257 3.2) -------------------------------------------------------------------- */
/* What was received before is acknowledged with the mark that it had, at once, when the next one differs. */
static void exact_in(struct bypass_stack *s, struct tcp_conn *c, bool marked)
{
    if (marked == ((c->feat & TX_ECE) != 0))
        return;
    if (!seq_eq(c->last_ack_sent, c->rcv_nxt))
        tcp_send_ack(s, c);
    c->feat ^= TX_ECE;
}

/* Before the segment's data is taken. */
void tcp_ecn_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    bool marked = (g->ri->tos & CE) == CE;
    if (marked)
        STAT(s, tcp_in_marked);
    if (c->feat & TX_ECN_EXACT) {
        exact_in(s, c, marked);
        return;
    }
    if (g->flags & TCP_CWR)
        c->feat &= ~(uint32_t)TX_ECE;
    if (marked)
        c->feat |= TX_ECE;
}

/* ---- Sender (6.1.2, 6.1.5) ------------------------------------------------------------------------------ */
/* Flags of a data segment. Only new data is marked capable: a lost mark of a retransmission would be lost for good. */
uint8_t tcp_ecn_out(struct tcp_conn *c, bool new_data, uint8_t *tos)
{
    if (!new_data)
        return 0;
    *tos |= ECT0;
    if (!(c->feat & TX_CWR))
        return 0;
    c->feat &= ~(uint32_t)TX_CWR;
    return TCP_CWR;
}

/* An ACK with ECE: the window is reduced, once for what is in flight. */
void tcp_ecn_ack_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, struct tcp_sample *sm)
{
    sm->ece = (c->feat & TX_ECN) && (g->flags & TCP_ECE) && has_flight(c);
    if (!sm->ece)
        return;
    STAT(s, tcp_in_ece);
    tcp_recover_enter_cwr(s, c);
}
