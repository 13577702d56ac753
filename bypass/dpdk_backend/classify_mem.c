/* SPDX-License-Identifier: Apache-2.0 */
/*
 * classify_mem.c - a classifier's range: where what lies, locks of the writers, counters. Nothing here looks at packets.
 */
#define _POSIX_C_SOURCE 200809L /* robust mutexes */
#include <errno.h>

#include "classify_mem.h"

enum { KEYS_MAX = 1 << 22, TABLE_MAX = 1 << 20, ALIGN = 4096 };

static uint64_t align_up(uint64_t n) { return (n + ALIGN - 1) & ~(uint64_t)(ALIGN - 1); }

/* The power of two that is at least n. */
static uint32_t bits_for(uint64_t n)
{
    uint32_t bits = 0;

    while (((uint64_t)1 << bits) < n) {
        bits++;
    }
    return bits;
}

static bool sensible(const struct classify_config *cfg)
{
    return cfg->abi == CLASSIFY_ABI && cfg->keys >= 1 && cfg->keys <= KEYS_MAX && cfg->endpoints >= 1 &&
           cfg->endpoints <= TABLE_MAX && cfg->held >= 1 && cfg->held <= TABLE_MAX && cfg->members >= 1 &&
           cfg->members <= TABLE_MAX && cfg->reserved == 0;
}

static struct classify_table table_at(uint64_t *at, uint32_t room)
{
    struct classify_table t = {.slots = *at, .bits = bits_for((uint64_t)room * 4)};

    *at = align_up(*at + (sizeof(struct table_slot) << t.bits));
    return t;
}

/* The view of a range with this configuration; c->size is what it takes. */
static void lay_out(struct classifier *c, const struct classify_config *cfg)
{
    uint64_t at = align_up(sizeof(struct classify_head));

    *c = (struct classifier){.cfg = *cfg, .area_bits = bits_for((uint64_t)cfg->keys * 2 < 16 ? 16 : cfg->keys * 2)};
    for (uint64_t i = 0; i < 2; i++) { /* of a seed without a pattern, or with one, numbers without */
        uint64_t s = cfg->seed + i * 0x9e3779b97f4a7c15ull;

        c->seed[i] = hash_mix(s ^ 0xa0761d6478bd642full, 0xe7037ed1a0b428dbull) ^ hash_mix(s, 0x8ebc6af09c88c6e3ull);
    }
    for (int i = 0; i < 2; i++) {
        c->area[i].slots = at;
        at += (uint64_t)SLOT_WORDS6 * sizeof(uint64_t) << c->area_bits;
        c->area[i].counts = at;
        at = align_up(at + cfg->keys * sizeof(struct classify_count));
    }
    c->endpoints = table_at(&at, cfg->endpoints);
    c->held = table_at(&at, cfg->held);
    for (int i = 0; i < CLASSIFY_SETS; i++) {
        c->set[i] = table_at(&at, cfg->members);
    }
    c->entry_counts = at;
    c->size = align_up(at + cfg->endpoints * sizeof(struct classify_count));
}

size_t classify_mem_size(const struct classify_config *cfg)
{
    struct classifier c;

    if (!sensible(cfg)) {
        return 0;
    }
    lay_out(&c, cfg);
    return c.size;
}

static int lock_init(pthread_mutex_t *lock)
{
    pthread_mutexattr_t attr;
    int err = pthread_mutexattr_init(&attr);

    if (err) {
        return -err;
    }
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    err = pthread_mutex_init(lock, &attr);
    pthread_mutexattr_destroy(&attr);
    return -err;
}

int classify_init(struct classifier *c, void *mem, size_t size, const struct classify_config *cfg)
{
    struct classify_head *h = mem;
    size_t needed = classify_mem_size(cfg);
    int err;

    if (!needed || size < needed || (uintptr_t)mem % 64) {
        return -EINVAL;
    }
    lay_out(c, cfg);
    c->mem = mem;
    h->cfg = *cfg;
    h->size = c->size;
    err = lock_init(&h->rules_lock);
    err = err ? err : lock_init(&h->lock);
    if (!err) {
        STORE_RELEASE(&h->magic, CLASSIFY_MAGIC);
    }
    return err;
}

int classify_attach(struct classifier *c, void *mem, size_t size)
{
    const struct classify_head *h = mem;
    struct classify_config cfg;

    if (size < sizeof *h || (uintptr_t)mem % 64 || LOAD_ACQUIRE(&h->magic) != CLASSIFY_MAGIC) {
        return -EINVAL;
    }
    cfg = h->cfg; /* read once: the view is made of this copy alone */
    if (!sensible(&cfg)) {
        return -EINVAL;
    }
    lay_out(c, &cfg);
    c->mem = mem;
    return c->size > size || h->size != c->size ? -EINVAL : 0;
}

/* ---- Locks --------------------------------------------------------------------------------------------------- */

int writer_lock(struct classifier *c, bool wait)
{
    pthread_mutex_t *lock = &head_of(c)->lock;
    int err = wait ? pthread_mutex_lock(lock) : pthread_mutex_trylock(lock);

    if (err == EOWNERDEAD) {
        tables_repair(c);
        err = pthread_mutex_consistent(lock);
    }
    return -err;
}

void writer_unlock(struct classifier *c) { pthread_mutex_unlock(&head_of(c)->lock); }

int rules_lock(struct classifier *c)
{
    pthread_mutex_t *lock = &head_of(c)->rules_lock;
    int err = pthread_mutex_lock(lock);

    if (err == EOWNERDEAD) { /* a half written policy is in the area that is not in force: it is written over */
        err = pthread_mutex_consistent(lock);
    }
    return -err;
}

void rules_unlock(struct classifier *c) { pthread_mutex_unlock(&head_of(c)->rules_lock); }

/* ---- Counters ------------------------------------------------------------------------------------------------ */

static struct classify_count count_of(const struct classify_count *n)
{
    return (struct classify_count){.packets = LOAD(&n->packets), .bytes = LOAD(&n->bytes)};
}

int classify_reason_count(const struct classifier *c, uint32_t reason, struct classify_count *out)
{
    if (reason >= REASON_ALL) {
        return -EINVAL;
    }
    *out = count_of(&head_of(c)->reasons[reason]);
    return 0;
}

int classify_entry_count(const struct classifier *c, uint32_t entry, struct classify_count *out)
{
    if (entry >= c->cfg.endpoints) {
        return -EINVAL;
    }
    *out = count_of((const struct classify_count *)(c->mem + c->entry_counts) + entry);
    return 0;
}

int classify_rule_counts(const struct classifier *c, int previous, struct classify_count *out, uint32_t n)
{
    const struct classify_head *h = head_of(c);
    uint32_t area = (LOAD_ACQUIRE(&h->active) + (previous ? 1 : 0)) & 1, rules = LOAD(&h->area[area].rules);

    rules = rules < c->cfg.keys ? rules : c->cfg.keys;
    for (uint32_t i = 0; i < n && i < rules; i++) {
        out[i] = count_of(&area_counts(c, area)[i]);
    }
    return (int)rules;
}
