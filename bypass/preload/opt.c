/* SPDX-License-Identifier: Apache-2.0 */
/*
 * opt.c - setsockopt(), getsockopt(). Which option is whose is in opt_rows.c.
 *
 * Until it is decided whose a socket is, the kernel's answer is the call's, and the stack's socket gets the same. Then
 * the stack's answer is.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <string.h>
#include <sys/time.h>

#include "opt.h"

/* ---- Setting: the stack's half ----------------------------------------------------------------------------------- */

/* An int as Linux reads it: four bytes; at IPPROTO_IP also one (ip_setsockopt() of the kernel). */
static int number(int level, const void *val, socklen_t len, int64_t *out)
{
    int v = 0;

    if (len >= sizeof v) {
        memcpy(&v, val, sizeof v);
    } else if (level != IPPROTO_IP) {
        return -EINVAL;
    } else if (len > 0) {
        v = *(const uint8_t *)val;
    }
    *out = v;
    return 0;
}

static int set_linger(const struct object *o, const void *val, socklen_t len)
{
    struct linger l;

    if (len < sizeof l) {
        return -EINVAL;
    }
    memcpy(&l, val, sizeof l);
    return bypass_setopt(&me.stack, o->sock, BYPASS_SO_LINGER,
                         !l.l_onoff       ? -1
                         : l.l_linger < 0 ? INT_MAX /* Linux takes it for unsigned */
                                          : l.l_linger);
}

/* The shadow has checked and rounded it already: what it tells is what counts. */
static int set_timeout(int fd, struct object *o, bool sending, const struct timeval *val)
{
    int64_t *out = sending ? &o->sndtimeo_ns : &o->rcvtimeo_ns;
    struct timeval t = {0}, asked;
    socklen_t len = sizeof t;

    if (real.getsockopt(fd, SOL_SOCKET, sending ? SO_SNDTIMEO : SO_RCVTIMEO, &t, &len) < 0) {
        return -errno;
    }
    memcpy(&asked, val, sizeof asked);
    if (asked.tv_sec < 0) {
        *out = 1; /* no wait at all: Linux reads it as that */
    } else {
        *out = t.tv_sec > INT32_MAX ? 0 : (int64_t)t.tv_sec * 1000000000 + (int64_t)t.tv_usec * 1000;
    }
    return 0;
}

/* An unsigned long, or an unsigned int; all ones: no limit, which is the stack's 0. */
static int set_rate(const struct object *o, const void *val, socklen_t len)
{
    uint64_t rate = 0, most = len >= sizeof rate ? UINT64_MAX : UINT32_MAX;

    if (len < sizeof(uint32_t)) {
        return -EINVAL;
    }
    memcpy(&rate, val, len >= sizeof rate ? sizeof rate : sizeof(uint32_t));
    rate = rate == most ? 0 : rate;
    return bypass_setopt(&me.stack, o->sock, BYPASS_SO_MAX_PACING_RATE, rate > INT64_MAX ? INT64_MAX : (int64_t)rate);
}

static int set_congestion(const struct object *o, const void *val, socklen_t len)
{
    char name[BYPASS_CC_NAME] = {0};

    if (len < 1) {
        return -EINVAL;
    }
    memcpy(name, val, len < sizeof name - 1 ? len : sizeof name - 1);
    return bypass_cc_set(&me.stack, o->sock, name);
}

static int set_number(const struct object *o, const struct option_row *row, int level, const void *val, socklen_t len)
{
    int64_t v;
    int err = number(level, val, len, &v);

    return err < 0 ? err : bypass_setopt(&me.stack, o->sock, row->core, v);
}

static int set_stack(int fd, struct object *o, const struct option_row *row, int level, const void *val, socklen_t len)
{
    switch (row->kind) {
    case LINGER:
        return set_linger(o, val, len);
    case TIMEOUT:
        return set_timeout(fd, o, row->core, val);
    case RATE:
        return set_rate(o, val, len);
    case CONGESTION:
        return set_congestion(o, val, len);
    case V6ONLY:
        o->v6only = *(const int *)val != 0;
        return 0;
    case INFO:
    case PENDING:
    case PEER:
    case NOTHING:
        return -ENOPROTOOPT;
    default:
        return set_number(o, row, level, val, len);
    }
}

/* ---- Setting --------------------------------------------------------------------------------------------------------- */
static int set_real(int fd, int level, int name, const void *val, socklen_t len)
{
    return real.setsockopt(fd, level, name, val, len) < 0 ? -errno : 0;
}

/* Kept, for nothing: people may want to know. */
static int noted(struct object *o, const struct option_row *row, int result)
{
    if (result == 0 && row->side == KEPT) {
        snprintf(o->why, sizeof o->why, "%s has no effect", row->name);
    }
    return result;
}

/* Whether something other than "off" is wanted: zero, and of a rate all ones. */
static bool asks(const struct option_row *row, const void *val, socklen_t len)
{
    uint32_t off = row->kind == RATE ? UINT32_MAX : 0;

    return len > 0 && memcmp(val, &off, len < sizeof off ? len : sizeof off) != 0;
}

static int give_up(int fd, struct object *o, const struct option_row *row, int level, int name)
{
    char text[GROUP_WHY];

    snprintf(text, sizeof text, row->side == UNKNOWN ? "option %d of level %d" : row->name, name, level);
    place_kernel(fd, o, row->side == MULTI ? WHY_MULTICAST : WHY_OPTION, text);
    return 0;
}

static int set_undecided(int fd, struct object *o, const struct option_row *row, int level, int name, const void *val,
                         socklen_t len)
{
    int r = set_real(fd, level, name, val, len);

    if (r < 0 || row->side == SAME || row->side == KEPT) {
        return noted(o, row, r);
    }
    if (row->side == STACK) {
        if (set_stack(fd, o, row, level, val, len) == 0 || row->kind == OPTIONAL) {
            return 0;
        }
    } else if (!asks(row, val, len)) {
        return 0;
    }
    return give_up(fd, o, row, level, name);
}

/* What Linux would say, without doing it to the shadow. */
static int would_set(const struct object *o, int level, int name, const void *val, socklen_t len)
{
    int fd = real.socket(o->family, (o->type == BYPASS_STREAM ? SOCK_STREAM : SOCK_DGRAM) | SOCK_CLOEXEC, 0);
    int r = fd < 0 ? 0 : set_real(fd, level, name, val, len);

    if (fd >= 0) {
        real.close(fd);
    }
    return r;
}

/* Who talks to it does so on the stack, and would not find it on the kernel: a stream; datagrams of a stack that talks to
 * itself. */
static bool bound_to_stack(const struct object *o)
{
    struct bypass_endpoint peer;

    return o->type == BYPASS_STREAM || (me.app->device == APP_DEV_LOOP && bypass_peer(&me.stack, o->sock, &peer) == 0);
}

/* What the stack lacks, of a socket that it has. Datagrams go on by the kernel; what waits on the stack is lost, as
 * datagrams may be. */
static int set_lost(int fd, struct object *o, const struct option_row *row, int level, int name, const void *val,
                    socklen_t len)
{
    int r;

    if (asks(row, val, len) && bound_to_stack(o)) {
        r = would_set(o, level, name, val, len);
        return r < 0 ? r : -ENOPROTOOPT;
    }
    r = set_real(fd, level, name, val, len);
    return r < 0 || !asks(row, val, len) ? r : give_up(fd, o, row, level, name);
}

static int set_decided(int fd, struct object *o, const struct option_row *row, int level, int name, const void *val,
                       socklen_t len)
{
    int r = 0;

    if (row->side != STACK) {
        return row->side == SAME || row->side == KEPT ? noted(o, row, set_real(fd, level, name, val, len))
                                                      : set_lost(fd, o, row, level, name, val, len);
    }
    if (row->kind == V6ONLY) {
        return -EINVAL; /* it is bound (ipv6(7)) */
    }
    if (row->kind == TIMEOUT || row->kind >= FORCED) {
        r = set_real(fd, level, name, val, len);
    }
    r = r < 0 || row->kind > FORCED ? r : set_stack(fd, o, row, level, val, len);
    if (r < 0 && o->type == BYPASS_DGRAM) {
        return set_lost(fd, o, row, level, name, val, len);
    }
    if (r == 0 && o->place == PLACE_BOTH) {
        real.setsockopt(fd, level, name, val, len); /* the kernel's half does what it can */
    }
    sent(); /* TCP_NODELAY, TCP_CORK: what was held back may go */
    return r;
}

EXPORT int setsockopt(int fd, int level, int name, const void *val, socklen_t len)
{
    const struct option_row *row;
    struct object *o;
    int r;

    real_load();
    o = fd_on_stack(fd) ? fd_enter_any(fd) : NULL;
    if (!o) {
        return fd_hidden(fd) ? result(-EBADF) : real.setsockopt(fd, level, name, val, len);
    }
    row = option_row(o, level, name);
    if (o->place == PLACE_KERNEL || me.g->dead) {
        r = set_real(fd, level, name, val, len);
    } else if ((int)len < 0) {
        r = -EINVAL;
    } else if (!val && len) {
        r = set_real(fd, level, name, val, len); /* EFAULT, unless something is wrong that is looked at before */
    } else if (o->place == PLACE_UNDECIDED) {
        r = set_undecided(fd, o, row, level, name, val, len);
    } else {
        r = set_decided(fd, o, row, level, name, val, len);
    }
    leave();
    return result(r);
}

/* ---- Telling ----------------------------------------------------------------------------------------------------------- */

/* As much as the program has room for; *len becomes what was written. */
static int tell(const void *from, socklen_t n, void *val, socklen_t *len)
{
    n = n < *len ? n : *len;
    if (n && !val) {
        return -EFAULT;
    }
    memcpy(val, from, n);
    *len = n;
    return 0;
}

static int tell_number(int level, int64_t value, void *val, socklen_t *len)
{
    int v = (int)value;
    uint8_t c = (uint8_t)v;

    if (value < -1) {
        return (int)value; /* bypass_getopt() failed; no value is less than -1 */
    }
    if (level == IPPROTO_IP && *len > 0 && *len < sizeof v && v >= 0 && v <= UINT8_MAX) {
        return tell(&c, 1, val, len); /* ip(7): who has no room for an int gets a byte */
    }
    return tell(&v, sizeof v, val, len);
}

static int tell_linger(const struct object *o, void *val, socklen_t *len)
{
    int64_t s = bypass_getopt(&me.stack, o->sock, BYPASS_SO_LINGER);
    struct linger l = {.l_onoff = s >= 0, .l_linger = s >= 0 ? (int)s : 0};

    return tell(&l, sizeof l, val, len);
}

static int tell_timeout(int64_t ns, void *val, socklen_t *len)
{
    struct timeval t = {.tv_sec = ns / 1000000000, .tv_usec = ns % 1000000000 / 1000};

    return tell(&t, sizeof t, val, len);
}

static int tell_rate(const struct object *o, void *val, socklen_t *len)
{
    int64_t got = bypass_getopt(&me.stack, o->sock, BYPASS_SO_MAX_PACING_RATE);
    uint64_t rate = got > 0 ? (uint64_t)got : UINT64_MAX;
    uint32_t few = rate < UINT32_MAX ? (uint32_t)rate : UINT32_MAX;

    if (got < 0) {
        return (int)got;
    }
    return *len >= sizeof rate ? tell(&rate, sizeof rate, val, len) : tell(&few, sizeof few, val, len);
}

static int tell_congestion(const struct object *o, void *val, socklen_t *len)
{
    char name[BYPASS_CC_NAME] = {0};
    int err = bypass_cc_get(&me.stack, o->sock, name, sizeof name);

    return err < 0 ? err : tell(name, sizeof name, val, len);
}

static int tell_info(const struct object *o, void *val, socklen_t *len)
{
    struct bypass_tcp_info info = {0};
    uint8_t room[512];
    int err = bypass_tcp_info(&me.stack, o->sock, &info);

    if (err < 0) {
        return err;
    }
    return tell(room, (socklen_t)bypass_tcp_info_linux(&info, room, sizeof room), val, len);
}

static int tell_pending(int fd, const struct object *o, void *val, socklen_t *len)
{
    int err = bypass_error(&me.stack, o->sock);
    socklen_t n = sizeof err;

    if (err == 0 && o->place == PLACE_BOTH) {
        real.getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &n);
    }
    return tell(&err, sizeof err, val, len);
}

/* SO_PEERNAME: at most the name's length, else EINVAL (sk_getsockopt() of the kernel). */
static int tell_peer(const struct object *o, void *val, socklen_t *len)
{
    struct bypass_endpoint e = {0};
    struct sockaddr_storage sa;
    socklen_t n = sizeof sa;
    int err = bypass_peer(&me.stack, o->sock, &e);

    if (err < 0) {
        return -ENOTCONN;
    }
    name_to(o, &e, (struct sockaddr *)&sa, &n);
    return n < *len ? -EINVAL : tell(&sa, *len, val, len);
}

static int get_real(int fd, int level, int name, void *val, socklen_t *len)
{
    return real.getsockopt(fd, level, name, val, len) < 0 ? -errno : 0;
}

static int get_stack(int fd, struct object *o, const struct option_row *row, int level, int name, void *val,
                     socklen_t *len)
{
    int64_t v;

    switch (row->kind) {
    case NUMBER:
    case OPTIONAL:
    case DOUBLED:
        v = bypass_getopt(&me.stack, o->sock, row->core);
        v = row->kind == DOUBLED && v > 0 ? (2 * v > INT_MAX ? INT_MAX : 2 * v) : v;
        return tell_number(level, v, val, len);
    case LINGER:
        return tell_linger(o, val, len);
    case TIMEOUT:
        return tell_timeout(row->core ? o->sndtimeo_ns : o->rcvtimeo_ns, val, len);
    case RATE:
        return tell_rate(o, val, len);
    case CONGESTION:
        return tell_congestion(o, val, len);
    case V6ONLY:
        return tell_number(level, o->v6only, val, len);
    case INFO:
        return tell_info(o, val, len);
    case PENDING:
        return tell_pending(fd, o, val, len);
    case PEER:
        return tell_peer(o, val, len);
    case NOTHING:
        *len = 0;
        return 0;
    default:
        return get_real(fd, level, name, val, len);
    }
}

EXPORT int getsockopt(int fd, int level, int name, void *val, socklen_t *len)
{
    const struct option_row *row;
    struct object *o;
    int r;

    real_load();
    o = fd_enter(fd);
    if (!o) {
        return fd_hidden(fd) ? result(-EBADF) : real.getsockopt(fd, level, name, val, len);
    }
    row = option_row(o, level, name);
    if (row->kind == PENDING && me.g->dead && len) {
        r = tell(&(int){ECONNRESET}, sizeof(int), val, len);
    } else if (row->side != STACK || !len || (int)*len < 0 || me.g->dead) {
        r = get_real(fd, level, name, val, len); /* says EFAULT and EINVAL, too */
    } else {
        r = get_stack(fd, o, row, level, name, val, len);
        r = r == -ENOPROTOOPT ? get_real(fd, level, name, val, len) : r;
    }
    leave();
    return result(r);
}
