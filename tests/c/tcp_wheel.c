/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_wheel.c - the timer wheel against the plainest model: an array of deadlines. Random arming, later and
 * earlier, disarming, and time in steps between a tick and years.
 *
 *   tcp_wheel SEED STEPS
 *
 * What the wheel promises (wheel.h): an entry is looked at when its stored deadline has come, never before, and at most
 * a tick late; storing a later deadline may leave the earlier one standing; wheel_next() is never too late.
 */
#include <stdio.h>
#include <stdlib.h>

#include "tcp.h"

enum { ENTRIES = 300 };

#define TICK_NS (1ull << WHEEL_TICK_SHIFT)
#define SPAN_TICKS (1ull << (WHEEL_BITS * WHEEL_LEVELS))

#define CHECK(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            fprintf(stderr, "line %d, seed %llu, step %u: %s\n", __LINE__, seed, step, #what);                         \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static unsigned long long seed;
static uint32_t step;
static uint64_t rng_state;

static uint64_t rng(void) /* splitmix64 */
{
    uint64_t z = rng_state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

/* Mostly short, sometimes very long: 2^0 to 2^54 ns. */
static uint64_t some_time(void) { return rng() >> (10 + rng() % 54); }

struct model {
    uint64_t stands; /* when the wheel has to look at it; 0: not armed */
} model[ENTRIES];

static struct bypass_stack stack;
static struct wheel wheel;
static uint64_t now;

static void arm(uint32_t i)
{
    uint64_t at = now + some_time();
    uint64_t far = (wheel.cur + SPAN_TICKS - 1) << WHEEL_TICK_SHIFT; /* what lies beyond is looked at then */
    uint64_t kept = at < far ? at : far;
    wheel_arm(&stack, &wheel, i, at);
    if (model[i].stands == 0 || kept < model[i].stands)
        model[i].stands = kept;
}

static void disarm(uint32_t i)
{
    wheel_disarm(&stack, &wheel, i);
    model[i].stands = 0;
}

static uint64_t earliest(void)
{
    uint64_t best = UINT64_MAX;
    for (uint32_t i = 0; i < ENTRIES; i++)
        if (model[i].stands && model[i].stands < best)
            best = model[i].stands;
    return best;
}

static uint32_t armed(void)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < ENTRIES; i++)
        n += model[i].stands != 0;
    return n;
}

static void expire(void)
{
    uint32_t i;
    while ((i = wheel_expire(&stack, &wheel, now)) != NO_INDEX) {
        CHECK(i < ENTRIES);
        CHECK(model[i].stands != 0);
        CHECK(model[i].stands <= now);
        model[i].stands = 0;
        if (rng() % 8 == 0)
            arm(i); /* as a connection does that is not due yet */
        if (rng() % 16 == 0)
            disarm((uint32_t)(rng() % ENTRIES));
    }
    for (i = 0; i < ENTRIES; i++)
        CHECK(model[i].stands == 0 || model[i].stands + TICK_NS > now); /* none is forgotten */
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    seed = strtoull(argv[1], NULL, 0);
    uint32_t steps = (uint32_t)strtoul(argv[2], NULL, 0);
    rng_state = seed;
    now = some_time();
    /* An arena that holds nothing but connections: the wheel's entries live in them. */
    struct core *c = calloc(1, sizeof *c + sizeof(struct tcp_conn) * ENTRIES);
    if (!c)
        return 2;
    stack.arena = c;
    c->conns = (struct pool){.off = sizeof *c, .size = sizeof(struct tcp_conn), .cap = ENTRIES};
    for (uint32_t i = 0; i < ENTRIES; i++)
        conn_at(&stack, i)->timer.slot = WHEEL_OFF;
    wheel_init(&wheel, now);
    for (step = 0; step < steps; step++) {
        uint64_t what = rng() % 16;
        uint32_t i = (uint32_t)(rng() % ENTRIES);
        if (what < 8)
            arm(i);
        else if (what < 10)
            disarm(i);
        else if (what < 14)
            now += some_time() >> 12;
        else if (what == 14 && earliest() != UINT64_MAX && earliest() > now)
            now = earliest() - rng() % 2; /* exactly then, or a nanosecond before */
        else
            now += some_time();
        expire();
        uint64_t next = wheel_next(&wheel);
        CHECK(wheel.armed == armed());
        CHECK((next == NO_DEADLINE) == (armed() == 0));
        CHECK(armed() == 0 || next <= earliest() + TICK_NS);
    }
    while (armed() > 0) { /* driven by wheel_next() alone everything fires */
        uint64_t next = wheel_next(&wheel);
        CHECK(next != NO_DEADLINE && next + TICK_NS > now);
        now = next > now ? next : now + 1;
        step++;
        expire();
    }
    CHECK(wheel_next(&wheel) == NO_DEADLINE);
    free(c);
    printf("%u steps\n", step);
    return 0;
}
