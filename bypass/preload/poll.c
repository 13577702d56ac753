/* SPDX-License-Identifier: Apache-2.0 */
/*
 * poll.c - poll(), ppoll(), select(), pselect() over descriptors of both sides. Without one of the stack's the call is the
 * kernel's. select() is poll() with its sets turned into a list (select(2), "Correspondence between select() and poll()").
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "epoll.h"

enum {
    OURS = PARKS, /* entries in front of the kernel's list: park_polling()'s */
    SMALL = 128,  /* lists up to here lie on the stack */
    READ_BITS = POLLIN | POLLRDNORM | POLLRDBAND,
    WRITE_BITS = POLLOUT | POLLWRNORM | POLLWRBAND,
    ALWAYS = POLLERR | POLLHUP | POLLNVAL,
};

struct polled {
    struct pollfd *fds;
    nfds_t n;
    struct pollfd *kernel; /* OURS + what the kernel is asked for */
    nfds_t *at;            /* the fds that these are of */
    int kernels;
    bool select;     /* what is ready is what select() means by it */
    uint32_t object; /* the only one of the stack's; GROUP_NONE */
};

/* Without the lock: some descriptor may be the stack's, or a set that may get one of the stack's meanwhile. */
static bool any_ours(const struct pollfd *fds, nfds_t n)
{
    for (nfds_t i = 0; i < n; i++) {
        if (fd_on_stack(fds[i].fd) || (me.attached > 0 && epoll_of(fds[i].fd))) {
            return true;
        }
    }
    return false;
}

/* What of p->revents the program asked for. A set for reading has POLLHUP, one for writing has not. */
static short counts(const struct pollfd *p, bool select)
{
    short bits = POLLNVAL;

    if (!select) {
        return p->revents & (short)(p->events | ALWAYS);
    }
    bits |= p->events & POLLIN ? READ_BITS | POLLHUP | POLLERR : 0;
    bits |= p->events & POLLOUT ? WRITE_BITS | POLLERR : 0;
    bits |= p->events & POLLPRI ? POLLPRI : 0;
    return p->revents & bits;
}

static struct object *served(int fd)
{
    uint32_t object = fd_object(fd);
    struct object *o = object == GROUP_NONE ? NULL : group_object(me.g, object);

    return o && (o->place == PLACE_STACK || o->place == PLACE_BOTH) ? o : NULL;
}

static void ask_kernel(struct polled *p, nfds_t at, int fd, short events)
{
    p->at[p->kernels] = at;
    p->kernel[OURS + p->kernels++] = (struct pollfd){.fd = fd, .events = events};
}

/* Whom to ask about each. */
static void sort(struct polled *p)
{
    int objects = 0;

    p->object = GROUP_NONE;
    for (nfds_t i = 0; i < p->n; i++) {
        const struct object *o = p->fds[i].fd < 0 ? NULL : served(p->fds[i].fd);
        struct epoll *e = o ? NULL : epoll_of(p->fds[i].fd);

        p->fds[i].revents = 0;
        if (o) {
            p->object = object_index(o);
            objects++;
            object_wait(object_index(o));
            if (o->place == PLACE_BOTH) { /* the kernel's half; room to send is the stack's word */
                ask_kernel(p, i, p->fds[i].fd, p->fds[i].events & ~WRITE_BITS);
            }
        } else if (e && epoll_outer(e) == 0) {
            objects += 2; /* nothing tells which object it will be */
            ask_kernel(p, i, e->outer, POLLIN);
        } else if (p->fds[i].fd >= 0) {
            ask_kernel(p, i, fd_hidden(p->fds[i].fd) ? FD_MAX : p->fds[i].fd, p->fds[i].events);
        }
    }
    if (objects != 1) {
        p->object = GROUP_NONE;
    }
}

/* The stack's say. */
static int look_here(struct polled *p)
{
    int ready = 0;

    for (nfds_t i = 0; i < p->n; i++) {
        struct pollfd *f = &p->fds[i];
        const struct object *o = f->fd < 0 ? NULL : served(f->fd);
        struct epoll *e = o ? NULL : epoll_of(f->fd);

        f->revents = 0;
        if (o) {
            f->revents = object_ready(o);
        } else if (e && e->outer >= 0 && (f->events & READ_BITS) && epoll_readable(e)) {
            f->revents = POLLIN | POLLRDNORM;
        }
        f->revents = counts(f, p->select);
        ready += f->revents != 0;
    }
    return ready;
}

/* The kernel's, added. -errno. */
static int look_there(struct polled *p, int ready)
{
    const struct timespec now = {0};
    int got = p->kernels ? poll_kernel(p->kernel + OURS, p->kernels, &now, NULL) : 0;

    for (int k = 0; got > 0 && k < p->kernels; k++) {
        struct pollfd *f = &p->fds[p->at[k]], *said = &p->kernel[OURS + k];
        const struct epoll *e;
        short before = f->revents;

        if (said->revents == 0 || ((e = epoll_of(f->fd)) && e->outer >= 0 && !(said->revents & POLLNVAL))) {
            continue; /* a set has told by look_here() */
        }
        f->revents |= said->revents;
        f->revents = counts(f, p->select);
        ready += !before && f->revents;
        if (!f->revents) {
            said->fd = -1; /* select() does not mean that: it would not let us sleep */
        }
    }
    return got < 0 ? got : ready;
}

/* Lock held. Number of fds ready; -errno. */
static int wait_many(struct polled *p, uint64_t until_ns, const sigset_t *mask)
{
    struct sleeper s = {0};
    int ready;

    sort(p);
    s.object = p->object;
    for (;;) {
        int got;

        turn();
        me.turn_ns = me.g->turn_ns;
        ready = look_there(p, look_here(p));
        if (ready != 0 || until_ns == 0) {
            return ready;
        }
        got = park_polling(&s, p->kernel, p->kernels, until_ns, mask);
        if (got == -ETIMEDOUT) {
            until_ns = 0; /* once more without sleeping */
        } else if (got < 0) {
            return got;
        }
    }
}

static int poll_ours(struct pollfd *fds, nfds_t n, bool select, uint64_t until_ns, const sigset_t *mask)
{
    struct pollfd small[SMALL + OURS];
    nfds_t small_at[SMALL];
    struct polled p = {.fds = fds, .n = n, .kernel = small, .at = small_at, .select = select};
    struct rlimit limit = {.rlim_cur = n};
    void *large = NULL;
    int r;

    if (n > SMALL) {
        getrlimit(RLIMIT_NOFILE, &limit);
        if (n > limit.rlim_cur) {
            return -EINVAL;
        }
        large = malloc((n + OURS) * sizeof *p.kernel + n * sizeof *p.at);
        if (!large) {
            return -ENOMEM;
        }
        p.kernel = large;
        p.at = (nfds_t *)(p.kernel + n + OURS);
    }
    enter();
    r = wait_many(&p, until_ns, mask);
    leave();
    free(large);
    return r;
}

/* ---- poll(2) ------------------------------------------------------------------------------------------------------- */
static uint64_t until_of(const struct timespec *ts)
{
    if (!ts || ts->tv_sec > INT32_MAX) {
        return UINT64_MAX;
    }
    if (ts->tv_sec == 0 && ts->tv_nsec == 0) {
        return 0;
    }
    return clock_ns() + (uint64_t)ts->tv_sec * 1000000000u + (uint64_t)ts->tv_nsec;
}

static bool bad_time(const struct timespec *ts)
{
    return ts && (ts->tv_sec < 0 || ts->tv_nsec < 0 || ts->tv_nsec >= 1000000000);
}

EXPORT int poll(struct pollfd *fds, nfds_t n, int timeout)
{
    real_load();
    if (n == 0 || bad_pointer(fds) || !any_ours(fds, n)) {
        return real.poll(fds, n, timeout);
    }
    return result(poll_ours(fds, n, false,
                            timeout < 0    ? UINT64_MAX
                            : timeout == 0 ? 0
                                           : clock_ns() + (uint64_t)timeout * 1000000u,
                            NULL));
}

EXPORT int ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout, const sigset_t *mask)
{
    real_load();
    if (n == 0 || bad_pointer(fds) || bad_time(timeout) || !any_ours(fds, n)) {
        return real.ppoll(fds, n, timeout, mask);
    }
    return result(poll_ours(fds, n, false, until_of(timeout), mask));
}

/* What programs call that were compiled with _FORTIFY_SOURCE; size: of the array at fds, in bytes. */
extern void __chk_fail(void) __attribute__((noreturn));

EXPORT int __poll_chk(struct pollfd *fds, nfds_t n, int timeout, size_t size)
{
    if (size / sizeof *fds < n) {
        __chk_fail();
    }
    return poll(fds, n, timeout);
}

EXPORT int __ppoll_chk(struct pollfd *fds, nfds_t n, const struct timespec *timeout, const sigset_t *mask, size_t size)
{
    if (size / sizeof *fds < n) {
        __chk_fail();
    }
    return ppoll(fds, n, timeout, mask);
}

EXPORT int __poll(struct pollfd *fds, nfds_t n, int timeout) { return poll(fds, n, timeout); }

/* ---- select(2) ------------------------------------------------------------------------------------------------------ */
enum { WORD = 8 * sizeof(unsigned long) };

/* Programs may have sets of more than FD_SETSIZE bits: read and written as words, as the kernel does. */
static bool has(const fd_set *set, int fd) { return set && (((const unsigned long *)set)[fd / WORD] >> fd % WORD & 1); }

static void put(fd_set *set, int fd) { ((unsigned long *)set)[fd / WORD] |= 1ul << fd % WORD; }

static short asked(int fd, const fd_set *in, const fd_set *out, const fd_set *ex)
{
    return (short)((has(in, fd) ? READ_BITS : 0) | (has(out, fd) ? WRITE_BITS : 0) | (has(ex, fd) ? POLLPRI : 0));
}

static bool select_ours(int n, const fd_set *in, const fd_set *out, const fd_set *ex)
{
    for (int fd = 0; fd < n; fd++) {
        if (fd_entry(fd) && asked(fd, in, out, ex)) {
            struct pollfd p = {.fd = fd};

            if (any_ours(&p, 1)) {
                return true;
            }
        }
    }
    return false;
}

static int answer(const struct pollfd *fds, nfds_t count, int n, fd_set *sets[3])
{
    static const short means[3] = {READ_BITS | POLLHUP | POLLERR, WRITE_BITS | POLLERR, POLLPRI};
    static const short asks[3] = {POLLIN, POLLOUT, POLLPRI};
    int ready = 0;

    for (nfds_t i = 0; i < count; i++) {
        if (fds[i].revents & POLLNVAL) {
            return -EBADF; /* the sets stay as they are */
        }
    }
    for (int k = 0; k < 3; k++) {
        if (sets[k]) {
            memset(sets[k], 0, ((size_t)n + WORD - 1) / WORD * sizeof(unsigned long));
        }
        for (nfds_t i = 0; i < count; i++) {
            if ((fds[i].events & asks[k]) && (fds[i].revents & means[k])) {
                put(sets[k], fds[i].fd);
                ready++;
            }
        }
    }
    return ready;
}

/* -EINVAL: a timeout that makes no sense. */
static int select_many(int n, fd_set *sets[3], const struct timespec *timeout, const sigset_t *mask)
{
    struct pollfd small[SMALL], *fds = n > SMALL ? malloc((size_t)n * sizeof *fds) : small;
    nfds_t count = 0;
    int r;

    if (!fds) {
        return -ENOMEM;
    }
    for (int fd = 0; fd < n; fd++) {
        short events = asked(fd, sets[0], sets[1], sets[2]);

        if (events) {
            fds[count++] = (struct pollfd){.fd = fd, .events = events};
        }
    }
    r = poll_ours(fds, count, true, until_of(timeout), mask);
    if (r >= 0) {
        r = answer(fds, count, n, sets);
    }
    if (fds != small) {
        free(fds);
    }
    return r;
}

EXPORT int pselect(int n, fd_set *in, fd_set *out, fd_set *ex, const struct timespec *timeout, const sigset_t *mask)
{
    fd_set *sets[3] = {in, out, ex};

    real_load();
    if (n <= 0 || n > FD_MAX || bad_time(timeout) || !select_ours(n, in, out, ex)) {
        return real.pselect(n, in, out, ex, timeout, mask);
    }
    return result(select_many(n, sets, timeout, mask));
}

EXPORT int select(int n, fd_set *in, fd_set *out, fd_set *ex, struct timeval *timeout)
{
    fd_set *sets[3] = {in, out, ex};
    struct timespec ts = {0};
    uint64_t until, now;
    int r;

    real_load();
    if (n <= 0 || n > FD_MAX || (timeout && (timeout->tv_sec < 0 || timeout->tv_usec < 0)) ||
        !select_ours(n, in, out, ex)) {
        return real.select(n, in, out, ex, timeout);
    }
    if (timeout) { /* microseconds may be more than a second's */
        ts.tv_sec = timeout->tv_sec + timeout->tv_usec / 1000000;
        ts.tv_nsec = timeout->tv_usec % 1000000 * 1000;
    }
    until = timeout ? until_of(&ts) : 0;
    r = select_many(n, sets, timeout ? &ts : NULL, NULL);
    if (timeout && until != UINT64_MAX) { /* Linux tells what is left of it */
        now = until ? clock_ns() : 0;
        now = until > now ? until - now : 0;
        timeout->tv_sec = (time_t)(now / 1000000000u);
        timeout->tv_usec = (suseconds_t)(now % 1000000000u / 1000u);
    }
    return result(r);
}

EXPORT int __select(int n, fd_set *in, fd_set *out, fd_set *ex, struct timeval *timeout)
{
    return select(n, in, out, ex, timeout);
}
