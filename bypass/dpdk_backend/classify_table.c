/* SPDX-License-Identifier: Apache-2.0 */
/*
 * classify_table.c - the writers of live entries, held flows, addresses, and what else is not the policy's. The tables'
 * protocol with their readers: classify_mem.h.
 */
#include <errno.h>

#include "classify_mem.h"

/* ---- Tables. With the lock held -------------------------------------------------------------------------------- */

/* The slot of a key, or NULL; *free_slot: where it would go, or NULL: nowhere that readers look. */
static struct table_slot *slot_of(struct classifier *c, const struct classify_table *t, const uint64_t key[2],
                                  struct table_slot **free_slot)
{
    struct table_slot *slots = table_slots(c, t), *place = NULL;
    uint64_t mask = table_mask(t), at = hash_words(c, key, 2);

    for (int i = 0; i < PROBES_MAX; i++, at++) {
        struct table_slot *s = &slots[at & mask];
        uint32_t kind = s->state & SLOT_KIND;

        if (kind == SLOT_FULL && s->key[0] == key[0] && s->key[1] == key[1]) {
            return s;
        }
        if (kind != SLOT_FULL && !place) {
            place = s;
        }
        if (kind == SLOT_EMPTY) {
            break;
        }
    }
    if (free_slot) {
        *free_slot = place;
    }
    return NULL;
}

static int table_add(struct classifier *c, const struct classify_table *t, const uint64_t key[2], uint64_t value)
{
    struct table_slot *s = NULL;

    if (slot_of(c, t, key, &s)) {
        return -EEXIST;
    }
    if (!s) {
        return -ENOSPC;
    }
    __atomic_thread_fence(__ATOMIC_RELEASE); /* E of classify_mem.h: it was taken out by a removal before this */
    STORE(&s->key[0], key[0]);
    STORE(&s->key[1], key[1]);
    STORE(&s->value, value);
    STORE_RELEASE(&s->state, ((s->state & ~(uint32_t)SLOT_KIND) + SLOT_KIND + 1) | SLOT_FULL);
    return 0;
}

static void table_remove(struct classifier *c, const struct classify_table *t, struct table_slot *s)
{
    struct table_slot *slots = table_slots(c, t);
    uint64_t mask = table_mask(t), at = (uint64_t)(s - slots);
    uint32_t next = slots[(at + 1) & mask].state & SLOT_KIND;

    STORE_RELEASE(&s->state, (s->state & ~(uint32_t)SLOT_KIND) | SLOT_GONE);
    if (next != SLOT_EMPTY) {
        return; /* what lies behind is found by way of this */
    }
    while ((slots[at & mask].state & SLOT_KIND) == SLOT_GONE) {
        STORE_RELEASE(&slots[at & mask].state, slots[at & mask].state & ~(uint32_t)SLOT_KIND);
        at--;
    }
}

static int table_next(const struct classifier *c, const struct classify_table *t, uint32_t *at, uint64_t key[2],
                      uint64_t *value)
{
    const struct table_slot *slots = table_slots(c, t);

    for (uint64_t i = *at; i <= table_mask(t); i++) {
        const struct table_slot *s = &slots[i];
        uint32_t state = LOAD_ACQUIRE(&s->state);

        key[0] = LOAD(&s->key[0]);
        key[1] = LOAD(&s->key[1]);
        *value = LOAD(&s->value);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if ((state & SLOT_KIND) == SLOT_FULL && LOAD(&s->state) == state) {
            *at = (uint32_t)i + 1;
            return 1;
        }
    }
    *at = (uint32_t)table_mask(t) + 1;
    return 0;
}

static uint32_t table_count(const struct classifier *c, const struct classify_table *t)
{
    uint64_t key[2], value;
    uint32_t at = 0, n = 0;

    while (table_next(c, t, &at, key, &value)) {
        n++;
    }
    return n;
}

/* ---- Live entries ---------------------------------------------------------------------------------------------- */

static void key_words(const struct classify_key *key, uint64_t words[2]) { memcpy(words, key, sizeof *key); }

static bool zero(const uint8_t *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (bytes[i]) {
            return false;
        }
    }
    return true;
}

static bool connected(const struct classify_key *k) { return !zero(k->remote, 4) || !zero(k->remote_port, 2); }

static bool key_valid(const struct classify_key *k)
{
    return (k->proto == 6 || k->proto == 17) && k->kind <= CLASSIFY_BLOCK && zero(k->zero, 2) &&
           (k->kind != CLASSIFY_BLOCK || (!connected(k) && k->local_port[1] == 0));
}

/* Which lookup finds it: a bit of FIND_*, as its number. */
static uint32_t find_bit(const struct classify_key *k)
{
    if (k->kind == CLASSIFY_BLOCK) {
        return 3;
    }
    return connected(k) ? 0 : zero(k->local, 4) ? 2 : 1;
}

static uint32_t endpoints_count(const struct classify_head *h)
{
    return h->endpoints_n[0] + h->endpoints_n[1] + h->endpoints_n[2] + h->endpoints_n[3];
}

int classify_endpoint_add(struct classifier *c, const struct classify_key *key, const struct classify_endpoint *e)
{
    struct classify_head *h = head_of(c);
    struct classify_count *n;
    uint32_t bit = find_bit(key);
    uint64_t words[2];
    int err;

    if (!key_valid(key) || e->entry >= c->cfg.endpoints || e->owner >= CLASSIFY_OWNERS ||
        e->flags > (CLASSIFY_DRAIN | CLASSIFY_UNSETTLED)) {
        return -EINVAL;
    }
    key_words(key, words);
    err = writer_lock(c, true);
    if (err) {
        return err;
    }
    if (slot_of(c, &c->endpoints, words, NULL)) {
        err = -EEXIST;
    } else if (endpoints_count(h) >= c->cfg.endpoints) {
        err = -ENOSPC;
    } else {
        n = (struct classify_count *)(c->mem + c->entry_counts) + e->entry;
        STORE(&n->packets, 0);
        STORE(&n->bytes, 0);
        h->endpoints_n[bit]++; /* before it is there: who reads it then finds it */
        STORE_RELEASE(&h->kinds, h->kinds | 1u << bit);
        err = table_add(c, &c->endpoints, words, endpoint_value(e));
        if (err) {
            h->endpoints_n[bit]--;
        }
    }
    writer_unlock(c);
    return err;
}

int classify_endpoint_set(struct classifier *c, const struct classify_key *key, uint32_t flags)
{
    struct classify_endpoint e;
    struct table_slot *s;
    uint64_t words[2];
    int err;

    if (flags > (CLASSIFY_DRAIN | CLASSIFY_UNSETTLED)) {
        return -EINVAL;
    }
    key_words(key, words);
    err = writer_lock(c, true);
    if (err) {
        return err;
    }
    s = slot_of(c, &c->endpoints, words, NULL);
    if (s) {
        e = endpoint_of(s->value);
        e.flags = (uint16_t)flags;
        STORE_RELEASE(&s->value, endpoint_value(&e));
    }
    writer_unlock(c);
    return s ? 0 : -ENOENT;
}

int classify_endpoint_del(struct classifier *c, const struct classify_key *key, bool wait)
{
    struct classify_head *h = head_of(c);
    uint32_t bit = find_bit(key);
    struct table_slot *s;
    uint64_t words[2];
    int err;

    key_words(key, words);
    err = writer_lock(c, wait);
    if (err) {
        return err;
    }
    s = slot_of(c, &c->endpoints, words, NULL);
    if (s) {
        table_remove(c, &c->endpoints, s);
        if (--h->endpoints_n[bit] == 0) {
            STORE_RELEASE(&h->kinds, h->kinds & ~(1u << bit));
        }
    }
    writer_unlock(c);
    return s ? 0 : -ENOENT;
}

int classify_endpoint_get(struct classifier *c, const struct classify_key *key, struct classify_endpoint *out)
{
    uint64_t words[2], value;

    key_words(key, words);
    if (!table_find(c, &c->endpoints, words, &value)) {
        return -ENOENT;
    }
    *out = endpoint_of(value);
    return 0;
}

int classify_endpoint_next(struct classifier *c, uint32_t *at, struct classify_key *key, struct classify_endpoint *out)
{
    uint64_t words[2], value;
    int got = table_next(c, &c->endpoints, at, words, &value);

    if (got) {
        memcpy(key, words, sizeof *key);
        *out = endpoint_of(value);
    }
    return got;
}

/* ---- Held flows, and sets -------------------------------------------------------------------------------------- */

/* n: their number; room: the most. again: what is there gets the value, else it is -EEXIST. */
static int member_add(struct classifier *c, const struct classify_table *t, uint32_t *n, uint32_t room,
                      const uint64_t key[2], uint64_t value, bool again)
{
    struct table_slot *s;
    int err = writer_lock(c, true);

    if (err) {
        return err;
    }
    s = slot_of(c, t, key, NULL);
    if (s) {
        err = again ? 0 : -EEXIST;
        STORE_RELEASE(&s->value, value);
    } else {
        err = *n >= room ? -ENOSPC : table_add(c, t, key, value);
        *n += err == 0;
    }
    writer_unlock(c);
    return err;
}

static int member_del(struct classifier *c, const struct classify_table *t, uint32_t *n, const uint64_t key[2])
{
    struct table_slot *s;
    int err = writer_lock(c, true);

    if (err) {
        return err;
    }
    s = slot_of(c, t, key, NULL);
    if (s) {
        table_remove(c, t, s);
        --*n;
    }
    writer_unlock(c);
    return s ? 0 : -ENOENT;
}

int classify_held_add(struct classifier *c, const struct classify_key *flow, uint32_t flags)
{
    uint64_t words[2];

    if (!key_valid(flow) || flow->proto != 6 || flow->kind || !connected(flow) || flags > CLASSIFY_TIME_WAIT) {
        return -EINVAL;
    }
    key_words(flow, words);
    return member_add(c, &c->held, &head_of(c)->held_n, c->cfg.held, words, flags, true);
}

int classify_held_del(struct classifier *c, const struct classify_key *flow)
{
    uint64_t words[2];

    key_words(flow, words);
    return member_del(c, &c->held, &head_of(c)->held_n, words);
}

int classify_held_next(struct classifier *c, uint32_t *at, struct classify_key *flow, uint32_t *flags)
{
    uint64_t words[2], value;
    int got = table_next(c, &c->held, at, words, &value);

    if (got) {
        memcpy(flow, words, sizeof *flow);
        *flags = (uint32_t)value;
    }
    return got;
}

int classify_set_add(struct classifier *c, int set, const uint8_t member[16])
{
    uint64_t words[2];

    if (set < 0 || set >= CLASSIFY_SETS) {
        return -EINVAL;
    }
    memcpy(words, member, sizeof words);
    return member_add(c, &c->set[set], &head_of(c)->set_n[set], c->cfg.members, words, 1, false);
}

int classify_set_del(struct classifier *c, int set, const uint8_t member[16])
{
    uint64_t words[2];

    if (set < 0 || set >= CLASSIFY_SETS) {
        return -EINVAL;
    }
    memcpy(words, member, sizeof words);
    return member_del(c, &c->set[set], &head_of(c)->set_n[set], words);
}

int classify_set_next(struct classifier *c, int set, uint32_t *at, uint8_t member[16])
{
    uint64_t words[2], value;

    if (set < 0 || set >= CLASSIFY_SETS || !table_next(c, &c->set[set], at, words, &value)) {
        return 0;
    }
    memcpy(member, words, sizeof words);
    return 1;
}

/* ---- The rest -------------------------------------------------------------------------------------------------- */

void tables_repair(struct classifier *c)
{
    struct classify_head *h = head_of(c);
    struct classify_endpoint e;
    struct classify_key key;
    uint32_t at = 0, kinds = 0;

    memset(h->endpoints_n, 0, sizeof h->endpoints_n);
    while (classify_endpoint_next(c, &at, &key, &e)) {
        h->endpoints_n[find_bit(&key)]++;
        kinds |= 1u << find_bit(&key);
    }
    STORE_RELEASE(&h->kinds, kinds);
    h->held_n = table_count(c, &c->held);
    for (int i = 0; i < CLASSIFY_SETS; i++) {
        h->set_n[i] = table_count(c, &c->set[i]);
    }
}

static uint64_t mac_word(const uint8_t mac[6])
{
    uint64_t word = 0;

    memcpy(&word, mac, 6);
    return word;
}

void classify_mac_set(struct classifier *c, const uint8_t mac[6])
{
    STORE_RELEASE(&head_of(c)->mac, mac_word(mac));
    STORE_RELEASE(&head_of(c)->old_mac, mac_word(mac));
}

void classify_mac_change(struct classifier *c, const uint8_t mac[6])
{
    STORE_RELEASE(&head_of(c)->old_mac, LOAD(&head_of(c)->mac));
    STORE_RELEASE(&head_of(c)->mac, mac_word(mac));
}

void classify_mac(const struct classifier *c, uint8_t mac[6])
{
    uint64_t word = LOAD(&head_of(c)->mac);

    memcpy(mac, &word, 6);
}

int classify_served_set(struct classifier *c, uint32_t owner, uint32_t queue, bool served)
{
    uint64_t *word, bit = (uint64_t)1 << queue % 64;

    if (owner >= CLASSIFY_OWNERS || queue >= CLASSIFY_QUEUES) {
        return -EINVAL;
    }
    word = &head_of(c)->unserved[owner][queue / 64];
    if (served) {
        __atomic_fetch_and(word, ~bit, __ATOMIC_RELEASE);
    } else {
        __atomic_fetch_or(word, bit, __ATOMIC_RELEASE);
    }
    return 0;
}
