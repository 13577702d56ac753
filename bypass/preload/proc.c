/* SPDX-License-Identifier: Apache-2.0 */
/*
 * proc.c - relatives that say nothing: killed ones, children that have not called anything yet, and programs without this
 * library that were started with descriptors of the application's (a static one, one with another LD_PRELOAD). What they
 * have counts as theirs until /proc says that it is not; an object that nobody has ends.
 *
 * A relative that joined is there as long as the socket that wakes it (wake.c): that one is close-on-exec, and ends with
 * the process. Of others the process number is looked at, with its start time, and for programs what they have open
 * (proc(5), /proc/PID/fd). A program whose descriptors may not be looked at keeps what it had until it ends. That is done
 * once a second; a parent notices its children's ends, and a child its parent's, at once (pidfd_open(2)).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload.h"

enum { WATCHED = 256, SETTLE_NS = 300000000, SETTLE_LOOK_NS = 5000000, MADE_NS = 1000000000 };

static void ended(void *arg, uint32_t object)
{
    (void)arg;
    object_end(object);
}

void relative_gone(uint32_t proc)
{
    group_leave(me.g, proc, ended, NULL);
    me.g->kick_again = EAGAIN; /* it may have been killed when it was about to */
}

void relatives_look_before(uint64_t due_ns)
{
    if (due_ns < me.g->check_ns) {
        me.g->check_ns = due_ns;
    }
}

/* ---- Alive? --------------------------------------------------------------------------------------------------- */

/* The process' start, in ticks; 0: it has ended (or is a zombie); UINT64_MAX: that cannot be seen now. */
static uint64_t start_of(pid_t pid)
{
    char path[32], text[1024], *at, state;
    unsigned long long start;
    ssize_t n;
    int fd, threads;

    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return kill(pid, 0) < 0 && errno == ESRCH ? 0 : UINT64_MAX;
    }
    n = real.read(fd, text, sizeof text - 1);
    real.close(fd);
    text[n > 0 ? n : 0] = 0;
    at = strrchr(text, ')'); /* the name may have anything in it */
    if (!at || sscanf(at + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %d %*d %llu", &state,
                      &threads, &start) != 3) {
        return n > 0 ? UINT64_MAX : 0;
    }
    if (state != 'Z' && state != 'X') {
        return start;
    }
    /* The first thread may have ended, or be about to give its number to another one that calls exec (de_thread() in
     * fs/exec.c). Without any thread it gave that away, or ended, while this was read: the next look tells. */
    return threads == 1 ? 0 : threads == 0 ? UINT64_MAX : start;
}

static bool alive(struct proc *p)
{
    uint64_t start;

    if (p->pid < 0) {
        return clock_ns() - p->since_ns < MADE_NS; /* a child that died before it could say its number */
    }
    start = start_of(p->pid);
    if (start == 0) {
        return false;
    }
    if (p->started == 0 && start != UINT64_MAX) {
        p->started = start;
    }
    return p->started == 0 || start == UINT64_MAX || p->started == start;
}

/* The socket that wakes it is closed: it has ended, or become another program. */
static bool deaf(uint32_t proc)
{
    struct sockaddr_un sa;
    socklen_t len = wake_name(&sa, proc);
    int fd = real.socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool refused = fd >= 0 && real.connect(fd, (struct sockaddr *)&sa, len) < 0 && errno == ECONNREFUSED;

    if (fd >= 0) {
        real.close(fd);
    }
    return refused;
}

/* ---- What does it have? ------------------------------------------------------------------------------------------ */
struct inodes {
    uint64_t *list;
    size_t count, room;
};

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static bool inodes_add(struct inodes *in, uint64_t ino)
{
    if (in->count == in->room) {
        size_t room = in->room ? 2 * in->room : 64;
        uint64_t *list = realloc(in->list, room * sizeof *list);

        if (!list) {
            return false;
        }
        in->list = list;
        in->room = room;
    }
    in->list[in->count++] = ino;
    return true;
}

/* The sockets that a process has open, sorted, each as often as it has it. false: it cannot be seen. */
static bool sockets_of(pid_t pid, struct inodes *in)
{
    char path[32];
    struct dirent *e;
    bool good = true, any = false;
    DIR *d;

    *in = (struct inodes){0};
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    d = opendir(path);
    while (d && good && (e = readdir(d))) {
        char target[64];
        unsigned long long ino;
        ssize_t n = readlinkat(dirfd(d), e->d_name, target, sizeof target - 1);

        target[n > 0 ? n : 0] = 0;
        any |= n > 0;
        if (sscanf(target, "socket:[%llu]", &ino) == 1) {
            good = inodes_add(in, ino);
        }
    }
    if (d) {
        closedir(d);
    }
    if (good && in->count) {
        qsort(in->list, in->count, sizeof *in->list, by_value);
    }
    return d && good && any; /* nothing at all: the first thread has ended, and others have what there is */
}

static uint32_t times(const struct inodes *in, uint64_t ino)
{
    size_t low = 0, high = in->count;
    uint32_t n = 0;

    while (low < high) {
        size_t middle = (low + high) / 2;

        if (in->list[middle] < ino) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    for (; low < in->count && in->list[low] == ino; low++) {
        n++;
    }
    return n;
}

/* Less than is known of it. */
static bool lacks(uint32_t proc, const struct inodes *in)
{
    for (uint32_t i = 0; i < me.g->objects_bump; i++) {
        const struct object *o = group_object(me.g, i);

        if (o->refs && o->ino && times(in, o->ino) < group_holds(me.g, i, proc)) {
            return true;
        }
    }
    return false;
}

/* A program has what it has open, no more. Whether it has anything of ours. When another thread than the first calls exec,
 * the first one ends, and what it is listed with goes while it is listed. So what is missing is looked for once more: by then
 * nothing is listed, or the new program. */
static bool recount(uint32_t proc)
{
    struct inodes in, again = {0};
    bool any = false, seen = sockets_of(me.g->procs[proc].pid, &in);

    if (seen && lacks(proc, &in)) {
        seen = sockets_of(me.g->procs[proc].pid, &again);
    }
    for (uint32_t i = 0; i < me.g->objects_bump; i++) {
        struct object *o = group_object(me.g, i);

        if (o->refs && group_holds(me.g, i, proc)) {
            uint32_t n = times(&in, o->ino), more = times(&again, o->ino);

            n = !seen || !o->ino ? group_holds(me.g, i, proc) : n > more ? n : more;
            any |= n > 0;
            if (group_set_hold(me.g, i, proc, n)) {
                object_end(i);
            }
        }
    }
    free(in.list);
    free(again.list);
    return any;
}

/* ---- Looking after them --------------------------------------------------------------------------------------------- */

/* The image with this number has joined by itself. */
static bool joined_again(uint32_t proc)
{
    for (uint32_t i = 0; i < me.g->procs_top; i++) {
        if (i != proc && me.g->procs[i].pid == me.g->procs[proc].pid && me.g->procs[i].state == PROC_JOINED) {
            return true;
        }
    }
    return false;
}

void relative_look(uint32_t proc)
{
    struct proc *p = &me.g->procs[proc];

    if (p->state == PROC_JOINED) {
        if (!deaf(proc)) {
            return;
        }
        p->state = PROC_FOREIGN;
        p->since_ns = clock_ns();
    }
    if (!alive(p) || (p->state == PROC_FOREIGN && (joined_again(proc) || !recount(proc)))) {
        relative_gone(proc);
    }
}

void relatives_check(void)
{
    uint64_t now = clock_ns(), next = UINT64_MAX;

    me.g->check_ns = UINT64_MAX;
    for (uint32_t i = 0; i < me.g->procs_top; i++) {
        struct proc *p = &me.g->procs[i];

        if (p->pid && i != me.proc) {
            relative_look(i);
        }
        if (p->pid && i != me.proc) {
            bool soon = p->state == PROC_FOREIGN && now - p->since_ns < SETTLE_NS;
            uint64_t due = now + (soon ? SETTLE_LOOK_NS : RELATIVES_LOOK_NS);

            next = due < next ? due : next;
        }
    }
    pass_check();
    relatives_look_before(next);
}

void relatives_suspect(uint32_t object)
{
    for (uint32_t h = group_object(me.g, object)->holds; h != GROUP_NONE; h = group_hold(me.g, h)->next) {
        if (me.g->procs[group_hold(me.g, h)->proc].state == PROC_FOREIGN) {
            relatives_look_before(0);
            drive_anew();
            return;
        }
    }
}

/* ---- Parent and children -------------------------------------------------------------------------------------------- */
static int ends[WATCHED]; /* pidfds; of more relatives the end is noticed by the look once a second */
static uint32_t end_count;

void relatives_open(void)
{
    if (me.ends_ep < 0) {
        me.ends_ep = fd_hide(real.epoll_create1(EPOLL_CLOEXEC));
    }
}

void relative_watch(pid_t pid)
{
    struct epoll_event ev = {.events = EPOLLIN};
    int fd = me.ends_ep >= 0 && end_count < WATCHED ? (int)real.syscall(SYS_pidfd_open, pid, 0) : -1;

    fd = fd_hide(fd);
    ev.data.fd = fd;
    if (fd >= 0 && real.epoll_ctl(me.ends_ep, EPOLL_CTL_ADD, fd, &ev) == 0) {
        ends[end_count++] = fd;
    } else {
        fd_unhide(fd);
    }
}

void relatives_ended(void)
{
    struct epoll_event ev[16];
    int n = real.epoll_wait(me.ends_ep, ev, 16, 0);

    for (int i = 0; i < n; i++) {
        for (uint32_t e = end_count; e-- > 0;) {
            if (ends[e] == ev[i].data.fd) {
                fd_unhide(ends[e]);
                ends[e] = ends[--end_count];
            }
        }
    }
    if (n > 0) {
        relatives_check();
    }
}

void relatives_child(void)
{
    while (end_count > 0) {
        fd_unhide(ends[--end_count]);
    }
    fd_unhide(me.ends_ep);
    me.ends_ep = -1;
}
