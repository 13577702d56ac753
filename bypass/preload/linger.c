/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linger.c - bypass-linger: drives the stack of an application whose last process has ended, until its connections are
 * through, a relative is there again, or a limit is over. When only TIME_WAIT is left it stays for 3 s more, in which a
 * peer that has missed the last acknowledgment repeats its FIN four times (RFC 6298: 0.2 s, doubled), and not for the
 * whole minute: the interface may be wanted by the program that is started next. Without the broker it does not wait for
 * that, and 10 s at most for the rest: nobody may be left who moves the packets. When the interface is gone for good it
 * does not wait at all. The broker starts it as the application's user, with BYPASS_SOCKET and BYPASS_APP in its
 * environment: it is a relative like any other.
 *
 *     bypass-linger [SECONDS]
 *
 * Exit: 0 through, 1 the limit was over and connections are left, 2 it cannot attach, or bad usage.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <unistd.h>

#include "preload.h"

enum { LIMIT_S = 300, LOOK_NS = 20000000 };
#define SECOND 1000000000ull

static int usage(const char *why)
{
    fprintf(stderr, "bypass-linger: %s; usage: bypass-linger [SECONDS]\n", why);
    return 2;
}

/* Lock held. How much longer there may be something to do. */
static uint64_t patience_ns(void)
{
    if (!stack_used() || me.g->dead || me.g->relatives > 1) {
        return 0;
    }
    if (me.dev->ops->kick(me.dev) == -ENXIO) {
        return 0; /* the interface is gone for good: no peer can be told */
    }
    if (me.broker_fd < 0) {
        return stack_busy() ? 10 * SECOND : 0;
    }
    return stack_busy() ? UINT64_MAX : 3 * SECOND;
}

/* The helper thread drives; this one looks now and then whether there is anything left. */
static int drive(uint64_t until_ns)
{
    uint64_t before = 0, since = 0; /* patience, and the time since when it is that */

    for (;;) {
        uint64_t patience, now;

        enter();
        turn();
        patience = patience_ns();
        leave();
        now = clock_ns();
        if (patience != before) {
            before = patience;
            since = now;
        }
        if (now - since >= patience) {
            return 0;
        }
        if (now >= until_ns) {
            return 1;
        }
        real.ppoll(NULL, 0, &(struct timespec){.tv_nsec = LOOK_NS}, NULL);
    }
}

int main(int argc, char **argv)
{
    long limit = LIMIT_S;
    char *end;

    if (argc > 2) {
        return usage("too many arguments");
    }
    if (argc == 2) {
        limit = strtol(argv[1], &end, 10);
        if (*end || end == argv[1] || limit <= 0 || limit > 86400) {
            return usage("SECONDS is a number from 1 to 86400");
        }
    }
    if (!getenv("BYPASS_APP")) {
        return usage("BYPASS_APP does not say whose stack it is");
    }
    me.reaper = true;
    if (!attach()) {
        return 2; /* attach() has said why */
    }
    return drive(clock_ns() + (uint64_t)limit * SECOND);
}
