/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_snd.c - written bytes: the send queue, a list of frames that hold payload at a fixed offset, their
 * headers to be written in front of it at each transmission.
 *
 *     sndq_head .. (sent, not acknowledged) .. sndq_next .. (never sent) .. sndq_tail
 *
 * Payload is copied and summed in one pass; the sum stays in the frame's metadata, so that sending again
 * does not read the payload. A frame stays here (IN_TCP) until its last byte is acknowledged.
 */
#include <errno.h>

#include "csum.h"
#include "tcp.h"

static uint16_t payload_off(const struct bypass_stack *s) { return s->dev->headroom; }

static uint32_t swap_bytes(uint32_t sum) /* a sum that starts at an odd byte, RFC 1071 2(B) */
{
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (sum & 0xff) << 8 | sum >> 8;
}

/* Adds bytes behind what the frame holds, up to `limit` payload bytes in all. */
static uint32_t fill_frame(struct bypass_stack *s, bypass_pkt p, const uint8_t *buf, size_t n, uint32_t limit)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    uint32_t have = m->data_len;
    if (have >= limit)
        return 0;
    uint32_t len = (uint32_t)(n < limit - have ? n : limit - have);
    uint32_t sum = csum_copy_tx(s->dev, pkt_frame(s, p) + m->data_off + have, buf, len);
    STAT_ADD(s, tcp_copied_bytes, len);
    m->csum = csum_add(m->csum, have & 1 ? swap_bytes(sum) : sum);
    m->data_len = (uint16_t)(have + len);
    return len;
}

static bypass_pkt new_frame(struct bypass_stack *s, seq_t at)
{
    bypass_pkt p = pkt_alloc(s);
    if (p == BYPASS_PKT_NONE)
        return p;
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->seq = at.v;
    m->csum = 0;
    m->data_off = payload_off(s);
    m->data_len = 0;
    m->seg_flags = IN_TCP;
    m->next = BYPASS_PKT_NONE;
    return p;
}

static void link_behind(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt after, bypass_pkt p)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    if (after == BYPASS_PKT_NONE) {
        m->next = c->sndq_head;
        c->sndq_head = p;
    } else {
        m->next = pkt_meta(s, after)->next;
        pkt_meta(s, after)->next = p;
    }
    if (c->sndq_tail == after)
        c->sndq_tail = p;
}

/* Bytes that may still be queued. Frames are everybody's: a connection keeps what its congestion window can
 * use and a little more, so that peers that do not read cannot take them all; when frames run short it gets
 * less, and the last eighth is for those that have nothing queued. */
uint32_t tcp_snd_room(const struct bypass_stack *s, const struct tcp_conn *c)
{
    const struct bypass_netdev *dev = s->dev;
    uint32_t limit = min_u32(c->sndbuf, 2 * min_u32(c->cwnd, 1u << 30) + SNDBUF_SPARE);
    if (unlikely(dev->free_frames < dev->frames / 4))
        limit = dev->free_frames < dev->frames / 8 ? 1 : 4u * c->snd_mss;
    if (unlikely(c->feat & TX_NOTSENT))
        limit = (uint32_t)min_u64(limit, (uint64_t)(c->snd_nxt.v - c->snd_una.v) + conn_cold(s, c)->opt.notsent_lowat);
    return c->snd_queued < limit ? limit - c->snd_queued : 0;
}

/* ---- send() ----------------------------------------------------------------------------------------- */
static int send_allowed(struct tcp_conn *c, struct tcp_cold *k)
{
    if (k->error) {
        int err = k->error;
        k->error = 0;
        return -err;
    }
    if ((c->flags & (TF_DEAD | TF_FIN_QUEUED)) || (c->feat & TX_FO_FIN))
        return -EPIPE;
    if (tcp_opening(c))
        return -EAGAIN;
    return 0;
}

/* Puts bytes into the last frame if it was never sent, then into new ones. Returns how many fitted. */
size_t tcp_snd_queue(struct bypass_stack *s, struct tcp_conn *c, const uint8_t *buf, size_t n)
{
    size_t done = 0;
    uint32_t limit = c->snd_mss;
    if (c->sndq_next != BYPASS_PKT_NONE)
        done = fill_frame(s, c->sndq_tail, buf, n, limit);
    while (done < n) {
        seq_t at = seq_add(c->snd_una, c->snd_queued + (uint32_t)done);
        bypass_pkt p = pkt_scarce(s) ? BYPASS_PKT_NONE : new_frame(s, at);
        if (p == BYPASS_PKT_NONE)
            break;
        link_behind(s, c, c->sndq_tail, p);
        if (c->sndq_next == BYPASS_PKT_NONE)
            c->sndq_next = p;
        done += fill_frame(s, p, buf + done, n - done, limit);
    }
    if (done > 0)
        pkt_meta(s, c->sndq_tail)->seg_flags |= SEG_PSH;
    c->snd_queued += (uint32_t)done;
    return done;
}

int64_t tcp_send(struct bypass_stack *s, struct tcp_conn *c, const void *buf, size_t n, int flags)
{
    if (likely(flags == 0)) {
        int64_t sent = tcp_fast_send(s, c, buf, n);
        if (sent > 0)
            return sent;
    }
    int err = send_allowed(c, conn_cold(s, c));
    if (unlikely(c->feat & TX_FO_DEFER) && err == -EAGAIN)
        return tcp_fastopen_first_write(s, c, buf, n);
    if (err == -EAGAIN)
        c->flags |= TF_WANT_OUT;
    if (err < 0 || n == 0)
        return err;
    uint32_t room = tcp_snd_room(s, c);
    if (room > 0 && room < c->snd_mss)
        room = c->snd_mss; /* a frame is the unit: part of one saves nothing */
    tcp_rate_write(s, c);
    if (unlikely(n > room)) {
        tcp_tune_write(s, c);
        room = max_u32(room, tcp_snd_room(s, c));
    }
    size_t done = room == 0 ? 0 : tcp_snd_queue(s, c, buf, n < room ? n : room);
    if (done < n)
        c->flags |= TF_WANT_OUT;
    if (done == 0 && room > 0)
        conn_blocked(s, c, false); /* no frame: say when there is one again */
    if (unlikely(flags & BYPASS_OOB) && done > 0)
        tcp_urg_mark(s, c);
    if (flags & BYPASS_MORE)
        c->flags |= TF_MORE;
    else
        c->flags &= ~(uint32_t)TF_MORE;
    tcp_output(s, c);
    return done > 0 ? (int64_t)done : -EAGAIN;
}

/* A frame as the program wrote it: summed, not copied. */
static void queue_frame(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, uint32_t len)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->seq = seq_add(c->snd_una, c->snd_queued).v;
    m->data_len = (uint16_t)len;
    m->csum = s->dev->caps & BYPASS_CAP_TX_CSUM ? 0 : csum_bytes(pkt_frame(s, p) + m->data_off, len, 0);
    m->seg_flags = IN_TCP;
    link_behind(s, c, c->sndq_tail, p);
    if (c->sndq_next == BYPASS_PKT_NONE)
        c->sndq_next = p;
    c->snd_queued += len;
}

int tcp_send_frames(struct bypass_stack *s, struct tcp_conn *c, const struct bypass_buf *bufs, int n, int flags)
{
    int done = 0, err = send_allowed(c, conn_cold(s, c));
    if (err < 0) {
        c->flags |= err == -EAGAIN ? TF_WANT_OUT : 0;
        return err;
    }
    tcp_rate_write(s, c);
    for (; done < n; done++) {
        if (tcp_snd_room(s, c) == 0)
            tcp_tune_write(s, c);
        if (tcp_snd_room(s, c) == 0)
            break;
        queue_frame(s, c, (uint32_t)bufs[done].token, bufs[done].len);
    }
    if (done < n)
        c->flags |= TF_WANT_OUT;
    if (done == 0)
        return -EAGAIN;
    pkt_meta(s, c->sndq_tail)->seg_flags |= SEG_PSH;
    if (unlikely(flags & BYPASS_OOB))
        tcp_urg_mark(s, c);
    c->flags = flags & BYPASS_MORE ? c->flags | TF_MORE : c->flags & ~(uint32_t)TF_MORE;
    tcp_output(s, c);
    return done;
}

/* ---- Acknowledgment ------------------------------------------------------------------------------------ */
static void frame_release(struct bypass_stack *s, bypass_pkt p)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->seg_flags &= (uint16_t) ~(IN_TCP | SEG_MARKS | SEG_PSH);
    if (!(m->seg_flags & IN_TXQ))
        pkt_free(s, p);
}

static void trim_front(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, uint32_t n, struct tcp_sample *sm)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    if (m->seg_flags & SEG_LOST)
        c->lost_bytes -= n;
    if (m->seg_flags & SEG_SACKED) {
        conn_flight(s, c)->sacked_bytes -= n;
        sm->delivered -= n;
    }
    m->seq += n;
    m->data_off = (uint16_t)(m->data_off + n);
    m->data_len = (uint16_t)(m->data_len - n);
    m->csum = csum_bytes(pkt_frame(s, p) + m->data_off, m->data_len, 0);
}

void tcp_snd_skip(struct bypass_stack *s, struct tcp_conn *c, uint32_t n)
{
    while (n > 0) {
        bypass_pkt p = c->sndq_head;
        struct bypass_pkt_meta *m = pkt_meta(s, p);
        uint32_t take = min_u32(n, m->data_len);
        n -= take;
        c->snd_queued -= take;
        if (take < m->data_len) {
            trim_front(s, c, p, take, NULL);
            return;
        }
        c->sndq_head = m->next;
        if (c->sndq_tail == p)
            c->sndq_tail = BYPASS_PKT_NONE;
        frame_release(s, p);
    }
}

/* Frees what the ACK covers. sm->rtt_us: round trip of the newest frame; 0: none is valid, because one was sent
 * twice (Karn), and the others waited behind it, or a SACK told of it before. Returns how many frames were freed. */
uint32_t tcp_snd_ack(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, struct tcp_sample *sm)
{
    const struct tcp_flight *fl = conn_flight(s, c);
    /* RACK has to hear of each frame once one is SACKed: by this ACK already, perhaps */
    const bool plain = fl->ca_state == CA_OPEN && fl->sacked_frames == 0;
    uint32_t frames = 0;
    while (c->sndq_head != BYPASS_PKT_NONE && c->sndq_head != c->sndq_next) {
        bypass_pkt p = c->sndq_head;
        struct bypass_pkt_meta *m = pkt_meta(s, p);
        int32_t covered = seq_diff(g->ack, seq(m->seq));
        if (covered <= 0)
            break;
        if (covered < m->data_len) {
            trim_front(s, c, p, (uint32_t)covered, sm);
            c->snd_queued -= (uint32_t)covered;
            break;
        }
        if ((likely(plain) && !(m->seg_flags & SEG_MARKS)) || tcp_sack_acked(s, c, p, g, sm)) {
            tcp_rate_delivered(s, c, p, sm);
            sm->resent = sm->resent || (m->seg_flags & SEG_RTX);
            sm->rtt_us = sm->resent ? 0 : max_u64(tcp_frame_age_us(s, m), 1);
        }
        c->snd_queued -= m->data_len;
        c->sndq_head = m->next;
        if (c->sndq_tail == p)
            c->sndq_tail = BYPASS_PKT_NONE;
        frames++;
        frame_release(s, p);
    }
    return frames;
}

/* Cuts a frame to `len` payload bytes; the rest goes into a new frame behind it. For a window or a path
 * MTU smaller than the frame. false: no frame to be had. */
bool tcp_snd_split(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, uint32_t len)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    bypass_pkt rest = new_frame(s, seq(m->seq + len));
    if (rest == BYPASS_PKT_NONE)
        return false;
    struct bypass_pkt_meta *r = pkt_meta(s, rest);
    uint8_t *data = pkt_frame(s, p) + m->data_off;
    (void)fill_frame(s, rest, data + len, m->data_len - len, UINT16_MAX);
    r->seg_flags |= m->seg_flags & (SEG_LOST | SEG_RTX | SEG_PSH);
    r->time_ns = m->time_ns;
    m->data_len = (uint16_t)len;
    m->csum = csum_bytes(data, len, 0);
    m->seg_flags &= (uint16_t)~SEG_PSH;
    link_behind(s, c, p, rest);
    if (unlikely(r->seg_flags & SEG_MARKS))
        tcp_sack_split(s, c, p, rest);
    return true;
}

bool tcp_snd_merge(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, uint32_t len)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    uint32_t there = 0;
    for (bypass_pkt q = p; q != BYPASS_PKT_NONE && there < len; q = pkt_meta(s, q)->next)
        there += pkt_meta(s, q)->data_len;
    if (there < len || m->data_off + len > s->dev->stride)
        return false;
    while (m->data_len < len) {
        bypass_pkt q = m->next;
        struct bypass_pkt_meta *n = pkt_meta(s, q);
        uint32_t take = min_u32(n->data_len, len - m->data_len);
        (void)fill_frame(s, p, pkt_frame(s, q) + n->data_off, take, len);
        if (take < n->data_len) {
            trim_front(s, c, q, take, NULL);
            continue;
        }
        m->seg_flags |= n->seg_flags & SEG_PSH;
        m->next = n->next;
        if (c->sndq_tail == q)
            c->sndq_tail = p;
        frame_release(s, q);
    }
    return true;
}

void tcp_snd_clear(struct bypass_stack *s, struct tcp_conn *c)
{
    while (c->sndq_head != BYPASS_PKT_NONE) {
        bypass_pkt p = c->sndq_head;
        c->sndq_head = pkt_meta(s, p)->next;
        frame_release(s, p);
    }
    c->sndq_next = c->sndq_tail = BYPASS_PKT_NONE;
    c->snd_queued = c->lost_bytes = 0;
    c->feat &= ~(uint32_t)TX_LONE;
    tcp_flight_drop(s, c);
}
