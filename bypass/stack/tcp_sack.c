/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_sack.c - the scoreboard: which of the frames in flight the peer has (RFC 2018, sender's half), which
 * are lost, which were sent again; duplicates that the peer reports (D-SACK, RFC 2883). What counts as lost
 * is tcp_rack.c's to say, what follows from it tcp_recover.c's.
 *
 * A frame that was sent is in one of five states, told by its seg_flags:
 *
 *     -                      sent once, nothing heard. In no list: the send queue has them in the order of sending
 *     SEG_SACKED             the peer has it
 *     SEG_LOST               to be sent again                           in flight.lost_list
 *     SEG_LOST | SEG_RTX     ... once more                              in flight.again_list
 *     SEG_RTX                sent again, nothing heard                  in flight.resent_list, in the order of sending
 *
 * so that no step has to walk the queue: the next frame to send again is the lower of two heads, those that
 * RACK looks at are a prefix of `resent` and a stretch of the queue behind a cursor that only moves on. An ACK
 * costs what it changes: a block that was seen before is skipped, a walk over frames marks them, a run of
 * SACKed frames is one step (meta.after leads to its end, as in union-find), and the frame at which a block
 * begins is found from where earlier blocks ended or by landmarks, every 64th frame, each pointing to the next.
 */
#include "tcp.h"

/* ---- Lists of frames ------------------------------------------------------------------------------------- */
static void list_push(struct bypass_stack *s, struct frame_list *l, bypass_pkt p)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->prev = l->tail;
    m->after = BYPASS_PKT_NONE;
    *(l->tail != BYPASS_PKT_NONE ? &pkt_meta(s, l->tail)->after : &l->head) = p;
    l->tail = p;
}

static void list_push_front(struct bypass_stack *s, struct frame_list *l, bypass_pkt p)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->prev = BYPASS_PKT_NONE;
    m->after = l->head;
    *(l->head != BYPASS_PKT_NONE ? &pkt_meta(s, l->head)->prev : &l->tail) = p;
    l->head = p;
}

static void list_insert_behind(struct bypass_stack *s, struct frame_list *l, bypass_pkt at, bypass_pkt p)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p), *a = pkt_meta(s, at);
    m->prev = at;
    m->after = a->after;
    *(a->after != BYPASS_PKT_NONE ? &pkt_meta(s, a->after)->prev : &l->tail) = p;
    a->after = p;
}

static void list_remove(struct bypass_stack *s, struct frame_list *l, bypass_pkt p)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    *(m->prev != BYPASS_PKT_NONE ? &pkt_meta(s, m->prev)->after : &l->head) = m->after;
    *(m->after != BYPASS_PKT_NONE ? &pkt_meta(s, m->after)->prev : &l->tail) = m->prev;
}

/* The list that a frame with these flags is in; NULL: none. */
static struct frame_list *list_of(struct tcp_flight *fl, uint16_t seg_flags)
{
    if (seg_flags & SEG_SACKED)
        return NULL;
    if (seg_flags & SEG_LOST)
        return seg_flags & SEG_RTX ? &fl->again_list : &fl->lost_list;
    return seg_flags & SEG_RTX ? &fl->resent_list : NULL;
}

static void leave_list(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl, bypass_pkt p)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    struct frame_list *l = list_of(fl, m->seg_flags);
    if (!l)
        return;
    list_remove(s, l, p);
    if (l == &fl->resent_list)
        fl->resent_frames--;
    else
        c->lost_bytes -= m->data_len;
}

/* ---- Marks ------------------------------------------------------------------------------------------------- */
void tcp_sack_mark_lost(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p)
{
    struct tcp_flight *fl = conn_flight(s, c);
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    if (m->seg_flags & (SEG_LOST | SEG_SACKED))
        return;
    if (m->seg_flags & SEG_RTX)
        STAT(s, tcp_lost_retransmits);
    leave_list(s, c, fl, p);
    m->seg_flags |= SEG_LOST;
    list_push(s, list_of(fl, m->seg_flags), p);
    c->lost_bytes += m->data_len;
    fl->lost += m->data_len;
}

/* The frame goes out again now. */
void tcp_sack_mark_resent(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p)
{
    struct tcp_flight *fl = conn_flight(s, c);
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    leave_list(s, c, fl, p);
    m->seg_flags = (uint16_t)((m->seg_flags & ~SEG_LOST) | SEG_RTX);
    list_push(s, &fl->resent_list, p);
    fl->resent_frames++;
}

/* The lowest of what is lost (RFC 6675 4, NextSeg() rule 1): with several holes the receiver's first is filled first. */
bypass_pkt tcp_sack_next_lost(const struct bypass_stack *s, const struct tcp_flight *fl)
{
    if (fl->lost_list.head == BYPASS_PKT_NONE || fl->again_list.head == BYPASS_PKT_NONE)
        return fl->lost_list.head == BYPASS_PKT_NONE ? fl->again_list.head : fl->lost_list.head;
    bool again = seq_lt(seq(pkt_meta(s, fl->again_list.head)->seq), seq(pkt_meta(s, fl->lost_list.head)->seq));
    return again ? fl->again_list.head : fl->lost_list.head;
}

/* What was called lost was not, and waits for its ACK again. What had been sent again before goes to the front of
 * `resent_list`: the frames there left later. */
void tcp_sack_unmark_lost(struct bypass_stack *s, struct tcp_conn *c)
{
    const struct frame_list none = {BYPASS_PKT_NONE, BYPASS_PKT_NONE};
    struct tcp_flight *fl = conn_flight(s, c);
    bypass_pkt p, before;
    for (p = fl->lost_list.head; p != BYPASS_PKT_NONE; p = pkt_meta(s, p)->after)
        pkt_meta(s, p)->seg_flags &= (uint16_t)~SEG_LOST;
    for (p = fl->again_list.tail; p != BYPASS_PKT_NONE; p = before) {
        before = pkt_meta(s, p)->prev;
        pkt_meta(s, p)->seg_flags &= (uint16_t)~SEG_LOST;
        list_push_front(s, &fl->resent_list, p);
        fl->resent_frames++;
    }
    fl->lost_list = fl->again_list = none;
    c->lost_bytes = 0;
    fl->cursor.pkt = BYPASS_PKT_NONE;
    c->flags &= ~(uint32_t)TF_FIN_LOST;
}

/* The rest of a frame that was split stands where the frame does. */
void tcp_sack_split(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, bypass_pkt rest)
{
    struct tcp_flight *fl = conn_flight(s, c);
    struct frame_list *l = list_of(fl, pkt_meta(s, rest)->seg_flags);
    if (!l)
        return;
    list_insert_behind(s, l, p, rest);
    if (l == &fl->resent_list)
        fl->resent_frames++;
}

/* The cumulative ACK covers this frame, which is marked or was sent before something that is. false: a SACK had
 * told before that the peer has it. */
bool tcp_sack_acked(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, const struct segment *g,
                    struct tcp_sample *sm)
{
    struct tcp_flight *fl = conn_flight(s, c);
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    if (m->seg_flags & SEG_SACKED) {
        fl->sacked_bytes -= m->data_len;
        fl->sacked_frames--;
        sm->delivered -= m->data_len;
        return false;
    }
    leave_list(s, c, fl, p);
    tcp_rack_delivered(s, c, m, g, sm);
    return true;
}

/* ---- Finding frames ----------------------------------------------------------------------------------------- */
void tcp_sack_landmark(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p)
{
    struct tcp_flight *fl = conn_flight(s, c);
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    fl->unlandmarked = 0;
    m->skip = BYPASS_PKT_NONE;
    m->seg_flags |= SEG_LANDMARK;
    if (fl->landmark != BYPASS_PKT_NONE && seq_geq(fl->landmark_seq, c->snd_una))
        pkt_meta(s, fl->landmark)->skip = p;
    fl->landmark = p;
    fl->landmark_seq = seq(m->seq);
}

static void remember(struct bypass_stack *s, struct tcp_flight *fl, bypass_pkt p)
{
    fl->hint[fl->hint_next++ % SACK_HINTS] = (struct sack_hint){p, seq(pkt_meta(s, p)->seq)};
}

/* The sent frame that holds `at`, which is sent and not acknowledged; NONE: only the FIN does. */
static bypass_pkt find_frame(const struct bypass_stack *s, const struct tcp_conn *c, const struct tcp_flight *fl,
                             seq_t at)
{
    bypass_pkt p = c->sndq_head, next;
    seq_t from = c->snd_una;
    for (uint32_t i = 0; i < SACK_HINTS; i++) {
        const struct sack_hint *h = &fl->hint[i];
        if (tcp_hint_ok(c, h) && seq_leq(h->at, at) && seq_gt(h->at, from)) {
            p = h->pkt;
            from = h->at;
        }
    }
    while (p != c->sndq_next && p != BYPASS_PKT_NONE) {
        const struct bypass_pkt_meta *m = pkt_meta(s, p);
        if (seq_lt(at, seq_add(seq(m->seq), m->data_len)))
            return p;
        next = m->seg_flags & SEG_LANDMARK ? m->skip : BYPASS_PKT_NONE;
        p = next != BYPASS_PKT_NONE && seq_leq(seq(pkt_meta(s, next)->seq), at) ? next : m->next;
    }
    return BYPASS_PKT_NONE;
}

bypass_pkt tcp_sack_last_sent(const struct bypass_stack *s, const struct tcp_conn *c)
{
    const struct tcp_flight *fl = conn_flight(s, c);
    bool near = fl->landmark != BYPASS_PKT_NONE && seq_geq(fl->landmark_seq, c->snd_una);
    bypass_pkt p = near ? fl->landmark : c->sndq_head, last = BYPASS_PKT_NONE;
    for (; p != c->sndq_next && p != BYPASS_PKT_NONE; p = pkt_meta(s, p)->next)
        last = p;
    return last;
}

/* The last frame of the run of SACKed frames that p is in, as far as is known; shortens the way for the next. */
static bypass_pkt run_end(struct bypass_stack *s, bypass_pkt p)
{
    bypass_pkt end = p;
    while (pkt_meta(s, end)->after != end)
        end = pkt_meta(s, end)->after;
    while (p != end) {
        bypass_pkt next = pkt_meta(s, p)->after;
        pkt_meta(s, p)->after = end;
        p = next;
    }
    return end;
}

/* ---- SACK blocks (RFC 2018 5) ------------------------------------------------------------------------------- */
static void sack_frame(struct bypass_stack *s, struct tcp_conn *c, bypass_pkt p, const struct segment *g,
                       struct tcp_sample *sm)
{
    struct tcp_flight *fl = conn_flight(s, c);
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    leave_list(s, c, fl, p);
    tcp_rate_delivered(s, c, p, sm);
    tcp_rack_delivered(s, c, m, g, sm);
    if (!(m->seg_flags & SEG_RTX))
        sm->rtt_us = max_u64(tcp_frame_age_us(s, m), 1); /* the newest of them counts */
    m->seg_flags = (uint16_t)((m->seg_flags & ~SEG_LOST) | SEG_SACKED);
    m->after = p;
    fl->sacked_bytes += m->data_len;
    fl->sacked_frames++;
    sm->sacked += m->data_len;
    sm->delivered += m->data_len;
}

/* Marks the frames that lie wholly within b. */
static void take_block(struct bypass_stack *s, struct tcp_conn *c, const struct sack_block *b, const struct segment *g,
                       struct tcp_sample *sm)
{
    struct tcp_flight *fl = conn_flight(s, c);
    bypass_pkt p = find_frame(s, c, fl, b->first), run = BYPASS_PKT_NONE;
    if (p != BYPASS_PKT_NONE && seq_lt(seq(pkt_meta(s, p)->seq), b->first))
        p = pkt_meta(s, p)->next; /* the peer has a part of it: it has to come again */
    while (p != BYPASS_PKT_NONE && p != c->sndq_next) {
        struct bypass_pkt_meta *m = pkt_meta(s, p);
        if (seq_gt(seq_add(seq(m->seq), m->data_len), b->end))
            break;
        if (!(m->seg_flags & SEG_SACKED))
            sack_frame(s, c, p, g, sm);
        if (run != BYPASS_PKT_NONE)
            pkt_meta(s, run)->after = p;
        run = run_end(s, p);
        p = pkt_meta(s, run)->next;
    }
    if (run != BYPASS_PKT_NONE)
        remember(s, fl, run);
}

/* RFC 2883 4: the first block reports a duplicate when it lies below the ACK, or within the second block. */
static bool is_dsack(const struct segment *g)
{
    const struct sack_block *b = g->opt.sack;
    if (seq_lt(b[0].first, g->ack))
        return true;
    return g->opt.sacks > 1 && seq_geq(b[0].first, b[1].first) && seq_leq(b[0].end, b[1].end);
}

/* Something arrived twice. It counts when it can have been a segment that we sent twice (RFC 3708 2); what is longer than
 * any window was, or was never sent, is a lie. */
static void take_dsack(struct bypass_stack *s, struct tcp_conn *c, const struct sack_block *b, struct tcp_sample *sm)
{
    struct tcp_flight *fl = conn_flight(s, c);
    uint32_t len = b->end.v - b->first.v, frames = (len + c->snd_mss - 1) / max_u32(c->snd_mss, 1);
    if (seq_geq(b->first, b->end) || seq_gt(b->end, c->snd_nxt) || len > max_u32(c->snd_wnd_max, 65535)) {
        STAT(s, tcp_sack_ignored);
        return;
    }
    STAT(s, tcp_in_dsacks);
    if (conn_cold(s, c)->retransmits == 0)
        return; /* the network duplicated it */
    if (fl->tlp_out && fl->tlp_rtx && seq_eq(b->end, fl->tlp_end)) {
        sm->dsack_tlp = true;
        return;
    }
    sm->dsack = true;
    if (fl->undo && seq_gt(b->end, fl->undo_una) && fl->undo_rtx != UNDO_NONE_SENT)
        fl->undo_rtx -= min_u32(fl->undo_rtx, frames);
}

static bool seen_before(const struct tcp_flight *fl, const struct sack_block *b)
{
    for (uint32_t i = 0; i < SACK_BLOCKS; i++)
        if (seq_leq(fl->seen[i].first, b->first) && seq_geq(fl->seen[i].end, b->end))
            return true;
    return false;
}

static bool block_ok(const struct tcp_conn *c, const struct sack_block *b)
{
    return seq_lt(b->first, b->end) && seq_geq(b->first, c->snd_una) && seq_leq(b->end, c->snd_nxt);
}

/* The blocks of an ACK that are about data in flight, lowest first. Returns how many. */
static uint32_t sort_blocks(struct bypass_stack *s, const struct tcp_conn *c, const struct sack_block *b, uint32_t n,
                            struct sack_block *out)
{
    uint32_t ok = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (!block_ok(c, &b[i])) {
            STAT(s, tcp_sack_ignored);
            continue;
        }
        uint32_t at = ok++;
        for (; at > 0 && seq_gt(out[at - 1].first, b[i].first); at--)
            out[at] = out[at - 1];
        out[at] = b[i];
    }
    return ok;
}

/* RFC 6675 4, Update(), for the blocks; the cumulative ACK comes by tcp_sack_acked(). */
void tcp_sack_in(struct bypass_stack *s, struct tcp_conn *c, const struct segment *g, struct tcp_sample *sm)
{
    struct tcp_flight *fl = conn_flight(s, c);
    bool dsack = is_dsack(g);
    struct sack_block b[SACK_BLOCKS];
    if (dsack)
        take_dsack(s, c, g->opt.sack, sm);
    uint32_t n = sort_blocks(s, c, g->opt.sack + dsack, g->opt.sacks - dsack, b);
    for (uint32_t i = 0; i < n; i++)
        if (!seen_before(fl, &b[i]))
            take_block(s, c, &b[i], g, sm);
    if (n == 0)
        return;
    for (uint32_t i = 0; i < SACK_BLOCKS; i++)
        fl->seen[i] = i < n ? b[i] : (struct sack_block){c->snd_una, c->snd_una};
}

/* ---- Beginning and end ------------------------------------------------------------------------------------ */
/* Nothing is SACKed: what is remembered of earlier scoreboards is older than half of the sequence space may be. */
void tcp_sack_begin(struct tcp_conn *c, struct tcp_flight *fl)
{
    fl->fack = c->snd_una;
    fl->cursor.pkt = BYPASS_PKT_NONE;
    for (uint32_t i = 0; i < SACK_HINTS; i++)
        fl->hint[i].pkt = BYPASS_PKT_NONE;
    for (uint32_t i = 0; i < SACK_BLOCKS; i++)
        fl->seen[i] = (struct sack_block){c->snd_una, c->snd_una};
}

/* RFC 2018 8: the peer may have thrown away what it SACKed. */
static void forget_sacks(struct bypass_stack *s, struct tcp_conn *c, struct tcp_flight *fl)
{
    STAT(s, tcp_sack_reneged);
    for (bypass_pkt p = c->sndq_head; p != BYPASS_PKT_NONE && p != c->sndq_next; p = pkt_meta(s, p)->next) {
        struct bypass_pkt_meta *m = pkt_meta(s, p);
        if (!(m->seg_flags & SEG_SACKED))
            continue;
        m->seg_flags = (uint16_t)((m->seg_flags & ~SEG_SACKED) | SEG_RTX); /* no round trip from it any more */
        list_push(s, &fl->resent_list, p);
        fl->resent_frames++;
    }
    fl->sacked_bytes = fl->sacked_frames = 0;
    tcp_sack_begin(c, fl);
}

bool tcp_sack_reneged(const struct bypass_stack *s, const struct tcp_conn *c)
{
    return c->sndq_head != c->sndq_next && c->sndq_head != BYPASS_PKT_NONE &&
           (pkt_meta(s, c->sndq_head)->seg_flags & SEG_SACKED);
}

/* After a timeout: everything that is not SACKed counts as lost, except what left so recently that RACK expects its
 * ACK yet (RFC 8985 6.3; `but_recent`). The head is lost in any case. */
void tcp_sack_mark_all_lost(struct bypass_stack *s, struct tcp_conn *c, bool but_recent)
{
    struct tcp_flight *fl = conn_flight(s, c);
    if (tcp_sack_reneged(s, c))
        forget_sacks(s, c, fl);
    fl->lost_list = fl->again_list =
        (struct frame_list){BYPASS_PKT_NONE, BYPASS_PKT_NONE}; /* anew, in the queue's order */
    c->lost_bytes = 0;
    for (bypass_pkt p = c->sndq_head; p != BYPASS_PKT_NONE && p != c->sndq_next; p = pkt_meta(s, p)->next) {
        const struct bypass_pkt_meta *m = pkt_meta(s, p);
        if ((m->seg_flags & (SEG_LOST | SEG_SACKED)) == SEG_LOST) {
            list_push(s, list_of(fl, m->seg_flags), p);
            c->lost_bytes += m->data_len;
        } else if (p == c->sndq_head || !but_recent || tcp_rack_overdue(s, c, m)) {
            tcp_sack_mark_lost(s, c, p);
        }
    }
    if ((c->flags & TF_FIN_SENT) && seq_lt(c->snd_una, c->snd_nxt))
        c->flags |= TF_FIN_LOST;
}
