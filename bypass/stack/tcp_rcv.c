/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_rcv.c - received bytes: the queue in order, the window that we offer (RFC 9293 3.8.6.2), recv().
 * Received data is a list of items, each a frame (kept without copying) or an arena chunk (small payloads, and all
 * of them when frames are short or the reader is slow). What comes ahead of rcv_nxt is tcp_ooo.c's.
 */
#include <errno.h>

#include "tcp_item.h"

/* ---- Storing --------------------------------------------------------------------------------------- */
static void append(struct bypass_stack *s, struct tcp_conn *c, uint32_t item)
{
    struct item_view v = item_view(s, item);
    *v.next = NO_INDEX;
    if (c->rcvq_tail != NO_INDEX)
        *item_view(s, c->rcvq_tail).next = item;
    else
        c->rcvq_head = item;
    c->rcvq_tail = item;
    c->rcv_queued += *v.len;
}

void tcp_rcv_append(struct bypass_stack *s, struct tcp_conn *c, uint32_t head, uint32_t tail, uint32_t len)
{
    if (c->rcvq_tail != NO_INDEX)
        *item_view(s, c->rcvq_tail).next = head;
    else
        c->rcvq_head = head;
    c->rcvq_tail = tail;
    c->rcv_queued += len;
    c->rcv_nxt = seq_add(c->rcv_nxt, len);
}

/* In order and small: into the room left in the last chunk, so that many small segments of a slow reader
 * do not take a chunk each. */
static uint32_t fill_last_chunk(struct bypass_stack *s, struct tcp_conn *c, const uint8_t *data, uint32_t len)
{
    if (c->rcvq_tail == NO_INDEX || !(c->rcvq_tail & ITEM_CHUNK))
        return 0;
    uint32_t n = item_fill_chunk(s, c->rcvq_tail, data, len);
    c->rcv_queued += n;
    return n;
}

/* Under pressure who is not read gets no more chunks than are left (Choudhury and Hahne 1998, dynamic thresholds). So
 * however many connections are not read, there are some for one that is; else a program that reads one to its end would
 * wait, for ever, for memory that those behind it hold. The last sixteenth is for the windows that are offered under
 * pressure. What is refused was let in by a window from before: the peer sends it again. */
static bool leaves_the_rest(const struct bypass_stack *s, const struct tcp_conn *c)
{
    const struct pool *p = &core(s)->chunks;
    if (likely(!tcp_tune_pressure(s)) || c->rcv_queued == 0)
        return false;
    uint32_t all = p->cap - p->used, left = all > p->cap / 16 ? all - p->cap / 16 : 0;
    uint32_t due = PRESSURE_SEGMENTS * 2u * max_u32(c->rcv_mss, TCP_DEFAULT_MSS); /* as chunks and frames */
    return c->rcv_charged >= (uint64_t)left * CHUNK_SIZE && c->rcv_charged >= due;
}

/* Data in order may use all chunks, at last in place of what this connection holds ahead of it. Data out
 * of order leaves a quarter of them, for all connections' data in order: a peer that sends every second
 * byte must not stop the others. */
static uint32_t take_chunk(struct bypass_stack *s, struct tcp_conn *c, bool in_order)
{
    const struct pool *p = &core(s)->chunks;
    if (!in_order && p->used >= p->cap - p->cap / 4)
        return NO_INDEX;
    if (in_order && leaves_the_rest(s, c))
        return NO_INDEX;
    while (in_order && p->used == p->cap && tcp_tune_reclaim(s, c)) {}
    return chunk_alloc(s);
}

/* Copies payload into chunks. Returns the bytes stored: fewer than len when chunks ran out. */
static uint32_t store_copied(struct bypass_stack *s, struct tcp_conn *c, const uint8_t *data, uint32_t len, seq_t at,
                             bool in_order)
{
    uint32_t done = in_order ? fill_last_chunk(s, c, data, len) : tcp_ooo_fill(s, c, data, len, at);
    while (done < len) {
        uint32_t i = take_chunk(s, c, in_order);
        if (i == NO_INDEX)
            return done;
        struct chunk *k = chunk_at(s, i);
        k->len = (uint16_t)min_u32(len - done, CHUNK_DATA);
        k->owner[0] = at.v + done;
        memcpy(k->data, data + done, k->len);
        STAT_ADD(s, tcp_copied_bytes, k->len);
        c->rcv_charged += CHUNK_SIZE;
        done += k->len;
        if (in_order)
            append(s, c, i | ITEM_CHUNK);
        else
            tcp_ooo_insert(s, c, i | ITEM_CHUNK);
    }
    return done;
}

/* No chunk is to be had: then data in order stays in its frame while the last eighth of the frames is free, which is for
 * sending. Half of that is for who has nothing to read: the program waits for just this. */
static bool frame_to_spare(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return s->dev->free_frames > s->dev->frames / (c->rcv_queued == 0 ? 16 : 8);
}

/* A reader that lets twice its buffer pile up in frames gets copies instead. */
static bool should_copy(const struct bypass_stack *s, const struct tcp_conn *c, uint32_t len)
{
    if (unlikely(c->feat & TX_KEEP_FRAMES) && len <= COPY_BREAK)
        len = COPY_BREAK + 1;
    return pkt_should_copy(s, len) || c->rcv_charged > 2 * c->rcvbuf;
}

/* ---- What is refused -------------------------------------------------------------------------------------
 *
 * A peer whose segment was refused sends it again after a timeout, and after twice that: once the program reads again it may
 * be minutes until it does. No ACK of what is here already makes it send earlier. So a segment that is refused at rcv_nxt is
 * kept aside, not acknowledged, if a frame can be spared; when the program has read it is taken, and the peer hears at once of
 * progress. It stays the peer's: when that was faster, or has come with more, it is thrown away. */
static void spare_drop(struct bypass_stack *s, struct tcp_conn *c)
{
    if (c->feat & TX_SPARE) {
        c->feat &= ~(uint32_t)TX_SPARE;
        item_free(s, c, conn_cold(s, c)->spare);
    }
}

static void spare_keep(struct bypass_stack *s, struct tcp_conn *c, struct segment *g, uint16_t off, uint32_t len)
{
    uint32_t reserve = s->dev->frames / 16 + s->dev->frames / 32; /* what is below is for who has nothing to read */
    if (c->feat & TX_SPARE && pkt_meta(s, conn_cold(s, c)->spare)->seq != c->rcv_nxt.v)
        spare_drop(s, c);
    if (c->feat & TX_SPARE || c->rcv_queued == 0 || g->flags & TCP_URG || s->dev->free_frames <= reserve)
        return;
    struct bypass_pkt_meta *m = pkt_meta(s, g->pkt);
    m->data_off = off;
    m->data_len = (uint16_t)len;
    m->seq = c->rcv_nxt.v;
    c->rcv_charged += s->dev->stride;
    c->feat |= TX_SPARE;
    conn_cold(s, c)->spare = g->pkt;
    g->pkt = BYPASS_PKT_NONE;
}

/* Stores `len` bytes of the segment that start at `skip`; returns how many were kept. */
static uint32_t store(struct bypass_stack *s, struct tcp_conn *c, struct segment *g, uint32_t skip, uint32_t len,
                      bool in_order)
{
    struct bypass_pkt_meta *m = pkt_meta(s, g->pkt);
    uint16_t off = (uint16_t)(m->off + g->data_off + skip);
    seq_t at = seq_add(g->seq, skip);
    uint32_t copied = 0;
    if (should_copy(s, c, len)) {
        copied = store_copied(s, c, pkt_frame(s, g->pkt) + off, len, at, in_order);
        if (copied == len)
            return len;
        if (!in_order || !frame_to_spare(s, c)) {
            STAT(s, tcp_in_no_memory);
            if (in_order && copied == 0)
                spare_keep(s, c, g, off, len);
            return copied;
        }
        off = (uint16_t)(off + copied);
        at = seq_add(at, copied);
        len -= copied;
    }
    m->data_off = off;
    m->data_len = (uint16_t)len;
    m->seq = at.v;
    c->rcv_charged += s->dev->stride;
    uint32_t item = g->pkt;
    g->pkt = BYPASS_PKT_NONE;
    if (in_order)
        append(s, c, item);
    else
        tcp_ooo_insert(s, c, item);
    return copied + len;
}

/* ---- Acknowledging (RFC 9293 3.8.6.3, RFC 5681 4.2) ---------------------------------------------------- */
static void ack_data(struct bypass_stack *s, struct tcp_conn *c, uint32_t len, bool hole)
{
    if (len > c->rcv_mss)
        c->rcv_mss = (uint16_t)min_u32(len, 65535);
    uint32_t waiting = c->rcv_nxt.v - c->last_ack_sent.v;
    /* At least every second full segment, and at once around holes. Of those that came in one batch one ACK tells for
     * all (up to ACK_BATCH_MAX), as it would behind a NIC that coalesces: the batch is over in microseconds. */
    if (hole || c->ooo != NO_INDEX || waiting >= ACK_BATCH_MAX * (uint32_t)c->rcv_mss) {
        c->flags |= TF_ACK_NOW;
    } else if (waiting >= 2u * c->rcv_mss) {
        conn_ack_batch(s, c);
    } else if (c->quick_acks > 0 && len >= c->rcv_mss && len >= TCP_DEFAULT_MSS) {
        c->quick_acks--; /* the peer is in slow start: feed its clock */
        c->flags |= TF_ACK_NOW;
    } else {
        tcp_ack_delayed(s, c);
    }
}

/* Who talks. RFC 1122 4.2.3.2 delays an ACK in the hope of data to go with it, and a peer with Nagle's algorithm (4.2.3.4)
 * waits for that ACK before it sends the next small piece. What a connection is for is learned from what happens:
 *
 *                  data leaves with an ACK             the delay passes without data
 *   nothing yet    TX_ANSWERS                          TX_LISTENS
 *   TX_ANSWERS     stays                               TX_LISTENS
 *   TX_LISTENS     TX_ANSWERS; stays when several      stays; so do ACKs of what was read
 *                  ACKs had left alone before
 *
 * The delay is short as long as nothing is known, so that neither who answers sends more ACKs than answers, nor who only
 * listens makes the peer wait; who listens acknowledges when the program has read all. Several ACKs before an answer mean
 * that the peer went on after the first: it writes in pieces, and would wait again with each answer. Linux leaves its
 * "pingpong" mode in the same way, and enters it with each answer. */
static void ack_alone(struct bypass_stack *s, struct tcp_conn *c)
{
    c->feat |= c->feat & TX_ACK_ALONE ? TX_ACKS_ALONE : TX_ACK_ALONE;
    tcp_send_ack(s, c);
}

void tcp_ack_due(struct bypass_stack *s, struct tcp_conn *c)
{
    c->flags &= ~(uint32_t)TF_ACK_LATER;
    c->feat = (c->feat & ~(uint32_t)TX_ANSWERS) | TX_LISTENS;
    ack_alone(s, c);
}

void tcp_ack_carried(struct tcp_conn *c)
{
    bool pieces = (c->feat & TX_LISTENS) && (c->feat & TX_ACKS_ALONE);
    c->feat &= ~(uint32_t)(TX_ACK_ALONE | TX_ACKS_ALONE);
    if (!pieces && (c->feat & TX_LISTENS || c->flags & TF_ACK_LATER))
        c->feat = (c->feat & ~(uint32_t)TX_LISTENS) | TX_ANSWERS;
}

static void fin_in(struct bypass_stack *s, struct tcp_conn *c)
{
    spare_drop(s, c);
    c->rcv_nxt = seq_add(c->rcv_nxt, 1);
    c->flags = (c->flags & ~(uint32_t)TF_FIN_AHEAD) | TF_FIN_IN | TF_ACK_NOW;
    if (c->state == BYPASS_ESTABLISHED)
        c->state = BYPASS_CLOSE_WAIT;
    else if (c->state == BYPASS_FIN_WAIT_1)
        c->state = BYPASS_CLOSING; /* our FIN is not acknowledged: tcp_ack_in saw to that first */
    else if (c->state == BYPASS_FIN_WAIT_2)
        conn_time_wait(s, c);
    conn_event(s, c, BYPASS_IN | BYPASS_RDHUP);
}

static void take_in_order(struct bypass_stack *s, struct tcp_conn *c, struct segment *g, uint32_t skip, uint32_t len)
{
    if (len >= WORTH_TUNING)
        tcp_tune_rtt(s, c, g);
    uint32_t kept = store(s, c, g, skip, len, true);
    c->rcv_nxt = seq_add(c->rcv_nxt, kept);
    bool hole = c->ooo != NO_INDEX && tcp_ooo_collect(s, c);
    ack_data(s, c, len, hole || kept < len);
    if (kept > 0 && tcp_readable(s, c))
        conn_event(s, c, BYPASS_IN);
}

/* A few bytes in order, with nothing else to think of, into a chunk of their own. */
void tcp_rcv_small(struct bypass_stack *s, struct tcp_conn *c, struct segment *g)
{
    uint32_t i = c->rcvq_head == NO_INDEX && g->len <= COPY_BREAK ? chunk_alloc(s) : NO_INDEX;
    if (unlikely(i == NO_INDEX)) {
        tcp_rcv_data(s, c, g);
        return;
    }
    struct chunk *k = chunk_at(s, i);
    k->len = (uint16_t)g->len;
    k->owner[0] = g->seq.v;
    memcpy(k->data, pkt_data(s, g->pkt) + g->data_off, g->len);
    c->rcvq_head = c->rcvq_tail = i | ITEM_CHUNK;
    c->rcv_queued = g->len;
    c->rcv_charged += CHUNK_SIZE;
    c->rcv_nxt = seq_add(c->rcv_nxt, g->len);
    STAT(s, tcp_in_data_segments);
    STAT_ADD(s, tcp_copied_bytes, g->len);
    ack_data(s, c, g->len, false);
    if (tcp_readable(s, c))
        sock_event(s, c->sock, BYPASS_IN);
}

void tcp_rcv_train(struct bypass_stack *s, struct tcp_conn *c, const struct segment *first, const bypass_pkt *pkts,
                   int n, uint32_t len)
{
    tcp_tune_rtt(s, c, first);
    for (int i = 0; i < n; i++) {
        struct bypass_pkt_meta *m = pkt_meta(s, pkts[i]);
        m->seq = c->rcv_nxt.v;
        c->rcv_charged += s->dev->stride;
        append(s, c, pkts[i]);
        c->rcv_nxt = seq_add(c->rcv_nxt, m->data_len);
    }
    STAT_ADD(s, tcp_in_data_segments, (uint32_t)n);
    ack_data(s, c, len, false);
    if (tcp_readable(s, c))
        sock_event(s, c->sock, BYPASS_IN);
}

/* RFC 9293 3.10.7.4, seventh and eighth: the segment's text, then its FIN. */
void tcp_rcv_data(struct bypass_stack *s, struct tcp_conn *c, struct segment *g)
{
    seq_t end = seq_add(g->seq, g->len); /* of the data; a FIN stands there */
    uint32_t skip = seq_lt(g->seq, c->rcv_nxt) ? (uint32_t)seq_diff(c->rcv_nxt, g->seq) : 0;
    uint32_t len = g->len > skip ? g->len - skip : 0;
    uint32_t room = c->rcv_adv.v - seq_add(g->seq, skip).v; /* to the right edge we offered */
    bool fin = (g->flags & TCP_FIN) && !(c->flags & TF_FIN_IN);
    if (g->len > 0) {
        STAT(s, tcp_in_data_segments);
        if ((int32_t)room < 0)
            room = 0;
        if (len > room) {
            len = room;
            fin = false;
            c->flags |= TF_ACK_NOW;
        }
        if (unlikely(skip > 0))
            tcp_sack_old(s, c, g);
        if (len == 0) {
            STAT(s, tcp_in_duplicate);
            c->flags |= TF_ACK_NOW; /* a repeated segment: our ACK was lost, or a window probe */
        } else if (seq_leq(g->seq, c->rcv_nxt)) {
            take_in_order(s, c, g, skip, len);
        } else {
            STAT(s, tcp_in_out_of_order);
            c->flags |= TF_ACK_NOW;
            (void)store(s, c, g, skip, len, false);
        }
    }
    if (fin && seq_gt(end, c->rcv_nxt)) { /* its time comes when the hole is filled */
        c->flags |= TF_FIN_AHEAD | TF_ACK_NOW;
        conn_cold(s, c)->fin_ahead = end;
    } else if (fin || ((c->flags & TF_FIN_AHEAD) && seq_eq(conn_cold(s, c)->fin_ahead, c->rcv_nxt))) {
        if (seq_eq(end, c->rcv_nxt) || !fin)
            fin_in(s, c);
    }
}

/* ---- The window ------------------------------------------------------------------------------------------ */
/* Bytes from rcv_nxt on that there is room for. */
static uint32_t window_room(const struct bypass_stack *s, const struct tcp_conn *c)
{
    uint32_t most = c->rcvbuf, held = c->rcv_queued;
    if (tcp_tune_pressure(s))
        most = min_u32(most, PRESSURE_SEGMENTS * max_u32(c->rcv_mss, TCP_DEFAULT_MSS));
    if (unlikely(c->feat & TX_LENT))
        held += conn_cold(s, c)->rcv_lent;
    return min_u32(most > held ? most - held : 0, 65535u << c->rcv_wscale);
}

static uint32_t window_offered(const struct tcp_conn *c)
{
    return seq_lt(c->rcv_nxt, c->rcv_adv) ? (uint32_t)seq_diff(c->rcv_adv, c->rcv_nxt) : 0;
}

/* Never shrinks (RFC 9293 3.8.6); grows only by a worthwhile step (receiver's silly window avoidance,
 * 3.8.6.2.2), so that a slow reader does not draw tiny segments. */
uint32_t tcp_rcv_window(const struct bypass_stack *s, struct tcp_conn *c)
{
    uint32_t offered = window_offered(c), room = window_room(s, c);
    uint32_t step = min_u32(c->rcvbuf / 2, max_u32(c->rcv_mss, TCP_DEFAULT_MSS));
    if (room < offered + step)
        return offered;
    c->rcv_adv = seq_add(c->rcv_nxt, room);
    return room;
}

/* The program has read. */
static void spare_take(struct bypass_stack *s, struct tcp_conn *c)
{
    uint32_t spare = conn_cold(s, c)->spare;
    const struct bypass_pkt_meta *m = pkt_meta(s, spare);
    if (m->seq != c->rcv_nxt.v || c->flags & TF_DEAD) {
        spare_drop(s, c);
        return;
    }
    if (leaves_the_rest(s, c))
        return;
    c->feat &= ~(uint32_t)TX_SPARE;
    c->rcv_nxt = seq_add(c->rcv_nxt, m->data_len);
    append(s, c, spare);
    if (c->ooo != NO_INDEX)
        tcp_ooo_collect(s, c);
    if ((c->flags & TF_FIN_AHEAD) && seq_eq(conn_cold(s, c)->fin_ahead, c->rcv_nxt))
        fin_in(s, c);
    if (tcp_readable(s, c))
        conn_event(s, c, BYPASS_IN);
    tcp_send_ack(s, c);
}

/* After the program has read: tell the peer when the window opens by two segments or half the buffer, if it
 * may be waiting for that. While more than a little is open, the ACKs of what it sends carry the news. */
void tcp_rcv_window_update(struct bypass_stack *s, struct tcp_conn *c)
{
    if (unlikely(c->feat & TX_SPARE))
        spare_take(s, c);
    uint32_t offered = window_offered(c);
    uint32_t step = min_u32(c->rcvbuf / 2, 2u * max_u32(c->rcv_mss, TCP_DEFAULT_MSS));
    if (offered >= min_u32(c->rcvbuf / 2, WINDOW_LOW))
        return;
    if (c->state > BYPASS_FIN_WAIT_2 || (c->flags & (TF_DEAD | TF_FIN_IN)) || c->state == BYPASS_SYN_SENT)
        return;
    if (window_room(s, c) >= offered + step)
        tcp_send_ack(s, c);
}

/* ---- recv() ---------------------------------------------------------------------------------------------- */
/* The first item of the queue, or `n` bytes of it, goes. */
static void drop_front(struct bypass_stack *s, struct tcp_conn *c, uint32_t n)
{
    uint32_t item = c->rcvq_head;
    struct item_view v = item_view(s, item);
    c->rcv_queued -= n;
    if (n < *v.len) {
        item_trim_front(&v, n);
        return;
    }
    c->rcvq_head = *v.next;
    if (c->rcvq_head == NO_INDEX)
        c->rcvq_tail = NO_INDEX;
    item_free(s, c, item);
}

uint32_t tcp_rcv_take(struct bypass_stack *s, struct tcp_conn *c)
{
    uint32_t item = c->rcvq_head;
    struct item_view v = item_view(s, item);
    c->rcv_queued -= *v.len;
    c->rcvq_head = *v.next;
    if (c->rcvq_head == NO_INDEX)
        c->rcvq_tail = NO_INDEX;
    return item;
}

void tcp_rcv_skip(struct bypass_stack *s, struct tcp_conn *c, uint32_t n)
{
    while (n > 0) {
        uint32_t take = min_u32(n, *item_view(s, c->rcvq_head).len);
        drop_front(s, c, take);
        n -= take;
    }
}

static size_t copy_out(struct bypass_stack *s, struct tcp_conn *c, uint8_t *buf, size_t n)
{
    size_t done = 0;
    while (done < n && c->rcvq_head != NO_INDEX) {
        struct item_view v = item_view(s, c->rcvq_head);
        uint32_t take = (uint32_t)(n - done < *v.len ? n - done : *v.len);
        memcpy(buf + done, v.data, take);
        done += take;
        drop_front(s, c, take);
    }
    STAT_ADD(s, tcp_copied_bytes, done);
    return done;
}

/* The same, but all stays; the first `skip` bytes are passed over. */
static size_t look_at(struct bypass_stack *s, const struct tcp_conn *c, uint8_t *buf, size_t n, uint32_t skip)
{
    size_t done = 0;
    for (uint32_t item = c->rcvq_head; done < n && item != NO_INDEX; item = *item_view(s, item).next) {
        struct item_view v = item_view(s, item);
        uint32_t pass = min_u32(skip, *v.len), left = *v.len - pass;
        uint32_t take = (uint32_t)(n - done < left ? n - done : left);
        memcpy(buf + done, v.data + pass, take);
        done += take;
        skip -= pass;
    }
    STAT_ADD(s, tcp_copied_bytes, done);
    return done;
}

/* In Linux' order: the peer's end outlasts an error that came after it, which SO_ERROR still tells. */
static int64_t nothing_to_read(struct tcp_conn *c, struct tcp_cold *k)
{
    if (c->flags & TF_FIN_IN)
        return 0;
    if (k->error) { /* reported once, as SO_ERROR is */
        int err = k->error;
        k->error = 0;
        return -err;
    }
    return (c->flags & TF_RCV_SHUT) || conn_over(c) ? 0 : -EAGAIN;
}

static inline void ack_read(struct bypass_stack *s, struct tcp_conn *c)
{
    if (unlikely(c->feat & TX_LISTENS) && (c->flags & TF_ACK_LATER) && c->rcv_queued == 0)
        ack_alone(s, c);
}

/* All that is there is in one chunk, and goes: the usual request. */
static int64_t copy_only_chunk(struct bypass_stack *s, struct tcp_conn *c, uint8_t *buf)
{
    uint32_t n = c->rcv_queued, i = c->rcvq_head & ~(uint32_t)ITEM_CHUNK;
    const struct chunk *k = chunk_at(s, i);
    memcpy(buf, k->data + k->off, n);
    c->rcvq_head = c->rcvq_tail = NO_INDEX;
    c->rcv_queued = 0;
    c->rcv_charged -= CHUNK_SIZE;
    chunk_free(s, i);
    STAT_ADD(s, tcp_copied_bytes, n);
    if (!(c->flags & TF_DEAD)) {
        tcp_rcv_window_update(s, c);
        ack_read(s, c);
    }
    return n;
}

int64_t tcp_recv(struct bypass_stack *s, struct tcp_conn *c, void *buf, size_t n, int flags)
{
    const bool peek = (flags & BYPASS_PEEK) != 0, bulk = c->rcv_queued >= WORTH_TUNING;
    uint32_t skip = 0;
    size_t done;
    if (likely(flags == 0 && c->rcvq_head == c->rcvq_tail && (c->rcvq_head & ITEM_CHUNK) && c->rcv_queued <= n) &&
        c->rcv_queued > 0 && !(c->feat & TX_URG_IN))
        return copy_only_chunk(s, c, buf);
    if (unlikely(flags & BYPASS_OOB))
        return tcp_urg_recv(s, c, buf, n, flags);
    if (unlikely(c->feat & TX_URG_IN))
        n = tcp_urg_limit(s, c, n, peek, &skip);
    if (c->rcv_queued <= skip)
        return nothing_to_read(c, conn_cold(s, c));
    if (unlikely(flags & BYPASS_TRUNC)) { /* tcp(7), MSG_TRUNC: thrown away, or counted, without being copied */
        done = n < c->rcv_queued - skip ? n : c->rcv_queued - skip;
        if (!peek)
            tcp_rcv_skip(s, c, (uint32_t)done);
    } else {
        done = peek ? look_at(s, c, buf, n, skip) : copy_out(s, c, buf, n);
    }
    if (!peek)
        tcp_rcv_after_read(s, c, bulk);
    return (int64_t)done;
}

void tcp_rcv_after_read(struct bypass_stack *s, struct tcp_conn *c, bool bulk)
{
    if (unlikely(c->feat & TX_URG_IN))
        tcp_urg_after_read(s, c);
    if (c->flags & TF_DEAD)
        return;
    if (bulk)
        tcp_tune_read(s, c);
    tcp_rcv_window_update(s, c);
    ack_read(s, c);
}

void tcp_rcv_discard(struct bypass_stack *s, struct tcp_conn *c)
{
    spare_drop(s, c);
    item_free_list(s, c, c->rcvq_head);
    c->rcvq_head = c->rcvq_tail = NO_INDEX;
    c->rcv_queued = 0;
}

void tcp_rcv_clear(struct bypass_stack *s, struct tcp_conn *c)
{
    tcp_rcv_discard(s, c);
    tcp_ooo_clear(s, c);
}
