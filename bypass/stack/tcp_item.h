/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_item.h - an item of received payload: a frame (kept as it came) or an arena chunk (a copy). Shared by the
 * files that hold received bytes: tcp_rcv.c in order, tcp_ooo.c ahead of it, sock_zc.c lent to the program.
 *
 * An item is a frame number, or a chunk's index with the top bit set. NO_INDEX ends a list.
 */
#ifndef BYPASS_STACK_TCP_ITEM_H
#define BYPASS_STACK_TCP_ITEM_H

#include "tcp.h"

enum { ITEM_CHUNK = 0x80000000 };

struct item_view {
    uint32_t *next;
    uint16_t *off, *len; /* off: from the frame's start, or in chunk.data */
    uint32_t *seq;
    const uint8_t *data;
    uint32_t charge;
};

static inline struct item_view item_view(const struct bypass_stack *s, uint32_t item)
{
    if (item & ITEM_CHUNK) {
        struct chunk *k = chunk_at(s, item & ~(uint32_t)ITEM_CHUNK);
        return (struct item_view){&k->next, &k->off, &k->len, &k->owner[0], k->data + k->off, CHUNK_SIZE};
    }
    struct bypass_pkt_meta *m = pkt_meta(s, item);
    return (struct item_view){&m->next,      &m->data_off, &m->data_len, &m->seq, pkt_frame(s, item) + m->data_off,
                              s->dev->stride};
}

static inline void item_free(struct bypass_stack *s, struct tcp_conn *c, uint32_t item)
{
    if (item & ITEM_CHUNK) {
        chunk_free(s, item & ~(uint32_t)ITEM_CHUNK);
        c->rcv_charged -= CHUNK_SIZE;
    } else {
        pkt_free(s, item);
        c->rcv_charged -= s->dev->stride;
    }
}

static inline void item_free_list(struct bypass_stack *s, struct tcp_conn *c, uint32_t item)
{
    while (item != NO_INDEX) {
        uint32_t next = *item_view(s, item).next;
        item_free(s, c, item);
        item = next;
    }
}

/* Copies bytes into the room behind what a chunk holds. Returns how many. */
static inline uint32_t item_fill_chunk(struct bypass_stack *s, uint32_t item, const uint8_t *data, uint32_t len)
{
    struct chunk *k = chunk_at(s, item & ~(uint32_t)ITEM_CHUNK);
    uint32_t end = (uint32_t)k->off + k->len, n = min_u32(len, CHUNK_DATA - end);
    memcpy(k->data + end, data, n);
    k->len = (uint16_t)(k->len + n);
    STAT_ADD(s, tcp_copied_bytes, n);
    return n;
}

static inline void item_trim_front(struct item_view *v, uint32_t n)
{
    *v->off = (uint16_t)(*v->off + n);
    *v->len = (uint16_t)(*v->len - n);
    *v->seq += n;
}

#endif
