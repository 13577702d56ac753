/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_port.c - local names: who may bind what (socket(7): SO_REUSEADDR, SO_REUSEPORT, as Linux decides), which of several
 * listeners a flow belongs to, and the port of an active open (RFC 6056).
 *
 *     two that overlap            both SO_REUSEADDR                        both SO_REUSEPORT
 *     bound, not listening        may both bind                            may both bind, and listen
 *     one listens                 the other may not                        may
 *     connection, also TIME_WAIT  may bind and listen (a server restarts)  may
 *
 * A connection has the options of its listener, or those that its socket had when it connected.
 */
#include <errno.h>

#include "tcp.h"

enum { PORT_FIRST = 32768, PORT_LAST = 60999, PORT_RANGE = PORT_LAST - PORT_FIRST + 1, BIND_TRIES = 1024 };

static uint32_t *bucket(const struct bypass_stack *s, uint16_t port)
{
    return &tcp_head(s)->ports[port % TCP_PORT_BUCKETS];
}

static bool addr_overlaps(const addr_t *a, const addr_t *b)
{
    return addr_is_any(a) || addr_is_any(b) || addr_eq(a, b);
}

/* ---- bind() ---------------------------------------------------------------------------------------------- */
/* Connections of this port and address, looked for one by one: binding is rare. */
static bool barred_by_connection(const struct bypass_stack *s, const struct tcp_endpoint *self, const addr_t *addr,
                                 uint16_t port)
{
    uint32_t left = conn_port_count(s, port);
    for (uint32_t i = 0; left > 0 && i <= tcp_head(s)->table_mask; i++) {
        uint32_t idx = flow_table(s)[i].idx;
        if (idx == 0 || conn_at(s, idx - 1)->lport != port)
            continue;
        left--;
        uint16_t both = cold_at(s, idx - 1)->opt.bits & self->opt.bits;
        if (addr_overlaps(&conn_at(s, idx - 1)->laddr, addr) && !(both & (OPT_REUSEADDR | OPT_REUSEPORT)))
            return true;
    }
    return false;
}

bool tcp_port_taken(const struct bypass_stack *s, const struct tcp_endpoint *self, const addr_t *addr, uint16_t port)
{
    for (uint32_t i = *bucket(s, port); i != NO_INDEX; i = endpoint_at(s, i)->hash_next) {
        const struct tcp_endpoint *ep = endpoint_at(s, i);
        if (ep == self || ep->port != port || !addr_overlaps(&ep->addr, addr))
            continue;
        uint16_t both = ep->opt.bits & self->opt.bits;
        if (!(both & OPT_REUSEPORT) && !((both & OPT_REUSEADDR) && !ep->listening))
            return true;
    }
    return barred_by_connection(s, self, addr, port);
}

void tcp_port_take(struct bypass_stack *s, struct tcp_endpoint *ep, uint16_t port)
{
    ep->port = port;
    ep->hash_next = *bucket(s, port);
    *bucket(s, port) = endpoint_index(s, ep);
}

int tcp_bind(struct bypass_stack *s, uint32_t idx, const struct bypass_endpoint *local)
{
    struct tcp_endpoint *ep = endpoint_at(s, idx);
    uint16_t port = local->port;
    addr_t addr = local->addr;
    if (addr_is_any(&addr))
        addr = (addr_t){{[10] = 0xff, [11] = 0xff}};
    if (!addr_is_v4(&addr))
        return -EAFNOSUPPORT;
    if (!addr_is_any(&addr) && !addr_is_local(s, &addr))
        return -EADDRNOTAVAIL;
    if (ep->port != 0)
        return -EINVAL;
    for (int tries = 0; port == 0 && tries < BIND_TRIES; tries++) {
        uint16_t p = (uint16_t)(PORT_FIRST + core_random(s) % PORT_RANGE);
        if (conn_port_count(s, p) == 0 && !tcp_port_taken(s, ep, &addr, p))
            port = p;
    }
    if (port == 0 || tcp_port_taken(s, ep, &addr, port))
        return -EADDRINUSE;
    ep->addr = addr;
    tcp_port_take(s, ep, port);
    return 0;
}

void tcp_port_release(struct bypass_stack *s, struct tcp_endpoint *ep)
{
    if (ep->port == 0)
        return;
    uint32_t *link = bucket(s, ep->port), self = endpoint_index(s, ep);
    while (*link != self)
        link = &endpoint_at(s, *link)->hash_next;
    *link = ep->hash_next;
    ep->port = 0;
}

/* ---- Who listens there ------------------------------------------------------------------------------------- */
/* Each flow has its own order of preference among the listeners of a group, so that when one comes or goes only the flows
 * that it gets or had move (rendezvous hashing). */
static uint32_t preference(uint32_t hash, const struct tcp_endpoint *ep, uint32_t index)
{
    uint64_t x = (uint64_t)hash << 32 | (index ^ ep->gen << 16);
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
    return (uint32_t)(x >> 32);
}

struct tcp_endpoint *endpoint_find(const struct bypass_stack *s, const addr_t *addr, uint16_t port, uint32_t hash)
{
    struct tcp_endpoint *best = NULL;
    bool exact = false; /* one that listens on this address comes before one that listens on all */
    uint32_t best_preference = 0;
    for (uint32_t i = *bucket(s, port); i != NO_INDEX; i = endpoint_at(s, i)->hash_next) {
        struct tcp_endpoint *ep = endpoint_at(s, i);
        bool same = addr_eq(&ep->addr, addr);
        if (ep->port != port || !ep->listening || (!same && (exact || !addr_is_any(&ep->addr))))
            continue;
        uint32_t p = ep->opt.bits & OPT_REUSEPORT ? preference(hash, ep, i) : 0;
        if (best && same == exact && p <= best_preference)
            continue;
        best = ep;
        exact = same;
        best_preference = p;
    }
    return best;
}

int tcp_listen_users(struct bypass_stack *s, const addr_t *addr, uint16_t port)
{
    int n = 0;
    for (uint32_t i = *bucket(s, port); i != NO_INDEX; i = endpoint_at(s, i)->hash_next) {
        const struct tcp_endpoint *ep = endpoint_at(s, i);
        n += ep->port == port && ep->listening && (!addr || addr_overlaps(&ep->addr, addr));
    }
    return n;
}

int tcp_port_users(struct bypass_stack *s, const addr_t *addr, uint16_t port)
{
    int n = tcp_listen_users(s, addr, port);
    uint32_t left = conn_port_count(s, port);
    if (!addr)
        return n + (int)left;
    for (uint32_t i = 0; left > 0 && i <= tcp_head(s)->table_mask; i++) {
        uint32_t idx = flow_table(s)[i].idx;
        if (idx == 0 || conn_at(s, idx - 1)->lport != port)
            continue;
        left--;
        n += addr_eq(&conn_at(s, idx - 1)->laddr, addr);
    }
    return n;
}

/* ---- The port of an active open ------------------------------------------------------------------------------ */
/* Free for this peer, though others may use it for theirs: only flows have to differ. */
static bool usable(const struct bypass_stack *s, const addr_t *laddr, const struct bypass_endpoint *peer, uint16_t port)
{
    for (uint32_t i = *bucket(s, port); i != NO_INDEX; i = endpoint_at(s, i)->hash_next)
        if (endpoint_at(s, i)->port == port && addr_overlaps(&endpoint_at(s, i)->addr, laddr))
            return false; /* its owner asked for it by name */
    uint32_t hash = flow_hash(s, laddr, &peer->addr, port, peer->port);
    const struct tcp_conn *c = conn_find(s, hash, laddr, &peer->addr, port, peer->port);
    return !c || tcp_tw_reusable(s, c);
}

/* RFC 6056 3.3.4: two keyed hashes of the peer, one for an offset, one for the counter that walks on from there; in steps
 * of random width, so that who sees one port (it is the peer) cannot count the connections to it. */
uint16_t tcp_port_choose(struct bypass_stack *s, const addr_t *laddr, const struct bypass_endpoint *peer)
{
    struct {
        addr_t laddr, raddr;
        uint32_t rport;
    } id = {*laddr, peer->addr, peer->port};
    uint64_t f = siphash13(core(s)->port_key, &id, sizeof id);
    uint32_t *clock = &tcp_head(s)->port_clock[f >> 32 & (TCP_PORT_CLOCKS - 1)];
    uint32_t first = (uint32_t)f + *clock;
    for (uint32_t i = 0; i < PORT_RANGE; i++) {
        uint16_t port = (uint16_t)(PORT_FIRST + (first + i) % PORT_RANGE);
        if (usable(s, laddr, peer, port)) {
            *clock += i + 1 + (uint32_t)(core_random(s) & 3);
            return port;
        }
    }
    return 0;
}
