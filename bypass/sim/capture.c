/* SPDX-License-Identifier: Apache-2.0 */
/*
 * capture.c - the recorder of frames, and a device that records what passes to and from any other.
 * What is recorded is read in bulk and written as pcapng by Python; nothing here opens a file.
 */
#include <stdlib.h>

#include "internal.h"

enum { ALIGN = 8, WRAP = 0xffff /* interface of a record that only says: go on at the start */ };

struct capture {
    uint8_t *ring;
    size_t size;       /* bytes, multiple of ALIGN */
    size_t head, tail; /* oldest byte, next byte to write; equal when empty */
    size_t used;
    uint32_t snap_len;
    bool keep_last;
    uint64_t dropped;
};

struct capture *capture_create(size_t bytes, uint32_t snap_len, int keep_last)
{
    struct capture *cap = calloc(1, sizeof *cap);
    if (!cap) {
        return NULL;
    }
    cap->size = bytes / ALIGN * ALIGN;
    cap->ring = malloc(cap->size ? cap->size : ALIGN);
    cap->snap_len = snap_len ? snap_len : UINT32_MAX;
    cap->keep_last = keep_last;
    if (!cap->ring) {
        free(cap);
        return NULL;
    }
    return cap;
}

void capture_destroy(struct capture *cap)
{
    free(cap->ring);
    free(cap);
}

static size_t record_bytes(uint32_t captured)
{
    return sizeof(struct capture_record) + (captured + ALIGN - 1) / ALIGN * ALIGN;
}

/* Bytes from `at` to the start of the next record; a marker, or too little room for one, leads back to
 * the start of the ring. */
static bool is_wrap(const struct capture *cap, size_t at)
{
    if (cap->size - at < sizeof(struct capture_record)) {
        return true;
    }
    struct capture_record r;
    memcpy(&r, cap->ring + at, sizeof r);
    return r.interface == WRAP;
}

static void skip_wrap(struct capture *cap)
{
    if (cap->used && is_wrap(cap, cap->head)) {
        cap->used -= cap->size - cap->head;
        cap->head = 0;
    }
}

/* Size of the oldest record, 0: none. */
static size_t oldest(struct capture *cap, struct capture_record *r)
{
    skip_wrap(cap);
    if (!cap->used) {
        return 0;
    }
    memcpy(r, cap->ring + cap->head, sizeof *r);
    return record_bytes(r->captured);
}

static void discard(struct capture *cap, size_t bytes)
{
    cap->head += bytes;
    cap->used -= bytes;
    if (!cap->used) {
        cap->head = cap->tail = 0;
    }
}

/* Contiguous room for `need` bytes at tail; makes it where it may. */
static bool make_room(struct capture *cap, size_t need)
{
    if (need > cap->size) {
        return false;
    }
    for (;;) {
        bool wraps = cap->tail + need > cap->size;
        size_t want = wraps ? cap->size - cap->tail + need : need;
        if (cap->used + want <= cap->size) {
            if (wraps) {
                if (cap->size - cap->tail >= sizeof(struct capture_record)) {
                    struct capture_record mark = {.interface = WRAP};
                    memcpy(cap->ring + cap->tail, &mark, sizeof mark);
                }
                cap->used += cap->size - cap->tail;
                cap->tail = 0;
            }
            return true;
        }
        struct capture_record r;
        size_t bytes = cap->keep_last ? oldest(cap, &r) : 0;
        if (!bytes) {
            return false;
        }
        discard(cap, bytes);
        cap->dropped++;
    }
}

void capture_add(struct capture *cap, uint64_t time_ns, uint16_t interface, uint16_t flags, const void *frame,
                 uint32_t len)
{
    struct capture_record r = {.time_ns = time_ns, .len = len, .interface = interface, .flags = flags};
    r.captured = len < cap->snap_len ? len : cap->snap_len;
    size_t bytes = record_bytes(r.captured);
    if (!make_room(cap, bytes)) {
        cap->dropped++;
        return;
    }
    uint8_t *to = cap->ring + cap->tail;
    memcpy(to, &r, sizeof r);
    memcpy(to + sizeof r, frame, r.captured);
    memset(to + sizeof r + r.captured, 0, bytes - sizeof r - r.captured);
    cap->tail += bytes;
    cap->used += bytes;
}

int64_t capture_read(struct capture *cap, void *buf, size_t n)
{
    size_t done = 0, bytes;
    struct capture_record r;
    while ((bytes = oldest(cap, &r)) && done + bytes <= n) {
        memcpy((uint8_t *)buf + done, cap->ring + cap->head, bytes);
        discard(cap, bytes);
        done += bytes;
    }
    return (int64_t)done;
}

uint64_t capture_dropped(const struct capture *cap) { return cap->dropped; }

int capture_wants_read(const struct capture *cap) { return !cap->keep_last && cap->used > cap->size / 2; }

/* ---- The recording device ------------------------------------------------------------------------- */

struct capture_dev {
    struct bypass_netdev dev;
    struct bypass_netdev *lower;
    struct capture *capture;
    uint64_t now_ns;
    uint16_t interface;
};

static struct capture_dev *capture_dev_of(struct bypass_netdev *dev) { return (struct capture_dev *)dev; }

/* The lower device keeps the count of free frames; the stack reads it here. */
static int mirrored(struct capture_dev *c, int result)
{
    c->dev.free_frames = c->lower->free_frames;
    return result;
}

static void record(struct capture_dev *c, bypass_pkt pkt, uint16_t flags)
{
    const struct bypass_netdev *d = c->lower;
    const struct bypass_pkt_meta *m =
        (const struct bypass_pkt_meta *)((const uint8_t *)d->meta + (size_t)pkt * d->meta_stride);
    capture_add(c->capture, c->now_ns, c->interface, flags, d->mem + (size_t)pkt * d->stride + m->off, m->len);
}

static int capture_dev_alloc(struct bypass_netdev *dev, bypass_pkt *out, int n)
{
    struct capture_dev *c = capture_dev_of(dev);
    return mirrored(c, c->lower->ops->alloc(c->lower, out, n));
}

static void capture_dev_free(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct capture_dev *c = capture_dev_of(dev);
    c->lower->ops->free(c->lower, pkts, n);
    mirrored(c, 0);
}

static int capture_dev_rx_burst(struct bypass_netdev *dev, bypass_pkt *out, int max)
{
    struct capture_dev *c = capture_dev_of(dev);
    int n = c->lower->ops->rx_burst(c->lower, out, max);
    for (int i = 0; i < n; i++) {
        record(c, out[i], CAPTURE_RX);
    }
    return mirrored(c, n);
}

static int capture_dev_tx_burst(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct capture_dev *c = capture_dev_of(dev);
    int sent = c->lower->ops->tx_burst(c->lower, pkts, n);
    for (int i = 0; i < sent; i++) {
        record(c, pkts[i], CAPTURE_TX); /* the device holds it: its bytes stand until it is reaped */
    }
    return mirrored(c, sent);
}

static int capture_dev_reap(struct bypass_netdev *dev, bypass_pkt *done, int max)
{
    struct capture_dev *c = capture_dev_of(dev);
    return mirrored(c, c->lower->ops->reap(c->lower, done, max));
}

static int capture_dev_kick(struct bypass_netdev *dev)
{
    struct capture_dev *c = capture_dev_of(dev);
    return mirrored(c, c->lower->ops->kick(c->lower));
}

static int capture_dev_wait_fd(struct bypass_netdev *dev)
{
    struct capture_dev *c = capture_dev_of(dev);
    return c->lower->ops->wait_fd(c->lower);
}

static int capture_dev_sleep(struct bypass_netdev *dev)
{
    struct capture_dev *c = capture_dev_of(dev);
    return c->lower->ops->sleep ? mirrored(c, c->lower->ops->sleep(c->lower)) : 0;
}

static const struct bypass_netdev_ops capture_dev_ops = {
    .alloc = capture_dev_alloc,
    .free = capture_dev_free,
    .rx_burst = capture_dev_rx_burst,
    .tx_burst = capture_dev_tx_burst,
    .reap = capture_dev_reap,
    .kick = capture_dev_kick,
    .wait_fd = capture_dev_wait_fd,
    .sleep = capture_dev_sleep,
};

struct bypass_netdev *capture_dev_create(struct bypass_netdev *lower, struct capture *cap, uint16_t interface)
{
    struct capture_dev *c = calloc(1, sizeof *c);
    if (!c) {
        return NULL;
    }
    c->dev = *lower;
    c->dev.ops = &capture_dev_ops;
    c->lower = lower;
    c->capture = cap;
    c->interface = interface;
    return &c->dev;
}

void capture_dev_now(struct bypass_netdev *dev, uint64_t now_ns) { capture_dev_of(dev)->now_ns = now_ns; }

void capture_dev_destroy(struct bypass_netdev *dev) { free(capture_dev_of(dev)); }
