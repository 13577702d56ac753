/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rejoin.c - another broker, when ours was killed: the helper thread dials until one answers at the same name, soon at
 * first, then every second, and says hello as a relative. A broker that has taken the application over goes on with it;
 * one that has not does not know its token, and then nobody is asked again. The same after a broker that ended in order.
 *
 * The connection is kept apart until its hello is answered, so that no question waits for a broker that is not there yet.
 */
#define _GNU_SOURCE
#include <unistd.h>

#include "preload.h"

static const uint64_t FIRST_NS = 20000000u, LAST_NS = 1000000000u;

static int unanswered = -1; /* a connection on which hello was said */
static uint64_t due_ns, wait_ns = FIRST_NS;
static bool never;

void rejoin_soon(void)
{
    due_ns = clock_ns() + wait_ns;
    wait_ns = 2 * wait_ns < LAST_NS ? 2 * wait_ns : LAST_NS;
}

void rejoin_never(void) { never = true; }

uint64_t rejoin_due(void)
{
    bool idle = never || me.broker_fd >= 0 || unanswered >= 0 || !me.app->app || me.g->dead;

    return idle ? UINT64_MAX : due_ns;
}

int rejoin_fd(void) { return me.broker_fd >= 0 ? me.broker_fd : unanswered; }

int rejoin_take(void)
{
    int fd = unanswered;

    unanswered = -1;
    return fd;
}

void rejoin_try(void)
{
    if (rejoin_due() > clock_ns()) {
        return;
    }
    unanswered = broker_dial_again();
    if (unanswered < 0) {
        unanswered = -1;
        rejoin_soon();
    }
}

/* Children that have not said hello, which the broker may have missed. */
static void tell_children(void)
{
    for (uint32_t i = 0; i < me.g->procs_top; i++) {
        const struct proc *p = &me.g->procs[i];

        if (p->pid > 0 && i != me.proc && p->state == PROC_FORKED) {
            broker_tell_fork(p->pid);
        }
    }
}

bool rejoin_answered(const struct app_msg *m)
{
    if (m->error) {
        never = true;
        return false;
    }
    wait_ns = FIRST_NS;
    me.refused[0] = 0;
    tell_children();
    return true;
}

void rejoin_child(void)
{
    if (unanswered >= 0) {
        fd_unhide(unanswered);
    }
    unanswered = -1;
    wait_ns = FIRST_NS;
}
