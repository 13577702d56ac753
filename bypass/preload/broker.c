/* SPDX-License-Identifier: Apache-2.0 */
/*
 * broker.c - the conversation with the broker: one SOCK_SEQPACKET connection a process, one struct app_msg a message
 * (app.h). Questions are asked with the lock held and wait for their answer; what the broker says of its own accord is
 * read in between, or by the helper thread.
 *
 * When the broker ends, what is on the stack goes on. Nothing new can be leased until another one is there, which the
 * helper looks for: rejoin.c.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "preload.h"

enum { ANSWER_MS = 5000, HELLO_MS = 20000, FDS = APP_QUEUES + 3 };

static uint32_t next_seq;
static struct {
    uint32_t seq; /* 0: no such question */
    int type;
    struct bypass_addr to;
} ahead;                            /* the question for a block that will be needed */
static int heard[FDS], heard_count; /* descriptors of the message that was heard last */
static char *broker_path;

/* Before main(): programs may clear their environment (nginx does), and their children call the broker later. */
__attribute__((constructor(102))) static void note_path(void)
{
    const char *path = getenv("BYPASS_SOCKET");

    broker_path = path ? strdup(path) : NULL;
}

/* ---- Messages --------------------------------------------------------------------------------------------- */
static int say(const struct app_msg *m, int fd)
{
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {.head = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec iov = {.iov_base = (void *)m, .iov_len = sizeof *m};
    struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1};

    if (fd >= 0) {
        memcpy(CMSG_DATA(&control.head), &fd, sizeof fd);
        h.msg_control = &control;
        h.msg_controllen = sizeof control;
    }
    while (real.sendmsg(me.broker_fd, &h, MSG_NOSIGNAL) < 0) {
        if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

static void lost(void)
{
    fd_unhide(me.broker_fd);
    me.broker_fd = -1;
    ahead.seq = 0;
    rejoin_soon();
}

static void heard_take(const struct cmsghdr *c)
{
    int got = c->cmsg_type == SCM_RIGHTS ? (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int)) : 0;

    for (int i = 0; i < got; i++) {
        int fd;

        memcpy(&fd, CMSG_DATA(c) + (size_t)i * sizeof fd, sizeof fd);
        if (heard_count < FDS) {
            heard[heard_count++] = fd;
        } else {
            real.close(fd);
        }
    }
}

static void heard_close(void)
{
    while (heard_count > 0) {
        real.close(heard[--heard_count]);
    }
}

/* To who wants them: all, or none where there are more than it can have. */
static void heard_give(int *fds, int max, int *count)
{
    if (max > 0 && heard_count <= max) {
        memcpy(fds, heard, (size_t)heard_count * sizeof *fds);
        *count = heard_count;
        heard_count = 0;
    }
    heard_close();
}

/* One message, whose descriptors are in heard[]: 1, 0: none within `ms`, -errno: the broker is gone. */
static int hear(struct app_msg *m, int ms)
{
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(FDS * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = m, .iov_len = sizeof *m};
    struct msghdr h = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control.room};
    struct pollfd p = {.fd = me.broker_fd, .events = POLLIN};
    ssize_t n;

    if (real.poll(&p, 1, ms) <= 0) {
        return 0;
    }
    n = real.recvmsg(me.broker_fd, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0) {
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    }
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&h); c; c = CMSG_NXTHDR(&h, c)) {
        heard_take(c);
    }
    if (n != sizeof *m) {
        heard_close();
        return -ECONNRESET;
    }
    m->text[sizeof m->text - 1] = 0;
    return 1;
}

/* ---- What it says of its own accord ------------------------------------------------------------------------- */
/* What has become the kernel's is that for this process' descriptors and epoll sets, too. (All relatives are told.) */
static void settle(uint32_t i, struct object *o)
{
    for (int fd = 0; fd < me.fd_top; fd++) {
        if (fd_object(fd) == i) {
            char why[sizeof o->why];

            memcpy(why, o->why, sizeof why);
            place_kernel(fd, o, WHY_NOT_GRANTED, why);
            return;
        }
    }
}

/* Connections that came in at `local`, a listener's: what comes for them the kernel gets from now on, and refuses. */
static void accepted_end(const struct bypass_endpoint *local)
{
    static const struct bypass_addr any;
    bool anywhere = memcmp(&local->addr, &any, sizeof any) == 0;

    for (uint32_t i = 0; i < me.g->objects_bump; i++) {
        struct object *o = group_object(me.g, i);
        struct bypass_endpoint at;

        if (!o->refs || o->sock < 0 || o->type != BYPASS_STREAM || o->place != PLACE_STACK || o->listening ||
            o->lease || bypass_local(&me.stack, o->sock, &at) < 0 || at.port != local->port ||
            block_has(o->type, &at) || (!anywhere && memcmp(&at.addr, &local->addr, sizeof at.addr) != 0)) {
            continue;
        }
        object_revoke(i);
    }
}

static void revoked(uint32_t lease)
{
    block_revoked(lease);
    for (uint32_t i = 0; i < me.g->objects_bump; i++) {
        struct object *o = group_object(me.g, i);

        if (o->refs && o->lease == lease && lease) {
            if (o->listening) {
                accepted_end(&o->local);
            }
            object_revoke(i);
        }
        if (o->refs && o->place == PLACE_KERNEL && o->reason == WHY_NOT_GRANTED && me.local[i].fds &&
            (me.local[i].items || o->shadow_nonblock)) {
            settle(i, o);
        }
    }
}

static void next_hop(const struct app_msg *m)
{
    static const struct bypass_addr any;

    if (m->flags & 2) {
        bypass_nexthop_forget(&me.stack, memcmp(&m->remote.addr, &any, sizeof any) == 0 ? NULL : &m->remote.addr);
    } else {
        bypass_nexthop_set(&me.stack, &m->remote.addr, m->flags & 1 ? NULL : m->mac, m->mtu);
    }
}

/* The stack's addresses are kept in the group as well: a stack that is made anew needs them. */
int address_add(const struct bypass_addr *addr, int prefix_len)
{
    int err = bypass_addr_add(&me.stack, addr, prefix_len);

    for (int i = 0; err == 0 && i < GROUP_ADDRS; i++) {
        if (!me.g->addrs[i].used) {
            me.g->addrs[i].addr = *addr;
            me.g->addrs[i].prefix_len = prefix_len;
            me.g->addrs[i].used = 1;
            break;
        }
    }
    return err;
}

static void address_del(const struct bypass_addr *addr)
{
    bypass_addr_del(&me.stack, addr);
    routes_forget();
    for (int i = 0; i < GROUP_ADDRS; i++) {
        if (memcmp(&me.g->addrs[i].addr, addr, sizeof *addr) == 0) {
            me.g->addrs[i].used = 0;
        }
    }
}

/* heard[skip..] are the device's sockets, from queue n on. */
static void queues(int skip, uint32_t n, uint32_t of)
{
    for (int i = 0; i < heard_count; i++) {
        if (i < skip) {
            real.close(heard[i]);
        } else {
            device_queue(heard[i], n++, of);
        }
    }
    heard_count = 0;
}

static void heed(const struct app_msg *m)
{
    switch (m->type) {
    case APP_HELLO: /* again: memory, which is here already, and sockets, of which some may be new */
        queues(1, 0, (uint32_t)(heard_count - 1));
        if (!rejoin_answered(m)) {
            lost();
        }
        break;
    case APP_QUEUE:
        queues(0, m->index, m->flags);
        break;
    case APP_GRANT:
        grant_take(m);
        break;
    case APP_LEASE:
        if (ahead.seq && m->seq == ahead.seq) {
            ahead.seq = 0;
            block_came(m, ahead.type, &ahead.to);
        }
        break;
    case APP_RESOLVE: /* the answer to broker_resolve(); EINPROGRESS: it is told later */
        if (m->error == 0) {
            next_hop(m);
        }
        break;
    case APP_NEXTHOP:
        next_hop(m);
        break;
    case APP_ADDR_ADD:
        address_add(&m->local.addr, m->prefix_len);
        break;
    case APP_ADDR_DEL:
        address_del(&m->local.addr);
        break;
    case APP_REVOKED:
        revoked(m->lease);
        break;
    case APP_LEASED:
        lease_told(m->lease);
        break;
    case APP_DRAIN:
        rejoin_never(); /* what comes after it knows nothing of us */
        break;
    default: /* APP_LINK: the stack's timers know what to do; others: of a newer broker */
        break;
    }
    heard_close();
}

int broker_fd(void) { return me.broker_fd; }

void broker_leave(void)
{
    if (me.broker_fd >= 0) {
        lost();
    }
}

void broker_read(void)
{
    struct app_msg m;
    int got;

    me.broker_fd = me.broker_fd >= 0 ? me.broker_fd : rejoin_take();
    while (me.broker_fd >= 0 && (got = hear(&m, 0)) != 0) {
        if (got < 0) {
            lost();
            return;
        }
        heed(&m);
    }
}

/* ---- Questions ------------------------------------------------------------------------------------------------ */
static int ask(struct app_msg *m, int fd, int *fds, int max, int *count, int ms)
{
    uint64_t until = clock_ns() + (uint64_t)ms * 1000000;
    uint16_t type = m->type;
    uint32_t seq = m->seq = ++next_seq;
    int err = me.broker_fd < 0 ? -ENOTCONN : say(m, fd);

    while (err == 0) {
        int got = hear(m, 100);

        if (got < 0) {
            err = got;
        } else if (got && m->seq == seq && m->type == type) {
            heard_give(fds, max, count);
            return -(int)m->error;
        } else if (got) {
            heed(m);
        } else if (clock_ns() > until) {
            err = -ETIMEDOUT;
        }
    }
    if (me.broker_fd >= 0 && err != -ETIMEDOUT) {
        lost();
    }
    snprintf(m->text, sizeof m->text, "the broker: %s", strerror(-err));
    return err;
}

int broker_lease(struct app_msg *m, int fd)
{
    m->type = APP_LEASE;
    m->app = me.app->app;
    return ask(m, fd, NULL, 0, NULL, ANSWER_MS);
}

void broker_release(uint32_t lease)
{
    struct app_msg m = {.type = APP_RELEASE, .app = me.app->app, .lease = lease};

    if (lease && me.broker_fd >= 0) {
        ask(&m, -1, NULL, 0, NULL, ANSWER_MS);
    }
}

void broker_release_soon(uint32_t lease)
{
    struct app_msg m = {.type = APP_RELEASE, .app = me.app->app, .lease = lease, .seq = ++next_seq};

    if (lease && me.broker_fd >= 0) {
        say(&m, -1);
    }
}

void broker_block_ahead(int type, const struct bypass_endpoint *to)
{
    struct app_msg m = {.type = APP_LEASE, .app = me.app->app, .kind = (uint32_t)type, .remote = *to, .flags = 7};

    m.seq = ++next_seq;
    if (!ahead.seq && me.broker_fd >= 0 && say(&m, -1) == 0) {
        ahead.seq = m.seq;
        ahead.type = type;
        ahead.to = to->addr;
    }
}

bool broker_block_await(void)
{
    uint64_t until = clock_ns() + ANSWER_MS * 1000000ull;
    bool asked = ahead.seq != 0;
    struct app_msg m;

    while (ahead.seq && clock_ns() < until) {
        int got = hear(&m, 100);

        if (got < 0) {
            lost();
        } else if (got) {
            heed(&m);
        }
    }
    ahead.seq = 0;
    return asked;
}

void broker_resolve(const struct bypass_addr *dst)
{
    struct app_msg m = {.type = APP_RESOLVE, .app = me.app->app, .remote.addr = *dst};

    if (me.app->device == APP_DEV_LOOP) {
        bypass_nexthop_set(&me.stack, dst, NULL, 0);
    } else if (me.broker_fd >= 0) {
        m.seq = ++next_seq;
        say(&m, -1); /* the answer comes when it is known */
    }
}

static void refused_by(const struct app_msg *m, int err)
{
    snprintf(me.refused, sizeof me.refused, "%s", m->text[0] ? m->text : strerror(-err));
}

/* A connection, and the message that begins it. */
static int introduce(struct app_msg *m, bool wait)
{
    int fd = dial(broker_path ? broker_path : "", wait);

    if (fd < 0) {
        return fd;
    }
    me.broker_fd = fd;
    m->type = APP_HELLO;
    m->abi = APP_ABI;
    m->seq = ++next_seq;
    snprintf(m->name, sizeof m->name, "%s", getenv("BYPASS_PROCNAME") ?: program_invocation_short_name);
    return 0;
}

static int hello(struct app_msg *m, int *fds, int max, int *count)
{
    int err = introduce(m, true);

    if (err < 0) {
        return err;
    }
    err = ask(m, -1, fds, max, count, HELLO_MS);
    if (err < 0) {
        refused_by(m, err);
        if (me.broker_fd >= 0) {
            lost();
        }
    }
    return err;
}

static int hex(const char *text, uint8_t *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned v;

        if (sscanf(text + 2 * i, "%2x", &v) != 1) {
            return -1;
        }
        out[i] = (uint8_t)v;
    }
    return 0;
}

/* A relative that was started by exec finds in its environment whose it is. */
static void from_environment(struct app_msg *m)
{
    const char *app = getenv("BYPASS_APP"), *colon = app ? strchr(app, ':') : NULL;

    if (colon && strlen(colon + 1) == 2 * APP_TOKEN && hex(colon + 1, m->token, APP_TOKEN) == 0) {
        m->app = (uint32_t)strtoul(app, NULL, 10);
    }
}

static void to_environment(const struct app_msg *m)
{
    char text[2 * APP_TOKEN + 16];
    int at = snprintf(text, sizeof text, "%u:", m->app);

    for (int i = 0; i < APP_TOKEN; i++) {
        at += snprintf(text + at, sizeof text - (size_t)at, "%02x", m->token[i]);
    }
    app_to_environment(text);
}

/* Other processes of this user could open the memory file in /proc/PID/fd, or take it by pidfd_getfd(2): ptrace(2),
 * "Ptrace access mode checking", permits both while this process is dumpable. Where applications share an interface they
 * must not. Children inherit it; exec ends it: BYPASS_DUMPABLE=0 tells the next program. 1 is the user's: leave it. */
static bool hidden;

static void hide(void)
{
    const char *keep = getenv("BYPASS_DUMPABLE");

    if (!(keep && strcmp(keep, "1") == 0) && prctl(PR_GET_DUMPABLE) == 1) {
        hidden = prctl(PR_SET_DUMPABLE, 0) == 0;
    }
}

void broker_hide(bool shared)
{
    if (hidden && shared) {
        setenv("BYPASS_DUMPABLE", "0", 1);
    } else if (hidden) {
        prctl(PR_SET_DUMPABLE, 1);
        hidden = false;
    }
}

/* A relative's token stands in its environment, in /proc/PID/environ: not only from the first socket on. */
__attribute__((constructor(104))) static void hide_token(void)
{
    const char *dumpable = getenv("BYPASS_DUMPABLE");

    if (broker_path && dumpable && strcmp(dumpable, "0") == 0) {
        hide();
    }
}

/* After hello come addresses and grants, which need the stack: they are heeded when it is there. */
int broker_hello(int *fds, int max, int *count)
{
    struct app_msg m = {0};
    int err;

    *count = 0;
    hide();
    from_environment(&m);
    err = hello(&m, fds, max, count);
    if (err < 0 && m.app && !me.reaper) { /* the relatives may have ended: a new application then */
        for (; *count > 0; --*count) {
            real.close(fds[*count - 1]);
        }
        m = (struct app_msg){0};
        err = hello(&m, fds, max, count);
    }
    if (err == 0 && *count < 1) {
        refused_by(&m, -EPROTO);
        err = -EPROTO;
    }
    if (err == 0) {
        me.refused[0] = 0;
        to_environment(&m);
    }
    return err;
}

/* Waits for what follows the answer to hello, up to APP_READY. */
int broker_ready(void)
{
    uint64_t until = clock_ns() + ANSWER_MS * 1000000ull;
    struct app_msg m;

    while (me.broker_fd >= 0 && clock_ns() < until) {
        int got = hear(&m, 100);

        if (got < 0) {
            lost();
            return got;
        }
        if (got && m.type == APP_READY) {
            return 0;
        }
        if (got) {
            heed(&m);
        }
    }
    return me.broker_fd >= 0 ? -ETIMEDOUT : 0;
}

/* The answer, with descriptors that this process has already, and the lists after it are heeded when they come: the lock
 * is held, and relatives do not wait for the broker. */
int broker_rejoin(void)
{
    struct app_msg m = {.app = me.app->app};
    int err;

    if (me.app->device == APP_DEV_LOOP && me.broker_fd < 0) {
        return 0;
    }
    if (me.broker_fd >= 0) {
        lost(); /* the parent's: two readers would take each other's answers */
    }
    memcpy(m.token, me.app->token, APP_TOKEN);
    err = introduce(&m, true);
    return err < 0 ? err : say(&m, -1);
}

/* The same of a process that has lost its broker. The connection is not in use before it is answered: a broker that
 * systemd is about to start would keep questions waiting. */
int broker_dial_again(void)
{
    struct app_msg m = {.app = me.app->app};
    int err, fd;

    memcpy(m.token, me.app->token, APP_TOKEN);
    err = introduce(&m, false);
    if (err == 0) {
        err = say(&m, -1);
        fd = me.broker_fd;
        me.broker_fd = -1;
        if (err == 0) {
            return fd;
        }
        fd_unhide(fd);
    }
    return err;
}

void broker_announce_exec(void)
{
    struct app_msg m = {.type = APP_EXEC, .app = me.app->app};

    if (me.broker_fd >= 0) {
        ask(&m, -1, NULL, 0, NULL, ANSWER_MS);
    }
}

void broker_tell_fork(pid_t pid)
{
    struct app_msg m = {.type = APP_FORK, .app = me.app->app, .index = (uint32_t)pid};

    if (me.broker_fd >= 0) {
        say(&m, -1);
    }
}

int broker_linger(void)
{
    struct app_msg m = {.type = APP_LINGER, .app = me.app->app};

    return me.broker_fd < 0 ? -ENOTCONN : ask(&m, -1, NULL, 0, NULL, ANSWER_MS);
}
