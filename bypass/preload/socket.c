/* SPDX-License-Identifier: Apache-2.0 */
/* socket.c - socket(), bind(), listen(), accept(), connect(), shutdown(), names, close(), as programs call them. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/tcp.h>
#include <string.h>
#include <unistd.h>

#include "preload.h"

enum { LINGER_LOOK_NS = 5000000 };

/* ---- Objects: made and ended -------------------------------------------------------------------------------- */

/* A new object for fd; GROUP_NONE: there is no room, and the descriptor is just the kernel's. */
static uint32_t object_make(int fd, int family, int type, bypass_sock sock)
{
    uint32_t i = group_object_new(me.g);
    struct object *o;

    if (i == GROUP_NONE) {
        return i;
    }
    o = group_object(me.g, i);
    o->refs = 0; /* fd_set_object() counts */
    o->family = (uint8_t)family;
    o->type = (uint8_t)type;
    o->sock = sock;
    o->pid = me.pid;
    o->fd = fd;
    if (sock >= 0) {
        bypass_set_user(&me.stack, sock, i + 1);
    }
    fd_set_object(fd, i);
    return i;
}

void object_of_kernel(int fd, int family, int type, enum reason why, const char *more)
{
    uint32_t i = object_make(fd, family, type, -1);

    if (i != GROUP_NONE) {
        place_kernel(fd, group_object(me.g, i), why, more);
    }
}

void object_put(uint32_t object)
{
    if (group_unref(me.g, object, me.proc)) {
        object_end(object);
    } else if (unlikely(group_holds(me.g, object, me.proc) == 0)) {
        relatives_suspect(object);
    }
}

void object_end(uint32_t object)
{
    struct object *o = group_object(me.g, object);
    struct bypass_endpoint local = {0};

    if (o->sock >= 0) {
        bypass_local(&me.stack, o->sock, &local);
        bypass_close(&me.stack, o->sock);
        sent();
    }
    if (o->lease) {
        lease_leaves(o->lease, o->type, local.port);
    }
    group_object_free(me.g, object);
}

void object_revoke(uint32_t object)
{
    struct object *o = group_object(me.g, object);

    snprintf(o->why, sizeof o->why, "the policy grants it no more");
    bypass_abort(&me.stack, o->sock);
    o->sock = -1;
    o->lease = 0;
    o->place = o->listening || o->type == BYPASS_DGRAM ? PLACE_KERNEL : PLACE_STACK;
    o->reason = WHY_NOT_GRANTED;
    group_notify(me.g, object, BYPASS_EVERYTHING);
}

/* SO_LINGER: close() waits until what was sent has arrived, or for so long (socket(7)). */
static void linger(struct object *o)
{
    int64_t seconds = o->refs == 1 && o->place == PLACE_STACK ? bypass_getopt(&me.stack, o->sock, BYPASS_SO_LINGER) : 0;
    uint64_t now = clock_ns(), until = now + (uint64_t)(seconds > 0 ? seconds : 0) * 1000000000u;
    struct bypass_tcp_info info;

    if (seconds <= 0 || bypass_shutdown(&me.stack, o->sock, BYPASS_SHUT_WR) < 0) {
        return;
    }
    turn();
    while (now < until && bypass_tcp_info(&me.stack, o->sock, &info) == 0 && info.state != BYPASS_CLOSED &&
           (info.snd_queued || info.snd_una != info.snd_nxt)) {
        struct sleeper s = {.object = object_index(o)};

        /* Nothing tells of the last acknowledgment: looked at now and then. */
        if (park(&s, NULL, 0, now + LINGER_LOOK_NS < until ? now + LINGER_LOOK_NS : until, NULL) == -EINTR) {
            return;
        }
        turn();
        now = clock_ns();
    }
}

void close_object(int fd)
{
    uint32_t object = (fd_entry(fd) & ~(uint32_t)FD_KERNEL) - 1;
    const struct object *o = group_object(me.g, object);

    if (o->refs == 1 && o->listening) {
        /* The broker and relatives may have the kernel's socket too: it must not go on listening for them. */
        real.shutdown(fd, SHUT_RDWR);
    }
    if (o->type == BYPASS_STREAM && o->sock >= 0) {
        linger(group_object(me.g, object));
    }
    fd_forget(fd);
}

/* ---- socket() -------------------------------------------------------------------------------------------------- */
static int kind_of(int domain, int type, int protocol)
{
    type &= ~(SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (domain != AF_INET && domain != AF_INET6) {
        return -1;
    }
    if (type == SOCK_STREAM && (protocol == 0 || protocol == IPPROTO_TCP)) {
        return BYPASS_STREAM;
    }
    return type == SOCK_DGRAM && (protocol == 0 || protocol == IPPROTO_UDP) ? BYPASS_DGRAM : -1;
}

/* An Internet socket of another protocol. A program that has no others is none of ours. */
static void other_protocol(int fd, int domain, int type, int protocol)
{
    char more[GROUP_WHY];

    if (me.attached > 0 && (domain == AF_INET || domain == AF_INET6)) {
        snprintf(more, sizeof more, "type %d, protocol %d", type & ~(SOCK_NONBLOCK | SOCK_CLOEXEC), protocol);
        enter();
        object_of_kernel(fd, domain, 0, WHY_PROTOCOL, more);
        leave();
    }
}

EXPORT int socket(int domain, int type, int protocol)
{
    int fd, kind = kind_of(domain, type, protocol);
    bypass_sock sock;
    uint32_t i;
    bool ours;

    real_load();
    ours = kind >= 0 && attach(); /* first: what is open then was opened by others */
    fd = real.socket(domain, type, protocol);
    if (fd >= 0 && kind < 0) {
        other_protocol(fd, domain, type, protocol);
    }
    if (fd < 0 || !ours) {
        return fd;
    }
    enter();
    sock = bypass_socket(&me.stack, kind);
    i = object_make(fd, domain, kind, sock < 0 ? -1 : sock);
    if (i == GROUP_NONE) {
        if (sock >= 0) {
            bypass_close(&me.stack, sock);
        }
    } else {
        group_object(me.g, i)->nonblock = (type & SOCK_NONBLOCK) != 0;
        if (sock < 0) {
            place_kernel(fd, group_object(me.g, i), WHY_FULL, strerror((int)-sock));
        }
    }
    leave();
    return fd;
}

/* ---- bind(), listen() --------------------------------------------------------------------------------------------- */
/* The shadow's half of bind(). */
static int bind_shadow(int fd, const struct object *o, const struct sockaddr *sa, socklen_t len)
{
    struct bypass_endpoint e;

    if (o->place == PLACE_UNDECIDED && !o->bound && sa && len <= sizeof(struct sockaddr_storage) &&
        name_from(o, sa, len, &e) == 0 && e.port == 0) {
        return place_bind_any(fd, o, sa, len);
    }
    return place_bind(fd, o, sa, len);
}

EXPORT int bind(int fd, const struct sockaddr *sa, socklen_t len)
{
    struct bypass_endpoint local;
    struct object *o;
    int r;

    real_load();
    o = fd_enter_any(fd);
    if (!o) {
        return real.bind(fd, sa, len);
    }
    if (o->place == PLACE_STACK) {
        r = place_rebind(o, sa, len);
    } else {
        r = o->place == PLACE_UNDECIDED && !o->bound && name_from(o, sa, len, &local) == 0 ? place_free(o, &local) : 0;
        r = r == 0 ? bind_shadow(fd, o, sa, len) : r;
        r = r == 0 && o->place == PLACE_UNDECIDED ? place_bound(fd, o) : r;
    }
    leave();
    return result(r == PLACE_REAL ? 0 : r);
}

EXPORT int listen(int fd, int backlog)
{
    struct object *o;
    int r;

    real_load();
    o = fd_enter_any(fd);
    if (!o) {
        return real.listen(fd, backlog);
    }
    if (o->place == PLACE_STACK) { /* a connection, or one that was */
        r = bypass_listen(&me.stack, o->sock, backlog);
    } else {
        /* The stack's half first: between the two the kernel would take connections that are the stack's. */
        r = o->place == PLACE_KERNEL || o->type != BYPASS_STREAM ? PLACE_REAL : place_listen(fd, o, backlog);
        if (r >= 0 && real.listen(fd, backlog) < 0) {
            r = -errno;
            place_unlisten(o);
        }
    }
    leave();
    return result(r == PLACE_REAL ? 0 : r);
}

/* ---- accept() ------------------------------------------------------------------------------------------------------ */

/* A connection of the stack that waits: its descriptor; -EAGAIN: none does. */
static int accept_stack(struct object *o, struct bypass_endpoint *peer, int flags)
{
    bypass_sock sock;
    uint32_t i;
    int fd;

    if (me.g->dead || !(bypass_ready(&me.stack, o->sock) & BYPASS_IN)) {
        return -EAGAIN;
    }
    fd = real.socket(o->family, SOCK_STREAM | flags, 0); /* its shadow */
    if (fd < 0) {
        return -errno; /* EMFILE: the connection goes on waiting, as in the kernel */
    }
    sock = bypass_accept(&me.stack, o->sock);
    if (sock < 0) {
        real.close(fd);
        return (int)sock;
    }
    i = object_make(fd, o->family, BYPASS_STREAM, sock);
    if (i == GROUP_NONE) {
        bypass_abort(&me.stack, sock);
        real.close(fd);
        return -ENFILE;
    }
    group_object(me.g, i)->place = PLACE_STACK;
    group_object(me.g, i)->nonblock = (flags & SOCK_NONBLOCK) != 0;
    group_object(me.g, i)->rcvtimeo_ns = o->rcvtimeo_ns; /* as all options but O_NONBLOCK (accept(2)) */
    group_object(me.g, i)->sndtimeo_ns = o->sndtimeo_ns;
    count_stack(BYPASS_STREAM);
    bypass_peer(&me.stack, sock, peer);
    return fd;
}

/* look: the kernel's half may have one, too. */
static int accept_both(struct object *o, int fd, struct sockaddr *sa, socklen_t *len, int flags, bool look,
                       bool *kernels)
{
    struct bypass_endpoint peer = {0};
    int got = accept_stack(o, &peer, flags);

    *kernels = false;
    if (got >= 0) {
        name_to(o, &peer, sa, len);
    }
    if (got != -EAGAIN || !look) {
        return got;
    }
    got = real.accept4(fd, sa, len, flags);
    *kernels = got >= 0;
    return got < 0 ? -errno : got;
}

EXPORT int accept4(int fd, struct sockaddr *sa, socklen_t *len, int flags)
{
    struct object *o;
    uint64_t since = 0;
    bool kernels = false;
    int r, family;

    real_load();
    o = fd_enter(fd);
    if (!o) {
        return real.accept4(fd, sa, len, flags);
    }
    family = o->family;
    if (!o->listening) {
        leave();
        return result(o->type == BYPASS_STREAM ? -EINVAL : -EOPNOTSUPP);
    }
    self.kernels = o->nonblock; /* who sleeps is told of the kernel's half */
    while ((r = accept_both(o, fd, sa, len, flags, self.kernels, &kernels)) == -EAGAIN) {
        if (o->nonblock) {
            r = retry() ? accept_both(o, fd, sa, len, flags, false, &kernels) : r;
            break;
        }
        r = wait_for(o, fd, POLLIN, o->rcvtimeo_ns, &since);
        if (o->place == PLACE_KERNEL) { /* the policy grants it no more */
            leave();
            return accept4(fd, sa, len, flags);
        }
        if (r < 0) {
            break;
        }
    }
    if (kernels) {
        object_of_kernel(r, family, BYPASS_STREAM, WHY_LOOPBACK, NULL);
    }
    leave();
    return result(r);
}

EXPORT int accept(int fd, struct sockaddr *sa, socklen_t *len) { return accept4(fd, sa, len, 0); }

/* ---- connect() ------------------------------------------------------------------------------------------------------- */

/* Waits for the end of the handshake. */
static int connected(struct object *o, int fd, const struct bypass_endpoint *to)
{
    uint64_t since = 0;
    int r;

    do {
        r = wait_for(o, fd, POLLOUT, o->sndtimeo_ns, &since);
        if (r < 0) {
            return r == -EAGAIN ? -EINPROGRESS : r;
        }
        r = bypass_connect(&me.stack, o->sock, to);
    } while (r == -EALREADY || r == -EINPROGRESS);
    return r;
}

/* connect() to AF_UNSPEC: the socket is fresh again. */
static int disconnect(struct object *o, int fd, const struct sockaddr *sa, socklen_t len)
{
    static const struct bypass_endpoint none = {.addr = {{[10] = 0xff, [11] = 0xff}}};

    int r;

    real.connect(fd, sa, len);
    r = o->type == BYPASS_STREAM ? bypass_disconnect(&me.stack, o->sock) : bypass_connect(&me.stack, o->sock, &none);
    group_notify(me.g, object_index(o), BYPASS_EVERYTHING);
    turn(); /* as shutdown() */
    return r;
}

/* A connect() of the shadow that has not waited was refused already: on a loopback the answer is there at once. */
static bool refused_at_once(int fd)
{
    struct tcp_info info = {.tcpi_state = TCP_SYN_SENT};
    socklen_t len = sizeof info;
    int err = 0;

    return real.getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) == 0 && info.tcpi_state == TCP_CLOSE &&
           real.getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &(socklen_t){sizeof err}) == 0 && err == ECONNREFUSED;
}

/* Nobody listens there on the stack: who does on the kernel, if anybody, has the connection. Where nobody does there
 * either, the stack refuses it as the kernel has: the next attempt may find somebody on the stack. */
static int connect_kernel(int fd, const struct sockaddr *sa, socklen_t len)
{
    int r = real.connect(fd, sa, len), err = errno;
    struct object *o = r == 0 || err == EINPROGRESS || err == EINTR ? fd_enter_any(fd) : NULL;
    struct bypass_endpoint to;

    if (o && o->place == PLACE_UNDECIDED) {
        if (r < 0 && err == EINPROGRESS && refused_at_once(fd) && name_from(o, sa, len, &to) == 0) {
            real.connect(fd, &(struct sockaddr){.sa_family = AF_UNSPEC}, sizeof(struct sockaddr));
            err = -place_refused(fd, o, &to);
            turn();
        } else {
            place_kernel(fd, o, WHY_NOBODY, NULL);
        }
    }
    if (o) {
        leave();
    }
    errno = err;
    return r;
}

EXPORT int connect(int fd, const struct sockaddr *sa, socklen_t len)
{
    struct bypass_endpoint to;
    struct object *o;
    int r;

    real_load();
    o = fd_enter_any(fd);
    if (!o || o->place == PLACE_KERNEL) {
        if (o) {
            leave();
        }
        return real.connect(fd, sa, len);
    }
    if (len >= sizeof sa->sa_family && sa->sa_family == AF_UNSPEC) {
        r = o->place == PLACE_UNDECIDED ? PLACE_REAL : disconnect(o, fd, sa, len);
    } else if (name_from(o, sa, len, &to) < 0) {
        if (o->place == PLACE_UNDECIDED) {
            place_kernel(fd, o, WHY_IPV6, NULL);
        }
        r = PLACE_REAL;
    } else {
        r = place_connect(fd, o, &to);
        if (r == -EINPROGRESS) {
            turn();
        }
        if ((r == -EINPROGRESS || r == -EALREADY) && !o->nonblock) {
            r = connected(o, fd, &to);
        }
        if (r == 0 && o->type == BYPASS_DGRAM) {
            real.connect(fd, sa, len); /* the kernel's half hears this peer only, too */
        }
    }
    leave();
    if (r == PLACE_TRY) {
        return connect_kernel(fd, sa, len);
    }
    return r == PLACE_REAL ? real.connect(fd, sa, len) : result(r);
}

/* ---- shutdown(), names ---------------------------------------------------------------------------------------------- */
EXPORT int shutdown(int fd, int how)
{
    struct object *o;
    int r;

    real_load();
    o = fd_enter(fd);
    if (!o) {
        return real.shutdown(fd, how);
    }
    r = bypass_shutdown(&me.stack, o->sock, how);
    o->shut_rd |= r == 0 && how != SHUT_WR;
    if (o->place == PLACE_BOTH) {
        real.shutdown(fd, how);
    }
    group_notify(me.g, object_index(o), BYPASS_IN | BYPASS_OUT | BYPASS_RDHUP | BYPASS_HUP);
    turn(); /* who sleeps in a call on it wakes up, although the stack may have nothing to do */
    leave();
    return result(r);
}

/* The stack's name for a connection; the shadow has the right one for everything else. */
static int name_of(int fd, struct sockaddr *sa, socklen_t *len, bool peer)
{
    struct bypass_endpoint e = {0};
    struct object *o = fd_enter(fd);
    int r;

    if (!o || (!peer && o->place != PLACE_STACK)) {
        if (o) {
            leave();
        }
        return peer ? real.getpeername(fd, sa, len) : real.getsockname(fd, sa, len);
    }
    r = peer ? bypass_peer(&me.stack, o->sock, &e) : bypass_local(&me.stack, o->sock, &e);
    if (r == 0) {
        name_to(o, &e, sa, len);
    }
    leave();
    return result(r);
}

EXPORT int getsockname(int fd, struct sockaddr *sa, socklen_t *len)
{
    real_load();
    return name_of(fd, sa, len, false);
}

EXPORT int getpeername(int fd, struct sockaddr *sa, socklen_t *len)
{
    real_load();
    return name_of(fd, sa, len, true);
}

/* ---- close() ------------------------------------------------------------------------------------------------------------ */
EXPORT int close(int fd)
{
    real_load();
    if (likely(fd_entry(fd) == 0) || me.gone) {
        return real.close(fd);
    }
    if (fd_hidden(fd)) {
        return result(-EBADF);
    }
    if (fd_entry(fd) & FD_EPOLL) {
        epoll_close(fd);
        return real.close(fd);
    }
    if (fd_enter_quietly(fd)) {
        close_object(fd);
        leave();
    }
    return real.close(fd);
}
