/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exit.c - the end of a process: its sockets are closed in order, and what they had queued still leaves. Relatives drive
 * the stack on; the last one asks the broker to do it (APP_LINGER), or drives it itself for a while where there is none.
 *
 * A process that is killed says nothing: proc.c. So does one that ends by a system call of its own (syscall(2)).
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <unistd.h>

#include "preload.h"

enum { DRIVE_NS = 2000000000, DRIVE_STEP_NS = 10000000 };

static void ended(void *arg, uint32_t object)
{
    (void)arg;
    object_end(object);
}

/* The kernel's half of listeners that end: others (the broker) may have it open too, and it must not go on listening. */
static void stop_listeners(void)
{
    for (int fd = 0; fd < me.fd_top; fd++) {
        uint32_t i = fd_object(fd);

        if (i != GROUP_NONE && group_object(me.g, i)->listening &&
            group_object(me.g, i)->refs == group_holds(me.g, i, me.proc)) {
            real.shutdown(fd, SHUT_RDWR);
        }
    }
}

/* Relatives that can drive the stack. */
static bool alone(void)
{
    relatives_check();
    for (uint32_t i = 0; i < me.g->procs_top; i++) {
        if (me.g->procs[i].pid && me.g->procs[i].state != PROC_FOREIGN) {
            return false;
        }
    }
    return true;
}

/* Connections: that have something to send or to have acknowledged; or any. */
static bool connections(bool busy)
{
    struct bypass_tcp_info info;
    uint32_t cursor = 0;

    while (bypass_conn_next(&me.stack, &cursor, &info)) {
        bool closing = info.state == BYPASS_FIN_WAIT_1 || info.state == BYPASS_CLOSING || info.state == BYPASS_LAST_ACK;

        if (!busy || closing || info.snd_queued) {
            return true;
        }
    }
    return false;
}

bool stack_busy(void) { return connections(true); }
bool stack_used(void) { return connections(false); }

/* Lock held; other threads stand still. */
static void drive_on(void)
{
    uint64_t until = clock_ns() + DRIVE_NS;

    for (uint64_t now = clock_ns(); now < until && stack_busy(); now = clock_ns()) {
        uint64_t due = bypass_deadline(&me.stack), step = now + DRIVE_STEP_NS;
        struct pollfd dev = {.fd = me.dev_ep, .events = POLLIN};
        int64_t left = (int64_t)((due < step ? due : step) - now);

        if (!turn() && left > 0) {
            real.ppoll(&dev, 1, &(struct timespec){.tv_nsec = left}, NULL);
        }
    }
}

/* The last relative. */
static void hand_over(void)
{
    if (!stack_used()) {
        return;
    }
    if (me.app->device == APP_DEV_LOOP) {
        drive_on();
        return;
    }
    if (me.forked) {
        attach_child();
    }
    if (broker_linger() < 0) {
        drive_on();
    }
}

static void end_all(void)
{
    for (uint32_t i = 0; i < me.g->objects_bump; i++) {
        if (group_object(me.g, i)->refs) {
            object_end(i);
        }
    }
}

void goodbye(void)
{
    if (me.attached <= 0 || self.inside || atomic_exchange(&me.gone, true)) {
        return; /* inside: a fault of the stack's own, and its handler ends the program */
    }
    share_write();
    enter_quietly();
    me.halted_by = &self;
    stop_listeners();
    group_leave(me.g, me.proc, ended, NULL);
    fd_unhide(me.wake_fd); /* its name is that of the place */
    me.wake_fd = -1;
    turn();
    if (me.g->relatives == 0) { /* what messages carry that nobody can take any more */
        end_all();
    }
    if (alone() && !me.reaper) {
        hand_over();
    }
    me.attached = -1;
    leave(); /* the other threads stand still for ever: what their descriptors name is not theirs any more */
}

/* What the program leaves to exit(): streams are written before their sockets are closed. */
__attribute__((destructor)) static void at_exit(void)
{
    streams_flush();
    goodbye();
}

void exit_prepare(void) { at_quick_exit(goodbye); }

EXPORT void _exit(int status)
{
    real_load();
    goodbye();
    real._exit(status);
    __builtin_unreachable();
}

EXPORT void _Exit(int status) { _exit(status); }
