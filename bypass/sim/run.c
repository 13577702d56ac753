/* SPDX-License-Identifier: Apache-2.0 */
/*
 * run.c - the virtual clock: which stack runs when. Within one instant stacks run in turn, in the order
 * they were added, until none has anything to do; then the clock moves to the next instant at which a
 * frame arrives, a stack's deadline passes, or a transmission completes.
 */
#include <errno.h>
#include <stdlib.h>

#include "internal.h"

enum {
    POLL_BUDGET = 64,         /* frames: what a stack takes as one batch */
    INSTANT_ROUNDS = 1 << 22, /* without an event and without time passing: stacks that never rest */
    STALL_NS = 1000,          /* later, a stack is polled again that is overdue but does nothing */
};

struct sim *sim_create(uint64_t seed, uint64_t start_ns)
{
    struct sim *sim = calloc(1, sizeof *sim);
    if (sim) {
        sim->seed = seed;
        sim->now_ns = start_ns;
    }
    return sim;
}

void sim_destroy(struct sim *sim)
{
    while (sim->ports) {
        struct port *p = sim->ports;
        sim->ports = p->all;
        port_release(p);
    }
    while (sim->wires) {
        struct sim_wire *w = sim->wires;
        sim->wires = w->next;
        free(w);
    }
    while (sim->streams) {
        struct random_stream *r = sim->streams;
        sim->streams = r->next;
        free(r);
    }
    free(sim->stacks);
    free(sim);
}

uint64_t sim_now(const struct sim *sim) { return sim->now_ns; }

int sim_random(void *ctx, void *buf, size_t n)
{
    struct random_stream *r = ctx;
    uint8_t *out = buf;
    for (size_t done = 0; done < n;) {
        uint64_t word = prng_next(&r->prng);
        size_t part = n - done < sizeof word ? n - done : sizeof word;
        memcpy(out + done, &word, part);
        done += part;
    }
    return 0;
}

int sim_env(struct sim *sim, struct bypass_env *env, uint32_t stream)
{
    struct random_stream *r = calloc(1, sizeof *r);
    if (!r) {
        return -ENOMEM;
    }
    /* Ports use the small numbers. */
    prng_seed(&r->prng, sim->seed, (1ull << 32) + stream);
    r->next = sim->streams;
    sim->streams = r;
    *env = (struct bypass_env){.random = sim_random, .ctx = r};
    return 0;
}

int sim_stack_add(struct sim *sim, struct bypass_stack *stack, struct bypass_netdev *port)
{
    if (!port_is(port)) {
        return -EINVAL;
    }
    int i = 0;
    while (i < sim->stack_count && sim->stacks[i].stack) {
        i++;
    }
    if (i == sim->stack_cap) {
        int cap = sim->stack_cap ? 2 * sim->stack_cap : 8;
        struct sim_stack *more = realloc(sim->stacks, (size_t)cap * sizeof *more);
        if (!more) {
            return -ENOMEM;
        }
        sim->stacks = more;
        sim->stack_cap = cap;
    }
    sim->stacks[i] = (struct sim_stack){.stack = stack, .port = port_of(port)};
    if (i == sim->stack_count) {
        sim->stack_count++;
    }
    return i;
}

void sim_stack_del(struct sim *sim, int number)
{
    if (number >= 0 && number < sim->stack_count) {
        sim->stacks[number].stack = NULL;
    }
}

/* ---- One instant ---------------------------------------------------------------------------------- */

static bool completion_due(const struct port *p, uint64_t now_ns)
{
    return p->bad.complete_ns && p->done_head != p->done_tail && p->done[p->done_head & p->done_mask].time_ns <= now_ns;
}

static bool stack_wants_poll(const struct sim_stack *st, uint64_t now_ns)
{
    return st->touched || port_rx_waiting(st->port) || completion_due(st->port, now_ns) ||
           (!st->stalled && bypass_deadline(st->stack) <= now_ns);
}

/* Polls one stack and notices when it does nothing although it is overdue (it waits for the device). */
static int stack_run(struct sim_stack *st, uint64_t now_ns)
{
    uint64_t sent = st->port->stats.tx_frames;
    st->touched = false;
    int got = bypass_poll(st->stack, now_ns, POLL_BUDGET);
    if (got < 0 && got != -ENETDOWN && got != -ENXIO) {
        return got;
    }
    st->stalled = got <= 0 && st->port->stats.tx_frames == sent && bypass_deadline(st->stack) <= now_ns;
    return 0;
}

static int take_events(struct sim_stack *st, uint32_t number, struct sim_event *out, int room)
{
    struct bypass_event ev[64];
    int total = 0;
    while (total < room) {
        int want = room - total < 64 ? room - total : 64;
        int n = bypass_events(st->stack, ev, want);
        for (int i = 0; i < n; i++) {
            out[total++] =
                (struct sim_event){.stack = number, .mask = ev[i].mask, .sock = ev[i].sock, .user = ev[i].user};
        }
        if (n < want) {
            break;
        }
    }
    return total;
}

/* Runs every stack that wants it once. 1: some did, 0: the instant is over, or -errno. */
static int run_round(struct sim *sim, struct sim_event *out, int max, int *events)
{
    int ran = 0;
    for (int i = 0; i < sim->stack_count; i++) {
        struct sim_stack *st = &sim->stacks[i];
        if (!st->stack || !stack_wants_poll(st, sim->now_ns)) {
            continue;
        }
        int err = stack_run(st, sim->now_ns);
        if (err) {
            return err;
        }
        *events += take_events(st, (uint32_t)i, out + *events, max - *events);
        ran = 1;
    }
    return ran;
}

/* ---- The clock ------------------------------------------------------------------------------------ */

static uint64_t min_ns(uint64_t a, uint64_t b) { return a < b ? a : b; }

uint64_t sim_next(const struct sim *sim)
{
    uint64_t next = UINT64_MAX;
    for (const struct port *p = sim->ports; p; p = p->all) {
        next = min_ns(next, wire_next(p));
    }
    for (int i = 0; i < sim->stack_count; i++) {
        const struct sim_stack *st = &sim->stacks[i];
        if (!st->stack) {
            continue;
        }
        if (st->touched || port_rx_waiting(st->port)) {
            return sim->now_ns;
        }
        uint64_t deadline = bypass_deadline(st->stack);
        next = min_ns(next, st->stalled ? sim->now_ns + STALL_NS : deadline);
        const struct port *p = st->port;
        if (p->bad.complete_ns && p->done_head != p->done_tail) {
            next = min_ns(next, p->done[p->done_head & p->done_mask].time_ns);
        }
    }
    return next < sim->now_ns ? sim->now_ns : next;
}

static void clock_set(struct sim *sim, uint64_t now_ns)
{
    sim->now_ns = now_ns;
    for (int i = 0; i < sim->stack_count; i++) {
        sim->stacks[i].stalled = false;
    }
    for (struct port *p = sim->ports; p; p = p->all) {
        wire_deliver(p, now_ns);
    }
}

static bool raw_port_waiting(const struct sim *sim)
{
    for (const struct port *p = sim->ports; p; p = p->all) {
        if (p->flags & SIM_PORT_RAW && port_rx_waiting(p)) {
            return true;
        }
    }
    return false;
}

static bool capture_full(const struct sim *sim)
{
    for (const struct port *p = sim->ports; p; p = p->all) {
        if (p->capture && capture_wants_read(p->capture)) {
            return true;
        }
    }
    return false;
}

/* Why to stop within this instant; SIM_TIME: no reason. */
static uint32_t stop_reason(const struct sim *sim, int events)
{
    if (events) {
        return SIM_EVENTS;
    }
    return raw_port_waiting(sim) ? SIM_RAW : capture_full(sim) ? SIM_CAPTURE : SIM_TIME;
}

static int finish(struct sim *sim, uint32_t reason, int events, struct sim_result *res)
{
    *res = (struct sim_result){.now_ns = sim->now_ns, .reason = reason, .events = (uint32_t)events};
    for (int i = 0; i < sim->stack_count; i++) {
        if (sim->stacks[i].stack) {
            bypass_now(sim->stacks[i].stack, sim->now_ns); /* what the program calls next happens now */
        }
    }
    return 0;
}

int sim_run(struct sim *sim, uint64_t until_ns, struct sim_event *out, int max, struct sim_result *res)
{
    int events = 0;
    for (int i = 0; i < sim->stack_count; i++) {
        sim->stacks[i].touched = true;
    }
    clock_set(sim, sim->now_ns);
    for (uint32_t rounds = 0;; rounds++) {
        int ran = run_round(sim, out, max, &events);
        if (ran < 0) {
            return ran;
        }
        uint32_t reason = stop_reason(sim, events);
        if (reason) {
            return finish(sim, reason, events, res);
        }
        if (ran) {
            if (rounds == INSTANT_ROUNDS) {
                return -ELOOP;
            }
            continue;
        }
        uint64_t next = sim_next(sim);
        if (next == UINT64_MAX && until_ns == UINT64_MAX) {
            return finish(sim, SIM_IDLE, 0, res);
        }
        if (next > until_ns) {
            clock_set(sim, until_ns > sim->now_ns ? until_ns : sim->now_ns);
            return finish(sim, SIM_TIME, 0, res);
        }
        rounds = next > sim->now_ns ? 0 : rounds;
        clock_set(sim, next);
    }
}
