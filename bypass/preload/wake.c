/* SPDX-License-Identifier: Apache-2.0 */
/*
 * wake.c - waking: threads by their bells (eventfds), relatives by their sockets.
 *
 * Who finds something for another while it has the lock owes a wake, and pays when it leaves (lock.c).
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "preload.h"

enum {
    SPARES = 64,
};

/* ---- Threads ----------------------------------------------------------------------------------------------- */
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

/* If nobody comes back the helper drives, at its next tick. */
bool soon_back(void) { return me.helper_runs && me.away_ns < SOON_NS; }

void wake(struct sleeper *s)
{
    if (!s->woken) {
        s->woken = true;
        me.lent |= !me.watcher && soon_back();
        if (!s->spinning) {
            ring(s->wake_fd);
        }
    }
}

void drain(int fd)
{
    char buf[8];

    real.syscall(SYS_read, fd, buf, sizeof buf);
}

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

int thread_wake_fd(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    if (!self.wake_fd) {
        self.wake_fd = bell_open() + 1;
        pthread_once(&once, thread_key_make);
        pthread_setspecific(thread_key, &self);
    }
    return self.wake_fd - 1;
}

/* ---- Relatives --------------------------------------------------------------------------------------------- */
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

void wake_joined(void)
{
    for (uint32_t i = 0; i < me.g->procs_top; i++) {
        if (i != me.proc && me.g->procs[i].pid && me.g->procs[i].state == PROC_JOINED) {
            wake_relative(i);
        }
    }
}

void wake_relatives(void)
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

/* The lock is free now. */
void wake_owed(void)
{
    for (int i = 0; i < self.wakes; i++) {
        self.owed[i] >= 0 ? write_bell(self.owed[i]) : wake_relative((uint32_t)(-1 - self.owed[i]));
    }
    self.wakes = 0;
}
