/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sock_zc.c - payload that is not copied: bypass_recv_zc() lends what was received as it lies, bypass_buf_alloc() and
 * bypass_send_zc() let a program write into the frame that will be sent.
 *
 * A buffer that is out is in no queue of the stack; it is marked, and a token names it: its number, and a serial that
 * each lending changes, so that a token is good once, and by this stack. Lent bytes count against the receive window
 * and the memory of their connection until they are released, wherever the connection is by then:
 *
 *     frame: IN_LENT, meta.hash the serial, meta.time_ns the stack, meta.rule the connection, meta.entry its generation
 *            (being written: meta.rule NO_INDEX, meta.data_len the room)
 *     chunk: the serial's halves in next (below CHUNK_LENT) and off, owner[] the connection and its generation
 *
 * A program's mistake (a token twice, of another stack, made up) must find no mark that fits: it is an error and changes
 * nothing.
 */
#include <errno.h>

#include "csum.h"
#include "tcp_item.h"

/* Above every index, with ITEM_CHUNK or without (max_chunks is at most 2^24), and below NO_INDEX. */
enum { CHUNK_LENT = 0xfffe0000 };

static uint64_t token_of(uint32_t item, uint32_t serial) { return (uint64_t)serial << 32 | item; }
static uint32_t token_item(uint64_t token) { return (uint32_t)token; }
static uint32_t token_serial(uint64_t token) { return (uint32_t)(token >> 32); }

static void mark_frame(struct bypass_stack *s, bypass_pkt p, uint32_t serial, uint32_t conn, uint32_t gen)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->seg_flags = IN_LENT;
    m->hash = serial;
    m->time_ns = core(s)->lend_id;
    m->rule = conn;
    m->entry = gen;
}

static struct bypass_pkt_meta *lent_frame(const struct bypass_stack *s, uint64_t token)
{
    if (token_item(token) >= s->dev->frames)
        return NULL;
    struct bypass_pkt_meta *m = pkt_meta(s, token_item(token));
    return m->seg_flags == IN_LENT && m->hash == token_serial(token) ? m : NULL;
}

/* ---- Receiving ----------------------------------------------------------------------------------------------- */
static void lend(struct bypass_stack *s, struct tcp_conn *c, uint32_t item, struct bypass_buf *out)
{
    struct item_view v = item_view(s, item);
    struct tcp_cold *cold = conn_cold(s, c);
    uint32_t serial = core(s)->lend_serial++;
    *out = (struct bypass_buf){
        .data = (uint8_t *)(uintptr_t)v.data, .len = *v.len, .cap = *v.len, .token = token_of(item, serial)};
    if (item & ITEM_CHUNK) {
        struct chunk *k = chunk_at(s, item & ~(uint32_t)ITEM_CHUNK);
        k->next = CHUNK_LENT | serial >> 16;
        k->off = (uint16_t)serial;
        k->owner[0] = conn_index(s, c);
        k->owner[1] = cold->gen;
    } else {
        mark_frame(s, item, serial, conn_index(s, c), cold->gen);
    }
    core(s)->lent++;
    cold->rcv_lent += out->len;
    c->feat |= TX_LENT;
}

static int recv_zc(struct bypass_stack *s, struct tcp_conn *c, struct bypass_buf *out, int max)
{
    const bool bulk = c->rcv_queued >= WORTH_TUNING;
    uint32_t skip = 0;
    size_t left = SIZE_MAX;
    int n = 0;
    if (unlikely(c->feat & TX_URG_IN))
        left = tcp_urg_limit(s, c, SIZE_MAX, false, &skip);
    if (c->rcv_queued == 0)
        return (int)tcp_recv(s, c, NULL, 1, 0); /* why there is nothing */
    for (; n < max && c->rcvq_head != NO_INDEX && *item_view(s, c->rcvq_head).len <= left; n++) {
        lend(s, c, tcp_rcv_take(s, c), &out[n]);
        left -= out[n].len;
    }
    if (n == 0)
        return -EMSGSIZE; /* the mark of urgent data lies inside of the first piece */
    tcp_rcv_after_read(s, c, bulk);
    return n;
}

static int zc_socket(const struct bypass_stack *s, bypass_sock h, struct tcp_conn **c)
{
    const struct sock *k = sock_get(s, h);
    if (!k)
        return -EBADF;
    if (k->type != SOCK_TCP)
        return k->type == SOCK_UDP ? -EOPNOTSUPP : -ENOTCONN;
    *c = conn_at(s, k->idx);
    return 0;
}

int bypass_recv_zc(struct bypass_stack *s, bypass_sock h, struct bypass_buf *out, int max)
{
    struct tcp_conn *c;
    int err = zc_socket(s, h, &c);
    if (err < 0)
        return err;
    return max > 0 ? recv_zc(s, c, out, max) : -EINVAL;
}

/* ---- Giving back --------------------------------------------------------------------------------------------- */
/* The connection that bytes were lent from, or NULL: it is gone, or the stack is. */
static struct tcp_conn *lender(const struct bypass_stack *s, uint32_t idx, uint32_t gen)
{
    return core_alive(s) && cold_at(s, idx)->gen == gen ? conn_at(s, idx) : NULL;
}

static void settle(struct bypass_stack *s, struct tcp_conn *c, uint32_t len, uint32_t charge)
{
    if (!c)
        return;
    struct tcp_cold *k = conn_cold(s, c);
    c->rcv_charged -= charge;
    k->rcv_lent -= len;
    if (k->rcv_lent == 0)
        c->feat &= ~(uint32_t)TX_LENT;
    if (!(c->flags & TF_DEAD))
        tcp_rcv_window_update(s, c);
}

static bool release_chunk(struct bypass_stack *s, uint32_t i, uint32_t serial)
{
    if (i >= core(s)->chunks.bump)
        return false;
    struct chunk *k = chunk_at(s, i);
    if (k->next != (CHUNK_LENT | serial >> 16) || k->off != (uint16_t)serial)
        return false;
    struct tcp_conn *c = lender(s, k->owner[0], k->owner[1]);
    uint32_t len = k->len;
    chunk_free(s, i);
    core(s)->lent--;
    settle(s, c, len, CHUNK_SIZE);
    return true;
}

static bool release_frame(struct bypass_stack *s, uint64_t token)
{
    struct bypass_pkt_meta *m = lent_frame(s, token);
    if (!m)
        return false;
    bool ours = m->time_ns == core(s)->lend_id, writing = m->rule == NO_INDEX;
    struct tcp_conn *c = ours && !writing ? lender(s, m->rule, m->entry) : NULL;
    uint32_t len = m->data_len;
    m->seg_flags = 0;
    pkt_free(s, token_item(token));
    if (ours) { /* else of a stack that had this memory and device before */
        core(s)->lent--;
        core(s)->writing -= writing;
    }
    settle(s, c, len, s->dev->stride);
    return true;
}

int bypass_release(struct bypass_stack *s, const uint64_t *tokens, int n)
{
    int err = 0;
    for (int i = 0; i < n; i++) {
        uint32_t item = token_item(tokens[i]);
        bool done = item & ITEM_CHUNK ? release_chunk(s, item & ~(uint32_t)ITEM_CHUNK, token_serial(tokens[i]))
                                      : release_frame(s, tokens[i]);
        if (!done)
            err = -EINVAL;
    }
    return err;
}

/* ---- Sending ------------------------------------------------------------------------------------------------- */
int bypass_buf_alloc(struct bypass_stack *s, bypass_sock h, struct bypass_buf *out, int max)
{
    struct tcp_conn *c;
    int n = 0, err = zc_socket(s, h, &c);
    if (err < 0 || max <= 0)
        return err < 0 ? err : -EINVAL;
    for (; n < max && core(s)->writing < s->dev->frames / 4 && !pkt_scarce(s); n++) {
        bypass_pkt p = pkt_alloc(s);
        if (p == BYPASS_PKT_NONE)
            break;
        uint32_t serial = core(s)->lend_serial++, cap = min_u32(s->dev->stride - s->dev->headroom, c->snd_mss);
        mark_frame(s, p, serial, NO_INDEX, 0);
        pkt_meta(s, p)->data_off = s->dev->headroom;
        pkt_meta(s, p)->data_len = (uint16_t)cap;
        core(s)->lent++;
        core(s)->writing++;
        out[n] =
            (struct bypass_buf){.data = pkt_frame(s, p) + s->dev->headroom, .cap = cap, .token = token_of(p, serial)};
    }
    return n > 0 ? n : -ENOBUFS;
}

static bool buffer_good(const struct bypass_stack *s, const struct bypass_buf *b)
{
    const struct bypass_pkt_meta *m = lent_frame(s, b->token);
    return m && m->rule == NO_INDEX && m->time_ns == core(s)->lend_id && b->len > 0 && b->len <= m->data_len;
}

/* Marks every buffer, so that none is named twice. false: one is no good, none is marked. */
static bool take_all(struct bypass_stack *s, const struct bypass_buf *bufs, int n)
{
    for (int i = 0; i < n; i++) {
        if (buffer_good(s, &bufs[i])) {
            pkt_meta(s, token_item(bufs[i].token))->seg_flags = IN_LENT | IN_TAKEN;
            continue;
        }
        while (i-- > 0)
            pkt_meta(s, token_item(bufs[i].token))->seg_flags = IN_LENT;
        return false;
    }
    return true;
}

int bypass_send_zc(struct bypass_stack *s, bypass_sock h, struct bypass_buf *bufs, int n, int flags)
{
    struct tcp_conn *c;
    int err = zc_socket(s, h, &c);
    if (err < 0)
        return err;
    if (n <= 0 || !take_all(s, bufs, n))
        return -EINVAL;
    int taken = tcp_send_frames(s, c, bufs, n, flags);
    uint32_t gone = taken > 0 ? (uint32_t)taken : 0;
    for (uint32_t i = gone; i < (uint32_t)n; i++)
        pkt_meta(s, token_item(bufs[i].token))->seg_flags = IN_LENT;
    memset(bufs, 0, gone * sizeof *bufs);
    core(s)->lent -= gone;
    core(s)->writing -= gone;
    return taken;
}
