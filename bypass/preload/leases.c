/* SPDX-License-Identifier: Apache-2.0 */
/*
 * leases.c - leases whose sockets are closed. The stack may have connections on the port for a while (TIME_WAIT too), and
 * their packets must not reach the kernel: the lease ends with the last of them, or at once if there are none. While there
 * is no broker it stays.
 */
#define _GNU_SOURCE
#include "preload.h"

enum { LEAVING = sizeof me.g->leaving / sizeof *me.g->leaving, CHECK_NS = 100000000 };

void lease_leaves(uint32_t lease, int type, uint16_t port)
{
    if (port && !me.gone && broker_fd() >= 0 && bypass_port_users(&me.stack, type, NULL, port) == 0) {
        broker_release(lease); /* now: the program may want the port again at once, unless it is about to end */
        return;
    }
    for (uint32_t i = 0; i < LEAVING; i++) {
        struct leaving *l = &me.g->leaving[i];

        if (l->lease == 0) {
            l->port = port;
            l->type = (uint16_t)type;
            atomic_signal_fence(memory_order_seq_cst); /* as in group.c */
            l->lease = lease;
            me.g->leaving_count++;
            return;
        }
    }
    /* No room to remember it: it ends with the application. */
}

void leases_check(void)
{
    uint64_t now = me.g->turn_ns;

    blocks_check(now);
    if (me.g->leaving_count == 0 || now - me.g->leaving_ns < CHECK_NS || broker_fd() < 0) {
        return;
    }
    me.g->leaving_ns = now;
    for (uint32_t i = 0; i < LEAVING; i++) {
        struct leaving *l = &me.g->leaving[i];

        if (l->lease && (l->port == 0 || bypass_port_users(&me.stack, l->type, NULL, l->port) == 0)) {
            broker_release(l->lease);
            l->lease = 0;
            me.g->leaving_count--;
        }
    }
}

static bool known(uint32_t lease)
{
    for (uint32_t i = 0; i < me.g->objects_bump; i++) {
        if (group_object(me.g, i)->refs && group_object(me.g, i)->lease == lease) {
            return true;
        }
    }
    for (uint32_t i = 0; i < LEAVING; i++) {
        if (me.g->leaving[i].lease == lease) {
            return true;
        }
    }
    return block_known(lease);
}

/* One that nobody here knows was given back, or asked for, while there was no broker to hear it. */
void lease_told(uint32_t lease)
{
    if (lease && !known(lease)) {
        lease_leaves(lease, BYPASS_STREAM, 0);
    }
}
