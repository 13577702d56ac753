/* SPDX-License-Identifier: Apache-2.0 */
/* lease.c - see lease.h. */
#include "lease.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { PLACES = 2 * LEASES_MAX, MASK = PLACES - 1 };
enum { KIND_PEER = 1, KIND_ADDRESS = 2, KIND_BLOCK = 4 };

_Static_assert(sizeof(struct lease_key) == 16, "two words, hashed and compared as such");

int leases_init(struct leases *l, uint64_t seed)
{
    *l = (struct leases){.table = calloc(PLACES, sizeof *l->table), .seed = seed};
    return l->table ? 0 : -ENOMEM;
}

void leases_free(struct leases *l) { free(l->table); }

static uint32_t hash(const struct leases *l, const struct lease_key *key)
{
    uint64_t w[2], h;

    memcpy(w, key, sizeof w);
    h = (w[0] ^ l->seed) * 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 32 ^ w[1]) * 0xd6e8feb86659fd93u;
    h = (h ^ h >> 32 ^ l->seed >> 17) * 0xd6e8feb86659fd93u;
    return (uint32_t)(h >> 32);
}

static bool same(const struct lease_key *a, const struct lease_key *b) { return memcmp(a, b, sizeof *a) == 0; }

/* Where the key is, or the empty place where it would be. Half of the places are empty. */
static uint32_t place(const struct leases *l, const struct lease_key *key)
{
    uint32_t i = hash(l, key) & MASK;

    while (l->table[i].owner && !same(&l->table[i].key, key)) {
        i = (i + 1) & MASK;
    }
    return i;
}

static uint32_t kind(const struct lease_key *key)
{
    return (key->remote ? KIND_PEER : 0) | (key->local ? KIND_ADDRESS : 0) | (key->block ? KIND_BLOCK : 0);
}

static bool valid(const struct lease_key *key)
{
    return key->local_port && !key->remote == !key->remote_port && key->block <= 1 && key->zero == 0 &&
           (!key->block || key->local_port % LEASE_BLOCK == 0) && !(key->remote && !key->local);
}

int leases_add(struct leases *l, const struct lease_key *key, uint32_t owner)
{
    uint32_t i;

    if (!owner || !valid(key)) {
        return -EINVAL;
    }
    i = place(l, key);
    if (l->table[i].owner) {
        return -EEXIST;
    }
    if (l->count == LEASES_MAX) {
        return -ENOSPC;
    }
    l->table[i] = (struct lease){.key = *key, .owner = owner};
    l->count++;
    l->of_kind[kind(key)]++;
    return 0;
}

/* Empties a place, and moves up what was put behind it because it was taken. */
static void empty(struct leases *l, uint32_t i)
{
    l->count--;
    l->of_kind[kind(&l->table[i].key)]--;
    for (uint32_t j = (i + 1) & MASK; l->table[j].owner; j = (j + 1) & MASK) {
        uint32_t home = hash(l, &l->table[j].key) & MASK;

        if (((j - home) & MASK) >= ((j - i) & MASK)) {
            l->table[i] = l->table[j];
            i = j;
        }
    }
    l->table[i].owner = 0;
}

int leases_remove(struct leases *l, const struct lease_key *key, uint32_t owner)
{
    uint32_t i = place(l, key);

    if (!owner || l->table[i].owner != owner) {
        return -ENOENT;
    }
    empty(l, i);
    return 0;
}

void leases_remove_all(struct leases *l, uint32_t owner)
{
    for (uint32_t i = 0; i < PLACES;) {
        if (l->table[i].owner == owner) {
            empty(l, i); /* another may have moved here: look again */
        } else {
            i++;
        }
    }
}

uint32_t leases_owner(const struct leases *l, const struct flow *f)
{
    for (uint32_t block = 0; block <= 1; block++) {
        const struct lease_key keys[] = {
            {.local = f->local, .remote = f->remote, .remote_port = f->remote_port},
            {.local = f->local},
            {.local = 0},
        };

        for (unsigned i = 0; i < sizeof keys / sizeof *keys; i++) {
            struct lease_key key = keys[i];
            uint32_t owner;

            key.block = (uint8_t)block;
            key.proto = f->proto;
            key.local_port = block ? f->local_port & ~(LEASE_BLOCK - 1) : f->local_port;
            if (l->of_kind[kind(&key)] && (owner = l->table[place(l, &key)].owner)) {
                return owner;
            }
        }
    }
    return 0;
}
