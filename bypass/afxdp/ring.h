/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ring.h - one end of a single-producer, single-consumer ring of AF_XDP. No system calls: the other end may be
 * the kernel, a thread or a test. Read first: Documentation/networking/af_xdp.rst, net/xdp/xsk_queue.h.
 *
 * Indices are free-running 32-bit numbers; entry i lies at i & mask, and prod - cons (modulo 2^32) is the number
 * of filled entries, so wrapping needs no special case. Each end owns one index and keeps a cached copy of both
 * in `struct ring_pos`, to touch the other end's cache line only when the cached copy says full or empty.
 *
 * Barriers (partners in the kernel, net/xdp/xsk_queue.h):
 *   A  ring_produce:  store-release of producer  -> load-acquire of producer in the consumer's peek
 *   B  ring_avail:    load-acquire of producer   <- store-release of producer when the kernel submits
 *   C  ring_release:  store-release of consumer  -> the producer's read of consumer before it reuses an entry
 *   D  ring_space:    load-acquire of consumer   <- store-release of consumer when the kernel releases
 */
#ifndef BYPASS_AFXDP_RING_H
#define BYPASS_AFXDP_RING_H

#include <linux/if_xdp.h>
#include <stdbool.h>
#include <stdint.h>

struct ring { /* process-local: where the shared ring is mapped */
    uint32_t *producer, *consumer, *flags;
    void *entries; /* struct xdp_desc of rx and tx rings, uint64_t addresses of fill and completion rings */
    uint32_t size, mask;
};

struct ring_pos { /* our cached view, kept in the device's state; holds no pointers */
    uint32_t prod, cons;
};

/* ---- Producer (tx, fill) ---------------------------------------------------------------------------- */

/* Free entries, looking at the consumer only when fewer than `want` seem free. */
static inline uint32_t ring_space(const struct ring *r, struct ring_pos *pos, uint32_t want)
{
    uint32_t space = r->size - (pos->prod - pos->cons);

    if (space < want) {
        uint32_t cons = __atomic_load_n(r->consumer, __ATOMIC_ACQUIRE); /* D */

        if (pos->prod - cons <= r->size) { /* else nonsense from the other end: nothing new is free */
            pos->cons = cons;
            space = r->size - (pos->prod - cons);
        }
    }
    return space;
}

/* Publishes n entries that were written from pos->prod on. */
static inline void ring_produce(const struct ring *r, struct ring_pos *pos, uint32_t n)
{
    pos->prod += n;
    __atomic_store_n(r->producer, pos->prod, __ATOMIC_RELEASE); /* A */
    __atomic_signal_fence(__ATOMIC_SEQ_CST);                    /* what follows does not happen before: reclaim.c */
}

/* The entry at pos->prod is written and will be published with the next ring_produce(). In the order of the program: of
 * who is killed before that, the cached position tells how far it came (reclaim.c). */
static inline void ring_stage(struct ring_pos *pos)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    pos->prod++;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/* Entries that we published and the other end has not consumed. A hint: it may consume at any time. */
static inline uint32_t ring_unconsumed(const struct ring *r, const struct ring_pos *pos)
{
    return pos->prod - __atomic_load_n(r->consumer, __ATOMIC_RELAXED);
}

/* The same by the ring alone, for who does not hold what guards our end. */
static inline uint32_t ring_left(const struct ring *r)
{
    return __atomic_load_n(r->producer, __ATOMIC_RELAXED) - __atomic_load_n(r->consumer, __ATOMIC_RELAXED);
}

/* Between publishing and ring_needs_wakeup(), once for any number of rings: a driver that goes to sleep sets its flag
 * first and then looks at the ring once more, so one side sees what the other did. */
static inline void ring_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Whether the kernel wants a system call to go on with a ring that we produce. After ring_fence(). */
static inline bool ring_needs_wakeup(const struct ring *r)
{
    return __atomic_load_n(r->flags, __ATOMIC_RELAXED) & XDP_RING_NEED_WAKEUP;
}

/* ---- Consumer (rx, completion) ---------------------------------------------------------------------- */

/* Filled entries, at most max, looking at the producer only when fewer than that seem filled. */
static inline uint32_t ring_avail(const struct ring *r, struct ring_pos *pos, uint32_t max)
{
    uint32_t n = pos->prod - pos->cons;

    if (n < max) {
        uint32_t prod = __atomic_load_n(r->producer, __ATOMIC_ACQUIRE); /* B */

        if (prod - pos->cons <= r->size) { /* else nonsense from the other end: nothing to read */
            pos->prod = prod;
            n = prod - pos->cons;
        }
    }
    return n < max ? n : max;
}

/* Gives n entries back, which were read from pos->cons on. */
static inline void ring_release(const struct ring *r, struct ring_pos *pos, uint32_t n)
{
    pos->cons += n;
    __atomic_store_n(r->consumer, pos->cons, __ATOMIC_RELEASE); /* C */
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

static inline struct xdp_desc *ring_desc(const struct ring *r, uint32_t i)
{
    return (struct xdp_desc *)r->entries + (i & r->mask);
}
static inline uint64_t *ring_addr(const struct ring *r, uint32_t i) { return (uint64_t *)r->entries + (i & r->mask); }

#endif
