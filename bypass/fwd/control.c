/* SPDX-License-Identifier: Apache-2.0 */
/*
 * control.c - what bypass-fwd is told (fwd.h): a message is received, found in a table, handled, answered. Nothing here
 * waits: who does not read its answers is disconnected.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "closer.h"
#include "program.h"

enum { ROOM = 131072 };
_Static_assert(sizeof(struct fwd_locals) <= ROOM && sizeof(struct fwd_keys) <= ROOM && sizeof(struct fwd_list) <= ROOM,
               "the largest message fits");

static _Alignas(16) uint8_t in[ROOM], out[ROOM];

int refuse(struct request *q, int err, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(q->text, sizeof q->text, format, args);
    va_end(args);
    ((struct fwd_head *)q->answer)->error = (uint16_t)err;
    return -err;
}

/* ---- Handlers ---------------------------------------------------------------------------------------------- */

static int on_hello(struct request *q)
{
    const struct fwd_hello *m = q->message;
    struct fwd_hello *a = q->answer;
    struct program *w = q->w;

    if (m->abi != FWD_ABI) {
        return refuse(q, EPROTO, "this bypass-fwd speaks version %d, not %u", FWD_ABI, m->abi);
    }
    if (m->flags & FWD_BROKER) {
        for (int i = 0; i < PROGRAM_CONNECTIONS; i++) {
            if (w->connection[i].fd >= 0 && w->connection[i].broker && &w->connection[i] != q->from) {
                return refuse(q, EBUSY, "another broker is connected");
            }
        }
        q->from->broker = true;
        w->told = (struct fwd_link){0}; /* it is told what has changed since the one before it */
        w->health_ns = 0;
    }
    *a = (struct fwd_hello){.head = a->head, .abi = FWD_ABI, .flags = m->flags, .pid = (uint32_t)getpid()};
    a->items = w->items_n;
    for (uint32_t i = 0; i < w->forward.ports; i++) {
        a->ports += w->forward.port[i] != NULL;
    }
    a->device = w->device ? w->device->netdev->queues : 0;
    q->answer_len = sizeof *a;
    return 0;
}

static int on_quit(struct request *q)
{
    q->w->quit = true;
    return 0;
}

static int failed(struct request *q, int err) { return err < 0 ? refuse(q, -err, "%s", strerror(-err)) : 0; }

static int on_locals(struct request *q)
{
    const struct fwd_locals *m = q->message;
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};

    if (m->count > FWD_LOCALS_MAX || q->len != offsetof(struct fwd_locals, local) + m->count * sizeof m->local[0]) {
        return refuse(q, EINVAL, "at most %d addresses", FWD_LOCALS_MAX);
    }
    for (uint32_t i = 0; i < m->count; i++) {
        if (memcmp(m->local[i].addr.b, mapped, sizeof mapped) != 0 || m->local[i].prefix_len > 32) {
            return refuse(q, EAFNOSUPPORT, "address %u is not IPv4", i);
        }
    }
    checker_locals(&q->w->forward.check, m->local, m->count);
    return 0;
}

static int on_lease_add(struct request *q) { return failed(q, forward_lease(&q->w->forward, q->message, 1)); }
static int on_lease_del(struct request *q) { return failed(q, forward_lease(&q->w->forward, q->message, 0)); }

static int on_entry(struct request *q)
{
    const struct fwd_entry *m = q->message;

    return failed(q, forward_entry(&q->w->forward, m->entry, m->app));
}

static int on_rate(struct request *q) { return failed(q, forward_rate(&q->w->forward, q->message, program_clock())); }

static int on_spin(struct request *q)
{
    const struct fwd_spin *m = q->message;

    q->w->spin_ns = m->spin_us * 1000ull;
    return failed(q, program_pin(m->cpu));
}

static int on_look(struct request *q)
{
    q->w->health_ns = 0;
    return 0;
}

static int on_stats(struct request *q)
{
    struct fwd_stats *a = q->answer;
    struct fwd_head head = a->head;

    *a = q->w->forward.n;
    a->head = head;
    for (uint32_t i = 0; i < q->w->forward.ports; i++) {
        a->ports += q->w->forward.port[i] != NULL;
    }
    a->leases = q->w->forward.check.leases.count;
    a->items = q->w->items_n;
    a->link = q->w->forward.link;
    q->answer_len = sizeof *a;
    return 0;
}

static int on_port_stats(struct request *q)
{
    const struct fwd_app *m = q->message;
    struct fwd_port_stats *a = q->answer;
    const struct forward_port *p = forward_port_find(&q->w->forward, m->app);
    struct fwd_head head = a->head;

    if (!p) {
        return refuse(q, ENOENT, "application %u has no port", m->app);
    }
    forward_port_stats(p, a);
    a->head = head;
    q->answer_len = sizeof *a;
    return 0;
}

static const struct handler {
    int (*handle)(struct request *q);
    size_t least; /* bytes of the message */
    int fds;      /* of it at most */
    bool anybody; /* not only the broker */
    bool all_fds; /* no fewer descriptors */
} handlers[] = {
    [FWD_HELLO] = {on_hello, sizeof(struct fwd_hello), 0, true},
    [FWD_QUIT] = {on_quit, sizeof(struct fwd_head), 0, false},
    [FWD_PUT] = {store_put, offsetof(struct fwd_item, blob), FWD_FDS, false},
    [FWD_GET] = {store_get, sizeof(struct fwd_name), 0, false},
    [FWD_LIST] = {store_list, offsetof(struct fwd_list, item), 0, true},
    [FWD_DELETE] = {store_delete, sizeof(struct fwd_name), 0, false},
    [FWD_WATCH] = {store_watch, sizeof(struct fwd_name), FWD_FDS, false},
    [FWD_WATCH_KEYS] = {store_watch_keys, offsetof(struct fwd_keys, keys), 1, false},
    [FWD_FORGET_KEYS] = {store_forget_keys, offsetof(struct fwd_keys, keys), 0, false},
    [FWD_UNWATCH] = {store_unwatch, sizeof(struct fwd_name), 0, false},
    [FWD_DEVICE_OPEN] = {device_open, sizeof(struct fwd_device), 1, false, true},
    [FWD_DPDK_OPEN] = {device_open_dpdk, offsetof(struct fwd_dpdk, args), 2, false, true},
    [FWD_DPDK_STATS] = {device_dpdk_stats, sizeof(struct fwd_app), 0, true},
    [FWD_DPDK_AUDIT] = {device_dpdk_audit, sizeof(struct fwd_head), 0, true},
    [FWD_DPDK_XSTATS] = {device_dpdk_xstats, offsetof(struct fwd_dpdk_xstats, xstat), 0, true},
    [FWD_DPDK_FLOWS] = {device_dpdk_flows, sizeof(struct fwd_flows), 1, false, true},
    [FWD_DEVICE_CLOSE] = {device_close, sizeof(struct fwd_head), 0, false},
    [FWD_LOCALS] = {on_locals, offsetof(struct fwd_locals, local), 0, false},
    [FWD_PORT_ADD] = {device_port_add, sizeof(struct fwd_port_add), 3, false},
    [FWD_PORT_DEL] = {device_port_del, sizeof(struct fwd_app), 0, false},
    [FWD_LEASE_ADD] = {on_lease_add, sizeof(struct fwd_lease), 0, false},
    [FWD_LEASE_DEL] = {on_lease_del, sizeof(struct fwd_lease), 0, false},
    [FWD_ENTRY] = {on_entry, sizeof(struct fwd_entry), 0, false},
    [FWD_RATE] = {on_rate, sizeof(struct fwd_rate), 0, false},
    [FWD_SPIN] = {on_spin, sizeof(struct fwd_spin), 0, false},
    [FWD_LOOK] = {on_look, sizeof(struct fwd_head), 0, false},
    [FWD_WATCHED] = {store_watched, sizeof(struct fwd_watched), 0, false},
    [FWD_STATS] = {on_stats, sizeof(struct fwd_head), 0, true},
    [FWD_PORT_STATS] = {on_port_stats, sizeof(struct fwd_app), 0, true},
};

static int handle(struct request *q)
{
    const struct fwd_head *head = q->message;
    const struct handler *h = head->type < sizeof handlers / sizeof *handlers ? &handlers[head->type] : NULL;

    if (!h || !h->handle) {
        return refuse(q, EOPNOTSUPP, "no message of type %u is known", head->type);
    }
    if (q->len < h->least || q->fds_n > h->fds || (h->all_fds && q->fds_n != h->fds)) {
        return refuse(q, EMSGSIZE, "a message of type %u with %zu bytes and %d descriptors: not what it should be",
                      head->type, q->len, q->fds_n);
    }
    if (!h->anybody && !q->from->broker) {
        return refuse(q, EACCES, "only the broker may ask for that: say hello as such");
    }
    return h->handle(q);
}

/* ---- Messages ---------------------------------------------------------------------------------------------- */

void control_lonely(struct program *w)
{
    bool any = w->hold ? w->items != NULL : w->listen != NULL;

    for (int i = 0; i < PROGRAM_CONNECTIONS; i++) {
        any |= w->connection[i].fd >= 0;
    }
    w->quit |= !any;
}

static void disconnect(struct program *w, struct connection *c)
{
    program_unwatch(w, c->fd);
    close(c->fd);
    *c = (struct connection){.fd = -1};
    control_lonely(w);
}

/* Receives one. 1; 0: nothing (more); -1: the other end is gone. */
static int receive(struct request *q)
{
    union {
        char buf[CMSG_SPACE(sizeof q->fds)];
        struct cmsghdr align;
    } control;
    struct iovec iov = {.iov_base = in, .iov_len = sizeof in};
    struct msghdr m = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof control.buf};
    ssize_t n = recvmsg(q->from->fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

    if (n <= 0) {
        return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
    }
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            q->fds_n = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(q->fds, CMSG_DATA(c), (size_t)q->fds_n * sizeof(int));
        }
    }
    q->message = in;
    q->len = m.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? 0 : (size_t)n;
    return 1;
}

static bool send_message(int to, const void *message, size_t len, const int *fds, uint32_t n)
{
    union {
        char buf[CMSG_SPACE(FWD_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = {.iov_base = (void *)(uintptr_t)message, .iov_len = len};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

    if (n) {
        memset(&control, 0, sizeof control);
        m.msg_control = control.buf;
        m.msg_controllen = CMSG_SPACE(n * sizeof(int));
        control.align.cmsg_level = SOL_SOCKET;
        control.align.cmsg_type = SCM_RIGHTS;
        control.align.cmsg_len = CMSG_LEN(n * sizeof(int));
        memcpy(CMSG_DATA(&control.align), fds, n * sizeof(int));
    }
    return sendmsg(to, &m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
}

static bool answer(struct request *q, int err)
{
    struct fwd_head *head = q->answer;

    if (err) {
        struct fwd_error *e = q->answer;

        head->error = head->error ? head->error : (uint16_t)-err;
        memcpy(e->text, q->text, sizeof e->text);
        return send_message(q->from->fd, e, sizeof *e, NULL, 0);
    }
    return send_message(q->from->fd, q->answer, q->answer_len, q->answer_fds, q->answer_fds_n);
}

/* Of the descriptors that came, those that no handler kept. */
static void close_rest(const struct request *q)
{
    int left = 0;

    for (int i = 0; i < q->fds_n; i++) {
        left += q->fds[i] >= 0;
    }
    if (left) {
        close_later(q->fds, q->fds_n);
    }
}

void control_in(struct program *w, uint32_t index)
{
    struct request q = {.w = w, .from = &w->connection[index], .answer = out, .answer_len = sizeof(struct fwd_head)};
    const struct fwd_head *head = (const struct fwd_head *)in;
    int got = q.from->fd >= 0 ? receive(&q) : 0, err;

    if (got == 0) {
        return;
    }
    if (got > 0) {
        memset(out, 0, sizeof(struct fwd_error));
        if (q.len >= sizeof *head) {
            *(struct fwd_head *)out = (struct fwd_head){.type = head->type, .seq = head->seq};
            err = handle(&q);
        } else {
            err = refuse(&q, EMSGSIZE, "a message that is too short, too long, or has too many descriptors");
        }
        close_rest(&q);
        if (answer(&q, err)) {
            return;
        }
    }
    disconnect(w, q.from);
}

void control_tell(struct program *w, void *message, size_t len, uint16_t type)
{
    *(struct fwd_head *)message = (struct fwd_head){.type = type};
    for (int i = 0; i < PROGRAM_CONNECTIONS; i++) {
        struct connection *c = &w->connection[i];

        if (c->fd >= 0 && c->broker && !send_message(c->fd, message, len, NULL, 0)) {
            disconnect(w, c);
        }
    }
}

/* ---- Connections ------------------------------------------------------------------------------------------- */

bool control_connection(struct program *w, int fd)
{
    for (uint32_t i = 0; i < PROGRAM_CONNECTIONS; i++) {
        if (w->connection[i].fd < 0 && program_watch(w, fd, EPOLLIN, EVENT_CONNECTION, i)) {
            w->connection[i] = (struct connection){.fd = fd};
            return true;
        }
    }
    close(fd);
    return false;
}

void control_accept(struct program *w)
{
    int fd = accept4(w->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct ucred who = {0};
    socklen_t len = sizeof who;

    if (fd < 0) {
        return;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &len) < 0 || who.uid != geteuid()) {
        fprintf(stderr, "bypass-fwd: process %d of user %u may not connect\n", (int)who.pid, (unsigned)who.uid);
        close(fd);
        return;
    }
    control_connection(w, fd);
}

void control_close(struct program *w)
{
    for (int i = 0; i < PROGRAM_CONNECTIONS; i++) {
        if (w->connection[i].fd >= 0) {
            close(w->connection[i].fd);
        }
    }
}
