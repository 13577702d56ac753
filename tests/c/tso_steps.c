/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tso_steps.c - tso.c for Python: frames in, and for each packet that a driver would get its bytes and what it is told.
 */
#include "tso_frames.h"

enum { MOST = 64 };

struct packet {
    uint32_t frames, bytes, headers, segment;
};

/* `lens` of n frames that lie behind each other in `in`; packets' bytes come to lie behind each other in `out`. `back`: the
 * driver takes none, and it is the frames that are written there again. Returns the number of packets. */
int tso_steps(const uint8_t *in, const uint16_t *lens, int n, int pieces, int ip_sum, int back, uint8_t *out,
              struct packet *packets)
{
    static struct dpdk_port d;
    struct rte_mbuf *mbufs[MOST], *all[MOST];
    struct tso_packet joined[MOST];
    int packed;

    d.tso_pieces = pieces;
    d.tso_flags = RTE_MBUF_F_TX_TCP_SEG | (ip_sum ? RTE_MBUF_F_TX_IP_CKSUM : 0);
    for (int i = 0; i < n; in += lens[i++]) {
        all[i] = mbufs[i] = frame_make(in, lens[i], BYPASS_TX_CSUM, 34, 16);
    }
    packed = tso_join(&d, mbufs, n, joined);
    for (int i = 0; i < packed; i++) {
        struct rte_mbuf *first = mbufs[i];
        uint32_t bytes = 0;

        for (const struct rte_mbuf *m = first; m; bytes += m->data_len, m = m->next) {
            memcpy(out + bytes, rte_pktmbuf_mtod(m, const uint8_t *), back ? 0 : m->data_len);
        }
        out += back ? 0 : bytes;
        packets[i] = (struct packet){(uint32_t)joined[i].frames, bytes,
                                     (uint32_t)(first->l2_len + first->l3_len + first->l4_len), first->tso_segsz};
        tso_take_back(first, &joined[i]);
    }
    for (int i = 0; i < n; i++) {
        if (back) {
            memcpy(out, frame_bytes(all[i]), lens[i]);
            out += lens[i];
        }
        free(all[i]);
    }
    return packed;
}
