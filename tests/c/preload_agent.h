/* SPDX-License-Identifier: Apache-2.0 */
/*
 * preload_agent.h - what the two files of the agent share: preload_agent.c talks with the test, keeps processes, threads
 * and signals; preload_calls.c has one function for each call on descriptors.
 */
#ifndef PRELOAD_AGENT_H
#define PRELOAD_AGENT_H

#include <stddef.h>

enum {
    AGENT_ARGS = 8,
    AGENT_TEXT = 60000, /* of a command or an answer */
    AGENT_FDS = 60,     /* numbers below are the test's, all above the agent's own */
    AGENT_CONTROL = 900,
    AGENT_AGENTS = 4, /* processes: control sockets AGENT_CONTROL ... */
};

/* What a call gives beside its value and errno is printed here. */
struct answer {
    char *text;
    size_t len;
};

__attribute__((format(printf, 2, 3))) void answer_add(struct answer *, const char *format, ...);

struct agent_call {
    const char *name;
    int args; /* this many numbers */
    long (*run)(const long *a, struct answer *);
};

extern const struct agent_call agent_calls[]; /* preload_calls.c; ends with an empty one */

#endif
