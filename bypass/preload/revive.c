/* SPDX-License-Identifier: Apache-2.0 */
/*
 * revive.c - a relative was killed while it held the lock: what it was in the middle of is half done. Nothing of the
 * stack can be trusted then, and it is made anew in its memory: connections are over (their peers get resets for what
 * they send, this side ECONNRESET), listeners and bound datagram sockets go on, with their options and names, which are read
 * from the old stack before (each is one number, and fits if a new socket takes it). What relatives have is told from the group (group_repair()). Where that or the device
 * is damaged otherwise than by a death, the application ends for good: every call fails, and the broker gives its flows
 * back to the kernel.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

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

/* ---- What sockets are to have again --------------------------------------------------------------------------- */
static const uint8_t options[] = {
    BYPASS_SO_SNDBUF,
    BYPASS_SO_RCVBUF,
    BYPASS_SO_KEEPALIVE,
    BYPASS_SO_LINGER,
    BYPASS_SO_REUSEADDR,
    BYPASS_SO_BROADCAST,
    BYPASS_IP_TTL,
    BYPASS_IP_TOS,
    BYPASS_SO_REUSEPORT,
    BYPASS_SO_OOBINLINE,
    BYPASS_SO_RCVLOWAT,
    BYPASS_IP_MTU_DISCOVER,
    BYPASS_TCP_NODELAY,
    BYPASS_TCP_MAXSEG,
    BYPASS_TCP_QUICKACK,
    BYPASS_TCP_KEEPIDLE,
    BYPASS_TCP_KEEPINTVL,
    BYPASS_TCP_KEEPCNT,
    BYPASS_TCP_USER_TIMEOUT,
    BYPASS_TCP_SYNCNT,
    BYPASS_TCP_LINGER2,
    BYPASS_TCP_NOTSENT_LOWAT,
    BYPASS_SO_MAX_PACING_RATE,
    BYPASS_TCP_FASTOPEN,
};
enum { OPTIONS = sizeof options };

struct kept {
    bool there; /* the old stack knew it */
    int64_t values[OPTIONS];
    char congestion[BYPASS_CC_NAME];
    struct bypass_endpoint local, peer; /* of a datagram socket; port 0: none */
};

static void keep(struct kept *k, const struct object *o)
{
    k->there = bypass_getopt(&me.stack, o->sock, BYPASS_SO_TYPE) == o->type;
    for (int i = 0; k->there && i < OPTIONS; i++) {
        k->values[i] = bypass_getopt(&me.stack, o->sock, options[i]);
    }
    if (k->there && o->type == BYPASS_DGRAM) {
        bypass_local(&me.stack, o->sock, &k->local);
        bypass_peer(&me.stack, o->sock, &k->peer);
    } else if (k->there && bypass_cc_get(&me.stack, o->sock, k->congestion, sizeof k->congestion) < 0) {
        k->congestion[0] = 0;
    }
}

/* By object; NULL: no memory, and sockets are as new ones. */
static struct kept *keep_all(size_t *bytes)
{
    struct kept *all;

    *bytes = me.g->objects_bump * sizeof *all;
    all = mmap(NULL, *bytes ? *bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (uint32_t i = 0; all != MAP_FAILED && i < me.g->objects_bump; i++) {
        const struct object *o = group_object(me.g, i);

        if (o->refs && o->sock >= 0 && (o->place == PLACE_BOTH || o->place == PLACE_UNDECIDED)) {
            keep(&all[i], o);
        }
    }
    return all == MAP_FAILED ? NULL : all;
}

/* What differs from a new socket: a buffer's size that is set is no longer the stack's to choose. */
static void give_back(const struct object *o, const struct kept *k)
{
    char now[BYPASS_CC_NAME] = "";

    for (int i = 0; i < OPTIONS; i++) {
        if (k->values[i] >= -1 && k->values[i] != bypass_getopt(&me.stack, o->sock, options[i])) {
            bypass_setopt(&me.stack, o->sock, options[i], k->values[i]);
        }
    }
    if (k->congestion[0] && bypass_cc_get(&me.stack, o->sock, now, sizeof now) >= 0 &&
        memchr(k->congestion, 0, sizeof k->congestion) && strcmp(now, k->congestion) != 0) {
        bypass_cc_set(&me.stack, o->sock, k->congestion);
    }
}

/* ---- Sockets --------------------------------------------------------------------------------------------------- */

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
static void reopen(uint32_t object, const struct kept *k)
{
    struct object *o = group_object(me.g, object);

    o->sock = bypass_socket(&me.stack, o->type);
    if (k && k->there && o->sock >= 0) {
        give_back(o, k);
        o->local = o->type == BYPASS_DGRAM && k->local.port ? k->local : o->local;
    }
    if (o->sock < 0 || bind_again(o) < 0 || (o->listening && bypass_listen(&me.stack, o->sock, o->backlog) < 0)) {
        o->sock = -1;
        return;
    }
    if (k && k->there && k->peer.port) {
        bypass_connect(&me.stack, o->sock, &k->peer);
    }
    bypass_set_user(&me.stack, o->sock, object + 1);
}

/* It has told nobody yet whose it will be. */
static void renew(uint32_t object, const struct kept *k)
{
    struct object *o = group_object(me.g, object);

    o->sock = bypass_socket(&me.stack, o->type);
    if (k && k->there && o->sock >= 0) {
        give_back(o, k);
    }
    bypass_set_user(&me.stack, o->sock, object + 1);
}

static void reopen_all(const struct kept *all)
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
            reopen(i, all ? &all[i] : NULL);
        } else if (o->place == PLACE_UNDECIDED) {
            renew(i, all ? &all[i] : NULL);
        }
        group_notify(me.g, i, BYPASS_EVERYTHING);
    }
}

void revive(void)
{
    struct kept *all = NULL;
    size_t bytes = 0;

    pthread_mutex_consistent(&me.g->lock);
    me.g->check_ns = 0; /* what it had has to end soon; it may even have been the one who looks after the dead */
    if (!me.g->working) {
        return; /* it had not begun, or was through */
    }
    /* A process that is just attaching has no device yet: it cannot do it. */
    if (me.g->dead || !me.dev || !group_repair(me.g)) {
        me.g->dead = 1;
        return;
    }
    all = keep_all(&bytes);
    if (reclaim_device() < 0 || clear_arena() < 0 || new_stack() < 0) {
        me.g->dead = 1;
    } else {
        me.g->revived++;
        reopen_all(all);
    }
    if (all) {
        munmap(all, bytes ? bytes : 1);
    }
}
