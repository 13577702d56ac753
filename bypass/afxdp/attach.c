/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attach.c - a view of a device that another process has opened: what a process needs that got the memory and the
 * sockets, but has no capability to make them. It maps the rings of the sockets that it is given; everything else is
 * in the memory already, ring positions included.
 *
 * The memory may be damaged. What bounds an access is copied out of it once, checked, and used from the copy. What a
 * fellow process writes later is believed: those who share a device share their fate.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "internal.h"

static int refuse(struct afxdp_error *error, int err, int step, int queue)
{
    errno = err;
    return fail(error, step, queue, 0);
}

/* The configuration that the state in mem was made with. 0 or -1. */
static int read_config(const void *mem, size_t size, struct afxdp_config *cfg, struct afxdp_error *error)
{
    const struct afxdp_state *st = mem;

    if (!mem || (uintptr_t)mem % 4096 || size < sizeof *st) {
        return refuse(error, EINVAL, AFXDP_STEP_CONFIG, -1);
    }
    if (st->magic != AFXDP_MAGIC || st->bytes != sizeof *st) {
        return refuse(error, EBADMSG, AFXDP_STEP_STATE, -1);
    }
    memcpy(cfg, &st->cfg, sizeof *cfg);
    return 0;
}

/* The view's memory; d->cfg is a copy that nobody else writes. */
static int view_memory(struct afxdp *d, void *mem, size_t size, struct afxdp_error *error)
{
    if (umem_view(d, &d->cfg, mem, size) < 0 || !umem_sane(d)) {
        return refuse(error, EBADMSG, AFXDP_STEP_STATE, -1);
    }
    d->tx_meta_len = d->st->tx_meta_len;
    d->nd.caps = d->st->caps & (BYPASS_CAP_RX_CSUM | BYPASS_CAP_TX_CSUM);
    if (d->tx_meta_len != 0 && d->tx_meta_len != sizeof(struct tx_metadata)) {
        return refuse(error, EBADMSG, AFXDP_STEP_STATE, -1);
    }
    return 0;
}

static int view_queue(struct afxdp *d, uint32_t qi, int fd, struct afxdp_error *error)
{
    struct queue *q = &d->queue[qi];

    q->number = d->cfg.queues[qi];
    q->fd = fd;
    if (socket_cookie(fd) != d->st->cookie[qi]) {
        return refuse(error, EXDEV, AFXDP_STEP_SOCKET, q->number);
    }
    return rings_map(q, &d->cfg, error) < 0 || queue_watch(d, qi, error) < 0 ? -1 : 0;
}

static int attach_all(struct afxdp *d, void *mem, size_t size, const int *fds, uint32_t nfds, struct afxdp_error *error)
{
    if (view_memory(d, mem, size, error) < 0) {
        return -1;
    }
    if (nfds < 1 || nfds > AFXDP_MAX_QUEUES) {
        return refuse(error, EINVAL, AFXDP_STEP_CONFIG, -1);
    }
    d->cfg.queue_count = nfds < d->cfg.queue_count ? nfds : d->cfg.queue_count;
    d->nd.queues = (uint16_t)d->cfg.queue_count;
    interface_attach(d, fds[0]);
    d->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (d->epoll_fd < 0) {
        return fail(error, AFXDP_STEP_POLL, -1, 0);
    }
    for (uint32_t qi = 0; qi < d->nd.queues; qi++) {
        if (view_queue(d, qi, fds[qi], error) < 0) {
            return -1;
        }
    }
    for (uint32_t qi = d->nd.queues; qi < nfds; qi++) {
        if (afxdp_take_queue(d, fds[qi], nfds, error) < 0) {
            return -1;
        }
    }
    return 0;
}

struct afxdp *afxdp_attach(void *mem, size_t size, const int *fds, uint32_t nfds, uint32_t flags,
                           struct afxdp_error *error)
{
    struct afxdp_config cfg;
    struct afxdp *d;

    *error = (struct afxdp_error){.queue = -1};
    if (flags) {
        refuse(error, EINVAL, AFXDP_STEP_CONFIG, -1);
        return NULL;
    }
    if (read_config(mem, size, &cfg, error) < 0) {
        return NULL;
    }
    d = view_new(&cfg);
    if (!d) {
        refuse(error, ENOMEM, AFXDP_STEP_CONFIG, -1);
        return NULL;
    }
    if (attach_all(d, mem, size, fds, nfds, error) < 0) {
        for (uint32_t qi = 0; qi < AFXDP_MAX_QUEUES; qi++) {
            d->queue[qi].fd = -1; /* the caller's still */
        }
        afxdp_detach(d);
        return NULL;
    }
    return d;
}
