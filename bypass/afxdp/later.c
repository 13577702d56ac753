/* SPDX-License-Identifier: Apache-2.0 */
/*
 * later.c - queues that the interface gets while a device is used by processes that cannot make sockets (`ethtool -L`).
 *
 *   who may open sockets     afxdp_more_socket()  a socket with the device's UMEM, bound, its fill ring empty
 *   who has the device       afxdp_take_queue()   rings mapped here; the first of the views also makes the queue's books
 *
 * Between the two, packets of the queue are dropped for want of frames. What one process opens and uses is in socket.c.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <net/if.h>
#include <sys/socket.h>
#include <unistd.h>

#include "internal.h"

static int refuse(struct afxdp_error *error, int err, int step, uint32_t queue)
{
    *error = (struct afxdp_error){.err = err, .step = step, .queue = (int32_t)queue};
    return -err;
}

static int open_socket(struct afxdp *d, const struct afxdp_config *cfg, uint16_t number, struct afxdp_error *error)
{
    struct queue *q = &d->queue[1];

    d->ifindex = if_nametoindex(cfg->ifname);
    if (!d->ifindex) {
        return fail(error, AFXDP_STEP_INTERFACE, -1, 0);
    }
    q->number = number;
    q->fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (q->fd < 0) {
        return fail(error, AFXDP_STEP_SOCKET, number, 0);
    }
    return queue_prepare(q, cfg, error) < 0 || queue_bind(d, 1, cfg, 0, error) < 0 ? -1 : 0;
}

int afxdp_more_socket(const struct afxdp_config *cfg, uint16_t number, int with, struct afxdp_error *error)
{
    struct afxdp *d = view_new(cfg);
    int fd;

    *error = (struct afxdp_error){.queue = -1};
    if (!d) {
        return refuse(error, ENOMEM, AFXDP_STEP_CONFIG, number);
    }
    d->queue[0].fd = with;
    fd = open_socket(d, cfg, number, error) < 0 ? -error->err : d->queue[1].fd;
    if (fd >= 0) {
        d->queue[1].fd = -1;
    }
    d->queue[0].fd = -1; /* the caller's */
    afxdp_detach(d);
    return fd;
}

/* The socket of another queue, or not the one that others have for this one. */
static bool wrong_socket(const struct afxdp *d, uint32_t qi, uint64_t cookie)
{
    for (uint32_t i = 0; i < qi; i++) {
        if (socket_cookie(d->queue[i].fd) == cookie) {
            return true;
        }
    }
    return qi < d->st->cfg.queue_count && d->st->cookie[qi] != cookie;
}

static int map_queue(struct afxdp *d, uint32_t qi, int fd, struct afxdp_error *error)
{
    struct queue *q = &d->queue[qi];

    q->number = (uint16_t)qi; /* all queues of the interface are served, or none is added */
    q->fd = fd;
    /* After fork() the set is the parent's too, which may have added the socket by the same number. */
    if (rings_map(q, &d->cfg, error) < 0 || (queue_watch(d, qi, error) < 0 && error->err != EEXIST)) {
        q->fd = -1;
        queue_release(q);
        return -1;
    }
    return 0;
}

/* Empty rings, no frames. Who dies in the middle of this leaves a queue that is not there yet. */
static void make_books(struct afxdp *d, uint32_t qi, uint64_t cookie, uint32_t target)
{
    d->st->queue[qi] = (struct queue_state){0};
    d->st->cookie[qi] = cookie;
    d->st->cfg.queues[qi] = (uint16_t)qi;
    d->st->fill_target = target; /* the others come down to it as packets arrive */
    __atomic_store_n(&d->st->cfg.queue_count, qi + 1, __ATOMIC_RELEASE);
}

int afxdp_take_queue(struct afxdp *d, int fd, uint32_t of, struct afxdp_error *error)
{
    struct afxdp_config cfg = d->cfg;
    uint32_t qi = d->nd.queues, target;
    uint64_t cookie = socket_cookie(fd);
    bool first = qi >= d->st->cfg.queue_count;

    *error = (struct afxdp_error){.queue = -1};
    cfg.queue_count = of > qi ? of : qi + 1;
    target = cfg.queue_count <= AFXDP_MAX_QUEUES ? umem_fill_target(&cfg) : 0;
    if (target == 0) {
        return refuse(error, ENOSPC, AFXDP_STEP_CONFIG, qi);
    }
    if (wrong_socket(d, qi, cookie)) {
        return refuse(error, EXDEV, AFXDP_STEP_SOCKET, qi);
    }
    if (map_queue(d, qi, fd, error) < 0) {
        return -error->err;
    }
    d->cfg.queues[qi] = (uint16_t)qi;
    d->cfg.queue_count = qi + 1;
    if (first) {
        make_books(d, qi, cookie, target);
    }
    d->nd.queues = (uint16_t)(qi + 1);
    if (first) {
        fill_refill(d, qi);
        if (ring_needs_wakeup(&d->queue[qi].fill)) {
            d->sys->wake_rx(d, qi);
        }
    }
    return (int)qi;
}
