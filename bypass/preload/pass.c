/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pass.c - descriptors that are passed in messages on Unix sockets (unix(7), SCM_RIGHTS). What goes is the shadow; who
 * gets it finds the object by its inode number. Meanwhile the message has a reference of its own (object.under_way).
 *
 * A message that nobody takes closes what it carries, and nobody tells. The sender has its shadows in an epoll set, which
 * the kernel takes them out of when the last descriptor anywhere is closed (epoll(7)), and looks there now and then. If
 * the sender ends before the message is lost, the socket lasts until the application ends.
 *
 * Only relatives can use what they get. A process that makes a pair of Unix sockets and then forks becomes an application
 * before that (fork.c), so that its children are relatives, and the programs that these become; others that are older than
 * the first Internet socket are not.
 * pidfd_getfd(2) is not known here.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "preload.h"

enum { SENT = 1024, LOOK_NS = 100000000 };

static struct {
    uint32_t object;
    uint64_t ino;
} sent_list[SENT]; /* by this process; lock held */
static uint32_t sent_count;
static int set = -1; /* of their shadows */

/* Calls `what` for each descriptor that comes with a message; NULL: only tells whether there are any. */
static bool each_right(const struct msghdr *h, void (*what)(int fd))
{
    bool any = false;

    for (struct cmsghdr *c = h->msg_control ? CMSG_FIRSTHDR(h) : NULL; c; c = CMSG_NXTHDR((struct msghdr *)h, c)) {
        size_t n = c->cmsg_len > CMSG_LEN(0) ? (c->cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;

        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            any |= n > 0;
            for (size_t i = 0; what && i < n; i++) {
                int fd;

                memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
                what(fd);
            }
        }
    }
    return any;
}

static bool has_rights(const struct msghdr *h)
{
    return me.attached > 0 && h->msg_control && h->msg_controllen && each_right(h, NULL);
}

/* ---- Sending -------------------------------------------------------------------------------------------------- */

/* The kernel tells when the last descriptor of it is closed, wherever. */
static void watch_shadow(int fd, uint32_t object)
{
    struct epoll_event none = {.events = 0};

    if (set < 0) {
        set = fd_hide(real.epoll_create1(EPOLL_CLOEXEC));
    }
    for (uint32_t i = 0; i < sent_count; i++) {
        if (sent_list[i].object == object && sent_list[i].ino == group_object(me.g, object)->ino) {
            return;
        }
    }
    if (sent_count < SENT && set >= 0 && real.epoll_ctl(set, EPOLL_CTL_ADD, fd, &none) == 0) {
        sent_list[sent_count].object = object;
        sent_list[sent_count++].ino = group_object(me.g, object)->ino;
    }
    relatives_look_before(clock_ns() + LOOK_NS);
    drive_anew();
}

static void goes(int fd)
{
    uint32_t i = fd_object(fd);
    struct object *o = i != GROUP_NONE ? group_object(me.g, i) : NULL;

    if (o && o->place != PLACE_KERNEL && o->under_way < UINT16_MAX) {
        o->ino = o->ino ? o->ino : fd_inode(fd);
        o->under_way++;
        o->refs++;
        watch_shadow(fd, i);
    }
}

static void arrived(struct object *o)
{
    if (o->under_way) {
        o->under_way--;
        o->refs--;
    }
}

static void comes_back(int fd)
{
    uint32_t i = fd_object(fd);

    if (i != GROUP_NONE && group_object(me.g, i)->refs > 1) {
        arrived(group_object(me.g, i));
    }
}

static void with_lock(const struct msghdr *h, void (*what)(int fd))
{
    int saved = errno;

    if (has_rights(h)) {
        enter();
        each_right(h, what);
        leave();
    }
    errno = saved;
}

void pass_sent(const struct msghdr *h) { with_lock(h, goes); }
void pass_unsent(const struct msghdr *h) { with_lock(h, comes_back); }

/* ---- Receiving ------------------------------------------------------------------------------------------------- */
static void came(int fd)
{
    uint64_t ino = fd_inode(fd);
    uint32_t i = ino ? group_find_ino(me.g, ino) : GROUP_NONE;

    if (i != GROUP_NONE) {
        fd_set_object(fd, i);
        arrived(group_object(me.g, i));
    } else if (ino) {
        note_inherited_fd(fd);
    }
}

static __thread bool internet_came;

static void look(int fd) { internet_came |= is_internet(fd); }

/* A program that a relative started joins with the first Internet socket that it is given. */
static void join_by(const struct msghdr *h)
{
    int saved = errno;

    internet_came = false;
    if (me.attached == 0 && me.relative && h->msg_control && h->msg_controllen) {
        each_right(h, look);
    }
    if (internet_came) {
        attach();
    }
    errno = saved;
}

void pass_received(struct msghdr *h)
{
    join_by(h);
    if (has_rights(h)) {
        each_right(h, fd_fresh);
        with_lock(h, came);
    }
}

/* ---- Messages that nobody took ------------------------------------------------------------------------------------- */

/* The set's shadows, one line each: "tfd: N events: .. ino:HEX .." (proc(5), /proc/PID/fdinfo). The text, or NULL. */
static char *list_set(void)
{
    char path[48], *text = NULL;
    size_t size = 0;
    FILE *f, *out;
    int c;

    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", set);
    f = fopen(path, "re");
    out = f ? open_memstream(&text, &size) : NULL;
    while (out && (c = getc(f)) != EOF) {
        putc(c, out);
    }
    if (out) {
        fclose(out);
    }
    if (f) {
        fclose(f);
    }
    return text;
}

static bool open_somewhere(const char *listed, uint64_t ino)
{
    char word[32];
    int n = snprintf(word, sizeof word, "ino:%" PRIx64 " ", ino);

    return n > 0 && strstr(listed, word) != NULL;
}

/* Whether it need not be looked at any more. */
static bool settled(uint32_t object, uint64_t ino, const char *listed)
{
    struct object *o = group_object(me.g, object);

    if (o->ino != ino || o->under_way == 0) {
        return true;
    }
    if (open_somewhere(listed, ino)) {
        return false;
    }
    o->refs -= o->under_way;
    o->under_way = 0;
    if (o->refs == 0) {
        object_end(object);
    }
    return true;
}

void pass_check(void)
{
    char *listed = sent_count ? list_set() : NULL;

    for (uint32_t i = sent_count; listed && i-- > 0;) {
        if (settled(sent_list[i].object, sent_list[i].ino, listed)) {
            sent_list[i] = sent_list[--sent_count];
        }
    }
    free(listed);
    if (sent_count) {
        relatives_look_before(clock_ns() + LOOK_NS);
    }
}

void pass_child(void)
{
    fd_unhide(set); /* the parent's, as what it sent is the parent's affair */
    set = -1;
    sent_count = 0;
}

EXPORT int socketpair(int domain, int type, int protocol, int fds[2])
{
    int r;

    real_load();
    r = real.socketpair(domain, type, protocol, fds);
    if (r == 0) {
        me.may_pass |= domain == AF_UNIX;
        fd_fresh(fds[0]);
        fd_fresh(fds[1]);
    }
    return r;
}
