/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tso_frames.h - mbufs as the port's netdev describes them to tso.c, without a port: each ends where its memory ends, so
 * that the sanitizers see every byte that is read behind a frame. DPDK's headers are needed, and none of its libraries.
 */
#ifndef TESTS_TSO_FRAMES_H
#define TESTS_TSO_FRAMES_H

#include <stdlib.h>
#include <string.h>

#include <netinet/in.h>

#include "eth/port.h"

enum { TSO_ROOM = RTE_PKTMBUF_HEADROOM };

static inline struct rte_mbuf *frame_make(const uint8_t *bytes, uint16_t len, uint8_t flags, uint16_t csum_start,
                                          uint16_t csum_off)
{
    size_t before = sizeof(struct rte_mbuf) + 64 + TSO_ROOM; /* the layout of a frame: eth/port.h */
    struct rte_mbuf *m;
    uint8_t *buf;

    if (posix_memalign((void **)&m, 64, before + len)) { /* it ends with the frame, to the byte */
        abort();
    }
    buf = (uint8_t *)m + sizeof *m + 64;
    memset(m, 0, before);
    *mbuf_meta(m) =
        (struct bypass_pkt_meta){.len = len, .flags = flags, .csum_start = csum_start, .csum_off = csum_off};
    m->buf_addr = buf;
    m->buf_len = (uint16_t)(TSO_ROOM + len);
    m->data_off = TSO_ROOM;
    m->data_len = len;
    m->pkt_len = len;
    m->nb_segs = 1;
    memcpy(buf + TSO_ROOM, bytes, len);
    if (flags & BYPASS_TX_CSUM) { /* as netdev.c says it */
        m->ol_flags = RTE_MBUF_F_TX_IPV4 | RTE_MBUF_F_TX_TCP_CKSUM;
        m->l2_len = ETH_HEADER;
        m->l3_len = (uint16_t)(csum_start - ETH_HEADER);
    }
    return m;
}

static inline uint8_t *frame_bytes(struct rte_mbuf *m) { return (uint8_t *)m->buf_addr + TSO_ROOM; }

#endif
