/* SPDX-License-Identifier: Apache-2.0 */
/* group.c - objects, holds and processes in the memory of relatives (group.h). No system calls but the lock's. */
#define _GNU_SOURCE
#include "group.h"

#include <errno.h>
#include <string.h>

enum { GROUP_MAGIC = 0x50524742 };

static const char *const reasons[] = {
#define X(name, text) [WHY_##name] = text,
    REASONS(X)
#undef X
};

const char *group_reason(int reason) { return reason >= 0 && reason < WHY_COUNT ? reasons[reason] : "?"; }

static int lock_init(pthread_mutex_t *lock)
{
    pthread_mutexattr_t a;
    int err = pthread_mutexattr_init(&a);

    if (err == 0) {
        pthread_mutexattr_setpshared(&a, PTHREAD_PROCESS_SHARED);
        pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
        err = pthread_mutex_init(lock, &a);
        pthread_mutexattr_destroy(&a);
    }
    return -err;
}

int group_init(struct group *g, uint64_t size, uint32_t max_socks, uint64_t wake_id)
{
    uint64_t objects = (sizeof *g + 63) & ~63ull, watches;

    max_socks += GROUP_SPARE;
    watches = objects + (uint64_t)max_socks * sizeof(struct object);
    if (watches + (uint64_t)HOLDS * max_socks * sizeof(struct hold) > size) {
        return -ENOMEM;
    }
    *g = (struct group){.magic = GROUP_MAGIC, .abi = APP_ABI, .ready = 1, .wake_id = wake_id, .check_ns = UINT64_MAX};
    g->objects_off = objects;
    g->objects_max = max_socks;
    g->objects_free = g->holds_free = GROUP_NONE;
    g->holds_off = watches;
    g->holds_max = HOLDS * max_socks;
    for (int i = 0; i < GROUP_PROCS; i++) {
        g->procs[i].queue_head = g->procs[i].queue_tail = GROUP_NONE;
    }
    return lock_init(&g->lock);
}

/* ---- Objects ----------------------------------------------------------------------------------------- */
uint32_t group_object_new(struct group *g)
{
    uint32_t i = g->objects_free;

    if (i != GROUP_NONE) {
        g->objects_free = group_object(g, i)->next;
    } else if (g->objects_bump < g->objects_max) {
        i = g->objects_bump++;
    } else {
        return GROUP_NONE;
    }
    *group_object(g, i) = (struct object){.refs = 1, .sock = -1, .holds = GROUP_NONE, .keep_fd = -1};
    g->objects_used++;
    return i;
}

static void hold_free(struct group *g, uint32_t i)
{
    struct hold *w = group_hold(g, i);

    w->object = GROUP_NONE; /* while it stands in a queue it is passed over, and freed there */
    if (!w->queued) {
        w->next = g->holds_free;
        g->holds_free = i;
    }
}

void group_object_free(struct group *g, uint32_t object)
{
    struct object *o = group_object(g, object);

    while (o->holds != GROUP_NONE) {
        uint32_t w = o->holds;

        o->holds = group_hold(g, w)->next;
        hold_free(g, w);
    }
    o->refs = 0;
    o->ino = 0;
    o->next = g->objects_free;
    g->objects_free = object;
    g->objects_used--;
}

uint32_t group_find_ino(struct group *g, uint64_t ino)
{
    for (uint32_t i = 0; i < g->objects_bump; i++) {
        const struct object *o = group_object(g, i);

        if (o->refs && o->ino == ino) {
            return i;
        }
    }
    return GROUP_NONE;
}

/* ---- Holds ------------------------------------------------------------------------------------------ */
uint32_t group_hold_get(struct group *g, uint32_t object, uint32_t proc)
{
    struct object *o = group_object(g, object);
    uint32_t i;

    for (i = o->holds; i != GROUP_NONE; i = group_hold(g, i)->next) {
        if (group_hold(g, i)->proc == proc) {
            return i;
        }
    }
    i = g->holds_free;
    if (i != GROUP_NONE) {
        g->holds_free = group_hold(g, i)->next;
    } else if (g->holds_bump < g->holds_max) {
        i = g->holds_bump++;
    } else {
        return GROUP_NONE;
    }
    *group_hold(g, i) = (struct hold){.next = o->holds, .qnext = GROUP_NONE, .object = object, .proc = (uint16_t)proc};
    o->holds = i;
    return i;
}

void group_ref(struct group *g, uint32_t object, uint32_t proc)
{
    uint32_t i = group_hold_get(g, object, proc);

    if (i != GROUP_NONE) { /* without: it is counted all the same, but a death of the process is not noticed */
        group_hold(g, i)->refs++;
    }
    group_object(g, object)->refs++;
}

/* Takes a process' hold off an object's list. Its references. */
static uint32_t hold_drop(struct group *g, uint32_t object, uint32_t proc)
{
    for (uint32_t *at = &group_object(g, object)->holds; *at != GROUP_NONE; at = &group_hold(g, *at)->next) {
        uint32_t i = *at, refs = group_hold(g, i)->refs;

        if (group_hold(g, i)->proc == proc) {
            *at = group_hold(g, i)->next;
            hold_free(g, i);
            return refs;
        }
    }
    return 0;
}

bool group_unref(struct group *g, uint32_t object, uint32_t proc)
{
    struct object *o = group_object(g, object);

    for (uint32_t i = o->holds; i != GROUP_NONE; i = group_hold(g, i)->next) {
        struct hold *h = group_hold(g, i);

        if (h->proc == proc && h->refs) {
            if (--h->refs == 0) {
                hold_drop(g, object, proc);
            }
            break;
        }
    }
    return --o->refs == 0;
}

uint32_t group_holds(struct group *g, uint32_t object, uint32_t proc)
{
    for (uint32_t i = group_object(g, object)->holds; i != GROUP_NONE; i = group_hold(g, i)->next) {
        if (group_hold(g, i)->proc == proc) {
            return group_hold(g, i)->refs;
        }
    }
    return 0;
}

bool group_set_hold(struct group *g, uint32_t object, uint32_t proc, uint32_t refs)
{
    struct object *o = group_object(g, object);
    uint32_t i = refs ? group_hold_get(g, object, proc) : GROUP_NONE, before = group_holds(g, object, proc);

    if (i != GROUP_NONE) {
        group_hold(g, i)->refs = refs;
        o->refs += refs - before;
    } else if (refs == 0) {
        o->refs -= hold_drop(g, object, proc);
    }
    return o->refs == 0;
}

static void enqueue(struct group *g, uint32_t i)
{
    struct hold *w = group_hold(g, i);
    struct proc *p = &g->procs[w->proc];

    if (w->queued) {
        return;
    }
    w->queued = 1;
    w->qnext = GROUP_NONE;
    if (p->queue_tail != GROUP_NONE) {
        group_hold(g, p->queue_tail)->qnext = i;
    } else {
        p->queue_head = i;
    }
    p->queue_tail = i;
}

void group_notify(struct group *g, uint32_t object, uint32_t mask)
{
    for (uint32_t i = group_object(g, object)->holds; i != GROUP_NONE; i = group_hold(g, i)->next) {
        if (group_hold(g, i)->waits) {
            group_hold(g, i)->mask |= mask;
            enqueue(g, i);
        }
    }
}

uint32_t group_take(struct group *g, uint32_t proc, uint32_t *mask)
{
    struct proc *p = &g->procs[proc];

    while (p->queue_head != GROUP_NONE) {
        uint32_t i = p->queue_head;
        struct hold *w = group_hold(g, i);

        p->queue_head = w->qnext;
        if (p->queue_head == GROUP_NONE) {
            p->queue_tail = GROUP_NONE;
        }
        w->queued = 0;
        if (w->object != GROUP_NONE) {
            *mask = w->mask;
            w->mask = 0;
            return w->object;
        }
        w->next = g->holds_free; /* its object ended meanwhile */
        g->holds_free = i;
    }
    return GROUP_NONE;
}

/* ---- Processes ------------------------------------------------------------------------------------------ */
uint32_t group_join(struct group *g, int32_t pid)
{
    for (uint32_t i = 0; i < GROUP_PROCS; i++) {
        struct proc *p = &g->procs[i];

        if (p->pid == 0) {
            *p = (struct proc){.pid = pid, .queue_head = GROUP_NONE, .queue_tail = GROUP_NONE};
            g->relatives++;
            g->procs_top = i >= g->procs_top ? i + 1 : g->procs_top;
            return i;
        }
    }
    return GROUP_NONE;
}

void group_leave(struct group *g, uint32_t proc, void (*ended)(void *arg, uint32_t object), void *arg)
{
    uint32_t mask;

    for (uint32_t i = 0; i < g->objects_bump; i++) {
        struct object *o = group_object(g, i);
        uint32_t refs = o->refs ? hold_drop(g, i, proc) : 0;

        o->refs -= refs;
        if (refs && o->refs == 0) {
            ended(arg, i);
        }
    }
    while (group_take(g, proc, &mask) != GROUP_NONE) {}
    g->procs[proc].pid = 0;
    g->relatives--;
}

void group_copy(struct group *g, uint32_t from, uint32_t to)
{
    for (uint32_t i = 0; i < g->objects_bump; i++) {
        struct object *o = group_object(g, i);

        for (uint32_t h = o->refs ? o->holds : GROUP_NONE; h != GROUP_NONE; h = group_hold(g, h)->next) {
            if (group_hold(g, h)->proc == from && group_hold(g, h)->refs) {
                uint32_t refs = group_hold(g, h)->refs, copy = group_hold_get(g, i, to);

                o->refs += refs;
                if (copy != GROUP_NONE) {
                    group_hold(g, copy)->refs = refs;
                }
                break;
            }
        }
    }
}

/* ---- Soundness ---------------------------------------------------------------------------------------------- */
static bool list_sound(const struct group *g, uint32_t i, uint32_t max,
                       uint32_t (*next)(const struct group *, uint32_t))
{
    for (uint32_t steps = 0; i != GROUP_NONE; i = next(g, i)) {
        if (i >= max || steps++ > max) {
            return false;
        }
    }
    return true;
}

static uint32_t next_object(const struct group *g, uint32_t i) { return group_object((struct group *)g, i)->next; }

static uint32_t next_hold(const struct group *g, uint32_t i) { return group_hold((struct group *)g, i)->next; }

static uint32_t next_queued(const struct group *g, uint32_t i) { return group_hold((struct group *)g, i)->qnext; }

bool group_sound(struct group *g)
{
    uint32_t objects = g->objects_bump, holds = g->holds_bump;
    bool good = objects <= g->objects_max && holds <= g->holds_max && g->procs_top <= GROUP_PROCS;

    good = good && list_sound(g, g->objects_free, objects, next_object);
    good = good && list_sound(g, g->holds_free, holds, next_hold);
    for (uint32_t i = 0; good && i < objects; i++) {
        const struct object *o = group_object(g, i);

        good = o->refs == 0 || list_sound(g, o->holds, holds, next_hold);
    }
    for (uint32_t i = 0; good && i < g->procs_top; i++) {
        const struct proc *p = &g->procs[i];

        good = list_sound(g, p->queue_head, holds, next_queued) &&
               (p->queue_tail == GROUP_NONE) == (p->queue_head == GROUP_NONE);
    }
    return good;
}
