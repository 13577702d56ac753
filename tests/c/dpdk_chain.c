/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dpdk_chain.c - puts packets of several small mbufs into a ring that a net_ring port reads, as a driver does whose device
 * writes less into each buffer than it holds. Loaded into the process that has the port.
 */
#include <string.h>

#include <rte_mbuf.h>
#include <rte_mempool.h>
#include <rte_ring.h>

/* A pool of this name, for mbufs that are not the port's. 0, or -1. */
int chain_pool(const char *name)
{
    return rte_pktmbuf_pool_create(name, 255, 0, 0, RTE_MBUF_DEFAULT_BUF_SIZE, SOCKET_ID_ANY) ? 0 : -1;
}

int chain_free_in(const char *pool)
{
    struct rte_mempool *mp = rte_mempool_lookup(pool);

    return mp ? (int)rte_mempool_avail_count(mp) : -1;
}

/* A packet of these bytes, `piece` in each mbuf of the pool. 0, or -1. */
int chain_put(const char *ring, const char *pool, const char *data, unsigned len, unsigned piece)
{
    struct rte_mempool *mp = rte_mempool_lookup(pool);
    struct rte_ring *r = rte_ring_lookup(ring);
    struct rte_mbuf *head = NULL;

    if (!mp || !r) {
        return -1;
    }
    for (unsigned at = 0; at < len; at += piece) {
        struct rte_mbuf *m = rte_pktmbuf_alloc(mp);
        unsigned n = len - at < piece ? len - at : piece;

        if (!m) {
            rte_pktmbuf_free(head);
            return -1;
        }
        memcpy(rte_pktmbuf_append(m, (uint16_t)n), data + at, n);
        if (!head) {
            head = m;
        } else if (rte_pktmbuf_chain(head, m) < 0) {
            rte_pktmbuf_free(m);
            rte_pktmbuf_free(head);
            return -1;
        }
    }
    return rte_ring_enqueue(r, head);
}

static struct rte_mbuf *kept[4096];
static unsigned kept_count;

/* Takes all that a pool has. Their number. */
int chain_take_all(const char *pool)
{
    struct rte_mempool *mp = rte_mempool_lookup(pool);

    while (mp && kept_count < 4096 && (kept[kept_count] = rte_pktmbuf_alloc(mp)) != NULL) {
        kept_count++;
    }
    return (int)kept_count;
}

void chain_give_back(void)
{
    while (kept_count) {
        rte_pktmbuf_free(kept[--kept_count]);
    }
}
