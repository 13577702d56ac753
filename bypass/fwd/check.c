/* SPDX-License-Identifier: Apache-2.0 */
/* check.c - see check.h. RFC 791, RFC 1858 (fragments that hide ports), RFC 1122 3.2.2 (ICMP errors). */
#include "check.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum {
    ETH = 14,
    TAG = 4,
    IP = 20,
    TCP = 6,
    UDP = 17,
    ICMP = 1,
    FLAG_MF = 0x2000,
    OFFSET = 0x1fff,
    FRAGMENT_NS = 2000000000, /* the fragments of a datagram leave the stack together */
    UNITS = 64,               /* of a nanosecond, in buckets: nine years fit */
};

static uint16_t be16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }
static uint32_t be32(const uint8_t *p) { return (uint32_t)be16(p) << 16 | be16(p + 2); }
static uint32_t raw32(const uint8_t *p)
{
    uint32_t v;

    memcpy(&v, p, sizeof v);
    return v;
}

/* ---- Addresses of the host --------------------------------------------------------------------------------- */

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

void checker_locals(struct checker *c, const struct fwd_local *list, uint32_t count)
{
    c->locals = c->broadcasts = 0;
    for (uint32_t i = 0; i < count && i < FWD_LOCALS_MAX; i++) {
        uint32_t addr = be32(list[i].addr.b + 12), prefix = list[i].prefix_len;

        c->local[c->locals++] = addr;
        if (prefix < 31) { /* RFC 3021: no broadcast on a link of two */
            c->broadcast[c->broadcasts++] = addr | (prefix ? ~0u >> prefix : ~0u);
        }
    }
    qsort(c->local, c->locals, sizeof *c->local, by_value);
    qsort(c->broadcast, c->broadcasts, sizeof *c->broadcast, by_value);
}

static bool one_of(uint32_t addr, const uint32_t *sorted, uint32_t n)
{
    return n && bsearch(&addr, sorted, n, sizeof addr, by_value) != NULL;
}

/* One host, somewhere: neither this network (RFC 1122 3.2.1.3), nor a group, nor all. */
static bool one_host(const struct checker *c, uint32_t dst)
{
    return dst >> 24 != 0 && dst >> 24 != 127 && dst >> 28 < 14 && !one_of(dst, c->broadcast, c->broadcasts);
}

/* ---- Fragments --------------------------------------------------------------------------------------------- */

static void fragment_remember(struct sender *s, const uint8_t *ip, uint64_t now_ns)
{
    uint32_t i = s->next++ % CHECK_FRAGMENTS;

    s->fragment[i].src = raw32(ip + 12);
    s->fragment[i].dst = raw32(ip + 16);
    s->fragment[i].id = be16(ip + 4);
    s->fragment[i].until_ns = now_ns + FRAGMENT_NS;
}

static bool fragment_known(const struct sender *s, const uint8_t *ip, uint64_t now_ns)
{
    for (uint32_t i = 0; i < CHECK_FRAGMENTS; i++) {
        if (s->fragment[i].until_ns > now_ns && s->fragment[i].src == raw32(ip + 12) &&
            s->fragment[i].dst == raw32(ip + 16) && s->fragment[i].id == be16(ip + 4)) {
            return true;
        }
    }
    return false;
}

/* ---- Sending ----------------------------------------------------------------------------------------------- */

static enum fwd_refusal check_ethernet(const struct checker *c, const struct sender *s, const uint8_t *frame,
                                       uint32_t len, uint32_t *ip_at)
{
    uint32_t at = ETH;

    if (len < ETH + IP) {
        return FWD_REFUSED_SHORT;
    }
    if (memcmp(frame + 6, c->mac, 6) != 0) {
        return FWD_REFUSED_SOURCE_MAC;
    }
    if ((frame[0] & 1) && !(s->allow & FWD_ALLOW_GROUPS)) {
        return FWD_REFUSED_GROUP_MAC;
    }
    if (be16(frame + 12) == 0x8100) {
        if (!(s->allow & FWD_ALLOW_VLAN)) {
            return FWD_REFUSED_VLAN;
        }
        at += TAG;
    }
    *ip_at = at;
    if (be16(frame + at - 2) != 0x0800) {
        return FWD_REFUSED_NOT_IPV4;
    }
    return len < at + IP ? FWD_REFUSED_SHORT : FWD_OK;
}

static bool header_sum_right(const uint8_t *ip)
{
    uint32_t sum = 0;

    for (int i = 0; i < IP; i += 2) {
        sum += be16(ip + i);
    }
    sum = (sum & 0xffff) + (sum >> 16);
    return ((sum & 0xffff) + (sum >> 16)) == 0xffff;
}

static enum fwd_refusal check_ip(const struct checker *c, const struct sender *s, const uint8_t *ip, uint32_t len)
{
    uint32_t dst = be32(ip + 16);

    if (ip[0] >> 4 != 4 || (ip[0] & 15) < 5) {
        return FWD_REFUSED_HEADER;
    }
    if ((ip[0] & 15) > 5) {
        return FWD_REFUSED_OPTIONS;
    }
    if (be16(ip + 2) != len) {
        return FWD_REFUSED_LENGTH;
    }
    if (len > c->mtu) {
        return FWD_REFUSED_MTU;
    }
    if (!header_sum_right(ip)) {
        return FWD_REFUSED_CHECKSUM;
    }
    if (!one_of(be32(ip + 12), c->local, c->locals)) {
        return FWD_REFUSED_SOURCE;
    }
    if (!one_host(c, dst) && !((s->allow & FWD_ALLOW_GROUPS) && dst >> 24 != 0 && dst >> 24 != 127)) {
        return FWD_REFUSED_DESTINATION;
    }
    return FWD_OK;
}

/* A TCP or UDP header that is all there, with lengths that are right. */
static enum fwd_refusal check_l4(const struct checker *c, const struct sender *s, const uint8_t *ip, uint32_t len)
{
    const uint8_t *h = ip + IP;
    struct flow f = {.local = raw32(ip + 12), .remote = raw32(ip + 16), .proto = ip[9]};

    if (f.proto == TCP) {
        if (len < 20 || (h[12] >> 4) < 5 || (h[12] >> 4) * 4u > len) {
            return FWD_REFUSED_PORTS;
        }
    } else if (len < 8 || (be16(h + 4) != len && !(be16(ip + 6) & FLAG_MF)) || be16(h + 4) < 8) {
        return FWD_REFUSED_PORTS;
    }
    f.local_port = be16(h);
    f.remote_port = be16(h + 2);
    return leases_owner(&c->leases, &f) == s->owner ? FWD_OK : FWD_REFUSED_LEASE;
}

/* The flow of a packet that is quoted, seen from here: it came from the remote end. */
static bool quoted_flow(const uint8_t *q, uint32_t len, struct flow *f)
{
    uint32_t hlen;

    if (len < IP + 8 || q[0] >> 4 != 4 || (hlen = (q[0] & 15) * 4u) < IP || len < hlen + 8 || (be16(q + 6) & OFFSET) ||
        (q[9] != TCP && q[9] != UDP)) {
        return false;
    }
    *f = (struct flow){.local = raw32(q + 16),
                       .remote = raw32(q + 12),
                       .local_port = be16(q + hlen + 2),
                       .remote_port = be16(q + hlen),
                       .proto = q[9]};
    return true;
}

/* Errors about packets that this application received, sent to where they came from. */
static enum fwd_refusal check_icmp(const struct checker *c, const struct sender *s, const uint8_t *ip, uint32_t len)
{
    const uint8_t *icmp = ip + IP;
    struct flow f;

    if (len < 8) {
        return FWD_REFUSED_ICMP;
    }
    if (icmp[0] == 0 && icmp[1] == 0) { /* echo reply */
        return s->allow & FWD_ALLOW_PING ? FWD_OK : FWD_REFUSED_ICMP;
    }
    if ((icmp[0] != 3 && icmp[0] != 11) || !quoted_flow(icmp + 8, len - 8, &f) || f.remote != raw32(ip + 16) ||
        leases_owner(&c->leases, &f) != s->owner) {
        return FWD_REFUSED_ICMP;
    }
    return FWD_OK;
}

/* The device may only complete the checksum of the TCP or UDP header that was looked at. */
static bool offload_right(const uint8_t *ip, uint32_t ip_at, const struct bypass_pkt_meta *m)
{
    return !(be16(ip + 6) & (FLAG_MF | OFFSET)) && m->csum_start == ip_at + IP &&
           ((ip[9] == TCP && m->csum_off == 16) || (ip[9] == UDP && m->csum_off == 6));
}

enum fwd_refusal check_send(const struct checker *c, struct sender *s, const uint8_t *frame,
                            const struct bypass_pkt_meta *m, uint64_t now_ns)
{
    uint32_t at, len, frag;
    const uint8_t *ip;
    enum fwd_refusal why = check_ethernet(c, s, frame, m->len, &at);

    if (why != FWD_OK) {
        return why;
    }
    ip = frame + at;
    len = m->len - at;
    why = check_ip(c, s, ip, len);
    if (why != FWD_OK) {
        return why;
    }
    if ((m->flags & BYPASS_TX_CSUM) && !offload_right(ip, at, m)) {
        return FWD_REFUSED_OFFLOAD;
    }
    frag = be16(ip + 6) & (FLAG_MF | OFFSET);
    if (frag && ip[9] != UDP) {
        return FWD_REFUSED_FRAGMENT;
    }
    if (frag & OFFSET) { /* it cannot lie over the first one's ports: they are in its first eight bytes */
        return fragment_known(s, ip, now_ns) ? FWD_OK : FWD_REFUSED_FRAGMENT;
    }
    if (ip[9] == ICMP) {
        return check_icmp(c, s, ip, len - IP);
    }
    if (ip[9] != TCP && ip[9] != UDP) {
        return FWD_REFUSED_PROTOCOL;
    }
    why = check_l4(c, s, ip, len - IP);
    if (why == FWD_OK && frag) {
        fragment_remember(s, ip, now_ns);
    }
    return why;
}

/* ---- Receiving --------------------------------------------------------------------------------------------- */

uint32_t check_owner(const struct checker *c, const uint8_t *frame, uint32_t len)
{
    const uint8_t *ip;
    uint32_t at = ETH, hlen;
    struct flow f;

    if (len >= ETH + TAG && be16(frame + 12) == 0x8100) {
        at += TAG;
    }
    ip = frame + at;
    if (len < at + IP || be16(frame + at - 2) != 0x0800 || ip[0] >> 4 != 4 || (hlen = (ip[0] & 15) * 4u) < IP ||
        len < at + hlen + 8 || (be16(ip + 6) & OFFSET)) {
        return 0;
    }
    if (ip[9] == ICMP) { /* an error about what was sent from here: the quote's source is the local end */
        struct flow q;

        if (!quoted_flow(ip + hlen + 8, len - at - hlen - 8, &q)) {
            return 0;
        }
        f = (struct flow){.local = q.remote,
                          .remote = q.local,
                          .local_port = q.remote_port,
                          .remote_port = q.local_port,
                          .proto = q.proto};
        return leases_owner(&c->leases, &f);
    }
    if (ip[9] != TCP && ip[9] != UDP) {
        return 0;
    }
    f = (struct flow){.local = raw32(ip + 16),
                      .remote = raw32(ip + 12),
                      .local_port = be16(ip + hlen + 2),
                      .remote_port = be16(ip + hlen),
                      .proto = ip[9]};
    return leases_owner(&c->leases, &f);
}

/* ---- Rates ------------------------------------------------------------------------------------------------- */

void bucket_set(struct bucket *b, uint64_t per_s, uint64_t burst, uint64_t now_ns)
{
    *b = (struct bucket){.per_s = per_s, .burst = burst, .full_ns = now_ns * UNITS};
}

static uint64_t cost(const struct bucket *b, uint64_t n)
{
    return (uint64_t)((unsigned __int128)n * 1000000000u * UNITS / b->per_s);
}

uint64_t bucket_ready(const struct bucket *b)
{
    uint64_t credit = b->per_s ? cost(b, b->burst) : 0;

    return b->per_s && b->full_ns > credit ? (b->full_ns - credit + UNITS - 1) / UNITS : 0;
}

void bucket_take(struct bucket *b, uint64_t n, uint64_t now_ns)
{
    if (b->per_s) {
        b->full_ns = (b->full_ns > now_ns * UNITS ? b->full_ns : now_ns * UNITS) + cost(b, n);
    }
}
