/* SPDX-License-Identifier: Apache-2.0 */
/*
 * data.c - bytes in and out of an object: blocking and not, streams and datagrams, both halves of a datagram socket.
 * What programs call is in calls_data.c.
 */
#define _GNU_SOURCE
#include "data.h"

#include <limits.h>
#include <signal.h>
#include <string.h>

enum { DATAGRAM_MAX = 65536 };

int64_t data_size(const struct iovec *iov, int count)
{
    int64_t all = 0;

    if (count < 0 || count > IOV_MAX) {
        return -EINVAL;
    }
    for (int i = 0; i < count; i++) {
        if (iov[i].iov_len > (size_t)SSIZE_MAX - (size_t)all) {
            return -EINVAL;
        }
        all += (int64_t)iov[i].iov_len;
    }
    return all;
}

/* Their size; where that is 0 they become one. */
static int64_t pieces(const struct iovec **iov, int *count)
{
    static uint8_t no_byte;
    static const struct iovec nothing = {&no_byte, 0};
    int64_t all = data_size(*iov, *count);

    if (all == 0) {
        *iov = &nothing;
        *count = 1;
    }
    return all;
}

/* ---- Receiving ------------------------------------------------------------------------------------------------- */
static int receive_flags(int flags)
{
    return (flags & MSG_PEEK ? BYPASS_PEEK : 0) | (flags & MSG_TRUNC ? BYPASS_TRUNC : 0) |
           (flags & MSG_OOB ? BYPASS_OOB : 0);
}

/* What is there, into as many pieces as it fills. */
static int64_t stream_take(struct object *o, const struct iovec *iov, int count, size_t skip, int flags)
{
    int64_t all = 0;

    for (int i = 0; i < count; i++) {
        size_t len = iov[i].iov_len;
        int64_t n;

        if (skip >= len && len) {
            skip -= len;
            continue;
        }
        if (len == 0 && count > 1) {
            continue;
        }
        n = bypass_recv(&me.stack, o->sock, (uint8_t *)iov[i].iov_base + skip, len - skip, flags);
        if (n < 0) {
            return all ? all : n;
        }
        all += n;
        if (n < (int64_t)(len - skip) || (flags & BYPASS_PEEK)) {
            break; /* a second peek would see the same bytes: a short one is allowed */
        }
        skip = 0;
    }
    return all;
}

/* An error that came while a call waited for more: what it has done counts, and the next call gets the error, as of
 * tcp_sendmsg_locked() and tcp_recvmsg_locked() in net/ipv4/tcp.c. */
static bool error_waits(const struct object *o)
{
    int ready = o->sock >= 0 ? bypass_ready(&me.stack, o->sock) : 0;

    return ready > 0 && (ready & BYPASS_ERR);
}

/* How much a call waits for: socket(7), SO_RCVLOWAT; recv(2), MSG_WAITALL. */
static int64_t least(struct object *o, int64_t want, int flags, bool block)
{
    int64_t low = block && !(flags & MSG_WAITALL) ? bypass_getopt(&me.stack, o->sock, BYPASS_SO_RCVLOWAT) : 1;

    return flags & MSG_WAITALL || low > want ? want : low;
}

static bool done_receiving(int64_t r, int64_t got, int64_t enough, int flags)
{
    return r == 0 || (r > 0 && got >= enough) || (flags & MSG_OOB) || (r < 0 && r != -EAGAIN);
}

static int64_t stream_receive(struct object *o, int fd, const struct iovec *iov, int count, int64_t want, int flags)
{
    bool block = !o->nonblock && !(flags & MSG_DONTWAIT), tried = false;
    int how = receive_flags(flags);
    uint64_t since = 0;
    int64_t got = 0;

    for (;;) {
        int64_t r = stream_take(o, iov, count, flags & MSG_PEEK ? 0 : (size_t)got, how);
        int waited;

        if (r > 0) {
            got = flags & MSG_PEEK ? r : got + r;
            if (unlikely(me.helper_deep)) {
                sent(); /* reading may have queued an ACK, which the helper sends if the program does not wait soon */
            }
        }
        if (done_receiving(r, got, got < want ? least(o, want, flags, block) : want, flags)) {
            return got ? got : r;
        }
        if (!block) {
            if (got || tried || !retry()) {
                return got ? got : -EAGAIN;
            }
            tried = true;
            continue;
        }
        waited = wait_for(o, fd, POLLIN, o->rcvtimeo_ns, &since);
        if (waited < 0 || (got && error_waits(o))) {
            return got ? got : waited;
        }
    }
}

static void scatter(const struct iovec *iov, int count, const uint8_t *from, size_t n)
{
    for (int i = 0; i < count && n; i++) {
        size_t part = iov[i].iov_len < n ? iov[i].iov_len : n;

        memcpy(iov[i].iov_base, from, part);
        from += part;
        n -= part;
    }
}

/* One datagram of the stack's half; its real size. */
static __attribute__((noinline)) int64_t datagram_scatter(struct object *o, const struct iovec *iov, int count, int how,
                                                          struct bypass_endpoint *from)
{
    uint8_t buf[DATAGRAM_MAX];
    int64_t n = bypass_recvfrom(&me.stack, o->sock, buf, sizeof buf, how, from);

    if (n > 0) {
        scatter(iov, count, buf, (size_t)n);
    }
    return n;
}

static int64_t datagram_take(struct object *o, const struct iovec *iov, int count, int flags,
                             struct bypass_endpoint *from)
{
    int how = receive_flags(flags) | BYPASS_TRUNC;

    if (count == 1) {
        return bypass_recvfrom(&me.stack, o->sock, iov->iov_base, iov->iov_len, how, from);
    }
    return datagram_scatter(o, iov, count, how, from);
}

/* The kernel's half: of datagrams; of a listener, which has nothing to read, what that is called. */
static int64_t take_real(struct object *o, int fd, const struct iovec *iov, int count, int flags,
                         struct bypass_endpoint *from)
{
    struct sockaddr_storage sa;
    struct msghdr h = {
        .msg_name = &sa, .msg_namelen = sizeof sa, .msg_iov = (struct iovec *)iov, .msg_iovlen = (size_t)count};
    ssize_t n = real.recvmsg(fd, &h, flags | MSG_DONTWAIT | MSG_TRUNC);

    if (n < 0) {
        return -errno;
    }
    if (from && h.msg_namelen) {
        name_from(o, (struct sockaddr *)&sa, h.msg_namelen, from);
    }
    return n;
}

static int64_t datagram_receive(struct object *o, int fd, const struct iovec *iov, int count, int flags,
                                struct bypass_endpoint *from)
{
    bool block = !o->nonblock && !(flags & MSG_DONTWAIT), tried = false;
    uint64_t since = 0;

    for (;;) {
        int64_t r = datagram_take(o, iov, count, flags, from);
        int waited;

        if (r == -EAGAIN && o->place == PLACE_BOTH) {
            r = take_real(o, fd, iov, count, flags, from);
        }
        if (r != -EAGAIN) {
            return r;
        }
        if (block && o->shut_rd) {
            return 0; /* as Linux: who would wait after shutdown() has nothing to wait for */
        }
        if (!block) {
            if (tried || !retry()) {
                return r;
            }
            tried = true;
            continue;
        }
        waited = wait_for(o, fd, POLLIN, o->rcvtimeo_ns, &since);
        if (waited < 0) {
            return waited;
        }
    }
}

int64_t data_receive(struct object *o, int fd, const struct iovec *iov, int count, int flags,
                     struct bypass_endpoint *from, int *out_flags)
{
    int64_t want = pieces(&iov, &count), n;

    if (want < 0) {
        return want;
    }
    if (unlikely(o->sock < 0 || me.g->dead)) {
        return -ECONNRESET;
    }
    if (flags & MSG_ERRQUEUE) {
        return -EAGAIN; /* nothing is ever there */
    }
    if (o->type == BYPASS_STREAM) {
        n = unlikely(o->listening) ? take_real(o, fd, iov, count, flags, NULL)
                                   : stream_receive(o, fd, iov, count, want, flags);
        if (out_flags) {
            *out_flags = flags & MSG_OOB && n > 0 ? MSG_OOB : 0;
        }
        return n > 0 && unlikely(me.broken) && !(flags & MSG_PEEK) ? n - 1 : n;
    }
    n = datagram_receive(o, fd, iov, count, flags, from);
    if (out_flags) {
        *out_flags = n > want ? MSG_TRUNC : 0;
    }
    return n > want && !(flags & MSG_TRUNC) ? want : n;
}

/* ---- Sending ------------------------------------------------------------------------------------------------------ */
static int send_flags(int flags) { return (flags & MSG_MORE ? BYPASS_MORE : 0) | (flags & MSG_OOB ? BYPASS_OOB : 0); }

/* As much as there is room for. */
static int64_t stream_give(struct object *o, const struct iovec *iov, int count, size_t skip, int flags)
{
    int64_t all = 0;

    for (int i = 0; i < count; i++) {
        size_t len = iov[i].iov_len;
        /* The pieces of one call make one stream of segments: more follows until the last. */
        int how = flags | (i + 1 < count ? BYPASS_MORE : 0);
        int64_t n;

        if (skip >= len && (len || count > 1)) {
            skip -= len;
            continue;
        }
        n = bypass_send(&me.stack, o->sock, (const uint8_t *)iov[i].iov_base + skip, len - skip, how);
        if (n < 0) {
            return all ? all : n;
        }
        all += n;
        if (n < (int64_t)(len - skip)) {
            break;
        }
        skip = 0;
    }
    return all;
}

static int64_t stream_send(struct object *o, int fd, const struct iovec *iov, int count, int64_t want, int flags)
{
    bool block = !o->nonblock && !(flags & MSG_DONTWAIT), tried = false;
    int how = send_flags(flags);
    uint64_t since = 0;
    int64_t done = 0;

    for (;;) {
        int64_t r = stream_give(o, iov, count, (size_t)done, how);
        int waited;

        if (r >= 0) {
            done += r;
            sent();
            if (done >= want) {
                return done;
            }
        } else if (r != -EAGAIN) {
            return done ? done : r;
        }
        if (!block) {
            if (done || tried || !retry()) {
                return done ? done : -EAGAIN;
            }
            tried = true;
            continue;
        }
        waited = wait_for(o, fd, POLLOUT, o->sndtimeo_ns, &since);
        if (waited < 0 || (done && error_waits(o))) {
            return done ? done : waited;
        }
    }
}

static __attribute__((noinline)) int64_t datagram_gather(struct object *o, const struct iovec *iov, int count,
                                                         int64_t n, int flags, const struct bypass_endpoint *to)
{
    uint8_t buf[DATAGRAM_MAX];
    size_t at = 0;

    if (n > DATAGRAM_MAX) {
        return -EMSGSIZE;
    }
    for (int i = 0; i < count; i++) {
        memcpy(buf + at, iov[i].iov_base, iov[i].iov_len);
        at += iov[i].iov_len;
    }
    return bypass_sendto(&me.stack, o->sock, buf, at, flags, to);
}

static int64_t datagram_send_real(int fd, const struct object *o, const struct iovec *iov, int count, int flags,
                                  const struct bypass_endpoint *to)
{
    struct sockaddr_storage sa;
    struct msghdr h = {.msg_iov = (struct iovec *)iov, .msg_iovlen = (size_t)count};
    ssize_t n;

    if (to) {
        h.msg_name = &sa;
        h.msg_namelen = sizeof sa;
        name_to(o, to, (struct sockaddr *)&sa, &h.msg_namelen);
    }
    n = real.sendmsg(fd, &h, flags);
    return n < 0 ? -errno : n;
}

static int64_t datagram_send(struct object *o, int fd, const struct iovec *iov, int count, int64_t want, int flags,
                             const struct bypass_endpoint *to)
{
    bool block = !o->nonblock && !(flags & MSG_DONTWAIT);
    struct bypass_endpoint peer;
    uint64_t since = 0;

    if (o->place == PLACE_BOTH &&
        ((!to && bypass_peer(&me.stack, o->sock, &peer) < 0) || !place_sends(o, to ? to : &peer))) {
        return datagram_send_real(fd, o, iov, count, flags, to);
    }
    for (;;) {
        int64_t r = count == 1 ? bypass_sendto(&me.stack, o->sock, iov->iov_base, iov->iov_len, send_flags(flags), to)
                               : datagram_gather(o, iov, count, want, send_flags(flags), to);
        int waited;

        if (r != -EAGAIN) {
            sent();
            return r;
        }
        if (!block) {
            return retry() ? bypass_sendto(&me.stack, o->sock, iov->iov_base, iov->iov_len, send_flags(flags), to) : r;
        }
        waited = wait_for(o, fd, POLLOUT, o->sndtimeo_ns, &since);
        if (waited < 0) {
            return waited;
        }
    }
}

int64_t data_send(struct object *o, int fd, const struct iovec *iov, int count, int flags,
                  const struct bypass_endpoint *to)
{
    int64_t want = pieces(&iov, &count);

    if (want < 0) {
        return want;
    }
    if (unlikely(o->sock < 0 || me.g->dead)) {
        return -ECONNRESET;
    }
    return o->type == BYPASS_STREAM ? stream_send(o, fd, iov, count, want, flags)
                                    : datagram_send(o, fd, iov, count, want, flags, to);
}

int64_t data_broken_pipe(int64_t r, int flags, int type)
{
    if (unlikely(r == -EPIPE) && !(flags & MSG_NOSIGNAL) && type == BYPASS_STREAM) {
        pthread_kill(pthread_self(), SIGPIPE);
    }
    return r;
}
