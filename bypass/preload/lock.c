/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lock.c - the group's lock: every call that works on the stack enters and leaves.
 *
 * One lock for all threads of all relatives, never held across a sleep (park.c), never taken by a signal handler
 * (signal.c). Who leaves rings the bells that it owes (wake.c), so that nobody wakes up to wait for the lock.
 */
#define _GNU_SOURCE
#include "preload.h"

__thread struct thread self;

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
