/* SPDX-License-Identifier: Apache-2.0 */
/* See afxdp_fake.h. The fake kernel keeps its own books: what it took, in order, and whether it may touch it. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "afxdp/internal.h"
#include "bpf/verdict.h"

#include "afxdp_fake.h"

enum { MAX_FRAMES = 4096, TX_LEN_MIN = 14 };

struct fake_queue {
    struct ring_pos rx, tx, fill, comp; /* the kernel's own */
    uint64_t taken[MAX_FRAMES];         /* addresses between tx and completion ring */
    int taken_n;
};

static struct fake_queue fq[AFXDP_MAX_QUEUES];
static int kick_err, kick_budget, kicks, violations;
static const char *violation = "";

void afxdp_fake_violation(const char *where);
void afxdp_fake_violation(const char *where)
{
    violations++;
    violation = where;
}

/* ---- Kicks ------------------------------------------------------------------------------------------------ */

static int fake_wake_tx(struct afxdp *d, uint32_t qi)
{
    uint8_t seen[MAX_FRAMES];

    kicks++;
    fake_tx(d, qi, kick_budget, seen);
    return kick_err;
}

static int fake_wake_rx(struct afxdp *d, uint32_t qi)
{
    (void)d, (void)qi;
    kicks++;
    return 0;
}

static const struct afxdp_sys fake_sys = {.wake_tx = fake_wake_tx, .wake_rx = fake_wake_rx};

/* ---- Making ------------------------------------------------------------------------------------------------ */

/* Memory that is given, and how much of it is left; NULL: the heap. */
static uint8_t *given;
static size_t given_left;

static void *room_for(size_t size)
{
    void *at = given;

    size = (size + 4095) & ~(size_t)4095;
    if (!given) {
        at = aligned_alloc(4096, size);
    } else if (size > given_left) {
        return NULL;
    } else {
        given += size, given_left -= size;
    }
    return at ? memset(at, 0, size) : NULL;
}

static int make_ring(struct ring *r, uint32_t size, size_t entry, uint32_t first, struct ring_pos *ours,
                     struct ring_pos *theirs)
{
    uint32_t *head = given ? room_for(64 * 3 + size * entry) : calloc(1, 64 * 3 + size * entry);

    if (!head) {
        return 0;
    }

    *r = (struct ring){.producer = head,
                       .consumer = head + 16,
                       .flags = head + 32,
                       .entries = head + 48,
                       .size = size,
                       .mask = size - 1};
    *r->producer = *r->consumer = first;
    *ours = *theirs = (struct ring_pos){first, first};
    return 1;
}

struct afxdp *fake_open(const struct afxdp_config *cfg, uint32_t first)
{
    struct afxdp *d = calloc(1, sizeof *d);
    size_t size = afxdp_mem_size(cfg);
    uint32_t fill = cfg->fill_size ? cfg->fill_size : cfg->ring_size;
    void *mem = size ? room_for(size) : NULL;

    if (!mem || cfg->frames > MAX_FRAMES) {
        free(d);
        return NULL;
    }
    memset(fq, 0, sizeof fq);
    kick_err = 0, kick_budget = MAX_FRAMES, kicks = 0, violations = 0;
    d->nd.ops = &afxdp_ops;
    d->sys = &fake_sys;
    d->rx_off = KERNEL_HEADROOM + cfg->rx_headroom;
    d->epoll_fd = -1;
    d->nd.mtu = 1500;
    umem_init(d, cfg, mem, size);
    for (uint32_t qi = 0; qi < cfg->queue_count; qi++) {
        struct queue *q = &d->queue[qi];
        struct queue_state *qs = &d->st->queue[qi];

        if (!make_ring(&q->rx, cfg->ring_size, 16, first, &qs->rx, &fq[qi].rx) ||
            !make_ring(&q->tx, cfg->ring_size, 16, first, &qs->tx, &fq[qi].tx) ||
            !make_ring(&q->fill, fill, 8, first, &qs->fill, &fq[qi].fill) ||
            !make_ring(&q->comp, fill, 8, first, &qs->comp, &fq[qi].comp)) {
            return NULL;
        }
        *q->tx.flags = XDP_RING_NEED_WAKEUP;
        fill_refill(d, qi);
    }
    return d;
}

struct afxdp *fake_open_in(void *at, size_t room, const struct afxdp_config *cfg, uint32_t first)
{
    struct afxdp *d;

    given = at, given_left = room;
    d = fake_open(cfg, first);
    given = NULL;
    return d;
}

void *fake_kernel(uint32_t n, size_t *bytes)
{
    *bytes = n * sizeof *fq;
    return fq;
}

void fake_close(struct afxdp *d)
{
    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        struct queue *q = &d->queue[qi];

        free(q->rx.producer), free(q->tx.producer), free(q->fill.producer), free(q->comp.producer);
    }
    free(d->st);
    free(d);
}

/* ---- The kernel's side --------------------------------------------------------------------------------------- */

int fake_rx(struct afxdp *d, uint32_t qi, uint32_t len, uint8_t byte, int entry)
{
    struct queue *q = &d->queue[qi];
    struct steer_verdict v = {STEER_VERDICT_MAGIC, (unsigned)entry, 3, 4};
    uint64_t addr;

    if (ring_space(&q->rx, &fq[qi].rx, 1) == 0) {
        return -ENOSPC;
    }
    if (ring_avail(&q->fill, &fq[qi].fill, 1) == 0) {
        return -ENOBUFS;
    }
    addr = *ring_addr(&q->fill, fq[qi].fill.cons) + d->rx_off;
    ring_release(&q->fill, &fq[qi].fill, 1);
    memset(d->nd.mem + addr, byte, len);
    if (entry >= 0) {
        memcpy(d->nd.mem + addr - sizeof v, &v, sizeof v);
    }
    *ring_desc(&q->rx, fq[qi].rx.prod) = (struct xdp_desc){.addr = addr, .len = len};
    ring_produce(&q->rx, &fq[qi].rx, 1);
    return 0;
}

static int uniform(const uint8_t *p, uint32_t len)
{
    for (uint32_t i = 1; i < len; i++) {
        if (p[i] != p[0]) {
            return 0;
        }
    }
    return 1;
}

int fake_tx(struct afxdp *d, uint32_t qi, int n, uint8_t *seen)
{
    struct queue *q = &d->queue[qi];
    struct fake_queue *f = &fq[qi];
    int done = 0;

    while (done < n && ring_avail(&q->tx, &f->tx, 1) &&
           ring_space(&q->comp, &f->comp, q->comp.size) > (uint32_t)f->taken_n) {
        struct xdp_desc desc = *ring_desc(&q->tx, f->tx.cons);
        uint64_t end = desc.addr % d->nd.stride + desc.len;

        ring_release(&q->tx, &f->tx, 1);
        if (desc.addr / d->nd.stride >= d->nd.frames || end > d->nd.stride || desc.len < TX_LEN_MIN || desc.options ||
            !uniform(d->nd.mem + desc.addr, desc.len)) {
            afxdp_fake_violation("tx: a torn descriptor, or one that the kernel would refuse");
            continue;
        }
        seen[done++] = d->nd.mem[desc.addr];
        f->taken[f->taken_n++] = desc.addr;
    }
    return done;
}

int fake_complete(struct afxdp *d, uint32_t qi, int n, int reverse)
{
    struct queue *q = &d->queue[qi];
    struct fake_queue *f = &fq[qi];
    int done = 0;

    for (; done < n && f->taken_n; done++) {
        int at = reverse ? f->taken_n - 1 : 0;

        if (ring_space(&q->comp, &f->comp, 1) == 0) {
            afxdp_fake_violation("the kernel reserved room for this completion");
            break;
        }
        *ring_addr(&q->comp, f->comp.prod) = f->taken[at];
        memmove(&f->taken[at], &f->taken[at + 1], (size_t)(f->taken_n - at - 1) * sizeof *f->taken);
        f->taken_n--;
        ring_produce(&q->comp, &f->comp, 1);
    }
    return done;
}

void fake_wakeup(struct afxdp *d, uint32_t qi, int tx, int fill)
{
    *d->queue[qi].tx.flags = tx ? XDP_RING_NEED_WAKEUP : 0;
    *d->queue[qi].fill.flags = fill ? XDP_RING_NEED_WAKEUP : 0;
}

void fake_kick_answers(int err, int budget) { kick_err = err, kick_budget = budget; }

int fake_kicks(void)
{
    int n = kicks;

    kicks = 0;
    return n;
}

int fake_odd_rx(struct afxdp *d, uint32_t qi, uint32_t off, uint32_t len)
{
    struct queue *q = &d->queue[qi];
    uint64_t addr;

    if (ring_avail(&q->fill, &fq[qi].fill, 1) == 0) {
        return -ENOBUFS;
    }
    addr = *ring_addr(&q->fill, fq[qi].fill.cons) + off;
    ring_release(&q->fill, &fq[qi].fill, 1);
    fake_bad_rx(d, qi, addr, len);
    return 0;
}

void fake_bad_rx(struct afxdp *d, uint32_t qi, uint64_t addr, uint32_t len)
{
    struct queue *q = &d->queue[qi];

    if (ring_space(&q->rx, &fq[qi].rx, 1)) {
        *ring_desc(&q->rx, fq[qi].rx.prod) = (struct xdp_desc){.addr = addr, .len = len};
        ring_produce(&q->rx, &fq[qi].rx, 1);
    }
}

int fake_bad_completion(struct afxdp *d, uint32_t qi, uint64_t addr)
{
    struct queue *q = &d->queue[qi];

    if (ring_space(&q->comp, &fq[qi].comp, q->comp.size) > (uint32_t)fq[qi].taken_n) {
        *ring_addr(&q->comp, fq[qi].comp.prod) = addr;
        ring_produce(&q->comp, &fq[qi].comp, 1);
        return 1;
    }
    return 0;
}

void fake_torn_indices(struct afxdp *d, uint32_t qi, uint32_t by)
{
    struct queue *q = &d->queue[qi];

    *q->rx.producer += by, *q->comp.producer += by, *q->tx.consumer += by;
}

void fake_spoil(struct afxdp *d, int how)
{
    switch (how) {
    case 0:
        d->free_list[0] = d->free_list[1];
        break;
    case 1:
        meta_at(d, d->free_list[0])->holders = BYPASS_HOLD_STACK;
        break;
    case 2:
        d->st->queue[0].rx_frames++;
        break;
    case 3:
        d->st->queue[0].tx_frames++;
        break;
    default:
        meta_at(d, (uint32_t)(*ring_addr(&d->queue[0].fill, *d->queue[0].fill.consumer) / d->nd.stride))->holders |=
            BYPASS_HOLD_STACK;
    }
}

/* ---- Looking --------------------------------------------------------------------------------------------------- */

static void count(struct afxdp *d, uint8_t *places, uint64_t addr)
{
    if (addr / d->nd.stride < d->nd.frames && places[addr / d->nd.stride] < 255) {
        places[addr / d->nd.stride]++;
    }
}

void fake_census(struct afxdp *d, uint8_t *places)
{
    memset(places, 0, d->nd.frames);
    for (uint32_t i = 0; i < d->st->free_count; i++) {
        places[d->free_list[i]]++;
    }
    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        const struct queue *q = &d->queue[qi];
        const struct queue_state *qs = &d->st->queue[qi];

        for (uint32_t i = *q->fill.consumer; i != *q->fill.producer; i++) {
            count(d, places, *ring_addr(&q->fill, i));
        }
        for (uint32_t i = qs->rx.cons; i != *q->rx.producer; i++) {
            count(d, places, ring_desc(&q->rx, i)->addr);
        }
        for (uint32_t i = *q->tx.consumer; i != *q->tx.producer; i++) {
            count(d, places, ring_desc(&q->tx, i)->addr);
        }
        for (uint32_t i = qs->comp.cons; i != *q->comp.producer; i++) {
            count(d, places, *ring_addr(&q->comp, i));
        }
        for (int i = 0; i < fq[qi].taken_n; i++) {
            count(d, places, fq[qi].taken[i]);
        }
    }
}

uint32_t fake_rx_frames(struct afxdp *d, uint32_t qi) { return d->st->queue[qi].rx_frames; }

uint32_t fake_tx_left(struct afxdp *d, uint32_t qi) { return *d->queue[qi].tx.producer - *d->queue[qi].tx.consumer; }

int fake_violations(void)
{
    int n = violations;

    violations = 0;
    return n;
}

const char *fake_violation(void) { return violation; }

uint8_t fake_holders(struct afxdp *d, uint32_t frame) { return meta_at(d, frame)->holders; }
