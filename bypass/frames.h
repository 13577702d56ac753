/* SPDX-License-Identifier: Apache-2.0 */
/*
 * frames.h - where every frame of a device is, counted the same way for each of them: AF_XDP (afxdp/umem.c), a port of
 * DPDK (dpdk_backend/eth/stats.c), an application's port (fwd/port.c).
 *
 * A frame's place is meta.holders and nothing else; a device's free list is derived from it. So the list is walked first,
 * marking what it names, and then all frames are: what is free has to be marked, once, and nothing else may be.
 */
#ifndef BYPASS_FRAMES_H
#define BYPASS_FRAMES_H

#ifndef BYPASS_CDEF
#include <stdbool.h>
#endif

#include "bypass.h"

struct frame_audit { /* every frame in exactly one place; sums to `frames` */
    uint32_t frames;
    uint32_t free;
    uint32_t stack;     /* held by the caller only */
    uint32_t tx;        /* held by the device for transmission only */
    uint32_t stack_tx;  /* held by both */
    uint32_t rx;        /* with the device for reception */
    uint32_t misplaced; /* in no place, or in more than one */
    uint32_t bad_free;  /* calls of free() for frames that the caller did not hold */
};

#ifndef BYPASS_CDEF
enum { FRAMES_LISTED = 0x80 }; /* of meta.holders, while an audit walks */

/* The free list names this frame. */
static inline void frames_listed(struct bypass_pkt_meta *m, struct frame_audit *out)
{
    out->misplaced += (m->holders & FRAMES_LISTED) != 0;
    m->holders |= FRAMES_LISTED;
}

/* All frames, after what is listed; marks are gone then. `misplaced` is added to, bad_free is the caller's. */
static inline void frames_count(const struct bypass_netdev *nd, struct frame_audit *out)
{
    uint32_t *const place[] = {&out->free, &out->stack, &out->tx, &out->stack_tx, &out->rx}; /* by BYPASS_HOLD_* */

    out->frames = nd->frames;
    for (uint32_t f = 0; f < nd->frames; f++) {
        struct bypass_pkt_meta *m = (struct bypass_pkt_meta *)((uint8_t *)nd->meta + (size_t)f * nd->meta_stride);
        bool listed = m->holders & FRAMES_LISTED;

        m->holders &= (uint8_t)~FRAMES_LISTED;
        if (m->holders >= sizeof place / sizeof *place || listed != (m->holders == 0)) {
            out->misplaced++;
        } else {
            ++*place[m->holders];
        }
    }
}
#endif

#endif
