/* SPDX-License-Identifier: Apache-2.0 */
/*
 * host.c - secrets and the clock, from the operating system: getrandom(2), clock_gettime(2).
 */
#define _GNU_SOURCE
#include "host.h"

#include <errno.h>
#include <sys/random.h>
#include <time.h>

int host_random(void *ctx, void *buf, size_t n)
{
    uint8_t *at = buf;

    (void)ctx;
    while (n > 0) {
        ssize_t got = getrandom(at, n, 0); /* more than 256 bytes may come in parts */
        if (got < 0) {
            if (errno == EINTR) {
                continue;
            }
            return -errno;
        }
        at += got;
        n -= (size_t)got;
    }
    return 0;
}

uint64_t host_now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts); /* cannot fail: the clock exists and ts is ours */
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}
