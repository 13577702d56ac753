/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_ecn.c - explicit congestion notification (RFC 3168 6.1). Negotiation and marking are to come: TX_ECN is never
 * set yet.
 */
#include "tcp.h"

void tcp_ecn_ack_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, struct tcp_sample *sm)
{
    (void)s;
    sm->ece = (c->feat & TX_ECN) && (g->flags & (TCP_ECE | TCP_SYN)) == TCP_ECE;
}
