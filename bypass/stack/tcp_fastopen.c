/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_fastopen.c - TCP Fast Open (RFC 7413): data in the SYN, of a client that has shown before that it receives what is
 * sent to its address. What it shows is a cookie, about which the server keeps nothing:
 *
 *     cookie = SipHash(secret, client's address, period)         a period is 73 minutes
 *
 * It is good in the period in which it was given and in the next (4.1.2: keys change, and two are valid at a time); one of
 * the period before is renewed in the SYN-ACK.
 *
 * Server. A SYN with a good cookie makes a connection at once, in SYN_RECEIVED with TX_FO_PENDING: the program accepts,
 * reads and writes it, snd_una stands behind the SYN-ACK as if that was acknowledged, and the timer repeats the SYN-ACK
 * until the handshake's ACK comes. Of these a listener has at most as many as BYPASS_TCP_FASTOPEN says; those that were
 * reset count for another minute, or a thief of cookies could have as many as he likes (5.1). Beyond that, and with a
 * wrong cookie, the data is not looked at: the handshake is an ordinary one.
 *
 * Client. Data goes with the SYN when a cookie is known, and stays in the send queue. A SYN-ACK that acknowledges less
 * lets the rest go as new data. A repeated SYN is a plain one, and when that works twice in a row where the other did not,
 * the path is left alone for a while (4.2.1, 4.1.3.1). Cookies are kept in a table of fixed size.
 */
#include <errno.h>

#include "tcp.h"

enum { PERIOD_SHIFT = 42, COOKIE_BYTES = 8, RESET_COUNTS_S = 60 };
enum { SETS = 128, WAYS = 4, LOSSES = 2, LOSSES_MAX = 8, HOLD_OFF_S = 60 };

struct fo_entry { /* of a server; a free one has the address zero */
    addr_t addr;
    uint8_t cookie[FO_COOKIE_MAX];
    uint32_t used_s, lost_s; /* last use; last loss of a SYN */
    uint16_t mss;            /* of its SYN-ACK; 0: it had none */
    uint8_t cookie_len;      /* 0: none is known */
    uint8_t losses;          /* SYNs in a row that were lost and arrived without Fast Open */
    uint32_t pad;
};
static_assert(sizeof(struct fo_entry) == 48, "24 KiB in all");

void tcp_fastopen_layout(struct layout *l, struct core *c)
{
    c->tcp_state[6] = layout_bytes(l, SETS * WAYS * sizeof(struct fo_entry));
}

static uint32_t now_s(const struct bypass_stack *s) { return (uint32_t)(now_ns(s) / SEC_NS); }

/* ---- Server: cookies ------------------------------------------------------------------------------------- */
static uint64_t cookie_of(const struct bypass_stack *s, const addr_t *client, uint64_t period)
{
    struct {
        addr_t client;
        uint64_t period;
    } id = {*client, period};
    return siphash13(core(s)->fastopen_key, &id, sizeof id);
}

static uint64_t period_now(const struct bypass_stack *s) { return now_ns(s) >> PERIOD_SHIFT; }

static void put_cookie(const struct bypass_stack *s, const addr_t *client, struct tcp_opts *o)
{
    uint64_t cookie = cookie_of(s, client, period_now(s));
    STAT(s, tcp_fastopen_cookies);
    o->has_fo = true;
    o->cookie_len = COOKIE_BYTES;
    memcpy(o->cookie, &cookie, COOKIE_BYTES);
}

enum cookie { COOKIE_WRONG, COOKIE_OLD, COOKIE_GOOD };

static enum cookie check_cookie(const struct bypass_stack *s, const struct segment *g)
{
    uint64_t cookie, period = period_now(s);
    if (g->opt.cookie_len != COOKIE_BYTES)
        return COOKIE_WRONG;
    memcpy(&cookie, g->opt.cookie, COOKIE_BYTES);
    if (cookie == cookie_of(s, &g->ri->src, period))
        return COOKIE_GOOD;
    return period > 0 && cookie == cookie_of(s, &g->ri->src, period - 1) ? COOKIE_OLD : COOKIE_WRONG;
}

/* ---- Server: the bound -------------------------------------------------------------------------------------- */
static bool may_serve(const struct bypass_stack *s, struct tcp_endpoint *ep)
{
    if (!(core(s)->cfg.fastopen & BYPASS_FASTOPEN_SERVER) || ep->fo_max == 0)
        return false;
    if (ep->fo_resets > 0 && now_ns(s) >= ep->fo_resets_end)
        ep->fo_resets = 0;
    return ep->fo_pending + ep->fo_resets < ep->fo_max;
}

static struct tcp_endpoint *pending_at(const struct bypass_stack *s, const struct tcp_conn *c)
{
    const struct tcp_cold *k = conn_cold(s, c);
    if (!(c->feat & TX_FO_PENDING) || k->listener == NO_INDEX)
        return NULL;
    struct tcp_endpoint *ep = endpoint_at(s, k->listener);
    return ep->used && ep->gen == k->listener_gen ? ep : NULL;
}

void tcp_fastopen_done(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_endpoint *ep = pending_at(s, c);
    if (ep)
        ep->fo_pending--;
    c->feat &= ~(uint32_t)TX_FO_PENDING;
    if (!(c->flags & TF_ACCEPTABLE))
        conn_cold(s, c)->listener = NO_INDEX;
}

/* RFC 7413 5.1: its address' owner did not ask for this connection. The cookie is in wrong hands. */
void tcp_fastopen_reset(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_endpoint *ep = pending_at(s, c);
    if (!ep)
        return;
    ep->fo_resets++;
    ep->fo_resets_end = now_ns(s) + RESET_COUNTS_S * SEC_NS;
}

/* ---- Server: a SYN --------------------------------------------------------------------------------------------- */
/* What an ordinary SYN-ACK says to a SYN with the option. */
void tcp_fastopen_offer(struct bypass_stack *s, struct tcp_endpoint *ep, const struct segment *g, struct tcp_opts *o)
{
    if (g->opt.has_fo && may_serve(s, ep) && (g->opt.cookie_len == 0 || check_cookie(s, g) == COOKIE_WRONG))
        put_cookie(s, &g->ri->src, o);
}

/* The data behind the SYN, which the SYN-ACK acknowledges. */
static void take_syn_data(struct bypass_stack *s, struct tcp_conn *c, struct segment *g)
{
    g->seq = seq_add(g->seq, 1);
    g->flags &= (uint8_t)~TCP_SYN;
    tcp_rcv_data(s, c, g);
    c->flags &= ~(uint32_t)(TF_ACK_NOW | TF_ACK_LATER | TF_ACK_BATCH);
    c->ack_at = 0;
    c->last_ack_sent = c->rcv_nxt;
    c->feat |= TX_FASTOPEN;
}

static void begin_early(struct bypass_stack *s, struct tcp_conn *c, struct tcp_endpoint *ep, struct segment *g)
{
    struct tcp_cold *k = conn_cold(s, c);
    ep->fo_pending++;
    c->feat |= TX_FO_PENDING;
    if (tcp_ecn_agreed(s, ep, g))
        c->feat |= TX_ECN;
    c->snd_una = c->snd_nxt;
    k->segs_in = 1;
    k->data_segs_in = g->len > 0;
    conn_begin(s, c);
    if (g->len > 0)
        take_syn_data(s, c, g);
    (void)tcp_listen_ready(s, c);
    tcp_send_syn(s, c);
}

bool tcp_fastopen_syn_in(struct bypass_stack *s, struct tcp_endpoint *ep, struct segment *g)
{
    if (g->opt.cookie_len == 0 || !(core(s)->cfg.fastopen & BYPASS_FASTOPEN_SERVER) || ep->fo_max == 0)
        return false;
    if (!may_serve(s, ep)) {
        STAT(s, tcp_fastopen_overflow);
        return false;
    }
    enum cookie cookie = check_cookie(s, g);
    if (cookie == COOKIE_WRONG) {
        STAT(s, tcp_fastopen_bad_cookies);
        return false;
    }
    struct tcp_conn *c = tcp_req_promote(s, ep, g, tcp_req_iss(s, g));
    if (!c)
        return false;
    STAT(s, tcp_passive_opens);
    STAT(s, tcp_fastopen_passive);
    if (cookie == COOKIE_OLD)
        c->feat |= TX_FO_ASK;
    begin_early(s, c, ep, g);
    return true;
}

/* ---- Client: the table of cookies -------------------------------------------------------------------------------- */
static struct fo_entry *set_of(const struct bypass_stack *s, const addr_t *server)
{
    struct fo_entry *table = at(s, core(s)->tcp_state[6]);
    return &table[siphash13(core(s)->hash_key, server, sizeof *server) % SETS * WAYS];
}

static struct fo_entry *entry_find(const struct bypass_stack *s, const addr_t *server)
{
    struct fo_entry *set = set_of(s, server);
    for (int i = 0; i < WAYS; i++)
        if (addr_eq(&set[i].addr, server))
            return &set[i];
    return NULL;
}

/* The server's, or one that is free, or the one of its set that was used longest ago. */
static struct fo_entry *entry_get(struct bypass_stack *s, const addr_t *server)
{
    struct fo_entry *set = set_of(s, server), *e = entry_find(s, server);
    if (e)
        return e;
    e = set;
    for (int i = 1; i < WAYS; i++)
        if (set[i].used_s < e->used_s)
            e = &set[i];
    *e = (struct fo_entry){.addr = *server, .used_s = now_s(s)};
    return e;
}

/* Something on the path seems to swallow SYNs with data, or with the option. */
static bool held_off(const struct bypass_stack *s, const struct fo_entry *e)
{
    return e && e->losses >= LOSSES && now_s(s) - e->lost_s < (uint32_t)HOLD_OFF_S << e->losses;
}

/* ---- Client: the SYN ------------------------------------------------------------------------------------------------ */
/* Payload bytes that a SYN may carry, whatever options stand beside them. */
static uint32_t syn_room(struct bypass_stack *s, struct tcp_conn *c, const struct fo_entry *e)
{
    const struct dst *d = dst_get(s, &c->dst, &c->raddr);
    uint32_t mtu = d && d->mtu ? d->mtu : s->dev->mtu, maxseg = conn_cold(s, c)->opt.maxseg;
    uint32_t mss = min_u32(mtu - 20u - TCP_HDR, e->mss ? e->mss : (uint32_t)TCP_DEFAULT_MSS);
    mss = min_u32(min_u32(mss, maxseg ? maxseg : UINT32_MAX), (uint32_t)s->dev->stride - s->dev->headroom);
    return mss > TCP_OPTS_MAX ? mss - TCP_OPTS_MAX : 0;
}

static int64_t queue_behind_syn(struct bypass_stack *s, struct tcp_conn *c, const void *buf, size_t n, uint32_t room)
{
    seq_t una = c->snd_una;
    n = min_u64(n, min_u32(room, c->sndbuf));
    c->snd_mss = (uint16_t)room;
    c->snd_una = seq_add(conn_cold(s, c)->iss, 1); /* what is queued counts from there */
    size_t done = tcp_snd_queue(s, c, buf, n);
    c->snd_una = una;
    return (int64_t)done;
}

int64_t tcp_fastopen_connect(struct bypass_stack *s, struct tcp_conn *c, const void *buf, size_t n)
{
    struct fo_entry *e = entry_find(s, &c->raddr);
    int64_t done = 0;
    if (!held_off(s, e)) {
        c->feat |= TX_FO_ASK;
        if (e && e->cookie_len > 0 && n > 0)
            done = queue_behind_syn(s, c, buf, n, syn_room(s, c, e));
    }
    tcp_send_syn(s, c);
    return done > 0 ? done : -EINPROGRESS;
}

/* TCP_FASTOPEN_CONNECT: the SYN waits for the first write when that can go with it. */
int tcp_fastopen_defer(struct bypass_stack *s, struct tcp_conn *c)
{
    const struct fo_entry *e = entry_find(s, &c->raddr);
    if (!e || e->cookie_len == 0 || held_off(s, e))
        return (int)tcp_fastopen_connect(s, c, NULL, 0);
    c->feat |= TX_FO_DEFER;
    return 0;
}

int64_t tcp_fastopen_first_write(struct bypass_stack *s, struct tcp_conn *c, const void *buf, size_t n)
{
    if (n == 0)
        return 0;
    c->feat &= ~(uint32_t)TX_FO_DEFER;
    int64_t done = tcp_fastopen_connect(s, c, buf, n);
    if (done < (int64_t)n)
        c->flags |= TF_WANT_OUT;
    return done > 0 ? done : -EAGAIN;
}

/* The option of our SYN or SYN-ACK, and a SYN's data into frame p. Returns its bytes; *sum: their checksum. */
uint32_t tcp_fastopen_syn_out(struct bypass_stack *s, struct tcp_conn *c, struct tcp_opts *o, bypass_pkt p,
                              uint32_t *sum)
{
    if (c->flags & TF_PASSIVE) {
        c->feat &= ~(uint32_t)TX_FO_ASK;
        put_cookie(s, &c->raddr, o);
        return 0;
    }
    if (c->state != BYPASS_SYN_SENT || (c->flags & TF_SYN_RTX)) /* 4.2.1: repeated without */
        return 0;
    struct fo_entry *e = entry_find(s, &c->raddr);
    o->has_fo = true;
    if (!e || e->cookie_len == 0)
        return 0;
    e->used_s = now_s(s);
    o->cookie_len = e->cookie_len;
    memcpy(o->cookie, e->cookie, e->cookie_len);
    if (c->sndq_head == BYPASS_PKT_NONE)
        return 0;
    const struct bypass_pkt_meta *m = pkt_meta(s, c->sndq_head);
    memcpy(pkt_put(s, p, m->data_len), pkt_frame(s, c->sndq_head) + m->data_off, m->data_len);
    *sum = m->csum;
    c->sndq_next = m->next;
    c->snd_nxt = seq_add(conn_cold(s, c)->iss, 1u + m->data_len);
    conn_cold(s, c)->data_segs_out++;
    STAT(s, tcp_fastopen_active);
    STAT(s, tcp_out_data_segments);
    return m->data_len;
}

/* ---- Client: the answer ------------------------------------------------------------------------------------------- */
static void learn(struct bypass_stack *s, const struct tcp_conn *c, const struct segment *g)
{
    bool lost = (c->flags & TF_SYN_RTX) != 0, cookie = g->opt.has_fo && g->opt.cookie_len > 0 && !lost;
    struct fo_entry *e = lost || cookie ? entry_get(s, &c->raddr) : entry_find(s, &c->raddr);
    if (!e)
        return;
    e->losses = lost ? (uint8_t)min_u32(e->losses + 1u, LOSSES_MAX) : 0;
    if (lost)
        e->lost_s = now_s(s);
    if (!cookie)
        return;
    e->mss = g->opt.mss;
    e->cookie_len = g->opt.cookie_len;
    memcpy(e->cookie, g->opt.cookie, g->opt.cookie_len);
}

/* What was sent with the SYN and is not acknowledged was never sent. */
static void take_back(struct tcp_conn *c, seq_t nxt)
{
    c->sndq_next = c->sndq_head;
    c->snd_nxt = nxt;
}

void tcp_fastopen_syn_ack_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g)
{
    seq_t first = seq_add(conn_cold(s, c)->iss, 1);
    learn(s, c, g);
    c->feat &= ~(uint32_t)TX_FO_ASK;
    if (seq_eq(c->snd_nxt, first))
        return;
    if (seq_eq(g->ack, c->snd_nxt)) {
        c->feat |= TX_FASTOPEN;
        STAT(s, tcp_fastopen_active_taken);
    }
    c->snd_una = first;
    tcp_snd_skip(s, c, g->ack.v - first.v);
    take_back(c, g->ack);
}

void tcp_fastopen_crossed(struct bypass_stack *s, struct tcp_conn *c)
{
    c->feat &= ~(uint32_t)TX_FO_ASK;
    take_back(c, seq_add(conn_cold(s, c)->iss, 1));
}
