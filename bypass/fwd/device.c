/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device.c - the interface's AF_XDP sockets in shared mode, and the memory and doorbells of ports.
 *
 * The sockets never leave this process: a duplicate elsewhere would keep them, and the packets for them, alive after it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "program.h"

enum { HEALTH_NS = 1000000000, CLOSE_MS = 100 };

/* ---- Maps -------------------------------------------------------------------------------------------------- */

static int map_call(int cmd, int map, const void *key, const void *value)
{
    union bpf_attr attr;

    memset(&attr, 0, sizeof attr);
    attr.map_fd = (uint32_t)map;
    attr.key = (uintptr_t)key;
    attr.value = (uintptr_t)value;
    return syscall(SYS_bpf, cmd, &attr, sizeof attr) < 0 ? -errno : 0;
}

int map_update(int map, uint32_t key, uint32_t value) { return map_call(BPF_MAP_UPDATE_ELEM, map, &key, &value); }
int map_delete(int map, const void *key) { return map_call(BPF_MAP_DELETE_ELEM, map, key, NULL); }

/* ---- The interface ----------------------------------------------------------------------------------------- */

static void device_release(struct program *w)
{
    if (!w->device) {
        return;
    }
    if (w->device_fd >= 0) {
        program_unwatch(w, w->device_fd);
    }
    forward_device(&w->forward, NULL);
    for (uint32_t i = 0; afxdp_fd(w->device, (int)i) >= 0; i++) {
        uint32_t key = w->slot + i;

        map_delete(w->xsks_fd, &key); /* packets pass to the kernel before the sockets are gone */
    }
    afxdp_close(w->device, CLOSE_MS);
    afxdp_mem_unmap(w->device_mem, w->device_size, -1);
    close(w->xsks_fd);
    w->device = NULL;
    w->device_fd = w->xsks_fd = -1;
}

static int open_memory(struct program *w, const struct afxdp_config *cfg)
{
    int fd;

    w->device_size = afxdp_mem_size(cfg);
    if (!w->device_size) {
        errno = EINVAL;
        return -1;
    }
    w->device_mem = afxdp_mem_map(w->device_size, &fd);
    if (!w->device_mem) {
        return -1;
    }
    close(fd); /* nobody else maps it */
    return 0;
}

static int publish_sockets(struct program *w, struct request *q, const struct afxdp_config *cfg)
{
    for (uint32_t i = 0; i < cfg->queue_count; i++) {
        int err = map_update(w->xsks_fd, w->slot + cfg->queues[i], (uint32_t)afxdp_fd(w->device, (int)i));

        if (err) {
            return refuse(q, -err, "the socket of %s, queue %u, cannot be put into the map, at %u", cfg->ifname,
                          cfg->queues[i], w->slot + cfg->queues[i]);
        }
    }
    return 0;
}

static void device_describe(const struct program *w, struct fwd_device_info *a)
{
    const struct bypass_netdev *nd = afxdp_netdev(w->device);

    a->caps = nd->caps;
    a->queues = nd->queues;
    a->zerocopy = afxdp_zerocopy(w->device) == 1;
    a->mtu = nd->mtu;
    memcpy(a->mac, nd->mac, sizeof a->mac);
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

int device_open(struct request *q)
{
    const struct fwd_device *m = q->message;
    struct program *w = q->w;
    struct afxdp_config cfg = m->cfg;
    struct afxdp_error error;
    int err;

    if (w->device) {
        return refuse(q, EBUSY, "an interface is open already");
    }
    errno = EINVAL;
    if (!memchr(cfg.ifname, 0, sizeof cfg.ifname) || open_memory(w, &cfg) < 0) {
        return refuse(q, errno, "this configuration of %.16s makes no sense, or there is no memory", cfg.ifname);
    }
    w->device = afxdp_open(&cfg, w->device_mem, w->device_size, &error);
    if (!w->device) {
        afxdp_mem_unmap(w->device_mem, w->device_size, -1);
        return refuse(q, error.err, "%s, queue %d, step %d: %s", cfg.ifname, error.queue, error.step,
                      strerror(error.err));
    }
    w->xsks_fd = q->fds[0];
    q->fds[0] = -1;
    w->slot = m->slot;
    w->all_queues = all_queues(&cfg);
    w->device_fd = afxdp_netdev(w->device)->ops->wait_fd(afxdp_netdev(w->device));
    err = publish_sockets(w, q, &cfg);
    if (!err && !program_watch(w, w->device_fd, EPOLLIN, EVENT_DEVICE, 0)) {
        err = refuse(q, errno, "%s cannot be waited on", cfg.ifname);
    }
    if (err) {
        device_release(w);
        return err;
    }
    forward_device(&w->forward, afxdp_netdev(w->device));
    forward_link(&w->forward, 0);
    w->link_told = 0;
    w->health_ns = 0;
    device_describe(w, q->answer);
    q->answer_len = sizeof(struct fwd_device_info);
    return 0;
}

int device_close(struct request *q)
{
    if (!q->w->device) {
        return refuse(q, ENODEV, "no interface is open");
    }
    forward_link(&q->w->forward, 2);
    device_release(q->w);
    return 0;
}

/* Queues that the interface got since (ethtool -L): each needs a socket, or its packets would be dropped. */
static void add_queues(struct program *w)
{
    int now = w->all_queues ? afxdp_queues_now(w->device) : 0, have = afxdp_netdev(w->device)->queues;
    struct fwd_queues told = {0};

    for (; have < now; have++) {
        struct afxdp_error error;
        int qi = afxdp_add_queue(w->device, (uint16_t)have, (uint32_t)now, &error);

        if (qi < 0 || map_update(w->xsks_fd, w->slot + (uint32_t)have, (uint32_t)afxdp_fd(w->device, qi)) < 0) {
            if (w->queues_refused != now) { /* it is tried again every second, and said once */
                fprintf(stderr, "bypass-fwd: queue %d that appeared cannot be served: %s\n", have, strerror(error.err));
                w->queues_refused = now;
            }
            return;
        }
        told.queues = (uint32_t)have + 1;
    }
    if (told.queues) {
        control_tell(w, &told, sizeof told, FWD_QUEUES);
    }
}

void device_health(struct program *w)
{
    struct fwd_link told = {0};
    int err;

    if (!w->device || w->now_ns < w->health_ns) {
        return;
    }
    w->health_ns = w->now_ns + HEALTH_NS;
    err = afxdp_health(w->device);
    told.state = err == -ENXIO ? 2 : err == -ENETDOWN ? 1 : 0;
    if (told.state == 0) {
        add_queues(w);
        memcpy(w->forward.check.mac, afxdp_netdev(w->device)->mac, 6);
        w->forward.check.mtu = afxdp_netdev(w->device)->mtu;
    }
    if (told.state != w->forward.link) {
        forward_link(&w->forward, told.state);
    }
    if (told.state != w->link_told) {
        w->link_told = told.state;
        control_tell(w, &told, sizeof told, FWD_LINK);
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
    device_release(w);
    for (uint32_t i = 0; i < FWD_PORTS_MAX; i++) {
        if (w->memory[i].app) {
            port_end(w, &w->memory[i]);
        }
    }
}
