/* SPDX-License-Identifier: Apache-2.0 */
/*
 * umem.c - the memory of a device: how it is laid out, whether a configuration makes sense, who holds each frame.
 *
 *   | struct afxdp_state | free list | metadata, 64 bytes a frame | UMEM, stride bytes a frame |
 *   0                                                             page-aligned
 *
 * A frame's place is meta.holders and nothing else: 0 free, HOLD_STACK and HOLD_DEV alone or together, or HOLD_RX
 * alone. The free list and the counters of the queues are derived from it; afxdp_audit() compares them.
 * Does not talk to the kernel beyond asking it for memory.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

enum { PAGE = 4096, MIN_FILL = 16, MIN_HEADROOM = 128 };

static bool power_of_two(uint32_t n) { return n && !(n & (n - 1)); }

/* All that its fill ring takes, but all queues together at most half of the frames. */
uint32_t umem_fill_target(const struct afxdp_config *cfg)
{
    uint32_t queues = cfg->queue_count ? cfg->queue_count : 1;
    uint32_t share = cfg->frames / 2 / queues;
    uint32_t target = fill_size(cfg) < share ? fill_size(cfg) : share;

    target = cfg->fill_target ? cfg->fill_target : target;
    return target >= MIN_FILL && target <= fill_size(cfg) && (uint64_t)target * queues < cfg->frames ? target : 0;
}

static bool queues_valid(const struct afxdp_config *cfg)
{
    if (cfg->queue_count < 1 || cfg->queue_count > AFXDP_MAX_QUEUES) {
        return false;
    }
    for (uint32_t i = 0; i < cfg->queue_count; i++) {
        for (uint32_t j = 0; j < i; j++) {
            if (cfg->queues[i] == cfg->queues[j]) {
                return false;
            }
        }
    }
    return true;
}

bool config_valid(const struct afxdp_config *cfg)
{
    uint32_t tx_headroom = cfg->tx_headroom ? cfg->tx_headroom : MIN_HEADROOM;

    return queues_valid(cfg) && (cfg->frame_size == 2048 || cfg->frame_size == 4096) && power_of_two(cfg->ring_size) &&
           power_of_two(fill_size(cfg)) && cfg->ring_size <= 1u << 20 && fill_size(cfg) <= 1u << 20 &&
           cfg->frames >= 64 && cfg->frames <= 1u << 24 && umem_fill_target(cfg) && tx_headroom >= MIN_HEADROOM &&
           tx_headroom <= cfg->frame_size / 2 && cfg->rx_headroom <= cfg->frame_size / 4 && cfg->mode <= AFXDP_ZEROCOPY;
}

static uint64_t page_up(uint64_t n) { return (n + PAGE - 1) & ~(uint64_t)(PAGE - 1); }

struct layout {
    uint64_t free_list, meta, umem, end; /* bytes from the state's start */
};

static struct layout layout(const struct afxdp_config *cfg)
{
    struct layout l = {.free_list = sizeof(struct afxdp_state)};

    l.meta = (l.free_list + 4ull * cfg->frames + 63) & ~63ull;
    l.umem = page_up(l.meta + (uint64_t)META_STRIDE * cfg->frames);
    l.end = l.umem + (uint64_t)cfg->frames * cfg->frame_size;
    return l;
}

size_t afxdp_mem_size(const struct afxdp_config *cfg) { return config_valid(cfg) ? layout(cfg).end : 0; }

void *afxdp_mem_map(size_t size, int *fd)
{
    void *mem = MAP_FAILED;

    *fd = memfd_create("bypass-afxdp", MFD_CLOEXEC);
    if (*fd >= 0 && ftruncate(*fd, (off_t)size) == 0) {
        mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
    }
    if (mem == MAP_FAILED) {
        int err = errno;

        if (*fd >= 0) {
            close(*fd);
            *fd = -1;
        }
        errno = err;
        return NULL;
    }
    return mem;
}

void afxdp_mem_unmap(void *mem, size_t size, int fd)
{
    munmap(mem, size);
    if (fd >= 0) {
        close(fd);
    }
}

int umem_view(struct afxdp *d, const struct afxdp_config *cfg, void *mem, size_t size)
{
    struct layout at;

    if (!config_valid(cfg) || ((uintptr_t)mem & (PAGE - 1))) {
        return -EINVAL;
    }
    at = layout(cfg);
    if (size < at.end) {
        return -ENOMEM;
    }
    d->st = mem;
    d->shift = (uint32_t)__builtin_ctz(cfg->frame_size);
    d->free_list = (uint32_t *)((uint8_t *)mem + at.free_list);
    d->nd.mem = (uint8_t *)mem + at.umem;
    d->nd.meta = (struct bypass_pkt_meta *)((uint8_t *)mem + at.meta);
    d->nd.stride = cfg->frame_size;
    d->nd.meta_stride = META_STRIDE;
    d->nd.frames = cfg->frames;
    d->nd.queues = (uint16_t)cfg->queue_count;
    d->nd.headroom = (uint16_t)(cfg->tx_headroom ? cfg->tx_headroom : MIN_HEADROOM);
    return 0;
}

int umem_init(struct afxdp *d, const struct afxdp_config *cfg, void *mem, size_t size)
{
    int err = umem_view(d, cfg, mem, size);

    if (err) {
        return err;
    }
    memset(d->st, 0, sizeof *d->st);
    d->st->magic = AFXDP_MAGIC;
    d->st->bytes = sizeof *d->st;
    d->st->cfg = *cfg;
    d->st->size = layout(cfg).end;
    d->st->fill_target = umem_fill_target(cfg);
    for (uint32_t f = d->nd.frames; f-- > 0;) { /* frame 0 on top */
        meta_at(d, f)->holders = 0;
        frame_to_pool(d, f);
    }
    return 0;
}

/* Of what the cached positions say: no more entries than the ring has. True also in the middle of an operation. */
static bool pos_sane(const struct ring_pos *pos, uint32_t size) { return pos->prod - pos->cons <= size; }

/* Nobody looks for space in the fill ring (fill_refill()): its cached consumer is never moved. */
static bool queue_sane(const struct queue_state *qs, const struct afxdp_config *cfg)
{
    return qs->rx_frames <= cfg->frames && qs->tx_frames <= cfg->frames && pos_sane(&qs->rx, cfg->ring_size) &&
           pos_sane(&qs->tx, cfg->ring_size) && pos_sane(&qs->comp, fill_size(cfg));
}

bool umem_sane(const struct afxdp *d)
{
    const struct afxdp_state *st = d->st;
    uint32_t free_count = st->free_count;

    if (st->size != layout(&d->cfg).end || free_count > d->nd.frames || st->fill_target > fill_size(&d->cfg)) {
        return false;
    }
    for (uint32_t i = 0; i < free_count; i++) {
        if (d->free_list[i] >= d->nd.frames) {
            return false;
        }
    }
    for (uint32_t qi = 0; qi < d->cfg.queue_count; qi++) {
        if (!queue_sane(&st->queue[qi], &d->cfg)) {
            return false;
        }
    }
    return true;
}

/* ---- Audit ----------------------------------------------------------------------------------------------- */

int afxdp_audit(struct afxdp *d, struct frame_audit *out)
{
    struct afxdp_state *st = d->st;
    uint32_t rx = 0, tx = 0;

    memset(out, 0, sizeof *out);
    out->bad_free = st->bad_free;
    for (uint32_t i = 0; i < st->free_count; i++) { /* marks what the free list names, each once */
        if (i >= d->nd.frames || d->free_list[i] >= d->nd.frames) {
            out->misplaced++;
        } else {
            frames_listed(meta_at(d, d->free_list[i]), out);
        }
    }
    frames_count(&d->nd, out);
    for (uint32_t i = 0; i < AFXDP_MAX_QUEUES; i++) { /* those of which this view knows nothing as well */
        rx += st->queue[i].rx_frames;
        tx += st->queue[i].tx_frames;
    }
    return out->misplaced || out->rx != rx || out->tx + out->stack_tx != tx ? -EIO : 0;
}

#ifdef BYPASS_DEBUG
#include <stdio.h>
#include <stdlib.h>

/* A build for tests may name its own handler; the default is to stop where it happened. */
#ifndef AFXDP_VIOLATION
#define AFXDP_VIOLATION(where)                                                                                         \
    do {                                                                                                               \
        fprintf(stderr, "afxdp: frames are not conserved after %s\n", where);                                          \
        abort();                                                                                                       \
    } while (0)
#else
void AFXDP_VIOLATION(const char *where);
#endif

/* After every operation: at least the sums; the whole walk where it is cheap. */
void umem_check(struct afxdp *d, const char *where)
{
    struct frame_audit audit;

    if (d->st->free_count > d->nd.frames || d->nd.free_frames != d->st->free_count ||
        (d->nd.frames <= 1024 && afxdp_audit(d, &audit) != 0)) {
        AFXDP_VIOLATION(where);
    }
}
#endif
