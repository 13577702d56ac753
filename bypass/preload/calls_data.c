/* SPDX-License-Identifier: Apache-2.0 */
/* calls_data.c - read(), write(), send(), recv() and their families, as programs call them. */
#define _GNU_SOURCE
#include <limits.h>
#include <string.h>
#include <unistd.h>

#include "data.h"

enum { RWF_NOWAIT_FLAG = 8 }; /* RWF_NOWAIT of linux/fs.h */

/* ---- One object, some pieces ------------------------------------------------------------------------------------- */
static ssize_t take(struct object *o, int fd, const struct iovec *iov, int count, int flags)
{
    int64_t r = data_receive(o, fd, iov, count, flags, NULL, NULL);

    leave();
    return result_size(r);
}

/* readv(2) and writev(2) of no byte do nothing, on any file; recvmsg(2) and sendmsg(2) are another matter. */
static bool nothing_to_do(const struct iovec *iov, int count)
{
    bool nothing = data_size(iov, count) == 0;

    if (nothing) {
        leave();
    }
    return nothing;
}

static ssize_t take_vector(struct object *o, int fd, const struct iovec *iov, int count, int flags)
{
    return nothing_to_do(iov, count) ? 0 : take(o, fd, iov, count, flags);
}

static ssize_t give(struct object *o, int fd, const struct iovec *iov, int count, int flags)
{
    int type = o->type;
    int64_t r = data_send(o, fd, iov, count, flags, NULL);

    leave();
    return result_size(data_broken_pipe(r, flags, type));
}

static ssize_t give_vector(struct object *o, int fd, const struct iovec *iov, int count, int flags)
{
    return nothing_to_do(iov, count) ? 0 : give(o, fd, iov, count, flags);
}

/* ---- read(2), write(2) --------------------------------------------------------------------------------------------- */
EXPORT ssize_t read(int fd, void *buf, size_t n)
{
    struct object *o;

    real_load();
    o = fd_enter(fd);
    if (!o) {
        return real.read(fd, buf, n);
    }
    if (n == 0) {
        leave();
        return 0;
    }
    return take(o, fd, &(struct iovec){buf, n}, 1, 0);
}

EXPORT ssize_t write(int fd, const void *buf, size_t n)
{
    struct object *o;

    real_load();
    o = fd_enter(fd);
    return o ? give(o, fd, &(struct iovec){(void *)buf, n}, 1, 0) : real.write(fd, buf, n);
}

EXPORT ssize_t readv(int fd, const struct iovec *iov, int count)
{
    struct object *o;

    real_load();
    o = fd_enter(fd);
    return o ? take_vector(o, fd, iov, count, 0) : real.readv(fd, iov, count);
}

EXPORT ssize_t writev(int fd, const struct iovec *iov, int count)
{
    struct object *o;

    real_load();
    o = fd_enter(fd);
    return o ? give_vector(o, fd, iov, count, 0) : real.writev(fd, iov, count);
}

EXPORT ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    struct object *o;

    real_load();
    o = offset == -1 ? fd_enter(fd) : NULL; /* other offsets: ESPIPE, which the shadow says */
    return o ? take_vector(o, fd, iov, count, flags & RWF_NOWAIT_FLAG ? MSG_DONTWAIT : 0)
             : real.preadv2(fd, iov, count, offset, flags);
}

EXPORT ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    struct object *o;

    real_load();
    o = offset == -1 ? fd_enter(fd) : NULL;
    return o ? give_vector(o, fd, iov, count, flags & RWF_NOWAIT_FLAG ? MSG_DONTWAIT : 0)
             : real.pwritev2(fd, iov, count, offset, flags);
}

/* ---- recv(2) ---------------------------------------------------------------------------------------------------------- */
EXPORT ssize_t recv(int fd, void *buf, size_t n, int flags)
{
    struct object *o;

    real_load();
    o = fd_enter(fd);
    return o ? take(o, fd, &(struct iovec){buf, n}, 1, flags) : real.recv(fd, buf, n, flags);
}

EXPORT ssize_t recvfrom(int fd, void *buf, size_t n, int flags, struct sockaddr *sa, socklen_t *len)
{
    struct bypass_endpoint from = {0};
    struct object *o;
    int64_t r;

    real_load();
    o = fd_enter(fd);
    if (!o) {
        return real.recvfrom(fd, buf, n, flags, sa, len);
    }
    r = data_receive(o, fd, &(struct iovec){buf, n}, 1, flags, &from, NULL);
    if (r >= 0 && len && sa) {
        if (o->type == BYPASS_DGRAM) {
            name_to(o, &from, sa, len);
        } else {
            *len = 0; /* as Linux: a connection's data has no address */
        }
    }
    leave();
    return result_size(r);
}

static int64_t receive_message(struct object *o, int fd, struct msghdr *h, int flags)
{
    struct bypass_endpoint from = {0};
    int out = 0;
    int64_t r =
        h->msg_iovlen > IOV_MAX ? -EMSGSIZE : data_receive(o, fd, h->msg_iov, (int)h->msg_iovlen, flags, &from, &out);

    if (r >= 0) {
        h->msg_controllen = 0;
        h->msg_flags = out;
        if (o->type == BYPASS_DGRAM && h->msg_name) {
            name_to(o, &from, h->msg_name, &h->msg_namelen);
        } else {
            h->msg_namelen = 0;
        }
    }
    return r;
}

EXPORT ssize_t recvmsg(int fd, struct msghdr *h, int flags)
{
    struct object *o;
    int64_t r;

    real_load();
    o = fd_enter(fd);
    if (!o) {
        r = real.recvmsg(fd, h, flags);
        if (r >= 0) {
            pass_received(h);
        }
        return r;
    }
    r = receive_message(o, fd, h, flags);
    leave();
    return result_size(r);
}

EXPORT int recvmmsg(int fd, struct mmsghdr *v, unsigned count, int flags, struct timespec *timeout)
{
    uint64_t until = timeout ? clock_ns() + (uint64_t)timeout->tv_sec * 1000000000u + (uint64_t)timeout->tv_nsec : 0;
    struct object *o;
    unsigned done = 0;
    int64_t r = 0;

    real_load();
    o = fd_enter(fd);
    if (!o) {
        r = real.recvmmsg(fd, v, count, flags, timeout);
        for (int i = 0; i < (int)r; i++) {
            pass_received(&v[i].msg_hdr);
        }
        return (int)r;
    }
    if (timeout && (timeout->tv_sec < 0 || timeout->tv_nsec < 0 || timeout->tv_nsec >= 1000000000)) {
        leave();
        return result(-EINVAL);
    }
    while (done < count) {
        r = receive_message(o, fd, &v[done].msg_hdr, flags & ~MSG_WAITFORONE);
        if (r < 0) {
            break;
        }
        v[done++].msg_len = (unsigned)r;
        if (flags & MSG_WAITFORONE) {
            flags |= MSG_DONTWAIT;
        }
        if (timeout && clock_ns() >= until) { /* looked at after each datagram, as recvmmsg(2) says */
            break;
        }
    }
    leave();
    return done ? (int)done : result(r);
}

/* ---- send(2) ------------------------------------------------------------------------------------------------------------ */
EXPORT ssize_t send(int fd, const void *buf, size_t n, int flags)
{
    struct object *o;

    real_load();
    o = fd_enter(fd);
    return o ? give(o, fd, &(struct iovec){(void *)buf, n}, 1, flags) : real.send(fd, buf, n, flags);
}

/* A datagram socket that is not bound yet, and MSG_FASTOPEN: what the kernel does first is done first. */
static struct object *enter_to_send(int fd, const struct sockaddr *sa, socklen_t len, int flags)
{
    struct object *o = fd_on_stack(fd) ? fd_enter_any(fd) : NULL;

    if (o && o->place == PLACE_UNDECIDED) {
        if (o->type == BYPASS_DGRAM && sa) {
            place_unbound(fd, o, sa, len);
        } else if (o->type == BYPASS_STREAM && sa && (flags & MSG_FASTOPEN)) {
            leave();
            return connect(fd, sa, len) < 0 ? NULL : fd_enter(fd);
        }
    }
    if (o && (o->place == PLACE_UNDECIDED || o->place == PLACE_KERNEL)) {
        leave();
        return NULL;
    }
    return o;
}

static int64_t send_message(struct object *o, int fd, const struct iovec *iov, size_t count, int flags,
                            const struct sockaddr *sa, socklen_t len)
{
    struct bypass_endpoint to;
    int err = sa && o->type == BYPASS_DGRAM ? name_from(o, sa, len, &to) : 0;

    if (count > IOV_MAX) {
        return -EMSGSIZE;
    }
    if (err == -EAFNOSUPPORT && o->place == PLACE_BOTH) { /* IPv6 of a socket that speaks both */
        struct msghdr h = {.msg_name = (void *)sa, .msg_namelen = len, .msg_iov = (void *)iov, .msg_iovlen = count};
        ssize_t n = real.sendmsg(fd, &h, flags);

        return n < 0 ? -errno : n;
    }
    return err < 0 ? err : data_send(o, fd, iov, (int)count, flags, sa && o->type == BYPASS_DGRAM ? &to : NULL);
}

EXPORT ssize_t sendto(int fd, const void *buf, size_t n, int flags, const struct sockaddr *sa, socklen_t len)
{
    struct object *o;
    int64_t r;
    int type;

    real_load();
    o = enter_to_send(fd, sa, len, flags);
    if (!o) {
        return real.sendto(fd, buf, n, flags, sa, len);
    }
    type = o->type;
    r = send_message(o, fd, &(struct iovec){(void *)buf, n}, 1, flags, sa, len);
    leave();
    return result_size(data_broken_pipe(r, flags, type));
}

EXPORT ssize_t sendmsg(int fd, const struct msghdr *h, int flags)
{
    struct object *o;
    int64_t r;
    int type;

    real_load();
    o = enter_to_send(fd, h->msg_name, h->msg_namelen, flags);
    if (!o) {
        pass_sent(h);
        r = real.sendmsg(fd, h, flags);
        if (r < 0) {
            pass_unsent(h);
        }
        return r;
    }
    type = o->type;
    r = send_message(o, fd, h->msg_iov, h->msg_iovlen, flags, h->msg_name, h->msg_namelen);
    leave();
    return result_size(data_broken_pipe(r, flags, type));
}

/* They may be messages on a Unix socket. */
static int send_kernel(int fd, struct mmsghdr *v, unsigned count, int flags)
{
    int n;

    for (unsigned i = 0; i < count; i++) {
        pass_sent(&v[i].msg_hdr);
    }
    n = real.sendmmsg(fd, v, count, flags);
    for (unsigned i = n < 0 ? 0 : (unsigned)n; i < count; i++) {
        pass_unsent(&v[i].msg_hdr);
    }
    return n;
}

EXPORT int sendmmsg(int fd, struct mmsghdr *v, unsigned count, int flags)
{
    unsigned done = 0;

    real_load();
    if (!fd_is_object(fd)) {
        return send_kernel(fd, v, count, flags);
    }
    while (done < count) {
        ssize_t n = sendmsg(fd, &v[done].msg_hdr, flags);

        if (n < 0) {
            return done ? (int)done : -1;
        }
        v[done++].msg_len = (unsigned)n;
    }
    return (int)done;
}

/* ---- _FORTIFY_SOURCE ------------------------------------------------------------------------------------------------------ */
void __chk_fail(void) __attribute__((noreturn));

EXPORT ssize_t __read_chk(int fd, void *buf, size_t n, size_t room)
{
    return n > room ? (__chk_fail(), 0) : read(fd, buf, n);
}

EXPORT ssize_t __recv_chk(int fd, void *buf, size_t n, size_t room, int flags)
{
    return n > room ? (__chk_fail(), 0) : recv(fd, buf, n, flags);
}

EXPORT ssize_t __recvfrom_chk(int fd, void *buf, size_t n, size_t room, int flags, struct sockaddr *sa, socklen_t *len)
{
    return n > room ? (__chk_fail(), 0) : recvfrom(fd, buf, n, flags, sa, len);
}
