/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kick.c - the system calls by which the device sends: made when the lock is free again (lock.c). In copy mode such a call
 * takes frames all the way to their receiver, ten times as long as the stack had them, and who makes it may lose the
 * processor to the one it wakes; whoever wants the lock would wait for both.
 *
 * Who is killed between lock and call leaves frames in the ring of which nobody was told: relatives tell of them when they
 * notice (group.kick_again), or with the next of their own.
 */
#define _GNU_SOURCE
#include "afxdp/afxdp.h"
#include "preload.h"

void device_defer(bool on)
{
    if (me.app->device == APP_DEV_AFXDP) {
        afxdp_defer(me.afxdp, on);
    } else if (me.app->device == APP_DEV_PORT) {
        port_defer(&me.port, on);
    }
}

uint64_t device_owed(void)
{
    if (unlikely(!me.dev)) {
        return 0; /* attach() is at it */
    }
    if (me.app->device == APP_DEV_AFXDP) {
        return afxdp_owed(me.afxdp);
    }
    return me.app->device == APP_DEV_PORT && port_owed(&me.port);
}

void device_kick(uint64_t owed)
{
    int err = 0;

    if (me.app->device == APP_DEV_AFXDP) {
        err = afxdp_kick_owed(me.afxdp, owed);
    } else {
        port_kick_owed(&me.port);
    }
    if (unlikely(err < 0)) {
        enter_quietly();
        me.g->kick_again = (uint32_t)-err;
        if (err == -EAGAIN) {
            drive_anew(); /* whoever is about to sleep did not know */
        }
        leave();
    }
}

void device_kick_again(void)
{
    int err;

    device_defer(false);
    err = me.dev->ops->kick(me.dev);
    device_defer(true);
    me.g->kick_again = err < 0 && err != -ENXIO ? (uint32_t)-err : 0; /* ENXIO: receiving tells it too */
}
