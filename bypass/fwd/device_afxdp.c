/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device_afxdp.c - an interface's AF_XDP sockets. The steering program hands them packets by an XSKMAP of the broker's.
 *
 * The sockets never leave this process: a duplicate elsewhere would keep them, and the packets for them, alive after it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "afxdp/afxdp.h"
#include "maps.h"
#include "program.h"

enum { CLOSE_MS = 100, LOOK_NS = 1000000000 };

struct afxdp_device {
    struct device device;
    struct afxdp *afxdp;
    void *mem;
    size_t size;
    int xsks_fd;
    uint32_t slot;      /* of the first queue in the map */
    bool all_queues;    /* of the interface are served, those that come later included */
    int queues_refused; /* how many there are, of which one cannot be served */
};

static struct afxdp_device *afxdp_of(const struct device *d)
{
    return (struct afxdp_device *)(uintptr_t)d; /* the first member */
}

static void afxdp_describe(const struct device *d, struct fwd_device_info *a)
{
    a->zerocopy = afxdp_zerocopy(afxdp_of(d)->afxdp) == 1;
}

static int afxdp_look(struct device *d) { return afxdp_health(afxdp_of(d)->afxdp); }

/* Queues that the interface got since (ethtool -L): each needs a socket, or its packets would be dropped. */
static void afxdp_grow(struct device *d, struct program *w)
{
    struct afxdp_device *x = afxdp_of(d);
    int now = x->all_queues ? afxdp_queues_now(x->afxdp) : 0, have = d->netdev->queues;
    struct fwd_queues told = {0};

    for (; have < now; have++) {
        struct afxdp_error error;
        int qi = afxdp_add_queue(x->afxdp, (uint16_t)have, (uint32_t)now, &error);

        if (qi < 0 || map_update(x->xsks_fd, x->slot + (uint32_t)have, (uint32_t)afxdp_fd(x->afxdp, qi)) < 0) {
            if (x->queues_refused != now) { /* it is tried again every second, and said once */
                fprintf(stderr, "bypass-fwd: queue %d that appeared cannot be served: %s\n", have, strerror(error.err));
                x->queues_refused = now;
            }
            return;
        }
        told.queues = (uint32_t)have + 1;
    }
    if (told.queues) {
        control_tell(w, &told, sizeof told, FWD_QUEUES);
    }
}

static void afxdp_end(struct device *d)
{
    struct afxdp_device *x = afxdp_of(d);

    if (x->afxdp) {
        for (uint32_t i = 0; afxdp_fd(x->afxdp, (int)i) >= 0; i++) {
            uint32_t key = x->slot + i;

            map_delete(x->xsks_fd, &key); /* packets pass to the kernel before the sockets are gone */
        }
        afxdp_close(x->afxdp, CLOSE_MS);
    }
    if (x->mem) {
        afxdp_mem_unmap(x->mem, x->size, -1);
    }
    if (x->xsks_fd >= 0) {
        close(x->xsks_fd);
    }
    free(x);
}

static const struct device_kind kind = {
    .describe = afxdp_describe, .health = afxdp_look, .grow = afxdp_grow, .close = afxdp_end};

/* ---- Opening ----------------------------------------------------------------------------------------------- */

static int open_memory(struct afxdp_device *x, const struct afxdp_config *cfg)
{
    int fd;

    x->size = afxdp_mem_size(cfg);
    if (!x->size) {
        errno = EINVAL;
        return -1;
    }
    x->mem = afxdp_mem_map(x->size, &fd);
    if (!x->mem) {
        return -1;
    }
    close(fd); /* nobody else maps it */
    return 0;
}

static int publish_sockets(struct afxdp_device *x, struct request *q, const struct afxdp_config *cfg)
{
    for (uint32_t i = 0; i < cfg->queue_count; i++) {
        int err = map_update(x->xsks_fd, x->slot + cfg->queues[i], (uint32_t)afxdp_fd(x->afxdp, (int)i));

        if (err) {
            return refuse(q, -err, "the socket of %s, queue %u, cannot be put into the map, at %u", cfg->ifname,
                          cfg->queues[i], x->slot + cfg->queues[i]);
        }
    }
    return 0;
}

/* Was every queue of the interface asked for? Then those that it gets later are too. */
static bool all_queues(const struct afxdp_config *cfg)
{
    for (uint32_t i = 0; i < cfg->queue_count; i++) {
        if (cfg->queues[i] != i) {
            return false;
        }
    }
    return afxdp_interface_queues(cfg->ifname) == (int)cfg->queue_count;
}

static int begin(struct afxdp_device *x, struct request *q, const struct afxdp_config *cfg)
{
    struct afxdp_error error;

    errno = EINVAL;
    if (!memchr(cfg->ifname, 0, sizeof cfg->ifname) || open_memory(x, cfg) < 0) {
        return refuse(q, errno, "this configuration of %.16s makes no sense, or there is no memory", cfg->ifname);
    }
    x->afxdp = afxdp_open(cfg, x->mem, x->size, &error);
    if (!x->afxdp) {
        return refuse(q, error.err, "%s, queue %d, step %d: %s", cfg->ifname, error.queue, error.step,
                      strerror(error.err));
    }
    x->xsks_fd = q->fds[0];
    q->fds[0] = -1;
    x->all_queues = all_queues(cfg);
    x->device.netdev = afxdp_netdev(x->afxdp);
    x->device.wait_fd = x->device.netdev->ops->wait_fd(x->device.netdev);
    return publish_sockets(x, q, cfg);
}

int device_afxdp_open(struct request *q, struct device **out)
{
    const struct fwd_device *m = q->message;
    struct afxdp_config cfg = m->cfg; /* it may be changed on the way */
    struct afxdp_device *x = calloc(1, sizeof *x);
    int err;

    if (!x) {
        return refuse(q, ENOMEM, "no memory for a device");
    }
    x->device.kind = &kind;
    x->device.look_ns = LOOK_NS;
    x->device.wait_fd = x->xsks_fd = -1;
    x->slot = m->slot;
    err = begin(x, q, &cfg);
    if (err) {
        afxdp_end(&x->device);
        return err;
    }
    *out = &x->device;
    return 0;
}
