/* SPDX-License-Identifier: Apache-2.0 */
/*
 * filter.c - the device that stands between a port and a stack, and shares the port with the kernel: filter.h.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "dpdk_backend/filter.h"

enum {
    BATCH = CLASSIFY_BURST,
    ETH_LEN = 14,
    MACS = 12,        /* bytes in front of the tag */
    TAG_LEN = 4,      /* IEEE 802.1Q: 0x8100, then priority (3 bits), drop eligible (1), VLAN (12) */
    PATIENCE = 1000,  /* calls for which a frame of the kernel's waits for a full ring */
    KEPT_FREE = 16,   /* the kernel's frames leave so much of the pool: one part in so many */
    FRAME_SLACK = 18, /* Ethernet header and one tag, beyond the MTU */
};

struct filter {
    struct bypass_netdev dev; /* first: netdev_ops cast it */
    struct bypass_netdev *lower;
    struct classifier *classifier;
    filter_classify_fn classify;
    struct exception_path *exception;
    uint16_t vlan;
    int epoll, again; /* again: an eventfd, readable while there may be more below than was looked at */
    bool again_set;
    bool tap_out;                   /* woken when the kernel takes frames again */
    bool tap_gone;                  /* the device was deleted */
    bool short_of_ring;             /* the stack's last frames did not fit */
    bypass_pkt queue[FILTER_QUEUE]; /* for the kernel: head..tail */
    uint32_t head, tail;
    bypass_pkt unsent; /* a frame of the kernel's that the ring had no room for */
    uint32_t patience;
    uint64_t now_ns;
    struct filter_counters n;
};

static struct filter *filter_of(struct bypass_netdev *dev) { return (struct filter *)dev; }

/* The device below keeps the count of free frames; the stack reads it here. */
static int mirrored(struct filter *f, int result)
{
    f->dev.free_frames = f->lower->free_frames;
    return result;
}

static struct bypass_pkt_meta *meta_of(const struct filter *f, bypass_pkt pkt)
{
    return (struct bypass_pkt_meta *)((uint8_t *)f->lower->meta + (size_t)pkt * f->lower->meta_stride);
}

static uint8_t *data_of(const struct filter *f, bypass_pkt pkt)
{
    return f->lower->mem + (size_t)pkt * f->lower->stride + meta_of(f, pkt)->off;
}

static void give_back(struct filter *f, bypass_pkt pkt) { f->lower->ops->free(f->lower, &pkt, 1); }

/* ---- The port's VLAN ------------------------------------------------------------------------------------- */

/* Whether the frame has the port's own tag as the outermost. */
static bool has_tag(const struct filter *f, const uint8_t *at, uint32_t len)
{
    return len >= ETH_LEN + TAG_LEN && at[MACS] == 0x81 && at[MACS + 1] == 0x00 &&
           ((at[MACS + 2] & 0x0f) << 8 | at[MACS + 3]) == f->vlan;
}

/* Takes the tag off; its second half, priority and all. */
static uint16_t untag(struct filter *f, bypass_pkt pkt)
{
    struct bypass_pkt_meta *m = meta_of(f, pkt);
    uint8_t *at = data_of(f, pkt);
    uint16_t tci = (uint16_t)(at[MACS + 2] << 8 | at[MACS + 3]);

    memmove(at + TAG_LEN, at, MACS);
    m->off = (uint16_t)(m->off + TAG_LEN);
    m->len = (uint16_t)(m->len - TAG_LEN);
    return tci;
}

static bool tag(struct filter *f, bypass_pkt pkt, uint16_t tci)
{
    struct bypass_pkt_meta *m = meta_of(f, pkt);
    uint8_t *at = data_of(f, pkt);

    if (m->len < MACS || m->off < TAG_LEN) {
        return false;
    }
    memmove(at - TAG_LEN, at, MACS);
    at[MACS - TAG_LEN] = 0x81;
    at[MACS - TAG_LEN + 1] = 0x00;
    at[MACS - TAG_LEN + 2] = (uint8_t)(tci >> 8);
    at[MACS - TAG_LEN + 3] = (uint8_t)tci;
    m->off = (uint16_t)(m->off - TAG_LEN);
    m->len = (uint16_t)(m->len + TAG_LEN);
    return true;
}

/* ---- To the kernel --------------------------------------------------------------------------------------- */

/* What of the TAP device wakes the sleeper. */
static void watch_tap(struct filter *f, bool out)
{
    struct epoll_event e = {.events = EPOLLIN | (out ? (uint32_t)EPOLLOUT : 0), .data.fd = 0};

    if (f->tap_out != out && !f->tap_gone) {
        f->tap_out = out;
        (void)epoll_ctl(f->epoll, EPOLL_CTL_MOD, f->exception->fd, &e); /* it is in the set: cannot fail */
    }
}

/* A frame that the caller holds goes to the kernel, or is dropped and counted. */
static void pass(struct filter *f, bypass_pkt pkt)
{
    f->n.passed++;
    if (!exception_admit(f->exception)) {
        give_back(f, pkt);
    } else if (f->tail - f->head == FILTER_QUEUE) {
        f->exception->n.full++;
        give_back(f, pkt);
    } else {
        f->queue[f->tail++ & (FILTER_QUEUE - 1)] = pkt;
    }
}

static void to_kernel(struct filter *f)
{
    while (f->head != f->tail) {
        bypass_pkt pkt = f->queue[f->head & (FILTER_QUEUE - 1)];

        if (exception_write(f->exception, data_of(f, pkt), meta_of(f, pkt)->len) == EXCEPTION_LATER) {
            break;
        }
        f->head++;
        give_back(f, pkt);
    }
    watch_tap(f, f->head != f->tail);
    if (f->exception->gone && !f->tap_gone) { /* its descriptor would wake us for ever */
        f->tap_gone = true;
        (void)epoll_ctl(f->epoll, EPOLL_CTL_DEL, f->exception->fd, NULL);
    }
}

/* ---- From the kernel ------------------------------------------------------------------------------------- */

/* Hands one frame to the device below, which the filter then holds no more. false: no room. */
static bool send_out(struct filter *f, bypass_pkt pkt)
{
    int sent = f->lower->ops->tx_burst(f->lower, &pkt, 1);

    if (sent == 0 || sent == -EAGAIN) {
        return false;
    }
    give_back(f, pkt); /* the device has its own hold; what it refused is nobody's */
    if (sent > 0) {
        f->n.from_kernel++;
    } else {
        f->n.from_kernel_full++;
    }
    return true;
}

/* The frame that found the ring full. true: the way is free. */
static bool send_unsent(struct filter *f)
{
    if (f->unsent == BYPASS_PKT_NONE) {
        return true;
    }
    if (send_out(f, f->unsent)) {
        f->unsent = BYPASS_PKT_NONE;
        return true;
    }
    if (f->patience-- == 0) {
        f->n.from_kernel_full++;
        give_back(f, f->unsent);
        f->unsent = BYPASS_PKT_NONE;
        return true;
    }
    return false;
}

/* Reads one frame of the kernel's and sends it. false: there is no more for now. */
static bool take_one(struct filter *f)
{
    struct bypass_netdev *d = f->lower;
    struct bypass_pkt_meta *m;
    bypass_pkt pkt;
    int more;

    if (d->free_frames <= d->frames / KEPT_FREE || d->ops->alloc(d, &pkt, 1) != 1) {
        /* What waited would wake us for ever: it is read to be dropped. Reception has the last frames. */
        more = exception_skip(f->exception);
        f->n.from_kernel_no_frame += (uint64_t)more;
        return more;
    }
    m = meta_of(f, pkt);
    m->len = (uint16_t)exception_read(f->exception, data_of(f, pkt), (size_t)d->mtu + FRAME_SLACK);
    m->queue = 0;
    m->flags = 0;
    if (m->len == 0) {
        give_back(f, pkt);
        return false;
    }
    if (!send_out(f, pkt)) {
        f->unsent = pkt;
        f->patience = PATIENCE;
        return false;
    }
    return true;
}

static bool from_kernel(struct filter *f)
{
    uint64_t before = f->n.from_kernel;

    if (send_unsent(f) && !f->tap_gone) {
        /* The stack's frames have priority where there is no room for both. */
        for (int n = f->short_of_ring ? 1 : EXCEPTION_READS; n > 0 && take_one(f); n--) {}
    }
    return f->n.from_kernel != before;
}

/* ---- Reception ------------------------------------------------------------------------------------------- */

static void steered(struct filter *f, bypass_pkt pkt, const struct classify_result *r)
{
    struct bypass_pkt_meta *m = meta_of(f, pkt);

    m->entry = r->entry;
    m->rule = r->rule;
    m->hash = r->hash;
    m->flags |= BYPASS_RX_VERDICT;
    f->n.steered++;
}

/* Whether the frame is handed up; else it is taken care of. tci: of the tag that was taken off, -1: none was. */
static bool decide(struct filter *f, bypass_pkt pkt, const struct classify_result *r, int tci)
{
    if (r->verdict == CLASSIFY_STEER) {
        steered(f, pkt, r);
        return true;
    }
    if (r->verdict == CLASSIFY_DROP) {
        f->n.dropped++;
        give_back(f, pkt);
        return false;
    }
    meta_of(f, pkt)->flags &= (uint8_t)~BYPASS_RX_VERDICT;
    if (!f->exception) {
        f->n.passed++;
        return true;
    }
    if (tci >= 0 && !tag(f, pkt, (uint16_t)tci)) {
        give_back(f, pkt); /* cannot be: the room is where the tag was */
        return false;
    }
    pass(f, pkt);
    return false;
}

/* What has not the port's tag is not the stack's, and nobody judges it. */
static void foreign(struct filter *f, bypass_pkt pkt)
{
    f->n.other_vlan++;
    if (f->exception) {
        pass(f, pkt);
    } else {
        f->n.passed++;
        give_back(f, pkt);
    }
}

/* Judges up to BATCH frames; writes those to hand up, in their order, and returns their number. */
static int judge(struct filter *f, const bypass_pkt *in, int n, bypass_pkt *out)
{
    struct classify_frame frames[BATCH];
    struct classify_result results[BATCH];
    bypass_pkt kept[BATCH];
    int tci[BATCH];
    uint32_t judged = 0;
    int up = 0;

    for (int i = 0; i < n; i++) {
        if (f->vlan && !has_tag(f, data_of(f, in[i]), meta_of(f, in[i])->len)) {
            foreign(f, in[i]);
            continue;
        }
        tci[judged] = f->vlan ? untag(f, in[i]) : -1;
        kept[judged] = in[i];
        frames[judged++] = (struct classify_frame){data_of(f, in[i]), meta_of(f, in[i])->len, meta_of(f, in[i])->queue};
    }
    if (judged > 0) {
        f->classify(f->classifier, frames, judged, results);
    }
    for (uint32_t i = 0; i < judged; i++) {
        if (decide(f, kept[i], &results[i], tci[i])) {
            out[up++] = kept[i];
        }
    }
    return up;
}

/* A device may wake the sleeper only for what comes after it was found empty. Where it was left before that, we do. */
static void set_again(struct filter *f, bool again)
{
    uint64_t one = 1;

    if (again != f->again_set) {
        f->again_set = again;
        ssize_t done = again ? write(f->again, &one, sizeof one) : read(f->again, &one, sizeof one);
        (void)done; /* a counter that is 0 or 1 takes and gives it */
    }
}

static int receive(struct filter *f, bypass_pkt *out, int max, bool *left)
{
    bypass_pkt in[BATCH];
    int n = 0, looked = 0, got = 0;

    *left = true;
    while (n < max && looked < max + FILTER_LOOKS) {
        got = f->lower->ops->rx_burst(f->lower, in, max - n < BATCH ? max - n : BATCH);
        if (got <= 0) {
            *left = false;
            return n > 0 || got == 0 ? n : got;
        }
        n += judge(f, in, got, out + n);
        looked += got;
    }
    f->n.again += n < max;
    return n;
}

static int filter_rx_burst(struct bypass_netdev *dev, bypass_pkt *out, int max)
{
    struct filter *f = filter_of(dev);
    bool left;
    int n;

    if (f->exception) {
        exception_round(f->exception, f->now_ns);
    }
    n = receive(f, out, max, &left);
    if (f->exception) {
        to_kernel(f);
        if (from_kernel(f) && f->lower->ops->kick(f->lower) == -EAGAIN) {
            left = true; /* it was stopped in the middle: the next call goes on */
        }
        left = left || f->unsent != BYPASS_PKT_NONE;
    }
    set_again(f, left);
    return mirrored(f, n);
}

/* ---- The rest of a device -------------------------------------------------------------------------------- */

static int filter_alloc(struct bypass_netdev *dev, bypass_pkt *out, int n)
{
    struct filter *f = filter_of(dev);

    return mirrored(f, f->lower->ops->alloc(f->lower, out, n));
}

static void filter_free(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct filter *f = filter_of(dev);

    f->lower->ops->free(f->lower, pkts, n);
    mirrored(f, 0);
}

/* Tags what has no tag yet: a frame that found no room, or is sent again as it is, comes with it. */
static void tag_all(struct filter *f, const bypass_pkt *pkts, int n)
{
    for (int i = 0; i < n; i++) {
        struct bypass_pkt_meta *m = meta_of(f, pkts[i]);

        /* What is too short for a frame the device refuses. */
        if (!has_tag(f, data_of(f, pkts[i]), m->len) && tag(f, pkts[i], f->vlan) && m->flags & BYPASS_TX_CSUM) {
            m->csum_start = (uint16_t)(m->csum_start + TAG_LEN);
        }
    }
}

static int filter_tx_burst(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct filter *f = filter_of(dev);
    int sent;

    if (f->vlan) {
        tag_all(f, pkts, n);
    }
    sent = f->lower->ops->tx_burst(f->lower, pkts, n);
    f->short_of_ring = sent >= 0 && sent < n;
    return mirrored(f, sent);
}

static int filter_reap(struct bypass_netdev *dev, bypass_pkt *done, int max)
{
    struct filter *f = filter_of(dev);

    return mirrored(f, f->lower->ops->reap(f->lower, done, max));
}

static int filter_kick(struct bypass_netdev *dev)
{
    struct filter *f = filter_of(dev);

    return mirrored(f, f->lower->ops->kick(f->lower));
}

static int filter_wait_fd(struct bypass_netdev *dev) { return filter_of(dev)->epoll; }

static int filter_sleep(struct bypass_netdev *dev)
{
    struct filter *f = filter_of(dev);

    return f->lower->ops->sleep ? mirrored(f, f->lower->ops->sleep(f->lower)) : 0;
}

static const struct bypass_netdev_ops filter_ops = {
    .alloc = filter_alloc,
    .free = filter_free,
    .rx_burst = filter_rx_burst,
    .tx_burst = filter_tx_burst,
    .reap = filter_reap,
    .kick = filter_kick,
    .wait_fd = filter_wait_fd,
    .sleep = filter_sleep,
};

/* ---- Creation -------------------------------------------------------------------------------------------- */

static bool watch(struct filter *f, int fd)
{
    struct epoll_event e = {.events = EPOLLIN};

    return fd < 0 || epoll_ctl(f->epoll, EPOLL_CTL_ADD, fd, &e) == 0;
}

struct bypass_netdev *filter_create(struct bypass_netdev *lower, const struct filter_config *cfg)
{
    struct filter *f = calloc(1, sizeof *f);

    if (!f) {
        return NULL;
    }
    f->dev = *lower;
    f->dev.ops = &filter_ops;
    f->lower = lower;
    f->classifier = cfg->classifier;
    f->classify = cfg->classify;
    f->exception = cfg->exception;
    f->vlan = cfg->vlan;
    f->unsent = BYPASS_PKT_NONE;
    f->epoll = epoll_create1(EPOLL_CLOEXEC);
    f->again = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (f->epoll < 0 || f->again < 0 || !watch(f, f->again) || !watch(f, lower->ops->wait_fd(lower)) ||
        (f->exception && !watch(f, f->exception->fd))) {
        int err = errno;

        filter_destroy(&f->dev);
        errno = err;
        return NULL;
    }
    return &f->dev;
}

void filter_now(struct bypass_netdev *filter, uint64_t now_ns) { filter_of(filter)->now_ns = now_ns; }

void filter_counters(const struct bypass_netdev *filter, struct filter_counters *out)
{
    const struct filter *f = (const struct filter *)filter;

    *out = f->n;
    out->waiting = f->tail - f->head;
}

void filter_refresh(struct bypass_netdev *filter)
{
    struct filter *f = filter_of(filter);

    f->dev.mtu = f->lower->mtu;
    memcpy(f->dev.mac, f->lower->mac, sizeof f->dev.mac);
}

void filter_destroy(struct bypass_netdev *filter)
{
    struct filter *f = filter_of(filter);

    for (; f->head != f->tail; f->head++) {
        give_back(f, f->queue[f->head & (FILTER_QUEUE - 1)]);
    }
    if (f->unsent != BYPASS_PKT_NONE) {
        give_back(f, f->unsent);
    }
    if (f->again >= 0) {
        close(f->again);
    }
    if (f->epoll >= 0) {
        close(f->epoll);
    }
    free(f);
}
