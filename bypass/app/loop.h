/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loop.h - a network device without a network: what is sent comes in again. For an application that talks to itself
 * on the stack (BYPASS_F_LOOPBACK). All state lies in the memory that is given, without pointers; each process has its
 * own view of it. One caller at a time.
 */
#ifndef BYPASS_LOOP_H
#define BYPASS_LOOP_H

#include "bypass.h"

enum { LOOP_STRIDE = 2048, LOOP_MTU = 1500 };

/* Bytes of memory for so many frames. */
BYPASS_API size_t loop_mem_size(uint32_t frames);
/* Makes a device in zeroed memory, aligned to 64 bytes. 0, -EINVAL. */
BYPASS_API int loop_init(void *mem, size_t size, uint32_t frames);

struct loop {
    struct bypass_netdev nd; /* first */
    struct loop_state *st;
    uint32_t *free_list, *ring;
};
/* A view of it. -EINVAL: it is none. */
BYPASS_API int loop_attach(struct loop *l, void *mem, size_t size);
/* Whoever held frames is gone: they are free again, those under way too. */
BYPASS_API void loop_reclaim(struct loop *l);
/* Frames that wait to be received. */
BYPASS_API uint32_t loop_waiting(const struct loop *l);

#endif
