/* SPDX-License-Identifier: Apache-2.0 */
/*
 * park.c - how threads sleep, and drive while they wait.
 *
 * One sleeper of a process watches the device for all of them (me.watcher). The others sleep until a turn (drive.c) finds
 * something for them, and rings their bell (wake.c). When the watcher leaves, another sleeper is woken and takes over; but
 * where threads are soon back (soon_back()), nobody is: the next of those that were woken for something watches when it
 * sleeps again. A thread that waits in accept() then sees nothing of what comes for the others.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload.h"

enum {
    SPIN_LOOK = 16, /* rounds of spin() */
};

/* Whether this thread had been woken for something; for how long it was awake then goes into the average. */
static bool came_back(void)
{
    int64_t away;

    if (!self.fed_ns) {
        return false;
    }
    away = (int64_t)(clock_ns() - self.fed_ns);
    me.away_ns += ((away < TICK_NS ? away : TICK_NS) - me.away_ns) / 8;
    self.fed_ns = 0;
    return true;
}

static void sleeper_add(struct sleeper *s)
{
    bool back = came_back();

    s->woken = s->watching = s->spinning = false;
    s->next = me.sleepers;
    s->prev = &me.sleepers;
    if (s->next) {
        s->next->prev = &s->next;
    }
    me.sleepers = self.sleeper = s;
    if (s->epoll) {
        epoll_sleeper(s->epoll, 1);
    }
    me.g->procs[me.proc].parked++;
    if ((!me.watcher || me.watcher == &me.helper) && (back || !me.lent)) {
        me.watcher = s;
        me.lent = false;
        me.watch_until = 0; /* it is awake still */
    }
}

/* Who watched leaves: another sleeper takes over. Members of an epoll set see the device anyway. */
static void hand_over(bool fed)
{
    me.lent = fed && soon_back();
    for (struct sleeper *s = soon_back() ? NULL : me.sleepers; s; s = s->next) {
        if (!s->epoll && s != &me.helper) {
            wake(s);
            return;
        }
    }
    if (me.helper_deep) {
        me.helper_deep = false;
        ring(me.helper.wake_fd);
    }
}

static void sleeper_remove(struct sleeper *s)
{
    *s->prev = s->next;
    if (s->next) {
        s->next->prev = s->prev;
    }
    if (s->epoll) {
        epoll_sleeper(s->epoll, -1);
    }
    me.g->procs[me.proc].parked--;
    if (me.watcher == s) {
        me.g->procs[me.proc].watches = 0;
        me.watcher = NULL;
        hand_over(s->woken);
    }
}

struct timespec *time_left(uint64_t until_ns, struct timespec *ts)
{
    uint64_t now;

    if (until_ns == UINT64_MAX) {
        return NULL;
    }
    now = clock_ns();
    until_ns = until_ns > now ? until_ns - now : 0;
    *ts = (struct timespec){.tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u)};
    return ts;
}

/* Spins: polls the device without sleeping, as long as policy says, and now and then what the sleep would have watched.
 * > 0: something is ready there; 0. */
static int spin(struct sleeper *s, doze_call *doze, void *arg, uint64_t until_ns)
{
    const struct timespec now = {0};
    uint64_t end = clock_ns() + me.app->spin_us * 1000ull;
    int got = 0;

    end = end < until_ns ? end : until_ns;
    s->spinning = true;
    for (unsigned round = 1; got == 0 && !s->woken && clock_ns() < end; round++) {
        turn();
        if (round % SPIN_LOOK == 0 && !s->woken) {
            got = doze(arg, &now, NULL);
        }
        leave(); /* others want to work too */
        enter();
    }
    s->spinning = false;
    return got > 0 ? got : 0;
}

/* Awake, or unpark() was faster. */
static void sleeper_done(struct sleeper *s)
{
    if (self.sleeper == s) {
        self.sleeper = NULL;
        sleeper_remove(s);
    }
    self.fed_ns = s->woken ? clock_ns() : 0;
}

/* The thread stands in the list of sleepers no more: a handler is about to run, which may jump away. */
void unpark(void)
{
    struct sleeper *s = self.sleeper;

    enter();
    self.sleeper = NULL;
    sleeper_remove(s);
    wake(s); /* it may be on its way to sleep */
    leave();
}

static void cancelled(void *arg)
{
    (void)arg;
    if (self.sleeper) {
        unpark();
    }
}

/* The lock is let go of, until due_ns at the latest. -EINTR also for a handler that ran shortly before or after the sleep,
 * but before until_ns. */
static int asleep(doze_call *doze, void *arg, uint64_t due_ns, uint64_t until_ns, const sigset_t *mask,
                  uint32_t handled)
{
    struct timespec ts;
    volatile int got = -EINTR;

    leave();
    pthread_cleanup_push(cancelled, NULL);
    if (self.handled == handled) {
        got = doze(arg, time_left(due_ns, &ts), mask);
    }
    pthread_cleanup_pop(0);
    enter();
    return got <= 0 && self.handled != handled && clock_ns() < until_ns ? -EINTR : got;
}

int park_by(struct sleeper *s, doze_call *doze, void *arg, uint64_t until_ns, const sigset_t *mask)
{
    uint32_t handled = self.handled;
    uint64_t due_ns = until_ns;
    int got = 0;

    if (unlikely(me.forked)) {
        attach_child();
    }
    sleeper_add(s);
    if (me.app->spin_us) {
        got = spin(s, doze, arg, until_ns);
    }
    if (got == 0 && !s->woken) {
        if (me.watcher == s) {
            uint64_t due = aside_judge(next_turn());

            s->watching = !me.aside;
            if (s->epoll) {
                epoll_devices(s->epoll, s->watching);
            }
            due_ns = due < until_ns ? due : until_ns;
            me.watch_until = due;
        }
        /* A handler that `mask` had kept until then is no reason to end. */
        got = asleep(doze, arg, due_ns, mask ? due_ns : until_ns, mask, handled);
    } else if (got == 0 && self.handled != handled) {
        got = -EINTR;
    }
    if (s->watching && !s->woken && me.g->relatives > 1 && clock_ns() < due_ns) {
        me.vain++; /* until a turn finds something */
    }
    sleeper_done(s);
    return got == 0 && !s->woken && until_ns != UINT64_MAX && clock_ns() >= until_ns ? -ETIMEDOUT : got;
}

int poll_kernel(struct pollfd *fds, int n, const struct timespec *ts, const sigset_t *mask)
{
    struct timespec left;
    int got;

    if (ts && ts->tv_sec == 0 && ts->tv_nsec == 0) {
        left = *ts; /* the system call writes to it */
        got = (int)real.syscall(SYS_ppoll, fds, n, &left, mask, _NSIG / 8);
    } else {
        got = real.ppoll(fds, (nfds_t)n, ts, mask);
    }
    return got < 0 ? -errno : got;
}

/* A single device of a single process is asked itself: a set costs as much again (EPOLLEXCLUSIVE: among relatives). */
static int device_fd(void) { return me.g->relatives <= 1 && me.watch_count == 2 ? me.watch_fds[0] : me.dev_ep; }

struct nap {
    const struct sleeper *s;
    struct pollfd *fds; /* the first PARKS are ours */
    int n;              /* the others */
};

static int nap(void *arg, const struct timespec *ts, const sigset_t *mask)
{
    struct nap *nap = arg;
    int got;

    nap->fds[0] = (struct pollfd){.fd = nap->s->wake_fd, .events = POLLIN};
    nap->fds[1] = (struct pollfd){.fd = nap->s->watching ? device_fd() : -1, .events = POLLIN};
    nap->fds[2] = (struct pollfd){.fd = nap->s->watching ? me.wake_fd : -1, .events = POLLIN};
    got = poll_kernel(nap->fds, nap->n + PARKS, ts, mask);
    if (got <= 0) {
        return got;
    }
    if (nap->fds[0].revents) { /* also a ring that comes late, when who was told had woken up without it */
        drain(nap->s->wake_fd);
    }
    if (nap->fds[2].revents) {
        drain(me.wake_fd);
    }
    return got - (nap->fds[0].revents != 0) - (nap->fds[1].revents != 0) - (nap->fds[2].revents != 0);
}

int park_polling(struct sleeper *s, struct pollfd *fds, int n, uint64_t until_ns, const sigset_t *mask)
{
    struct nap it = {.s = s, .fds = fds, .n = n};

    s->wake_fd = thread_wake_fd();
    return park_by(s, nap, &it, until_ns, mask);
}

int park(struct sleeper *s, struct pollfd *fds, int n, uint64_t until_ns, const sigset_t *mask)
{
    struct pollfd all[n + PARKS];
    int got;

    if (n) {
        memcpy(all + PARKS, fds, (size_t)n * sizeof *fds);
    }
    got = park_polling(s, all, n, until_ns, mask);
    if (n) {
        memcpy(fds, all + PARKS, (size_t)n * sizeof *fds);
    }
    return got;
}

void object_wait(uint32_t object)
{
    uint32_t hold = group_hold_get(me.g, object, me.proc);

    if (hold != GROUP_NONE) {
        group_hold(me.g, hold)->waits = 1;
    }
}

int wait_for(struct object *o, int fd, short events, int64_t timeo_ns, uint64_t *since)
{
    uint32_t object = object_index(o);
    struct sleeper s = {.object = object};
    struct pollfd shadow = {.fd = self.orphan ? -1 : fd, .events = events};
    uint64_t until = UINT64_MAX;
    int got;

    if (me.g->dead) {
        return -ECONNRESET;
    }
    if (timeo_ns > 0) {
        *since = *since ? *since : clock_ns();
        until = *since + (uint64_t)timeo_ns;
    }
    me.turn_ns = clock_ns();
    object_wait(object);
    if (turn() || (object_ready(o) & events)) {
        return 0; /* something happened: it may be what the caller waits for */
    }
    self.no_restart = false;
    if (!self.orphan) {
        group_call_begins(me.g, object, me.proc); /* as a call of the kernel has its file: */
    }
    got = park(&s, &shadow, o->place == PLACE_BOTH, until, NULL);
    if (o->refs == 1) {
        self.orphan = object + 1; /* ... another thread has closed the last descriptor; leave() ends it */
    } else if (!self.orphan) {
        group_call_ends(me.g, object, me.proc);
    }
    self.kernels = shadow.revents != 0;
    if (got == -ETIMEDOUT) {
        return -EAGAIN;
    }
    if (got < 0 && (got != -EINTR || self.no_restart || timeo_ns > 0)) {
        return got;
    }
    turn();
    return o->sock < 0 && o->place == PLACE_STACK ? -ECONNRESET : 0; /* it was lost meanwhile */
}
