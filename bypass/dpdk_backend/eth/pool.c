/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.c - the frames of a port: a mempool in one piece of memory, whose objects follow each other at one stride.
 *
 * The free list is a mempool handler of our own: a stack below a lock. DPDK's ring would hand out the coldest frame and
 * needs a cache per lcore, which threads that are not EAL's do not have; and with the list here the number of free
 * frames is known at any time, and each frame's place is exact: what the driver takes is HOLD_RX from then on.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_memzone.h>

#include "eth/port.h"

static const char handler[] = "bypass";

/* ---- The mempool handler: called by drivers --------------------------------------------------------------- */
static int ops_alloc(struct rte_mempool *mp)
{
    mp->pool_data = mp->pool_config;
    return 0;
}

static void ops_free(struct rte_mempool *mp) { mp->pool_data = NULL; }

static int ops_enqueue(struct rte_mempool *mp, void *const *objects, unsigned n)
{
    struct pool *p = mp->pool_data;

    rte_spinlock_lock(&p->lock);
    for (unsigned i = 0; i < n; i++) {
        struct bypass_pkt_meta *m = mbuf_meta(objects[i]);

        if ((m->holders != BYPASS_HOLD_RX && p->base) || p->count == p->frames) {
            p->bad_free++; /* a driver gave back what it did not have: to list it would put it in two places */
            continue;
        }
        m->holders = 0;
        p->list[p->count++] = objects[i];
    }
    rte_spinlock_unlock(&p->lock);
    return 0;
}

static int ops_dequeue(struct rte_mempool *mp, void **objects, unsigned n)
{
    struct pool *p = mp->pool_data;
    bool enough;

    rte_spinlock_lock(&p->lock);
    enough = n <= p->count;
    for (unsigned i = 0; enough && i < n; i++) {
        objects[i] = p->list[--p->count];
        mbuf_meta(objects[i])->holders = BYPASS_HOLD_RX;
    }
    rte_spinlock_unlock(&p->lock);
    return enough ? 0 : -ENOBUFS;
}

static unsigned ops_count(const struct rte_mempool *mp) { return ((const struct pool *)mp->pool_data)->count; }

static const struct rte_mempool_ops handler_ops = {
    .name = "bypass",
    .alloc = ops_alloc,
    .free = ops_free,
    .enqueue = ops_enqueue,
    .dequeue = ops_dequeue,
    .get_count = ops_count,
};
RTE_MEMPOOL_REGISTER_OPS(handler_ops)

/* ---- Making it ------------------------------------------------------------------------------------------ */

/* Where the device needs physical addresses no object may cross a page: a power of two never does. */
static uint32_t stride_for(uint32_t frame_size)
{
    uint32_t stride = RTE_ALIGN_CEIL(PACKET_AT + frame_size, 64u);

    return rte_eal_iova_mode() == RTE_IOVA_VA ? stride : rte_align32pow2(stride);
}

static void divide_by(struct pool *p, uint32_t stride)
{
    uint64_t odd, x;

    p->shift = (uint32_t)__builtin_ctz(stride);
    odd = stride >> p->shift;
    x = odd;
    for (int i = 0; i < 5; i++) { /* Newton: each step doubles the number of right bits, 3 to begin with */
        x *= 2 - odd * x;
    }
    p->inverse = x;
}

static void check_object(struct rte_mempool *mp, void *wrong, void *object, unsigned index)
{
    const struct pool *p = mp->pool_data;

    if ((const uint8_t *)object != (const uint8_t *)p->zone->addr + (size_t)index * p->stride + OBJ_HEADER) {
        ++*(uint32_t *)wrong;
    }
}

static int populate(struct pool *p)
{
    const struct rte_memzone *z = p->zone;
    size_t page = z->hugepage_sz ? z->hugepage_sz : RTE_PGSIZE_4K;
    uint32_t wrong = 0;
    int got;

    if (rte_eal_iova_mode() == RTE_IOVA_VA) {
        got = rte_mempool_populate_iova(p->mp, z->addr, z->iova, (size_t)p->frames * p->stride, NULL, NULL);
    } else {
        got = rte_mempool_populate_virt(p->mp, z->addr, (size_t)p->frames * p->stride, page, NULL, NULL);
    }
    if (got != (int)p->frames) {
        return got < 0 ? -got : ENOMEM;
    }
    rte_mempool_obj_iter(p->mp, check_object, &wrong);
    return wrong ? ENOMEM : 0;
}

static int create(struct pool *p, const char *name, int numa)
{
    uint32_t room = p->stride - BUF_AT;
    struct rte_pktmbuf_pool_private priv = {.mbuf_data_room_size = (uint16_t)room, .mbuf_priv_size = BUF_AT - META_AT};
    int err;

    p->list = calloc(p->frames, sizeof *p->list);
    p->zone = rte_memzone_reserve_aligned(name, (size_t)p->frames * p->stride, numa, RTE_MEMZONE_SIZE_HINT_ONLY,
                                          rte_eal_iova_mode() == RTE_IOVA_VA ? 4096 : p->stride);
    if (!p->list || !p->zone) {
        return ENOMEM;
    }
    /* The second flag: no gaps at the ends of pages. In VA mode one piece of memory is one for the device too. */
    p->mp = rte_mempool_create_empty(name, p->frames, p->stride - OBJ_HEADER, 0, sizeof priv, numa,
                                     RTE_MEMPOOL_F_NO_SPREAD |
                                         (rte_eal_iova_mode() == RTE_IOVA_VA ? RTE_MEMPOOL_F_NO_IOVA_CONTIG : 0));
    if (!p->mp) {
        return rte_errno ? rte_errno : ENOMEM;
    }
    err = rte_mempool_set_ops_byname(p->mp, handler, p);
    if (err) {
        return -err;
    }
    rte_pktmbuf_pool_init(p->mp, &priv);
    err = populate(p);
    if (err) {
        return err;
    }
    rte_mempool_obj_iter(p->mp, rte_pktmbuf_init, NULL);
    p->base = p->zone->addr;
    return 0;
}

int pool_create(struct pool *p, uint32_t frames, uint32_t frame_size, uint32_t reserve, int numa,
                struct dpdk_error *error)
{
    static uint32_t number;
    char name[RTE_MEMPOOL_NAMESIZE];
    int err;

    memset(p, 0, sizeof *p);
    rte_spinlock_init(&p->lock);
    p->frames = frames;
    p->reserve = reserve;
    p->stride = stride_for(frame_size);
    divide_by(p, p->stride);
    snprintf(name, sizeof name, "bypass%u", __atomic_fetch_add(&number, 1, __ATOMIC_RELAXED));
    log_mark();
    err = create(p, name, numa);
    if (err) {
        complain(error, err,
                 "no memory for %u frames of %u bytes (%zu MiB; %s): raise backend.eal.memory, or ask for "
                 "fewer frames",
                 frames, frame_size, ((size_t)frames * p->stride) >> 20, *log_why() ? log_why() : strerror(err));
        pool_destroy(p);
    }
    return err;
}

void pool_destroy(struct pool *p)
{
    rte_mempool_free(p->mp);
    if (p->zone) {
        rte_memzone_free(p->zone);
    }
    free(p->list);
    memset(p, 0, sizeof *p);
}
