/* SPDX-License-Identifier: Apache-2.0 */
/*
 * memdev.h - the smallest netdev: frames in ordinary memory, the wire two lists of bytes. For the C tests.
 *
 *   memdev_inject(m, bytes, len)  puts a frame on the receive side
 *   memdev_sent(m, &len)          takes the oldest transmitted frame (a copy), NULL: none
 *   memdev_close(m)               asserts that every frame came home, frees the memory
 *
 * Ownership is checked at each operation: a frame that is freed twice, sent while the device has it, or
 * leaked fails an assertion. Under the address sanitizer the bytes of a free frame are poisoned.
 */
#ifndef TESTS_MEMDEV_H
#define TESTS_MEMDEV_H

#include <assert.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bypass.h"

#if defined(__has_feature) /* clang's way of saying it */
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define MEMDEV_POISON(p, n) __asan_poison_memory_region(p, n)
#define MEMDEV_UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define MEMDEV_POISON(p, n) ((void)(p))
#define MEMDEV_UNPOISON(p, n) ((void)(p))
#endif

#define MEMDEV_MTU 1500

struct memdev_frame { /* transmitted bytes, in order */
    struct memdev_frame *next;
    size_t len;
    uint16_t queue;
    uint8_t bytes[];
};

struct memdev {
    struct bypass_netdev dev;
    bypass_pkt *free_list; /* stack of free frames: free_frames entries */
    bypass_pkt *rx;        /* received, not yet taken: ring of dev.frames entries */
    uint32_t rx_head, rx_tail;
    bypass_pkt *busy; /* transmitted, not yet reaped: busy_count entries, in order */
    uint32_t busy_count;
    struct memdev_frame *sent, **sent_tail, *taken;
    uint32_t tx_limit; /* frames that tx_burst takes before the next reap, UINT32_MAX: no limit */
    int hold_tx;       /* reap completes nothing while set */
    int kick_result;
};

static inline struct memdev *memdev_of(struct bypass_netdev *dev) { return (struct memdev *)dev; }

static inline struct bypass_pkt_meta *memdev_meta(struct memdev *m, bypass_pkt p)
{
    assert(p < m->dev.frames);
    return (struct bypass_pkt_meta *)((uint8_t *)m->dev.meta + (size_t)p * m->dev.meta_stride);
}

static inline uint8_t *memdev_bytes(struct memdev *m, bypass_pkt p) { return m->dev.mem + (size_t)p * m->dev.stride; }

static inline bypass_pkt memdev_take(struct memdev *m)
{
    bypass_pkt p = m->free_list[--m->dev.free_frames];
    assert(memdev_meta(m, p)->holders == 0);
    MEMDEV_UNPOISON(memdev_bytes(m, p), m->dev.stride);
    memset(memdev_meta(m, p), 0xa5, sizeof(struct bypass_pkt_meta)); /* nobody may count on old metadata */
    memdev_meta(m, p)->holders = 0;
    memdev_meta(m, p)->flags = 0;
    memdev_meta(m, p)->queue = 0;
    return p;
}

static inline void memdev_give(struct memdev *m, bypass_pkt p)
{
    assert(memdev_meta(m, p)->holders == 0);
    assert(m->dev.free_frames < m->dev.frames);
    MEMDEV_POISON(memdev_bytes(m, p), m->dev.stride);
    m->free_list[m->dev.free_frames++] = p;
}

static inline int memdev_op_alloc(struct bypass_netdev *dev, bypass_pkt *out, int n)
{
    struct memdev *m = memdev_of(dev);
    int i;
    for (i = 0; i < n && dev->free_frames > 0; i++) {
        out[i] = memdev_take(m);
        struct bypass_pkt_meta *meta = memdev_meta(m, out[i]);
        meta->holders = BYPASS_HOLD_STACK;
        meta->off = dev->headroom;
        meta->len = 0;
    }
    return i;
}

static inline void memdev_op_free(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct memdev *m = memdev_of(dev);
    for (int i = 0; i < n; i++) {
        struct bypass_pkt_meta *meta = memdev_meta(m, pkts[i]);
        assert(meta->holders & BYPASS_HOLD_STACK); /* else: freed twice */
        meta->holders &= (uint8_t)~BYPASS_HOLD_STACK;
        if (meta->holders == 0) {
            memdev_give(m, pkts[i]);
        }
    }
}

static inline int memdev_op_rx_burst(struct bypass_netdev *dev, bypass_pkt *out, int max)
{
    struct memdev *m = memdev_of(dev);
    int n = 0;
    while (n < max && m->rx_head != m->rx_tail) {
        bypass_pkt p = m->rx[m->rx_head++ % dev->frames];
        memdev_meta(m, p)->holders = BYPASS_HOLD_STACK;
        out[n++] = p;
    }
    return n;
}

static inline int memdev_op_tx_burst(struct bypass_netdev *dev, const bypass_pkt *pkts, int n)
{
    struct memdev *m = memdev_of(dev);
    int i;
    for (i = 0; i < n && m->busy_count < m->tx_limit; i++) {
        struct bypass_pkt_meta *meta = memdev_meta(m, pkts[i]);
        assert(meta->holders == BYPASS_HOLD_STACK); /* not submitted twice */
        assert((uint32_t)meta->off + meta->len <= dev->stride);
        struct memdev_frame *f = malloc(sizeof *f + meta->len);
        assert(f != NULL);
        f->next = NULL;
        f->len = meta->len;
        f->queue = meta->queue;
        memcpy(f->bytes, memdev_bytes(m, pkts[i]) + meta->off, meta->len);
        *m->sent_tail = f;
        m->sent_tail = &f->next;
        meta->holders |= BYPASS_HOLD_DEV;
        m->busy[m->busy_count++] = pkts[i];
    }
    return i;
}

static inline int memdev_op_reap(struct bypass_netdev *dev, bypass_pkt *done, int max)
{
    struct memdev *m = memdev_of(dev);
    uint32_t i = 0;
    int n = 0;
    if (m->hold_tx) {
        return 0;
    }
    for (; i < m->busy_count && n < max; i++) {
        struct bypass_pkt_meta *meta = memdev_meta(m, m->busy[i]);
        meta->holders &= (uint8_t)~BYPASS_HOLD_DEV;
        if (meta->holders == 0) {
            memdev_give(m, m->busy[i]);
        } else {
            done[n++] = m->busy[i];
        }
    }
    m->busy_count -= i;
    memmove(m->busy, m->busy + i, m->busy_count * sizeof *m->busy);
    return n;
}

static inline int memdev_op_kick(struct bypass_netdev *dev) { return memdev_of(dev)->kick_result; }

static inline int memdev_op_wait_fd(struct bypass_netdev *dev)
{
    (void)dev;
    return -ENOTSUP;
}

static const struct bypass_netdev_ops memdev_ops = {
    .alloc = memdev_op_alloc,
    .free = memdev_op_free,
    .rx_burst = memdev_op_rx_burst,
    .tx_burst = memdev_op_tx_burst,
    .reap = memdev_op_reap,
    .kick = memdev_op_kick,
    .wait_fd = memdev_op_wait_fd,
};

static inline void memdev_open(struct memdev *m, uint32_t frames, uint32_t stride)
{
    static const uint8_t mac[6] = {2, 0, 0, 0, 0, 1};
    memset(m, 0, sizeof *m);
    m->dev.ops = &memdev_ops;
    m->dev.stride = stride;
    m->dev.meta_stride = sizeof(struct bypass_pkt_meta);
    m->dev.frames = frames;
    m->dev.queues = 2;
    m->dev.mtu = MEMDEV_MTU;
    m->dev.headroom = 256;
    memcpy(m->dev.mac, mac, 6);
    m->dev.mem = malloc((size_t)frames * stride);
    m->dev.meta = calloc(frames, sizeof(struct bypass_pkt_meta));
    m->free_list = calloc(frames, sizeof *m->free_list);
    m->rx = calloc(frames, sizeof *m->rx);
    m->busy = calloc(frames, sizeof *m->busy);
    assert(m->dev.mem && m->dev.meta && m->free_list && m->rx && m->busy);
    m->sent_tail = &m->sent;
    m->tx_limit = UINT32_MAX;
    for (uint32_t i = 0; i < frames; i++) {
        memdev_give(m, frames - 1 - i);
    }
}

/* 0, or -ENOBUFS when no frame is free. The packet starts where a driver would put it. */
static inline int memdev_inject_queue(struct memdev *m, const void *bytes, size_t len, uint16_t queue, uint8_t flags)
{
    assert(m->dev.headroom + len <= m->dev.stride);
    if (m->dev.free_frames == 0) {
        return -ENOBUFS;
    }
    bypass_pkt p = memdev_take(m);
    struct bypass_pkt_meta *meta = memdev_meta(m, p);
    meta->holders = BYPASS_HOLD_RX;
    meta->off = m->dev.headroom;
    meta->len = (uint16_t)len;
    meta->queue = queue;
    meta->flags = flags;
    memset(memdev_bytes(m, p), 0xdb, m->dev.stride);
    if (len > 0) {
        memcpy(memdev_bytes(m, p) + meta->off, bytes, len);
    }
    m->rx[m->rx_tail++ % m->dev.frames] = p;
    return 0;
}

static inline int memdev_inject(struct memdev *m, const void *bytes, size_t len)
{
    return memdev_inject_queue(m, bytes, len, 0, 0);
}

/* The oldest transmitted frame, valid until the next call; NULL: none. */
static inline const uint8_t *memdev_sent(struct memdev *m, size_t *len)
{
    struct memdev_frame *f = m->sent;
    free(m->taken);
    m->taken = f;
    if (f == NULL) {
        return NULL;
    }
    m->sent = f->next;
    if (m->sent == NULL) {
        m->sent_tail = &m->sent;
    }
    *len = f->len;
    return f->bytes;
}

static inline uint32_t memdev_sent_count(const struct memdev *m)
{
    uint32_t n = 0;
    for (const struct memdev_frame *f = m->sent; f != NULL; f = f->next) {
        n++;
    }
    return n;
}

static inline void memdev_forget_sent(struct memdev *m)
{
    size_t len;
    while (memdev_sent(m, &len) != NULL) {}
}

/* All frames are home, but those still in the receive ring or on the wire, which come home here. */
static inline void memdev_close(struct memdev *m)
{
    bypass_pkt p;
    m->hold_tx = 0;
    while (memdev_op_rx_burst(&m->dev, &p, 1) == 1) {
        memdev_op_free(&m->dev, &p, 1);
    }
    while (m->busy_count > 0) {
        int n = memdev_op_reap(&m->dev, &p, 1);
        assert(n == 0); /* else: the stack still holds a transmitted frame */
        (void)n;
    }
    if (m->dev.free_frames != m->dev.frames) {
        fprintf(stderr, "memdev: %u of %u frames leaked\n", m->dev.frames - m->dev.free_frames, m->dev.frames);
        abort();
    }
    memdev_forget_sent(m);
    MEMDEV_UNPOISON(m->dev.mem, (size_t)m->dev.frames * m->dev.stride);
    free(m->dev.mem);
    free(m->dev.meta);
    free(m->free_list);
    free(m->rx);
    free(m->busy);
}

/* An environment whose randomness repeats: a test that fails once fails again. */
static inline int memdev_env_random(void *ctx, void *buf, size_t n)
{
    uint64_t *state = ctx;
    for (size_t i = 0; i < n; i++) {
        *state = *state * 6364136223846793005ull + 1442695040888963407ull;
        ((uint8_t *)buf)[i] = (uint8_t)(*state >> 56);
    }
    return 0;
}

#endif
