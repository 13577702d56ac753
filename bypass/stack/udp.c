/* SPDX-License-Identifier: Apache-2.0 */
/*
 * udp.c - UDP sockets (RFC 768, RFC 1122 4.1): creation, names, options. Datagrams in: udp_in.c, out: udp_out.c.
 */
#include <errno.h>

#include "udp.h"

static const addr_t any_addr = {{[10] = 0xff, [11] = 0xff}}; /* 0.0.0.0 */

enum { EPHEMERAL_FIRST = 32768, EPHEMERAL_LAST = 60999 }; /* as Linux' ip_local_port_range */

void udp_layout(struct layout *l, struct core *c)
{
    uint32_t buckets = 64;
    while (buckets < c->cfg.max_socks && buckets < 65536) {
        buckets *= 2;
    }
    layout_pool(l, &c->udps, sizeof(struct udp), min_u32(c->cfg.max_socks, UNCONNECTED_MAX));
    c->udp_state[0] = layout_bytes(l, buckets * sizeof(uint32_t));
    c->udp_state[1] = buckets - 1;
}

uint32_t *udp_bucket(const struct bypass_stack *s, uint16_t port)
{
    return (uint32_t *)at(s, core(s)->udp_state[0]) + (port & core(s)->udp_state[1]);
}

int udp_create(struct bypass_stack *s, uint32_t *idx)
{
    *idx = pool_alloc(s, &core(s)->udps);
    if (*idx == NO_INDEX) {
        return -ENFILE;
    }
    *udp_at(s, *idx) = (struct udp){
        .flags = UDP_IN_USE,
        .local = any_addr,
        .sock = NO_INDEX,
        .rcvbuf = core(s)->cfg.rcvbuf,
        .sndbuf = core(s)->cfg.sndbuf,
        .q_head = UDP_Q_NONE,
        .q_tail = UDP_Q_NONE,
        .linger_s = -1,
        .rcvlowat = 1,
        .mtu_discover = MTU_WANT,
    };
    return 0;
}

void udp_set_sock(struct bypass_stack *s, uint32_t idx, uint32_t si) { udp_at(s, idx)->sock = si; }

void udp_close(struct bypass_stack *s, uint32_t idx)
{
    struct udp *u = udp_at(s, idx);
    udp_queue_free(s, u);
    udp_unblock(s, idx);
    if (u->local_port != 0) {
        uint32_t *link = udp_bucket(s, u->local_port);
        while (*link != idx + 1) {
            link = &udp_at(s, *link - 1)->hash_next;
        }
        *link = u->hash_next;
    }
    u->flags = 0;
    pool_free(s, &core(s)->udps, idx);
}

/* ---- Names -------------------------------------------------------------------------------------- */

static bool port_taken(const struct bypass_stack *s, const struct udp *u, const addr_t *addr, uint16_t port)
{
    for (uint32_t link = *udp_bucket(s, port); link != 0;) {
        const struct udp *o = udp_at(s, link - 1);
        bool overlap = addr_is_any(addr) || !udp_has_addr(o) || addr_eq(&o->local, addr);
        if (o->local_port == port && overlap && !(o->flags & u->flags & (UDP_REUSE | UDP_REUSEPORT))) {
            return true;
        }
        link = o->hash_next;
    }
    return false;
}

static int port_choose(struct bypass_stack *s, const struct udp *u, const addr_t *addr)
{
    uint32_t range = EPHEMERAL_LAST - EPHEMERAL_FIRST + 1, start = (uint32_t)(core_random(s) % range);
    for (uint32_t i = 0; i < range; i++) { /* RFC 6056 3.3.2 */
        int port = EPHEMERAL_FIRST + (int)((start + i) % range);
        if (!port_taken(s, u, addr, (uint16_t)port)) {
            return port;
        }
    }
    return -EADDRINUSE;
}

int udp_bind(struct bypass_stack *s, uint32_t idx, const struct bypass_endpoint *local)
{
    struct udp *u = udp_at(s, idx);
    bool any = addr_is_any(&local->addr);
    int port = local->port;
    if (u->local_port != 0) {
        return -EINVAL;
    }
    if (!any && !addr_is_local(s, &local->addr)) {
        return -EADDRNOTAVAIL;
    }
    if (port != 0 && port_taken(s, u, &local->addr, local->port)) {
        return -EADDRINUSE;
    }
    if (port == 0 && (port = port_choose(s, u, &local->addr)) < 0) {
        return port;
    }
    u->local = any ? any_addr : local->addr;
    u->local_port = (uint16_t)port;
    u->hash_next = *udp_bucket(s, u->local_port);
    *udp_bucket(s, u->local_port) = idx + 1;
    return 0;
}

int udp_bind_any(struct bypass_stack *s, uint32_t idx)
{
    struct bypass_endpoint any = {.addr = any_addr};
    return udp_at(s, idx)->local_port != 0 ? 0 : udp_bind(s, idx, &any);
}

static void disconnect(struct udp *u)
{
    if (u->flags & UDP_ADDR_AUTO) {
        u->local = any_addr;
    }
    u->flags &= ~(uint32_t)(UDP_CONNECTED | UDP_ADDR_AUTO);
    u->dst = (struct dst_ref){0}; /* and the source that went with it */
    u->peer = (addr_t){{0}};
    u->peer_port = 0;
}

/* Again and again allowed; any address with port 0 dissolves it (POSIX connect(): a null address). */
int udp_connect(struct bypass_stack *s, uint32_t idx, const struct bypass_endpoint *peer)
{
    struct udp *u = udp_at(s, idx);
    addr_t from;
    if (addr_is_any(&peer->addr) && peer->port == 0) {
        disconnect(u);
        return 0;
    }
    if (!addr_is_v4(&peer->addr)) {
        return -EAFNOSUPPORT;
    }
    enum addr_kind kind = addr_kind(s, addr_v4(&peer->addr));
    if (peer->port == 0 || kind == ADDR_INVALID) {
        return -EINVAL;
    }
    if (kind == ADDR_BROADCAST && !(u->flags & UDP_BROADCAST)) {
        return -EACCES;
    }
    if (!addr_for(s, &peer->addr, &from)) {
        return -ENETUNREACH;
    }
    int err = udp_bind_any(s, idx);
    if (err < 0) {
        return err;
    }
    disconnect(u);
    if (!udp_has_addr(u)) {
        u->local = from;
        u->flags |= UDP_ADDR_AUTO;
    }
    u->peer = peer->addr;
    u->peer_port = peer->port;
    u->flags |= UDP_CONNECTED;
    return 0;
}

int udp_shutdown(struct bypass_stack *s, uint32_t idx, int how)
{
    struct udp *u = udp_at(s, idx);
    if (how == BYPASS_SHUT_RD || how == BYPASS_SHUT_RDWR) {
        u->flags |= UDP_SHUT_RD;
        sock_event(s, u->sock, BYPASS_IN | BYPASS_RDHUP);
    }
    if (how == BYPASS_SHUT_WR || how == BYPASS_SHUT_RDWR) {
        u->flags |= UDP_SHUT_WR;
        sock_event(s, u->sock, BYPASS_OUT);
    }
    if ((u->flags & UDP_SHUT_RD) && (u->flags & UDP_SHUT_WR)) {
        sock_event(s, u->sock, BYPASS_HUP);
    }
    return u->flags & UDP_CONNECTED ? 0 : -ENOTCONN; /* done all the same, as on Linux */
}

int udp_local(struct bypass_stack *s, uint32_t idx, struct bypass_endpoint *out)
{
    const struct udp *u = udp_at(s, idx);
    *out = (struct bypass_endpoint){.addr = u->local, .port = u->local_port};
    return 0;
}

int udp_peer(struct bypass_stack *s, uint32_t idx, struct bypass_endpoint *out)
{
    const struct udp *u = udp_at(s, idx);
    if (!(u->flags & UDP_CONNECTED)) {
        return -ENOTCONN;
    }
    *out = (struct bypass_endpoint){.addr = u->peer, .port = u->peer_port};
    return 0;
}

/* ---- Options and state -------------------------------------------------------------------------- */

enum { BUF_MIN = 4096, BUF_MAX = 1 << 30 };

static uint32_t clamp_buf(int64_t value)
{
    return (uint32_t)(value < BUF_MIN ? BUF_MIN : value > BUF_MAX ? BUF_MAX : value);
}

/* Of options that are one bit; 0: another option. */
static uint32_t flag_of(int opt)
{
    switch (opt) {
    case BYPASS_SO_REUSEADDR:
        return UDP_REUSE;
    case BYPASS_SO_REUSEPORT:
        return UDP_REUSEPORT;
    case BYPASS_SO_BROADCAST:
        return UDP_BROADCAST;
    case BYPASS_SO_KEEPALIVE:
        return UDP_KEEPALIVE;
    case BYPASS_SO_OOBINLINE:
        return UDP_OOBINLINE;
    default:
        return 0;
    }
}

/* ip(7): -1 is the default. */
static int set_ttl(struct udp *u, int64_t value)
{
    if (value != -1 && (value < 1 || value > 255)) {
        return -EINVAL;
    }
    u->ttl = (uint8_t)(value == -1 ? 0 : value);
    return 0;
}

static int set_linger(struct udp *u, int64_t value)
{
    if (value < -1 || value > INT32_MAX) {
        return -EINVAL;
    }
    u->linger_s = (int32_t)value;
    return 0;
}

int udp_setopt(struct bypass_stack *s, uint32_t idx, int opt, int64_t value)
{
    struct udp *u = udp_at(s, idx);
    uint32_t flag = flag_of(opt);
    if (flag != 0) {
        u->flags = value != 0 ? u->flags | flag : u->flags & ~flag;
        return 0;
    }
    switch (opt) {
    case BYPASS_SO_SNDBUF:
        u->sndbuf = clamp_buf(value);
        return 0;
    case BYPASS_SO_RCVBUF:
        u->rcvbuf = clamp_buf(value);
        return 0;
    case BYPASS_SO_LINGER:
        return set_linger(u, value);
    case BYPASS_SO_RCVLOWAT:
        u->rcvlowat = value < 0 || value > INT32_MAX ? INT32_MAX : value == 0 ? 1 : (uint32_t)value;
        return 0;
    case BYPASS_IP_TTL:
        return set_ttl(u, value);
    case BYPASS_IP_MTU_DISCOVER:
        if (value < MTU_DONT || value > MTU_PROBE) {
            return -EINVAL;
        }
        u->mtu_discover = (uint8_t)value;
        return 0;
    case BYPASS_IP_TOS:
        u->tos = (uint8_t)value; /* as Linux: an int of which the low byte counts */
        return 0;
    default:
        return -ENOPROTOOPT;
    }
}

static int64_t path_mtu(struct bypass_stack *s, const struct udp *u)
{
    if (!(u->flags & UDP_CONNECTED)) {
        return -ENOTCONN;
    }
    const struct dst *d = dst_hit(s, &u->dst, &u->peer);
    return d != NULL ? d->mtu : s->dev->mtu;
}

int64_t udp_getopt(struct bypass_stack *s, uint32_t idx, int opt)
{
    const struct udp *u = udp_at(s, idx);
    uint32_t flag = flag_of(opt);
    if (flag != 0) {
        return (u->flags & flag) != 0;
    }
    switch (opt) {
    case BYPASS_SO_SNDBUF:
        return u->sndbuf;
    case BYPASS_SO_RCVBUF:
        return u->rcvbuf;
    case BYPASS_SO_LINGER:
        return u->linger_s;
    case BYPASS_SO_RCVLOWAT:
        return u->rcvlowat;
    case BYPASS_SO_TYPE:
        return BYPASS_DGRAM;
    case BYPASS_SO_ACCEPTCONN:
        return 0;
    case BYPASS_IP_TTL:
        return u->ttl != 0 ? u->ttl : IP4_TTL_DEFAULT;
    case BYPASS_IP_TOS:
        return u->tos;
    case BYPASS_IP_MTU:
        return path_mtu(s, u);
    case BYPASS_IP_MTU_DISCOVER:
        return u->mtu_discover;
    default:
        return -ENOPROTOOPT;
    }
}

int udp_error(struct bypass_stack *s, uint32_t idx)
{
    struct udp *u = udp_at(s, idx);
    int err = u->err;
    u->err = 0;
    return err;
}

int udp_ready(struct bypass_stack *s, uint32_t idx)
{
    const struct udp *u = udp_at(s, idx);
    int mask = u->err != 0 ? BYPASS_ERR : 0;
    if (u->q_head != UDP_Q_NONE || (u->flags & UDP_SHUT_RD)) {
        mask |= BYPASS_IN;
    }
    if (u->flags & UDP_SHUT_RD) {
        mask |= BYPASS_RDHUP;
    }
    if (udp_may_send(s) || (u->flags & UDP_SHUT_WR)) {
        mask |= BYPASS_OUT;
    }
    return (u->flags & (UDP_SHUT_RD | UDP_SHUT_WR)) == (UDP_SHUT_RD | UDP_SHUT_WR) ? mask | BYPASS_HUP : mask;
}

int udp_port_users(struct bypass_stack *s, const addr_t *addr, uint16_t port)
{
    int count = 0;
    for (uint32_t link = *udp_bucket(s, port); link != 0;) {
        const struct udp *u = udp_at(s, link - 1);
        bool match = addr == NULL || addr_is_any(addr) || !udp_has_addr(u) || addr_eq(&u->local, addr);
        count += u->local_port == port && match;
        link = u->hash_next;
    }
    return count;
}

void udp_destroy(struct bypass_stack *s)
{
    for (uint32_t i = 0; i < core(s)->udps.bump; i++) {
        if (udp_at(s, i)->flags & UDP_IN_USE) {
            udp_close(s, i);
        }
    }
}

void udp_audit(const struct bypass_stack *s, struct bypass_audit *a) { a->udp_socks = core(s)->udps.used; }
