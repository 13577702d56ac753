/* SPDX-License-Identifier: Apache-2.0 */
/*
 * epoll_wait.c - what is ready in a set: the queue of items, and the kernel's half now and then.
 *
 * A call gives the stack a turn and takes from the queue. When the queue had nothing the thread sleeps, or, if it may not,
 * asks the kernel without sleeping. When the queue had something the kernel is asked, too; if it has had nothing for a
 * while, only every LOOK_CALLS calls or LOOK_NS: a system call for each event of the stack would cost more than the event.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <sys/syscall.h>

#include "epoll.h"

enum {
    LOOK_CALLS = 16,
    LOOK_NS = 100000,
    LOOK_EVENTS = 64,
    LOOK_EMPTY = 4, /* looks that found nothing: only then it is asked less often */
    MAX_EVENTS = INT_MAX / (int)sizeof(struct epoll_event),
    READABLE = EPOLLIN | EPOLLRDNORM,
};

/* Without sleeping, and no cancellation point. */
static int kernel_now(int set, struct epoll_event *out, int max)
{
    long n = real.syscall(SYS_epoll_pwait, set, out, max, 0, NULL, _NSIG / 8);

    return n < 0 ? -errno : (int)n;
}

/* ---- What the outer set tells ------------------------------------------------------------------------------------ */
static void absorb(struct epoll *e, const struct epoll_event *ev, int n)
{
    bool lost = false;

    e->looks++;
    e->looked_ns = me.g->turn_ns;
    e->kernel_ready = false;
    e->empty++;
    for (int at = 0; at < n; at++) {
        struct item *i;

        switch (ev[at].data.u64) {
        case OUTER_REAL:
            e->kernel_ready = true;
            e->empty = 0;
            break;
        case OUTER_BELL:
            e->rung = false;
            break;
        case OUTER_WAKE:
            drain(me.wake_fd);
            break;
        case OUTER_DEVICE: /* a turn sees what came */
            break;
        default:
            i = item_by_id(ev[at].data.u64);
            if (i && i->set == e) {
                e->empty = 0;
                i->kernel |= ev[at].events;
                i->look = e->looks;
                item_queue(i);
            }
            lost |= !i || i->set != e;
        }
    }
    if (unlikely(lost)) {
        epoll_renew(e);
    }
}

static void look(struct epoll *e)
{
    struct epoll_event ev[LOOK_EVENTS];

    absorb(e, ev, epoll_outer(e) == 0 ? kernel_now(e->outer, ev, LOOK_EVENTS) : 0);
}

/* ---- What is ready ------------------------------------------------------------------------------------------------ */

/* What its kernel half says now, when it said something in an earlier look. */
static uint32_t kernel_bits(struct item *i)
{
    struct pollfd p = {.fd = i->fd, .events = (short)i->kernel};
    const struct timespec now = {0};

    if (i->look != i->set->looks && fd_object(i->fd) == i->object) {
        poll_kernel(&p, 1, &now, NULL);
        i->kernel &= (uint16_t)p.revents;
        i->look = i->set->looks;
    }
    return i->kernel;
}

uint32_t item_ready(struct item *i)
{
    uint32_t bits;

    if (unlikely(i->wanted == 0)) {
        return 0;
    }
    if (i->inner) {
        bits = epoll_readable(i->inner) ? READABLE : 0;
    } else {
        bits = (uint16_t)object_ready(group_object(me.g, i->object));
        bits |= i->kernel ? kernel_bits(i) : 0;
    }
    return bits & i->wanted;
}

bool epoll_readable(struct epoll *e)
{
    look(e);
    while (!e->kernel_ready && e->head) {
        if (item_ready(e->head)) {
            return true;
        }
        e->head->kernel = 0;
        item_unqueue(e->head);
    }
    return e->kernel_ready;
}

/* From the queue, at most once round. Level-triggered items go behind the others, as in the kernel. */
static int collect(struct epoll *e, struct epoll_event *out, int max)
{
    const struct item *last = e->tail;
    int n = 0;

    for (bool more = last != NULL; more && n < max;) {
        struct item *i = e->head;
        uint32_t bits = item_ready(i);

        if (bits && unlikely(bad_pointer(out))) {
            return -EFAULT;
        }
        more = i != last;
        item_unqueue(i);
        i->kernel = 0;
        if (!bits) {
            continue;
        }
        out[n++] = (struct epoll_event){.events = bits, .data = i->data};
        if (i->flags & EPOLLONESHOT) {
            i->wanted = 0;
        } else if (!(i->flags & EPOLLET)) {
            item_queue(i);
        }
    }
    return n;
}

static int kernel_take(struct epoll *e, int epfd, struct epoll_event *out, int max)
{
    int n = kernel_now(epfd, out, max);

    e->kernel_ready = n == max; /* there may be more */
    return n > 0 && unlikely(e->kicking) ? epoll_unkick(e, out, n) : n;
}

/* Events of both sides; 0: there are none. looked: the outer set has just told. sleeps: the caller asks it next, since it
 * sleeps there, or does not if something is ready. */
static int take(struct epoll *e, int epfd, struct epoll_event *out, int max, bool looked, bool sleeps)
{
    int n = 0, more;

    if (!looked) {
        bool quiet = e->empty >= LOOK_EMPTY && me.g->turn_ns - e->looked_ns < LOOK_NS;

        if (e->head ? quiet && ++e->calls % LOOK_CALLS : sleeps) {
            n = collect(e, out, max);
            if (n != 0 || sleeps) {
                return n;
            }
        }
        look(e);
    }
    if (e->kernel_ready) { /* half of the room, or each other call, if the stack has something too */
        int share;

        e->odd = !e->odd;
        share = e->head ? max / 2 + (max & e->odd) : max;
        n = share ? kernel_take(e, epfd, out, share) : 0;
    }
    if (n < 0 || n == max) {
        return n;
    }
    more = collect(e, out + n, max - n);
    return more < 0 && n == 0 ? more : n + (more > 0 ? more : 0);
}

/* ---- Sleeping ---------------------------------------------------------------------------------------------------- */
struct rest {
    int outer;
    struct epoll_event ev[LOOK_EVENTS];
};

static int milliseconds(const struct timespec *ts)
{
    int64_t ms = !ts                               ? -1
                 : ts->tv_sec > INT_MAX / 1000 - 1 ? INT_MAX
                                                   : ts->tv_sec * 1000 + (ts->tv_nsec + 999999) / 1000000;

    return (int)ms;
}

/* epoll_pwait2() where there is one: glibc 2.35, Linux 5.11. */
static int kernel_wait(int set, struct epoll_event *out, int max, const struct timespec *ts, const sigset_t *mask)
{
    static bool lacking;
    int n = -1;

    if (real.epoll_pwait2 && !lacking) {
        n = real.epoll_pwait2(set, out, max, ts, mask);
        lacking = n < 0 && errno == ENOSYS;
    }
    if (!real.epoll_pwait2 || lacking) {
        n = real.epoll_pwait(set, out, max, milliseconds(ts), mask);
    }
    return n < 0 ? -errno : n;
}

static int doze(void *arg, const struct timespec *ts, const sigset_t *mask)
{
    struct rest *r = arg;

    if (ts && ts->tv_sec == 0 && ts->tv_nsec == 0) {
        return kernel_now(r->outer, r->ev, LOOK_EVENTS);
    }
    return kernel_wait(r->outer, r->ev, LOOK_EVENTS, ts, mask);
}

/* What is to wake the threads in the program's set wakes this one too, and they have to be faster once. */
static void let_others_wake(void)
{
    const struct timespec nap = {.tv_nsec = 100000};

    leave();
    nanosleep(&nap, NULL);
    enter();
}

/* Lock held. until_ns 0: does not wait. */
static int wait_ours(struct epoll *e, int epfd, struct epoll_event *out, int max, uint64_t until_ns,
                     const sigset_t *mask)
{
    struct sleeper s = {.object = GROUP_NONE, .epoll = e};
    struct rest rest;
    bool looked = false;

    for (;;) {
        int n, got;

        turn();
        me.turn_ns = me.g->turn_ns;
        n = take(e, epfd, out, max, looked, until_ns != 0);
        if (e->head && e->asleep) {
            epoll_alert(e); /* there is more than this thread takes */
        }
        if (n != 0 || until_ns == 0) {
            return n;
        }
        if (unlikely(e->kicking)) {
            let_others_wake();
        }
        got = epoll_outer(e);
        if (got < 0) {
            return got;
        }
        rest.outer = e->outer;
        s.wake_fd = e->bell;
        got = park_by(&s, doze, &rest, until_ns, mask);
        if (e->refs == 0) {
            return -EBADF;
        }
        looked = got > 0;
        if (got > 0) {
            absorb(e, rest.ev, got);
        } else if (got == -ETIMEDOUT) {
            until_ns = 0; /* once more without sleeping */
        } else if (got < 0) {
            return got;
        }
    }
}

/* ---- The calls ----------------------------------------------------------------------------------------------------- */
struct wait {
    int epfd, max;
    struct epoll_event *out;
    enum { WAIT, PWAIT, PWAIT2 } call;
    int ms;
    const struct timespec *ts;
    const sigset_t *mask;
};

static int real_wait(const struct wait *w)
{
    switch (w->call) {
    case WAIT:
        return real.epoll_wait(w->epfd, w->out, w->max, w->ms);
    case PWAIT:
        return real.epoll_pwait(w->epfd, w->out, w->max, w->ms, w->mask);
    default:
        if (!real.epoll_pwait2) {
            errno = ENOSYS;
            return -1;
        }
        return real.epoll_pwait2(w->epfd, w->out, w->max, w->ts, w->mask);
    }
}

static void plain_over(void *e) { ((struct epoll *)e)->plain--; }

/* All members are the kernel's. PLACE_REAL - 1 is no result of epoll_wait(), so: -EAGAIN, some are not any more. */
static int wait_plain(struct epoll *e, const struct wait *w)
{
    volatile int n = -EAGAIN;

    e->plain++;
    if (e->ours == 0) { /* after `plain`: who adds one looks there (kick()) */
        pthread_cleanup_push(plain_over, e);
        n = real_wait(w);
        n = n < 0 ? -errno : n;
        pthread_cleanup_pop(0);
    }
    e->plain--;
    if (n > 0 && unlikely(e->kicking)) {
        enter();
        n = epoll_unkick(e, w->out, n);
        leave();
        n = n ? n : -EAGAIN;
    }
    return n;
}

static uint64_t until_of(const struct wait *w)
{
    uint64_t ns;

    if (w->call == PWAIT2 ? !w->ts : w->ms < 0) {
        return UINT64_MAX;
    }
    if (w->call != PWAIT2) {
        ns = (uint64_t)w->ms * 1000000u;
    } else if (w->ts->tv_sec > INT_MAX) {
        return UINT64_MAX;
    } else {
        ns = (uint64_t)w->ts->tv_sec * 1000000000u + (uint64_t)w->ts->tv_nsec;
    }
    return ns ? clock_ns() + ns : 0;
}

static bool bad_time(const struct wait *w)
{
    const struct timespec *ts = w->call == PWAIT2 ? w->ts : NULL;

    return ts && (ts->tv_sec < 0 || ts->tv_nsec < 0 || ts->tv_nsec >= 1000000000);
}

static int wait_call(const struct wait *w)
{
    struct epoll *e;
    uint64_t until;
    int n;

    real_load();
    if (fd_hidden(w->epfd)) {
        return -EBADF;
    }
    e = epoll_of(w->epfd);
    if (!e || w->max <= 0 || w->max > MAX_EVENTS || bad_time(w)) {
        n = real_wait(w);
        return n < 0 ? -errno : n;
    }
    until = until_of(w);
    if (e->ours == 0) {
        n = wait_plain(e, w);
        if (n != -EAGAIN) {
            return n;
        }
    }
    enter();
    if (epoll_of(w->epfd) == e) {
        n = wait_ours(e, w->epfd, w->out, w->max, until, w->mask);
    } else {
        n = -EBADF;
    }
    leave();
    return n;
}

EXPORT int epoll_wait(int epfd, struct epoll_event *events, int max, int timeout)
{
    return result(wait_call(&(struct wait){.epfd = epfd, .out = events, .max = max, .call = WAIT, .ms = timeout}));
}

EXPORT int epoll_pwait(int epfd, struct epoll_event *events, int max, int timeout, const sigset_t *mask)
{
    return result(
        wait_call(&(struct wait){.epfd = epfd, .out = events, .max = max, .call = PWAIT, .ms = timeout, .mask = mask}));
}

EXPORT int epoll_pwait2(int epfd, struct epoll_event *events, int max, const struct timespec *timeout,
                        const sigset_t *mask)
{
    return result(wait_call(
        &(struct wait){.epfd = epfd, .out = events, .max = max, .call = PWAIT2, .ts = timeout, .mask = mask}));
}
