/* SPDX-License-Identifier: Apache-2.0 */
/*
 * place.c - whose a socket is: the stack's, the kernel's (and why), or both. Decided when bind(), listen() or connect()
 * tells with whom it will talk; the shadow has done its part before, so that errors are the kernel's own.
 *
 *   listener            both: what is steered comes by the stack; loopback, and what policy leaves out, by the kernel
 *   bound datagrams     both
 *   connecting          the stack's, where policy grants the peer; else the kernel's
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "preload.h"

enum { PORT_TRIES = 16 };

static const struct bypass_addr localhost = {{[10] = 0xff, [11] = 0xff, 127, 0, 0, 1}};

static bool is_any(const struct bypass_addr *a)
{
    static const uint8_t zero[4];

    return memcmp(a->b + 12, zero, 4) == 0;
}

static bool looping(void) { return me.app->device == APP_DEV_LOOP; }

/* Whether the broker has said that the stack has this address. */
static bool stack_has(const struct bypass_addr *a)
{
    for (int i = 0; me.g && i < GROUP_ADDRS; i++) {
        if (me.g->addrs[i].used && memcmp(&me.g->addrs[i].addr, a, sizeof *a) == 0) {
            return true;
        }
    }
    return false;
}

/* An address of the stack's may be none of the kernel's here: a port of DPDK without an exception path. */
int place_bind(int fd, const struct object *o, const struct sockaddr *sa, socklen_t len)
{
    struct bypass_endpoint e;
    int err = real.bind(fd, sa, len) < 0 ? -errno : 0, on = 1;

    if (err != -EADDRNOTAVAIL || name_from(o, sa, len, &e) < 0 || !stack_has(&e.addr) ||
        real.setsockopt(fd, SOL_IP, IP_FREEBIND, &on, sizeof on) < 0) {
        return err;
    }
    return real.bind(fd, sa, len) < 0 ? -errno : 0;
}

void place_kernel(int fd, struct object *o, enum reason why, const char *more)
{
    uint32_t object = object_index(o);

    if (o->sock >= 0) {
        bypass_close(&me.stack, o->sock);
        o->sock = -1;
    }
    if (o->lease) {
        broker_release(o->lease);
        o->lease = 0;
    }
    if (o->shadow_nonblock && !o->nonblock) {
        real.fcntl(fd, F_SETFL, real.fcntl(fd, F_GETFL) & ~O_NONBLOCK);
        o->shadow_nonblock = 0;
    }
    o->place = PLACE_KERNEL;
    o->reason = (uint8_t)why;
    snprintf(o->why, sizeof o->why, "%s", more ? more : "");
    count_kernel(o->type, why);
    if (fd_is_object(fd)) {
        atomic_store_explicit(&me.table[fd], (object + 1) | FD_KERNEL, memory_order_relaxed);
    }
    epoll_placed(object, fd);
}

static void place_on(struct object *o, int fd, enum place where)
{
    if (o->place == PLACE_UNDECIDED) {
        count_stack(o->type);
    }
    o->place = (uint8_t)where;
    if (where == PLACE_BOTH && !o->shadow_nonblock) {
        /* Nobody sleeps in the kernel's half of it: what comes by the stack would wait. */
        real.fcntl(fd, F_SETFL, real.fcntl(fd, F_GETFL) | O_NONBLOCK);
        o->shadow_nonblock = 1;
    }
    helper_start();
    epoll_placed(object_index(o), fd);
}

/* The shadow's own address. */
static int shadow_name(int fd, const struct object *o, struct bypass_endpoint *out)
{
    struct sockaddr_storage sa;
    socklen_t len = sizeof sa;

    if (real.getsockname(fd, (struct sockaddr *)&sa, &len) < 0) {
        return -errno;
    }
    return name_from(o, (struct sockaddr *)&sa, len, out);
}

/* Asks for a flow. 0 and *local as it was granted, or the broker's refusal. */
static int lease(int fd, struct object *o, struct bypass_endpoint *local, const struct bypass_endpoint *remote)
{
    struct app_msg m = {.kind = o->type, .local = *local};
    int err;

    if (looping()) {
        return 0;
    }
    if (remote) {
        m.remote = *remote;
    }
    err = broker_lease(&m, fd);
    if (err < 0) {
        place_kernel(fd, o, WHY_REFUSED, m.text);
        return err;
    }
    *local = m.local;
    o->lease = m.lease;
    return 0;
}

/* ---- bind() and listen() ---------------------------------------------------------------------------------- */

/* The address may be the stack's: not loopback, unless the stack loops. */
static bool servable(int fd, struct object *o, const struct bypass_endpoint *local)
{
    bool loop = address_is_loopback(&local->addr);

    if (loop != looping() && !is_any(&local->addr)) {
        place_kernel(fd, o, loop ? WHY_LOOPBACK : WHY_NOT_GRANTED, NULL);
        return false;
    }
    return true;
}

static int bind_datagrams(int fd, struct object *o, struct bypass_endpoint *local)
{
    int err;

    if (!granted(BYPASS_DGRAM, local, NULL)) {
        return 0; /* it may still be connected to a peer that is */
    }
    if (uring_used(true)) {
        place_kernel(fd, o, WHY_URING, NULL);
        return PLACE_REAL;
    }
    if (lease(fd, o, local, NULL) < 0) {
        return PLACE_REAL;
    }
    err = bypass_bind(&me.stack, o->sock, local);
    if (err < 0) {
        place_kernel(fd, o, WHY_REFUSED, strerror(-err));
        return PLACE_REAL;
    }
    o->local = *local;
    place_on(o, fd, PLACE_BOTH);
    return 0;
}

/* Whether the stack lets the address be bound: looked at before the shadow is, which cannot be taken back. */
int place_free(struct object *o, const struct bypass_endpoint *local)
{
    static const int options[] = {BYPASS_SO_REUSEADDR, BYPASS_SO_REUSEPORT};
    bypass_sock probe;
    int err;

    if (local->port == 0 || o->sock < 0 || (address_is_loopback(&local->addr) != looping() && !is_any(&local->addr)) ||
        !granted(o->type, local, NULL)) {
        return 0;
    }
    probe = bypass_socket(&me.stack, o->type);
    if (probe < 0) {
        return 0;
    }
    for (unsigned i = 0; i < sizeof options / sizeof *options; i++) {
        bypass_setopt(&me.stack, probe, options[i], bypass_getopt(&me.stack, o->sock, options[i]));
    }
    err = bypass_bind(&me.stack, probe, local);
    bypass_close(&me.stack, probe);
    return err == -EADDRINUSE ? err : 0;
}

int place_bound(int fd, struct object *o)
{
    struct bypass_endpoint local;
    int err = shadow_name(fd, o, &local);

    o->bound = 1;
    if (err < 0) {
        place_kernel(fd, o, WHY_IPV6, NULL);
        return PLACE_REAL;
    }
    if (o->place != PLACE_UNDECIDED || !servable(fd, o, &local)) {
        return PLACE_REAL;
    }
    if (o->type == BYPASS_DGRAM) {
        return bind_datagrams(fd, o, &local);
    }
    if (looping()) {
        return bypass_bind(&me.stack, o->sock, &local);
    }
    return 0;
}

/* listen(2) of a socket that is not bound chooses a port. */
static int listen_name(int fd, const struct object *o, struct bypass_endpoint *local)
{
    struct sockaddr_in in = {.sin_family = AF_INET};
    struct sockaddr_in6 in6 = {.sin6_family = AF_INET6};
    int err = shadow_name(fd, o, local);

    if (err < 0 || local->port) {
        return err;
    }
    err = o->family == AF_INET6 ? real.bind(fd, (struct sockaddr *)&in6, sizeof in6)
                                : real.bind(fd, (struct sockaddr *)&in, sizeof in);
    return err < 0 ? 0 : shadow_name(fd, o, local); /* what is wrong with it, listen() says */
}

void place_unlisten(struct object *o)
{
    if (o->place == PLACE_BOTH && o->listening) {
        bypass_disconnect(&me.stack, o->sock);
        broker_release(o->lease);
        o->lease = 0;
        o->listening = 0;
        o->place = PLACE_UNDECIDED;
    }
}

int place_listen(int fd, struct object *o, int backlog)
{
    struct bypass_endpoint local, ours;
    int err = listen_name(fd, o, &local);

    if (o->listening) {
        return bypass_listen(&me.stack, o->sock, backlog);
    }
    if (uring_used(true)) {
        place_kernel(fd, o, WHY_URING, NULL);
        return PLACE_REAL;
    }
    if (err < 0 || !servable(fd, o, &local)) {
        if (err < 0) {
            place_kernel(fd, o, WHY_IPV6, NULL);
        }
        return PLACE_REAL;
    }
    if (!granted(BYPASS_STREAM, &local, NULL)) {
        place_kernel(fd, o, WHY_NOT_GRANTED, NULL);
        return PLACE_REAL;
    }
    if (lease(fd, o, &local, NULL) < 0) {
        return PLACE_REAL;
    }
    if (bypass_local(&me.stack, o->sock, &ours) == 0 && ours.port == 0) {
        err = bypass_bind(&me.stack, o->sock, &local);
    }
    err = err < 0 ? err : bypass_listen(&me.stack, o->sock, backlog);
    if (err < 0) {
        place_kernel(fd, o, WHY_DUPLICATE, strerror(-err));
        return PLACE_REAL;
    }
    o->listening = 1;
    o->local = local;
    o->backlog = backlog;
    place_on(o, fd, PLACE_BOTH);
    return 0;
}

/* Binds the shadow to a port of the kernel's choice. Where the stack talks to itself it has to be free there too: the
 * stack's connections may outlive their sockets (TIME_WAIT), and the kernel does not know. */
int place_bind_any(int fd, const struct object *o, const struct sockaddr *sa, socklen_t len)
{
    for (int i = 0; looping() && i < PORT_TRIES; i++) {
        int probe = real.socket(o->family, o->type == BYPASS_STREAM ? SOCK_STREAM : SOCK_DGRAM, 0), err;
        struct bypass_endpoint local = {0};
        struct sockaddr_storage with;

        if (probe < 0 || real.bind(probe, sa, len) < 0 || shadow_name(probe, o, &local) < 0) {
            if (probe >= 0) {
                real.close(probe);
            }
            break; /* the shadow's own bind() says what is wrong */
        }
        real.close(probe);
        memcpy(&with, sa, len);
        ((struct sockaddr_in *)&with)->sin_port = htons(local.port); /* where sockaddr_in6 has it too */
        if (bypass_port_users(&me.stack, o->type, NULL, local.port) > 0) {
            continue;
        }
        err = real.bind(fd, (struct sockaddr *)&with, len) < 0 ? -errno : 0;
        if (err != -EADDRINUSE) {
            return err;
        }
    }
    return place_bind(fd, o, sa, len);
}

/* A connection has its name, which its shadow need not have: EINVAL, unless the address is wrong anyway (bind(2)). Where
 * it is over, and the stack talks to itself, it may have another name; on a network its lease is of the old one. */
int place_rebind(struct object *o, const struct sockaddr *sa, socklen_t len)
{
    int probe = real.socket(o->family, SOCK_STREAM | SOCK_CLOEXEC, 0), err = 0;
    struct bypass_endpoint local = {0}, wanted;

    if (probe >= 0) {
        err = real.bind(probe, sa, len) < 0 || shadow_name(probe, o, &wanted) < 0 ? -errno : 0;
        real.close(probe);
    }
    if (err < 0 && err != -EADDRINUSE) {
        return err;
    }
    bypass_local(&me.stack, o->sock, &local);
    return local.port || !looping() ? -EINVAL : err < 0 ? err : bypass_bind(&me.stack, o->sock, &wanted);
}

/* ---- connect() ----------------------------------------------------------------------------------------------- */

/* Where the stack talks to itself the shadow reserves a port as the stack's connection takes it. */
static int bind_looping(int fd, struct object *o)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 in6 = {.sin6_family = AF_INET6};
    struct bypass_endpoint local;
    int err = 0;

    memcpy(&in6.sin6_addr, &localhost, 16);
    if (bypass_local(&me.stack, o->sock, &local) == 0 && local.port) {
        return 0;
    }
    if (shadow_name(fd, o, &local) < 0 || local.port == 0) {
        err = o->family == AF_INET6 ? place_bind_any(fd, o, (struct sockaddr *)&in6, sizeof in6)
                                    : place_bind_any(fd, o, (struct sockaddr *)&in, sizeof in);
        if (err < 0) {
            return err;
        }
        shadow_name(fd, o, &local);
        if (o->type == BYPASS_STREAM) {
            memset(local.addr.b + 12, 0, 4); /* only the port is chosen: a refused connection leaves no address */
        }
    }
    return bypass_bind(&me.stack, o->sock, &local);
}

/* Why this peer is the kernel's; WHY_NONE: it is the stack's. */
static enum reason connect_reason(const struct object *o, const struct bypass_endpoint *to)
{
    static const struct bypass_endpoint any = {.addr = {{[10] = 0xff, [11] = 0xff}}};
    struct bypass_endpoint local = any;
    bool loop = address_is_loopback(&to->addr);

    if (looping()) {
        return !loop                                                             ? WHY_NOT_GRANTED
               : bypass_port_users(&me.stack, o->type, &to->addr, to->port) == 0 ? WHY_NOBODY
               : o->place == PLACE_UNDECIDED && uring_used(false)                ? WHY_URING
                                                                                 : WHY_NONE;
    }
    if (loop || is_any(&to->addr)) {
        return WHY_LOOPBACK;
    }
    if (to->addr.b[12] >= 224) {
        return WHY_MULTICAST;
    }
    bypass_local(&me.stack, o->sock, &local);
    if (!granted(o->type, &local, to)) {
        return WHY_NOT_GRANTED;
    }
    return o->place == PLACE_UNDECIDED && uring_used(false) ? WHY_URING : WHY_NONE;
}

/* A socket that nobody has bound: from a block where there is one, else by a lease of its own. */
static int lease_unbound(int fd, struct object *o, struct bypass_endpoint *local, const struct bypass_endpoint *to)
{
    uint32_t flags;

    for (int tries = 0; tries < 4;
         tries++) { /* a block that we have; one asked for; one that others took up; a new one */
        struct app_msg m = {.kind = o->type, .local = *local, .remote = *to};
        int err = block_bind(fd, o, to, local, &flags);

        if (err != -ENOENT) {
            return err == 0 ? 0 : lease(fd, o, local, to);
        }
        if (broker_block_await()) {
            continue;
        }
        m.flags = flags;
        err = broker_lease(&m, fd);
        if (err < 0) {
            place_kernel(fd, o, WHY_REFUSED, m.text);
            return err;
        }
        if (!(m.flags & 1)) {
            *local = m.local;
            o->lease = m.lease;
            return 0;
        }
        block_add(&m, o->type, &to->addr);
    }
    return lease(fd, o, local, to);
}

static int prepare_connect(int fd, struct object *o, const struct bypass_endpoint *to)
{
    struct bypass_endpoint local = {0}, ours = {0};
    int err;

    if (looping()) {
        return bind_looping(fd, o);
    }
    if (o->lease) {
        if (o->type == BYPASS_DGRAM) {
            return 0; /* bound already: every peer's packets come */
        }
        broker_release(o->lease); /* of a connection attempt that failed */
        o->lease = 0;
    }
    shadow_name(fd, o, &local);
    bypass_local(&me.stack, o->sock, &ours);
    if (local.port && block_has(o->type, &local) && granted(o->type, &local, to)) {
        return ours.port ? 0 : bypass_bind(&me.stack, o->sock, &local); /* of an attempt that failed */
    }
    err = local.port || !is_any(&local.addr) ? lease(fd, o, &local, to) : lease_unbound(fd, o, &local, to);
    if (err < 0) {
        return PLACE_REAL;
    }
    return bypass_bind(&me.stack, o->sock, &local);
}

static int connect_datagrams(int fd, struct object *o, const struct bypass_endpoint *to)
{
    int err = bypass_connect(&me.stack, o->sock, to);

    if (err == 0) {
        place_on(o, fd, PLACE_BOTH);
    }
    return err;
}

static int connect_stream(int fd, struct object *o, const struct bypass_endpoint *to)
{
    int err = bypass_connect(&me.stack, o->sock, to);

    if (err == 0 || err == -EINPROGRESS) {
        place_on(o, fd, PLACE_STACK);
    }
    return err;
}

static void this_host(struct bypass_endpoint *to)
{
    if (looping() && is_any(&to->addr)) {
        to->addr = localhost; /* Linux: 0.0.0.0 is this host */
    }
}

int place_connect(int fd, struct object *o, const struct bypass_endpoint *to)
{
    struct bypass_endpoint peer = *to;
    enum reason why;
    int err;

    this_host(&peer);
    if (o->place == PLACE_STACK || o->listening) {
        err = bypass_connect(&me.stack, o->sock, &peer);
        if (o->listening && err == -EINPROGRESS) { /* a listener that was shut down: the shadow has no half of it now */
            o->listening = 0;
            place_on(o, fd, PLACE_STACK);
        }
        return err;
    }
    why = connect_reason(o, &peer);
    if (why == WHY_NOBODY && o->type == BYPASS_STREAM) {
        return PLACE_TRY;
    }
    if (why == WHY_NOBODY && o->place == PLACE_UNDECIDED) {
        why = WHY_NONE; /* datagrams: somebody may come, on either side */
    }
    if (why != WHY_NONE) {
        if (o->place == PLACE_UNDECIDED) {
            place_kernel(fd, o, why, NULL);
        } else {
            bypass_connect(&me.stack, o->sock, &peer); /* a datagram socket hears nobody else, on either side */
        }
        return PLACE_REAL;
    }
    err = prepare_connect(fd, o, &peer);
    if (err != 0) {
        return err;
    }
    return o->type == BYPASS_DGRAM ? connect_datagrams(fd, o, &peer) : connect_stream(fd, o, &peer);
}

int place_refused(int fd, struct object *o, const struct bypass_endpoint *to)
{
    struct bypass_endpoint peer = *to;
    int err;

    this_host(&peer);
    err = prepare_connect(fd, o, &peer);
    return err != 0 ? err : connect_stream(fd, o, &peer);
}

/* Where the stack talks to itself a port is taken as by bind(); on a network such datagrams are the kernel's. */
void place_unbound(int fd, struct object *o, const struct sockaddr *sa, socklen_t len)
{
    struct bypass_endpoint to;

    if (name_from(o, sa, len, &to) < 0) {
        place_kernel(fd, o, WHY_IPV6, NULL);
    } else if (looping() && connect_reason(o, &to) == WHY_NONE) {
        if (bind_looping(fd, o) == 0) {
            place_on(o, fd, PLACE_BOTH);
        }
    } else if (!looping() || !address_is_loopback(&to.addr)) {
        place_kernel(fd, o, WHY_UNBOUND_DATAGRAMS, NULL);
    }
}

bool place_sends(const struct object *o, const struct bypass_endpoint *to)
{
    struct bypass_endpoint local = {0};

    if (looping()) {
        return bypass_port_users(&me.stack, BYPASS_DGRAM, &to->addr, to->port) > 0;
    }
    if (address_is_loopback(&to->addr) || is_any(&to->addr) || to->addr.b[12] >= 224) {
        return false;
    }
    bypass_local(&me.stack, o->sock, &local);
    return granted(BYPASS_DGRAM, &local, to);
}
