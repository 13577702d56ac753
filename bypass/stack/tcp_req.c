/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_req.c - half-open connections (RFC 4987 3.4): a SYN was answered, its ACK has not come. A request is 96 bytes in a
 * pool and a table of its own, so that a flood of SYNs touches no connection, no flow table and no timer wheel. The ACK
 * that ends the handshake makes it a connection (tcp_req_promote); until then the steps of RFC 9293 3.10.7.4 are
 * done here for SYN-RECEIVED.
 *
 *     SYN --> tcp_req_new --SYN-ACK--> [request] --ACK--> tcp_req_in --> connection in SYN_RECEIVED --> tcp_in.c
 *                                        | repeated 5 times, or a reset: gone
 */
#include "net.h"
#include "tcp.h"

/* ---- Table and lists -------------------------------------------------------------------------------- */
void tcp_req_layout(struct layout *l, struct core *c)
{
    uint32_t buckets = 64;
    while (buckets < c->cfg.max_syn_backlog)
        buckets *= 2;
    layout_pool(l, &c->reqs, sizeof(struct tcp_req), c->cfg.max_syn_backlog);
    c->tcp_state[4] = layout_bytes(l, (uint64_t)buckets * sizeof(uint32_t));
    c->tcp_state[5] = buckets - 1;
}

/* Links in the table are index plus one: it lies in zeroed memory. */
static uint32_t *bucket(const struct bypass_stack *s, uint32_t hash)
{
    uint32_t *table = at(s, core(s)->tcp_state[4]);
    return &table[hash & core(s)->tcp_state[5]];
}

void tcp_req_init(struct bypass_stack *s)
{
    struct tcp *t = tcp_head(s);
    t->req_due = NO_DEADLINE;
    for (int i = 0; i <= SYNACK_RETRIES; i++)
        t->req_head[i] = t->req_tail[i] = NO_INDEX;
}

static uint32_t req_index(const struct bypass_stack *s, const struct tcp_req *r)
{
    return (uint32_t)(r - req_at(s, 0));
}

static struct tcp_req *find(const struct bypass_stack *s, uint32_t hash, const addr_t *laddr, const addr_t *raddr,
                            uint16_t lport, uint16_t rport)
{
    if (core(s)->reqs.used == 0)
        return NULL;
    for (uint32_t i = *bucket(s, hash); i != 0; i = req_at(s, i - 1)->link) {
        struct tcp_req *r = req_at(s, i - 1);
        if (r->hash == hash && r->lport == lport && r->rport == rport && addr_eq(&r->raddr, raddr) &&
            addr_eq(&r->laddr, laddr))
            return r;
    }
    return NULL;
}

struct tcp_req *tcp_req_find(const struct bypass_stack *s, const struct segment *g)
{
    return find(s, g->hash, &g->ri->dst, &g->ri->src, g->dst_port, g->src_port);
}

static uint64_t due_ns(const struct tcp_req *r) { return r->sent_ns + ((RTO_INIT_US * 1000ull) << r->tries); }

static void list_append(struct bypass_stack *s, struct tcp_req *r)
{
    struct tcp *t = tcp_head(s);
    uint32_t *tail = &t->req_tail[r->tries], self = req_index(s, r);
    r->prev = *tail;
    r->next = NO_INDEX;
    *(*tail != NO_INDEX ? &req_at(s, *tail)->next : &t->req_head[r->tries]) = self;
    *tail = self;
    t->req_due = min_u64(t->req_due, due_ns(r));
}

static void list_unlink(struct bypass_stack *s, struct tcp_req *r)
{
    struct tcp *t = tcp_head(s);
    *(r->prev != NO_INDEX ? &req_at(s, r->prev)->next : &t->req_head[r->tries]) = r->next;
    *(r->next != NO_INDEX ? &req_at(s, r->next)->prev : &t->req_tail[r->tries]) = r->prev;
}

static void req_free(struct bypass_stack *s, struct tcp_req *r)
{
    uint32_t *link = bucket(s, r->hash), self = req_index(s, r);
    while (*link != self + 1)
        link = &req_at(s, *link - 1)->link;
    *link = r->link;
    list_unlink(s, r);
    endpoint_at(s, r->listener)->syn_count--;
    r->flags = 0;
    pool_free(s, &core(s)->reqs, self);
    if (core(s)->reqs.used == 0)
        tcp_head(s)->req_due = NO_DEADLINE;
}

/* ---- Answers ------------------------------------------------------------------------------------------- */
static uint32_t req_ts_now(const struct bypass_stack *s, const struct tcp_req *r)
{
    return conn_now_ms(s) + tcp_flow_isn(s, &r->laddr, r->lport, &r->raddr, r->rport).ts_offset;
}

static void send_for(struct bypass_stack *s, const struct tcp_req *r, uint8_t flags, const struct tcp_opts *o)
{
    const struct tcp_endpoint *ep = endpoint_at(s, r->listener);
    uint32_t wnd = tcp_syn_window(ep->rcvbuf);
    const struct tcp_bare b = {.src = &r->laddr,
                               .dst = &r->raddr,
                               .sport = r->lport,
                               .dport = r->rport,
                               .wnd = (uint16_t)(flags & TCP_SYN ? wnd : wnd >> r->rcv_wscale),
                               .queue = r->queue,
                               .seq = flags & TCP_SYN ? r->iss : seq_add(r->iss, 1),
                               .ack = seq_add(r->irs, 1),
                               .flags = flags,
                               .ttl = ep->opt.ttl,
                               .tos = ep->opt.tos,
                               .opts = o};
    static const uint8_t none[6];
    const uint8_t *mac = memcmp(r->mac, none, 6) != 0 ? r->mac : NULL;
    (void)tcp_send_bare(s, &b, mac); /* not sent: the next repetition, or the next copy of the SYN */
}

/* RFC 9293 3.7.1: what we can take; known paths may be narrower. */
static uint16_t offered_mss(struct bypass_stack *s, const struct tcp_req *r)
{
    const struct tcp_endpoint *ep = endpoint_at(s, r->listener);
    const struct dst *d = dst_find(s, &r->raddr);
    uint32_t mtu = d && d->mtu ? d->mtu : s->dev->mtu;
    return (uint16_t)min_u32(mtu - 40u, ep->opt.maxseg ? ep->opt.maxseg : UINT32_MAX);
}

/* fast_open: the cookie that it gives, or NULL */
static void send_syn_ack(struct bypass_stack *s, struct tcp_req *r, const struct tcp_opts *fast_open)
{
    struct tcp_opts o = {.mss = offered_mss(s, r),
                         .has_wscale = (r->flags & REQ_WSCALE) != 0,
                         .wscale = r->rcv_wscale,
                         .has_ts = (r->flags & REQ_TS) != 0,
                         .ts_val = req_ts_now(s, r),
                         .ts_ecr = r->ts_recent,
                         .sack_ok = (r->flags & REQ_SACK) != 0};
    if (unlikely(fast_open != NULL)) {
        o.has_fo = true;
        o.cookie_len = fast_open->cookie_len;
        memcpy(o.cookie, fast_open->cookie, fast_open->cookie_len);
    }
    send_for(s, r, (uint8_t)(TCP_SYN | TCP_ACK | (r->flags & REQ_ECN ? TCP_ECE : 0)), &o);
    r->sent_ns = now_ns(s);
}

static void send_ack(struct bypass_stack *s, struct tcp_req *r)
{
    const struct tcp_opts o = {.has_ts = (r->flags & REQ_TS) != 0, .ts_val = req_ts_now(s, r), .ts_ecr = r->ts_recent};
    send_for(s, r, TCP_ACK, &o);
    STAT(s, tcp_out_acks);
}

/* As tcp_challenge() does for a connection: not twice in half a second, and no more than all may have. */
static void challenge(struct bypass_stack *s, struct tcp_req *r)
{
    uint32_t ms = conn_now_ms(s);
    if ((r->challenge_ms != 0 && ms - r->challenge_ms < 500) || !tcp_challenge_token(s)) {
        STAT(s, tcp_out_challenge_limited);
        return;
    }
    r->challenge_ms = max_u32(ms, 1);
    STAT(s, tcp_out_challenge_acks);
    send_ack(s, r);
}

/* ---- Beginning ------------------------------------------------------------------------------------------- */
static void take_options(const struct bypass_stack *s, struct tcp_req *r, const struct tcp_endpoint *ep,
                         const struct tcp_opts *o)
{
    r->flags = REQ_USED;
    r->mss = o->mss;
    if (o->has_ts) {
        r->flags |= REQ_TS;
        r->ts_recent = o->ts_val;
    }
    if (o->sack_ok)
        r->flags |= REQ_SACK;
    if (o->has_wscale) {
        r->flags |= REQ_WSCALE;
        r->wscale = o->wscale;
        r->rcv_wscale = tcp_tune_wscale(s, ep->rcvbuf, ep->feat);
    }
}

seq_t tcp_req_iss(const struct bypass_stack *s, const struct segment *g)
{
    seq_t iss = tcp_flow_isn(s, &g->ri->dst, g->dst_port, &g->ri->src, g->src_port).iss;
    if (g->follows && seq_leq(iss, seq_add(g->old_snd_nxt, 65535))) /* RFC 1122 4.2.2.13 (1) */
        iss = seq_add(g->old_snd_nxt, 65536);
    return iss;
}

bool tcp_req_new(struct bypass_stack *s, struct tcp_endpoint *ep, const struct segment *g)
{
    uint32_t i = pool_alloc(s, &core(s)->reqs);
    if (i == NO_INDEX)
        return false;
    struct tcp_req *r = req_at(s, i);
    *r = (struct tcp_req){.laddr = g->ri->dst,
                          .raddr = g->ri->src,
                          .lport = g->dst_port,
                          .rport = g->src_port,
                          .hash = g->hash,
                          .listener = endpoint_index(s, ep),
                          .irs = g->seq,
                          .wnd = (uint16_t)g->wnd,
                          .queue = pkt_meta(s, g->pkt)->queue};
    r->iss = tcp_req_iss(s, g);
    take_options(s, r, ep, &g->opt);
    if (tcp_ecn_agreed(s, ep, g))
        r->flags |= REQ_ECN;
    const uint8_t *mac = pkt_came_from(s, g->pkt);
    if (mac)
        memcpy(r->mac, mac, 6);
    r->link = *bucket(s, r->hash);
    *bucket(s, r->hash) = i + 1;
    ep->syn_count++;
    STAT(s, tcp_passive_opens);
    struct tcp_opts cookie = {.has_fo = false};
    tcp_fastopen_offer(s, ep, g, &cookie);
    send_syn_ack(s, r, cookie.has_fo ? &cookie : NULL);
    list_append(s, r);
    return true;
}

/* ---- Becoming a connection -------------------------------------------------------------------------------- */
struct tcp_conn *tcp_req_promote(struct bypass_stack *s, struct tcp_endpoint *ep, const struct segment *syn, seq_t iss)
{
    struct tcp_conn *c = conn_new(s, ep, &syn->ri->dst, syn->dst_port, &syn->ri->src, syn->src_port);
    if (!c)
        return NULL;
    struct tcp_cold *k = conn_cold(s, c);
    k->listener = endpoint_index(s, ep);
    k->listener_gen = ep->gen;
    k->iss = c->snd_una = iss;
    c->snd_nxt = seq_add(iss, 1);
    k->segs_in = 2; /* the SYN, and what answered our SYN-ACK */
    c->flags |= TF_PASSIVE;
    tcp_take_syn(s, c, syn);
    c->rcv_adv = seq_add(c->rcv_nxt, tcp_syn_window(c->rcvbuf)); /* what our answer offered */
    c->state = BYPASS_SYN_RECEIVED;
    return c;
}

static struct tcp_conn *promote(struct bypass_stack *s, struct tcp_req *r, const struct segment *g)
{
    struct segment syn = *g; /* the SYN as it came, in the ACK's frame */
    syn.seq = r->irs;
    syn.ack = seq(0);
    syn.wnd = r->wnd;
    syn.flags = TCP_SYN;
    syn.opt = (struct tcp_opts){.mss = r->mss,
                                .has_ts = (r->flags & REQ_TS) != 0,
                                .ts_val = r->ts_recent,
                                .has_wscale = (r->flags & REQ_WSCALE) != 0,
                                .wscale = r->wscale,
                                .sack_ok = (r->flags & REQ_SACK) != 0};
    struct tcp_conn *c = tcp_req_promote(s, endpoint_at(s, r->listener), &syn, r->iss);
    if (!c)
        return NULL; /* no room: the SYN-ACK goes again, its answer may find some */
    c->feat |= r->flags & REQ_ECN ? TX_ECN : 0;
    conn_cold(s, c)->syn_sent_ns = r->sent_ns;
    conn_cold(s, c)->last_in = now_ns(s);
    conn_cold(s, c)->data_segs_in = g->len > 0;
    if (r->tries > 0)
        c->flags |= TF_SYN_RTX;
    c->rtx_count = r->tries;
    req_free(s, r);
    return c;
}

/* ---- A segment: RFC 9293 3.10.7.4 in SYN-RECEIVED ----------------------------------------------------------- */
static bool paws_rejects(const struct tcp_req *r, const struct segment *g)
{
    return (r->flags & REQ_TS) && g->opt.has_ts && !(g->flags & TCP_RST) && (int32_t)(g->opt.ts_val - r->ts_recent) < 0;
}

/* First: the sequence number. */
static bool acceptable(const struct bypass_stack *s, const struct tcp_req *r, const struct segment *g)
{
    uint32_t wnd = tcp_syn_window(endpoint_at(s, r->listener)->rcvbuf);
    seq_t next = seq_add(r->irs, 1);
    uint32_t len = seg_len(g);
    return g->seq.v - next.v < wnd || (len > 0 && seq_add(g->seq, len - 1).v - next.v < wnd);
}

static void refuse(struct bypass_stack *s, struct tcp_req *r, const struct segment *g)
{
    if (g->flags & TCP_RST) {
        STAT(s, tcp_in_reset_ignored);
    } else if ((g->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN && seq_eq(g->seq, r->irs)) {
        list_unlink(s, r); /* our SYN-ACK was lost, or is late: which one is answered will not be known (Karn) */
        r->tries += r->tries == 0;
        send_syn_ack(s, r, NULL);
        list_append(s, r);
    } else {
        STAT(s, tcp_in_out_of_window);
        challenge(s, r);
    }
}

struct tcp_conn *tcp_req_in(struct bypass_stack *s, struct tcp_req *r, const struct segment *g)
{
    if (paws_rejects(r, g)) {
        STAT(s, tcp_in_paws);
        challenge(s, r);
    } else if (!acceptable(s, r, g)) {
        refuse(s, r, g);
    } else if ((g->flags & TCP_RST) && seq_eq(g->seq, seq_add(r->irs, 1))) { /* second; RFC 5961 3.2 */
        STAT(s, tcp_in_reset);
        req_free(s, r);
    } else if (g->flags & TCP_RST) {
        STAT(s, tcp_in_reset_ignored);
        challenge(s, r);
    } else if (g->flags & TCP_SYN) { /* fourth; RFC 5961 4.2 */
        STAT(s, tcp_in_syn_in_window);
        challenge(s, r);
    } else if (!(g->flags & TCP_ACK)) {
        return NULL;
    } else if (!seq_eq(g->ack, seq_add(r->iss, 1))) { /* fifth */
        tcp_reply_rst(s, g);
    } else if (tcp_accept_full(endpoint_at(s, r->listener))) {
        STAT(s, tcp_listen_overflow); /* nobody can take it now; the SYN-ACK goes again */
    } else {
        return promote(s, r, g);
    }
    return NULL;
}

/* ---- ICMP, time, end ---------------------------------------------------------------------------------------- */
/* RFC 1122 4.2.3.9: only a hard error ends it. */
void tcp_req_icmp(struct bypass_stack *s, const struct icmp_error *e, uint32_t hash)
{
    struct tcp_req *r = find(s, hash, &e->src, &e->dst, e->src_port, e->dst_port);
    if (!r || e->seq != r->iss.v)
        return;
    STAT(s, tcp_in_error_quoted);
    if (e->hard)
        req_free(s, r);
}

static void req_timeout(struct bypass_stack *s, struct tcp_req *r)
{
    if (r->tries >= SYNACK_RETRIES) {
        STAT(s, tcp_timed_out);
        req_free(s, r);
        return;
    }
    list_unlink(s, r);
    r->tries++;
    STAT(s, tcp_out_retransmits);
    send_syn_ack(s, r, NULL);
    list_append(s, r);
}

void tcp_req_timers(struct bypass_stack *s)
{
    struct tcp *t = tcp_head(s);
    t->req_due = NO_DEADLINE;
    for (int i = SYNACK_RETRIES; i >= 0; i--) { /* from behind: what moves on to the next list is not due there */
        while (t->req_head[i] != NO_INDEX && due_ns(req_at(s, t->req_head[i])) <= now_ns(s))
            req_timeout(s, req_at(s, t->req_head[i]));
        if (t->req_head[i] != NO_INDEX)
            t->req_due = min_u64(t->req_due, due_ns(req_at(s, t->req_head[i])));
    }
}

void tcp_req_reset_all(struct bypass_stack *s, struct tcp_endpoint *ep)
{
    uint32_t self = endpoint_index(s, ep);
    for (uint32_t i = 0; ep->syn_count > 0 && i < core(s)->reqs.bump; i++) {
        struct tcp_req *r = req_at(s, i);
        if (!(r->flags & REQ_USED) || r->listener != self)
            continue;
        STAT(s, tcp_aborted);
        STAT(s, tcp_out_resets);
        send_for(s, r, TCP_RST | TCP_ACK, NULL);
        req_free(s, r);
    }
}

bool tcp_req_info(const struct bypass_stack *s, uint32_t i, struct bypass_tcp_info *out)
{
    const struct tcp_req *r = req_at(s, i);
    if (!(r->flags & REQ_USED))
        return false;
    *out = (struct bypass_tcp_info){
        .local = {.addr = r->laddr, .port = r->lport},
        .peer = {.addr = r->raddr, .port = r->rport},
        .state = BYPASS_SYN_RECEIVED,
        .snd_una = r->iss.v,
        .snd_nxt = r->iss.v + 1,
        .rcv_nxt = r->irs.v + 1,
        .snd_wnd = r->wnd,
        .rcv_wnd = tcp_syn_window(endpoint_at(s, r->listener)->rcvbuf),
        .rto_us = RTO_INIT_US << r->tries,
        .retransmits = r->tries,
        .flags = (r->flags & REQ_TS ? 1u : 0) | (r->flags & REQ_WSCALE ? 2u : 0),
        .snd_wscale = r->wscale,
        .rcv_wscale = r->rcv_wscale,
    };
    return true;
}
