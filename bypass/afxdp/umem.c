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

enum { PAGE = 4096, MIN_FILL = 16, MARK = 0x80 };

static bool power_of_two(uint32_t n) { return n && !(n & (n - 1)); }

static uint32_t fill_size(const struct afxdp_config *cfg) { return cfg->fill_size ? cfg->fill_size : cfg->ring_size; }

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
    uint32_t tx_headroom = cfg->tx_headroom ? cfg->tx_headroom : 128;

    return queues_valid(cfg) && (cfg->frame_size == 2048 || cfg->frame_size == 4096) && power_of_two(cfg->ring_size) &&
           power_of_two(fill_size(cfg)) && cfg->ring_size <= 1u << 20 && fill_size(cfg) <= 1u << 20 &&
           cfg->frames >= 64 && cfg->frames <= 1u << 24 && umem_fill_target(cfg) && tx_headroom >= 128 &&
           tx_headroom <= cfg->frame_size / 2 && cfg->rx_headroom <= cfg->frame_size / 4 && cfg->mode <= AFXDP_ZEROCOPY;
}

static uint64_t page_up(uint64_t n) { return (n + PAGE - 1) & ~(uint64_t)(PAGE - 1); }

static uint64_t layout(const struct afxdp_config *cfg, uint64_t *free_off, uint64_t *meta_off, uint64_t *umem_off)
{
    *free_off = sizeof(struct afxdp_state);
    *meta_off = (*free_off + 4ull * cfg->frames + 63) & ~63ull;
    *umem_off = page_up(*meta_off + (uint64_t)META_STRIDE * cfg->frames);
    return *umem_off + (uint64_t)cfg->frames * cfg->frame_size;
}

size_t afxdp_mem_size(const struct afxdp_config *cfg)
{
    uint64_t off[3];

    return config_valid(cfg) ? layout(cfg, &off[0], &off[1], &off[2]) : 0;
}

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

int umem_init(struct afxdp *d, const struct afxdp_config *cfg, void *mem, size_t size)
{
    struct afxdp_state *st = mem;
    uint64_t need;

    if (!config_valid(cfg) || ((uintptr_t)mem & (PAGE - 1))) {
        return -EINVAL;
    }
    memset(st, 0, sizeof *st);
    need = layout(cfg, &st->free_off, &st->meta_off, &st->umem_off);
    if (size < need) {
        return -ENOMEM;
    }
    st->magic = AFXDP_MAGIC;
    st->frames = cfg->frames;
    st->stride = cfg->frame_size;
    st->shift = (uint32_t)__builtin_ctz(cfg->frame_size);
    st->queues = cfg->queue_count;
    st->fill_target = umem_fill_target(cfg);
    d->st = st;
    d->free_list = (uint32_t *)((uint8_t *)mem + st->free_off);
    d->nd.mem = (uint8_t *)mem + st->umem_off;
    d->nd.meta = (struct bypass_pkt_meta *)((uint8_t *)mem + st->meta_off);
    d->nd.stride = st->stride;
    d->nd.meta_stride = META_STRIDE;
    d->nd.frames = st->frames;
    d->nd.queues = (uint16_t)st->queues;
    d->nd.headroom = (uint16_t)(cfg->tx_headroom ? cfg->tx_headroom : 128);
    for (uint32_t f = st->frames; f-- > 0;) { /* frame 0 on top */
        meta_at(d, f)->holders = 0;
        frame_to_pool(d, f);
    }
    return 0;
}

/* ---- Audit ----------------------------------------------------------------------------------------------- */

static void count_place(struct bypass_pkt_meta *m, struct afxdp_audit *out)
{
    bool listed = m->holders & MARK;
    uint8_t holders = m->holders & (uint8_t)~MARK;

    m->holders = holders;
    if (listed != (holders == 0)) {
        out->misplaced++;
        return;
    }
    switch (holders) {
    case 0:
        out->free++;
        break;
    case BYPASS_HOLD_STACK:
        out->stack++;
        break;
    case BYPASS_HOLD_DEV:
        out->tx++;
        break;
    case BYPASS_HOLD_STACK | BYPASS_HOLD_DEV:
        out->stack_tx++;
        break;
    case BYPASS_HOLD_RX:
        out->rx++;
        break;
    default:
        out->misplaced++;
    }
}

int afxdp_audit(struct afxdp *d, struct afxdp_audit *out)
{
    struct afxdp_state *st = d->st;
    uint32_t rx = 0, tx = 0;

    memset(out, 0, sizeof *out);
    out->frames = st->frames;
    out->bad_free = st->bad_free;
    for (uint32_t i = 0; i < st->free_count; i++) { /* marks what the free list names, each once */
        if (i >= st->frames || d->free_list[i] >= st->frames || (meta_at(d, d->free_list[i])->holders & MARK)) {
            out->misplaced++;
        } else {
            meta_at(d, d->free_list[i])->holders |= MARK;
        }
    }
    for (uint32_t f = 0; f < st->frames; f++) {
        count_place(meta_at(d, f), out);
    }
    for (uint32_t i = 0; i < st->queues; i++) {
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
    struct afxdp_audit audit;

    if (d->st->free_count > d->st->frames || d->nd.free_frames != d->st->free_count ||
        (d->st->frames <= 1024 && afxdp_audit(d, &audit) != 0)) {
        AFXDP_VIOLATION(where);
    }
}
#endif
