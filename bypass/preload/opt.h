/* SPDX-License-Identifier: Apache-2.0 */
/* opt.h - what is known about each socket option: the table of opt_rows.c, which opt.c follows. */
#ifndef BYPASS_PRELOAD_OPT_H
#define BYPASS_PRELOAD_OPT_H

#include "preload.h"

/* Who has it. What only the kernel has, by what a program would miss on the stack: */
enum side {
    UNKNOWN,
    SAME,  /* nothing: its value is kept in the shadow */
    KEPT,  /* nothing that changes its results: kept in the shadow, and `bypass conns` says so */
    LOST,  /* what it asked for: the socket is the kernel's; a connection that is on the stack already: ENOPROTOOPT */
    MULTI, /* the same, for multicast */
    STACK,
};
enum kind {
    NUMBER,
    DOUBLED,  /* Linux counts its own overhead too: it reports twice what was set (socket(7)) */
    OPTIONAL, /* a number; where the stack cannot, the program works the same */
    LINGER,
    TIMEOUT,
    RATE,
    CONGESTION,
    V6ONLY,
    FORCED, /* as DOUBLED, with a privilege; only set. From here on the kernel's answer to setsockopt() counts: */
    INFO,
    PENDING, /* SO_ERROR */
    PEER,    /* SO_PEERNAME */
    NOTHING, /* told of no connection of the stack's: an empty value */
};

struct option_row {
    uint8_t side, kind;
    uint8_t core; /* BYPASS_* of bypass.h; TIMEOUT: 1 of sending */
    const char *name;
};

/* What this object has at that level; an unknown row for anything else: the kernel says what is wrong with it. */
const struct option_row *option_row(const struct object *o, int level, int name);

#endif
