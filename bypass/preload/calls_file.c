/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calls_file.c - sendfile() and splice(): files and pipes on one side, a connection of the stack on the other. Bytes go
 * through a buffer here; what the other side does not take is not taken from where it was. What cannot be moved at all the
 * kernel is asked with the shadow: it looks at that before it looks at the socket, and says what is wrong.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data.h"

enum {
    PIECE = 1 << 16,
    MOST = 0x7ffff000, /* what one call moves at most: sendfile(2) */
    SPLICE_FLAGS = SPLICE_F_MOVE | SPLICE_F_NONBLOCK | SPLICE_F_MORE | SPLICE_F_GIFT,
};

/* One piece to a connection; lock held. */
static int64_t put(struct object *o, int fd, const void *buf, size_t n, int flags)
{
    return data_send(o, fd, &(struct iovec){(void *)buf, n}, 1, flags, NULL);
}

/* ---- sendfile(2) ------------------------------------------------------------------------------------------------- */
struct source {
    int fd;
    off_t at;
    bool advance; /* its file offset moves, as no `offset` was given */
};

/* PLACE_REAL: it is no file that can be read here and there. */
static int source_open(struct source *s, int fd, const off_t *offset)
{
    struct stat st;

    *s = (struct source){.fd = fd, .at = offset ? *offset : 0, .advance = !offset};
    if (fstat(fd, &st) < 0) {
        return -errno;
    }
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode) && !S_ISCHR(st.st_mode)) {
        return PLACE_REAL;
    }
    if (!offset) {
        s->at = lseek(fd, 0, SEEK_CUR);
        return s->at < 0 ? PLACE_REAL : 0;
    }
    return *offset < 0 ? -EINVAL : 0;
}

static int flags_of(int fd) { return real.fcntl(fd, F_GETFL); }

/* A pipe, and not one that is open this way only. */
static bool is_pipe(int fd, int not_only)
{
    struct stat st;

    return fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode) && (flags_of(fd) & O_ACCMODE) != not_only;
}

/* Until all is sent, the file ends, or the connection takes no more. The file is read without the lock. */
static int64_t file_to_connection(int out, struct source *in, size_t count)
{
    static __thread char *buf;
    int64_t done = 0, r = 0;

    if (!buf && !(buf = malloc(PIECE))) {
        return -ENOMEM;
    }
    while ((size_t)done < count) {
        size_t want = count - (size_t)done < PIECE ? count - (size_t)done : PIECE;
        ssize_t got = pread(in->fd, buf, want, in->at);
        struct object *o;

        if (got <= 0) {
            r = got < 0 ? -errno : 0;
            break;
        }
        o = fd_enter(out);
        if (!o) {
            r = -EBADF;
            break;
        }
        r = put(o, out, buf, (size_t)got, (size_t)done + (size_t)got < count ? MSG_MORE : 0);
        leave();
        if (r < 0) {
            break;
        }
        done += r;
        in->at += r;
        if (r < got) {
            break;
        }
    }
    return done ? done : r;
}

EXPORT ssize_t sendfile(int out, int in, off_t *offset, size_t count)
{
    struct source source;
    int64_t r;

    real_load();
    if (fd_on_stack(in) && !offset && is_pipe(out, O_RDONLY)) {
        return splice(in, NULL, out, NULL, count, flags_of(out) & O_NONBLOCK ? SPLICE_F_NONBLOCK : 0);
    }
    if (fd_on_stack(in) || !fd_enter(out)) {
        return real.sendfile(out, in, offset, count); /* from a socket: EINVAL, unless something else is wrong, too */
    }
    leave();
    r = source_open(&source, in, offset);
    if (r == PLACE_REAL) {
        return real.sendfile(out, in, offset, count); /* EINVAL, ESPIPE, EBADF */
    }
    if (r == 0) {
        r = file_to_connection(out, &source, count < MOST ? count : MOST);
    }
    if (r > 0 && source.advance) {
        lseek(in, source.at, SEEK_SET);
    } else if (r > 0) {
        *offset = source.at;
    }
    return result_size(data_broken_pipe(r, 0, BYPASS_STREAM));
}

EXPORT ssize_t sendfile64(int out, int in, off64_t *offset, size_t count)
    __attribute__((alias("sendfile"))); /* off_t has 64 bits on every architecture that this is built for */

/* ---- splice(2) ----------------------------------------------------------------------------------------------------- */

/* A pipe of this thread's own, to look at bytes that stay where they are. */
static const int *scratch(void)
{
    static __thread int pair[2] = {-1, -1};
    int made[2];

    if (pair[0] < 0) {
        if (pipe2(made, O_CLOEXEC | O_NONBLOCK) < 0) {
            return NULL;
        }
        pair[0] = fd_hide(made[0]);
        pair[1] = fd_hide(made[1]);
    }
    return pair;
}

/* Until the pipe has bytes, or room for some; nobody at its other end is something, too. What poll(2) says, or -errno. */
static int pipe_ready(int fd, short events, unsigned flags)
{
    struct pollfd p = {.fd = fd, .events = events};
    bool wait = !(flags & SPLICE_F_NONBLOCK) && !(flags_of(fd) & O_NONBLOCK);
    int n = real.poll(&p, 1, wait ? -1 : 0);

    return n < 0 ? -errno : n == 0 ? -EAGAIN : p.revents;
}

/* A pipe's bytes are looked at by tee(2) into a pipe of our own, sent, and then as many are taken out as went. */
static int64_t pipe_to_connection(int out, int in, size_t count, unsigned flags)
{
    const int *own = scratch();
    char buf[PIECE];
    struct object *o;
    ssize_t n;
    int64_t r;

    if (!own) {
        return -errno;
    }
    r = pipe_ready(in, POLLIN, flags);
    if (r < 0) {
        return r;
    }
    n = tee(in, own[1], count < PIECE ? count : PIECE, SPLICE_F_NONBLOCK);
    if (n <= 0) {
        return n < 0 ? -errno : 0;
    }
    n = real.read(own[0], buf, sizeof buf);
    o = n > 0 ? fd_enter(out) : NULL;
    if (!o) {
        return n < 0 ? -errno : -EBADF;
    }
    r = put(o, out, buf, (size_t)n,
            (flags & SPLICE_F_NONBLOCK ? MSG_DONTWAIT : 0) | (flags & SPLICE_F_MORE ? MSG_MORE : 0));
    leave();
    for (int64_t left = r; left > 0;) {
        n = real.read(in, buf, (size_t)left < sizeof buf ? (size_t)left : sizeof buf);
        if (n <= 0) {
            break;
        }
        left -= n;
    }
    return r;
}

/* As many of the bytes as there is room for in the pipe. */
static int64_t into_pipe(int out, const char *buf, size_t n)
{
    const int *own = scratch();
    char rest[PIECE];
    ssize_t there = own ? real.write(own[1], buf, n) : -1, moved;

    if (there < 0) {
        return -errno;
    }
    moved = real.splice(own[0], NULL, out, NULL, (size_t)there, SPLICE_F_NONBLOCK);
    moved = moved < 0 ? -errno : moved;
    if (moved < there) {
        (void)!real.read(own[0], rest, sizeof rest);
    }
    return moved;
}

/* What a connection has is peeked at, written, and then as much is taken out as the pipe took. */
static int64_t connection_to_pipe(int out, int in, size_t count, unsigned flags)
{
    char buf[PIECE];
    struct iovec iov = {buf, count < PIECE ? count : PIECE};
    int64_t r = pipe_ready(out, POLLOUT, flags);
    struct object *o;

    if (r < 0 || r & POLLERR) {
        return r < 0 ? r : -EPIPE; /* nobody reads it */
    }
    o = fd_enter(in);
    if (!o) {
        return -EBADF;
    }
    r = data_receive(o, in, &iov, 1, MSG_PEEK, NULL, NULL); /* SPLICE_F_NONBLOCK is about the pipe (splice(2)) */
    leave();
    r = r > 0 ? into_pipe(out, buf, (size_t)r) : r;
    if (r < 0) {
        return r;
    }
    o = fd_enter(in);
    if (o) {
        iov.iov_len = (size_t)r; /* 0: the end, or a datagram without a byte, which is taken as well */
        (void)data_receive(o, in, &iov, 1, MSG_DONTWAIT, NULL, NULL);
        leave();
    }
    return r;
}

EXPORT ssize_t splice(int in, off_t *in_at, int out, off_t *out_at, size_t count, unsigned flags)
{
    bool from = fd_on_stack(in), to = fd_on_stack(out);
    int64_t r = -EBADF;

    real_load();
    if ((from || to) && count && !in_at && !out_at && !(flags & ~(unsigned)SPLICE_FLAGS)) {
        if (to && is_pipe(in, O_WRONLY)) {
            r = pipe_to_connection(out, in, count, flags);
        } else if (from && is_pipe(out, O_RDONLY)) {
            r = connection_to_pipe(out, in, count, flags);
        }
    }
    if (r == -EBADF) { /* it is the kernel's, or wrong anyway */
        return real.splice(in, in_at, out, out_at, count, flags);
    }
    return result_size(data_broken_pipe(r, 0, BYPASS_STREAM));
}
