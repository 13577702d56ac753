/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sock_opt.c - what a program may set: one table, a row an option. A row says where the value lives, which values
 * are good, and what a change causes on a live connection.
 *
 * Values live in struct tcp_options, the same in an endpoint and in a connection's cold half, so that inheritance is one
 * copy: a connection begins with all that its endpoint or listener had, as on Linux. Flags that each segment asks
 * for, and buffer sizes, live in the hot half.
 *
 * Read first: socket(7), tcp(7), ip(7). UDP's few options are udp.c's.
 */
#include <errno.h>

#include "core.h"
#include "tcp.h"

/* Whose option it is: an endpoint (fresh, bound, listening), or a connection. */
struct owner {
    struct bypass_stack *s;
    struct tcp_endpoint *ep; /* NULL: a connection */
    struct tcp_conn *c;      /* NULL: an endpoint */
    struct tcp_options *opt;
    uint32_t *flags, *feat;
};

enum where { /* of the value */
             IN_U8,
             IN_U16,
             IN_I16,
             IN_U32,
             IN_I32,
             IN_BITS,  /* tcp_options.bits */
             IN_FLAGS, /* TF_* */
             IN_SNDBUF,
             IN_RCVBUF,
             NOWHERE, /* the row's functions know */
};

struct row {
    uint8_t where;
    uint16_t off;              /* IN_U8 ... IN_I32: in struct tcp_options */
    uint32_t bit;              /* IN_BITS, IN_FLAGS */
    int64_t min, max;          /* others give -EINVAL, unless `fit` makes them good */
    uint32_t mark;             /* TX_*: the program has chosen */
    bool fixed;                /* cannot be set */
    int64_t (*fit)(int64_t v); /* what Linux makes of a value before it is judged */
    void (*changed)(const struct owner *o);
    int (*set)(const struct owner *o, int64_t v);
    int64_t (*get)(const struct owner *o);
};

/* ---- What Linux makes of values ---------------------------------------------------------------------- */
enum { BUF_MIN = 4096, BUF_MAX = 1 << 30 };

static int64_t fit_bool(int64_t v) { return v != 0; }

static int64_t fit_buffer(int64_t v) { return v < BUF_MIN ? BUF_MIN : v > BUF_MAX ? BUF_MAX : v; }

static int64_t fit_ttl(int64_t v) { return v == -1 ? 64 : v; }

static int64_t fit_tos(int64_t v) { return v & 0xfc; } /* the ECN bits are the protocol's */

static int64_t fit_lowat(int64_t v) { return v < 0 ? INT32_MAX : v == 0 ? 1 : v; }

static int64_t fit_notsent(int64_t v) { return (uint32_t)v; }

static int64_t fit_fin_wait(int64_t v)
{
    enum { LONGEST_S = 120 };
    return v < 0 ? -1 : v == 0 ? FIN_WAIT_S : v > LONGEST_S ? LONGEST_S : v;
}

/* ---- What a change causes at once on a live connection ------------------------------------------------ */
static void keepalive_changed(const struct owner *o)
{
    if (o->c->state == BYPASS_SYN_SENT || o->c->state == BYPASS_SYN_RECEIVED)
        return; /* begins when it is established */
    o->c->keep_at = o->c->flags & TF_KEEPALIVE ? now_ns(o->s) + o->opt->keep_idle_s * SEC_NS : 0;
    tcp_timer_update(o->s, o->c);
}

static void nodelay_changed(const struct owner *o)
{
    if ((o->c->flags & TF_NODELAY) && o->c->sndq_next != BYPASS_PKT_NONE)
        o->c->flags |= TF_PUSH_ALL; /* tcp(7): what is held back goes, even with TCP_CORK */
    tcp_output(o->s, o->c);
}

static void cork_changed(const struct owner *o) { tcp_output(o->s, o->c); }

/* Bytes that waited may be enough now. */
static void readiness_changed(const struct owner *o)
{
    conn_event(o->s, o->c, (uint32_t)tcp_conn_ready(o->s, o->c) & (BYPASS_IN | BYPASS_OUT));
}

static void lowat_changed(const struct owner *o)
{
    *o->feat = o->opt->rcvlowat > 1 ? *o->feat | TX_RCVLOWAT : *o->feat & ~(uint32_t)TX_RCVLOWAT;
    if (o->c)
        readiness_changed(o);
}

static void notsent_changed(const struct owner *o)
{
    *o->feat = o->opt->notsent_lowat > 0 ? *o->feat | TX_NOTSENT : *o->feat & ~(uint32_t)TX_NOTSENT;
    if (o->c)
        readiness_changed(o);
}

/* ---- Values that are not simply stored ------------------------------------------------------------------ */
static int set_quickack(const struct owner *o, int64_t v)
{
    *o->feat = (*o->feat & ~(uint32_t)(TX_ANSWERS | TX_LISTENS)) | (v ? TX_LISTENS : TX_ANSWERS);
    if (!o->c)
        return 0;
    o->c->quick_acks = v ? QUICK_ACKS : 0;
    if (v && (o->c->flags & TF_ACK_LATER))
        tcp_send_ack(o->s, o->c);
    return 0;
}

static int64_t get_quickack(const struct owner *o) { return !(*o->feat & TX_ANSWERS); }

/* tcp(7): zero means no limit; a live connection keeps the segments that it has. */
static int set_maxseg(const struct owner *o, int64_t v)
{
    enum { LEAST = 88, MOST = 32767 };
    if (v != 0 && (v < LEAST || v > MOST))
        return -EINVAL;
    o->opt->maxseg = (uint16_t)v;
    return 0;
}

static int64_t get_maxseg(const struct owner *o)
{
    if (o->opt->maxseg && (!o->c || (o->c->flags & TF_DEAD)))
        return o->opt->maxseg;
    return o->c ? o->c->snd_mss : TCP_DEFAULT_MSS;
}

static int set_pacing(const struct owner *o, int64_t v)
{
    uint64_t units = v > 0 ? (uint64_t)v : 0;
    if (units > INT32_MAX)
        units = 1u << 31 | min_u64(units >> 8, INT32_MAX);
    o->opt->max_pacing = (uint32_t)units;
    if (o->c && !(o->c->flags & TF_DEAD))
        tcp_cc_repace(o->s, o->c);
    return 0;
}

static int64_t get_pacing(const struct owner *o) { return (int64_t)tcp_pace_limit(o->opt); }

/* tcp(7): how many connections may wait for the end of their handshake although their data is here. */
static int set_fastopen(const struct owner *o, int64_t v)
{
    if (v < 0 || v > INT32_MAX || !o->ep)
        return -EINVAL;
    o->ep->fo_max = (uint16_t)min_u64((uint64_t)v, BACKLOG_MAX);
    return 0;
}

static int64_t get_fastopen(const struct owner *o) { return o->ep ? o->ep->fo_max : 0; }

static int set_fastopen_connect(const struct owner *o, int64_t v)
{
    if (v < 0 || v > 1 || (o->ep ? o->ep->listening : !conn_over(o->c)))
        return -EINVAL;
    if (!(core(o->s)->cfg.fastopen & BYPASS_FASTOPEN_CLIENT))
        return -EOPNOTSUPP;
    o->opt->bits = (uint16_t)(v ? o->opt->bits | OPT_FASTOPEN_CONNECT : o->opt->bits & ~OPT_FASTOPEN_CONNECT);
    return 0;
}

static int64_t get_fastopen_connect(const struct owner *o) { return (o->opt->bits & OPT_FASTOPEN_CONNECT) != 0; }

static int64_t get_mtu(const struct owner *o)
{
    if (!o->c)
        return -ENOTCONN;
    return o->c->path_mtu ? o->c->path_mtu : o->s->dev->mtu;
}

static int set_keep_frames(const struct owner *o, int64_t v)
{
    *o->feat = v ? *o->feat | TX_KEEP_FRAMES : *o->feat & ~(uint32_t)TX_KEEP_FRAMES;
    return 0;
}

static int64_t get_keep_frames(const struct owner *o) { return (*o->feat & TX_KEEP_FRAMES) != 0; }

static int64_t get_type(const struct owner *o)
{
    (void)o;
    return BYPASS_STREAM;
}

static int64_t get_acceptconn(const struct owner *o) { return o->ep && o->ep->listening; }

/* ---- The table --------------------------------------------------------------------------------------------- */
#define OPT(name) offsetof(struct tcp_options, name)
#define BOOL .max = 1, .fit = fit_bool

static const struct row rows[BYPASS_OPT_COUNT] = {
    [BYPASS_SO_SNDBUF] = {IN_SNDBUF, .max = BUF_MAX, .fit = fit_buffer, .mark = TX_SNDBUF_SET},
    [BYPASS_SO_RCVBUF] = {IN_RCVBUF, .max = BUF_MAX, .fit = fit_buffer, .mark = TX_RCVBUF_SET},
    [BYPASS_SO_KEEPALIVE] = {IN_FLAGS, .bit = TF_KEEPALIVE, BOOL, .changed = keepalive_changed},
    [BYPASS_SO_LINGER] = {IN_I32, OPT(linger_s), .min = -1, .max = INT32_MAX},
    [BYPASS_SO_REUSEADDR] = {IN_BITS, .bit = OPT_REUSEADDR, BOOL},
    [BYPASS_SO_REUSEPORT] = {IN_BITS, .bit = OPT_REUSEPORT, BOOL},
    [BYPASS_SO_OOBINLINE] = {IN_BITS, .bit = OPT_OOBINLINE, BOOL},
    [BYPASS_SO_BROADCAST] = {IN_BITS, .bit = OPT_BROADCAST, BOOL},
    [BYPASS_SO_RCVLOWAT] = {IN_U32, OPT(rcvlowat), .max = INT32_MAX, .fit = fit_lowat, .changed = lowat_changed},
    [BYPASS_SO_TYPE] = {NOWHERE, .fixed = true, .get = get_type},
    [BYPASS_SO_ACCEPTCONN] = {NOWHERE, .fixed = true, .get = get_acceptconn},
    [BYPASS_SO_MAX_PACING_RATE] = {NOWHERE, .set = set_pacing, .get = get_pacing},
    [BYPASS_TCP_KEEP_FRAMES] = {NOWHERE, .set = set_keep_frames, .get = get_keep_frames},
    [BYPASS_TCP_ECN] = {IN_U8, OPT(ecn), .max = 2},
    [BYPASS_IP_TTL] = {IN_U8, OPT(ttl), .min = 1, .max = 255, .fit = fit_ttl},
    [BYPASS_IP_TOS] = {IN_U8, OPT(tos), .max = 255, .fit = fit_tos},
    [BYPASS_IP_MTU] = {NOWHERE, .fixed = true, .get = get_mtu},
    /* 1: as the path allows, 2: always; the same for a protocol that keeps to the path's MTU by itself */
    [BYPASS_IP_MTU_DISCOVER] = {IN_U8, OPT(mtu_discover), .min = 1, .max = 2},
    [BYPASS_TCP_NODELAY] = {IN_FLAGS, .bit = TF_NODELAY, BOOL, .changed = nodelay_changed},
    [BYPASS_TCP_CORK] = {IN_FLAGS, .bit = TF_CORK, BOOL, .changed = cork_changed},
    [BYPASS_TCP_MAXSEG] = {NOWHERE, .set = set_maxseg, .get = get_maxseg},
    [BYPASS_TCP_QUICKACK] = {NOWHERE, .set = set_quickack, .get = get_quickack},
    [BYPASS_TCP_KEEPIDLE] = {IN_U16, OPT(keep_idle_s), .min = 1, .max = 32767, .changed = keepalive_changed},
    [BYPASS_TCP_KEEPINTVL] = {IN_U16, OPT(keep_intvl_s), .min = 1, .max = 32767},
    [BYPASS_TCP_KEEPCNT] = {IN_U8, OPT(keep_cnt), .min = 1, .max = 127},
    [BYPASS_TCP_USER_TIMEOUT] = {IN_U32, OPT(user_timeout_ms), .max = INT32_MAX},
    [BYPASS_TCP_SYNCNT] = {IN_U8, OPT(syn_retries), .min = 1, .max = 127},
    [BYPASS_TCP_LINGER2] = {IN_I16, OPT(fin_wait_s), .min = -1, .max = INT16_MAX, .fit = fit_fin_wait},
    [BYPASS_TCP_FASTOPEN] = {NOWHERE, .set = set_fastopen, .get = get_fastopen},
    [BYPASS_TCP_FASTOPEN_CONNECT] = {NOWHERE, .set = set_fastopen_connect, .get = get_fastopen_connect},
    [BYPASS_TCP_NOTSENT_LOWAT] = {IN_U32, OPT(notsent_lowat), .max = UINT32_MAX, .fit = fit_notsent,
                                  .changed = notsent_changed},
};

void tcp_options_default(struct tcp_endpoint *ep, const struct bypass_config *cfg)
{
    ep->sndbuf = cfg->sndbuf;
    ep->rcvbuf = cfg->rcvbuf;
    ep->opt = (struct tcp_options){
        .linger_s = -1,
        .rcvlowat = 1,
        .keep_idle_s = 7200, /* RFC 9293 3.8.4 */
        .keep_intvl_s = 75,
        .keep_cnt = 9,
        .fin_wait_s = FIN_WAIT_S,
        .syn_retries = SYN_RETRIES,
        .mtu_discover = 1,
        .ttl = 64,
        .ecn = cfg->ecn,
    };
}

enum { INHERITED_FLAGS = TF_NODELAY | TF_CORK | TF_KEEPALIVE };
enum { KEPT_FEAT = TX_SNDBUF_SET | TX_RCVBUF_SET | TX_RCVLOWAT | TX_NOTSENT | TX_KEEP_FRAMES };
enum { INHERITED_FEAT = KEPT_FEAT | TX_ANSWERS | TX_LISTENS }; /* what a connection learned ends with it */

void tcp_options_inherit(struct tcp_conn *c, struct tcp_cold *k, const struct tcp_endpoint *ep)
{
    c->flags = ep->flags & INHERITED_FLAGS;
    c->feat = ep->feat & INHERITED_FEAT;
    c->sndbuf = ep->sndbuf;
    c->rcvbuf = ep->rcvbuf;
    c->cc = ep->cc;
    k->opt = ep->opt;
    if (k->opt.max_pacing != 0)
        c->feat |= TX_PACED;
}

void tcp_options_return(struct tcp_endpoint *ep, const struct tcp_conn *c, const struct tcp_cold *k)
{
    ep->flags = c->flags & INHERITED_FLAGS;
    ep->feat = c->feat & KEPT_FEAT;
    ep->sndbuf = c->sndbuf;
    ep->rcvbuf = c->rcvbuf;
    ep->cc = c->cc;
    ep->opt = k->opt;
}

/* ---- Reading and writing by row ---------------------------------------------------------------------------- */
static struct owner owner_of(struct bypass_stack *s, const struct sock *k)
{
    if (k->type == SOCK_TCP) {
        struct tcp_conn *c = conn_at(s, k->idx);
        return (struct owner){s, NULL, c, &cold_at(s, k->idx)->opt, &c->flags, &c->feat};
    }
    struct tcp_endpoint *ep = endpoint_at(s, k->idx);
    return (struct owner){s, ep, NULL, &ep->opt, &ep->flags, &ep->feat};
}

static const struct row *row_of(int opt)
{
    if (opt < 0 || opt >= BYPASS_OPT_COUNT)
        return NULL;
    const struct row *r = &rows[opt];
    return r->where != NOWHERE || r->get ? (r->max || r->get ? r : NULL) : NULL;
}

static void store(const struct owner *o, const struct row *r, int64_t v)
{
    uint8_t *at = (uint8_t *)o->opt + r->off;
    switch (r->where) {
    case IN_U8:
        *at = (uint8_t)v;
        break;
    case IN_U16:
    case IN_I16:
        *(uint16_t *)(void *)at = (uint16_t)v;
        break;
    case IN_U32:
    case IN_I32:
        *(uint32_t *)(void *)at = (uint32_t)v;
        break;
    case IN_BITS:
        o->opt->bits = (uint16_t)(v ? o->opt->bits | r->bit : o->opt->bits & ~r->bit);
        break;
    case IN_FLAGS:
        *o->flags = v ? *o->flags | r->bit : *o->flags & ~r->bit;
        break;
    case IN_SNDBUF:
        *(o->c ? &o->c->sndbuf : &o->ep->sndbuf) = (uint32_t)v;
        break;
    case IN_RCVBUF:
        *(o->c ? &o->c->rcvbuf : &o->ep->rcvbuf) = (uint32_t)v;
        break;
    }
}

static int64_t load(const struct owner *o, const struct row *r)
{
    const uint8_t *at = (const uint8_t *)o->opt + r->off;
    switch (r->where) {
    case IN_U8:
        return *at;
    case IN_U16:
        return *(const uint16_t *)(const void *)at;
    case IN_I16:
        return *(const int16_t *)(const void *)at;
    case IN_U32:
        return *(const uint32_t *)(const void *)at;
    case IN_I32:
        return *(const int32_t *)(const void *)at;
    case IN_BITS:
        return (o->opt->bits & r->bit) != 0;
    case IN_FLAGS:
        return (*o->flags & r->bit) != 0;
    case IN_SNDBUF:
        return o->c ? o->c->sndbuf : o->ep->sndbuf;
    default:
        return o->c ? o->c->rcvbuf : o->ep->rcvbuf;
    }
}

static int option_set(const struct owner *o, const struct row *r, int64_t v)
{
    if (r->fixed)
        return -ENOPROTOOPT;
    if (r->set)
        return r->set(o, v);
    if (r->fit)
        v = r->fit(v);
    if (v < r->min || v > r->max)
        return -EINVAL;
    store(o, r, v);
    *o->feat |= r->mark;
    bool live = o->c && !(o->c->flags & TF_DEAD);
    if (r->changed && (live || r->changed == lowat_changed || r->changed == notsent_changed))
        r->changed(o);
    return 0;
}

int bypass_setopt(struct bypass_stack *s, bypass_sock h, int opt, int64_t value)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_setopt(s, k->idx, opt, value);
    const struct row *r = row_of(opt);
    struct owner o = owner_of(s, k);
    return r ? option_set(&o, r, value) : -ENOPROTOOPT;
}

int64_t bypass_getopt(struct bypass_stack *s, bypass_sock h, int opt)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_getopt(s, k->idx, opt);
    const struct row *r = row_of(opt);
    struct owner o = owner_of(s, k);
    if (!r)
        return -ENOPROTOOPT;
    return r->get ? r->get(&o) : load(&o, r);
}
