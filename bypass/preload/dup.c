/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dup.c - descriptors by number: dup() and its family, fcntl(), ioctl(), close_range(), closefrom().
 *
 * Duplicates name one object, which counts them. The library's own descriptors do not exist for the program: every call
 * on one gives EBADF, also dup2() onto it (as for a number above the limit), and ranges pass over them.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/close_range.h>
#include <linux/sockios.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "preload.h"

/* The argument of a variadic call: an int or a pointer, passed in a register either way. */
#define ARGUMENT(last)                                                                                                 \
    ({                                                                                                                 \
        va_list list_;                                                                                                 \
        va_start(list_, last);                                                                                         \
        void *arg_ = va_arg(list_, void *);                                                                            \
        va_end(list_);                                                                                                 \
        arg_;                                                                                                          \
    })

/* ---- A new number ------------------------------------------------------------------------------------------------ */
static int duplicate(int fd, int cmd, void *from)
{
    struct object *o = fd_enter_quietly(fd);
    int got;

    if (fd_hidden(fd)) {
        return -EBADF;
    }
    got = real.fcntl(fd, cmd, from);
    got = got < 0 ? -errno : got;
    if (o) {
        if (got >= 0) {
            fd_set_object(got, object_index(o));
        }
        leave();
    } else if (got >= 0) {
        fd_fresh(got);
        if (fd_entry(fd) & FD_EPOLL) {
            epoll_dup(fd, got);
        }
    }
    return got;
}

EXPORT int dup(int fd)
{
    real_load();
    return result(duplicate(fd, F_DUPFD, NULL));
}

/* ---- A number that is given ---------------------------------------------------------------------------------------- */
static int replace_real(int fd, int onto, int flags, bool dup_2)
{
    int got = dup_2 ? real.dup2(fd, onto) : real.dup3(fd, onto, flags);

    return got < 0 ? -errno : got;
}

/* The kernel's socket of a listener that ends may have other holders (the broker, relatives): it must not go on
 * listening for them. A descriptor to end it by, once the call has succeeded; -1: it is none. */
static int last_listener(int fd)
{
    const struct object *o = group_object(me.g, fd_object(fd));

    return o->listening && o->refs == 1 ? real.fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
}

/* Lock held: other threads that use `onto` wait, if the table knows it. It is to know it as long as one of both, what was
 * there and what comes, is an object. */
static int replace(int fd, int onto, int flags, bool dup_2)
{
    uint32_t from = fd_object(fd), to = fd_object(onto);
    int last = to != GROUP_NONE ? last_listener(onto) : -1, got;

    if (from != GROUP_NONE && to == GROUP_NONE) {
        fd_set_object(onto, from);
    }
    got = replace_real(fd, onto, flags, dup_2);
    if (got < 0 && from != GROUP_NONE && to == GROUP_NONE) {
        fd_forget(onto);
    } else if (got >= 0 && to != GROUP_NONE) {
        from != GROUP_NONE ? fd_set_object(onto, from) : fd_forget(onto);
    }
    if (last >= 0) {
        if (got >= 0) {
            real.shutdown(last, SHUT_RDWR);
        }
        real.close(last);
    }
    return got;
}

static int duplicate_onto(int fd, int onto, int flags, bool dup_2)
{
    bool set, over;
    int got;

    if (fd_hidden(fd) || fd_hidden(onto)) {
        return -EBADF;
    }
    if (fd == onto || (fd_entry(fd) | fd_entry(onto)) == 0) {
        return replace_real(fd, onto, flags, dup_2);
    }
    set = fd_entry(fd) & FD_EPOLL;
    over = fd_entry(onto) & FD_EPOLL;
    if ((over || set) && real.fcntl(fd, F_GETFD) < 0) {
        return -errno;
    }
    if (over) {
        epoll_close(onto);
        fd_mark(onto, 0);
    }
    if (me.attached > 0) {
        enter_quietly();
        got = replace(fd, onto, flags, dup_2);
        leave();
    } else { /* sets are noted before the first socket */
        got = replace_real(fd, onto, flags, dup_2);
    }
    if (got >= 0 && set) {
        epoll_dup(fd, onto);
    }
    if (got >= 0 && onto <= STDERR_FILENO) {
        stream_standard(onto);
    }
    return got;
}

EXPORT int dup2(int fd, int onto)
{
    real_load();
    return result(duplicate_onto(fd, onto, 0, true));
}

EXPORT int dup3(int fd, int onto, int flags)
{
    real_load();
    if (flags & ~O_CLOEXEC) {
        return result(-EINVAL); /* before anything is closed */
    }
    return result(duplicate_onto(fd, onto, flags, false));
}

/* ---- Ranges ----------------------------------------------------------------------------------------------------------- */

/* The first descriptor from `at` on that the table knows; UINT_MAX: there is none. */
static unsigned known(unsigned at, unsigned last)
{
    unsigned top = (unsigned)me.fd_top;

    for (; at < top && at <= last; at++) {
        if (fd_entry((int)at) != 0) {
            return at;
        }
    }
    return UINT_MAX;
}

static void close_known(unsigned first, unsigned last)
{
    unsigned at = known(first, last);

    if (at == UINT_MAX) {
        return;
    }
    for (; at != UINT_MAX; at = known(at + 1, last)) {
        if (fd_entry((int)at) & FD_EPOLL) {
            epoll_close((int)at);
            fd_mark((int)at, 0);
        }
    }
    enter_quietly();
    for (at = known(first, last); at != UINT_MAX; at = known(at + 1, last)) {
        if (fd_object((int)at) != GROUP_NONE) {
            close_object((int)at);
        }
    }
    leave();
}

/* The kernel's part: all but the library's own. */
static int range_real(unsigned first, unsigned last, int flags)
{
    for (unsigned at = first;;) {
        unsigned end = known(at, last);

        while (end != UINT_MAX && !fd_hidden((int)end)) {
            end = known(end + 1, last);
        }
        if ((end == UINT_MAX || end > at) && real.close_range(at, end == UINT_MAX ? last : end - 1, flags) < 0) {
            return -errno;
        }
        if (end == UINT_MAX || end == last) {
            return 0;
        }
        at = end + 1;
    }
}

/* Whether the program has threads beside this one; the helper is none of its. */
static bool has_threads(void)
{
    DIR *d = opendir("/proc/self/task");
    int n = -2; /* . and .. */

    while (d && readdir(d)) {
        n++;
    }
    if (d) {
        closedir(d);
    }
    return n > (me.helper_runs ? 2 : 1);
}

static int range(unsigned first, unsigned last, int flags)
{
    bool alone = me.attached > 0 && first <= last && (flags & CLOSE_RANGE_UNSHARE);

    if (!real.close_range) {
        return -ENOSYS;
    }
    if (me.attached <= 0 || first > last || (flags & ~(CLOSE_RANGE_UNSHARE | CLOSE_RANGE_CLOEXEC))) {
        return real.close_range(first, last, flags) < 0 ? -errno : 0;
    }
    if (alone) {
        /* A table of the calling thread's own: the helper would not see its descriptors. A program with one thread
         * notices no difference without; for others this cannot be had. */
        if (has_threads()) {
            return -EINVAL;
        }
        flags &= ~CLOSE_RANGE_UNSHARE;
    }
    if (!(flags & CLOSE_RANGE_CLOEXEC)) {
        close_known(first, last);
    }
    return range_real(first, last, flags);
}

EXPORT int close_range(unsigned first, unsigned last, int flags)
{
    real_load();
    return result(range(first, last, flags));
}

EXPORT void closefrom(int first)
{
    real_load();
    range(first < 0 ? 0 : (unsigned)first, UINT_MAX, 0);
}

/* ---- fcntl() ----------------------------------------------------------------------------------------------------------- */

/* Signals that tell of I/O are not sent for what the stack does: before it is decided whose the socket is, asking for them
 * makes it the kernel's; later they cannot be had. */
static int want_signals(int fd, struct object *o, const char *what)
{
    if (o->place == PLACE_UNDECIDED) {
        place_kernel(fd, o, WHY_OPTION, what);
    }
    return o->place == PLACE_KERNEL ? 0 : -EINVAL;
}

/* F_SETFL. O_NONBLOCK is of the open file description: the object's. The shadow has it too, or only for our sake. */
static int set_flags(int fd, struct object *o, int flags)
{
    int r = flags & O_ASYNC ? want_signals(fd, o, "O_ASYNC") : 0;

    if (r < 0) {
        return r;
    }
    r = real.fcntl(fd, F_SETFL, flags | (o->shadow_nonblock ? O_NONBLOCK : 0));
    if (r < 0) {
        return -errno;
    }
    o->nonblock = (flags & O_NONBLOCK) != 0;
    return r;
}

static int control(int fd, struct object *o, int cmd, void *arg)
{
    int r;

    switch (cmd) {
    case F_SETFL:
        return set_flags(fd, o, (int)(intptr_t)arg);
    case F_GETFL:
        r = real.fcntl(fd, F_GETFL);
        return r < 0 ? -errno : (r & ~O_NONBLOCK) | (o->nonblock ? O_NONBLOCK : 0);
    default: /* F_SETOWN and what belongs to it */
        r = arg ? want_signals(fd, o, "F_SETOWN") : 0;
        r = r < 0 ? r : real.fcntl(fd, cmd, arg);
        return r == -1 ? -errno : r;
    }
}

static bool controlled(int cmd)
{
    return cmd == F_SETFL || cmd == F_GETFL || cmd == F_SETOWN || cmd == F_SETOWN_EX || cmd == F_SETSIG;
}

static int file_control(int fd, int cmd, void *arg)
{
    struct object *o = NULL;
    int r;

    real_load();
    if (fd_hidden(fd)) {
        return result(-EBADF);
    }
    if (cmd == F_DUPFD || cmd == F_DUPFD_CLOEXEC) {
        return result(duplicate(fd, cmd, arg));
    }
    if (controlled(cmd) && fd_on_stack(fd)) {
        o = fd_enter_any(fd);
    }
    if (!o) {
        return real.fcntl(fd, cmd, arg);
    }
    r = control(fd, o, cmd, arg);
    leave();
    return result(r);
}

EXPORT int fcntl(int fd, int cmd, ...) { return file_control(fd, cmd, ARGUMENT(cmd)); }
EXPORT int fcntl64(int fd, int cmd, ...) { return file_control(fd, cmd, ARGUMENT(cmd)); }

/* ---- ioctl() ------------------------------------------------------------------------------------------------------------ */

/* Of what is queued: what read() gets before it comes to the mark of urgent data (tcp_inq() of the kernel). */
static int readable(const struct object *o, uint32_t queued)
{
    if (queued == 0 || bypass_getopt(&me.stack, o->sock, BYPASS_SO_OOBINLINE) > 0) {
        return (int)queued;
    }
    if (bypass_at_mark(&me.stack, o->sock) > 0) {
        return 0;
    }
    return (int)bypass_recv(&me.stack, o->sock, NULL, queued, BYPASS_PEEK | BYPASS_TRUNC); /* counts only */
}

/* Bytes that wait in a stream's queues (tcp(7)): a listener has none. */
static int stream_queue(struct object *o, unsigned long request)
{
    struct bypass_tcp_info info = {0};
    int err = bypass_tcp_info(&me.stack, o->sock, &info);

    if (err < 0) {
        return err;
    }
    if (info.state == BYPASS_LISTEN) {
        return -EINVAL;
    }
    return request == FIONREAD ? readable(o, info.rcv_queued)
                               : (int)(request == SIOCOUTQ ? info.snd_queued : info.notsent);
}

/* The size of the next datagram (udp(7)), of either half; 1: ask the kernel. */
static int next_datagram(struct object *o, int *size)
{
    char none;
    int64_t n = bypass_recvfrom(&me.stack, o->sock, &none, 0, BYPASS_PEEK | BYPASS_TRUNC, NULL);

    if (n == -EAGAIN && retry()) {
        n = bypass_recvfrom(&me.stack, o->sock, &none, 0, BYPASS_PEEK | BYPASS_TRUNC, NULL);
    }
    if (n < 0) {
        return PLACE_REAL;
    }
    *size = (int)n;
    return 0;
}

static int queue(struct object *o, unsigned long request, int *out)
{
    int n;

    if (!out) {
        return -EFAULT;
    }
    if (o->type == BYPASS_DGRAM) {
        return request == FIONREAD ? next_datagram(o, out) : PLACE_REAL;
    }
    n = stream_queue(o, request);
    if (n == 0 && request == FIONREAD && retry()) {
        n = stream_queue(o, request);
    }
    if (n >= 0) {
        *out = n;
    }
    return n < 0 ? n : 0;
}

static int at_mark(const struct object *o, int *out)
{
    int r = bypass_at_mark(&me.stack, o->sock);

    if (o->type != BYPASS_STREAM) {
        return PLACE_REAL; /* which says ENOTTY */
    }
    if (!out) {
        return -EFAULT;
    }
    *out = r > 0; /* no connection: no mark */
    return 0;
}

static int set_nonblock(struct object *o, const int *on)
{
    if (!on) {
        return -EFAULT;
    }
    o->nonblock = *on != 0;
    return o->shadow_nonblock && !*on ? 0 : PLACE_REAL;
}

/* 0 or -errno; PLACE_REAL: the call is the kernel's. Lock held. */
static int request_of(int fd, struct object *o, unsigned long request, void *arg)
{
    bool ours = (o->place == PLACE_STACK || o->place == PLACE_BOTH) && !me.g->dead;
    int r;

    switch (request) {
    case FIONBIO:
        return set_nonblock(o, arg);
    case FIOASYNC:
    case FIOSETOWN:
    case SIOCSPGRP:
        r = arg && *(int *)arg ? want_signals(fd, o, request == FIOASYNC ? "FIOASYNC" : "FIOSETOWN") : 0;
        return r < 0 ? r : PLACE_REAL;
    case FIONREAD:
    case SIOCOUTQ:
    case SIOCOUTQNSD:
        return ours ? queue(o, request, arg) : PLACE_REAL;
    case SIOCATMARK:
        return ours ? at_mark(o, arg) : PLACE_REAL;
    default:
        return PLACE_REAL;
    }
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    void *arg = ARGUMENT(request);
    struct object *o;
    int r;

    real_load();
    if (fd_hidden(fd)) {
        return result(-EBADF);
    }
    o = fd_on_stack(fd) ? fd_enter_any(fd) : NULL;
    if (!o) {
        return real.ioctl(fd, request, arg);
    }
    r = o->place == PLACE_KERNEL ? PLACE_REAL : request_of(fd, o, request, arg);
    leave();
    return r == PLACE_REAL ? real.ioctl(fd, request, arg) : result(r);
}

/* sockatmark(3) calls the C library's own ioctl(). */
EXPORT int sockatmark(int fd)
{
    int at;

    return ioctl(fd, SIOCATMARK, &at) < 0 ? -1 : at;
}
