/* SPDX-License-Identifier: Apache-2.0 */
/*
 * drive.c - who drives the stack, and how threads sleep.
 *
 * Whoever waits drives: before it sleeps a thread gives the stack a turn, and while it sleeps it watches the device for
 * all threads of its process (me.watcher). Other sleepers wait on an eventfd of their own until a turn finds something
 * for them. Where nobody waits, the helper thread drives:
 *
 *      program                          helper
 *      calls, turns every now and then  looks every millisecond whether that is so
 *      computes                         gives the stack a turn every millisecond
 *      sleeps elsewhere (sleep(3))      watches the device
 *      sleeps in a call of ours         sleeps too, until the program has been awake
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "preload.h"

enum {
    TICK_NS = 1000000,
    QUIET_TICKS = 4,  /* the helper goes to sleep after so many ticks without news */
    RETRY_NS = 50000, /* a call that would block looks at the device again after it */
    TURN_ROUNDS = 8,  /* batches of one turn */
    EVENTS = 64,
    WANTED = 16,
    SPARES = 64,
    SPIN_LOOK = 16, /* rounds of spin() */
    LOST = POLLERR | POLLHUP | POLLIN | POLLOUT | POLLRDHUP,
};

__thread struct thread self;

uint64_t clock_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* ---- The lock ------------------------------------------------------------------------------------------ */

static void take(void)
{
    if (unlikely(pthread_mutex_lock(&me.g->lock) == EOWNERDEAD)) {
        revive();
    }
}

/* This process ends, or becomes another program: its other threads may be killed at any moment, and must not be at work
 * then. They wait here, for ever if that comes to pass. */
static void stand_still(void)
{
    while (me.halted_by && me.halted_by != &self) {
        pthread_mutex_unlock(&me.g->lock);
        real.ppoll(NULL, 0, &(struct timespec){.tv_nsec = 1000000}, NULL);
        take();
    }
}

void enter_quietly(void)
{
    self.inside++;
    take();
    if (unlikely(me.halted_by != NULL)) {
        stand_still();
    }
    if (unlikely(me.cancels) && !self.guarded) {
        self.guarded = pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &self.cancel_state) == 0;
    }
    me.g->working = 1;
    if (unlikely(me.g->relatives > 1)) {
        device_sync();
        if (unlikely(me.g->dead)) {
            broker_leave();
        }
    }
}

void enter(void)
{
    enter_quietly();
    if (unlikely(me.forked)) {
        attach_child();
    }
}

/* What a call had waited for was closed meanwhile: it ends with the call. */
static void orphan_end(void)
{
    uint32_t object = self.orphan - 1;

    self.orphan = 0;
    if (group_call_ends(me.g, object, me.proc)) {
        object_end(object);
    }
}

static void wake_owed(void);

void leave(void)
{
    if (unlikely(self.orphan)) {
        orphan_end();
    }
    me.g->working = 0;
    pthread_mutex_unlock(&me.g->lock);
    if (self.wakes) {
        wake_owed();
    }
    atomic_signal_fence(memory_order_seq_cst);
    if (--self.inside == 0 && unlikely(self.pending | self.guarded)) {
        if (self.guarded) {
            self.guarded = 0;
            pthread_setcancelstate(self.cancel_state, NULL);
        }
        if (self.pending) {
            signals_deliver();
        }
    }
}

/* Cancellation (pthreads(7)) takes effect in system calls, which the stack makes with the lock held: threads are not
 * cancelled there, once anybody cancels. While the lock is held here no target is at work; the next that is knows. */
EXPORT int pthread_cancel(pthread_t thread)
{
    int r;

    real_load();
    me.cancels = true;
    if (me.attached <= 0 || self.inside) {
        return real.pthread_cancel(thread);
    }
    enter_quietly();
    r = real.pthread_cancel(thread);
    leave();
    return r;
}

/* ---- Readiness ------------------------------------------------------------------------------------------- */
short object_ready(const struct object *o)
{
    int ready;

    if (unlikely(o->sock < 0 || me.g->dead)) {
        return me.g->dead || o->place == PLACE_STACK ? LOST : 0;
    }
    ready = bypass_ready(&me.stack, o->sock);
    if (ready < 0) {
        return POLLNVAL;
    }
    return (short)poll_bits((uint32_t)ready);
}

/* ---- Waking -------------------------------------------------------------------------------------------------- */
static void write_bell(int bell)
{
    uint64_t one = 1;

    real.syscall(SYS_write, bell, &one, sizeof one); /* EAGAIN: it is full of wakes */
}

void ring(int bell)
{
    if (likely(self.inside && self.wakes < WAKES)) {
        self.owed[self.wakes++] = bell;
    } else {
        write_bell(bell);
    }
}

void wake(struct sleeper *s)
{
    if (!s->woken) {
        s->woken = true;
        s->told = !s->spinning;
        if (s->told) {
            ring(s->wake_fd);
        }
    }
}

/* The socket that wakes a relative; abstract, so that nothing is left of it (unix(7)). */
socklen_t wake_name(struct sockaddr_un *sa, uint32_t proc)
{
    int n = snprintf(sa->sun_path + 1, sizeof sa->sun_path - 1, "bypass-wake/%016lx/%u", (unsigned long)me.g->wake_id,
                     proc);

    sa->sun_family = AF_UNIX;
    sa->sun_path[0] = 0;
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
}

static void wake_relative(uint32_t proc)
{
    struct sockaddr_un sa;
    socklen_t len = wake_name(&sa, proc);

    /* EAGAIN: wakes wait there already. ECONNREFUSED: it has ended, and will be cleared away. */
    real.syscall(SYS_sendto, me.wake_fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL, &sa, len);
}

/* The lock is free now. */
static void wake_owed(void)
{
    for (int i = 0; i < self.wakes; i++) {
        self.owed[i] >= 0 ? write_bell(self.owed[i]) : wake_relative((uint32_t)(-1 - self.owed[i]));
    }
    self.wakes = 0;
}

void wake_joined(void)
{
    for (uint32_t i = 0; i < me.g->procs_top; i++) {
        if (i != me.proc && me.g->procs[i].pid && me.g->procs[i].state == PROC_JOINED) {
            wake_relative(i);
        }
    }
}

static void wake_relatives(void)
{
    for (uint32_t i = 0; i < me.g->procs_top; i++) {
        struct proc *p = &me.g->procs[i];

        if (i == me.proc || !p->pid || !p->parked || p->queue_head == GROUP_NONE || p->called) {
            continue;
        }
        if (me.wake_fd < 0) { /* a child that has not joined the group, and need not yet */
            me.wake_fd = fd_hide(real.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
        }
        p->called = 1;
        if (self.wakes < WAKES) {
            self.owed[self.wakes++] = -1 - (int)i;
        } else {
            wake_relative(i);
        }
    }
}

/* Tells this process' threads of what became ready for it. */
static bool take_local(void)
{
    bool any = false;

    me.g->procs[me.proc].called = 0;
    for (uint32_t object, mask; (object = group_take(me.g, me.proc, &mask)) != GROUP_NONE; any = true) {
        if (me.local[object].items) {
            epoll_ready(object, poll_bits(mask));
        }
        for (struct sleeper *s = me.sleepers; s; s = s->next) {
            if (s->object == object || (s->object == GROUP_NONE && !s->epoll)) {
                wake(s);
            }
        }
    }
    return any;
}

static bool dispatch(void)
{
    struct bypass_event events[EVENTS];
    bool others = false, any = false;
    int n;

    while ((n = bypass_events(&me.stack, events, EVENTS)) > 0) {
        for (int i = 0; i < n; i++) {
            uint32_t object = (uint32_t)events[i].user - 1;

            if (events[i].user && object < me.g->objects_bump && group_object(me.g, object)->sock == events[i].sock) {
                group_notify(me.g, object, events[i].mask);
                others |= group_object(me.g, object)->holds != GROUP_NONE;
            }
        }
    }
    any = take_local();
    if (others && me.g->relatives > 1) {
        wake_relatives();
    }
    return any;
}

/* ---- A turn ---------------------------------------------------------------------------------------------------- */
static void next_hops(void)
{
    struct bypass_addr wanted[WANTED];
    int n;

    if (me.app->device != APP_DEV_LOOP && broker_fd() < 0) {
        return; /* a relative may have a broker; who takes the question has to ask it */
    }
    n = bypass_nexthop_wanted(&me.stack, wanted, WANTED);

    for (int i = 0; i < n; i++) {
        broker_resolve(&wanted[i]);
    }
}

/* When the stack, or the care for relatives, wants a turn at the latest. */
static uint64_t next_turn(void)
{
    uint64_t due = bypass_deadline(&me.stack);

    due = me.g->blocks_due_ns < due ? me.g->blocks_due_ns : due;
    return me.g->check_ns < due ? me.g->check_ns : due;
}

void drive_anew(void)
{
    if (me.watcher == &me.helper) {
        ring(me.helper.wake_fd);
    } else if (me.watcher) {
        wake(me.watcher);
    }
}

static bool more_waits(int got, int batch)
{
    return got == batch || (me.app->device == APP_DEV_LOOP && loop_waiting(&me.loop) > 0);
}

bool turn(void)
{
    int batch = me.app->batch ? (int)me.app->batch : 256;
    bool any = false;

    if (me.g->dead) {
        return false;
    }
    for (int round = 0; round < TURN_ROUNDS; round++) {
        uint64_t now = clock_ns();
        int got = bypass_poll(&me.stack, now, batch);

        me.g->turn_ns = now;
        if (got > 0) {
            any = true;
        }
        if (got < 0 || !more_waits(got, batch)) {
            break;
        }
    }
    me.g->unsent = 0;
    next_hops();
    leases_check();
    if (unlikely(me.g->turn_ns >= me.g->check_ns)) {
        relatives_check();
    }
    any |= dispatch();
    if (me.watcher && next_turn() < me.watch_until) {
        drive_anew(); /* who watches for this thread meant to sleep longer */
    }
    return any;
}

void sent(void)
{
    if (++me.g->unsent >= FLUSH_AT) {
        turn();
    } else if (unlikely(me.helper_deep)) { /* the program may not wait soon: the next tick sends it then */
        me.helper_deep = false;
        ring(me.helper.wake_fd);
    }
}

bool retry(void)
{
    uint64_t now = clock_ns();

    if (now - me.g->turn_ns < RETRY_NS &&
        !(me.app->device == APP_DEV_LOOP && (me.g->unsent || loop_waiting(&me.loop)))) {
        return false;
    }
    me.turn_ns = now;
    turn();
    return true;
}

/* ---- Sleeping ---------------------------------------------------------------------------------------------------- */
static _Atomic int spare[SPARES]; /* bells that nobody has, plus one; 0: none */

int bell_open(void)
{
    for (int i = 0; i < SPARES; i++) {
        int fd = atomic_load_explicit(&spare[i], memory_order_relaxed) ? atomic_exchange(&spare[i], 0) - 1 : -1;

        if (fd >= 0) {
            drain(fd);
            return fd;
        }
    }
    return fd_hide(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

void bell_close(int fd)
{
    for (int i = 0; i < SPARES && fd >= 0; i++) {
        int none = 0;

        if (atomic_compare_exchange_strong(&spare[i], &none, fd + 1)) {
            return;
        }
    }
    fd_unhide(fd);
}

void bells_child(void)
{
    for (int i = 0; i < SPARES; i++) {
        fd_unhide(spare[i] - 1);
        spare[i] = 0;
    }
    self.wakes = 0;
}

static pthread_key_t thread_key; /* its destructor runs when a thread ends */

static void thread_ends(void *arg)
{
    (void)arg;
    bell_close(self.wake_fd - 1);
    self.wake_fd = 0;
}

static void thread_key_make(void) { pthread_key_create(&thread_key, thread_ends); }

static int thread_wake_fd(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    if (!self.wake_fd) {
        self.wake_fd = bell_open() + 1;
        pthread_once(&once, thread_key_make);
        pthread_setspecific(thread_key, &self);
    }
    return self.wake_fd - 1;
}

static void sleeper_add(struct sleeper *s)
{
    s->woken = s->told = s->watching = s->spinning = false;
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
    if (!me.watcher || me.watcher == &me.helper) {
        me.watcher = s;
        me.watch_until = 0; /* it is awake still */
    }
}

/* Who watched leaves: another sleeper takes over. Members of an epoll set see the device anyway. */
static void hand_over(void)
{
    for (struct sleeper *s = me.sleepers; s; s = s->next) {
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
        me.watcher = NULL;
        hand_over();
    }
}

void drain(int fd)
{
    char buf[8];

    real.syscall(SYS_read, fd, buf, sizeof buf);
}

static struct timespec *time_left(uint64_t until_ns, struct timespec *ts)
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
    if (s->told) {
        drain(s->wake_fd);
    }
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

/* The lock is let go of. -EINTR also for a handler that ran shortly before or after the sleep; not for one that `mask` had
 * kept until the time was over. */
static int asleep(doze_call *doze, void *arg, uint64_t until_ns, const sigset_t *mask, uint32_t handled)
{
    struct timespec ts;
    volatile int got = -EINTR;

    leave();
    pthread_cleanup_push(cancelled, NULL);
    if (self.handled == handled) {
        got = doze(arg, time_left(until_ns, &ts), mask);
    }
    pthread_cleanup_pop(0);
    enter();
    return got <= 0 && self.handled != handled && clock_ns() < until_ns ? -EINTR : got;
}

int park_by(struct sleeper *s, doze_call *doze, void *arg, uint64_t until_ns, const sigset_t *mask)
{
    uint32_t handled = self.handled;
    uint64_t until = until_ns;
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
            uint64_t due = next_turn();

            s->watching = true;
            until = due < until_ns ? due : until_ns;
            me.watch_until = due;
        }
        got = asleep(doze, arg, until, mask, handled);
    } else if (got == 0 && self.handled != handled) {
        got = -EINTR;
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

struct nap {
    const struct sleeper *s;
    struct pollfd *fds; /* the first two are ours */
    int n;              /* the others */
};

static int nap(void *arg, const struct timespec *ts, const sigset_t *mask)
{
    struct nap *nap = arg;
    int got;

    nap->fds[0] = (struct pollfd){.fd = nap->s->wake_fd, .events = POLLIN};
    nap->fds[1] = (struct pollfd){.fd = nap->s->watching ? me.dev_ep : -1, .events = POLLIN};
    got = poll_kernel(nap->fds, nap->n + 2, ts, mask);
    if (got > 0 && nap->fds[1].revents) {
        drain(me.wake_fd);
    }
    return got <= 0 ? got : got - (nap->fds[0].revents != 0) - (nap->fds[1].revents != 0);
}

int park_polling(struct sleeper *s, struct pollfd *fds, int n, uint64_t until_ns, const sigset_t *mask)
{
    struct nap it = {.s = s, .fds = fds, .n = n};

    s->wake_fd = thread_wake_fd();
    return park_by(s, nap, &it, until_ns, mask);
}

int park(struct sleeper *s, struct pollfd *fds, int n, uint64_t until_ns, const sigset_t *mask)
{
    struct pollfd all[n + 2];
    int got;

    if (n) {
        memcpy(all + 2, fds, (size_t)n * sizeof *fds);
    }
    got = park_polling(s, all, n, until_ns, mask);
    if (n) {
        memcpy(fds, all + 2, (size_t)n * sizeof *fds);
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
    return 0;
}

/* ---- The helper thread --------------------------------------------------------------------------------------------- */
static void helper_sleep(uint64_t until_ns, bool watch)
{
    struct pollfd fds[4] = {{.fd = me.helper.wake_fd, .events = POLLIN},
                            {.fd = broker_fd(), .events = POLLIN},
                            {.fd = watch ? me.dev_ep : -1, .events = POLLIN},
                            {.fd = me.ends_ep, .events = POLLIN}};
    struct timespec ts;

    me.helper_deep = until_ns == UINT64_MAX || until_ns > clock_ns() + 2 * TICK_NS;
    leave();
    real.ppoll(fds, 4, time_left(until_ns, &ts), NULL);
    enter();
    me.helper_deep = false;
    if (fds[0].revents) {
        drain(me.helper.wake_fd);
    }
    if (fds[1].revents) {
        broker_read();
    }
    if (fds[2].revents) {
        drain(me.wake_fd);
    }
    if (fds[3].revents) {
        relatives_ended();
        turn();
    }
}

/* Nobody watches the device: gives the stack a turn, and watches if nothing else happens. */
static void helper_drive(void)
{
    uint64_t now = clock_ns();

    if (now - me.turn_ns < TICK_NS) {
        helper_sleep(me.turn_ns + TICK_NS, false);
        return;
    }
    if (turn()) {
        helper_sleep(clock_ns() + TICK_NS, false);
        return;
    }
    me.watcher = &me.helper;
    me.g->procs[me.proc].parked++;
    me.watch_until = next_turn();
    helper_sleep(me.watch_until, true);
    me.g->procs[me.proc].parked--;
    if (me.watcher == &me.helper) {
        me.watcher = NULL;
        turn();
    }
}

static void *helper(void *arg)
{
    uint64_t seen = 0;
    int quiet = 0;

    (void)arg;
    enter();
    while (me.helper_runs) {
        if (next_turn() <= clock_ns() && clock_ns() - me.g->turn_ns >= TICK_NS) {
            turn();
        }
        if (!me.watcher) {
            quiet = 0;
            helper_drive();
        } else if (quiet++ < QUIET_TICKS || bypass_deadline(&me.stack) == 0) {
            quiet = seen == me.turn_ns ? quiet : 0;
            seen = me.turn_ns;
            helper_sleep(clock_ns() + TICK_NS, false);
        } else {
            helper_sleep(UINT64_MAX, false);
            quiet = 0;
        }
    }
    leave();
    return NULL;
}

void helper_start(void)
{
    sigset_t all, old;
    pthread_attr_t attr;
    pthread_t thread;

    if (me.helper_runs) {
        return;
    }
    relatives_open();
    me.helper = (struct sleeper){.object = GROUP_NONE, .wake_fd = fd_hide(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))};
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are the program's threads' */
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, 256 * 1024);
    me.helper_runs = true;
    if (pthread_create(&thread, &attr, helper, NULL) != 0) { /* thread-local data of the program needs more than that */
        pthread_attr_destroy(&attr);
        pthread_attr_init(&attr);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        me.helper_runs = pthread_create(&thread, &attr, helper, NULL) == 0;
    }
    pthread_attr_destroy(&attr);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}
