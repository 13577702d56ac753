/* SPDX-License-Identifier: Apache-2.0 */
/*
 * revive.c - a relative was killed while it held the lock: what it was in the middle of is half done. Nothing of the
 * stack can be trusted then, and it is made anew in its memory: connections are over (their peers get resets for what
 * they send, this side ECONNRESET), listeners and bound datagram sockets go on, with the options that bind() needs and
 * otherwise those of a new socket. What relatives have is told from the group (group_repair()). Where that or the device
 * is damaged otherwise than by a death, the application ends for good: every call fails, and the broker gives its flows
 * back to the kernel.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>

#include "afxdp/afxdp.h"
#include "host.h"
#include "preload.h"

/* Frees what the stack held. 0 or -errno. */
static int reclaim_device(void)
{
    switch (me.app->device) {
    case APP_DEV_LOOP:
        loop_reclaim(&me.loop);
        return 0;
    case APP_DEV_AFXDP:
        return afxdp_reclaim(me.afxdp);
    case APP_DEV_PORT:
        return port_reclaim(&me.port);
    default:
        return -EPROTO;
    }
}

/* The stack's memory as it was at the beginning. */
static int clear_arena(void)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

    return fallocate(me.mem_fd, mode, (off_t)me.app->arena_off, (off_t)me.app->arena_size) < 0 ? -errno : 0;
}

static int new_stack(void)
{
    const struct bypass_env env = {.random = host_random};
    void *arena = (uint8_t *)me.app + me.app->arena_off;
    int err = bypass_create(&me.stack, arena, me.app->arena_size, &me.app->config, me.dev, &env, clock_ns());

    for (uint32_t i = 0; err == 0 && i < GROUP_ADDRS; i++) {
        if (me.g->addrs[i].used) {
            err = bypass_addr_add(&me.stack, &me.g->addrs[i].addr, me.g->addrs[i].prefix_len);
        }
    }
    if (err == 0 && me.app->congestion[0]) {
        err = bypass_cc_default(&me.stack, me.app->congestion);
    }
    return err;
}

/* Where several sockets have an address, they were allowed to. */
static int bind_again(struct object *o)
{
    int err = bypass_bind(&me.stack, o->sock, &o->local);

    if (err == -EADDRINUSE) {
        bypass_setopt(&me.stack, o->sock, BYPASS_SO_REUSEPORT, 1);
        bypass_setopt(&me.stack, o->sock, BYPASS_SO_REUSEADDR, 1);
        err = bypass_bind(&me.stack, o->sock, &o->local);
    }
    return err;
}

/* A listener, or a datagram socket that is bound, has a socket again. */
static void reopen(uint32_t object)
{
    struct object *o = group_object(me.g, object);

    o->sock = bypass_socket(&me.stack, o->type);
    if (o->sock < 0 || bind_again(o) < 0 || (o->listening && bypass_listen(&me.stack, o->sock, o->backlog) < 0)) {
        o->sock = -1;
        return;
    }
    bypass_set_user(&me.stack, o->sock, object + 1);
}

static void reopen_all(void)
{
    for (uint32_t i = 0; i < me.g->objects_bump; i++) {
        struct object *o = group_object(me.g, i);

        if (o->refs == 0) {
            if (o->lease) {
                lease_leaves(o->lease, o->type, 0);
                o->lease = 0;
            }
            continue;
        }
        o->sock = -1;
        if (o->place == PLACE_BOTH) {
            reopen(i);
        } else if (o->place == PLACE_UNDECIDED) {
            o->sock = bypass_socket(&me.stack, o->type);
            bypass_set_user(&me.stack, o->sock, i + 1);
        }
        group_notify(me.g, i, BYPASS_EVERYTHING);
    }
}

void revive(void)
{
    pthread_mutex_consistent(&me.g->lock);
    me.g->check_ns = 0; /* what it had has to end soon; it may even have been the one who looks after the dead */
    if (!me.g->working) {
        return; /* it had not begun, or was through */
    }
    /* A process that is just attaching has no device yet: it cannot do it. */
    if (me.g->dead || !me.dev || !group_repair(me.g) || reclaim_device() < 0 || clear_arena() < 0 || new_stack() < 0) {
        me.g->dead = 1;
        return;
    }
    me.g->revived++;
    reopen_all();
}
