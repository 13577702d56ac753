/* SPDX-License-Identifier: Apache-2.0 */
/*
 * classify.c - the decision about a packet, step by step that of bypass/bpf/xdp_steer.c: tests/test_classify_equivalence.py
 * holds the two against each other. Parsing: classify_parse.h; what lies in memory: classify_mem.h.
 */
#include "classify_parse.h"

enum {
    TRIES = 4,        /* the rules are exchanged under us so often before the packet is given up */
    FAR_BITS = 11,    /* slots from which on a table of rules is not in the nearest cache: asked for ahead */
    ACTION_STEER = 0, /* low two bits of rule_action */
    ACTION_DROP = 2,
};

/* What a packet is judged by: the policy in force, as it was when its judgement began. */
struct view {
    const struct area_head *area;
    const uint64_t *slots;
    uint64_t slot_mask;
    uint32_t number, seq;
    struct parse_depth depth;
};

struct best {
    uint32_t rank, rule_action;
};

/* false: it is just being written. */
static inline bool view_take(const struct classifier *c, struct view *v)
{
    const struct classify_head *h = head_of(c);
    uint32_t bits;

    v->number = LOAD_ACQUIRE(&h->active) & 1;
    v->area = &h->area[v->number];
    v->seq = LOAD_ACQUIRE(&v->area->seq);
    v->slots = area_slots(c, v->number);
    bits = LOAD(&v->area->slot_bits);
    v->slot_mask = ((uint64_t)1 << (bits < c->area_bits ? bits : c->area_bits)) - 1;
    v->depth.key_v6 = LOAD(&v->area->key_v6);
    v->depth.with_v6 = LOAD(&v->area->with_v6);
    v->depth.vlan_depth = LOAD(&v->area->vlan_depth);
    return !(v->seq & 1);
}

/* Whether what was read of it was all of one policy. */
static inline bool view_kept(const struct view *v)
{
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return LOAD(&v->area->seq) == v->seq;
}

/* ---- Rules ----------------------------------------------------------------------------------------------------- */

/* A flow as a key of rules that compares everything. Returns its words. */
static inline int flow_key(const struct flow *f, bool key_v6, uint64_t *key)
{
    uint64_t rest = f->local_port | (uint64_t)f->remote_port << 16 | (uint64_t)f->vlan << 32 |
                    (uint64_t)f->proto << 48 | (uint64_t)f->family << (MASK_SHIFT + 4);

    if (!key_v6) {
        key[0] = f->local[3] | (uint64_t)f->remote[3] << 32;
        key[1] = rest;
        return KEY_WORDS4;
    }
    memcpy(key, f->local, 16);
    memcpy(key + 2, f->remote, 16);
    key[4] = rest;
    return KEY_WORDS6;
}

/* The slot where the search for a key begins, under mask number i. */
static inline uint64_t rule_key(const struct classifier *c, const struct area_mask *mask, uint32_t i,
                                const uint64_t *flow, int words, uint64_t *key)
{
    for (int w = 0; w < words; w++) {
        key[w] = flow[w] & LOAD(&mask->bits[w]);
    }
    key[words - 1] |= (uint64_t)i << MASK_SHIFT;
    return hash_words(c, key, words);
}

static inline void match_mask(const struct classifier *c, const struct view *v, uint32_t i, const uint64_t *flow,
                              int words, int slot_words, struct best *best)
{
    uint64_t key[KEY_WORDS6], at = rule_key(c, &v->area->mask[i], i, flow, words, key);

    for (int n = 0; n < PROBES_MAX; n++, at++) {
        const uint64_t *s = v->slots + (at & v->slot_mask) * (uint64_t)slot_words;
        uint64_t value = LOAD(&s[words]);
        bool same = true;

        if (!value) {
            return;
        }
        for (int w = 0; w < words; w++) {
            same &= LOAD(&s[w]) == key[w];
        }
        if (same) {
            if (value >> 32 > best->rank) {
                *best = (struct best){.rank = (uint32_t)(value >> 32), .rule_action = (uint32_t)value};
            }
            return;
        }
    }
}

/* The rule of the highest rank that matches, or rank 0. A mask is not tried when what was found outranks all of it. */
static inline struct best match_rules(const struct classifier *c, const struct view *v, const struct flow *f)
{
    uint32_t masks = LOAD(&v->area->masks_n);
    struct best best = {0, 0};
    uint64_t flow[KEY_WORDS6];
    int words = flow_key(f, v->depth.key_v6, flow);

    for (uint32_t i = 0; i < masks && i < CLASSIFY_MASKS && best.rank < LOAD(&v->area->mask[i].max_rank); i++) {
        if (words == KEY_WORDS4) {
            match_mask(c, v, i, flow, KEY_WORDS4, SLOT_WORDS4, &best);
        } else {
            match_mask(c, v, i, flow, KEY_WORDS6, SLOT_WORDS6, &best);
        }
    }
    return best;
}

/* ---- Live entries ---------------------------------------------------------------------------------------------- */

static inline void endpoint_words(uint64_t key[2], uint32_t local, uint32_t remote, uint16_t local_port,
                                  uint16_t remote_port, uint8_t proto, int kind)
{
    key[0] = local | (uint64_t)remote << 32; /* struct classify_key */
    key[1] = local_port | (uint64_t)remote_port << 16 | (uint64_t)proto << 32 | (uint64_t)kind << 40;
}

/* The connected one, then the block that its local port is in, then the one bound to the address, then the one bound to
 * any. */
static inline bool endpoint_find(const struct classifier *c, const struct flow *f, uint64_t *value)
{
    uint32_t kinds = LOAD_ACQUIRE(&head_of(c)->kinds), local = f->local[3];
    uint64_t key[2];

    if (kinds & FIND_EXACT) {
        endpoint_words(key, local, f->remote[3], f->local_port, f->remote_port, f->proto, CLASSIFY_SOCKET);
        if (table_find(c, &c->endpoints, key, value)) {
            return true;
        }
    }
    if (kinds & FIND_BLOCK) {
        endpoint_words(key, local, 0, f->local_port & 0xff, 0, f->proto, CLASSIFY_BLOCK); /* network order */
        if (table_find(c, &c->endpoints, key, value)) {
            return true;
        }
    }
    if (kinds & FIND_LOCAL) {
        endpoint_words(key, local, 0, f->local_port, 0, f->proto, CLASSIFY_SOCKET);
        if (table_find(c, &c->endpoints, key, value)) {
            return true;
        }
    }
    endpoint_words(key, 0, 0, f->local_port, 0, f->proto, CLASSIFY_SOCKET);
    return (kinds & FIND_ANY) && table_find(c, &c->endpoints, key, value);
}

/* Does the kernel hold a TCP connection of this flow? TIME_WAIT is none to a new SYN (steer.h). */
static inline bool kernel_holds(const struct classifier *c, const struct flow *f, bool syn)
{
    uint64_t key[2], flags;

    endpoint_words(key, f->local[3], f->remote[3], f->local_port, f->remote_port, PROTO_TCP, CLASSIFY_SOCKET);
    return table_find(c, &c->held, key, &flags) && !((flags & CLASSIFY_TIME_WAIT) && syn);
}

static inline bool served(const struct classifier *c, uint32_t owner, uint32_t queue)
{
    return queue < CLASSIFY_QUEUES && owner < CLASSIFY_OWNERS &&
           !(LOAD(&head_of(c)->unserved[owner][queue / 64]) >> queue % 64 & 1);
}

/* ---- The decision ---------------------------------------------------------------------------------------------- */

/* The same flow, the same value; not keyed, so only good for spreading trusted work. As xdp_steer.c computes it. */
static inline uint32_t flow_hash(const struct flow *f)
{
    uint32_t h = f->local[3] * 0x9e3779b1u + f->remote[3];

    h = (h ^ h >> 15) * 0x85ebca6bu + ((uint32_t)f->local_port << 16 | f->remote_port);
    h = (h ^ h >> 13) * 0xc2b2ae35u + f->proto;
    return h ^ h >> 16;
}

/* The last step: a packet of a live entry goes to its owner. */
static inline int deliver(struct classifier *c, const struct packet *p, const struct classify_endpoint *e,
                          uint32_t queue, struct classify_result *out)
{
    if (!served(c, e->owner, queue)) {
        return p->flow.proto == PROTO_TCP && !p->icmp ? REASON_TCP_NO_SOCKET : REASON_NO_SOCKET;
    }
    if (e->entry < c->cfg.endpoints) {
        count_add((struct classify_count *)(c->mem + c->entry_counts) + e->entry, p->len);
    }
    out->entry = e->entry;
    out->owner = e->owner;
    out->hash = flow_hash(&p->flow);
    return p->icmp ? REASON_STEERED_ICMP : REASON_STEERED;
}

static inline int steer(struct classifier *c, const struct packet *p, uint32_t queue, struct classify_result *out)
{
    uint8_t proto = p->flow.proto;
    struct classify_endpoint e;
    uint64_t value;

    if (p->flow.family != 4 || (proto != PROTO_TCP && proto != PROTO_UDP)) {
        return REASON_NO_ENDPOINT;
    }
    if (p->tagged) {
        return REASON_VLAN;
    }
    if (p->group && (p->icmp || proto == PROTO_TCP)) { /* RFC 1122 3.2.1.3 */
        return REASON_GROUP;
    }
    if (!endpoint_find(c, &p->flow, &value)) {
        return REASON_NO_ENDPOINT;
    }
    e = endpoint_of(value);
    if (e.flags && proto == PROTO_TCP) {
        if (e.flags & CLASSIFY_UNSETTLED) {
            return p->syn ? REASON_UNSETTLED : REASON_DRAINING;
        }
        if (kernel_holds(c, &p->flow, p->syn)) {
            return REASON_DRAINING;
        }
    }
    if (p->part == FIRST_FRAGMENT) {
        return proto == PROTO_TCP ? REASON_TCP_FRAGMENT : REASON_FRAGMENT;
    }
    return deliver(c, p, &e, queue, out);
}

/* What the winning rule says; rank 0: there is none. */
static inline int apply(struct classifier *c, const struct view *v, const struct packet *p, const struct best *best,
                        uint32_t queue, struct classify_result *out)
{
    uint32_t rule = best->rule_action >> 2, action = best->rule_action & 3;

    if (p->part >= LATER_FRAGMENT && (!best->rank || action != ACTION_DROP)) {
        return p->part == CUT_SHORT ? REASON_TOO_DEEP : REASON_FRAGMENT;
    }
    if (!best->rank) {
        return REASON_NO_RULE;
    }
    out->rule = rule;
    if (rule < c->cfg.keys) {
        count_add(&area_counts(c, v->number)[rule], p->len);
    }
    if (action == ACTION_STEER) {
        return steer(c, p, queue, out);
    }
    return action == ACTION_DROP ? REASON_RULE_DROP : REASON_RULE_PASS;
}

static inline void packet_begin(struct packet *p, const uint8_t *frame, uint32_t len)
{
    memset(p, 0, sizeof *p); /* in place: a copy would read back what was just written, in other pieces */
    p->data = frame;
    p->len = len;
}

/* From a packet that was parsed, or has its reason; -1: the rules were exchanged meanwhile. */
static inline int judge(struct classifier *c, const struct view *v, struct packet *p, int reason, uint32_t queue,
                        struct classify_result *out)
{
    struct flow quoted = {.vlan = 0};
    struct best best = {0, 0};

    if (reason != GO_ON) {
        return view_kept(v) ? reason : -1;
    }
    if (p->flow.proto == PROTO_ICMP && parse_quote(p, &quoted)) {
        best = match_rules(c, v, &quoted);
    }
    if (best.rank) {
        p->flow = quoted;
        p->icmp = 1;
    } else {
        best = match_rules(c, v, &p->flow);
    }
    return view_kept(v) ? apply(c, v, p, &best, queue, out) : -1;
}

#define VERDICT_PASS CLASSIFY_PASS
#define VERDICT_DROP CLASSIFY_DROP
#define VERDICT_REDIRECT CLASSIFY_STEER
#define VERDICT_OF(name, verdict, text) [REASON_##name] = VERDICT_##verdict,

static inline int conclude(struct classifier *c, int reason, uint32_t len, struct classify_result *out)
{
    static const uint8_t verdicts[] = {STEER_REASONS(VERDICT_OF) CLASSIFY_REASONS(VERDICT_OF)};

    out->reason = (uint8_t)reason;
    out->verdict = verdicts[reason];
    count_add(&head_of(c)->reasons[reason], len);
    return out->verdict;
}

static inline void result_clear(struct classify_result *out)
{
    *out = (struct classify_result){.entry = CLASSIFY_NONE, .rule = CLASSIFY_NONE};
}

int classify(struct classifier *c, const uint8_t *frame, uint32_t len, uint32_t queue, struct classify_result *out)
{
    int reason = -1;

    for (int i = 0; i < TRIES && reason < 0; i++) {
        struct packet p;
        struct view v;

        packet_begin(&p, frame, len);
        result_clear(out);
        if (view_take(c, &v)) {
            reason = judge(c, &v, &p, parse_packet(c, &p, &v.depth), queue, out);
        }
    }
    return conclude(c, reason < 0 ? REASON_BUSY : reason, len, out);
}

/* ---- Bursts ---------------------------------------------------------------------------------------------------- */

/* Where the search under the first mask begins: on its way to the cache while the other frames are parsed. */
static inline void fetch_rule(const struct classifier *c, const struct view *v, const struct flow *f)
{
    uint64_t flow[KEY_WORDS6], key[KEY_WORDS6], at;
    int words = flow_key(f, v->depth.key_v6, flow);

    if (words == KEY_WORDS4) {
        at = rule_key(c, &v->area->mask[0], 0, flow, KEY_WORDS4, key);
        __builtin_prefetch(v->slots + (at & v->slot_mask) * SLOT_WORDS4);
    } else {
        at = rule_key(c, &v->area->mask[0], 0, flow, KEY_WORDS6, key);
        __builtin_prefetch(v->slots + (at & v->slot_mask) * SLOT_WORDS6);
    }
}

static void burst(struct classifier *c, const struct classify_frame *in, uint32_t n, struct classify_result *out)
{
    struct packet p[CLASSIFY_BURST];
    int reason[CLASSIFY_BURST];
    struct view v;

    if (!view_take(c, &v) || v.slot_mask >> FAR_BITS == 0) {
        for (uint32_t i = 0; i < n; i++) {
            classify(c, in[i].data, in[i].len, in[i].queue, &out[i]);
        }
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        packet_begin(&p[i], in[i].data, in[i].len);
        reason[i] = parse_packet(c, &p[i], &v.depth);
        if (reason[i] == GO_ON) {
            fetch_rule(c, &v, &p[i].flow);
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        result_clear(&out[i]);
        reason[i] = judge(c, &v, &p[i], reason[i], in[i].queue, &out[i]);
        if (reason[i] >= 0) {
            conclude(c, reason[i], in[i].len, &out[i]);
        } else {
            classify(c, in[i].data, in[i].len, in[i].queue, &out[i]);
        }
    }
}

void classify_burst(struct classifier *c, const struct classify_frame *in, uint32_t n, struct classify_result *out)
{
    for (uint32_t i = 0; i < n; i += CLASSIFY_BURST) {
        burst(c, in + i, n - i < CLASSIFY_BURST ? n - i : CLASSIFY_BURST, out + i);
    }
}
