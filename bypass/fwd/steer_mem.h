/* SPDX-License-Identifier: Apache-2.0 */
/*
 * steer_mem.h - a classifier's memory (dpdk_backend/classify.h) that was passed by descriptor. The broker writes rules
 * and live entries there; who reads has it mapped.
 */
#ifndef BYPASS_FWD_STEER_MEM_H
#define BYPASS_FWD_STEER_MEM_H

#include <stdbool.h>
#include <stddef.h>

#include "dpdk_backend/classify.h"

struct steer_mem {
    void *map; /* NULL: none */
    size_t size;
    struct classifier view;
};

/* The descriptor stays the caller's. 0; -EPERM: it is not sealed against shrinking, and touching what is gone would be a
 * SIGBUS; -EINVAL: no classifier of this version is in it; -errno of mmap(2). */
int steer_mem_open(struct steer_mem *m, int fd);
void steer_mem_close(struct steer_mem *m);

/* Is that a file of memory, and not a BPF map? */
bool steer_mem_is(int fd);

#endif
