/* SPDX-License-Identifier: Apache-2.0 */
/*
 * real.h - the C library's own functions, which ours stand in front of: real.read(fd, ...). Looked up once, when the
 * library is loaded, or at the first call if a program's constructor is faster (dlsym(3), RTLD_NEXT).
 */
#ifndef BYPASS_PRELOAD_REAL_H
#define BYPASS_PRELOAD_REAL_H

#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>

#define REAL_FUNCTIONS(X)                                                                                              \
    X(int, socket, (int, int, int))                                                                                    \
    X(int, bind, (int, const struct sockaddr *, socklen_t))                                                            \
    X(int, listen, (int, int))                                                                                         \
    X(int, accept4, (int, struct sockaddr *, socklen_t *, int))                                                        \
    X(int, connect, (int, const struct sockaddr *, socklen_t))                                                         \
    X(int, shutdown, (int, int))                                                                                       \
    X(int, getsockname, (int, struct sockaddr *, socklen_t *))                                                         \
    X(int, getpeername, (int, struct sockaddr *, socklen_t *))                                                         \
    X(int, getsockopt, (int, int, int, void *, socklen_t *))                                                           \
    X(int, setsockopt, (int, int, int, const void *, socklen_t))                                                       \
    X(int, close, (int))                                                                                               \
    X(int, close_range, (unsigned, unsigned, int))                                                                     \
    X(void, closefrom, (int))                                                                                          \
    X(int, dup, (int))                                                                                                 \
    X(int, dup2, (int, int))                                                                                           \
    X(int, dup3, (int, int, int))                                                                                      \
    X(int, fcntl, (int, int, ...))                                                                                     \
    X(int, fcntl64, (int, int, ...))                                                                                   \
    X(int, ioctl, (int, unsigned long, ...))                                                                           \
    X(ssize_t, read, (int, void *, size_t))                                                                            \
    X(ssize_t, write, (int, const void *, size_t))                                                                     \
    X(ssize_t, readv, (int, const struct iovec *, int))                                                                \
    X(ssize_t, writev, (int, const struct iovec *, int))                                                               \
    X(ssize_t, preadv2, (int, const struct iovec *, int, off_t, int))                                                  \
    X(ssize_t, pwritev2, (int, const struct iovec *, int, off_t, int))                                                 \
    X(ssize_t, recv, (int, void *, size_t, int))                                                                       \
    X(ssize_t, send, (int, const void *, size_t, int))                                                                 \
    X(ssize_t, recvfrom, (int, void *, size_t, int, struct sockaddr *, socklen_t *))                                   \
    X(ssize_t, sendto, (int, const void *, size_t, int, const struct sockaddr *, socklen_t))                           \
    X(ssize_t, recvmsg, (int, struct msghdr *, int))                                                                   \
    X(ssize_t, sendmsg, (int, const struct msghdr *, int))                                                             \
    X(int, recvmmsg, (int, struct mmsghdr *, unsigned, int, struct timespec *))                                        \
    X(int, sendmmsg, (int, struct mmsghdr *, unsigned, int))                                                           \
    X(ssize_t, sendfile, (int, int, off_t *, size_t))                                                                  \
    X(ssize_t, splice, (int, off_t *, int, off_t *, size_t, unsigned))                                                 \
    X(int, poll, (struct pollfd *, nfds_t, int))                                                                       \
    X(int, ppoll, (struct pollfd *, nfds_t, const struct timespec *, const sigset_t *))                                \
    X(int, select, (int, fd_set *, fd_set *, fd_set *, struct timeval *))                                              \
    X(int, pselect, (int, fd_set *, fd_set *, fd_set *, const struct timespec *, const sigset_t *))                    \
    X(int, epoll_create, (int))                                                                                        \
    X(int, epoll_create1, (int))                                                                                       \
    X(int, epoll_ctl, (int, int, int, struct epoll_event *))                                                           \
    X(int, epoll_wait, (int, struct epoll_event *, int, int))                                                          \
    X(int, epoll_pwait, (int, struct epoll_event *, int, int, const sigset_t *))                                       \
    X(int, epoll_pwait2, (int, struct epoll_event *, int, const struct timespec *, const sigset_t *))                  \
    X(pid_t, fork, (void))                                                                                             \
    X(pid_t, vfork, (void))                                                                                            \
    X(int, execve, (const char *, char *const[], char *const[]))                                                       \
    X(int, execvpe, (const char *, char *const[], char *const[]))                                                      \
    X(int, fexecve, (int, char *const[], char *const[]))                                                               \
    X(int, execveat, (int, const char *, char *const[], char *const[], int))                                           \
    X(int, posix_spawn,                                                                                                \
      (pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *, char *const[],            \
       char *const[]))                                                                                                 \
    X(int, posix_spawnp,                                                                                               \
      (pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *, char *const[],            \
       char *const[]))                                                                                                 \
    X(void, _exit, (int))                                                                                              \
    X(int, sigaction, (int, const struct sigaction *, struct sigaction *))                                             \
    X(FILE *, fdopen, (int, const char *))                                                                             \
    X(int, __vdprintf_chk, (int, int, const char *, va_list))                                                          \
    X(int, vdprintf, (int, const char *, va_list))                                                                     \
    X(int, system, (const char *))                                                                                     \
    X(FILE *, popen, (const char *, const char *))                                                                     \
    X(int, pthread_cancel, (pthread_t))                                                                                \
    X(int, socketpair, (int, int, int, int *))                                                                         \
    X(long, syscall, (long, ...))

struct real {
#define X(type, name, args) type(*name) args;
    REAL_FUNCTIONS(X)
#undef X
};
extern struct real real;

void real_load_now(void);
/* Fills `real` in; again: nothing. Every function of ours that may be called before the constructor calls it first. */
static inline void real_load(void)
{
    if (__builtin_expect(!real.socket, 0)) {
        real_load_now();
    }
}

#endif
