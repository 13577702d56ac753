/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dst.c - the cache of destinations: where frames for an address go, how large they may be, and the few packets that
 * wait for the answer. One entry a destination; those behind the gateway follow the gateway's entry (dst.via).
 *
 *   new --> PENDING --answer--> OK --unused for long--> evicted
 *             | 3 questions         | 30 s of age and used: asked by unicast (RFC 4861 7.3's idea, for ARP)
 *             v                     v 3 unanswered: PENDING
 *           FAILED --2 s--> PENDING at the next use
 *
 * With BYPASS_F_ARP the questions are ARP requests (arp.c); without, the embedder takes them by
 * bypass_nexthop_wanted() and answers by bypass_nexthop_set(), from the kernel's tables.
 */
#include <errno.h>

#include "net.h"

enum { ASK_TRIES = 3, EVICT_LOOK = 16 };
#define ASK_INTERVAL_NS SEC_NS
#define FRESH_NS (30 * SEC_NS)    /* a neighbour is believed for so long without asking */
#define FAILED_NS (2 * SEC_NS)    /* then the next use may try again */
#define SETTLED_NS SEC_NS         /* so long an answer stands before an announcement may change it */
#define VIA_CHECK_NS (5 * SEC_NS) /* so often an entry behind the gateway looks whether the gateway's is stale */
#define PMTU_NS (600 * SEC_NS)    /* RFC 1191 6.3 */

void dst_layout(struct layout *l, struct core *c)
{
    uint32_t buckets = 16;
    while (buckets < c->cfg.max_dsts) {
        buckets *= 2;
    }
    layout_pool(l, &c->dsts, sizeof(struct dst), c->cfg.max_dsts);
    c->dst_state[0] = layout_bytes(l, sizeof(struct net));
    c->dst_state[1] = layout_bytes(l, buckets * sizeof(uint32_t));
    c->dst_state[2] = buckets - 1;
}

static inline bool by_arp(const struct bypass_stack *s) { return (core(s)->cfg.flags & BYPASS_F_ARP) != 0; }

static inline struct dst *dst_at(const struct bypass_stack *s, uint32_t i) { return pool_at(s, &core(s)->dsts, i); }

static inline uint32_t dst_index(const struct bypass_stack *s, const struct dst *d)
{
    return (uint32_t)(d - dst_at(s, 0));
}

/* ---- Table ------------------------------------------------------------------------------------- */

static uint32_t *bucket(const struct bypass_stack *s, const addr_t *addr) /* links: index plus one */
{
    const struct core *c = core(s);
    uint32_t *table = at(s, c->dst_state[1]);
    return &table[siphash13(c->hash_key, addr, sizeof *addr) & c->dst_state[2]];
}

struct dst *dst_find(const struct bypass_stack *s, const addr_t *addr)
{
    for (uint32_t link = *bucket(s, addr); link != 0;) {
        struct dst *d = dst_at(s, link - 1);
        if (addr_eq(&d->addr, addr)) {
            return d;
        }
        link = d->hash_next;
    }
    return NULL;
}

static void unhash(struct bypass_stack *s, struct dst *d)
{
    uint32_t *link = bucket(s, &d->addr), mine = dst_index(s, d) + 1;
    while (*link != mine) {
        link = &dst_at(s, *link - 1)->hash_next;
    }
    *link = d->hash_next;
}

/* ---- Lists of questions ------------------------------------------------------------------------- */

static void ask_unlink(struct bypass_stack *s, struct dst *d)
{
    struct net *n = net(s);
    if (d->ask_list == ASK_NONE) {
        return;
    }
    if (d->ask_prev != 0) {
        dst_at(s, d->ask_prev - 1)->ask_next = d->ask_next;
    } else {
        n->ask[d->ask_list].head = d->ask_next;
    }
    if (d->ask_next != 0) {
        dst_at(s, d->ask_next - 1)->ask_prev = d->ask_prev;
    } else {
        n->ask[d->ask_list].tail = d->ask_prev;
    }
    d->ask_list = ASK_NONE;
}

/* At the end: every question waits equally long, so the list is in order of time. */
static void ask_append(struct bypass_stack *s, struct dst *d, int list)
{
    struct net *n = net(s);
    uint32_t link = dst_index(s, d) + 1;
    ask_unlink(s, d);
    d->ask_list = (uint8_t)list;
    d->ask_prev = n->ask[list].tail;
    d->ask_next = 0;
    if (d->ask_prev != 0) {
        dst_at(s, d->ask_prev - 1)->ask_next = link;
    } else {
        n->ask[list].head = link;
    }
    n->ask[list].tail = link;
}

static void ask(struct bypass_stack *s, struct dst *d)
{
    d->tries++;
    d->due_ns = now_ns(s) + ASK_INTERVAL_NS;
    ask_append(s, d, by_arp(s) ? ASK_SENT : ASK_NEW);
    if (by_arp(s)) {
        arp_ask(s, &d->addr, d->state == DST_OK ? d->mac : NULL);
    }
}

/* ---- Waiting packets ---------------------------------------------------------------------------- */

static bypass_pkt wait_pop(struct bypass_stack *s, struct dst *d)
{
    bypass_pkt p = d->wait_head;
    d->wait_head = pkt_meta(s, p)->next;
    net(s)->waiting_frames--;
    return p;
}

/* RFC 1122 2.3.2.2: the latest packets are kept. */
static void wait_drop_oldest(struct bypass_stack *s, struct dst *d)
{
    for (uint32_t frames = pkt_meta(s, d->wait_head)->seg_count; frames > 0; frames--) {
        pkt_free(s, wait_pop(s, d));
    }
    d->waiting--;
    STAT(s, dst_wait_dropped);
}

static void wait_drop_all(struct bypass_stack *s, struct dst *d)
{
    while (d->waiting > 0) {
        wait_drop_oldest(s, d);
    }
}

void dst_wait(struct bypass_stack *s, struct dst *d, bypass_pkt head, uint32_t frames)
{
    struct net *n = net(s);
    uint32_t limit = max_u32(s->dev->frames / 8, 2); /* of the pool, on all destinations together */
    while (d->waiting > 0 && (d->waiting >= WAIT_MAX || n->waiting_frames + frames > limit ||
                              (d->waiting >= WAIT_FEW && n->waiting_frames + frames > limit / 2))) {
        wait_drop_oldest(s, d);
    }
    if (n->waiting_frames + frames > limit) {
        pkt_free_list(s, head);
        STAT(s, dst_wait_dropped);
        return;
    }
    pkt_meta(s, head)->seg_count = (uint16_t)frames;
    if (d->waiting == 0) {
        d->wait_head = head;
    } else {
        pkt_meta(s, d->wait_tail)->next = head;
    }
    while (pkt_meta(s, head)->next != BYPASS_PKT_NONE) {
        head = pkt_meta(s, head)->next;
    }
    d->wait_tail = head;
    d->waiting++;
    n->waiting_frames += frames;
}

static void wait_send(struct bypass_stack *s, struct dst *d)
{
    while (d->waiting > 0) {
        for (uint32_t frames = pkt_meta(s, d->wait_head)->seg_count; frames > 0; frames--) {
            bypass_pkt p = wait_pop(s, d);
            if (pkt_meta(s, p)->len > d->mtu) { /* made before the path was known */
                STAT(s, ip_out_too_big);
                pkt_free(s, p);
            } else {
                eth_out(s, p, d);
            }
        }
        d->waiting--;
    }
}

/* ---- States ------------------------------------------------------------------------------------- */

static void enter(struct bypass_stack *s, struct dst *d, int state, const uint8_t *mac)
{
    d->state = (uint8_t)state;
    d->check_ns = NO_DEADLINE;
    if (state == DST_OK) {
        memcpy(d->mac, mac, 6);
        d->check_ns = !by_arp(s) ? NO_DEADLINE : now_ns(s) + (d->via != NO_INDEX ? VIA_CHECK_NS : FRESH_NS);
        d->check_ns = min_u64(d->check_ns, d->pmtu_until_ns);
        wait_send(s, d);
    } else if (state == DST_FAILED) {
        d->check_ns = now_ns(s) + FAILED_NS;
        STAT(s, dst_failed);
        wait_drop_all(s, d);
    }
}

/* The gateway's entry takes those behind it along. */
static void enter_all(struct bypass_stack *s, struct dst *d, int state, const uint8_t *mac)
{
    bool news = d->state != state || (state == DST_OK && memcmp(d->mac, mac, 6) != 0);
    enter(s, d, state, mac);
    if (!news) {
        return;
    }
    if (core(s)->has_gateway && addr_eq(&d->addr, &core(s)->gateway)) {
        uint32_t via = dst_index(s, d);
        for (uint32_t i = 0; i < core(s)->dsts.bump; i++) {
            struct dst *e = dst_at(s, i);
            if (e->in_use && e->via == via) {
                enter(s, e, state, mac);
            }
        }
    }
    if (state != DST_PENDING) {
        tcp_dst_changed(s);
    }
}

void dst_answer(struct bypass_stack *s, struct dst *d, const uint8_t *mac)
{
    if (d->fixed || d->via != NO_INDEX || addr_kind(s, addr_v4(&d->addr)) != ADDR_UNICAST) {
        return;
    }
    if (d->state == DST_OK && d->ask_list == ASK_NONE && now_ns(s) < d->due_ns && memcmp(d->mac, mac, 6) != 0) {
        return; /* nobody asked, and it has just moved: two who fight over an address do not keep us busy */
    }
    ask_unlink(s, d);
    d->tries = 0;
    d->due_ns = now_ns(s) + SETTLED_NS;
    enter_all(s, d, DST_OK, mac);
}

static void dst_unanswered(struct bypass_stack *s, struct dst *d)
{
    if (d->tries < ASK_TRIES) {
        ask(s, d);
    } else if (d->state == DST_OK) { /* the unicast questions; now everybody is asked */
        enter_all(s, d, DST_PENDING, NULL);
        d->tries = 0;
        ask(s, d);
    } else {
        ask_unlink(s, d);
        enter_all(s, d, DST_FAILED, NULL);
    }
}

/* A use of an entry that has reached check_ns. */
static void dst_check(struct bypass_stack *s, struct dst *d)
{
    if (now_ns(s) >= d->pmtu_until_ns) {
        d->pmtu_until_ns = NO_DEADLINE;
        d->mtu = d->link_mtu;
    }
    d->check_ns = d->pmtu_until_ns;
    if (d->via != NO_INDEX) { /* evicting keeps clear of the gateway: the entry is there */
        struct dst *gateway = dst_at(s, d->via);
        gateway->used_ns = now_ns(s);
        if (now_ns(s) >= gateway->check_ns) {
            dst_check(s, gateway);
        }
        enter(s, d, gateway->state, gateway->mac);
    } else if (d->state == DST_FAILED || (d->state == DST_OK && by_arp(s) && !d->fixed && d->ask_list == ASK_NONE)) {
        if (d->state == DST_FAILED) {
            enter_all(s, d, DST_PENDING, NULL);
            d->fixed = 0;
        }
        d->tries = 0;
        ask(s, d);
    }
}

/* ---- Entries ------------------------------------------------------------------------------------ */

static void dst_drop(struct bypass_stack *s, struct dst *d)
{
    ask_unlink(s, d);
    wait_drop_all(s, d);
    unhash(s, d);
    d->in_use = 0;
    d->gen++;
    pool_free(s, &core(s)->dsts, dst_index(s, d));
}

/* The longest unused of the next few: exact order would cost a list operation a packet. */
static bool dst_evict(struct bypass_stack *s)
{
    const struct core *c = core(s);
    struct net *n = net(s);
    struct dst *oldest = NULL;
    for (int i = 0; i < EVICT_LOOK; i++) {
        struct dst *d = dst_at(s, n->clock_hand);
        n->clock_hand = (n->clock_hand + 1) % c->dsts.cap;
        bool is_gateway = c->has_gateway && addr_eq(&d->addr, &c->gateway);
        if (d->in_use && !is_gateway && (oldest == NULL || d->used_ns < oldest->used_ns)) {
            oldest = d;
        }
    }
    if (oldest == NULL) {
        STAT(s, dst_table_full);
        return false;
    }
    STAT(s, dst_evicted);
    dst_drop(s, oldest);
    return true;
}

static struct dst *dst_new(struct bypass_stack *s, const addr_t *addr)
{
    struct pool *pool = &core(s)->dsts;
    if (pool->used == pool->cap && !dst_evict(s)) {
        return NULL;
    }
    uint32_t i = pool_alloc(s, pool);
    struct dst *d = dst_at(s, i);
    *d = (struct dst){
        .addr = *addr,
        .gen = d->gen + 1,
        .in_use = 1,
        .mtu = s->dev->mtu,
        .link_mtu = s->dev->mtu,
        .via = NO_INDEX,
        .state = DST_PENDING,
        .check_ns = NO_DEADLINE,
        .pmtu_until_ns = NO_DEADLINE,
        .used_ns = now_ns(s),
    };
    d->gen += d->gen == 0; /* a zero reference is none */
    d->hash_next = *bucket(s, addr);
    *bucket(s, addr) = i + 1;
    STAT(s, dst_miss);
    return d;
}

/* Where to go is known without asking, or nowhere. */
static bool dst_settle(struct bypass_stack *s, struct dst *d)
{
    const uint8_t *a = addr_v4(&d->addr);
    uint8_t mac[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    switch (addr_is_v4(&d->addr) ? addr_kind(s, a) : ADDR_INVALID) {
    case ADDR_MULTICAST: /* RFC 1112 6.4 */
        memcpy(mac, (uint8_t[6]){1, 0, 0x5e, a[1] & 0x7f, a[2], a[3]}, 6);
        /* fall through */
    case ADDR_BROADCAST:
        enter(s, d, DST_OK, mac);
        break;
    case ADDR_UNICAST:
        return false;
    case ADDR_LOCAL:
        enter(s, d, loops(s) ? DST_OK : DST_FAILED, loops(s) ? s->dev->mac : NULL);
        break;
    default:
        enter(s, d, DST_FAILED, NULL);
    }
    d->check_ns = NO_DEADLINE;
    return true;
}

static struct dst *dst_make(struct bypass_stack *s, const addr_t *addr)
{
    const struct core *c = core(s);
    bool direct = !by_arp(s) || !addr_is_v4(addr) || addr_on_link(s, addr_v4(addr)) ||
                  addr_kind(s, addr_v4(addr)) != ADDR_UNICAST;
    struct dst *gateway = NULL;
    if (!direct && c->has_gateway && addr_on_link(s, addr_v4(&c->gateway))) {
        gateway = dst_get(s, NULL, &c->gateway);
    }
    struct dst *d = dst_new(s, addr);
    if (d == NULL || dst_settle(s, d)) {
        return d;
    }
    if (gateway != NULL) {
        d->via = dst_index(s, gateway);
        enter(s, d, gateway->state, gateway->mac);
    } else if (direct) {
        ask(s, d);
    } else {
        enter(s, d, DST_FAILED, NULL);
        d->check_ns = NO_DEADLINE; /* until an address or a gateway is set, which purges */
    }
    return d;
}

static __attribute__((noinline)) struct dst *dst_get_slow(struct bypass_stack *s, struct dst_ref *ref,
                                                          const addr_t *addr)
{
    struct dst *d = dst_find(s, addr);
    if (d == NULL && (d = dst_make(s, addr)) == NULL) {
        return NULL;
    }
    if (ref != NULL) {
        *ref = (struct dst_ref){.idx = dst_index(s, d), .gen = d->gen};
    }
    d->used_ns = now_ns(s);
    if (now_ns(s) >= d->check_ns) {
        dst_check(s, d);
    }
    return d;
}

struct dst *dst_hit(const struct bypass_stack *s, const struct dst_ref *ref, const addr_t *addr)
{
    if (unlikely(ref == NULL || ref->gen == 0)) {
        return NULL;
    }
    struct dst *d = dst_at(s, ref->idx);
    if (unlikely(d->gen != ref->gen || now_ns(s) >= d->check_ns || !addr_eq(&d->addr, addr))) {
        return NULL;
    }
    d->used_ns = now_ns(s);
    return d;
}

struct dst *dst_get(struct bypass_stack *s, struct dst_ref *ref, const addr_t *addr)
{
    struct dst *d = dst_hit(s, ref, addr);
    return likely(d != NULL) ? d : dst_get_slow(s, ref, addr);
}

void dst_lower_mtu(struct bypass_stack *s, struct dst *d, uint16_t mtu)
{
    if (mtu >= IP4_MIN_MTU && mtu < d->mtu && addr_kind(s, addr_v4(&d->addr)) == ADDR_UNICAST) {
        d->mtu = mtu;
        d->pmtu_until_ns = now_ns(s) + PMTU_NS;
        d->check_ns = min_u64(d->check_ns, d->pmtu_until_ns);
    }
}

static void dst_drop_all(struct bypass_stack *s)
{
    for (uint32_t i = 0; i < core(s)->dsts.bump; i++) {
        if (dst_at(s, i)->in_use) {
            dst_drop(s, dst_at(s, i));
        }
    }
}

void dst_purge(struct bypass_stack *s)
{
    dst_drop_all(s);
    tcp_dst_changed(s); /* connections that waited for an answer ask anew */
}

/* ---- The embedder's answers ---------------------------------------------------------------------- */

int bypass_nexthop_wanted(struct bypass_stack *s, struct bypass_addr *out, int max)
{
    struct net *n = net(s);
    int count = 0;
    if (by_arp(s)) {
        return 0;
    }
    while (count < max && n->ask[ASK_NEW].head != 0) {
        struct dst *d = dst_at(s, n->ask[ASK_NEW].head - 1);
        d->due_ns = now_ns(s) + ASK_INTERVAL_NS;
        ask_append(s, d, ASK_SENT);
        out[count++] = d->addr;
    }
    return count;
}

int bypass_nexthop_set(struct bypass_stack *s, const struct bypass_addr *dst, const uint8_t *mac, uint16_t mtu)
{
    struct dst *d = dst_find(s, dst);
    if (d == NULL && (d = dst_new(s, dst)) == NULL) {
        return -ENOSPC;
    }
    if (dst_settle(s, d)) {
        return 0;
    }
    d->link_mtu = mtu >= IP4_MIN_MTU && mtu < s->dev->mtu ? mtu : s->dev->mtu;
    if (d->pmtu_until_ns == NO_DEADLINE || d->mtu > d->link_mtu) {
        d->mtu = d->link_mtu;
        d->pmtu_until_ns = NO_DEADLINE;
    }
    ask_unlink(s, d);
    d->tries = 0;
    d->via = NO_INDEX;
    d->fixed = 1;
    enter_all(s, d, mac != NULL ? DST_OK : DST_FAILED, mac);
    if (mac != NULL) {
        d->check_ns = d->pmtu_until_ns; /* believed until told otherwise */
    }
    return 0;
}

void bypass_nexthop_forget(struct bypass_stack *s, const struct bypass_addr *dst)
{
    bool gateway = dst != NULL && core(s)->has_gateway && addr_eq(dst, &core(s)->gateway);
    for (uint32_t i = 0; i < core(s)->dsts.bump; i++) {
        struct dst *d = dst_at(s, i);
        bool behind = gateway && d->via != NO_INDEX; /* shares the gateway's fate */
        if (!d->in_use || (dst != NULL && !behind && !addr_eq(&d->addr, dst))) {
            continue;
        }
        if (d->state != DST_PENDING) {
            dst_drop(s, d);
        } else if (d->ask_list != ASK_NONE) { /* somebody waits: ask again, now */
            d->tries = 0;
            ask(s, d);
        }
    }
}

/* ---- Time, end ------------------------------------------------------------------------------------ */

void dst_timers(struct bypass_stack *s)
{
    struct net *n = net(s);
    while (n->ask[ASK_SENT].head != 0) {
        struct dst *d = dst_at(s, n->ask[ASK_SENT].head - 1);
        if (d->due_ns > now_ns(s)) {
            return;
        }
        dst_unanswered(s, d);
    }
}

uint64_t dst_deadline(const struct bypass_stack *s)
{
    uint32_t link = net(s)->ask[ASK_SENT].head;
    return link != 0 ? dst_at(s, link - 1)->due_ns : NO_DEADLINE;
}

void net_timers_run(struct bypass_stack *s)
{
    dst_timers(s);
    reass_timers(s);
    udp_timers(s);
}

uint64_t net_deadline(const struct bypass_stack *s)
{
    return min_u64(dst_deadline(s), min_u64(reass_deadline(s), udp_deadline(s)));
}

void net_destroy(struct bypass_stack *s)
{
    dst_drop_all(s);
    reass_destroy(s);
}

void net_audit(const struct bypass_stack *s, struct bypass_audit *a)
{
    a->frags = core(s)->frags.used;
    a->dst_waiting = net(s)->waiting_frames;
}
