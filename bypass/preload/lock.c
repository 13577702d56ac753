/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lock.c - the group's lock: every call that works on the stack enters and leaves.
 *
 * One lock for all threads of all relatives, never held across a sleep (park.c), never taken by a signal handler
 * (signal.c). Who leaves makes the device send (kick.c) and rings the bells that it owes (wake.c), so that nobody wakes up to
 * wait for the lock.
 */
#define _GNU_SOURCE
#include "preload.h"

__thread struct thread self;

enum { LOST_WAKE_NS = 5000000 };

/* Who is killed after it was woken, and before it has the lock, takes the wake with it if somebody else was faster: the
 * kernel wakes the next one only where the lock is free then (handle_futex_death() in kernel/futex/core.c). That one would
 * sleep until two meet at the lock again, so nobody sleeps for long. */
static int wait_for_lock(void)
{
    int err;

    do {
        uint64_t until = clock_ns() + LOST_WAKE_NS;
        struct timespec ts = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};

        err = pthread_mutex_clocklock(&me.g->lock, CLOCK_MONOTONIC, &ts);
    } while (err == ETIMEDOUT);
    return err;
}

static void take(void)
{
    int err = pthread_mutex_trylock(&me.g->lock);

    if (unlikely(err == EBUSY)) {
        err = wait_for_lock();
    }
    if (unlikely(err == EOWNERDEAD)) {
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

void leave(void)
{
    uint64_t kicks;

    if (unlikely(self.orphan)) {
        orphan_end();
    }
    kicks = device_owed();
    me.g->working = 0;
    pthread_mutex_unlock(&me.g->lock);
    if (kicks) {
        device_kick(kicks);
    }
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
