/* SPDX-License-Identifier: Apache-2.0 */
/* wheel.c - see wheel.h. A slot of level l covers 64^l ticks; entering it deals its entries out to the
 * lower levels. An entry always stands 1 to 64 slots ahead of its level's current one. */
#include "wheel.h"
#include "tcp.h"

static struct wheel_node *node(struct bypass_stack *s, uint32_t i) { return &conn_at(s, i)->timer; }

void wheel_init(struct wheel *w, uint64_t now_ns)
{
    memset(w->head, 0xff, sizeof w->head);
    w->cur = now_ns >> WHEEL_TICK_SHIFT;
}

static void link_node(struct bypass_stack *s, struct wheel *w, uint32_t i, uint64_t tick)
{
    struct wheel_node *n = node(s, i);
    uint64_t ahead = tick - w->cur;
    uint32_t level = 0;
    while (level + 1 < WHEEL_LEVELS && ahead >> (WHEEL_BITS * (level + 1)) != 0)
        level++;
    uint32_t slot = (uint32_t)(tick >> (WHEEL_BITS * level)) & (WHEEL_SLOTS - 1);
    uint32_t *head = &w->head[level][slot];
    n->tick = tick;
    n->slot = (uint16_t)(level * WHEEL_SLOTS + slot);
    n->prev = NO_INDEX;
    n->next = *head;
    if (*head != NO_INDEX)
        node(s, *head)->prev = i;
    *head = i;
    w->pending[level] |= 1ull << slot;
    w->armed++;
}

void wheel_disarm(struct bypass_stack *s, struct wheel *w, uint32_t i)
{
    struct wheel_node *n = node(s, i);
    if (n->slot == WHEEL_OFF)
        return;
    uint32_t level = n->slot / WHEEL_SLOTS, slot = n->slot % WHEEL_SLOTS;
    if (n->prev != NO_INDEX)
        node(s, n->prev)->next = n->next;
    else
        w->head[level][slot] = n->next;
    if (n->next != NO_INDEX)
        node(s, n->next)->prev = n->prev;
    if (w->head[level][slot] == NO_INDEX)
        w->pending[level] &= ~(1ull << slot);
    n->slot = WHEEL_OFF;
    w->armed--;
}

void wheel_arm(struct bypass_stack *s, struct wheel *w, uint32_t i, uint64_t deadline_ns)
{
    const uint64_t span = 1ull << (WHEEL_BITS * WHEEL_LEVELS);
    struct wheel_node *n = node(s, i);
    /* round up: a deadline must not fire early */
    uint64_t tick = (deadline_ns + (1ull << WHEEL_TICK_SHIFT) - 1) >> WHEEL_TICK_SHIFT;
    tick = max_u64(tick, w->cur + 1);
    tick = min_u64(tick, w->cur + span - 1);
    if (n->slot != WHEEL_OFF) {
        if (n->tick <= tick)
            return; /* lazy: it is looked at in time and armed again then */
        wheel_disarm(s, w, i);
    }
    link_node(s, w, i, tick);
}

/* The first tick after cur at which a slot begins that has entries. */
static uint64_t next_tick(const struct wheel *w)
{
    uint64_t best = UINT64_MAX;
    for (uint32_t l = 0; l < WHEEL_LEVELS; l++) {
        if (w->pending[l] == 0)
            continue;
        uint64_t slot = w->cur >> (WHEEL_BITS * l);
        uint32_t r = (uint32_t)(slot + 1) & (WHEEL_SLOTS - 1);
        uint64_t turned = r == 0 ? w->pending[l] : w->pending[l] >> r | w->pending[l] << (WHEEL_SLOTS - r);
        best = min_u64(best, (slot + 1 + (uint64_t)__builtin_ctzll(turned)) << (WHEEL_BITS * l));
    }
    return best;
}

static void cascade(struct bypass_stack *s, struct wheel *w, uint32_t level)
{
    uint32_t slot = (uint32_t)(w->cur >> (WHEEL_BITS * level)) & (WHEEL_SLOTS - 1);
    uint32_t i;
    while ((i = w->head[level][slot]) != NO_INDEX) {
        uint64_t tick = node(s, i)->tick;
        wheel_disarm(s, w, i);
        link_node(s, w, i, tick);
    }
}

uint32_t wheel_expire(struct bypass_stack *s, struct wheel *w, uint64_t now_ns)
{
    uint64_t target = now_ns >> WHEEL_TICK_SHIFT;
    for (;;) {
        uint32_t i = w->head[0][w->cur & (WHEEL_SLOTS - 1)];
        if (i != NO_INDEX && node(s, i)->tick <= w->cur) {
            if (node(s, i)->next != NO_INDEX)
                __builtin_prefetch(node(s, node(s, i)->next));
            wheel_disarm(s, w, i);
            return i;
        }
        uint64_t next = w->armed ? next_tick(w) : UINT64_MAX;
        if (next > target) {
            w->cur = max_u64(w->cur, target);
            return NO_INDEX;
        }
        w->cur = next;
        for (uint32_t l = WHEEL_LEVELS - 1; l > 0; l--)
            if ((w->cur & ((1ull << (WHEEL_BITS * l)) - 1)) == 0)
                cascade(s, w, l);
    }
}

uint64_t wheel_next(const struct wheel *w)
{
    if (w->armed == 0)
        return NO_DEADLINE;
    return next_tick(w) << WHEEL_TICK_SHIFT;
}
