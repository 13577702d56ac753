/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_ooo.c - received bytes ahead of rcv_nxt (RFC 9293 3.10.7.4: "segments with higher beginning sequence numbers
 * SHOULD be held"). A connection with a hole has a record, struct tcp_ooo: a sorted list of ranges, each without a
 * gap and each a list of items; no two ranges touch. What these ranges are is what our SACK blocks say.
 *
 *     rcv_nxt   hole   [range: item item item]   hole   [range: item]
 *                       first             end
 *
 * Cost: a burst behind a hole goes to the last range, retransmissions go where the one before went (the hint):
 * neither walks. The number of ranges is bounded, so that a sender that leaves out every second byte costs a bounded
 * walk and bounded memory: a segment that would make one too many counts as lost. Data that was reported in a SACK
 * block is thrown away only for want of memory (RFC 2018 8).
 */
#include "tcp_item.h"

static struct tcp_ooo *ooo_at(const struct bypass_stack *s, uint32_t i) { return pool_at(s, &core(s)->ooos, i); }
static struct tcp_range *range_at(const struct bypass_stack *s, uint32_t i) { return pool_at(s, &core(s)->ranges, i); }

struct tcp_ooo *tcp_ooo_of(const struct bypass_stack *s, const struct tcp_conn *c) { return ooo_at(s, c->ooo); }

struct tcp_range *tcp_ooo_range(const struct bypass_stack *s, uint32_t i) { return range_at(s, i); }

/* ---- The record ---------------------------------------------------------------------------------------- */
static struct tcp_ooo *record(struct bypass_stack *s, struct tcp_conn *c)
{
    if (c->ooo != NO_INDEX)
        return ooo_at(s, c->ooo);
    c->ooo = pool_alloc(s, &core(s)->ooos); /* there are as many as connections */
    struct tcp_ooo *o = ooo_at(s, c->ooo);
    *o = (struct tcp_ooo){
        .link = NO_INDEX, .conn = conn_index(s, c), .first = NO_INDEX, .last = NO_INDEX, .hint = NO_INDEX};
    return o;
}

static void record_end(struct bypass_stack *s, struct tcp_conn *c)
{
    if (c->ooo == NO_INDEX || ooo_at(s, c->ooo)->first != NO_INDEX)
        return;
    ooo_at(s, c->ooo)->conn = NO_INDEX;
    pool_free(s, &core(s)->ooos, c->ooo);
    c->ooo = NO_INDEX;
}

/* ---- Recently touched ranges, for SACK blocks (RFC 2018 4) ---------------------------------------------- */
static void recent_remove(struct tcp_ooo *o, uint32_t r)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < o->recents; i++)
        if (o->recent[i] != r)
            o->recent[n++] = o->recent[i];
    o->recents = n;
}

static void recent_touch(struct tcp_ooo *o, uint32_t r)
{
    if (o->recents > 0 && o->recent[0] == r)
        return;
    recent_remove(o, r);
    uint32_t n = min_u32(o->recents, SACK_BLOCKS - 1);
    memmove(o->recent + 1, o->recent, n * sizeof o->recent[0]);
    o->recent[0] = r;
    o->recents = n + 1;
}

/* ---- Ranges --------------------------------------------------------------------------------------------- */
/* The last range that begins at or before `at`, NO_INDEX: none does. */
static uint32_t range_find(const struct bypass_stack *s, const struct tcp_ooo *o, seq_t at)
{
    if (o->first == NO_INDEX || seq_lt(at, range_at(s, o->first)->first))
        return NO_INDEX;
    if (seq_leq(range_at(s, o->last)->first, at))
        return o->last;
    const struct tcp_range *all = range_at(s, 0); /* an array: a step of a hostile walk costs no pool's arithmetic */
    uint32_t r = o->hint != NO_INDEX ? o->hint : o->first, next;
    while (seq_gt(all[r].first, at))
        r = all[r].prev;
    for (next = all[r].link; seq_leq(all[next].first, at); next = all[r].link)
        r = next;
    return r;
}

/* Half of the pool is for connections with few ranges: a few hostile ones must not take it from all others. */
static uint32_t range_new(struct bypass_stack *s, struct tcp_ooo *o, uint32_t after)
{
    const struct pool *p = &core(s)->ranges;
    uint32_t most = p->used > p->cap / 2 ? OOO_RANGES_MAX / 32 : OOO_RANGES_MAX;
    uint32_t i = o->ranges < most ? pool_alloc(s, &core(s)->ranges) : NO_INDEX;
    if (i == NO_INDEX) {
        STAT(s, tcp_ooo_refused);
        return i;
    }
    struct tcp_range *r = range_at(s, i);
    r->prev = after;
    r->link = after != NO_INDEX ? range_at(s, after)->link : o->first;
    *(after != NO_INDEX ? &range_at(s, after)->link : &o->first) = i;
    *(r->link != NO_INDEX ? &range_at(s, r->link)->prev : &o->last) = i;
    o->ranges++;
    return i;
}

/* Its items are the caller's. */
static void range_unlink(struct bypass_stack *s, struct tcp_ooo *o, uint32_t i)
{
    const struct tcp_range *r = range_at(s, i);
    *(r->prev != NO_INDEX ? &range_at(s, r->prev)->link : &o->first) = r->link;
    *(r->link != NO_INDEX ? &range_at(s, r->link)->prev : &o->last) = r->prev;
    if (o->hint == i)
        o->hint = r->prev;
    o->ranges--;
    recent_remove(o, i);
    pool_free(s, &core(s)->ranges, i);
}

static void range_drop(struct bypass_stack *s, struct tcp_conn *c, struct tcp_ooo *o, uint32_t i)
{
    item_free_list(s, c, range_at(s, i)->head);
    range_unlink(s, o, i);
}

/* ---- Storing --------------------------------------------------------------------------------------------- */
/* Puts an item behind range p, in front of the range behind it, or between. false: no room for one more range. */
static bool link_item(struct bypass_stack *s, struct tcp_ooo *o, uint32_t item, uint32_t p)
{
    struct item_view v = item_view(s, item);
    seq_t first = seq(*v.seq), end = seq(*v.seq + *v.len);
    uint32_t n = p != NO_INDEX ? range_at(s, p)->link : o->first;
    bool joins_p = p != NO_INDEX && seq_eq(range_at(s, p)->end, first);
    bool joins_n = n != NO_INDEX && seq_eq(range_at(s, n)->first, end);
    uint32_t at = joins_p ? p : joins_n ? n : range_new(s, o, p);
    if (at == NO_INDEX)
        return false;
    struct tcp_range *r = range_at(s, at);
    *v.next = NO_INDEX;
    if (joins_p) {
        *item_view(s, r->tail).next = item;
        r->tail = item;
        r->end = end;
        if (joins_n) {
            const struct tcp_range *w = range_at(s, n);
            *v.next = w->head;
            r->tail = w->tail;
            r->end = w->end;
            range_unlink(s, o, n);
        }
    } else if (joins_n) {
        *v.next = r->head;
        r->head = item;
        r->first = first;
    } else {
        r->head = r->tail = item;
        r->first = first;
        r->end = end;
    }
    recent_touch(o, at);
    if (at != o->last)
        o->hint = at;
    return true;
}

/* Takes the item. What is here already is cut off it, or it is thrown away; whole ranges that it covers go. */
void tcp_ooo_insert(struct bypass_stack *s, struct tcp_conn *c, uint32_t item)
{
    struct tcp_ooo *o = record(s, c);
    struct item_view v = item_view(s, item);
    const seq_t end = seq(*v.seq + *v.len);
    uint32_t p = range_find(s, o, seq(*v.seq)), n = p != NO_INDEX ? range_at(s, p)->link : o->first;
    if (p != NO_INDEX && seq_lt(seq(*v.seq), range_at(s, p)->end)) {
        uint32_t have = (uint32_t)seq_diff(range_at(s, p)->end, seq(*v.seq));
        tcp_sack_duplicate(s, c, seq(*v.seq), seq_add(seq(*v.seq), min_u32(have, *v.len)));
        if (have >= *v.len) {
            STAT(s, tcp_in_duplicate);
            recent_touch(o, p);
            item_free(s, c, item);
            return;
        }
        item_trim_front(&v, have);
    }
    while (n != NO_INDEX && seq_lt(range_at(s, n)->first, end)) {
        const struct tcp_range *r = range_at(s, n);
        uint32_t next = r->link;
        if (seq_gt(r->end, end)) { /* keep the old bytes, cut the new one's tail */
            tcp_sack_duplicate(s, c, r->first, end);
            *v.len = (uint16_t)(r->first.v - *v.seq);
            break;
        }
        tcp_sack_duplicate(s, c, r->first, r->end);
        range_drop(s, c, o, n);
        n = next;
    }
    if (!link_item(s, o, item, p))
        item_free(s, c, item);
    record_end(s, c);
}

/* Bytes that continue the last range, into the room left in its last chunk: a burst of small segments does not take a
 * chunk each. Returns how many. */
uint32_t tcp_ooo_fill(struct bypass_stack *s, struct tcp_conn *c, const uint8_t *data, uint32_t len, seq_t first)
{
    if (c->ooo == NO_INDEX)
        return 0;
    struct tcp_ooo *o = ooo_at(s, c->ooo);
    struct tcp_range *r = range_at(s, o->last);
    if (!seq_eq(r->end, first) || !(r->tail & ITEM_CHUNK))
        return 0;
    uint32_t n = item_fill_chunk(s, r->tail, data, len);
    r->end = seq_add(r->end, n);
    if (n > 0)
        recent_touch(o, o->last);
    return n;
}

/* Appends what begins at or before rcv_nxt to the queue in order. Returns true when a hole was filled. */
bool tcp_ooo_collect(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_ooo *o = ooo_at(s, c->ooo);
    bool any = false;
    while (o->first != NO_INDEX && seq_leq(range_at(s, o->first)->first, c->rcv_nxt)) {
        uint32_t i = o->first;
        const struct tcp_range *r = range_at(s, i);
        uint32_t item = r->head, tail = r->tail;
        seq_t end = r->end;
        if (seq_lt(r->first, c->rcv_nxt)) /* came again, with what filled the hole */
            tcp_sack_duplicate(s, c, r->first, seq_lt(end, c->rcv_nxt) ? end : c->rcv_nxt);
        range_unlink(s, o, i);
        any = true;
        while (item != NO_INDEX && seq_lt(seq(*item_view(s, item).seq), c->rcv_nxt)) {
            struct item_view v = item_view(s, item);
            uint32_t have = c->rcv_nxt.v - *v.seq, next = *v.next;
            if (have < *v.len) {
                item_trim_front(&v, have);
                break;
            }
            item_free(s, c, item);
            item = next;
        }
        if (item != NO_INDEX)
            tcp_rcv_append(s, c, item, tail, (uint32_t)seq_diff(end, c->rcv_nxt));
    }
    record_end(s, c);
    return any;
}

/* For want of memory: the range furthest ahead, which will be needed last. */
void tcp_ooo_prune(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_ooo *o = ooo_at(s, c->ooo);
    STAT(s, tcp_ooo_pruned);
    range_drop(s, c, o, o->last);
    record_end(s, c);
}

/* Of the next connection that has any, going round; a bounded search. */
bool tcp_ooo_prune_any(struct bypass_stack *s)
{
    const struct pool *p = &core(s)->ooos;
    uint32_t *hand = &tcp_head(s)->ooo_hand;
    for (uint32_t i = 0; p->used > 0 && i < OOO_SEARCH_MAX; i++) {
        *hand = *hand + 1 < p->bump ? *hand + 1 : 0;
        if (ooo_at(s, *hand)->conn != NO_INDEX) {
            tcp_ooo_prune(s, conn_at(s, ooo_at(s, *hand)->conn));
            return true;
        }
    }
    return false;
}

void tcp_ooo_clear(struct bypass_stack *s, struct tcp_conn *c)
{
    if (c->ooo == NO_INDEX)
        return;
    struct tcp_ooo *o = ooo_at(s, c->ooo);
    while (o->first != NO_INDEX)
        range_drop(s, c, o, o->first);
    record_end(s, c);
}
