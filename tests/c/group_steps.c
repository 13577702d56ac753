/* SPDX-License-Identifier: Apache-2.0 */
/*
 * group_steps.c - a process that changes what relatives share (bypass/preload/group.c), stopped after every instruction
 * that changed it: what if it was killed there? Its parent repairs the group, looks whether all that follows from the
 * holds is so, uses it, puts it back, and lets the process take the next step.
 *
 *     group_steps OPERATIONS SEED
 *
 * Prints how many moments were tried.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "preload/group.h"

enum { SOCKS = 16, PROCS = 5, MOST = 1024, ROOM = 256 << 10 };

static struct group *g;
static unsigned steps;

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *text, ...)
{
    va_list args;

    va_start(args, text);
    fprintf(stderr, "step %u: ", steps);
    vfprintf(stderr, text, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static unsigned rnd(unsigned n) { return (unsigned)random() % n; }

/* ---- The child: any operations, in any order, as the library makes them ------------------------------------------ */
static void ended(void *arg, uint32_t object)
{
    (void)arg;
    group_object_free(g, object);
}

static void change(uint32_t object, uint32_t proc)
{
    const struct object *o = group_object(g, object);
    uint32_t mask;

    switch (rnd(8)) {
    case 0:
        group_ref(g, object, proc);
        break;
    case 1:
        if (group_holds(g, object, proc) && group_unref(g, object, proc)) {
            group_object_free(g, object);
        }
        break;
    case 2:
        group_call_begins(g, object, proc);
        if (rnd(2) && group_call_ends(g, object, proc)) {
            group_object_free(g, object);
        }
        break;
    case 3:
        if (o->holds != GROUP_NONE) {
            group_hold(g, o->holds)->waits = 1;
        }
        group_notify(g, object, BYPASS_IN);
        break;
    case 4:
        group_take(g, proc, &mask);
        break;
    default:
        if (group_set_hold(g, object, proc, rnd(3))) {
            group_object_free(g, object);
        }
    }
}

static void use(int operations)
{
    for (int i = 0; i < operations; i++) {
        uint32_t object = rnd(SOCKS), proc = rnd(PROCS), fresh;

        if (g->procs[proc].pid == 0) {
            fresh = group_join(g, 100);
            if (rnd(2)) {
                group_copy(g, (fresh + 1) % PROCS, fresh);
            }
        } else if (rnd(20) == 0) {
            group_leave(g, proc, ended, NULL);
        } else if (object < g->objects_bump && group_object(g, object)->refs) {
            change(object, proc);
        } else if ((fresh = group_object_new(g)) != GROUP_NONE) {
            group_object(g, fresh)->refs = 0; /* as object_make() does */
            group_ref(g, fresh, proc);
        }
    }
}

/* ---- What if it died now? ---------------------------------------------------------------------------------------- */
static void check_holds(uint8_t *seen)
{
    for (uint32_t i = 0; i < g->objects_bump; i++) {
        const struct object *o = group_object(g, i);
        uint32_t refs = o->under_way;

        for (uint32_t h = o->refs ? o->holds : GROUP_NONE; h != GROUP_NONE; h = group_hold(g, h)->next) {
            const struct hold *hold = group_hold(g, h);

            if (seen[h]++ || hold->object != i || g->procs[hold->proc].pid == 0 || hold->queued) {
                fail("hold %u of object %u is not as it should be", h, i);
            }
            refs += hold->refs + hold->calls;
        }
        if (refs != o->refs) {
            fail("object %u: %u references, and %u are told", i, refs, o->refs);
        }
    }
}

static void check(void)
{
    uint8_t seen[MOST] = {0}, object_seen[MOST] = {0};
    uint32_t used = 0, procs = 0;

    check_holds(seen);
    for (uint32_t h = g->holds_free; h != GROUP_NONE; h = group_hold(g, h)->next) {
        if (h >= g->holds_bump || seen[h]++) {
            fail("hold %u is free, and is not", h);
        }
    }
    for (uint32_t i = g->objects_free; i != GROUP_NONE; i = group_object(g, i)->next) {
        if (i >= g->objects_bump || object_seen[i]++ || group_object(g, i)->refs) {
            fail("object %u is free, and is not", i);
        }
    }
    for (uint32_t i = 0; i < g->objects_bump; i++) {
        used += group_object(g, i)->refs != 0;
        if (!object_seen[i] != (group_object(g, i)->refs != 0)) {
            fail("object %u is lost", i);
        }
    }
    for (uint32_t h = 0; h < g->holds_bump; h++) {
        if (!seen[h]) {
            fail("hold %u is lost", h);
        }
    }
    for (int i = 0; i < GROUP_PROCS; i++) {
        procs += g->procs[i].pid != 0;
    }
    if (used != g->objects_used || procs != g->relatives) {
        fail("%u of %u objects, %u of %u processes", g->objects_used, used, g->relatives, procs);
    }
}

static void die_here(uint8_t *saved)
{
    memcpy(saved, g, ROOM);
    if (!group_repair(g)) {
        fail("it cannot be repaired");
    }
    check();
    use(20);
    if (!group_repair(g)) {
        fail("it cannot be repaired again");
    }
    check();
    memcpy(g, saved, ROOM);
}

int main(int argc, char **argv)
{
    int operations = argc > 1 ? atoi(argv[1]) : 100, status;
    unsigned seed = argc > 2 ? (unsigned)atoi(argv[2]) : 1, tried = 0;
    uint8_t *saved = calloc(2, ROOM);
    pid_t pid;

    g = mmap(NULL, ROOM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (g == MAP_FAILED || group_init(g, ROOM, SOCKS, 1) < 0 || g->holds_max > MOST) {
        fail("no room");
    }
    pid = fork();
    if (pid == 0) {
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGSTOP);
        srandom(seed);
        use(operations);
        _exit(0);
    }
    waitpid(pid, &status, 0);
    while (WIFSTOPPED(status)) {
        if (ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) < 0 || waitpid(pid, &status, 0) < 0) {
            fail("it cannot be stepped");
        }
        steps++;
        if (WIFSTOPPED(status) && memcmp(g, saved + ROOM, ROOM) != 0) {
            memcpy(saved + ROOM, g, ROOM);
            die_here(saved);
            tried++;
        }
    }
    printf("%d operations, %u instructions, %u moments\n", operations, steps, tried);
    return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}
