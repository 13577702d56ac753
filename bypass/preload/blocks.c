/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blocks.c - blocks of local ports (app.h, APP_LEASE with flags 1): who connects takes a port of one, without a word to
 * the broker. The shadow is bound to it by name, for the kernel gives such ports to nobody by itself; where somebody else
 * has bound to it by name it is passed over.
 *
 * A port is free when the stack has nothing on it, TIME_WAIT included (RFC 9293 3.4.2): the packets of a block are the
 * stack's, whichever socket of the kernel's may have the port. It is chosen at random (RFC 6056), as the block was.
 *
 * Before the last ports are taken another block is asked for, and nobody waits for the answer.
 *
 * Which block fits is a question of the route: the broker says from which address a peer is reached, and that is believed
 * for a while.
 */
#define _GNU_SOURCE
#include <string.h>

#include "host.h"
#include "preload.h"

enum {
    BLOCKS = sizeof me.g->blocks / sizeof *me.g->blocks,
    ROUTES = sizeof me.g->routes / sizeof *me.g->routes,
    CONFLICTS = 8,
    WANT_BLOCK = 1, /* flags of APP_LEASE */
    WANT_ANOTHER = 2,
    LOOKED = 4, /* ports passed over in vain: the block may be nearly full */
    LOW = 128,  /* ports left in the last block: with fewer another one is asked for */
};
static const uint64_t ROUTE_NS = 10000000000u, UNUSED_NS = 10000000000u, PATIENCE_NS = 1000000000u,
                      REFUSED_NS = 10000000000u;

static bool same(const struct bypass_addr *a, const struct bypass_addr *b) { return memcmp(a, b, sizeof *a) == 0; }

static struct route *route_at(const struct bypass_addr *to)
{
    uint32_t h = 2166136261u; /* FNV-1a; who fills a place with two peers is asked more often, no more */

    for (size_t i = 0; i < sizeof to->b; i++) {
        h = (h ^ to->b[i]) * 16777619u;
    }
    return &me.g->routes[h % ROUTES];
}

void routes_forget(void) { memset(me.g->routes, 0, sizeof me.g->routes); }

/* ---- Ports ------------------------------------------------------------------------------------------------ */
static int bind_shadow(int fd, const struct object *o, const struct bypass_endpoint *local)
{
    struct sockaddr_storage sa;
    socklen_t len = sizeof sa;

    name_to(o, local, (struct sockaddr *)&sa, &len);
    return place_bind(fd, o, (struct sockaddr *)&sa, len);
}

static bool port_used(const struct block *b, uint32_t port)
{
    return bypass_port_users(&me.stack, b->type, NULL, (uint16_t)port) != 0;
}

static bool is_last(const struct block *b)
{
    for (const struct block *o = b + 1; o < me.g->blocks + BLOCKS; o++) {
        if (o->lease && o->type == b->type && same(&o->local, &b->local)) {
            return false;
        }
    }
    return true;
}

/* One of its ports was just taken, after `looked` others that were not free. The relatives ask one at a time. */
static void ask_ahead(const struct block *b, uint32_t looked, const struct bypass_endpoint *to)
{
    uint64_t now = clock_ns();
    uint32_t left = 0;

    if (looked < LOOKED || now < me.g->blocks_ask_ns || !is_last(b)) {
        return;
    }
    for (uint32_t port = b->first; port <= b->last; port++) {
        left += !port_used(b, port);
    }
    if (left < LOW) {
        me.g->blocks_ask_ns = now + PATIENCE_NS;
        broker_block_ahead(b->type, to);
    }
}

void block_came(const struct app_msg *m, int type, const struct bypass_addr *to)
{
    bool good = m->error == 0 && (m->flags & WANT_BLOCK);

    me.g->blocks_ask_ns = good ? 0 : clock_ns() + REFUSED_NS;
    if (good) {
        block_add(m, type, to);
    }
}

/* 0; -ENOENT: none is free; -EACCES: what is free is not granted for this peer. */
static int bind_in(struct block *b, int fd, const struct object *o, const struct bypass_endpoint *to,
                   struct bypass_endpoint *local)
{
    uint32_t count = b->last - b->first + 1u, conflicts = 0;
    uint8_t start = 0;

    host_random(NULL, &start, sizeof start);
    for (uint32_t i = 0; i < count && conflicts < CONFLICTS; i++) {
        struct bypass_endpoint at = {.addr = b->local, .port = (uint16_t)(b->first + (start + i) % count)};
        int err;

        if (port_used(b, at.port)) {
            continue;
        }
        if (!granted(b->type, &at, to)) {
            return -EACCES;
        }
        err = bind_shadow(fd, o, &at);
        if (err == 0) {
            b->used_ns = clock_ns();
            *local = at;
            ask_ahead(b, i, to);
        }
        if (err != -EADDRINUSE) {
            return err;
        }
        conflicts++;
    }
    return -ENOENT;
}

int block_bind(int fd, const struct object *o, const struct bypass_endpoint *to, struct bypass_endpoint *local,
               uint32_t *flags)
{
    const struct route *r = route_at(&to->addr);

    *flags = WANT_BLOCK;
    if (!same(&r->to, &to->addr) || r->until_ns < clock_ns() || broker_fd() < 0) {
        return -ENOENT;
    }
    for (uint32_t i = 0; i < BLOCKS; i++) {
        struct block *b = &me.g->blocks[i];

        if (b->lease && b->type == o->type && same(&b->local, &r->local)) {
            int err = bind_in(b, fd, o, to, local);

            if (err != -ENOENT) {
                return err;
            }
            *flags = WANT_BLOCK | WANT_ANOTHER;
        }
    }
    if ((*flags & WANT_ANOTHER) && clock_ns() < me.g->blocks_ask_ns) {
        me.g->blocks_ask_ns = 0;
        *flags = WANT_BLOCK; /* what a relative has asked for: it may have ended since */
    }
    return -ENOENT;
}

bool block_has(int type, const struct bypass_endpoint *local)
{
    for (uint32_t i = 0; i < BLOCKS; i++) {
        const struct block *b = &me.g->blocks[i];

        if (b->lease && b->type == type && same(&b->local, &local->addr) && local->port >= b->first &&
            local->port <= b->last) {
            return true;
        }
    }
    return false;
}

/* ---- Blocks --------------------------------------------------------------------------------------------------- */
static struct block *find(uint32_t lease)
{
    for (uint32_t i = 0; i < BLOCKS; i++) {
        if (me.g->blocks[i].lease == lease) {
            return &me.g->blocks[i];
        }
    }
    return NULL;
}

bool block_known(uint32_t lease) { return find(lease) != NULL; }

static void look_at(uint64_t due_ns)
{
    me.g->blocks_due_ns = due_ns < me.g->blocks_due_ns ? due_ns : me.g->blocks_due_ns;
}

void block_add(const struct app_msg *m, int type, const struct bypass_addr *to)
{
    struct block *b = find(m->lease);
    struct route *r = route_at(to);

    if (!b && !(b = find(0))) {
        broker_release(m->lease); /* more than we can remember */
        return;
    }
    if (b->lease == 0) {
        b->first = m->local.port;
        b->last = m->last_port;
        b->type = (uint16_t)type;
        b->local = m->local.addr;
        b->used_ns = clock_ns();
        atomic_signal_fence(memory_order_seq_cst); /* as in group.c */
        b->lease = m->lease;
        look_at(b->used_ns + UNUSED_NS);
    }
    *r = (struct route){.to = *to, .local = b->local, .until_ns = clock_ns() + ROUTE_NS};
}

static bool in_use(const struct block *b)
{
    for (uint32_t port = b->first; port <= b->last; port++) {
        if (port_used(b, port)) {
            return true;
        }
    }
    return false;
}

void blocks_check(uint64_t now)
{
    if (now < me.g->blocks_due_ns) {
        return;
    }
    me.g->blocks_due_ns = UINT64_MAX;
    for (uint32_t i = 0; i < BLOCKS; i++) {
        struct block *b = &me.g->blocks[i];

        if (b->lease == 0) {
            continue;
        }
        if (now >= b->used_ns + UNUSED_NS && broker_fd() >= 0 && !in_use(b)) {
            broker_release_soon(b->lease);
            b->lease = 0;
            continue;
        }
        b->used_ns = now >= b->used_ns + UNUSED_NS ? now : b->used_ns;
        look_at(b->used_ns + UNUSED_NS);
    }
}

/* Connections from it are over, as those of any lease. */
void block_revoked(uint32_t lease)
{
    struct block *b = lease ? find(lease) : NULL;

    if (!b) {
        return;
    }
    for (uint32_t i = 0; i < me.g->objects_bump; i++) {
        struct object *o = group_object(me.g, i);
        struct bypass_endpoint local;

        if (o->refs && o->type == b->type && o->sock >= 0 && !o->lease && o->place >= PLACE_STACK &&
            bypass_local(&me.stack, o->sock, &local) == 0 && block_has(b->type, &local) && local.port >= b->first &&
            local.port <= b->last) {
            object_revoke(i);
        }
    }
    b->lease = 0;
}
