/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ipv4.c - IPv4 (RFC 791, RFC 1122 3.2): validates what arrives and gives it to reass.c, icmp.c, udp.c or back to the
 * poll loop (TCP); puts headers in front of what leaves, and cuts what the path does not carry.
 */
#include <errno.h>

#include "csum.h"
#include "net.h"

/* ---- In ----------------------------------------------------------------------------------------- */

/* RFC 791 3.1. Options are skipped; who wants to choose the route is refused (RFC 7126 4.3, 4.4). */
static bool options_ok(struct bypass_stack *s, const uint8_t *opt, uint32_t len)
{
    while (len > 0 && opt[0] != IP4_OPT_END) {
        uint32_t size = opt[0] == IP4_OPT_NOP ? 1 : len >= 2 ? opt[1] : 0;
        if (size == 0 || size > len || (opt[0] != IP4_OPT_NOP && size < 2)) {
            STAT(s, ip_in_bad_header);
            return false;
        }
        if (opt[0] == IP4_OPT_LSRR || opt[0] == IP4_OPT_SSRR) {
            STAT(s, ip_in_source_route);
            return false;
        }
        opt += size;
        len -= size;
    }
    return true;
}

/* RFC 1122 3.2.1.3: from a host, for us. Sets ri->multicast. */
static bool addresses_ok(struct bypass_stack *s, const uint8_t *ip, struct rx_info *ri)
{
    const struct net *n = net(s);
    uint32_t src = load_be32(ip + IP4_SRC), dst = load_be32(ip + IP4_DST);
    bool ours = false, broadcast = dst == ~0u, bad = ip[IP4_SRC] == 0 || ip[IP4_SRC] == 127 || ip[IP4_SRC] >= 224;
    for (uint32_t i = 0; i < n->locals; i++) {
        const struct net_local *l = &n->local[i];
        bad |= src == l->addr || src == l->bcast;
        ours |= dst == l->addr;
        broadcast |= dst == l->bcast;
    }
    if (unlikely(bad) && !(loops(s) && addr_kind(s, ip + IP4_SRC) == ADDR_LOCAL)) {
        STAT(s, ip_in_bad_source);
        return false;
    }
    if (likely(ours && !ri->multicast)) {
        return true;
    }
    if (ours || !broadcast) { /* RFC 1122 3.3.6: a frame for all with a packet for one is nobody's */
        STAT(s, ip_in_not_us);
        return false;
    }
    ri->multicast = true;
    return true;
}

static uint64_t load64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

static bool header_sum_ok(const uint8_t *ip, uint32_t hlen)
{
    if (likely(hlen == IP4_LEN)) {
        return csum_ipv4_header(load64(ip), load64(ip + 8), load_be32(ip + 16)) == 0;
    }
    return csum_fold(csum_bytes(ip, hlen, 0)) == 0;
}

static bool header_ok(struct bypass_stack *s, struct bypass_pkt_meta *m, const uint8_t *ip, struct rx_info *ri)
{
    if (m->len < IP4_LEN) {
        STAT(s, ip_in_short);
        return false;
    }
    uint32_t hlen = (ip[IP4_VER_IHL] & 15u) * 4, total = rd16(ip + IP4_TOTAL);
    if (ip[IP4_VER_IHL] >> 4 != 4) {
        STAT(s, ip_in_bad_version);
        return false;
    }
    if (hlen < IP4_LEN || hlen > total) {
        STAT(s, ip_in_bad_header);
        return false;
    }
    if (total > m->len) {
        STAT(s, ip_in_truncated);
        return false;
    }
    if (!header_sum_ok(ip, hlen)) {
        STAT(s, ip_in_bad_checksum);
        return false;
    }
    m->len = (uint16_t)total; /* without Ethernet's padding */
    ri->l4_off = (uint16_t)hlen;
    ri->l4_len = (uint16_t)(total - hlen);
    return addresses_ok(s, ip, ri) && (hlen == IP4_LEN || options_ok(s, ip + IP4_LEN, hlen - IP4_LEN));
}

static void drop(struct bypass_stack *s, bypass_pkt p, bool large)
{
    if (large) {
        pkt_free_list(s, p);
    } else {
        pkt_free(s, p);
    }
}

/* To the protocol. `large`: p heads a list of frames. */
static int deliver(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri, bool large)
{
    if (ri->multicast && ri->proto != PROTO_UDP) { /* RFC 1122 3.2.2.6, 4.2.3.10 */
        STAT(s, ip_in_broadcast);
        drop(s, p, large);
    } else if (large && ri->proto != PROTO_UDP) {
        STAT(s, ip_frag_too_large);
        drop(s, p, large);
    } else if (ri->proto == PROTO_TCP) {
        return 1;
    } else if (ri->proto == PROTO_UDP) {
        (large ? udp_in_large : udp_in)(s, p, ri);
    } else if (ri->proto == PROTO_ICMP) {
        icmp_in(s, p, ri);
    } else {
        STAT(s, ip_in_unknown_proto);
        if (core(s)->cfg.flags & BYPASS_F_RST) {
            icmp_unreachable(s, p, ri, ICMP_UNREACH_PROTO);
        }
        drop(s, p, large);
    }
    return 0;
}

static inline __attribute__((always_inline)) void info_fill(struct rx_info *ri, const uint8_t *ip)
{
    ri->src = addr_from_v4(ip + IP4_SRC);
    ri->dst = addr_from_v4(ip + IP4_DST);
    ri->proto = ip[IP4_PROTO];
    ri->ttl = ip[IP4_TTL];
    ri->tos = ip[IP4_TOS];
}

static __attribute__((noinline)) int ipv4_in_careful(struct bypass_stack *s, bypass_pkt *p, struct rx_info *ri)
{
    const uint8_t *ip = pkt_data(s, *p);
    if (!header_ok(s, pkt_meta(s, *p), ip, ri)) {
        pkt_free(s, *p);
        return 0;
    }
    info_fill(ri, ip);
    if (rd16(ip + IP4_FRAG) & (IP4_MF | IP4_OFFSET_MASK)) {
        int whole = reass_in(s, p, ri);
        return whole != 0 ? deliver(s, *p, ri, whole == 2) : 0;
    }
    return deliver(s, *p, ri, false);
}

/* What nearly every packet is, in the order in which it is cheapest to see: no options, no fragment, to our only
 * address, from somebody else on no special address. What is none of this is looked at with care. */
static inline bool plain(const struct bypass_stack *s, const uint8_t *ip, uint32_t len)
{
    const struct net *n = net(s);
    uint32_t src = load_be32(ip + IP4_SRC), total = rd16(ip + IP4_TOTAL);
    uint16_t frag;
    memcpy(&frag, ip + IP4_FRAG, 2);
    return ip[IP4_VER_IHL] == 0x45 && !(frag & 0xff3f) && total >= IP4_LEN && total <= len &&
           load_be32(ip + IP4_DST) == n->local[0].addr && n->locals == 1 && src != n->local[0].addr &&
           src != n->local[0].bcast && ip[IP4_SRC] - 1u < 223 && ip[IP4_SRC] != 127 &&
           csum_ipv4_header(load64(ip), load64(ip + 8), load_be32(ip + 16)) == 0;
}

int ipv4_in(struct bypass_stack *s, bypass_pkt *p, struct bypass_pkt_meta *m, const uint8_t *ip, struct rx_info *ri)
{
    if (unlikely(m->len < IP4_LEN || ri->multicast || !plain(s, ip, m->len))) {
        return ipv4_in_careful(s, p, ri);
    }
    uint16_t total = rd16(ip + IP4_TOTAL);
    m->len = total;
    ri->l4_off = IP4_LEN;
    ri->l4_len = (uint16_t)(total - IP4_LEN);
    info_fill(ri, ip);
    return likely(ri->proto == PROTO_TCP) ? 1 : deliver(s, *p, ri, false);
}

/* ---- Out ---------------------------------------------------------------------------------------- */

/* Packets that may be cut need an identification that does not come again soon (RFC 6864 4.3): a count that starts
 * elsewhere for each destination, so that one destination does not learn the traffic with another (RFC 7739 3). */
static uint16_t next_id(struct bypass_stack *s, const struct ip_tx *tx)
{
    struct core *c = core(s);
    uint16_t id = (uint16_t)(siphash13(c->port_key, tx->dst, sizeof *tx->dst) + ++c->ip_id);
    return id != 0 ? id : 1;
}

static inline __attribute__((always_inline)) void header_put(uint8_t *ip, const struct ip_tx *tx, uint32_t len,
                                                             uint16_t id, uint16_t frag)
{
    uint32_t ttl = tx->ttl != 0 ? tx->ttl : IP4_TTL_DEFAULT;
    uint64_t first = (uint64_t)__builtin_bswap16(frag) << 48 | (uint64_t)__builtin_bswap16(id) << 32 |
                     (uint32_t)__builtin_bswap16((uint16_t)len) << 16 | (uint32_t)tx->tos << 8 | 0x45;
    uint64_t second = (uint64_t)load_be32(addr_v4(tx->src)) << 32 | (uint32_t)tx->proto << 8 | ttl;
    uint32_t third = load_be32(addr_v4(tx->dst));
    second |= (uint32_t)csum_ipv4_header(first, second, third) << 16;
    memcpy(ip, &first, 8);
    memcpy(ip + 8, &second, 8);
    memcpy(ip + 16, &third, 4);
}

void ipv4_checksum_set(uint8_t *ip, uint32_t hlen)
{
    memset(ip + IP4_CSUM, 0, 2);
    uint16_t csum = csum_fold(csum_bytes(ip, hlen, 0));
    memcpy(ip + IP4_CSUM, &csum, 2);
}

static inline __attribute__((always_inline)) void headers_put(struct bypass_stack *s, bypass_pkt p,
                                                              const struct ip_tx *tx, const struct dst *d, uint16_t id,
                                                              uint16_t frag)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    uint8_t *eth = pkt_data(s, p) - NET_HEADERS; /* the netdev's headroom is made for it */
    uint32_t len = m->len + IP4_LEN;
    m->off = (uint16_t)(m->off - NET_HEADERS);
    m->len = (uint16_t)(len + ETH_LEN);
    memcpy(eth + ETH_DST, d->mac, 6);
    memcpy(eth + ETH_SRC, s->dev->mac, 6);
    wr16(eth + ETH_TYPE, ETH_TYPE_IPV4);
    header_put(eth + ETH_LEN, tx, len, id, frag);
    tx_queue(s, p);
}

static __attribute__((noinline)) void out_with_id(struct bypass_stack *s, bypass_pkt p, const struct ip_tx *tx,
                                                  const struct dst *d)
{
    headers_put(s, p, tx, d, next_id(s, tx), 0);
}

void ip_out_ready(struct bypass_stack *s, bypass_pkt p, const struct ip_tx *tx, const struct dst *d)
{
    if (unlikely(!tx->df)) {
        out_with_id(s, p, tx, d);
        return;
    }
    headers_put(s, p, tx, d, 0, IP4_DF); /* RFC 6864 4.1: not cut, an identification has no meaning */
}

const uint8_t *pkt_came_from(const struct bypass_stack *s, bypass_pkt p)
{
    const uint8_t *eth = pkt_data(s, p) - ETH_LEN; /* what a reassembled packet has there is not its own */
    bool own = pkt_meta(s, p)->off >= ETH_LEN && memcmp(eth + ETH_DST, s->dev->mac, 6) == 0 &&
               rd16(eth + ETH_TYPE) == ETH_TYPE_IPV4;
    return own ? eth + ETH_SRC : NULL;
}

int ip_out_back(struct bypass_stack *s, bypass_pkt p, const struct ip_tx *tx, const uint8_t *mac)
{
    const struct dst *d = dst_find(s, tx->dst);
    if (mac == NULL || (d && d->state == DST_OK)) {
        return ip_out(s, p, tx);
    }
    struct dst back = {.state = DST_OK, .mtu = d && d->mtu ? d->mtu : s->dev->mtu};
    memcpy(back.mac, mac, 6);
    ip_out_ready(s, p, tx, &back);
    return 0;
}

void pkt_free_list(struct bypass_stack *s, bypass_pkt head)
{
    while (head != BYPASS_PKT_NONE) {
        bypass_pkt next = pkt_meta(s, head)->next;
        pkt_free(s, head);
        head = next;
    }
}

/* Cuts what the frame carries into frames of `piece` bytes. false: no frames; the head is whole still. */
static bool split(struct bypass_stack *s, bypass_pkt head, uint32_t piece)
{
    struct bypass_pkt_meta *m = pkt_meta(s, head);
    uint32_t left = m->len - piece;
    const uint8_t *from = pkt_data(s, head) + piece;
    bypass_pkt last = head, p;
    while (left > 0) {
        uint32_t n = min_u32(left, piece);
        p = pkt_alloc(s);
        uint8_t *to = p != BYPASS_PKT_NONE ? pkt_put(s, p, (uint16_t)n) : NULL;
        if (to == NULL) {
            if (p != BYPASS_PKT_NONE) {
                pkt_free(s, p);
            }
            pkt_free_list(s, m->next);
            m->next = BYPASS_PKT_NONE;
            return false;
        }
        memcpy(to, from, n);
        pkt_meta(s, p)->queue = m->queue;
        pkt_meta(s, last)->next = p;
        last = p;
        from += n;
        left -= n;
    }
    m->len = (uint16_t)piece;
    return true;
}

int ip_out_fragments(struct bypass_stack *s, bypass_pkt head, const struct ip_tx *tx)
{
    struct dst *d = dst_get(s, tx->ref, tx->dst);
    if (d == NULL || d->state == DST_FAILED) {
        STAT(s, ip_out_unreachable);
        pkt_free_list(s, head);
        return -EHOSTUNREACH;
    }
    uint16_t id = next_id(s, tx);
    uint32_t offset = 0, frames = 0;
    for (bypass_pkt p = head, next; p != BYPASS_PKT_NONE; p = next, frames++) {
        struct bypass_pkt_meta *m = pkt_meta(s, p);
        uint32_t len = m->len;
        next = m->next;
        uint8_t *ip = pkt_push(s, p, IP4_LEN);
        header_put(ip, tx, m->len, id, (uint16_t)(offset / 8 | (next != BYPASS_PKT_NONE ? IP4_MF : 0)));
        offset += len;
        if (d->state == DST_OK) {
            eth_out(s, p, d);
        }
    }
    STAT_ADD(s, ip_out_fragments, frames);
    if (d->state != DST_OK) {
        dst_wait(s, d, head, frames);
    }
    return 0;
}

static int refuse(struct bypass_stack *s, bypass_pkt p, int err)
{
    if (!(pkt_meta(s, p)->seg_flags & IN_TCP)) {
        pkt_free(s, p);
    }
    return err;
}

int ip_out(struct bypass_stack *s, bypass_pkt p, const struct ip_tx *tx)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    struct dst *d = dst_get(s, tx->ref, tx->dst);
    if (d == NULL || d->state == DST_FAILED) {
        STAT(s, ip_out_unreachable);
        return refuse(s, p, -EHOSTUNREACH);
    }
    if (unlikely(m->len + IP4_LEN > d->mtu)) {
        m->next = BYPASS_PKT_NONE;
        if (tx->df || (m->seg_flags & IN_TCP) || !split(s, p, (d->mtu - IP4_LEN) & ~7u)) {
            STAT(s, ip_out_too_big);
            return refuse(s, p, -EMSGSIZE);
        }
        return ip_out_fragments(s, p, tx);
    }
    if (likely(d->state == DST_OK)) {
        ip_out_ready(s, p, tx, d);
        return 0;
    }
    if (m->seg_flags & IN_TCP) {
        return -EAGAIN; /* a connection sends again when tcp_dst_changed() tells; it cannot lend its links */
    }
    m->next = BYPASS_PKT_NONE;
    uint8_t *ip = pkt_push(s, p, IP4_LEN); /* before m->len is read: it grows */
    header_put(ip, tx, m->len, tx->df ? 0 : next_id(s, tx), tx->df ? IP4_DF : 0);
    dst_wait(s, d, p, 1);
    return 0;
}
