/* SPDX-License-Identifier: Apache-2.0 */
/*
 * aside.c - which relatives watch the device. Each packet wakes one of those that do, whomever it is for, and that one wakes
 * whom it is for. A process for which nothing has come lately would be woken by what comes for the others: it stands aside
 * as long as they watch and drive. It looks every ASIDE_NS whether they do, since they may be stopped or killed.
 */
#define _GNU_SOURCE
#include "preload.h"

enum { VAIN = 8, ASIDE_NS = 32 * TICK_NS };

static bool relative_watches(void)
{
    for (uint32_t i = 0; i < me.g->procs_top; i++) {
        if (i != me.proc && me.g->procs[i].pid && me.g->procs[i].state == PROC_JOINED && me.g->procs[i].watches) {
            return true;
        }
    }
    return false;
}

uint64_t aside_judge(uint64_t due_ns)
{
    uint32_t turns = me.g->turns - me.turns; /* of relatives */
    bool driven = turns != me.aside_turns;
    uint64_t look;

    me.aside_turns = turns;
    if (me.aside && !driven) {
        me.vain = 0;
    }
    me.aside = me.vain >= VAIN && me.g->relatives > 1 && (me.aside || relative_watches());
    me.g->procs[me.proc].watches = !me.aside;
    look = me.aside ? clock_ns() + ASIDE_NS : UINT64_MAX;
    return due_ns < look ? due_ns : look;
}
