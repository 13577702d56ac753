/* SPDX-License-Identifier: Apache-2.0 */
/*
 * reass.c - reassembly of IPv4 datagrams (RFC 791 3.2, RFC 815 for the idea). Fragments stay in their frames, in a list
 * by offset, until the datagram is whole: then it is put together in the first frame, or, if it is larger than a
 * frame, handed on as the list.
 *
 * What may be held is bounded: datagrams by max_frags, frames by an eighth of the pool; the oldest datagram goes
 * first. A fragment that overlaps another one with other bytes condemns the whole datagram, also what has yet to
 * arrive of it (RFC 5722 for IPv6, RFC 1858 why). 30 s after its first fragment an incomplete one is dropped and, if
 * the head is there, its sender told (RFC 792, RFC 1122 3.3.2).
 */
#include <assert.h>

#include "net.h"

enum { PIECES_MAX = 256 }; /* of one datagram: 65,535 bytes over a path of 576 need 119 */
#define REASS_TIMEOUT_NS (30 * SEC_NS)

struct frag { /* a datagram under reassembly */
    uint32_t link;
    uint32_t src, dst; /* as on the wire, with proto and id the key (RFC 791 3.2) */
    uint16_t id;
    uint8_t proto;
    bool condemned;        /* its frames are gone; what still arrives is dropped */
    uint32_t hash_next;    /* index plus one, as the two below */
    uint32_t older, newer; /* in order of arrival of the first fragment */
    bypass_pkt head, tail; /* frames by offset: meta.data_off, meta.data_len bytes; linked by meta.next */
    uint32_t pieces;
    uint32_t have_len;  /* bytes in the frames */
    uint32_t total_len; /* payload of the datagram; known when have_last */
    bool have_last, multicast;
    uint16_t pad;
    uint64_t until_ns;
};

static struct frag *frag_at(const struct bypass_stack *s, uint32_t i) { return pool_at(s, &core(s)->frags, i); }

void reass_layout(struct layout *l, struct core *c)
{
    struct reass *r = (struct reass *)c->frag_state;
    uint32_t buckets = 16;
    while (buckets < c->cfg.max_frags) {
        buckets *= 2;
    }
    layout_pool(l, &c->frags, sizeof(struct frag), c->cfg.max_frags);
    r->table_off = layout_bytes(l, buckets * sizeof(uint32_t));
    r->mask = buckets - 1;
}

static uint32_t *bucket(const struct bypass_stack *s, const struct frag *f)
{
    uint32_t key[3] = {f->src, f->dst, (uint32_t)f->id << 16 | f->proto};
    uint32_t *table = at(s, reass(s)->table_off);
    return &table[siphash13(core(s)->hash_key, key, sizeof key) & reass(s)->mask];
}

/* ---- Datagrams ---------------------------------------------------------------------------------- */

static void frames_drop(struct bypass_stack *s, struct frag *f)
{
    reass(s)->frames -= f->pieces;
    pkt_free_list(s, f->head);
    f->head = f->tail = BYPASS_PKT_NONE;
    f->pieces = 0;
}

static void frag_remove(struct bypass_stack *s, uint32_t i)
{
    struct reass *r = reass(s);
    struct frag *f = frag_at(s, i);
    uint32_t *link = bucket(s, f);
    while (*link != i + 1) {
        link = &frag_at(s, *link - 1)->hash_next;
    }
    *link = f->hash_next;
    *(f->older != 0 ? &frag_at(s, f->older - 1)->newer : &r->oldest) = f->newer;
    *(f->newer != 0 ? &frag_at(s, f->newer - 1)->older : &r->newest) = f->older;
    frames_drop(s, f);
    pool_free(s, &core(s)->frags, i);
}

static uint32_t frag_find(struct bypass_stack *s, const struct frag *key)
{
    for (uint32_t link = *bucket(s, key); link != 0;) {
        const struct frag *f = frag_at(s, link - 1);
        if (f->src == key->src && f->dst == key->dst && f->id == key->id && f->proto == key->proto) {
            return link - 1;
        }
        link = f->hash_next;
    }
    return NO_INDEX;
}

static uint32_t frag_new(struct bypass_stack *s, const struct frag *key)
{
    struct reass *r = reass(s);
    uint32_t i = pool_alloc(s, &core(s)->frags);
    if (i == NO_INDEX) {
        STAT(s, ip_frag_too_many);
        frag_remove(s, r->oldest - 1);
        i = pool_alloc(s, &core(s)->frags);
    }
    struct frag *f = frag_at(s, i);
    *f = *key;
    f->until_ns = now_ns(s) + REASS_TIMEOUT_NS;
    f->head = f->tail = BYPASS_PKT_NONE;
    f->hash_next = *bucket(s, f);
    *bucket(s, f) = i + 1;
    f->older = r->newest;
    *(f->older != 0 ? &frag_at(s, f->older - 1)->newer : &r->oldest) = i + 1;
    r->newest = i + 1;
    return i;
}

/* ---- Fragments ---------------------------------------------------------------------------------- */

static const uint8_t *piece_data(const struct bypass_stack *s, bypass_pkt p)
{
    const uint8_t *ip = pkt_data(s, p);
    return ip + (ip[IP4_VER_IHL] & 15) * 4;
}

enum verdict { TAKE, DUPLICATE, OVERLAP };

/* Where the fragment belongs: behind *after (BYPASS_PKT_NONE: first). Usually it is the next one. */
static enum verdict place(const struct bypass_stack *s, const struct frag *f, bypass_pkt p, bypass_pkt *after)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p), *e;
    bypass_pkt next = f->head;
    *after = BYPASS_PKT_NONE;
    if (f->tail != BYPASS_PKT_NONE && (e = pkt_meta(s, f->tail), m->data_off >= e->data_off + e->data_len)) {
        *after = f->tail;
        return TAKE;
    }
    for (; next != BYPASS_PKT_NONE; *after = next, next = e->next) {
        e = pkt_meta(s, next);
        if (m->data_off + m->data_len <= e->data_off) {
            return TAKE;
        }
        if (m->data_off < e->data_off + e->data_len) {
            bool same = m->data_off == e->data_off && m->data_len == e->data_len &&
                        memcmp(piece_data(s, p), piece_data(s, next), m->data_len) == 0;
            return same ? DUPLICATE : OVERLAP;
        }
    }
    return TAKE;
}

static void insert(struct bypass_stack *s, struct frag *f, bypass_pkt p, bypass_pkt after)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    uint32_t *link = after == BYPASS_PKT_NONE ? &f->head : &pkt_meta(s, after)->next;
    m->next = *link;
    *link = p;
    if (m->next == BYPASS_PKT_NONE) {
        f->tail = p;
    }
    f->pieces++;
    f->have_len += m->data_len;
    reass(s)->frames++;
}

/* The piece agrees with what is known of the datagram's length. */
static bool length_ok(const struct frag *f, uint32_t end, bool last)
{
    if (f->have_last) {
        return last ? end == f->total_len : end <= f->total_len;
    }
    return true;
}

/* 0: dropped, freed. 1: kept. */
static int piece_add(struct bypass_stack *s, struct frag *f, bypass_pkt p, bool last)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    uint32_t end = (uint32_t)m->data_off + m->data_len;
    bypass_pkt after;
    enum verdict v = place(s, f, p, &after);
    if (v == DUPLICATE) {
        STAT(s, ip_frag_duplicate);
        pkt_free(s, p);
        return 0;
    }
    bool beyond = last && f->tail != BYPASS_PKT_NONE && after != f->tail; /* an end in front of known bytes */
    if (v == OVERLAP || f->pieces == PIECES_MAX || beyond || !length_ok(f, end, last)) {
        STAT_ADD(s, ip_frag_overlap, v == OVERLAP);
        STAT_ADD(s, ip_frag_too_many, v != OVERLAP && f->pieces == PIECES_MAX);
        STAT_ADD(s, ip_frag_bad, v != OVERLAP && f->pieces < PIECES_MAX);
        f->condemned = true;
        frames_drop(s, f);
        pkt_free(s, p);
        return 0;
    }
    insert(s, f, p, after);
    if (last) {
        f->have_last = true;
        f->total_len = end;
    }
    return 1;
}

/* Keeps the frames of all datagrams within their share of the pool, at the expense of the oldest. */
static void make_room(struct bypass_stack *s, uint32_t keep)
{
    struct reass *r = reass(s);
    uint32_t limit = max_u32(s->dev->frames / 8, 2);
    while (r->frames >= limit) {
        uint32_t victim = r->oldest - 1;
        if (victim == keep) {
            victim = frag_at(s, keep)->newer - 1;
        }
        STAT(s, ip_frag_too_many);
        if (victim == NO_INDEX) { /* it alone is too much */
            frag_at(s, keep)->condemned = true;
            frames_drop(s, frag_at(s, keep));
            return;
        }
        frag_remove(s, victim);
    }
}

/* ---- The whole ---------------------------------------------------------------------------------- */

static int finish(struct bypass_stack *s, uint32_t i, bypass_pkt *p, struct rx_info *ri)
{
    struct frag *f = frag_at(s, i);
    bypass_pkt head = f->head;
    uint32_t total = f->total_len;
    reass(s)->frames -= f->pieces;
    f->pieces = 0;
    f->head = BYPASS_PKT_NONE; /* they are the caller's now */
    frag_remove(s, i);
    STAT(s, ip_frag_reassembled);

    struct bypass_pkt_meta *m = pkt_meta(s, head);
    uint8_t *ip = pkt_data(s, head);
    uint32_t hlen = (ip[IP4_VER_IHL] & 15u) * 4;
    m->flags &= (uint8_t)~BYPASS_RX_CSUM_OK; /* said of a fragment at most */
    ri->ttl = ip[IP4_TTL];
    ri->tos = ip[IP4_TOS];
    ri->l4_off = (uint16_t)hlen;
    ri->l4_len = (uint16_t)total;
    *p = head;
    if (hlen + total > IP4_MAX) {
        STAT(s, ip_frag_bad);
        pkt_free_list(s, head);
        return 0;
    }
    if (m->off + hlen + total > s->dev->stride) {
        return 2;
    }
    for (bypass_pkt q = m->next, next; q != BYPASS_PKT_NONE; q = next) {
        const struct bypass_pkt_meta *e = pkt_meta(s, q);
        next = e->next;
        memcpy(ip + hlen + e->data_off, piece_data(s, q), e->data_len);
        pkt_free(s, q);
    }
    m->next = BYPASS_PKT_NONE;
    m->len = (uint16_t)(hlen + total);
    wr16(ip + IP4_TOTAL, m->len); /* as if it had come so: errors quote it */
    wr16(ip + IP4_FRAG, 0);
    ipv4_checksum_set(ip, hlen);
    return 1;
}

int reass_in(struct bypass_stack *s, bypass_pkt *p, struct rx_info *ri)
{
    struct bypass_pkt_meta *m = pkt_meta(s, *p);
    const uint8_t *ip = pkt_data(s, *p);
    uint32_t offset = (rd16(ip + IP4_FRAG) & IP4_OFFSET_MASK) * 8u;
    bool last = !(rd16(ip + IP4_FRAG) & IP4_MF);
    STAT(s, ip_frag_in);
    if (ri->l4_len == 0 || (!last && ri->l4_len % 8 != 0) || offset + ri->l4_off + ri->l4_len > IP4_MAX) {
        STAT(s, ip_frag_bad);
        pkt_free(s, *p);
        return 0;
    }
    m->data_off = (uint16_t)offset;
    m->data_len = ri->l4_len;
    struct frag key = {
        .src = load_be32(ip + IP4_SRC),
        .dst = load_be32(ip + IP4_DST),
        .id = rd16(ip + IP4_ID),
        .proto = ri->proto,
        .multicast = ri->multicast,
    };
    uint32_t i = frag_find(s, &key);
    if (i == NO_INDEX) {
        i = frag_new(s, &key);
    }
    struct frag *f = frag_at(s, i);
    if (!f->condemned) {
        make_room(s, i);
    }
    if (f->condemned) {
        STAT(s, ip_frag_after_overlap);
        pkt_free(s, *p);
        return 0;
    }
    if (piece_add(s, f, *p, last) && f->have_last && f->have_len == f->total_len) {
        return finish(s, i, p, ri);
    }
    return 0;
}

void reass_timers(struct bypass_stack *s)
{
    struct reass *r = reass(s);
    while (r->oldest != 0 && frag_at(s, r->oldest - 1)->until_ns <= now_ns(s)) {
        struct frag *f = frag_at(s, r->oldest - 1);
        if (f->head != BYPASS_PKT_NONE && pkt_meta(s, f->head)->data_off == 0 && !f->multicast) {
            icmp_error_out(s, f->head, ICMP_TIME_EXCEEDED, ICMP_TIME_REASSEMBLY);
        }
        STAT(s, ip_frag_timeout);
        frag_remove(s, r->oldest - 1);
    }
}

uint64_t reass_deadline(const struct bypass_stack *s)
{
    uint32_t oldest = reass(s)->oldest;
    return oldest != 0 ? frag_at(s, oldest - 1)->until_ns : NO_DEADLINE;
}

void reass_destroy(struct bypass_stack *s)
{
    while (reass(s)->oldest != 0) {
        frag_remove(s, reass(s)->oldest - 1);
    }
}
