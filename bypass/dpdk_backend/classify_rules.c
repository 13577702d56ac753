/* SPDX-License-Identifier: Apache-2.0 */
/*
 * classify_rules.c - puts a policy into the area that is not in force, and then in force. How readers take it:
 * classify_mem.h; how they match: classify.c.
 */
#include <errno.h>

#include "classify_mem.h"

static uint32_t words_of(const struct classify_policy *p) { return p->key_v6 ? KEY_WORDS6 : KEY_WORDS4; }

static int policy_check(const struct classifier *c, const struct classify_policy *p)
{
    size_t key_bytes = words_of(p) * sizeof(uint64_t);

    if (p->masks_n > CLASSIFY_MASKS || p->vlan_depth > 2 || p->key_v6 > 1 || p->with_v6 > 1 ||
        (p->keys_n && !p->masks_n)) {
        return -EINVAL;
    }
    if (p->keys_n > c->cfg.keys || p->rules > c->cfg.keys) {
        return -ENOSPC;
    }
    for (uint32_t i = 0; i < p->keys_n; i++) {
        uint32_t mask = p->keys[(i + 1) * key_bytes - 1] & 15u, rule = p->values[i].rule_action >> 2;

        if (mask >= p->masks_n || p->values[i].rank == 0 || p->values[i].rank > p->masks[mask].max_rank ||
            rule >= p->rules) {
            return -EINVAL;
        }
    }
    return 0;
}

/* Two slots a key, so that a search is short. */
static uint32_t slot_bits(const struct classifier *c, uint32_t keys)
{
    uint32_t bits = 4;

    while (bits < c->area_bits && ((uint64_t)1 << bits) < (uint64_t)keys * 2) {
        bits++;
    }
    return bits;
}

static int key_put(const struct classifier *c, uint64_t *slots, uint32_t bits, const uint64_t *key, int words,
                   uint64_t value)
{
    uint64_t mask = ((uint64_t)1 << bits) - 1, at = hash_words(c, key, words);
    int slot_words = words == KEY_WORDS4 ? SLOT_WORDS4 : SLOT_WORDS6;

    for (int i = 0; i < PROBES_MAX; i++, at++) {
        uint64_t *s = slots + (at & mask) * (uint64_t)slot_words;

        if (!s[words]) {
            for (int w = 0; w < words; w++) {
                STORE(&s[w], key[w]);
            }
            STORE(&s[words], value);
            return 0;
        }
        if (memcmp(s, key, (size_t)words * sizeof *s) == 0) {
            return -EINVAL;
        }
    }
    return -ENOSPC;
}

/* Everything but seq. */
static int area_fill(struct classifier *c, uint32_t area, const struct classify_policy *p)
{
    struct area_head *a = &head_of(c)->area[area];
    uint64_t *slots = area_slots(c, area), key[KEY_WORDS6], value;
    int words = (int)words_of(p), err = 0;
    size_t key_bytes = (size_t)words * sizeof *key;

    STORE(&a->slot_bits, slot_bits(c, p->keys_n));
    STORE(&a->key_v6, p->key_v6);
    STORE(&a->with_v6, p->with_v6);
    STORE(&a->vlan_depth, p->vlan_depth);
    STORE(&a->masks_n, p->masks_n);
    STORE(&a->rules, p->rules);
    for (uint32_t i = 0; i < p->masks_n; i++) {
        memcpy(key, p->masks[i].bits, sizeof key);
        for (int w = 0; w < KEY_WORDS6; w++) {
            STORE(&a->mask[i].bits[w], key[w]);
        }
        STORE(&a->mask[i].max_rank, p->masks[i].max_rank);
    }
    memset(slots, 0, (p->key_v6 ? SLOT_WORDS6 : SLOT_WORDS4) * sizeof *slots << a->slot_bits);
    memset(area_counts(c, area), 0, p->rules * sizeof(struct classify_count));
    for (uint32_t i = 0; i < p->keys_n && !err; i++) {
        memcpy(key, p->keys + i * key_bytes, key_bytes);
        value = (uint64_t)p->values[i].rank << 32 | p->values[i].rule_action;
        err = key_put(c, slots, a->slot_bits, key, words, value);
    }
    return err;
}

int classify_rules_set(struct classifier *c, const struct classify_policy *p)
{
    struct classify_head *h = head_of(c);
    int err = policy_check(c, p);
    struct area_head *a;
    uint32_t next;

    if (err) {
        return err;
    }
    err = rules_lock(c);
    if (err) {
        return err;
    }
    next = h->active + 1;
    a = &h->area[next & 1];
    STORE(&a->seq, a->seq | 1); /* A of classify_mem.h. It is odd already where a writer was killed */
    __atomic_thread_fence(__ATOMIC_RELEASE);
    err = area_fill(c, next & 1, p);
    if (!err) {
        STORE_RELEASE(&a->seq, a->seq + 1); /* B */
        STORE_RELEASE(&h->active, next);    /* C */
    }
    rules_unlock(c);
    return err;
}
