/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_listen.c - endpoints that are not connected: fresh, bound (tcp_port.c), listening; the passive open
 * (RFC 9293 3.10.2, 3.10.7.2) and the queue of connections to accept.
 */
#include <errno.h>

#include "tcp.h"

int tcp_create(struct bypass_stack *s, uint32_t *idx)
{
    *idx = pool_alloc(s, &core(s)->listeners);
    if (*idx == NO_INDEX)
        return -ENFILE;
    struct tcp_endpoint *ep = endpoint_at(s, *idx);
    *ep = (struct tcp_endpoint){
        .link = NO_INDEX,
        .sock = NO_INDEX,
        .gen = ep->gen + 1,
        .addr = {{[10] = 0xff, [11] = 0xff}},
        .accept_head = NO_INDEX,
        .accept_tail = NO_INDEX,
        .cc = (uint8_t)tcp_head(s)->cc_default,
        .used = 1,
    };
    tcp_options_default(ep, &core(s)->cfg);
    return 0;
}

int tcp_listen(struct bypass_stack *s, uint32_t idx, int backlog)
{
    struct tcp_endpoint *ep = endpoint_at(s, idx);
    if (ep->port == 0) {
        const struct bypass_endpoint any = {.port = 0};
        int err = tcp_bind(s, idx, &any);
        if (err < 0)
            return err;
    }
    if (!ep->listening && tcp_port_taken(s, ep, &ep->addr, ep->port))
        return -EADDRINUSE;
    ep->listening = 1;
    ep->backlog = min_u32((uint32_t)backlog, BACKLOG_MAX); /* a negative one is large, as on Linux */
    return 0;
}

/* ---- Passive open -------------------------------------------------------------------------------------- */
/* Our SYN-ACK offers only what the SYN offered. */
static void take_syn_options(struct tcp_conn *c, const struct segment *g)
{
    const struct tcp_opts *o = &g->opt;
    c->syn_mss = o->mss ? (uint16_t)max_u32(o->mss, TCP_MIN_MSS + TCP_TS_BYTES) : TCP_DEFAULT_MSS;
    c->flags &= ~(uint32_t)(TF_TS | TF_WSCALE);
    c->feat &= ~(uint32_t)TX_SACK;
    if (o->has_ts)
        c->flags |= TF_TS;
    if (o->sack_ok)
        c->feat |= TX_SACK;
    if (o->has_wscale) {
        c->flags |= TF_WSCALE;
        c->snd_wscale = o->wscale;
    } else {
        c->snd_wscale = c->rcv_wscale = 0;
    }
}

void tcp_take_syn(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    take_syn_options(c, g);
    if (g->opt.has_ts) {
        c->ts_recent = g->opt.ts_val;
        c->ts_recent_ms = conn_now_ms(s);
    }
    conn_cold(s, c)->irs = g->seq;
    c->rcv_nxt = c->last_ack_sent = c->rcv_adv = seq_add(g->seq, 1);
    c->snd_wnd = c->snd_wnd_max = g->wnd; /* the window of a SYN is never scaled, RFC 7323 2.2 */
    c->snd_wl1 = g->seq;
    c->snd_wl2 = g->ack;
    c->queue = pkt_meta(s, g->pkt)->queue;
    conn_update_mss(s, c, 0);
}

/* Linux' bound: one more than the backlog. */
bool tcp_accept_full(const struct tcp_endpoint *ep) { return ep->accept_count > ep->backlog; }

static bool syn_queue_full(const struct bypass_stack *s, const struct tcp_endpoint *ep)
{
    const struct pool *p = &core(s)->reqs;
    return ep->syn_count >= max_u32(ep->backlog, 128) || p->used == p->cap;
}

/* RFC 9293 3.10.7.2, third. Refusing costs nothing, keeping is bounded, and beyond that a cookie costs no memory. */
static void syn_in(struct bypass_stack *s, struct tcp_endpoint *ep, struct segment *g)
{
    uint8_t cookies = core(s)->cfg.syn_cookies;
    if (tcp_accept_full(ep)) {
        STAT(s, tcp_listen_overflow);
        return;
    }
    if (tcp_tune_pressure(s)) {
        STAT(s, tcp_syn_pressure);
        return;
    }
    if (!conn_available(s)) {
        STAT(s, tcp_no_conn); /* those that are there live on; new ones are refused first */
        return;
    }
    bool full = syn_queue_full(s, ep);
    if (full)
        STAT(s, tcp_syn_overflow);
    /* a cookie cannot be told to follow a TIME_WAIT's sequence numbers (RFC 1122 4.2.2.13) */
    if ((full || cookies == BYPASS_COOKIES_ALWAYS) && cookies != BYPASS_COOKIES_OFF && !g->follows)
        tcp_cookie_send(s, ep, g);
    else if (!full && !(unlikely(g->opt.has_fo) && tcp_fastopen_syn_in(s, ep, g)))
        (void)tcp_req_new(s, ep, g);
}

struct tcp_conn *tcp_listen_in(struct bypass_stack *s, struct tcp_endpoint *ep, struct segment *g)
{
    bool cookie;
    if (g->flags & TCP_RST)
        return NULL;
    if (g->flags & TCP_ACK) {
        struct tcp_conn *c = tcp_cookie_in(s, ep, g, &cookie);
        if (!cookie)
            tcp_reply_rst(s, g);
        return c;
    }
    if ((g->flags & (TCP_SYN | TCP_FIN)) == TCP_SYN)
        syn_in(s, ep, g);
    return NULL;
}

static struct tcp_endpoint *listener_of(const struct bypass_stack *s, const struct tcp_cold *k)
{
    if (k->listener == NO_INDEX)
        return NULL;
    struct tcp_endpoint *ep = endpoint_at(s, k->listener);
    return ep->used && ep->gen == k->listener_gen ? ep : NULL;
}

bool tcp_listen_ready(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    struct tcp_endpoint *ep = listener_of(s, k);
    if (!ep)
        return false;
    if (tcp_accept_full(ep)) {
        STAT(s, tcp_listen_overflow);
        return false;
    }
    uint32_t self = conn_index(s, c);
    k->accept_next = NO_INDEX;
    if (ep->accept_tail != NO_INDEX)
        cold_at(s, ep->accept_tail)->accept_next = self;
    else
        ep->accept_head = self;
    ep->accept_tail = self;
    ep->accept_count++;
    c->flags |= TF_ACCEPTABLE;
    sock_event(s, ep->sock, BYPASS_IN);
    return true;
}

static void accept_unlink(struct bypass_stack *s, struct tcp_endpoint *ep, struct tcp_conn *c)
{
    uint32_t self = conn_index(s, c), prev = NO_INDEX;
    for (uint32_t i = ep->accept_head; i != self; i = cold_at(s, i)->accept_next)
        prev = i;
    uint32_t next = cold_at(s, self)->accept_next;
    *(prev != NO_INDEX ? &cold_at(s, prev)->accept_next : &ep->accept_head) = next;
    if (ep->accept_tail == self)
        ep->accept_tail = prev;
    ep->accept_count--;
    c->flags &= ~(uint32_t)TF_ACCEPTABLE;
}

void tcp_listen_forget(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    struct tcp_endpoint *ep = listener_of(s, k);
    if (ep && (c->flags & TF_ACCEPTABLE))
        accept_unlink(s, ep, c);
    tcp_fastopen_done(s, c);
    k->listener = NO_INDEX;
}

int64_t tcp_accept(struct bypass_stack *s, uint32_t idx)
{
    struct tcp_endpoint *ep = endpoint_at(s, idx);
    if (!ep->listening)
        return -EINVAL;
    if (ep->accept_head == NO_INDEX)
        return -EAGAIN;
    uint32_t i = ep->accept_head;
    accept_unlink(s, ep, conn_at(s, i));
    if (likely(!(conn_at(s, i)->feat & TX_FO_PENDING)))
        cold_at(s, i)->listener = NO_INDEX;
    STAT(s, tcp_accepted);
    return i;
}

/* Connections that wait in either queue are reset (RFC 9293 3.10.4: nobody will ever accept them). */
static void reset_children(struct bypass_stack *s, struct tcp_endpoint *ep)
{
    while (ep->accept_head != NO_INDEX)
        conn_reset(s, conn_at(s, ep->accept_head), 0);
    tcp_req_reset_all(s, ep);
}

void tcp_unlisten(struct bypass_stack *s, uint32_t idx, int bound)
{
    struct tcp_endpoint *ep = endpoint_at(s, idx);
    reset_children(s, ep);
    ep->listening = 0;
    ep->gen++; /* handshakes under way find no listener */
    if (!(bound & BOUND_PORT))
        tcp_port_release(s, ep);
    if (!(bound & BOUND_ADDR))
        ep->addr = (addr_t){{[10] = 0xff, [11] = 0xff}};
    sock_event(s, ep->sock, BYPASS_OUT | BYPASS_HUP);
}

int tcp_recreate(struct bypass_stack *s, uint32_t *idx, const struct tcp_conn *c, const addr_t *addr, uint16_t port)
{
    int err = tcp_create(s, idx);
    if (err < 0)
        return err;
    struct tcp_endpoint *ep = endpoint_at(s, *idx);
    tcp_options_return(ep, c, conn_cold(s, c));
    ep->addr = *addr;
    if (port != 0)
        tcp_port_take(s, ep, port);
    return 0;
}

void tcp_endpoint_close(struct bypass_stack *s, uint32_t idx)
{
    struct tcp_endpoint *ep = endpoint_at(s, idx);
    reset_children(s, ep);
    tcp_port_release(s, ep);
    ep->used = 0;
    ep->listening = 0;
    pool_free(s, &core(s)->listeners, idx);
}
