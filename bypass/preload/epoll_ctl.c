/* SPDX-License-Identifier: Apache-2.0 */
/* epoll_ctl.c - epoll_create(), epoll_ctl(). Errors in the kernel's order (epoll_ctl(2)). */
#define _GNU_SOURCE
#include "epoll.h"

/* With EPOLLEXCLUSIVE nothing else may be asked for. */
#define EXCLUSIVE_OK ((uint32_t)(EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLWAKEUP | EPOLLET | EPOLLEXCLUSIVE))

EXPORT int epoll_create(int size)
{
    int fd;

    real_load();
    fd = real.epoll_create(size);
    epoll_note(fd);
    return fd;
}

EXPORT int epoll_create1(int flags)
{
    int fd;

    real_load();
    fd = real.epoll_create1(flags);
    epoll_note(fd);
    return fd;
}

static int real_ctl(int epfd, int op, int fd, struct epoll_event *ev)
{
    return real.epoll_ctl(epfd, op, fd, ev) < 0 ? -errno : 0;
}

bool epoll_is(int fd)
{
    struct epoll_event none = {0};

    return real_ctl(fd, EPOLL_CTL_MOD, fd, &none) != -EBADF && real_ctl(fd, EPOLL_CTL_DEL, me.dev_ep, NULL) == -ENOENT;
}

/* A set that was made where nobody noticed: by a system call, or inherited. */
static struct epoll *adopt(int epfd, int *err)
{
    struct epoll_event none = {0};

    *err = real_ctl(epfd, EPOLL_CTL_MOD, epfd, &none) == -EBADF ? -EBADF : -EINVAL;
    if (*err == -EBADF || fd_is_object(epfd) || real_ctl(epfd, EPOLL_CTL_DEL, me.dev_ep, NULL) != -ENOENT) {
        return NULL;
    }
    *err = -ENOMEM;
    return epoll_note(epfd);
}

static int check_events(int op, const struct item *i, const struct epoll_event *ev)
{
    if (op == EPOLL_CTL_DEL) {
        return i ? 0 : -ENOENT;
    }
    if (bad_pointer(ev)) {
        return -EFAULT;
    }
    if (ev->events & EPOLLEXCLUSIVE && (op == EPOLL_CTL_MOD || ev->events & ~EXCLUSIVE_OK)) {
        return -EINVAL;
    }
    if (op == EPOLL_CTL_ADD) {
        return i ? -EEXIST : 0;
    }
    return !i ? -ENOENT : i->flags & EPOLLEXCLUSIVE ? -EINVAL : 0;
}

static int change(struct item *i, int epfd, int op, struct epoll_event *ev)
{
    int err = i->half == HALF_KERNEL ? real_ctl(epfd, op, i->fd, ev) : 0;

    if (err < 0) {
        return err;
    }
    if (op == EPOLL_CTL_MOD) {
        item_arm(i, ev);
        if (i->half == HALF_BOTH) {
            err = item_kernel_half(i, EPOLL_CTL_MOD);
        }
        item_check(i);
        return err;
    }
    if (i->half == HALF_BOTH) {
        item_kernel_half(i, EPOLL_CTL_DEL);
    }
    item_drop(i);
    return 0;
}

/* kernel: it begins as a member of the program's set. */
static int add(struct epoll *e, int epfd, uint32_t object, struct epoll *inner, int fd, struct epoll_event *ev,
               bool kernel)
{
    int err = kernel ? real_ctl(epfd, EPOLL_CTL_ADD, fd, ev) : 0;
    struct item *i = err == 0 ? item_new(e, object, inner, fd, ev) : NULL;

    if (!i) {
        if (kernel && err == 0) {
            real_ctl(epfd, EPOLL_CTL_DEL, fd, NULL);
        }
        return err < 0 ? err : -ENOMEM;
    }
    if (inner || !kernel) {
        err = item_ours(i);
    }
    if (err < 0) {
        item_drop(i);
    }
    return err;
}

/* Lock held; fd names the object. */
static int ctl_object(int epfd, int op, int fd, struct object *o, struct epoll_event *ev)
{
    struct epoll *e = epoll_of(epfd);
    struct item *i;
    int err;

    if (!e && !(e = adopt(epfd, &err))) {
        return err;
    }
    if (op != EPOLL_CTL_ADD && op != EPOLL_CTL_MOD && op != EPOLL_CTL_DEL) {
        return -EINVAL;
    }
    i = item_find(e, object_index(o), NULL, fd);
    err = check_events(op, i, ev);
    if (err < 0) {
        return err;
    }
    return op == EPOLL_CTL_ADD ? add(e, epfd, object_index(o), NULL, fd, ev, o->place == PLACE_UNDECIDED)
                               : change(i, epfd, op, ev);
}

/* A set in a set. That is seldom, and has to be known before one of them has an item of ours: so it attaches. */
static int ctl_nested(int epfd, int op, int fd, struct epoll_event *ev)
{
    struct epoll *e, *inner;
    struct item *i;
    int err;

    if (!attach()) {
        return real_ctl(epfd, op, fd, ev);
    }
    enter();
    e = epoll_of(epfd);
    inner = epoll_of(fd);
    i = e && inner ? item_find(e, GROUP_NONE, inner, fd) : NULL;
    if (!e || !inner || e == inner || (!i && op != EPOLL_CTL_ADD)) {
        err = real_ctl(epfd, op, fd, ev); /* which has the errors, too */
    } else if (op == EPOLL_CTL_ADD) {
        err = i ? -EEXIST : add(e, epfd, GROUP_NONE, inner, fd, ev, true);
    } else {
        err = check_events(op, i, ev);
        err = err < 0 ? err : change(i, epfd, op, ev);
    }
    leave();
    return err;
}

EXPORT int epoll_ctl(int epfd, int op, int fd, struct epoll_event *ev)
{
    uint32_t v;
    struct object *o;
    int r;

    real_load();
    v = fd_entry(fd);
    if (fd_hidden(epfd) || fd_hidden(fd)) {
        return result(-EBADF);
    }
    if (v & FD_EPOLL) {
        return result(ctl_nested(epfd, op, fd, ev));
    }
    o = fd_on_stack(fd) ? fd_enter_any(fd) : NULL;
    if (!o) {
        return real.epoll_ctl(epfd, op, fd, ev);
    }
    r = o->place == PLACE_KERNEL ? PLACE_REAL : ctl_object(epfd, op, fd, o, ev);
    leave();
    return r == PLACE_REAL ? real.epoll_ctl(epfd, op, fd, ev) : result(r);
}
