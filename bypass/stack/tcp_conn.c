/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_conn.c - connections: the keyed flow table, creation and end, initial sequence numbers (RFC 6528),
 * active open, close (RFC 9293 3.6, 3.10.4).
 */
#include <errno.h>

#include "tcp.h"

/* Connections by their local port. */
static uint32_t *port_counts(const struct bypass_stack *s) { return at(s, core(s)->tcp_state[1]); }

uint32_t conn_port_count(const struct bypass_stack *s, uint16_t port) { return port_counts(s)[port]; }

void tcp_layout(struct layout *l, struct core *c)
{
    uint32_t slots = 64;
    while (slots < 2 * c->cfg.max_conns)
        slots *= 2;
    c->tcp_state[0] = layout_bytes(l, sizeof(struct tcp));
    c->tcp_state[1] = layout_bytes(l, 65536 * sizeof(uint32_t));
    c->tcp_state[2] = layout_bytes(l, (uint64_t)slots * sizeof(struct flow_slot));
    c->tcp_state[3] = slots - 1;
    layout_pool(l, &c->conns, sizeof(struct tcp_conn), c->cfg.max_conns);
    layout_pool(l, &c->colds, sizeof(struct tcp_cold), c->cfg.max_conns);
    layout_pool(l, &c->flights, sizeof(struct tcp_flight), c->cfg.max_conns);
    layout_pool(l, &c->ooos, sizeof(struct tcp_ooo), c->cfg.max_conns);
    layout_pool(l, &c->ranges, sizeof(struct tcp_range),
                max_u32(4 * OOO_RANGES_MAX, min_u32(8 * c->cfg.max_conns, 1u << 18)));
    tcp_req_layout(l, c);
    tcp_fastopen_layout(l, c);
    layout_pool(l, &c->listeners, sizeof(struct tcp_endpoint), min_u32(c->cfg.max_socks, UNCONNECTED_MAX));
}

void tcp_init(struct bypass_stack *s)
{
    struct tcp *t = tcp_head(s);
    t->table_off = core(s)->tcp_state[2];
    t->table_mask = (uint32_t)core(s)->tcp_state[3];
    t->tw_head = t->tw_tail = NO_INDEX;
    for (int i = 0; i < 2; i++)
        t->blocked_head[i] = NO_INDEX;
    memset(t->ports, 0xff, sizeof t->ports);
    tcp_req_init(s);
    tcp_cookie_init(s);
    wheel_init(&t->wheel, now_ns(s));
}

/* ---- Flow table: open addressing, linear probing, no tombstones -------------------------------------- */
uint32_t flow_hash(const struct bypass_stack *s, const addr_t *laddr, const addr_t *raddr, uint16_t lport,
                   uint16_t rport)
{
    struct {
        uint8_t b[32];
        uint16_t lport, rport;
    } key;
    if (likely(addr_is_v4(raddr))) { /* a third of the bytes: an IPv4 flow hashes in five rounds */
        uint32_t hosts[2];
        memcpy(&hosts[0], addr_v4(raddr), 4);
        memcpy(&hosts[1], addr_v4(laddr), 4);
        return hash_flow(s, (uint64_t)hosts[1] << 32 | hosts[0],
                         (uint32_t)__builtin_bswap16(lport) << 16 | __builtin_bswap16(rport));
    }
    memcpy(key.b, laddr, 16);
    memcpy(key.b + 16, raddr, 16);
    key.lport = lport;
    key.rport = rport;
    return (uint32_t)siphash13(core(s)->hash_key, &key, sizeof key);
}

struct tcp_conn *conn_find(const struct bypass_stack *s, uint32_t hash, const addr_t *laddr, const addr_t *raddr,
                           uint16_t lport, uint16_t rport)
{
    const struct flow_slot *table = flow_table(s);
    uint32_t mask = tcp_head(s)->table_mask;
    for (uint32_t i = hash & mask; table[i].idx != 0; i = (i + 1) & mask) {
        if (table[i].hash != hash)
            continue;
        struct tcp_conn *c = conn_at(s, table[i].idx - 1);
        if (c->lport == lport && c->rport == rport && addr_eq(&c->raddr, raddr) && addr_eq(&c->laddr, laddr))
            return c;
    }
    return NULL;
}

static void flow_insert(struct bypass_stack *s, const struct tcp_conn *c)
{
    struct flow_slot *table = flow_table(s);
    uint32_t mask = tcp_head(s)->table_mask, i = c->hash & mask;
    while (table[i].idx != 0)
        i = (i + 1) & mask;
    table[i] = (struct flow_slot){.hash = c->hash, .idx = conn_index(s, c) + 1};
    port_counts(s)[c->lport]++;
}

static void flow_remove(struct bypass_stack *s, const struct tcp_conn *c)
{
    struct flow_slot *table = flow_table(s);
    uint32_t mask = tcp_head(s)->table_mask, i = c->hash & mask, self = conn_index(s, c) + 1;
    while (table[i].idx != self)
        i = (i + 1) & mask;
    for (uint32_t j = (i + 1) & mask; table[j].idx != 0; j = (j + 1) & mask) {
        uint32_t home = table[j].hash & mask;
        if (((j - home) & mask) < ((j - i) & mask))
            continue; /* it may not move in front of its home */
        table[i] = table[j];
        i = j;
    }
    table[i] = (struct flow_slot){0};
    port_counts(s)[c->lport]--;
}

/* ---- Creation --------------------------------------------------------------------------------------- */
/* RFC 6528 3: a clock plus a keyed hash of the connection's names. */
struct flow_isn tcp_flow_isn(const struct bypass_stack *s, const addr_t *laddr, uint16_t lport, const addr_t *raddr,
                             uint16_t rport)
{
    struct {
        addr_t laddr, raddr;
        uint16_t lport, rport;
    } id = {*laddr, *raddr, lport, rport};
    uint64_t f = siphash13(core(s)->isn_key, &id, sizeof id);
    uint32_t clock = (uint32_t)(now_ns(s) >> 6); /* a tick of 64 ns: wraps in 275 s, over 2 MSL */
    return (struct flow_isn){.iss = seq((uint32_t)f + clock), .ts_offset = (uint32_t)(f >> 32)};
}

bool conn_available(const struct bypass_stack *s)
{
    const struct pool *p = &core(s)->conns;
    if (likely(p->used < p->cap))
        return true;
    return tcp_tw_oldest(s) != NO_INDEX;
}

static struct tcp_conn *conn_alloc(struct bypass_stack *s)
{
    struct core *co = core(s);
    uint32_t i = pool_alloc(s, &co->conns);
    if (i == NO_INDEX && tcp_tw_drop_oldest(s)) {
        STAT(s, tcp_time_wait_reused);
        i = pool_alloc(s, &co->conns);
    }
    if (i == NO_INDEX) {
        STAT(s, tcp_no_conn);
        return NULL;
    }
    uint32_t gen = cold_at(s, i)->gen + 1;
    *conn_at(s, i) =
        (struct tcp_conn){.link = NO_INDEX, .sock = NO_INDEX, .flight = NO_INDEX, .min_rtt_us = UINT32_MAX};
    *cold_at(s, i) = (struct tcp_cold){.gen = gen, .listener = NO_INDEX};
    return conn_at(s, i);
}

struct tcp_conn *conn_new(struct bypass_stack *s, const struct tcp_endpoint *ep, const addr_t *laddr, uint16_t lport,
                          const addr_t *raddr, uint16_t rport)
{
    struct tcp_conn *c = conn_alloc(s);
    if (!c)
        return NULL;
    struct tcp_cold *k = conn_cold(s, c);
    tcp_options_inherit(c, k, ep);
    c->laddr = *laddr;
    c->raddr = *raddr;
    c->lport = lport;
    c->rport = rport;
    c->state = BYPASS_CLOSED;
    c->timer.slot = WHEEL_OFF;
    c->rcvq_head = c->rcvq_tail = c->ooo = NO_INDEX;
    c->sndq_head = c->sndq_next = c->sndq_tail = BYPASS_PKT_NONE;
    c->rto_us = RTO_INIT_US;
    c->quick_acks = c->feat & TX_ANSWERS ? 0 : QUICK_ACKS;
    c->syn_mss = TCP_DEFAULT_MSS;
    c->rcv_wscale = tcp_tune_wscale(s, c->rcvbuf, c->feat);
    k->last_in = now_ns(s);
    struct flow_isn isn = tcp_flow_isn(s, laddr, lport, raddr, rport);
    k->ts_offset = isn.ts_offset;
    c->snd_una = c->snd_nxt = k->iss = isn.iss;
    c->hash = flow_hash(s, laddr, raddr, lport, rport);
    flow_insert(s, c);
    return c;
}

uint32_t tcp_ts_now(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return conn_now_ms(s) + conn_cold(s, c)->ts_offset;
}

/* Payload bytes a segment may carry: the peer's MSS, the path's MTU, the program's limit, a frame. */
void conn_update_mss(struct bypass_stack *s, struct tcp_conn *c, uint16_t mtu)
{
    uint32_t headers = 20 + TCP_HDR, frame = s->dev->stride - s->dev->headroom;
    mtu = tcp_pmtu_limit(conn_cold(s, c), mtu ? mtu : s->dev->mtu);
    uint32_t mss = min_u32(c->syn_mss, mtu - headers);
    uint16_t maxseg = conn_cold(s, c)->opt.maxseg;
    mss = min_u32(mss, frame);
    if (maxseg)
        mss = min_u32(mss, maxseg);
    if (c->flags & TF_TS)
        mss -= TCP_TS_BYTES;
    c->snd_mss = (uint16_t)max_u32(mss, TCP_MIN_MSS);
}

void conn_event(struct bypass_stack *s, struct tcp_conn *c, uint32_t mask) { sock_event(s, c->sock, mask); }

void conn_begin(struct bypass_stack *s, struct tcp_conn *c)
{
    struct dst *d = dst_get(s, &c->dst, &c->raddr);
    conn_update_mss(s, c, d ? d->mtu : 0);
    tcp_pmtu_established(s, c);
    tcp_cc_init(s, c);
    if (c->rtx_count > 1)
        c->cwnd = c->snd_mss; /* RFC 6928 2: a SYN that was lost twice makes the initial window one segment */
    tcp_tune_begin(s, c);
}

void conn_established(struct bypass_stack *s, struct tcp_conn *c)
{
    c->state = BYPASS_ESTABLISHED;
    c->rtx_at = 0;
    conn_cold(s, c)->min_rtt_half_us = conn_cold(s, c)->min_rtt_since = 0;
    if (likely(!(c->feat & TX_FO_PENDING)))
        conn_begin(s, c);
    else
        tcp_fastopen_done(s, c);
    c->rtx_count = c->backoff = 0;
    if ((c->flags & TF_SYN_RTX) && c->srtt_us == 0)
        c->rto_us = RTO_FALLBACK_US;
    if (c->flags & TF_KEEPALIVE)
        c->keep_at = now_ns(s) + conn_cold(s, c)->opt.keep_idle_s * SEC_NS;
    tcp_timer_update(s, c);
    STAT(s, tcp_established);
    conn_event(s, c, BYPASS_OUT);
}

/* ---- Waiting for a frame (list 0) or a next hop (list 1) ------------------------------------------------ */
static void link_blocked(struct bypass_stack *s, struct tcp_conn *c, bool next_hop)
{
    struct tcp *t = tcp_head(s);
    c->flags |= TF_BLOCKED | (next_hop ? TF_BLOCKED_DST : 0);
    c->blocked_next = t->blocked_head[next_hop];
    t->blocked_head[next_hop] = conn_index(s, c);
}

void conn_blocked(struct bypass_stack *s, struct tcp_conn *c, bool next_hop)
{
    if (c->flags & TF_BLOCKED)
        return;
    STAT(s, tcp_blocked);
    link_blocked(s, c, next_hop);
    if (!next_hop && tcp_head(s)->blocked_since == 0)
        tcp_head(s)->blocked_since = max_u64(now_ns(s), 1);
}

/* The list is run at the end of bypass_poll(). Who is in it already, or waits for a next hop, has his ACK sent then. */
void conn_ack_batch(struct bypass_stack *s, struct tcp_conn *c)
{
    c->flags |= TF_ACK_BATCH;
    if (!(c->flags & TF_BLOCKED))
        link_blocked(s, c, false);
}

static void unblock(struct bypass_stack *s, struct tcp_conn *c)
{
    if (!(c->flags & TF_BLOCKED))
        return;
    uint32_t *link = &tcp_head(s)->blocked_head[(c->flags & TF_BLOCKED_DST) != 0], self = conn_index(s, c);
    while (*link != self)
        link = &conn_at(s, *link)->blocked_next;
    *link = c->blocked_next;
    c->flags &= ~(uint32_t)(TF_BLOCKED | TF_BLOCKED_DST);
}

void tcp_dst_changed(struct bypass_stack *s) { tcp_head(s)->resume_all = 1; }

static void resume_list(struct bypass_stack *s, int list)
{
    struct tcp *t = tcp_head(s);
    uint32_t i = t->blocked_head[list];
    t->blocked_head[list] = NO_INDEX;
    uint32_t reversed = NO_INDEX; /* first blocked, first served */
    while (i != NO_INDEX) {
        struct tcp_conn *c = conn_at(s, i);
        uint32_t next = c->blocked_next;
        c->blocked_next = reversed;
        reversed = i;
        i = next;
    }
    while (reversed != NO_INDEX) { /* tcp_resume may end this connection or block it again, but no other */
        struct tcp_conn *c = conn_at(s, reversed);
        reversed = c->blocked_next;
        c->flags &= ~(uint32_t)(TF_BLOCKED | TF_BLOCKED_DST);
        tcp_resume(s, c);
    }
}

void tcp_resume_all(struct bypass_stack *s)
{
    struct tcp *t = tcp_head(s);
    if (t->blocked_head[0] != NO_INDEX)
        resume_list(s, 0);
    if (t->blocked_head[0] == NO_INDEX)
        t->blocked_since = 0;
    if (t->resume_all) {
        t->resume_all = 0;
        resume_list(s, 1);
    }
}

/* ---- End ------------------------------------------------------------------------------------------------- */
static void conn_free(struct bypass_stack *s, struct tcp_conn *c)
{
    tcp_rcv_clear(s, c);
    pool_free(s, &core(s)->conns, conn_index(s, c));
}

void conn_drop(struct bypass_stack *s, struct tcp_conn *c, int err)
{
    struct tcp_cold *k = conn_cold(s, c);
    unblock(s, c);
    wheel_disarm(s, &tcp_head(s)->wheel, conn_index(s, c));
    c->rtx_at = c->ack_at = c->keep_at = 0;
    if (c->state == BYPASS_TIME_WAIT)
        tcp_tw_unlink(s, c);
    tcp_listen_forget(s, c);
    tcp_snd_clear(s, c);
    flow_remove(s, c);
    c->state = BYPASS_CLOSED;
    c->flags |= TF_DEAD;
    if (c->sock == NO_INDEX) {
        conn_free(s, c);
        return;
    }
    /* the handle stays valid; data that arrived before stays readable */
    if (err)
        k->error = (int16_t)err;
    conn_event(s, c, BYPASS_IN | BYPASS_OUT | BYPASS_RDHUP | BYPASS_HUP | (err ? BYPASS_ERR : 0));
}

void conn_reset(struct bypass_stack *s, struct tcp_conn *c, int err)
{
    STAT(s, tcp_aborted);
    if (c->state != BYPASS_SYN_SENT && c->state != BYPASS_TIME_WAIT)
        tcp_send_rst(s, c);
    conn_drop(s, c, err);
}

static void queue_fin(struct bypass_stack *s, struct tcp_conn *c)
{
    if (unlikely(c->feat & TX_FO_PENDING)) { /* RFC 9293 3.10.4, SYN-RECEIVED: after entering ESTABLISHED */
        c->feat |= TX_FO_FIN;
        return;
    }
    c->flags |= TF_FIN_QUEUED;
    c->state = c->state == BYPASS_CLOSE_WAIT ? BYPASS_LAST_ACK : BYPASS_FIN_WAIT_1;
    tcp_output(s, c);
}

/* TX_FO_FIN, and the handshake is over. */
void conn_close_late(struct bypass_stack *s, struct tcp_conn *c)
{
    c->feat &= ~(uint32_t)TX_FO_FIN;
    queue_fin(s, c);
}

/* sock.c has dealt with connections that are not open yet, or not any more. */
void tcp_shutdown(struct bypass_stack *s, struct tcp_conn *c, int how)
{
    if (how != BYPASS_SHUT_WR) {
        c->flags |= TF_RCV_SHUT; /* what comes is still taken and may be read, as on Linux */
        conn_event(s, c, BYPASS_IN | BYPASS_RDHUP);
    }
    if (how != BYPASS_SHUT_RD && !(c->flags & TF_FIN_QUEUED)) {
        conn_event(s, c, BYPASS_OUT);
        queue_fin(s, c);
    }
    if ((c->flags & TF_FIN_QUEUED) && (c->flags & (TF_FIN_IN | TF_RCV_SHUT)))
        conn_event(s, c, BYPASS_HUP);
}

/* In FIN_WAIT_2 without a program: nobody reads any more, so the peer's end is not waited for without limit
 * (TCP_LINGER2). false: not at all, the connection is gone. */
bool conn_fin_wait(struct bypass_stack *s, struct tcp_conn *c)
{
    int16_t wait_s = conn_cold(s, c)->opt.fin_wait_s;
    if (wait_s < 0) {
        conn_reset(s, c, 0);
        return false;
    }
    c->rtx_at = now_ns(s) + (uint64_t)wait_s * SEC_NS;
    tcp_timer_update(s, c);
    return true;
}

/* RFC 9293 3.10.4; unread data makes it a reset (RFC 2525 2.17), so does a linger time of zero. */
void tcp_close(struct bypass_stack *s, struct tcp_conn *c)
{
    if (c->flags & TF_DEAD) {
        conn_free(s, c);
        return;
    }
    if (c->state == BYPASS_SYN_SENT) {
        conn_drop(s, c, 0);
        return;
    }
    if (c->rcv_queued > 0 || conn_cold(s, c)->opt.linger_s == 0 || tcp_opening(c)) {
        conn_reset(s, c, 0);
        return;
    }
    c->keep_at = 0;
    if (c->state == BYPASS_FIN_WAIT_2) { /* shut down before: now nobody waits for the peer's data */
        (void)conn_fin_wait(s, c);
    } else if (!(c->flags & TF_FIN_QUEUED)) {
        queue_fin(s, c);
    }
}

void tcp_destroy(struct bypass_stack *s)
{
    struct core *co = core(s);
    for (uint32_t i = 0; i < co->socks.bump; i++) { /* handles first: then no connection outlives its drop */
        struct sock *k = sock_at(s, i);
        if (k->type == SOCK_TCP) {
            struct tcp_conn *c = conn_at(s, k->idx);
            c->sock = NO_INDEX;
            if (c->flags & TF_DEAD)
                conn_free(s, c);
            sock_free(s, i);
        } else if (k->type == SOCK_LISTEN) {
            uint32_t ep = k->idx;
            sock_free(s, i);
            tcp_endpoint_close(s, ep);
        }
    }
    struct flow_slot *table = flow_table(s);
    uint32_t mask = tcp_head(s)->table_mask;
    for (uint32_t i = 0; i <= mask; i++)
        while (table[i].idx != 0)
            conn_reset(s, conn_at(s, table[i].idx - 1), 0);
}

/* ---- Active open (RFC 9293 3.10.1) ---------------------------------------------------------------------- */
/* RFC 1122 4.2.2.13 (1): sequence numbers that no segment of the flow's last connection can be taken for. */
static void conn_follow(struct bypass_stack *s, struct tcp_conn *c, seq_t old_snd_nxt)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (seq_leq(k->iss, seq_add(old_snd_nxt, 65535)))
        k->iss = c->snd_una = c->snd_nxt = seq_add(old_snd_nxt, 65536);
}

int64_t tcp_connect(struct bypass_stack *s, uint32_t idx, const struct bypass_endpoint *peer)
{
    struct tcp_endpoint *ep = endpoint_at(s, idx);
    addr_t local = ep->addr;
    if (!addr_is_v4(&peer->addr))
        return -EAFNOSUPPORT;
    if (peer->port == 0 || addr_is_any(&peer->addr))
        return -ECONNREFUSED;
    if (addr_is_any(&local) && !addr_for(s, &peer->addr, &local))
        return -ENETUNREACH;
    uint16_t port = ep->port ? ep->port : tcp_port_choose(s, &local, peer);
    uint32_t hash = flow_hash(s, &local, &peer->addr, port, peer->port);
    struct tcp_conn *old = port ? conn_find(s, hash, &local, &peer->addr, port, peer->port) : NULL;
    if (port == 0 || (old && !tcp_tw_reusable(s, old)))
        return -EADDRNOTAVAIL;
    seq_t after = old ? old->snd_nxt : seq(0);
    if (old)
        tcp_tw_reuse(s, old);
    struct tcp_conn *c = conn_new(s, ep, &local, port, &peer->addr, peer->port);
    if (!c)
        return -ENOBUFS;
    if (old)
        conn_follow(s, c, after);
    c->flags |= TF_TS | TF_WSCALE; /* offered; the answer decides */
    c->feat |= TX_SACK;
    conn_cold(s, c)->unacked_since = now_ns(s);
    c->state = BYPASS_SYN_SENT;
    STAT(s, tcp_active_opens);
    return conn_index(s, c);
}

/* ---- Introspection -------------------------------------------------------------------------------------------- */
/* As Linux' tcp_poll(). */
int tcp_conn_ready(const struct bypass_stack *s, const struct tcp_conn *c)
{
    int mask = conn_cold(s, c)->error ? BYPASS_ERR : 0;
    if (unlikely(c->feat & TX_URG_IN) && tcp_urg_ready(s, c))
        mask |= BYPASS_PRI;
    if (conn_over(c))
        return mask | BYPASS_IN | BYPASS_OUT | BYPASS_RDHUP | BYPASS_HUP;
    if (tcp_opening(c))
        return mask | (c->feat & TX_FO_DEFER ? BYPASS_OUT : 0);
    bool no_more_in = (c->flags & (TF_FIN_IN | TF_RCV_SHUT)) != 0, no_more_out = (c->flags & TF_FIN_QUEUED) != 0;
    if (no_more_in)
        mask |= BYPASS_IN | BYPASS_RDHUP;
    if (tcp_readable(s, c))
        mask |= BYPASS_IN;
    if (no_more_out || tcp_snd_room(s, c) > 0)
        mask |= BYPASS_OUT;
    if (no_more_in && no_more_out)
        mask |= BYPASS_HUP;
    return mask;
}

void tcp_audit(const struct bypass_stack *s, struct bypass_audit *a)
{
    a->conns = core(s)->conns.used + core(s)->reqs.used;
    a->listeners = core(s)->listeners.used;
    a->timers = tcp_head(s)->wheel.armed;
    a->flights = core(s)->flights.used;
}
