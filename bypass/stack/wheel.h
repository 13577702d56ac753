/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A hierarchical timer wheel over the connections of the arena: one lazy deadline each. Four levels of
 * 64 slots, a tick of 2^20 ns (about 1 ms): five hours ahead. Setting a later deadline costs a store;
 * only an earlier one moves the entry.
 */
#ifndef BYPASS_STACK_WHEEL_H
#define BYPASS_STACK_WHEEL_H

#include "core.h"

enum { WHEEL_LEVELS = 4, WHEEL_BITS = 6, WHEEL_SLOTS = 64, WHEEL_TICK_SHIFT = 20, WHEEL_OFF = 0xffff };

struct wheel {    /* in the arena */
    uint64_t cur; /* last tick that was run */
    uint64_t pending[WHEEL_LEVELS];
    uint32_t armed;
    uint32_t pad;
    uint32_t head[WHEEL_LEVELS][WHEEL_SLOTS];
};

struct wheel_node { /* in the connection */
    uint64_t tick;  /* where it stands; its true deadline may be later */
    uint32_t next, prev;
    uint16_t slot; /* level * 64 + slot, WHEEL_OFF: not armed */
    uint16_t pad[3];
};

void wheel_init(struct wheel *w, uint64_t now_ns);
/* The entry is looked at in time for this deadline as it stands: nothing has to be armed. */
static inline bool wheel_covers(const struct wheel_node *n, uint64_t deadline_ns)
{
    return n->slot != WHEEL_OFF && n->tick <= (deadline_ns + (1ull << WHEEL_TICK_SHIFT) - 1) >> WHEEL_TICK_SHIFT;
}
/* The current tick was run to its end and is still the current one: nothing can be due. */
static inline bool wheel_at_rest(const struct wheel *w, uint64_t now_ns)
{
    return now_ns >> WHEEL_TICK_SHIFT <= w->cur && w->head[0][w->cur & (WHEEL_SLOTS - 1)] == NO_INDEX;
}
/* Makes sure that entry i is looked at when deadline_ns has come. */
void wheel_arm(struct bypass_stack *s, struct wheel *w, uint32_t i, uint64_t deadline_ns);
void wheel_disarm(struct bypass_stack *s, struct wheel *w, uint32_t i);
/* Takes one entry that is due out of the wheel; NO_INDEX when none is due any more. Each stored deadline
 * fires at or after its time, never before. */
uint32_t wheel_expire(struct bypass_stack *s, struct wheel *w, uint64_t now_ns);
/* A time not later than the first deadline; NO_DEADLINE when the wheel is empty. */
uint64_t wheel_next(const struct wheel *w);

#endif
