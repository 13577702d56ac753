/* SPDX-License-Identifier: Apache-2.0 */
/*
 * classify_mem.h - what lies in a classifier's range, and how it is read and written at the same time.
 *
 *   | head | area 0: slots, counts | area 1: the same | tables: endpoints, held, three sets | counts of entries |
 *
 * Rules. A policy is written whole into the area that is not in force; then `active` is turned. The area's `seq` is odd
 * meanwhile. A reader takes the area in force and its seq, decides, and looks at seq once more: when it has changed, two
 * policies were put in meanwhile, and it begins anew, a few times at most (REASON_BUSY). A writer that is killed leaves an
 * odd seq in the area that nobody reads.
 *
 *   A  writer: seq odd, release fence, writes        | reader: reads, acquire fence, seq again: sees it odd or larger
 *   B  writer: writes, seq even (release)            | reader: seq (acquire): sees what was written
 *   C  writer: active (release)                      | reader: active (acquire): sees B
 *
 * Tables: open addressing, linear probing, at most a quarter full. An entry stays in its slot until it is removed; a
 * removed one leaves a tombstone, or nothing where no entry lies behind. So a key that is there all the time is found by
 * every reader, without a lock and without trying again; one that is added or removed meanwhile is found or not. `state`
 * counts how often a slot was given out: a reader that finds it changed has looked at an entry that is gone.
 *
 *   D  writer: key, value, then state FULL (release) | reader: state (acquire), then key and value
 *   E  writer: state not FULL, release fence, key... | reader: key, value, acquire fence, state again: sees it changed
 */
#ifndef BYPASS_DPDK_CLASSIFY_MEM_H
#define BYPASS_DPDK_CLASSIFY_MEM_H

#include <pthread.h>
#include <string.h>

#include "classify.h"

enum {
    KEY_WORDS4 = 2,   /* of a rule's key: addresses; ports and the rest */
    KEY_WORDS6 = 5,   /* 16-byte addresses */
    SLOT_WORDS4 = 4,  /* of a rule's slot: key, value, up to half a cache line */
    SLOT_WORDS6 = 8,  /* a cache line */
    PROBES_MAX = 512, /* slots that a reader looks at: no writer puts anything farther from its place */
    MASK_SHIFT = 56,  /* number of the mask in the last word of a key: family_mask is its last byte */

    SLOT_EMPTY = 0,
    SLOT_FULL = 1,
    SLOT_GONE = 2,
    SLOT_KIND = 3, /* bits of table_slot.state; above them the number of times that it was given out */

    FIND_EXACT = 1, /* head.kinds: which lookups of an endpoint can hit, as KIND_* of steer.h */
    FIND_LOCAL = 2,
    FIND_ANY = 4,
    FIND_BLOCK = 8,
    FIND_KINDS = 4,
};

#define CLASSIFY_MAGIC 0x4c43534142595042ull

struct table_slot {
    uint32_t state;
    uint32_t reserved;
    uint64_t value;
    uint64_t key[2];
};

struct area_mask {
    uint64_t bits[KEY_WORDS6];
    uint32_t max_rank, reserved;
};

struct area_head {
    uint32_t seq;
    uint32_t slot_bits; /* of the slots that this policy uses */
    uint32_t key_v6, with_v6, vlan_depth, masks_n, rules, reserved;
    struct area_mask mask[CLASSIFY_MASKS];
} __attribute__((aligned(64)));

struct classify_head {
    uint64_t magic, size;
    struct classify_config cfg;
    uint64_t mac;     /* its bytes in memory order, then two zeroes */
    uint64_t old_mac; /* the same, unless it is changing */
    uint32_t active;  /* number of policies that were put in force; the last bit says in which area the last is */
    uint32_t kinds;   /* FIND_* */
    uint64_t unserved[CLASSIFY_OWNERS][CLASSIFY_QUEUES / 64];
    struct area_head area[2];
    struct { /* of the writers */
        pthread_mutex_t rules_lock, lock;
        uint32_t endpoints_n[FIND_KINDS], held_n, set_n[CLASSIFY_SETS];
    } __attribute__((aligned(64)));
    struct classify_count reasons[32] __attribute__((aligned(64))); /* of the reader, as are the other counts */
};

_Static_assert(sizeof(struct table_slot) == 32, "two a cache line");
_Static_assert(sizeof(struct classify_key) == 16 && sizeof(struct classify_rule) == 8, "keys and values are words");
_Static_assert(REASON_ALL <= 32, "room for the reasons");

#define LOAD(p) __atomic_load_n(p, __ATOMIC_RELAXED)
#define STORE(p, v) __atomic_store_n(p, v, __ATOMIC_RELAXED)
#define LOAD_ACQUIRE(p) __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define STORE_RELEASE(p, v) __atomic_store_n(p, v, __ATOMIC_RELEASE)

static inline struct classify_head *head_of(const struct classifier *c) { return (struct classify_head *)c->mem; }

static inline uint64_t *area_slots(const struct classifier *c, uint32_t area)
{
    return (uint64_t *)(c->mem + c->area[area].slots);
}

static inline struct classify_count *area_counts(const struct classifier *c, uint32_t area)
{
    return (struct classify_count *)(c->mem + c->area[area].counts);
}

/* Keyed with 128 secret bits: who chooses addresses and ports cannot choose where they fall. */
static inline uint64_t hash_mix(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;

    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t hash_words(const struct classifier *c, const uint64_t *key, int words)
{
    uint64_t h = hash_mix(key[0] ^ c->seed[0], key[1] ^ c->seed[1]);

    if (words == KEY_WORDS6) {
        h = hash_mix(h ^ key[2], key[3] ^ c->seed[0]);
        h = hash_mix(h ^ key[4], c->seed[1]);
    }
    return h;
}

/* One thread writes counts; others read them. */
static inline void count_add(struct classify_count *n, uint32_t bytes)
{
    STORE(&n->packets, LOAD(&n->packets) + 1);
    STORE(&n->bytes, LOAD(&n->bytes) + bytes);
}

/* ---- Tables -------------------------------------------------------------------------------------------------- */

static inline struct table_slot *table_slots(const struct classifier *c, const struct classify_table *t)
{
    return (struct table_slot *)(c->mem + t->slots);
}

static inline uint64_t table_mask(const struct classify_table *t) { return ((uint64_t)1 << t->bits) - 1; }

/* Whether the key is there, and with what value. */
static inline bool table_find(const struct classifier *c, const struct classify_table *t, const uint64_t key[2],
                              uint64_t *value)
{
    const struct table_slot *slots = table_slots(c, t);
    uint64_t mask = table_mask(t), at = hash_words(c, key, 2);

    for (int i = 0; i < PROBES_MAX; i++, at++) {
        const struct table_slot *s = &slots[at & mask];
        uint32_t state = LOAD_ACQUIRE(&s->state);

        if ((state & SLOT_KIND) == SLOT_EMPTY) {
            return false;
        }
        if ((state & SLOT_KIND) == SLOT_FULL && LOAD(&s->key[0]) == key[0] && LOAD(&s->key[1]) == key[1]) {
            *value = LOAD(&s->value);
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            if (LOAD(&s->state) == state) {
                return true;
            }
        }
    }
    return false;
}

static inline struct classify_endpoint endpoint_of(uint64_t value)
{
    return (struct classify_endpoint){
        .entry = (uint32_t)value, .owner = (uint16_t)(value >> 32), .flags = (uint16_t)(value >> 48)};
}

static inline uint64_t endpoint_value(const struct classify_endpoint *e)
{
    return e->entry | (uint64_t)e->owner << 32 | (uint64_t)e->flags << 48;
}

/* ---- The range (classify_mem.c) ------------------------------------------------------------------------------ */

/* 0, or -errno: -EBUSY where it would have to wait and shall not. What a killed owner has left is put right. */
int writer_lock(struct classifier *c, bool wait);
void writer_unlock(struct classifier *c);
int rules_lock(struct classifier *c);
void rules_unlock(struct classifier *c);
/* Counts anew what a killed writer may have counted wrong (classify_table.c). */
void tables_repair(struct classifier *c);

#endif
