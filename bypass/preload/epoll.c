/* SPDX-License-Identifier: Apache-2.0 */
/* epoll.c - sets and items, which side members are on, and who is woken (epoll.h). */
#define _GNU_SOURCE
#include "epoll.h"

#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/random.h>

enum {
    SETS = 1 << 16,
    ITEM_BITS = 10,
    ITEM_CHUNK = 1 << ITEM_BITS,
    ITEM_CHUNKS = 4096,
    KICK_NS = 2000000000,
    KERNEL_HALF = EPOLLIN | EPOLLRDNORM | EPOLLPRI, /* what it is asked for: room to send is the stack's word */
};

static _Atomic(struct epoll *) sets[SETS];
static uint32_t sets_top; /* above the highest that was ever used */
static struct item *chunks[ITEM_CHUNKS], *items_free;
static uint32_t items_bump;

/* ---- Sets by descriptor --------------------------------------------------------------------------------- */
struct epoll *epoll_of(int fd)
{
    uint32_t v = fd_entry(fd);

    return v & FD_EPOLL ? atomic_load_explicit(&sets[v & (SETS - 1)], memory_order_acquire) : NULL;
}

struct epoll *epoll_note(int fd)
{
    struct epoll *e = (unsigned)fd < FD_MAX && fd_table() ? calloc(1, sizeof *e) : NULL;

    if (!e) {
        return NULL;
    }
    e->refs = 1;
    e->fd = fd;
    e->outer = e->old_outer = e->bell = e->kick_fd = -1;
    for (uint32_t n = 0; n < SETS; n++) {
        struct epoll *none = NULL;

        e->index = ((uint32_t)fd + n) & (SETS - 1);
        if (atomic_compare_exchange_strong(&sets[e->index], &none, e)) {
            if (e->index >= sets_top) {
                sets_top = e->index + 1;
            }
            fd_mark(fd, (uint32_t)FD_EPOLL | e->index);
            return e;
        }
    }
    free(e);
    return NULL;
}

void epoll_dup(int fd, int copy)
{
    struct epoll *e = epoll_of(fd);

    if (e) {
        e->refs++;
        fd_mark(copy, (uint32_t)FD_EPOLL | e->index);
    }
}

static void end(struct epoll *e)
{
    while (e->items) {
        item_drop(e->items);
    }
    while (e->parents) {
        item_drop(e->parents);
    }
    if (e->asleep) { /* in Linux they would sleep on; these find that the set is closed */
        ring(e->bell);
    }
    fd_unhide(e->outer);
    fd_unhide(e->old_outer);
    fd_unhide(e->kick_fd);
    bell_close(e->bell);
    e->outer = e->old_outer = e->kick_fd = e->bell = -1;
    e->kicking = false;
    atomic_store(&sets[e->index], NULL);
    if (e->asleep == 0 && e->plain == 0) {
        free(e); /* else it is lost: threads look at it when they wake up */
    }
}

void epoll_close(int fd)
{
    struct epoll *e = epoll_of(fd);
    bool locked = e && me.attached > 0;

    if (locked) {
        enter();
        e = epoll_of(fd); /* in a child this was the first time that the lock was taken */
    }
    fd_mark(fd, 0);
    if (e && --e->refs == 0) {
        end(e);
    } else if (e && e->fd == fd) {
        for (int other = 0; other < me.fd_top; other++) {
            e->fd = epoll_of(other) == e ? other : e->fd;
        }
    }
    if (locked) {
        leave();
    }
}

/* ---- Items -------------------------------------------------------------------------------------------------- */
static struct item *item_at(uint32_t index) { return chunks[index >> ITEM_BITS] + (index & (ITEM_CHUNK - 1)); }

struct item *item_by_id(uint64_t id)
{
    struct item *i = (uint32_t)id < items_bump ? item_at((uint32_t)id) : NULL;

    return i && i->set && i->generation == id >> 32 ? i : NULL;
}

static struct item *item_get(void)
{
    struct item *i = items_free;
    uint32_t chunk = items_bump >> ITEM_BITS;

    if (i) {
        items_free = i->next;
        return i;
    }
    if (chunk == ITEM_CHUNKS || (!chunks[chunk] && !(chunks[chunk] = calloc(ITEM_CHUNK, sizeof *i)))) {
        return NULL;
    }
    i = item_at(items_bump);
    i->index = items_bump++;
    return i;
}

static struct item **list_of(const struct item *i)
{
    return i->inner ? &i->inner->parents : &me.local[i->object].items;
}

struct item *item_new(struct epoll *e, uint32_t object, struct epoll *inner, int fd, const struct epoll_event *ev)
{
    struct item *i = item_get();

    if (!i) {
        return NULL;
    }
    *i = (struct item){.index = i->index,
                       .generation = i->generation,
                       .set = e,
                       .inner = inner,
                       .object = object,
                       .fd = fd,
                       .half = HALF_KERNEL};
    item_arm(i, ev);
    i->next = *list_of(i);
    *list_of(i) = i;
    i->set_next = e->items;
    i->set_prev = &e->items;
    if (e->items) {
        e->items->set_prev = &i->set_next;
    }
    e->items = i;
    return i;
}

void item_arm(struct item *i, const struct epoll_event *ev)
{
    i->wanted = (ev->events & ~(uint32_t)ITEM_FLAGS) | EPOLLERR | EPOLLHUP;
    i->flags = ev->events & (uint32_t)ITEM_FLAGS;
    i->data = ev->data;
}

struct item *item_find(const struct epoll *e, uint32_t object, const struct epoll *inner, int fd)
{
    struct item *i = inner ? inner->parents : me.local[object].items;

    while (i && (i->set != e || i->fd != fd)) {
        i = i->next;
    }
    return i;
}

void item_drop(struct item *i)
{
    struct item **at = list_of(i);

    item_unqueue(i);
    while (*at != i) {
        at = &(*at)->next;
    }
    *at = i->next;
    *i->set_prev = i->set_next;
    if (i->set_next) {
        i->set_next->set_prev = i->set_prev;
    }
    if (i->half != HALF_KERNEL) {
        i->set->ours--;
    }
    i->set = NULL;
    /* The highest are no generation: OUTER_REAL and its like must not look like an item. */
    i->generation = (i->generation + 1) & 0x7fffffff;
    i->next = items_free;
    items_free = i;
}

void item_queue(struct item *i)
{
    struct epoll *e = i->set;

    if (i->queued) {
        return;
    }
    i->queued = true;
    i->ready_next = NULL;
    i->ready_prev = e->tail;
    *(e->tail ? &e->tail->ready_next : &e->head) = i;
    e->tail = i;
}

void item_unqueue(struct item *i)
{
    if (i->queued) {
        *(i->ready_prev ? &i->ready_prev->ready_next : &i->set->head) = i->ready_next;
        *(i->ready_next ? &i->ready_next->ready_prev : &i->set->tail) = i->ready_prev;
        i->queued = false;
    }
}

/* ---- The outer set ------------------------------------------------------------------------------------------ */
static int outer_add(const struct epoll *e, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event ev = {.events = events, .data.u64 = data};

    return real.epoll_ctl(e->outer, EPOLL_CTL_ADD, fd, &ev) < 0 ? -errno : 0;
}

int item_kernel_half(struct item *i, int op)
{
    struct epoll_event ev = {.events = (i->wanted & KERNEL_HALF) | (i->flags & ~(uint32_t)EPOLLWAKEUP),
                             .data.u64 = (uint64_t)i->generation << 32 | i->index};
    int fd = i->inner ? i->inner->outer : i->fd;

    if (i->inner) {
        ev.events = i->wanted ? EPOLLIN | EPOLLET : 0; /* each turn of the nested set is looked into anyway */
    }
    return real.epoll_ctl(i->set->outer, op, fd, &ev) < 0 ? -errno : 0;
}

static int outer_fill(struct epoll *e)
{
    int err = outer_add(e, e->fd, EPOLLIN, OUTER_REAL);

    e->deaf = false;

    err = err < 0 ? err : outer_add(e, e->bell, EPOLLIN | EPOLLET, OUTER_BELL);
    for (int i = 0; i < me.watch_count && err == 0; i++) {
        err = outer_add(e, me.watch_fds[i], EPOLLIN | (me.watch_shared[i] ? EPOLLEXCLUSIVE : 0),
                        me.watch_fds[i] == me.wake_fd ? OUTER_WAKE : OUTER_DEVICE);
    }
    for (struct item *i = e->items; i; i = i->set_next) {
        if (i->half == HALF_BOTH && (!i->inner || epoll_outer(i->inner) == 0)) {
            item_kernel_half(i, EPOLL_CTL_ADD);
        }
    }
    return err;
}

void epoll_devices(struct epoll *e, bool on)
{
    if (likely(e->deaf == !on)) {
        return;
    }
    e->deaf = !on;
    for (int i = 0; i < me.watch_count; i++) {
        if (me.watch_fds[i] == me.wake_fd) {
            continue;
        }
        if (on) {
            outer_add(e, me.watch_fds[i], EPOLLIN | (me.watch_shared[i] ? EPOLLEXCLUSIVE : 0), OUTER_DEVICE);
        } else {
            real.epoll_ctl(e->outer, EPOLL_CTL_DEL, me.watch_fds[i], NULL);
        }
    }
}

void epoll_watch(int fd)
{
    for (uint32_t n = 0; n < sets_top; n++) {
        struct epoll *e = sets[n];

        if (e && e->outer >= 0) {
            outer_add(e, fd, EPOLLIN | EPOLLEXCLUSIVE, OUTER_DEVICE);
        }
    }
}

int epoll_outer(struct epoll *e)
{
    int err;

    if (likely(e->outer >= 0)) {
        return 0;
    }
    e->outer = fd_hide(real.epoll_create1(EPOLL_CLOEXEC));
    err = e->outer < 0 ? -errno : 0;
    if (err == 0 && e->bell < 0) {
        e->bell = bell_open();
        err = e->bell < 0 ? -errno : 0;
    }
    err = err < 0 ? err : outer_fill(e);
    if (err < 0 && e->outer >= 0) {
        fd_unhide(e->outer);
        e->outer = -1;
    }
    return err;
}

/* Threads may sleep in the old one: it stays until they have left, which its bell makes them do, one after another. */
void epoll_renew(struct epoll *e)
{
    struct epoll_event level = {.events = EPOLLIN, .data.u64 = OUTER_BELL};
    int old = e->outer;

    if (e->old_outer >= 0) {
        return; /* not yet */
    }
    e->outer = -1;
    if (epoll_outer(e) < 0) {
        e->outer = old;
        return;
    }
    for (struct item *p = e->parents; p; p = p->next) {
        if (p->half == HALF_BOTH) {
            item_kernel_half(p, EPOLL_CTL_ADD);
        }
    }
    real.epoll_ctl(old, EPOLL_CTL_MOD, e->bell, &level);
    e->old_outer = old;
    epoll_sleeper(e, 0);
    if (e->old_outer >= 0) {
        ring(e->bell);
    }
}

void epoll_sleeper(struct epoll *e, int count)
{
    e->asleep += (uint32_t)count;
    if (e->asleep == 0 && unlikely(e->old_outer >= 0)) {
        fd_unhide(e->old_outer);
        e->old_outer = -1;
    }
}

/* ---- Threads that sleep in the program's set itself --------------------------------------------------------------
 *
 * They went to sleep when all its members were the kernel's, and must come out now. A ready member that is armed for one
 * event is added, with data that nobody else has (random); who gets it takes it out of what the program sees, and arms it
 * for the next one. Not for ever: a thread may have left by siglongjmp() and be counted still. */
static void kick(struct epoll *e)
{
    struct epoll_event ev = {.events = EPOLLIN | EPOLLONESHOT};

    if (e->kicking || e->plain == 0) {
        return;
    }
    e->kick_fd = fd_hide(eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK));
    if (e->kick_fd < 0 || getrandom(&e->kick_data, sizeof e->kick_data, 0) != sizeof e->kick_data) {
        return;
    }
    ev.data.u64 = e->kick_data;
    e->kick_until_ns = clock_ns() + KICK_NS;
    e->kicking = true;
    real.epoll_ctl(e->fd, EPOLL_CTL_ADD, e->kick_fd, &ev);
}

int epoll_unkick(struct epoll *e, struct epoll_event *events, int n)
{
    struct epoll_event again = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = e->kick_data};
    int at = 0;

    while (at < n && (events[at].data.u64 != e->kick_data || events[at].events != EPOLLIN)) {
        at++;
    }
    if (!e->kicking || at >= n) {
        return n;
    }
    events[at] = events[n - 1];
    if (e->plain && clock_ns() < e->kick_until_ns) {
        real.epoll_ctl(e->fd, EPOLL_CTL_MOD, e->kick_fd, &again);
    } else {
        real.epoll_ctl(e->fd, EPOLL_CTL_DEL, e->kick_fd, NULL);
        fd_unhide(e->kick_fd);
        e->kick_fd = -1;
        e->kicking = false;
    }
    return n - 1;
}

/* ---- Members change sides ------------------------------------------------------------------------------------- */
static int nest(struct item *i);

/* One item more that is ours. */
static int join(struct epoll *e)
{
    int err = epoll_outer(e);

    if (err == 0 && atomic_fetch_add(&e->ours, 1) == 0) {
        kick(e);
        for (struct item *p = e->parents; p; p = p->next) {
            nest(p);
        }
    }
    return err;
}

/* The nested set has items of ours: its readiness is no longer the kernel's. */
static int nest(struct item *i)
{
    int err = i->half == HALF_KERNEL ? join(i->set) : 0;

    if (err < 0 || i->half != HALF_KERNEL) {
        return err;
    }
    i->half = HALF_BOTH;
    real.epoll_ctl(i->set->fd, EPOLL_CTL_DEL, i->fd, NULL);
    err = item_kernel_half(i, EPOLL_CTL_ADD);
    item_check(i);
    return err;
}

int item_ours(struct item *i)
{
    bool both = !i->inner && group_object(me.g, i->object)->place == PLACE_BOTH;
    int err;

    if (i->inner) {
        return i->inner->ours ? nest(i) : 0;
    }
    err = i->half == HALF_KERNEL ? join(i->set) : 0;
    if (err < 0) {
        return err;
    }
    if (both) {
        err = item_kernel_half(i, EPOLL_CTL_ADD);
    } else if (i->half == HALF_BOTH) {
        item_kernel_half(i, EPOLL_CTL_DEL);
    }
    if (err < 0) {
        i->set->ours -= i->half == HALF_KERNEL;
        return err;
    }
    i->half = both ? HALF_BOTH : HALF_STACK;
    object_wait(i->object);
    item_check(i);
    return 0;
}

/* The object turned out to be the kernel's: its members of the program's sets, too. */
static void item_theirs(struct item *i)
{
    struct epoll_event ev = {.events = (i->wanted & ~(uint32_t)(EPOLLERR | EPOLLHUP)) | i->flags, .data = i->data};

    if (i->half == HALF_BOTH) {
        item_kernel_half(i, EPOLL_CTL_DEL);
    }
    if (i->half != HALF_KERNEL) {
        real.epoll_ctl(i->set->fd, EPOLL_CTL_ADD, i->fd, &ev);
    }
    item_drop(i);
}

void epoll_placed(uint32_t object, int fd)
{
    const struct object *o = group_object(me.g, object);

    (void)fd;
    for (struct item *i = me.local[object].items, *next; i; i = next) {
        next = i->next;
        if (o->place == PLACE_KERNEL) {
            item_theirs(i);
        } else if (o->place != PLACE_UNDECIDED && i->half != (o->place == PLACE_BOTH ? HALF_BOTH : HALF_STACK)) {
            if (i->half == HALF_KERNEL && fd_object(i->fd) == object) {
                real.epoll_ctl(i->set->fd, EPOLL_CTL_DEL, i->fd, NULL);
            }
            item_ours(i);
        }
    }
}

void epoll_forget(uint32_t object, int fd)
{
    struct item *i;

    if (me.local[object].fds) {
        return; /* epoll(7), question 6: the open file is still there, by another descriptor */
    }
    while ((i = me.local[object].items)) {
        /* Relatives and the broker may have the kernel's socket: it does not leave the outer set by itself. Where the
         * number is another's already (dup2()), epoll_renew() does it. */
        if (i->half == HALF_BOTH && i->fd == fd) {
            item_kernel_half(i, EPOLL_CTL_DEL);
        }
        item_drop(i);
    }
}

/* The kernel's sets are shared with the parent; items, outer sets and bells are this process' own from now on. What was
 * told and what was not is copied with them. */
void epoll_child(void)
{
    for (uint32_t n = 0; n < sets_top; n++) {
        struct epoll *e = sets[n];

        if (e) {
            fd_unhide(e->outer);
            fd_unhide(e->old_outer);
            fd_unhide(e->bell);
            e->outer = e->old_outer = e->bell = -1;
            e->asleep = e->plain = 0;
            e->rung = e->kernel_ready = false;
        }
    }
}

/* ---- Waking -------------------------------------------------------------------------------------------------- */
void epoll_alert(struct epoll *e)
{
    bool heard = e->rung || e->asleep == 0;

    for (struct sleeper *s = me.sleepers; s; s = s->next) {
        if (s->epoll == e && s->spinning && !heard) {
            s->woken = heard = true;
        } else if (s->object == GROUP_NONE && !s->epoll) {
            wake(s); /* in poll(), maybe on this set */
        }
    }
    if (!heard) {
        e->rung = true;
        ring(e->bell);
    }
    for (struct item *p = e->parents; p; p = p->next) {
        if (p->half == HALF_BOTH && p->wanted) {
            item_queue(p);
            epoll_alert(p->set);
        }
    }
}

void item_check(struct item *i)
{
    if (i->half != HALF_KERNEL && item_ready(i)) {
        item_queue(i);
        epoll_alert(i->set);
    }
}

void epoll_ready(uint32_t object, uint32_t bits)
{
    for (struct item *i = me.local[object].items; i; i = i->next) {
        if (i->half != HALF_KERNEL && (bits & i->wanted)) {
            item_queue(i);
            epoll_alert(i->set);
        }
    }
}
