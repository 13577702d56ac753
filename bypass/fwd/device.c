/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device.c - the device of shared mode, of whatever kind (device.h), and the memory and doorbells of ports.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "program.h"

enum {
    PORT_CAPS = BYPASS_CAP_RX_CSUM | BYPASS_CAP_TX_CSUM, /* of the device, that a port has too */
};

/* ---- The device -------------------------------------------------------------------------------------------- */

static void release(struct program *w)
{
    struct device *d = w->device;

    if (d) {
        program_unwatch(w, d->wait_fd);
        forward_device(&w->forward, NULL);
        w->device = NULL;
        d->kind->close(d);
    }
}

static struct fwd_link link_of(const struct program *w, uint32_t state)
{
    const struct bypass_netdev *nd = w->device->netdev;
    struct fwd_link l = {.state = state, .mtu = nd->mtu};

    memcpy(l.mac, nd->mac, sizeof l.mac);
    return l;
}

static void describe(const struct device *d, struct fwd_device_info *a)
{
    a->caps = d->netdev->caps & PORT_CAPS;
    a->queues = d->netdev->queues;
    a->mtu = d->netdev->mtu;
    memcpy(a->mac, d->netdev->mac, sizeof a->mac);
    if (d->kind->describe) {
        d->kind->describe(d, a);
    }
}

static int open_by(struct request *q, int (*open)(struct request *q, struct device **out))
{
    struct program *w = q->w;
    int err;

    if (w->device) {
        return refuse(q, EBUSY, "an interface is open already");
    }
    err = open(q, &w->device);
    if (err) {
        return err;
    }
    if (!program_watch(w, w->device->wait_fd, EPOLLIN, EVENT_DEVICE, 0)) {
        err = refuse(q, errno, "the interface cannot be waited on");
        release(w);
        return err;
    }
    forward_device(&w->forward, w->device->netdev);
    forward_link(&w->forward, 0);
    w->told = link_of(w, 0);
    w->unwatched = false;
    w->health_ns = 0;
    describe(w->device, q->answer);
    q->answer_len = sizeof(struct fwd_device_info);
    return 0;
}

int device_open(struct request *q) { return open_by(q, device_afxdp_open); }
int device_open_dpdk(struct request *q) { return open_by(q, device_dpdk_open); }

int device_close(struct request *q)
{
    if (!q->w->device) {
        return refuse(q, ENODEV, "no interface is open");
    }
    forward_link(&q->w->forward, 2);
    release(q->w);
    return 0;
}

void device_health(struct program *w)
{
    struct device *d = w->device;
    struct fwd_link is;
    int err;

    if (!d || w->now_ns < w->health_ns) {
        return;
    }
    w->health_ns = w->now_ns + d->look_ns;
    err = d->kind->health(d);
    is = link_of(w, err == -ENXIO ? 2 : err == -ENETDOWN ? 1 : 0);
    if (is.state == 0) {
        if (d->kind->grow) {
            d->kind->grow(d, w);
        }
        forward_about(&w->forward);
    }
    if (is.state != w->forward.link) {
        forward_link(&w->forward, is.state);
    }
    if (is.state == 2 && !w->unwatched) {
        w->unwatched = true;
        program_unwatch(w, d->wait_fd); /* it may be readable for ever: nothing is read there any more */
    }
    if (memcmp(&is, &w->told, sizeof is) != 0) {
        w->told = is;
        control_tell(w, &is, sizeof is, FWD_LINK);
    }
}

/* ---- Ports ------------------------------------------------------------------------------------------------- */

static struct port_memory *memory_of(struct program *w, uint32_t app)
{
    for (uint32_t i = 0; i < FWD_PORTS_MAX; i++) {
        if (w->memory[i].app == app) {
            return &w->memory[i];
        }
    }
    return NULL;
}

static void memory_release(struct program *w, struct port_memory *p)
{
    program_unwatch(w, p->eventfd); /* the application has it too: closing alone would not end it */
    close(p->eventfd);
    close(p->socket);
    munmap(p->map, p->size);
    p->app = 0;
}

/* The file must not shrink under us: touching what is gone is a SIGBUS. */
static int memory_map(struct request *q, struct port_memory *p)
{
    const struct fwd_port_add *m = q->message;
    int seals = fcntl(q->fds[0], F_GET_SEALS);
    struct stat st;

    p->size = port_mem_size(&m->cfg);
    if (seals < 0 || !(seals & F_SEAL_SHRINK)) {
        return refuse(q, EPERM, "the memory of application %u is not sealed against shrinking", m->app);
    }
    if (!p->size || m->mem_off % 4096 || fstat(q->fds[0], &st) < 0 || m->mem_off > (uint64_t)st.st_size ||
        p->size > (uint64_t)st.st_size - m->mem_off) {
        return refuse(q, EINVAL, "application %u: the port's configuration makes no sense, or its memory is too small",
                      m->app);
    }
    p->map = mmap(NULL, p->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, q->fds[0], (off_t)m->mem_off);
    return p->map == MAP_FAILED ? refuse(q, errno, "the memory of application %u cannot be mapped", m->app) : 0;
}

int device_port_add(struct request *q)
{
    const struct fwd_port_add *m = q->message;
    struct program *w = q->w;
    struct port_memory *p = memory_of(w, 0);
    int err;

    if (!p || q->fds_n != 3 || !memchr(m->item, 0, FWD_NAME)) {
        return refuse(q, p ? EINVAL : ENOSPC, "a port comes with three descriptors and an item's name; at most %d",
                      FWD_PORTS_MAX);
    }
    *p = (struct port_memory){.eventfd = q->fds[1], .socket = q->fds[2]};
    err = memory_map(q, p);
    if (err) {
        return err;
    }
    if (!program_watch(w, p->eventfd, EPOLLIN | EPOLLET, EVENT_DOORBELL, 0)) {
        err = refuse(q, errno, "application %u: its doorbell is no eventfd of its own", m->app);
        munmap(p->map, p->size);
        return err;
    }
    err = forward_port_add(&w->forward, m, p->map, p->size, p->socket);
    if (err) {
        program_unwatch(w, p->eventfd);
        munmap(p->map, p->size);
        return refuse(q, -err, "application %u: no port: %s", m->app, strerror(-err));
    }
    memcpy(p->item, m->item, FWD_NAME);
    p->app = m->app;
    q->fds[1] = q->fds[2] = -1;
    return 0;
}

static void port_end(struct program *w, struct port_memory *p)
{
    forward_port_del(&w->forward, p->app);
    memory_release(w, p);
}

int device_port_del(struct request *q)
{
    const struct fwd_app *m = q->message;
    struct port_memory *p = m->app ? memory_of(q->w, m->app) : NULL;

    if (!p) {
        return refuse(q, ENOENT, "application %u has no port", m->app);
    }
    port_end(q->w, p);
    return 0;
}

void device_ports_of_item(struct program *w, const char *item)
{
    for (uint32_t i = 0; i < FWD_PORTS_MAX; i++) {
        if (w->memory[i].app && strncmp(w->memory[i].item, item, FWD_NAME) == 0) {
            port_end(w, &w->memory[i]);
        }
    }
}

void device_end(struct program *w)
{
    forward_link(&w->forward, 2);
    release(w);
    for (uint32_t i = 0; i < FWD_PORTS_MAX; i++) {
        if (w->memory[i].app) {
            port_end(w, &w->memory[i]);
        }
    }
}
