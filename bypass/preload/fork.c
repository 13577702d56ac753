/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fork.c - fork() and what is made of it. The child has a place in the group, with all that its parent has, before it
 * runs. It joins the group when it works on a socket for the first time (attach_child()); until then it may only close
 * descriptors, become another program, or end, which costs nothing more than that. The broker is told of it by a message
 * on the parent's connection, so that the application does not end with the parent (APP_FORK).
 *
 * A child that clone(2) made without the C library is not known: it must not use its parent's sockets.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "preload.h"

static uint32_t child_place;             /* lock held */
static __thread uint32_t my_child_place; /* of the fork() that this thread is in */

/* ---- Around the C library's fork() ------------------------------------------------------------------------------ */
static void before(void)
{
    if (me.attached == 0 && me.may_pass && preload_wanted()) {
        attach(); /* descriptors may be passed to the child, which has to be a relative by then */
    }
    pthread_mutex_lock(&attaching);
    my_child_place = GROUP_NONE;
    if (me.attached <= 0) {
        return;
    }
    enter_quietly();
    child_place = my_child_place = group_join(me.g, -1);
    if (child_place != GROUP_NONE) {
        me.g->procs[child_place].state = PROC_FORKED;
        me.g->procs[child_place].since_ns = clock_ns();
        group_copy(me.g, me.proc, child_place);
        relatives_look_before(clock_ns() + RELATIVES_LOOK_NS);
    }
}

static void after_in_parent(void)
{
    if (me.attached > 0) {
        leave();
    }
    pthread_mutex_unlock(&attaching);
}

/* Descriptors that were the parent's own. */
static void drop_parents(void)
{
    me.watch_count -= me.wake_fd >= 0; /* it was added last */
    fd_unhide(me.wake_fd);
    fd_unhide(me.dev_ep);
    fd_unhide(me.helper.wake_fd);
    fd_unhide(self.wake_fd - 1);
    bells_child();
    broker_leave();
    rejoin_child();
    pass_child();
    relatives_child();
    me.wake_fd = me.dev_ep = me.helper.wake_fd = -1;
    self.wake_fd = 0;
}

static void after_in_child(void)
{
    pthread_mutex_unlock(&attaching);
    if (me.attached <= 0) {
        return;
    }
    me.pid = getpid();
    me.forked = true;
    me.halted_by = NULL;
    me.sleepers = me.watcher = NULL;
    me.lent = false;
    self.fed_ns = 0;
    me.helper_runs = me.helper_deep = me.helper_slow = false;
    self.sleeper = NULL;
    /* The lock is the parent thread's, which lets go of it: this process only forgets that it had it. */
    self.inside = 0;
    if (self.guarded) {
        self.guarded = 0;
        pthread_setcancelstate(self.cancel_state, NULL);
    }
    if (child_place == GROUP_NONE) { /* more processes than the group has room for */
        for (int fd = 0; fd < me.fd_top; fd++) {
            fd_mark(fd, 0);
        }
        me.attached = -1;
        snprintf(me.refused, sizeof me.refused, "more than %d processes", GROUP_PROCS);
        return;
    }
    me.proc = child_place;
    me.g->procs[me.proc].pid = me.pid;
    broker_tell_fork(me.pid);
    drop_parents();
    count_child();
    if (self.pending) {
        signals_deliver();
    }
}

void fork_prepare(void) { pthread_atfork(before, after_in_parent, after_in_child); }

EXPORT pid_t fork(void)
{
    pid_t pid;
    int saved;

    real_load();
    my_child_place = GROUP_NONE;
    pid = real.fork();
    if (pid < 0 && my_child_place != GROUP_NONE) {
        saved = errno;
        enter_quietly();
        relative_gone(my_child_place);
        leave();
        errno = saved;
    } else if (pid > 0 && my_child_place != GROUP_NONE) {
        enter_quietly();
        relative_watch(pid);
        leave();
    }
    return pid;
}

EXPORT pid_t _Fork(void) { return fork(); }

/* ---- vfork(2): allowed to be fork(2), by POSIX.1-2001; the parent waits for the child's exec or end all the same ---- */
EXPORT pid_t vfork(void)
{
    int gone[2] = {-1, -1};
    pid_t pid;
    char byte;

    real_load();
    (void)!pipe2(gone, O_CLOEXEC); /* without: they run side by side */
    gone[1] = fd_hide(gone[1]);
    pid = fork();
    if (pid == 0) {
        real.close(gone[0]);
        return 0; /* gone[1] ends with the program */
    }
    fd_unhide(gone[1]);
    while (pid > 0 && real.read(gone[0], &byte, 1) < 0 && errno == EINTR) {}
    if (gone[0] >= 0) {
        real.close(gone[0]);
    }
    return pid;
}

/* ---- daemon(3): the C library's own ends the parent without a word ---------------------------------------------------- */
static int null_streams(void)
{
    int fd = open("/dev/null", O_RDWR);

    if (fd < 0) {
        return -1;
    }
    dup2(fd, STDIN_FILENO);
    dup2(fd, STDOUT_FILENO);
    dup2(fd, STDERR_FILENO);
    if (fd > STDERR_FILENO) {
        close(fd);
    }
    return 0;
}

EXPORT int daemon(int nochdir, int noclose)
{
    pid_t pid = fork();

    if (pid < 0) {
        return -1;
    }
    if (pid > 0) {
        _exit(0);
    }
    if (setsid() < 0 || (!nochdir && chdir("/") < 0)) {
        return -1;
    }
    return noclose ? 0 : null_streams();
}
