/* SPDX-License-Identifier: Apache-2.0 */
/* real.c - see real.h. */
#define _GNU_SOURCE
#include "real.h"

#include <dlfcn.h>
#include <stdbool.h>

struct real real;

/* A function that this C library lacks stays NULL: closefrom and epoll_pwait2 are of glibc 2.34 and 2.35. */
__attribute__((constructor(101))) void real_load_now(void)
{
    static bool done;

    if (done) {
        return;
    }
    /* POSIX promises that the result of dlsym() may be used as a function; ISO C has no conversion for it. */
#define X(type, name, args) *(void **)&real.name = dlsym(RTLD_NEXT, #name);
    REAL_FUNCTIONS(X)
#undef X
    done = true;
}
