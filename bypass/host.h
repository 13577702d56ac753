/* SPDX-License-Identifier: Apache-2.0 */
/*
 * host.h - what the stack's environment needs of the operating system, for programs that run on one: secrets
 * and the clock. The core itself never calls these.
 */
#ifndef BYPASS_HOST_H
#define BYPASS_HOST_H

#ifndef BYPASS_CDEF
#include <stddef.h>
#include <stdint.h>
#endif

/* For bypass_env.random: n bytes of getrandom(2). ctx is not used. 0 or -errno. */
int host_random(void *ctx, void *buf, size_t n);
/* CLOCK_MONOTONIC in nanoseconds: the same clock as Python's time.monotonic_ns(). */
uint64_t host_now_ns(void);

#endif
