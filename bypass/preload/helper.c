/* SPDX-License-Identifier: Apache-2.0 */
/* helper.c - the thread that drives the stack where nobody waits; drive.c has the table. */
#define _GNU_SOURCE
#include <sys/eventfd.h>

#include "preload.h"

enum {
    QUIET_TICKS = 4, /* the helper goes to sleep after so many ticks without news */
    SLOW_TICKS = 32, /* it looks at least this often where relatives drive */
    RECENT_NS = 4 * TICK_NS,
};

static uint64_t slow_ns;    /* between two looks, where relatives drive; 0: they do not */
static uint32_t seen_turns; /* of relatives */

/* Relatives have given the stack turns since the last look, and one a moment ago: what this process has to send leaves with
 * those, and what comes for it is found by them. If each of fifty helpers looked every millisecond they would find just
 * that, and stand in each other's way at the lock. So they look less and less often; sent() calls this one where
 * relatives drive no more. */
static uint64_t next_look(void)
{
    uint64_t now = clock_ns(), most = 2 * me.g->relatives;
    uint32_t turns = me.g->turns - me.turns;

    most = TICK_NS * (most < SLOW_TICKS ? most : SLOW_TICKS);
    if (me.g->relatives <= 1 || turns == seen_turns || now - me.g->turn_ns > RECENT_NS) {
        slow_ns = 0;
    } else {
        slow_ns = slow_ns ? 2 * slow_ns : 2 * TICK_NS;
        slow_ns = slow_ns < most ? slow_ns : most;
    }
    seen_turns = turns;
    return now + (slow_ns ? slow_ns : TICK_NS);
}

static void helper_sleep(uint64_t until_ns, bool watch)
{
    struct pollfd fds[] = {{.fd = me.helper.wake_fd, .events = POLLIN},
                           {.fd = rejoin_fd(), .events = POLLIN},
                           {.fd = watch ? me.wake_fd : -1, .events = POLLIN},
                           {.fd = me.ends_ep, .events = POLLIN},
                           {.fd = watch ? me.dev_ep : -1, .events = POLLIN}};
    uint64_t again = rejoin_due();
    struct timespec ts;

    until_ns = again < until_ns ? again : until_ns;
    me.helper_slow = !watch && slow_ns && until_ns != UINT64_MAX;
    me.helper_deep = !me.helper_slow && (until_ns == UINT64_MAX || until_ns > clock_ns() + 2 * TICK_NS);
    leave();
    real.ppoll(fds, sizeof fds / sizeof *fds, time_left(until_ns, &ts), NULL);
    enter();
    me.helper_deep = me.helper_slow = false;
    if (fds[0].revents) {
        drain(me.helper.wake_fd);
    }
    if (fds[1].revents) {
        broker_read();
        turn(); /* it may have been about sockets that threads sleep on */
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
    uint64_t seen = 0, look;
    int quiet = 0;

    (void)arg;
    enter();
    while (me.helper_runs) {
        rejoin_try();
        if (next_turn() <= clock_ns() && clock_ns() - me.g->turn_ns >= TICK_NS) {
            turn();
        }
        look = next_look();
        if (!me.watcher) {
            quiet = 0;
            if (slow_ns) {
                helper_sleep(look, false);
            } else {
                helper_drive();
            }
        } else if (quiet++ < QUIET_TICKS || next_turn() == 0) {
            quiet = seen == me.turn_ns ? quiet : 0;
            seen = me.turn_ns;
            helper_sleep(look, false);
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
