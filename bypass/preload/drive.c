/* SPDX-License-Identifier: Apache-2.0 */
/*
 * drive.c - a turn of the stack, and who is told of what it found.
 *
 * Whoever waits drives: before it sleeps a thread gives the stack a turn, and while it sleeps it watches the device for
 * all threads of its process (me.watcher). Other sleepers wait on an eventfd of their own until a turn finds something
 * for them. Where nobody waits, the helper thread drives:
 *
 *      program                          helper
 *      calls, turns every now and then  looks every millisecond whether that is so
 *      computes                         gives the stack a turn every millisecond
 *      sleeps elsewhere (sleep(3))      watches the device
 *      sleeps in a call of ours         sleeps too, until the program has been awake
 */
#define _GNU_SOURCE
#include "preload.h"

enum {
    RETRY_NS = 50000, /* a call that would block looks at the device again after it */
    TURN_ROUNDS = 8,  /* batches of one turn */
    EVENTS = 64,
    WANTED = 16,
    LOST = POLLERR | POLLHUP | POLLIN | POLLOUT | POLLRDHUP,
};

uint64_t clock_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* ---- Readiness ------------------------------------------------------------------------------------------- */
short object_ready(const struct object *o)
{
    int ready;

    if (unlikely(o->sock < 0 || me.g->dead)) {
        return me.g->dead || o->place == PLACE_STACK ? LOST : 0;
    }
    ready = bypass_ready(&me.stack, o->sock);
    if (ready < 0) {
        return POLLNVAL;
    }
    return (short)poll_bits((uint32_t)ready);
}

/* ---- Telling ---------------------------------------------------------------------------------------------- */
/* Tells this process' threads of what became ready for it. */
static bool take_local(void)
{
    bool any = false;

    me.g->procs[me.proc].called = 0;
    for (uint32_t object, mask; (object = group_take(me.g, me.proc, &mask)) != GROUP_NONE; any = true) {
        me.vain = 0;
        if (me.local[object].items) {
            epoll_ready(object, poll_bits(mask));
        }
        for (struct sleeper *s = me.sleepers; s; s = s->next) {
            if (s->object == object || (s->object == GROUP_NONE && !s->epoll)) {
                wake(s);
            }
        }
    }
    return any;
}

static bool dispatch(void)
{
    struct bypass_event events[EVENTS];
    bool others = false, any = false;
    int n;

    while ((n = bypass_events(&me.stack, events, EVENTS)) > 0) {
        for (int i = 0; i < n; i++) {
            uint32_t object = (uint32_t)events[i].user - 1;

            if (events[i].user && object < me.g->objects_bump && group_object(me.g, object)->sock == events[i].sock) {
                group_notify(me.g, object, events[i].mask);
                others |= group_object(me.g, object)->holds != GROUP_NONE;
            }
        }
    }
    any = take_local();
    if (others && me.g->relatives > 1) {
        wake_relatives();
    }
    return any;
}

/* ---- A turn ---------------------------------------------------------------------------------------------------- */
static void next_hops(void)
{
    struct bypass_addr wanted[WANTED];
    int n;

    if (me.app->device != APP_DEV_LOOP && broker_fd() < 0) {
        return; /* a relative may have a broker; who takes the question has to ask it */
    }
    n = bypass_nexthop_wanted(&me.stack, wanted, WANTED);

    for (int i = 0; i < n; i++) {
        broker_resolve(&wanted[i]);
    }
}

/* When the stack, or the care for relatives, wants a turn at the latest. */
uint64_t next_turn(void)
{
    uint64_t due = me.g->kick_again == EAGAIN ? 0 : bypass_deadline(&me.stack);

    due = me.g->blocks_due_ns < due ? me.g->blocks_due_ns : due;
    return me.g->check_ns < due ? me.g->check_ns : due;
}

void drive_anew(void)
{
    if (me.watcher == &me.helper) {
        ring(me.helper.wake_fd);
    } else if (me.watcher) {
        wake(me.watcher);
    }
}

static bool more_waits(int got, int batch)
{
    return got == batch || (me.app->device == APP_DEV_LOOP && loop_waiting(&me.loop) > 0);
}

bool turn(void)
{
    int batch = me.app->batch ? (int)me.app->batch : 256;
    bool any = false;

    if (me.g->dead) {
        return false;
    }
    for (int round = 0; round < TURN_ROUNDS; round++) {
        uint64_t now = clock_ns();
        int got = bypass_poll(&me.stack, now, batch);

        me.g->turn_ns = now;
        me.g->turns++;
        me.turns++;
        if (got > 0) {
            any = true;
        }
        if (got < 0 || !more_waits(got, batch)) {
            break;
        }
    }
    if (unlikely(me.g->kick_again || me.halted_by)) {
        device_kick_again(); /* halted_by: this process ends, and nothing is put off any more */
    }
    me.g->unsent = 0;
    next_hops();
    leases_check();
    if (unlikely(me.g->turn_ns >= me.g->check_ns)) {
        relatives_check();
    }
    any |= dispatch();
    if (me.watcher && next_turn() < me.watch_until) {
        drive_anew(); /* who watches for this thread meant to sleep longer */
    }
    return any;
}

void sent(void)
{
    if (++me.g->unsent >= FLUSH_AT) {
        turn();
    } else if (unlikely(me.helper_deep || (me.helper_slow && clock_ns() - me.g->turn_ns > TICK_NS))) {
        me.helper_deep = me.helper_slow = false; /* the program may not wait soon: the next tick sends it then */
        ring(me.helper.wake_fd);
    }
}

bool retry(void)
{
    uint64_t now = clock_ns();

    if (now - me.g->turn_ns < RETRY_NS &&
        !(me.app->device == APP_DEV_LOOP && (me.g->unsent || loop_waiting(&me.loop)))) {
        return false;
    }
    me.turn_ns = now;
    turn();
    return true;
}
