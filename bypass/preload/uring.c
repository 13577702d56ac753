/* SPDX-License-Identifier: Apache-2.0 */
/*
 * uring.c - whether this process has an io_uring (io_uring_setup(2)). What is asked of the kernel by one goes past this
 * library and finds the shadow: a listener would never accept what is steered. So sockets of a process that has one are
 * the kernel's. It is looked for where a socket's place is decided, for most programs make theirs by instructions of
 * their own.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <string.h>
#include <unistd.h>

#include "preload.h"

enum { LOOK_NS = 1000000000, SHARE = 100 };

static bool used;
static uint64_t again_ns; /* when connect() has it looked for again: looking takes a hundredth of the time at most */

void uring_noted(void) { used = true; }

static bool has_ring(void)
{
    static const char name[] = "anon_inode:[io_uring]";
    DIR *d = opendir("/proc/self/fd");
    const struct dirent *e;
    char to[sizeof name];
    bool found = false;

    while (d && !found && (e = readdir(d))) {
        found =
            readlinkat(dirfd(d), e->d_name, to, sizeof to) == sizeof name - 1 && memcmp(to, name, sizeof name - 1) == 0;
    }
    if (d) {
        closedir(d);
    }
    return found;
}

bool uring_used(bool now)
{
    uint64_t begin = clock_ns(), cost;

    if (!used && (now || begin >= again_ns)) {
        used = has_ring();
        cost = (clock_ns() - begin) * SHARE;
        again_ns = begin + (cost > LOOK_NS ? cost : LOOK_NS);
    }
    return used;
}
