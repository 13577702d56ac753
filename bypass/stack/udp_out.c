/* SPDX-License-Identifier: Apache-2.0 */
/*
 * udp_out.c - datagrams out: from the caller's buffer straight into frames, checksum and copy in one pass, cut into
 * fragments where the path asks for it; and senders that wait for frames.
 *
 * What fits the path's MTU leaves with Don't Fragment, so that the path can tell when it no longer fits (RFC 1191);
 * what does not is fragmented here.
 */
#include <errno.h>

#include "csum.h"
#include "udp.h"

#define RETRY_NS MSEC_NS /* blocked senders look for completed transmissions so often */

/* ---- Frames to spare ---------------------------------------------------------------------------- */

/* A sender in a loop leaves enough for acknowledgements, answers and reception. */
static uint32_t spare_frames(const struct bypass_stack *s)
{
    uint32_t keep = s->dev->frames / 16;
    return s->dev->free_frames > keep ? s->dev->free_frames - keep : 0;
}

bool udp_may_send(const struct bypass_stack *s) { return spare_frames(s) > 0; }

static int64_t block(struct bypass_stack *s, uint32_t idx)
{
    struct udp *u = udp_at(s, idx);
    STAT(s, udp_out_blocked);
    if (!(u->flags & UDP_BLOCKED)) {
        u->flags |= UDP_BLOCKED;
        u->blocked_next = (uint32_t)*udp_blocked_head(s);
        *udp_blocked_head(s) = idx + 1;
    }
    return -EAGAIN;
}

void udp_unblock(struct bypass_stack *s, uint32_t idx)
{
    struct udp *u = udp_at(s, idx);
    if (!(u->flags & UDP_BLOCKED)) {
        return;
    }
    u->flags &= ~(uint32_t)UDP_BLOCKED;
    if (*udp_blocked_head(s) == idx + 1) {
        *udp_blocked_head(s) = u->blocked_next;
        return;
    }
    uint32_t *link = &udp_at(s, (uint32_t)*udp_blocked_head(s) - 1)->blocked_next;
    while (*link != idx + 1) {
        link = &udp_at(s, *link - 1)->blocked_next;
    }
    *link = u->blocked_next;
}

void udp_timers(struct bypass_stack *s)
{
    while (*udp_blocked_head(s) != 0 && spare_frames(s) > 0) {
        uint32_t idx = (uint32_t)*udp_blocked_head(s) - 1;
        udp_unblock(s, idx);
        sock_event(s, udp_at(s, idx)->sock, BYPASS_OUT);
    }
}

uint64_t udp_deadline(const struct bypass_stack *s)
{
    return *udp_blocked_head(s) != 0 ? now_ns(s) + RETRY_NS : NO_DEADLINE;
}

/* ---- Building ----------------------------------------------------------------------------------- */

struct datagram {
    const uint8_t *data;
    uint32_t len;   /* payload */
    uint32_t piece; /* largest part of header and payload in one frame; a multiple of 8 when there are several */
    uint16_t src_port, dst_port, queue;
    const addr_t *src, *dst;
};

static uint8_t *put_new(struct bypass_stack *s, const struct datagram *g, uint32_t len, bypass_pkt *p)
{
    *p = pkt_alloc(s);
    if (*p == BYPASS_PKT_NONE) {
        return NULL;
    }
    pkt_meta(s, *p)->queue = g->queue;
    return pkt_put(s, *p, (uint16_t)len); /* piece is chosen to fit */
}

/* The frames of a datagram, linked by meta.next, without IP headers. BYPASS_PKT_NONE: no frame. */
static bypass_pkt build(struct bypass_stack *s, const struct datagram *g)
{
    uint32_t total = UDP_LEN + g->len, n = min_u32(total, g->piece), done = n - UDP_LEN;
    bypass_pkt head, last, p;
    uint8_t *udp = put_new(s, g, n, &head);
    if (udp == NULL) {
        return BYPASS_PKT_NONE;
    }
    uint32_t words[2] = {__builtin_bswap32((uint32_t)g->src_port << 16 | g->dst_port), __builtin_bswap32(total << 16)};
    memcpy(udp, words, UDP_LEN); /* RFC 768: ports, length, and the checksum still zero */
    uint32_t sum = csum_add(csum_pseudo(g->src, g->dst, PROTO_UDP, total), csum_add(words[0], words[1]));
    sum = csum_copy(udp + UDP_LEN, g->data, done, sum);
    for (last = head; done < g->len; last = p, done += n) {
        n = min_u32(g->len - done, g->piece);
        uint8_t *to = put_new(s, g, n, &p);
        if (to == NULL) {
            pkt_free_list(s, head);
            return BYPASS_PKT_NONE;
        }
        pkt_meta(s, last)->next = p;
        sum = csum_copy(to, g->data + done, n, sum);
    }
    if (tx_csum_offload(s) && total <= g->piece) { /* the device sums one frame, not the pieces of a datagram */
        csum_leave(pkt_meta(s, head), udp + UDP_CSUM, csum_pseudo(g->src, g->dst, PROTO_UDP, total), NET_HEADERS,
                   UDP_CSUM);
        return head;
    }
    uint16_t csum = csum_fold(sum);
    csum = csum != 0 ? csum : 0xffff; /* RFC 768: zero means none */
    memcpy(udp + UDP_CSUM, &csum, 2);
    return head;
}

/* ---- Sending ------------------------------------------------------------------------------------ */

/* 0, or why nothing can be sent there. */
static int check_peer(const struct bypass_stack *s, const struct udp *u, const struct bypass_endpoint *to)
{
    if (!addr_is_v4(&to->addr)) {
        return -EAFNOSUPPORT;
    }
    enum addr_kind kind = addr_kind(s, addr_v4(&to->addr));
    if (to->port == 0 || kind == ADDR_INVALID) {
        return -EINVAL;
    }
    return kind == ADDR_BROADCAST && !(u->flags & UDP_BROADCAST) ? -EACCES : 0;
}

static int64_t transmit(struct bypass_stack *s, uint32_t idx, struct datagram *g, struct dst *d)
{
    enum { DF_MIN_MTU = 552 }; /* below it a smaller path would not be believed (udp_in.c): routers may cut */
    struct udp *u = udp_at(s, idx);
    uint32_t total = UDP_LEN + g->len, frames = 1;
    uint32_t mtu = u->mtu_discover == MTU_PROBE ? s->dev->mtu : d->mtu;
    if (u->mtu_discover >= MTU_DO && total > mtu - IP4_LEN) {
        return -EMSGSIZE;
    }
    struct ip_tx tx = {.src = g->src, .dst = g->dst, .proto = PROTO_UDP, .ttl = u->ttl, .tos = u->tos};
    tx.ref = u->dst.gen != 0 ? &u->dst : NULL; /* resolve() keeps none of groups */
    tx.df = u->mtu_discover >= MTU_DO || (u->mtu_discover == MTU_WANT && d->mtu > DF_MIN_MTU);
    if (tx.ttl == 0 && addr_v4(g->dst)[0] >> 4 == 14) {
        tx.ttl = 1; /* RFC 1112 6.1: multicast stays on the link */
    }
    g->piece = min_u32(mtu - IP4_LEN, s->dev->stride - s->dev->headroom);
    bool cut = total > g->piece;
    if (cut) {
        g->piece &= ~7u;
        frames = (total + g->piece - 1) / g->piece;
        if (frames > s->dev->frames / 2) {
            return -EMSGSIZE; /* it would never be possible */
        }
    }
    bypass_pkt p = frames <= spare_frames(s) ? build(s, g) : BYPASS_PKT_NONE;
    if (p == BYPASS_PKT_NONE) {
        return block(s, idx);
    }
    if (likely(!cut && d->state == DST_OK)) {
        ip_out_ready(s, p, &tx, d);
    } else {
        int err = cut ? ip_out_fragments(s, p, &tx) : ip_out(s, p, &tx);
        if (err < 0) {
            return err;
        }
    }
    STAT(s, udp_out);
    return g->len;
}

/* A peer that is not the last one: who is it, from where do we send, where is the next hop? 0 or -errno. */
static int resolve(struct bypass_stack *s, uint32_t idx, const struct bypass_endpoint *to, struct dst **d)
{
    struct udp *u = udp_at(s, idx);
    int err = check_peer(s, u, to);
    if (err == 0) {
        err = udp_bind_any(s, idx);
    }
    if (err < 0) {
        return err;
    }
    u->from = u->local;
    if (!udp_has_addr(u) && !addr_for(s, &to->addr, &u->from)) {
        u->dst = (struct dst_ref){0};
        return -ENETUNREACH;
    }
    *d = dst_get(s, &u->dst, &to->addr);
    if (*d == NULL || (*d)->state == DST_FAILED) {
        STAT(s, ip_out_unreachable);
        u->dst = (struct dst_ref){0};
        return *d == NULL ? -ENOBUFS : -EHOSTUNREACH;
    }
    if ((*d)->mac[0] & ETH_GROUP_BIT) {
        u->dst = (struct dst_ref){0}; /* the option that allows it may go */
    }
    return 0;
}

int64_t udp_sendto(struct bypass_stack *s, uint32_t idx, const void *buf, size_t n, int flags,
                   const struct bypass_endpoint *to)
{
    struct udp *u = udp_at(s, idx);
    struct bypass_endpoint peer;
    if (flags & BYPASS_MORE) {
        return -EOPNOTSUPP; /* a datagram made of several calls */
    }
    if (n > UDP_MAX_PAYLOAD) {
        return -EMSGSIZE;
    }
    if (to == NULL) {
        if (!(u->flags & UDP_CONNECTED)) {
            return -EDESTADDRREQ;
        }
        peer = (struct bypass_endpoint){.addr = u->peer, .port = u->peer_port};
        to = &peer;
    }
    struct dst *d = dst_hit(s, &u->dst, &to->addr);
    if (d == NULL || d->state != DST_OK || to->port == 0) {
        int err = resolve(s, idx, to, &d);
        if (err < 0) {
            return err;
        }
    }
    if (u->err != 0) { /* after what is wrong with the call itself, as on Linux */
        return -udp_error(s, idx);
    }
    if (u->flags & UDP_SHUT_WR) {
        return -EPIPE;
    }
    struct datagram g = {
        .data = buf,
        .len = (uint32_t)n,
        .src_port = u->local_port,
        .dst_port = to->port,
        .queue = u->queue,
        .src = &u->from,
        .dst = &to->addr,
    };
    return transmit(s, idx, &g, d);
}
