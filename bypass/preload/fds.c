/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fds.c - descriptors and objects: which object a descriptor names, and when an object ends. A descriptor is always a
 * real one of the kernel's; this table says what it means on the stack.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "preload.h"

enum { HIDE_ABOVE = 3800 }; /* where the library's own descriptors lie, if the limit allows */

uint32_t object_index(const struct object *o) { return (uint32_t)(o - group_object(me.g, 0)); }

static inline bool entry_is_object(uint32_t v) { return v != 0 && !(v & (FD_EPOLL | FD_HIDDEN)); }
static inline uint32_t entry_object(uint32_t v) { return (v & ~(uint32_t)(FD_KERNEL | FD_HIDDEN)) - 1; }

void fd_mark(int fd, uint32_t entry)
{
    if ((unsigned)fd >= FD_MAX || !me.table) {
        return;
    }
    atomic_store_explicit(&me.table[fd], entry, memory_order_relaxed);
    if (entry && fd >= me.fd_top) {
        me.fd_top = fd + 1;
    }
}

uint32_t fd_object(int fd)
{
    uint32_t v = fd_entry(fd);

    return entry_is_object(v) ? entry_object(v) : GROUP_NONE;
}

static inline struct object *enter_with(int fd, void (*take)(void))
{
    uint32_t v = fd_entry(fd);

    if (likely(!entry_is_object(v)) || unlikely(me.halted_by == &self && me.gone)) {
        return NULL; /* goodbye() has given them away; only the thread that called it gets here then */
    }
    take();
    v = fd_entry(fd); /* another thread may have closed it */
    if (!entry_is_object(v)) {
        leave();
        return NULL;
    }
    return group_object(me.g, entry_object(v));
}

struct object *fd_enter_any(int fd) { return enter_with(fd, enter); }
struct object *fd_enter_quietly(int fd) { return enter_with(fd, enter_quietly); }

struct object *fd_enter(int fd)
{
    struct object *o;

    if (unlikely(me.cancels) && fd_entry(fd) != 0) {
        pthread_testcancel(); /* most callers are cancellation points (pthreads(7)), and have done nothing yet */
    }
    o = fd_on_stack(fd) ? fd_enter_any(fd) : NULL;
    if (o && o->place != PLACE_STACK && o->place != PLACE_BOTH) {
        if (o->place == PLACE_KERNEL) {
            atomic_fetch_or_explicit(&me.table[fd], FD_KERNEL, memory_order_relaxed);
        }
        leave();
        return NULL;
    }
    return o;
}

/* This process has a descriptor less of an object. */
static void let_go(uint32_t object, int fd)
{
    me.local[object].fds--;
    if (me.local[object].items) {
        epoll_forget(object, fd);
    }
    object_put(object);
}

void fd_set_object(int fd, uint32_t object)
{
    uint32_t was = fd_entry(fd);

    if ((unsigned)fd >= FD_MAX) {
        return;
    }
    group_ref(me.g, object, me.proc);
    me.local[object].fds++;
    fd_mark(fd, (object + 1) | (group_object(me.g, object)->place == PLACE_KERNEL ? FD_KERNEL : 0));
    if (entry_is_object(was)) {
        let_go(entry_object(was), fd);
    }
}

void fd_forget(int fd)
{
    uint32_t v = fd_entry(fd);

    if (entry_is_object(v)) {
        fd_mark(fd, 0);
        let_go(entry_object(v), fd);
    }
}

void fd_fresh(int fd)
{
    if (unlikely(fd_entry(fd) != 0)) {
        if (fd_enter_any(fd)) {
            fd_forget(fd);
            leave();
        } else {
            fd_mark(fd, 0);
        }
    }
}

/* ---- The library's own -------------------------------------------------------------------------------------- */
int fd_hide(int fd)
{
    struct rlimit limit = {.rlim_cur = 1024};
    int above, high;

    if (fd < 0) {
        return fd;
    }
    getrlimit(RLIMIT_NOFILE, &limit);
    above = limit.rlim_cur > HIDE_ABOVE + 256 ? HIDE_ABOVE : (int)(limit.rlim_cur * 3 / 4);
    high = real.fcntl(fd, F_DUPFD_CLOEXEC, above);
    if (high >= 0) {
        real.close(fd);
        fd = high;
    }
    fd_mark(fd, FD_HIDDEN);
    return fd;
}

void fd_unhide(int fd)
{
    if (fd >= 0) {
        fd_mark(fd, 0);
        real.close(fd);
    }
}
