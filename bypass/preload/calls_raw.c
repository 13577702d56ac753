/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calls_raw.c - syscall(2): what a program asks of the kernel by number it gets by name, where a descriptor of ours may
 * be meant. System calls that a program makes by instructions of its own do not come by here: of a descriptor of the
 * stack they see the shadow, which is not connected, and fail.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload.h"

#define P(i) ((void *)a[i])

/* Calls whose first argument is a descriptor. */
static bool by_descriptor(long number, const long *a, long *r)
{
    int fd = (int)a[0];

    switch (number) {
    case SYS_close:
        *r = close(fd);
        return true;
    case SYS_read:
        *r = read(fd, P(1), (size_t)a[2]);
        return true;
    case SYS_write:
        *r = write(fd, P(1), (size_t)a[2]);
        return true;
    case SYS_readv:
        *r = readv(fd, P(1), (int)a[2]);
        return true;
    case SYS_writev:
        *r = writev(fd, P(1), (int)a[2]);
        return true;
    case SYS_dup:
        *r = dup(fd);
        return true;
#ifdef SYS_dup2
    case SYS_dup2:
        *r = dup2(fd, (int)a[1]);
        return true;
#endif
    case SYS_dup3:
        *r = dup3(fd, (int)a[1], (int)a[2]);
        return true;
    case SYS_fcntl:
        *r = fcntl(fd, (int)a[1], a[2]);
        return true;
    case SYS_ioctl:
        *r = ioctl(fd, (unsigned long)a[1], a[2]);
        return true;
    case SYS_shutdown:
        *r = shutdown(fd, (int)a[1]);
        return true;
    case SYS_accept4:
        *r = accept4(fd, P(1), P(2), (int)a[3]);
        return true;
    case SYS_connect:
        *r = connect(fd, P(1), (socklen_t)a[2]);
        return true;
    case SYS_sendto:
        *r = sendto(fd, P(1), (size_t)a[2], (int)a[3], P(4), (socklen_t)a[5]);
        return true;
    case SYS_recvfrom:
        *r = recvfrom(fd, P(1), (size_t)a[2], (int)a[3], P(4), P(5));
        return true;
    case SYS_sendmsg:
        *r = sendmsg(fd, P(1), (int)a[2]);
        return true;
    case SYS_recvmsg:
        *r = recvmsg(fd, P(1), (int)a[2]);
        return true;
    default:
        return false;
    }
}

#undef P

EXPORT long syscall(long number, ...)
{
    long a[6], r;
    va_list ap;

    va_start(ap, number);
    for (int i = 0; i < 6; i++) {
        a[i] = va_arg(ap, long);
    }
    va_end(ap);
    real_load();
    if (me.attached > 0) {
        if (number == SYS_close_range) {
            return close_range((unsigned)a[0], (unsigned)a[1], (int)a[2]);
        }
        if (number == SYS_io_uring_setup) {
            uring_noted();
        }
        if (fd_entry((int)a[0]) && by_descriptor(number, a, &r)) {
            return r;
        }
    }
    return real.syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
