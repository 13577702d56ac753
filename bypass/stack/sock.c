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
    return k->type == SOCK_LISTEN ? tcp_bind(s, k->idx, local) : -EINVAL;
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
    c->sock = si;
    sock_event(s, si, (uint32_t)tcp_conn_ready(s, c));
    return handle(s, si);
}

int bypass_connect(struct bypass_stack *s, bypass_sock h, const struct bypass_endpoint *peer)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_connect(s, k->idx, peer);
    if (k->type == SOCK_TCP)
        return conn_at(s, k->idx)->state == BYPASS_SYN_SENT ? -EALREADY : -EISCONN;
    uint32_t ep = k->idx;
    int64_t idx = tcp_connect(s, ep, peer);
    if (idx < 0)
        return (int)idx;
    struct tcp_conn *c = conn_at(s, (uint32_t)idx);
    c->sock = sock_index(s, k);
    k->type = SOCK_TCP;
    k->idx = (uint32_t)idx;
    tcp_endpoint_close(s, ep); /* its options and port live on in the connection */
    tcp_send_syn(s, c);
    return -EINPROGRESS;
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
    return k->type == SOCK_TCP ? tcp_shutdown(s, conn_at(s, k->idx), how) : -ENOTCONN;
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
    if (k->type == SOCK_LISTEN || conn_at(s, k->idx)->state == BYPASS_SYN_SENT)
        return -ENOTCONN;
    out->addr = conn_at(s, k->idx)->raddr;
    out->port = conn_at(s, k->idx)->rport;
    return 0;
}

/* ---- Data ------------------------------------------------------------------------------------------------- */
int64_t bypass_send(struct bypass_stack *s, bypass_sock h, const void *buf, size_t n, int flags)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_sendto(s, k->idx, buf, n, flags, NULL);
    return k->type == SOCK_TCP ? tcp_send(s, conn_at(s, k->idx), buf, n, flags) : -ENOTCONN;
}

int64_t bypass_recv(struct bypass_stack *s, bypass_sock h, void *buf, size_t n, int flags)
{
    struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type == SOCK_UDP)
        return udp_recvfrom(s, k->idx, buf, n, flags, NULL);
    return k->type == SOCK_TCP ? tcp_recv(s, conn_at(s, k->idx), buf, n, flags) : -ENOTCONN;
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
    return to ? -EISCONN : bypass_send(s, h, buf, n, flags);
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
    if (k->type == SOCK_LISTEN)
        return 0;
    struct tcp_cold *cold = cold_at(s, k->idx);
    int err = cold->error;
    cold->error = 0;
    return err;
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
            return BYPASS_OUT | BYPASS_HUP; /* as Linux answers for a fresh socket */
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
