/* SPDX-License-Identifier: Apache-2.0 */
/*
 * udp_in.c - datagrams in: validation (RFC 768, RFC 1122 4.1.3), the socket they are for, its bounded queue, reading;
 * and ICMP errors about what was sent.
 *
 * A datagram waits in its frame when that is worth it, else in chunks of the arena: small ones, all when frames are
 * short, those that came in several frames. What it occupies is charged to the socket's receive buffer.
 */
#include <errno.h>

#include "csum.h"
#include "udp.h"

/* ---- Who gets it -------------------------------------------------------------------------------- */

struct flow {
    const addr_t *src, *dst;
    uint16_t src_port, dst_port;
};

/* -1: not for this socket; else the more specific, the higher. */
static int score(const struct udp *u, const struct flow *f)
{
    int points = 0;
    if (u->local_port != f->dst_port) {
        return -1;
    }
    if (udp_has_addr(u)) {
        if (!addr_eq(&u->local, f->dst)) {
            return -1;
        }
        points = 1;
    }
    if (u->flags & UDP_CONNECTED) {
        if (u->peer_port != f->src_port || !addr_eq(&u->peer, f->src)) {
            return -1;
        }
        points += 2;
    }
    return points;
}

/* What a socket of a group (SO_REUSEPORT) bids for a flow: the highest gets it, and when one comes or goes only the
 * flows that it gets or had move. */
static uint64_t bid(const struct bypass_stack *s, const struct udp *u, const struct flow *f)
{
    struct {
        addr_t src;
        uint32_t ports, socket;
    } id = {*f->src, (uint32_t)f->src_port << 16 | f->dst_port, u->sock};
    return siphash13(core(s)->hash_key, &id, sizeof id);
}

static bool grouped(const struct udp *u) { return (u->flags & (UDP_REUSEPORT | UDP_CONNECTED)) == UDP_REUSEPORT; }

/* Among equals: of a group the one that bids most, else (SO_REUSEADDR) the one bound last, as Linux does. */
static struct udp *lookup(const struct bypass_stack *s, const struct flow *f)
{
    struct udp *best = NULL;
    int best_score = -1;
    for (uint32_t link = *udp_bucket(s, f->dst_port); link != 0;) {
        struct udp *u = udp_at(s, link - 1);
        int points = score(u, f);
        bool tie = points == best_score && best != NULL;
        if (points > best_score || (tie && grouped(best) && grouped(u) && bid(s, u, f) > bid(s, best, f))) {
            best = u;
            best_score = points;
        }
        link = u->hash_next;
    }
    return best;
}

/* ---- The queue ---------------------------------------------------------------------------------- */

static uint32_t *q_next(const struct bypass_stack *s, uint32_t q)
{
    return q & UDP_Q_CHUNK ? &chunk_at(s, q & ~(uint32_t)UDP_Q_CHUNK)->owner[0] : &pkt_meta(s, q)->next;
}

static uint32_t charge_of(const struct bypass_stack *s, uint32_t q)
{
    uint32_t cost = 0;
    if (!(q & UDP_Q_CHUNK)) {
        return s->dev->stride;
    }
    for (uint32_t i = q & ~(uint32_t)UDP_Q_CHUNK; i != NO_INDEX; i = chunk_at(s, i)->next) {
        cost += CHUNK_SIZE;
    }
    return cost;
}

static void chunks_free(struct bypass_stack *s, uint32_t first)
{
    while (first != NO_INDEX) {
        uint32_t next = chunk_at(s, first)->next;
        chunk_free(s, first);
        first = next;
    }
}

static void q_free(struct bypass_stack *s, uint32_t q)
{
    if (q & UDP_Q_CHUNK) {
        chunks_free(s, q & ~(uint32_t)UDP_Q_CHUNK);
    } else {
        pkt_free(s, q);
    }
}

static uint32_t q_pop(struct bypass_stack *s, struct udp *u)
{
    uint32_t q = u->q_head;
    u->q_head = *q_next(s, q);
    if (u->q_head == UDP_Q_NONE) {
        u->q_tail = UDP_Q_NONE;
    }
    u->charged -= charge_of(s, q);
    return q;
}

static void q_push(struct bypass_stack *s, struct udp *u, uint32_t q)
{
    *q_next(s, q) = UDP_Q_NONE;
    if (u->q_tail == UDP_Q_NONE) {
        u->q_head = q;
    } else {
        *q_next(s, u->q_tail) = q;
    }
    u->q_tail = q;
    u->charged += charge_of(s, q);
    STAT(s, udp_in);
    sock_event(s, u->sock, BYPASS_IN);
}

void udp_queue_free(struct bypass_stack *s, struct udp *u)
{
    while (u->q_head != UDP_Q_NONE) {
        q_free(s, q_pop(s, u));
    }
}

/* ---- Into chunks -------------------------------------------------------------------------------- */

static uint32_t stored_chunks(uint32_t len)
{
    return (uint32_t)(sizeof(struct udp_stored) + len + CHUNK_DATA - 1) / CHUNK_DATA;
}

/* Room for a datagram of len bytes: a list of empty chunks with the head in place. NO_INDEX: not so many are free. */
static uint32_t store_begin(struct bypass_stack *s, const struct udp_stored *head)
{
    uint32_t first = NO_INDEX;
    for (uint32_t n = stored_chunks(head->len); n > 0; n--) {
        uint32_t i = chunk_alloc(s);
        if (i == NO_INDEX) {
            chunks_free(s, first);
            return NO_INDEX;
        }
        chunk_at(s, i)->next = first;
        first = i;
    }
    memcpy(chunk_at(s, first)->data, head, sizeof *head);
    chunk_at(s, first)->len = sizeof *head;
    return first;
}

/* Appends to the list at chunk *at, which moves on. */
static void store(struct bypass_stack *s, uint32_t *cursor, const uint8_t *data, uint32_t len)
{
    while (len > 0) {
        struct chunk *k = chunk_at(s, *cursor);
        uint32_t n = min_u32(len, CHUNK_DATA - k->len);
        memcpy(k->data + k->len, data, n);
        k->len = (uint16_t)(k->len + n);
        data += n;
        len -= n;
        if (k->len == CHUNK_DATA && len > 0) {
            *cursor = k->next;
        }
    }
}

static bool has_room(struct bypass_stack *s, const struct udp *u, uint32_t cost)
{
    if (u->charged + cost > u->rcvbuf) {
        STAT(s, udp_in_full);
        return false;
    }
    return true;
}

static bool queue_copy(struct bypass_stack *s, struct udp *u, const struct udp_stored *head, const uint8_t *payload)
{
    uint32_t first = store_begin(s, head), cursor = first;
    if (first == NO_INDEX) {
        return false;
    }
    store(s, &cursor, payload, head->len);
    q_push(s, u, first | UDP_Q_CHUNK);
    return true;
}

/* ---- In ----------------------------------------------------------------------------------------- */

static void queue_one(struct bypass_stack *s, struct udp *u, bypass_pkt p, const struct udp_stored *head,
                      const uint8_t *payload)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    bool copy = pkt_should_copy(s, head->len);
    if (!has_room(s, u, copy ? stored_chunks(head->len) * CHUNK_SIZE : s->dev->stride)) {
        pkt_free(s, p);
        return;
    }
    if (copy && queue_copy(s, u, head, payload)) {
        pkt_free(s, p);
        return;
    }
    if (s->dev->free_frames < s->dev->frames / 4) { /* neither chunks nor frames to spare */
        STAT(s, udp_in_no_memory);
        pkt_free(s, p);
        return;
    }
    m->data_off = (uint16_t)(payload - pkt_frame(s, p));
    m->data_len = (uint16_t)head->len;
    q_push(s, u, p);
}

/* To every socket that would take it (RFC 1122 4.1.3.6); none of them may have the frame. */
static void queue_all(struct bypass_stack *s, const struct flow *f, const struct udp_stored *head,
                      const uint8_t *payload)
{
    bool found = false;
    for (uint32_t link = *udp_bucket(s, f->dst_port); link != 0;) {
        struct udp *u = udp_at(s, link - 1);
        link = u->hash_next;
        if (score(u, f) < 0) {
            continue;
        }
        found = true;
        if (has_room(s, u, stored_chunks(head->len) * CHUNK_SIZE) && !queue_copy(s, u, head, payload)) {
            STAT(s, udp_in_no_memory);
        }
    }
    STAT_ADD(s, udp_in_no_socket, !found);
}

static void refuse(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri)
{
    STAT(s, udp_in_no_socket);
    if (core(s)->cfg.flags & BYPASS_F_RST) {
        icmp_unreachable(s, p, ri, ICMP_UNREACH_PORT);
    }
}

void udp_in(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    const uint8_t *udp = pkt_data(s, p) + ri->l4_off;
    if (ri->l4_len < UDP_LEN) {
        STAT(s, udp_in_short);
        pkt_free(s, p);
        return;
    }
    uint32_t len = rd16(udp + UDP_SIZE);
    if (len < UDP_LEN || len > ri->l4_len) {
        STAT(s, udp_in_bad_length);
        pkt_free(s, p);
        return;
    }
    if (rd16(udp + UDP_CSUM) != 0 && !(m->flags & BYPASS_RX_CSUM_OK) &&
        csum_fold(csum_bytes(udp, len, csum_pseudo(&ri->src, &ri->dst, PROTO_UDP, len))) != 0) {
        STAT(s, udp_in_bad_checksum);
        pkt_free(s, p);
        return;
    }
    struct flow f = {&ri->src, &ri->dst, rd16(udp + UDP_SRC), rd16(udp + UDP_DST)};
    struct udp_stored head = {.src = ri->src, .len = len - UDP_LEN, .port = f.src_port, .queue = m->queue};
    if (unlikely(ri->multicast)) {
        queue_all(s, &f, &head, udp + UDP_LEN);
        pkt_free(s, p);
        return;
    }
    struct udp *u = lookup(s, &f);
    if (u != NULL) {
        queue_one(s, u, p, &head, udp + UDP_LEN);
        return;
    }
    refuse(s, p, ri);
    pkt_free(s, p);
}

static const uint8_t *piece(const struct bypass_stack *s, bypass_pkt p)
{
    const uint8_t *ip = pkt_data(s, p);
    return ip + (ip[IP4_VER_IHL] & 15) * 4;
}

/* Every piece but the last is a multiple of 8 bytes: their sums add up. */
static bool large_sum_ok(struct bypass_stack *s, bypass_pkt p, const struct rx_info *ri, uint32_t len)
{
    uint32_t sum = csum_pseudo(&ri->src, &ri->dst, PROTO_UDP, len);
    if (rd16(piece(s, p) + UDP_CSUM) == 0) {
        return true;
    }
    for (uint32_t n; p != BYPASS_PKT_NONE && len > 0; p = pkt_meta(s, p)->next, len -= n) {
        n = min_u32(len, pkt_meta(s, p)->data_len);
        sum = csum_bytes(piece(s, p), n, sum);
    }
    return csum_fold(sum) == 0;
}

static void queue_large(struct bypass_stack *s, struct udp *u, bypass_pkt p, const struct udp_stored *head)
{
    uint32_t first, cursor, left = head->len, skip = UDP_LEN;
    if (!has_room(s, u, stored_chunks(left) * CHUNK_SIZE)) {
        return;
    }
    first = cursor = store_begin(s, head);
    if (first == NO_INDEX) {
        STAT(s, udp_in_no_memory);
        return;
    }
    for (; p != BYPASS_PKT_NONE && left > 0; p = pkt_meta(s, p)->next) {
        uint32_t n = min_u32(left, pkt_meta(s, p)->data_len - skip);
        store(s, &cursor, piece(s, p) + skip, n);
        left -= n;
        skip = 0;
    }
    q_push(s, u, first | UDP_Q_CHUNK);
}

void udp_in_large(struct bypass_stack *s, bypass_pkt head, const struct rx_info *ri)
{
    const uint8_t *udp = piece(s, head); /* the first piece has 8 bytes at least */
    uint32_t len = rd16(udp + UDP_SIZE);
    struct flow f = {&ri->src, &ri->dst, rd16(udp + UDP_SRC), rd16(udp + UDP_DST)};
    if (len < UDP_LEN || len > ri->l4_len) {
        STAT(s, udp_in_bad_length);
    } else if (!large_sum_ok(s, head, ri, len)) {
        STAT(s, udp_in_bad_checksum);
    } else {
        struct udp_stored d = {.src = ri->src, .len = len - UDP_LEN, .port = f.src_port};
        d.queue = pkt_meta(s, head)->queue;
        struct udp *u = lookup(s, &f);
        if (u != NULL) {
            queue_large(s, u, head, &d);
        } else {
            refuse(s, head, ri);
        }
    }
    pkt_free_list(s, head);
}

/* RFC 1122 4.1.3.3. Only a connected socket is told (as on Linux without IP_RECVERR): the quoted peer is its peer. */
void udp_icmp_error(struct bypass_stack *s, const struct icmp_error *e)
{
    enum { PMTU_MIN = 552 }; /* what is below is not believed: everybody can send us this */
    struct flow f = {&e->dst, &e->src, e->dst_port, e->src_port};
    struct udp *u = lookup(s, &f);
    if (u == NULL) {
        return;
    }
    struct dst *d = e->mtu != 0 ? dst_find(s, &e->dst) : NULL;
    if (d != NULL) {
        dst_lower_mtu(s, d, e->mtu < PMTU_MIN ? PMTU_MIN : e->mtu);
    }
    if (e->hard && (u->flags & UDP_CONNECTED)) {
        STAT(s, udp_in_error);
        u->err = e->err;
        sock_event(s, u->sock, BYPASS_ERR);
    }
}

/* ---- Reading ------------------------------------------------------------------------------------ */

static void chunks_read(const struct bypass_stack *s, uint32_t i, uint8_t *to, uint32_t n)
{
    for (uint32_t skip = sizeof(struct udp_stored); n > 0; i = chunk_at(s, i)->next, skip = 0) {
        const struct chunk *k = chunk_at(s, i);
        uint32_t part = min_u32(n, k->len - skip);
        memcpy(to, k->data + skip, part);
        to += part;
        n -= part;
    }
}

/* Copies at most n bytes; tells what the datagram is. */
static struct udp_stored q_read(const struct bypass_stack *s, uint32_t q, void *buf, size_t n)
{
    struct udp_stored head;
    if (q & UDP_Q_CHUNK) {
        uint32_t first = q & ~(uint32_t)UDP_Q_CHUNK;
        memcpy(&head, chunk_at(s, first)->data, sizeof head);
        chunks_read(s, first, buf, (uint32_t)(n < head.len ? n : head.len));
        return head;
    }
    const struct bypass_pkt_meta *m = pkt_meta(s, q);
    const uint8_t *payload = pkt_frame(s, q) + m->data_off;
    head = (struct udp_stored){.src = addr_from_v4(pkt_data(s, q) + IP4_SRC), .len = m->data_len, .queue = m->queue};
    head.port = rd16(payload - UDP_LEN + UDP_SRC);
    if (n > 0 && head.len > 0) {
        memcpy(buf, payload, n < head.len ? n : head.len);
    }
    return head;
}

int64_t udp_recvfrom(struct bypass_stack *s, uint32_t idx, void *buf, size_t n, int flags, struct bypass_endpoint *from)
{
    struct udp *u = udp_at(s, idx);
    if (u->err != 0) {
        return -udp_error(s, idx);
    }
    if (u->q_head == UDP_Q_NONE) {
        return -EAGAIN; /* also after shutdown(), as on Linux: who would wait sees BYPASS_RDHUP */
    }
    struct udp_stored head = q_read(s, u->q_head, buf, n);
    if (from != NULL) {
        *from = (struct bypass_endpoint){.addr = head.src, .port = head.port};
    }
    if (!(flags & BYPASS_PEEK)) {
        u->queue = head.queue;
        q_free(s, q_pop(s, u));
    }
    return (flags & BYPASS_TRUNC) != 0 || n > head.len ? head.len : (int64_t)n;
}
