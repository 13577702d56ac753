/* SPDX-License-Identifier: Apache-2.0 */
/* group.c - objects, holds and processes in the memory of relatives (group.h). No system calls but the lock's. */
#define _GNU_SOURCE
#include "group.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

enum { GROUP_MAGIC = 0x50524742, HOLD_SEEN = 2 };

/* What stands before it is done first, also where the process is killed in between: group_repair(). */
static inline void in_order(void) { atomic_signal_fence(memory_order_seq_cst); }

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
    *g = (struct group){.magic = GROUP_MAGIC,
                        .abi = APP_ABI,
                        .ready = 1,
                        .wake_id = wake_id,
                        .check_ns = UINT64_MAX,
                        .blocks_due_ns = UINT64_MAX};
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
    *group_object(g, i) = (struct object){.sock = -1, .holds = GROUP_NONE, .keep_fd = -1};
    in_order();
    group_object(g, i)->refs = 1;
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
        in_order();
        hold_free(g, w);
    }
    o->refs = 0;
    o->ino = 0;
    o->lease = 0;
    in_order();
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
    in_order();
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

/* Takes a process' hold off an object's list. Its references, those of calls included. */
static uint32_t hold_drop(struct group *g, uint32_t object, uint32_t proc)
{
    for (uint32_t *at = &group_object(g, object)->holds; *at != GROUP_NONE; at = &group_hold(g, *at)->next) {
        uint32_t i = *at, refs = group_hold(g, i)->refs + group_hold(g, i)->calls;

        if (group_hold(g, i)->proc == proc) {
            *at = group_hold(g, i)->next;
            in_order();
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
            if (--h->refs == 0 && h->calls == 0) {
                hold_drop(g, object, proc);
            }
            break;
        }
    }
    return --o->refs == 0;
}

void group_call_begins(struct group *g, uint32_t object, uint32_t proc)
{
    uint32_t i = group_hold_get(g, object, proc);

    if (i != GROUP_NONE) {
        group_hold(g, i)->calls++;
    }
    group_object(g, object)->refs++;
}

bool group_call_ends(struct group *g, uint32_t object, uint32_t proc)
{
    struct object *o = group_object(g, object);

    for (uint32_t i = o->holds; i != GROUP_NONE; i = group_hold(g, i)->next) {
        struct hold *h = group_hold(g, i);

        if (h->proc == proc && h->calls) {
            if (--h->calls == 0 && h->refs == 0) {
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
                    group_hold(g, copy)->waits = group_hold(g, h)->waits;
                    group_hold(g, copy)->mask = group_hold(g, h)->mask;
                }
                if (copy != GROUP_NONE && group_hold(g, h)->queued) {
                    enqueue(g, copy);
                }
                break;
            }
        }
    }
}

/* ---- Repair ------------------------------------------------------------------------------------------------
 *
 * Whoever was killed in the middle of something here left each list such that it can be walked: entries are complete
 * before they are linked, and unlinked before they are used otherwise. What belongs to whom is said by the holds that
 * objects have; everything else follows from these.
 */
static bool hold_valid(const struct group *g, uint32_t i, uint32_t object)
{
    const struct hold *h = group_hold((struct group *)g, i);

    return i < g->holds_bump && h->object == object && h->proc < GROUP_PROCS;
}

/* An object's holds: those of processes that there are not are taken off. Marks the others as seen, and counts what they
 * have. false: the list leads nowhere. */
static bool repair_object(struct group *g, uint32_t object)
{
    struct object *o = group_object(g, object);
    uint32_t refs = o->under_way, *at = &o->holds;

    while (*at != GROUP_NONE) {
        struct hold *h = group_hold(g, *at);

        if (!hold_valid(g, *at, object) || h->queued == HOLD_SEEN) {
            return false;
        }
        if (g->procs[h->proc].pid == 0) {
            *at = h->next;
            continue;
        }
        h->queued = HOLD_SEEN;
        refs += h->refs + h->calls;
        at = &h->next;
    }
    for (uint32_t i = refs ? GROUP_NONE : o->holds; i != GROUP_NONE; i = group_hold(g, i)->next) {
        group_hold(g, i)->queued = 0; /* of who only wanted to know of it */
    }
    o->holds = refs ? o->holds : GROUP_NONE;
    o->refs = refs;
    return true;
}

/* Queues are empty afterwards, and holds that no object has are free. */
static void repair_holds(struct group *g)
{
    g->holds_free = GROUP_NONE;
    for (uint32_t i = g->holds_bump; i-- > 0;) {
        struct hold *h = group_hold(g, i);
        bool seen = h->queued == HOLD_SEEN;

        h->queued = 0;
        h->qnext = GROUP_NONE;
        if (!seen) {
            h->object = GROUP_NONE;
            h->next = g->holds_free;
            g->holds_free = i;
        }
    }
}

static void repair_procs(struct group *g)
{
    g->relatives = g->procs_top = 0;
    for (uint32_t i = 0; i < GROUP_PROCS; i++) {
        struct proc *p = &g->procs[i];

        p->queue_head = p->queue_tail = GROUP_NONE;
        if (p->pid) {
            g->relatives++;
            g->procs_top = i + 1;
        }
    }
}

static void repair_objects(struct group *g)
{
    g->objects_free = GROUP_NONE;
    g->objects_used = 0;
    for (uint32_t i = g->objects_bump; i-- > 0;) {
        struct object *o = group_object(g, i);

        if (o->refs) {
            g->objects_used++;
        } else {
            o->ino = 0;
            o->under_way = 0;
            o->next = g->objects_free;
            g->objects_free = i;
        }
    }
}

bool group_repair(struct group *g)
{
    if (g->objects_bump > g->objects_max || g->holds_bump > g->holds_max) {
        return false;
    }
    for (uint32_t i = 0; i < g->holds_bump; i++) {
        group_hold(g, i)->queued = 0;
    }
    for (uint32_t i = 0; i < g->objects_bump; i++) {
        if (group_object(g, i)->refs == 0) {
            group_object(g, i)->holds = GROUP_NONE; /* it has ended, or nobody got to know it */
        } else if (!repair_object(g, i)) {
            return false;
        }
    }
    repair_holds(g);
    repair_procs(g);
    repair_objects(g);
    g->leaving_count = 0;
    for (uint32_t i = 0; i < sizeof g->leaving / sizeof *g->leaving; i++) {
        g->leaving_count += g->leaving[i].lease != 0;
    }
    return true;
}
