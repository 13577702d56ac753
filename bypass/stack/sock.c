/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sock.c - the public socket calls: handles with generations, events, and dispatch to TCP or UDP.
 * No protocol logic lives here.
 */
#include <errno.h>

#include "core.h"
#include "tcp.h"

/* ---- Handles: generation (31 bits) above index (32 bits) ------------------------------------------ */
void sock_layout(struct layout *l, struct core *c) { layout_pool(l, &c->socks, sizeof(struct sock), c->cfg.max_socks); }

uint32_t sock_alloc(struct bypass_stack *s, int type, uint32_t idx)
{
    uint32_t si = pool_alloc(s, &core(s)->socks);
    if (si == NO_INDEX)
        return si;
    struct sock *k = sock_at(s, si);
    uint32_t gen = (k->gen + 1) & 0x7fffffff;
    uint8_t queued = k->ev_queued; /* a freed entry may still stand in the event list */
    uint32_t ev_next = k->ev_next;
    *k = (struct sock){.link = NO_INDEX, .gen = gen, .idx = idx, .type = (uint8_t)type};
    k->ev_queued = queued;
    k->ev_next = queued ? ev_next : NO_INDEX;
    return si;
}

void sock_free(struct bypass_stack *s, uint32_t si)
{
    struct sock *k = sock_at(s, si);
    k->type = SOCK_FREE;
    k->ev_mask = 0;
    pool_free(s, &core(s)->socks, si);
}

static bypass_sock handle(const struct bypass_stack *s, uint32_t si)
{
    return (bypass_sock)((uint64_t)sock_at(s, si)->gen << 32 | si);
}

struct sock *sock_get(const struct bypass_stack *s, bypass_sock h)
{
    uint32_t si = (uint32_t)h, gen = (uint32_t)((uint64_t)h >> 32);
    if (h < 0 || si >= core(s)->socks.bump)
        return NULL;
    struct sock *k = sock_at(s, si);
    return k->type != SOCK_FREE && k->gen == gen ? k : NULL;
}

static uint32_t sock_index(const struct bypass_stack *s, const struct sock *k) { return (uint32_t)(k - sock_at(s, 0)); }

void sock_destroy(struct bypass_stack *s)
{
    struct core *c = core(s);
    for (uint32_t i = 0; i < c->socks.bump; i++)
        if (sock_at(s, i)->type != SOCK_FREE)
            sock_free(s, i);
}

/* ---- Events: a list of handles whose readiness changed ---------------------------------------------- */
void sock_event_queue(struct bypass_stack *s, uint32_t si)
{
    struct core *c = core(s);
    struct sock *k = sock_at(s, si);
    k->ev_queued = 1;
    k->ev_next = NO_INDEX;
    if (c->ev_tail != NO_INDEX)
        sock_at(s, c->ev_tail)->ev_next = si;
    else
        c->ev_head = si;
    c->ev_tail = si;
}

int bypass_events(struct bypass_stack *s, struct bypass_event *out, int max)
{
    struct core *c = core(s);
    int n = 0;
    while (n < max && c->ev_head != NO_INDEX) {
        uint32_t si = c->ev_head;
        struct sock *k = sock_at(s, si);
        c->ev_head = k->ev_next;
        if (c->ev_head == NO_INDEX)
            c->ev_tail = NO_INDEX;
        k->ev_queued = 0;
        if (k->type == SOCK_FREE || k->ev_mask == 0)
            continue;
        out[n++] = (struct bypass_event){.sock = handle(s, si), .user = k->user, .mask = k->ev_mask};
        k->ev_mask = 0;
    }
    return n;
}

int bypass_set_user(struct bypass_stack *s, bypass_sock h, uint64_t user)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    k->user = user;
    return 0;
}

/* ---- Open and close ----------------------------------------------------------------------------------- */
bypass_sock bypass_socket(struct bypass_stack *s, int type)
{
    uint32_t idx = NO_INDEX;
    if (type != BYPASS_STREAM && type != BYPASS_DGRAM)
        return -EPROTOTYPE;
    int err = type == BYPASS_STREAM ? tcp_create(s, &idx) : udp_create(s, &idx);
    if (err < 0)
        return err;
    uint32_t si = sock_alloc(s, type == BYPASS_STREAM ? SOCK_LISTEN : SOCK_UDP, idx);
    if (si == NO_INDEX) {
        if (type == BYPASS_STREAM)
            tcp_endpoint_close(s, idx);
        else
            udp_close(s, idx);
        return -ENFILE;
    }
    if (type == BYPASS_STREAM)
        endpoint_at(s, idx)->sock = si;
    else
        udp_set_sock(s, idx, si);
    return handle(s, si);
}

static int sock_close(struct bypass_stack *s, bypass_sock h, bool abort)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    uint32_t idx = k->idx;
    int type = k->type;
    sock_free(s, sock_index(s, k));
    if (type == SOCK_UDP) {
        udp_close(s, idx);
    } else if (type == SOCK_LISTEN) {
        tcp_endpoint_close(s, idx);
    } else {
        struct tcp_conn *c = conn_at(s, idx);
        c->sock = NO_INDEX;
        if (abort && !(c->flags & TF_DEAD))
            conn_reset(s, c, 0);
        else
            tcp_close(s, c);
    }
    return 0;
}

int bypass_close(struct bypass_stack *s, bypass_sock h) { return sock_close(s, h, false); }

int bypass_abort(struct bypass_stack *s, bypass_sock h) { return sock_close(s, h, true); }

/* ---- Naming and connecting ------------------------------------------------------------------------------ */
int bypass_bind(struct bypass_stack *s, bypass_sock h, const struct bypass_endpoint *local)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_bind(s, k->idx, local);
    int err = k->type == SOCK_LISTEN ? tcp_bind(s, k->idx, local) : -EINVAL;
    if (err == 0)
        k->bound = local->port != 0 ? BOUND_PORT : 0;
    if (err == 0 && !addr_is_any(&local->addr))
        k->bound |= BOUND_ADDR;
    return err;
}

int bypass_listen(struct bypass_stack *s, bypass_sock h, int backlog)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return -EOPNOTSUPP;
    return k->type == SOCK_LISTEN ? tcp_listen(s, k->idx, backlog) : -EINVAL;
}

bypass_sock bypass_accept(struct bypass_stack *s, bypass_sock h)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type != SOCK_LISTEN)
        return k->type == SOCK_UDP ? -EOPNOTSUPP : -EINVAL;
    if (core(s)->socks.used == core(s)->socks.cap)
        return -ENFILE;
    int64_t idx = tcp_accept(s, k->idx);
    if (idx < 0)
        return idx;
    uint32_t si = sock_alloc(s, SOCK_TCP, (uint32_t)idx);
    struct tcp_conn *c = conn_at(s, (uint32_t)idx);
    sock_at(s, si)->phase = SS_CONNECTED;
    c->sock = si;
    sock_event(s, si, (uint32_t)tcp_conn_ready(s, c));
    return handle(s, si);
}

/* The connection ends, if it has not, and the socket is as it was before connect(): with the address and port that
 * the program chose, its options, and the error that is told next. */
static int unconnect(struct bypass_stack *s, struct sock *k, int err)
{
    struct tcp_conn *c = conn_at(s, k->idx);
    const addr_t any = {{[10] = 0xff, [11] = 0xff}};
    uint32_t ep;
    int made = tcp_recreate(s, &ep, c, k->bound & BOUND_ADDR ? &c->laddr : &any, k->bound & BOUND_PORT ? c->lport : 0);
    if (made < 0)
        return made;
    c->sock = NO_INDEX;
    if (c->flags & TF_DEAD)
        tcp_close(s, c);
    else if (c->state != BYPASS_TIME_WAIT)
        conn_reset(s, c, 0);
    endpoint_at(s, ep)->sock = sock_index(s, k);
    endpoint_at(s, ep)->error = (int16_t)err;
    k->type = SOCK_LISTEN;
    k->idx = ep;
    k->phase = SS_UNCONNECTED;
    sock_event(s, sock_index(s, k), (uint32_t)(BYPASS_OUT | BYPASS_HUP | (err ? BYPASS_ERR : 0)));
    return 0;
}

/* connect() again: how the first one went. */
static int connect_again(struct bypass_stack *s, struct sock *k)
{
    struct tcp_conn *c = conn_at(s, k->idx);
    if (k->phase == SS_CONNECTED)
        return -EISCONN;
    if (k->phase == SS_DISCONNECTING)
        return -EINVAL;
    if (conn_over(c)) {
        int err = cold_at(s, k->idx)->error;
        int failed = unconnect(s, k, 0);
        return failed < 0 ? failed : err ? -err : -ECONNABORTED;
    }
    if (c->state == BYPASS_SYN_SENT || c->state == BYPASS_SYN_RECEIVED)
        return c->feat & TX_FO_DEFER ? -EISCONN : -EALREADY;
    k->phase = SS_CONNECTED;
    return 0;
}

/* The socket becomes a connection in SYN_SENT, whose SYN is to be sent. */
static int begin_connect(struct bypass_stack *s, struct sock *k, const struct bypass_endpoint *peer)
{
    uint32_t ep = k->idx;
    if (endpoint_at(s, ep)->listening)
        return -EISCONN;
    int64_t idx = tcp_connect(s, ep, peer);
    if (idx < 0)
        return (int)idx;
    conn_at(s, (uint32_t)idx)->sock = sock_index(s, k);
    cold_at(s, (uint32_t)idx)->error = endpoint_at(s, ep)->error;
    k->type = SOCK_TCP;
    k->phase = SS_CONNECTING;
    k->idx = (uint32_t)idx;
    tcp_endpoint_close(s, ep); /* its options and port live on in the connection */
    return 0;
}

int bypass_connect(struct bypass_stack *s, bypass_sock h, const struct bypass_endpoint *peer)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_connect(s, k->idx, peer);
    if (k->type == SOCK_TCP)
        return connect_again(s, k);
    int err = begin_connect(s, k, peer);
    if (err < 0)
        return err;
    struct tcp_conn *c = conn_at(s, k->idx);
    if (unlikely(cold_at(s, k->idx)->opt.bits & OPT_FASTOPEN_CONNECT))
        return tcp_fastopen_defer(s, c);
    tcp_send_syn(s, c);
    return -EINPROGRESS;
}

static int64_t sock_fastopen(struct bypass_stack *s, struct sock *k, const void *buf, size_t n,
                             const struct bypass_endpoint *peer)
{
    if (!(core(s)->cfg.fastopen & BYPASS_FASTOPEN_CLIENT))
        return -EOPNOTSUPP;
    if (k->type == SOCK_TCP)
        return connect_again(s, k);
    if (!peer)
        return -EDESTADDRREQ;
    int err = begin_connect(s, k, peer);
    return err < 0 ? err : tcp_fastopen_connect(s, conn_at(s, k->idx), buf, n);
}

int bypass_disconnect(struct bypass_stack *s, bypass_sock h)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return -EOPNOTSUPP;
    if (k->type == SOCK_TCP)
        return unconnect(s, k, conn_over(conn_at(s, k->idx)) ? 0 : ECONNRESET);
    if (endpoint_at(s, k->idx)->listening)
        tcp_unlisten(s, k->idx, k->bound);
    return 0;
}

/* shutdown() of a listener ends listening, and of a socket that is connecting, that. */
static int shutdown_endpoint(struct bypass_stack *s, struct sock *k, int how)
{
    if (!endpoint_at(s, k->idx)->listening)
        return -ENOTCONN;
    if (how != BYPASS_SHUT_WR)
        tcp_unlisten(s, k->idx, k->bound);
    return 0;
}

int bypass_shutdown(struct bypass_stack *s, bypass_sock h, int how)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (how < BYPASS_SHUT_RD || how > BYPASS_SHUT_RDWR)
        return -EINVAL;
    if (k->type == SOCK_UDP)
        return udp_shutdown(s, k->idx, how);
    if (k->type == SOCK_LISTEN)
        return shutdown_endpoint(s, k, how);
    struct tcp_conn *c = conn_at(s, k->idx);
    bool opening = tcp_opening(c);
    if (k->phase == SS_CONNECTING)
        k->phase = opening || conn_over(c) ? SS_DISCONNECTING : SS_CONNECTED;
    if (conn_over(c))
        return -ENOTCONN;
    if (opening)
        return unconnect(s, k, ECONNRESET);
    tcp_shutdown(s, c, how);
    return 0;
}

int bypass_local(struct bypass_stack *s, bypass_sock h, struct bypass_endpoint *out)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    *out = (struct bypass_endpoint){0};
    if (k->type == SOCK_UDP)
        return udp_local(s, k->idx, out);
    if (k->type == SOCK_LISTEN) {
        out->addr = endpoint_at(s, k->idx)->addr;
        out->port = endpoint_at(s, k->idx)->port;
    } else {
        out->addr = conn_at(s, k->idx)->laddr;
        out->port = conn_at(s, k->idx)->lport;
    }
    return 0;
}

int bypass_peer(struct bypass_stack *s, bypass_sock h, struct bypass_endpoint *out)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    *out = (struct bypass_endpoint){0};
    if (k->type == SOCK_UDP)
        return udp_peer(s, k->idx, out);
    if (k->type == SOCK_LISTEN || conn_at(s, k->idx)->state == BYPASS_SYN_SENT || conn_over(conn_at(s, k->idx)))
        return -ENOTCONN;
    out->addr = conn_at(s, k->idx)->raddr;
    out->port = conn_at(s, k->idx)->rport;
    return 0;
}

/* The pending error of a TCP socket; it is told once. */
static int take_error(struct bypass_stack *s, const struct sock *k)
{
    int16_t *at = k->type == SOCK_TCP ? &cold_at(s, k->idx)->error : &endpoint_at(s, k->idx)->error;
    int err = *at;
    *at = 0;
    return err;
}

/* ---- Data ------------------------------------------------------------------------------------------------- */
int64_t bypass_send(struct bypass_stack *s, bypass_sock h, const void *buf, size_t n, int flags)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_sendto(s, k->idx, buf, n, flags, NULL);
    if (k->type == SOCK_TCP)
        return tcp_send(s, conn_at(s, k->idx), buf, n, flags);
    int err = take_error(s, k);
    return err ? -err : -EPIPE;
}

int64_t bypass_recv(struct bypass_stack *s, bypass_sock h, void *buf, size_t n, int flags)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_recvfrom(s, k->idx, buf, n, flags, NULL);
    if (k->type == SOCK_TCP)
        return tcp_recv(s, conn_at(s, k->idx), buf, n, flags);
    if ((flags & BYPASS_OOB) && !endpoint_at(s, k->idx)->listening)
        return -EINVAL; /* looked for first, as on Linux */
    int err = endpoint_at(s, k->idx)->listening ? 0 : take_error(s, k);
    return err ? -err : -ENOTCONN;
}

int bypass_at_mark(struct bypass_stack *s, bypass_sock h)
{
    const struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    return k->type == SOCK_TCP ? tcp_urg_at_mark(s, conn_at(s, k->idx)) : -EINVAL;
}

int64_t bypass_sendto(struct bypass_stack *s, bypass_sock h, const void *buf, size_t n, int flags,
                      const struct bypass_endpoint *to)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_sendto(s, k->idx, buf, n, flags, to);
    if (unlikely(flags & BYPASS_FASTOPEN))
        return sock_fastopen(s, k, buf, n, to);
    return bypass_send(s, h, buf, n, flags); /* a connection has its peer: `to` says nothing, as on Linux */
}

int64_t bypass_recvfrom(struct bypass_stack *s, bypass_sock h, void *buf, size_t n, int flags,
                        struct bypass_endpoint *from)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_recvfrom(s, k->idx, buf, n, flags, from);
    if (from)
        (void)bypass_peer(s, h, from);
    return bypass_recv(s, h, buf, n, flags);
}

/* ---- State ------------------------------------------------------------------------------------------------ */
int bypass_error(struct bypass_stack *s, bypass_sock h)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_error(s, k->idx);
    return take_error(s, k);
}

int bypass_ready(struct bypass_stack *s, bypass_sock h)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_ready(s, k->idx);
    if (k->type == SOCK_LISTEN) {
        const struct tcp_endpoint *ep = endpoint_at(s, k->idx);
        if (!ep->listening)
            return BYPASS_OUT | BYPASS_HUP | (ep->error ? BYPASS_ERR : 0); /* as Linux answers for a fresh socket */
        return ep->accept_head != NO_INDEX ? BYPASS_IN : 0;
    }
    return tcp_conn_ready(s, conn_at(s, k->idx));
}

int bypass_cc_set(struct bypass_stack *s, bypass_sock h, const char *name)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return -EOPNOTSUPP;
    bool conn = k->type == SOCK_TCP;
    return tcp_cc_set(s, conn ? NULL : endpoint_at(s, k->idx), conn ? conn_at(s, k->idx) : NULL, name);
}

int bypass_cc_get(const struct bypass_stack *s, bypass_sock h, char *out, size_t n)
{
    const struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return -EOPNOTSUPP;
    return tcp_cc_get(s, k->type == SOCK_TCP ? conn_at(s, k->idx)->cc : endpoint_at(s, k->idx)->cc, out, n);
}

int bypass_port_users(struct bypass_stack *s, int type, const struct bypass_addr *addr, uint16_t port)
{
    if (type == BYPASS_DGRAM)
        return udp_port_users(s, addr, port);
    return type == BYPASS_STREAM ? tcp_port_users(s, addr, port) : -EPROTOTYPE;
}
