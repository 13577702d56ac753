/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device_dpdk.c - a port that a driver of DPDK has, with the exception path beside it:
 *
 *   port --mbufs--> filter: the classifier judges each frame --steered--> forwarder --> applications
 *     ^                `---passed---> TAP: the kernel
 *     `--- what applications send, when it was checked; and what the kernel sends
 *
 * DPDK is a plug-in. It is loaded when a port is opened, with the privileges that are left then; before that, and with
 * AF_XDP, nothing of it is in this process. It cannot be unloaded, and starts once: another port, the same arguments.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dpdk_backend/exception.h"
#include "dpdk_backend/filter.h"
#include "dpdk_backend/load.h"
#include "program.h"
#include "steer_mem.h"

enum { CLOSE_MS = 100, WORDS_MAX = 64, LOOK_MS = 100 };

struct dpdk_device {
    struct device device; /* its netdev is the filter's */
    const struct dpdk_plugin *plugin;
    struct dpdk_port *port;
    struct steer_mem steer;
    struct exception_path kernel;
    bool carrier; /* of the TAP: the port's link, as the kernel knows it */
};

static struct dpdk_device *dpdk_of(const struct device *d)
{
    return (struct dpdk_device *)(uintptr_t)d; /* the first member */
}

static void dpdk_describe(const struct device *d, struct fwd_device_info *a)
{
    struct dpdk_about about;

    dpdk_of(d)->plugin->about(dpdk_of(d)->port, &about);
    snprintf(a->driver, sizeof a->driver, "%s", about.driver);
}

static void dpdk_turn(struct device *d, uint64_t now_ns) { filter_now(d->netdev, now_ns); }

/* With a port that was removed the kernel's device of it goes, as an interface goes with its NIC: the kernel, and whoever
 * asks it, has no address and no way there any more, and another port may get the name. */
static int dpdk_health(struct device *d)
{
    struct dpdk_device *x = dpdk_of(d);
    int err = x->plugin->health(x->port);

    filter_refresh(d->netdev);
    if (err == -ENXIO) {
        exception_close(&x->kernel);
    } else if (x->carrier != (err == 0) && exception_carrier(&x->kernel, err == 0) == 0) {
        x->carrier = err == 0;
    }
    return err;
}

static void dpdk_end(struct device *d)
{
    struct dpdk_device *x = dpdk_of(d);

    if (d->netdev) {
        filter_destroy(d->netdev);
    }
    if (x->port) {
        x->plugin->close(x->port, CLOSE_MS);
    }
    exception_close(&x->kernel);
    steer_mem_close(&x->steer);
    free(x);
}

static const struct device_kind kind = {
    .describe = dpdk_describe, .turn = dpdk_turn, .health = dpdk_health, .close = dpdk_end};

/* ---- Opening ----------------------------------------------------------------------------------------------- */

/* The words of the message, each with its 0 behind. Their number; -1: that is not what they are. */
static int words_of(const struct fwd_dpdk *m, size_t len, const char **words)
{
    size_t at = 0, bytes = len - offsetof(struct fwd_dpdk, args);

    if (bytes > sizeof m->args || m->argc < 1 || m->argc > WORDS_MAX) {
        return -1;
    }
    for (uint32_t i = 0; i < m->argc; i++) {
        const char *end = at < bytes ? memchr(m->args + at, 0, bytes - at) : NULL;

        if (!end) {
            return -1;
        }
        words[i] = m->args + at;
        at = (size_t)(end - m->args) + 1;
    }
    return at == bytes ? (int)m->argc : -1;
}

static int start(struct dpdk_device *x, struct request *q)
{
    const struct fwd_dpdk *m = q->message;
    const char *words[WORDS_MAX];
    int argc = words_of(m, q->len, words);
    struct dpdk_error error = {0};

    if (argc < 0 || !memchr(m->cfg.device, 0, sizeof m->cfg.device)) {
        return refuse(q, EINVAL, "a port comes with a device and with arguments for DPDK, of at most %d bytes",
                      FWD_ARGS);
    }
    x->plugin = dpdk_load(NULL, &error);
    if (!x->plugin || x->plugin->start(argc, words, NULL, &error) < 0) {
        return refuse(q, error.err, "%s", error.text);
    }
    x->port = x->plugin->open(&m->cfg, &error);
    return x->port ? 0 : refuse(q, error.err, "%s", error.text);
}

static int begin(struct dpdk_device *x, struct request *q)
{
    const struct fwd_dpdk *m = q->message;
    struct filter_config cfg = {
        .classifier = &x->steer.view, .classify = classify_burst, .exception = &x->kernel, .vlan = m->vlan};
    int err = steer_mem_open(&x->steer, q->fds[0]);

    if (err) {
        return refuse(q, -err, "the classifier's memory cannot be used: %s", strerror(-err));
    }
    err = start(x, q);
    if (err) {
        return err;
    }
    exception_adopt(&x->kernel, q->fds[1], m->exception_rate, 0);
    q->fds[1] = -1;
    x->carrier = true;
    x->device.look_ns = (m->cfg.link_poll_ms ? m->cfg.link_poll_ms : LOOK_MS) * 1000000ull;
    x->device.netdev = filter_create(x->plugin->netdev(x->port), &cfg);
    if (!x->device.netdev) {
        return refuse(q, errno, "%.64s: no memory or descriptors for the exception path", m->cfg.device);
    }
    x->device.wait_fd = x->device.netdev->ops->wait_fd(x->device.netdev);
    return 0;
}

int device_dpdk_open(struct request *q, struct device **out)
{
    struct dpdk_device *x = calloc(1, sizeof *x);
    int err;

    if (!x) {
        return refuse(q, ENOMEM, "no memory for a device");
    }
    x->device.kind = &kind;
    x->device.wait_fd = x->kernel.fd = -1;
    err = begin(x, q);
    if (err) {
        dpdk_end(&x->device);
        return err;
    }
    *out = &x->device;
    return 0;
}

int device_dpdk_stats(struct request *q)
{
    const struct fwd_app *m = q->message;
    const struct device *d = q->w->device;
    struct fwd_dpdk_stats *a = q->answer;
    struct fwd_head head = a->head;

    if (!d || d->kind != &kind) {
        return refuse(q, ENODEV, "no port of DPDK is open");
    }
    memset(a, 0, sizeof *a);
    a->head = head;
    if (dpdk_of(d)->plugin->counters(dpdk_of(d)->port, m->app, &a->queue) < 0) {
        return refuse(q, EINVAL, "the port has no queue %u", m->app);
    }
    dpdk_of(d)->plugin->stats(dpdk_of(d)->port, &a->port);
    filter_counters(d->netdev, &a->filter);
    a->kernel = dpdk_of(d)->kernel.n;
    dpdk_of(d)->plugin->about(dpdk_of(d)->port, &a->about);
    q->answer_len = sizeof *a;
    return 0;
}

int device_dpdk_audit(struct request *q)
{
    const struct device *d = q->w->device;
    struct fwd_dpdk_audit *a = q->answer;

    if (!d || d->kind != &kind) {
        return refuse(q, ENODEV, "no port of DPDK is open");
    }
    dpdk_of(d)->plugin->audit(dpdk_of(d)->port, &a->frames);
    q->answer_len = sizeof *a;
    return 0;
}

int device_dpdk_xstats(struct request *q)
{
    const struct fwd_dpdk_xstats *m = q->message;
    const struct device *d = q->w->device;
    struct fwd_dpdk_xstats *a = q->answer;
    struct dpdk_xstat *all;
    int n;

    if (!d || d->kind != &kind) {
        return refuse(q, ENODEV, "no port of DPDK is open");
    }
    a->from = m->from;
    a->count = 0;
    n = dpdk_of(d)->plugin->xstats(dpdk_of(d)->port, NULL, 0); /* none: it has none, or is gone */
    all = n > 0 ? calloc((size_t)n, sizeof *all) : NULL;
    if (n > 0 && !all) {
        return refuse(q, ENOMEM, "no memory for %d counters", n);
    }
    if (all) {
        int got = dpdk_of(d)->plugin->xstats(dpdk_of(d)->port, all, (uint32_t)n);

        for (int64_t i = a->from; i < got && i < n && a->count < FWD_LIST_MAX; i++) {
            a->xstat[a->count++] = all[i];
        }
    }
    free(all);
    q->answer_len = offsetof(struct fwd_dpdk_xstats, xstat) + a->count * sizeof *a->xstat;
    return 0;
}

/* ---- Rules of the port's hardware -------------------------------------------------------------------------- */

/* The rules of a file; NULL: it does not hold so many, or there is no memory. Not mapped: it may be of any kind. */
static struct dpdk_flow *read_flows(int fd, uint32_t count)
{
    size_t size = count * sizeof(struct dpdk_flow), at = 0;
    struct dpdk_flow *flow = malloc(size + 1);

    while (flow && at <= size) { /* one byte more: there is none */
        ssize_t n = pread(fd, (char *)flow + at, size + 1 - at, (off_t)at);

        if (n == 0 && at == size) {
            return flow;
        }
        if (n <= 0) {
            break;
        }
        at += (size_t)n;
    }
    free(flow);
    return NULL;
}

int device_dpdk_flows(struct request *q)
{
    const struct fwd_flows *m = q->message;
    const struct device *d = q->w->device;
    struct fwd_flows_done *a = q->answer;
    struct dpdk_error error = {0};
    struct dpdk_flow *flow = m->count <= DPDK_FLOWS ? read_flows(q->fds[0], m->count) : NULL;

    if (!flow) {
        return refuse(q, EINVAL, "rules come in a file that holds just them, at most %d", DPDK_FLOWS);
    }
    if (!d || d->kind != &kind) {
        free(flow);
        return refuse(q, ENODEV, "no port of DPDK is open");
    }
    *a = (struct fwd_flows_done){.head = a->head};
    if (dpdk_of(d)->plugin->flows(dpdk_of(d)->port, flow, m->count, m->rest, &a->at, &error) < 0) {
        a->err = (uint32_t)error.err;
        snprintf(a->text, sizeof a->text, "%.*s", FWD_TEXT - 1, error.text);
    }
    free(flow);
    q->answer_len = sizeof *a;
    return 0;
}
