/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_fast.c - the short way of the segment that nearly every segment is: IPv4 without options, TCP with timestamps
 * and nothing else, next in order, on an established connection that recovers from nothing (header prediction, Van
 * Jacobson 1990). One function checks all headers that eth.c, ipv4.c and tcp_in.c would check one after the other, and
 * changes nothing before it is sure; whatever is unusual goes the long way, which does the same for such a segment:
 * tests/test_tcp_fast.py compares the two.
 */
#include "csum.h"
#include "tcp.h"
#include "wire.h"

enum { PLAIN = ETH_LEN + IP4_LEN, PLAIN_TS = TCP_HDR + TCP_TS_BYTES };

static inline uint64_t load64(const void *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}
static inline uint32_t load32(const void *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
}
static inline uint16_t load16(const void *p)
{
    uint16_t v;
    memcpy(&v, p, 2);
    return v;
}

/* ---- Phase one: which flow --------------------------------------------------------------------------- */
/* Whole TCP segments in IPv4 headers without options; nothing is verified yet. */
static inline bool is_plain_tcp(const uint8_t *eth, uint32_t len)
{
    const uint8_t *ip = eth + ETH_LEN;
    return len >= PLAIN + TCP_HDR && load16(eth + ETH_TYPE) == __builtin_bswap16(ETH_TYPE_IPV4) &&
           ip[IP4_VER_IHL] == 0x45 && ip[IP4_PROTO] == PROTO_TCP && (load16(ip + IP4_FRAG) & 0xff3f) == 0;
}

/* Hashes the flows of a batch and fetches their places in the flow table. */
void tcp_fast_prefetch(struct bypass_stack *s, const bypass_pkt *pkts, struct rx_flow *flows, int n)
{
    const struct flow_slot *table = flow_table(s);
    uint32_t mask = tcp_head(s)->table_mask;
    for (int i = 0; i < n; i++) {
        const uint8_t *eth = pkt_data(s, pkts[i]);
        flows[i].idx = 0;
        flows[i].plain = is_plain_tcp(eth, pkt_meta(s, pkts[i])->len);
        if (!flows[i].plain)
            continue;
        flows[i].hash = hash_flow(s, load64(eth + ETH_LEN + IP4_SRC), load32(eth + PLAIN));
        __builtin_prefetch(&table[flows[i].hash & mask]);
        if (i + 1 < n)
            __builtin_prefetch(pkt_data(s, pkts[i + 1]));
    }
}

/* Its place has arrived: fetches its connection. */
void tcp_fast_prefetch_conn(const struct bypass_stack *s, struct rx_flow *f)
{
    uint32_t idx = f->idx = f->plain ? flow_table(s)[f->hash & tcp_head(s)->table_mask].idx : 0;
    if (idx == 0)
        return;
    const uint8_t *c = (const uint8_t *)conn_at(s, idx - 1);
    for (uint32_t off = 0; off < sizeof(struct tcp_conn); off += 64)
        __builtin_prefetch(c + off);
    __builtin_prefetch(cold_at(s, idx - 1)); /* its first line */
}

/* ---- Phase two: is it the usual? ---------------------------------------------------------------------- */
static inline struct tcp_conn *find_plain(const struct bypass_stack *s, uint32_t hash, const uint8_t *ip)
{
    const struct flow_slot *table = flow_table(s);
    uint32_t mask = tcp_head(s)->table_mask;
    uint32_t src = load32(ip + IP4_SRC), dst = load32(ip + IP4_DST);
    uint32_t ports = (uint32_t)rd16(ip + IP4_LEN) << 16 | rd16(ip + IP4_LEN + 2);
    for (uint32_t i = hash & mask; table[i].idx != 0; i = (i + 1) & mask) {
        if (table[i].hash != hash)
            continue;
        struct tcp_conn *c = conn_at(s, table[i].idx - 1);
        if (load32(addr_v4(&c->raddr)) == src && load32(addr_v4(&c->laddr)) == dst &&
            ((uint32_t)c->rport << 16 | c->lport) == ports && addr_is_v4(&c->raddr))
            return c;
    }
    return NULL;
}

/* Established, timestamps agreed, and nothing in the way. */
static inline bool is_usual(const struct tcp_conn *c)
{
    const uint32_t flags =
        TF_TS | TF_FIN_QUEUED | TF_FIN_IN | TF_FIN_AHEAD | TF_RECOVERY | TF_LOSS | TF_RCV_SHUT | TF_PROBING | TF_DEAD;
    const uint32_t feat =
        TX_ECE | TX_CWR | TX_DSACK | TX_URG_IN | TX_URG_OUT | TX_PMTU_PROBE | TX_KEEP_FRAMES | TX_SPARE;
    return c->state == BYPASS_ESTABLISHED && (c->flags & flags) == TF_TS && (c->feat & feat) == 0 &&
           c->ooo == NO_INDEX && c->sock != NO_INDEX;
}

static inline bool ip_ok(const uint8_t *ip, uint32_t len, uint32_t total)
{
    return total >= IP4_LEN + PLAIN_TS && total <= len && (ip[IP4_TOS] & 3) != 3 && /* no mark of congestion */
           csum_ipv4_header(load64(ip), load64(ip + 8), load32(ip + 16)) == 0;
}

static inline bool tcp_checksum_ok(const struct bypass_pkt_meta *m, const uint8_t *ip, uint32_t len)
{
    if (m->flags & BYPASS_RX_CSUM_OK)
        return true;
    uint32_t pseudo = csum_add(csum_add(load32(ip + IP4_SRC), load32(ip + IP4_DST)),
                               (uint32_t)__builtin_bswap16((uint16_t)len) + __builtin_bswap16(PROTO_TCP));
    return csum_fold(csum_small(ip + IP4_LEN, len, pseudo)) == 0;
}

/* The segment in g, when it is the usual one; false: look at it with care. */
static inline bool predicted(const struct bypass_stack *s, const struct tcp_conn *c, const struct bypass_pkt_meta *m,
                             const uint8_t *eth, struct segment *g)
{
    const uint8_t *ip = eth + ETH_LEN, *h = ip + IP4_LEN;
    uint32_t total = rd16(ip + IP4_TOTAL);
    /* 32 bytes of header, ACK with or without PSH, and the usual layout of timestamps */
    if ((load16(h + 12) & 0xf7ff) != __builtin_bswap16(0x8010) || load32(h + TCP_HDR) != TCP_TS_PREFIX)
        return false;
    if (!is_usual(c) || !ip_ok(ip, m->len - ETH_LEN, total) || memcmp(eth + ETH_DST, s->dev->mac, 6) != 0)
        return false;
    g->seq = seq(rd32(h + 4));
    g->ack = seq(rd32(h + 8));
    g->len = total - IP4_LEN - PLAIN_TS;
    g->opt.ts_val = rd32(h + TCP_HDR + 4);
    g->opt.ts_ecr = rd32(h + TCP_HDR + 8);
    return seq_eq(g->seq, c->rcv_nxt) && g->len <= c->rcv_adv.v - c->rcv_nxt.v &&
           (int32_t)(g->opt.ts_val - c->ts_recent) >= 0 && g->ack.v - c->snd_una.v <= c->snd_nxt.v - c->snd_una.v &&
           (g->len > 0 || !seq_eq(g->ack, c->snd_una)) && tcp_checksum_ok(m, ip, total - IP4_LEN);
}

/* ---- Phase three: what it does ------------------------------------------------------------------------- */
/* May the next segments of the batch go with this one? Those of a bulk transfer, which are kept in their frames and
 * whose ACK can wait for the last of them. */
static inline bool may_be_train(const struct bypass_stack *s, const struct tcp_conn *c, const struct segment *g)
{
    return !tcp_has_output(c) && g->len > COPY_BREAK && g->len >= c->rcv_mss && c->quick_acks == 0 &&
           !pkt_should_copy(s, g->len) && c->rcv_charged <= c->rcvbuf && !(c->feat & TX_LENT) &&
           (!has_flight(c) || (conn_flight(s, c)->ca_state == CA_OPEN && !conn_flight(s, c)->tlp_out));
}

/* The segment behind `end`, of the same kind as the first: same acknowledgment and window. Its length, or 0. */
static inline uint32_t follows(const struct bypass_stack *s, const struct tcp_conn *c, bypass_pkt p, seq_t end,
                               const uint8_t *first)
{
    const struct bypass_pkt_meta *m = pkt_meta(s, p);
    const uint8_t *eth = pkt_data(s, p), *ip = eth + ETH_LEN, *h = ip + IP4_LEN;
    uint32_t total = rd16(ip + IP4_TOTAL);
    if (memcmp(eth, first, ETH_LEN) != 0 || load64(ip + IP4_SRC) != load64(first + ETH_LEN + IP4_SRC) ||
        load32(h) != load32(first + PLAIN) || load32(h + 8) != load32(first + PLAIN + 8) ||
        load16(h + 14) != load16(first + PLAIN + 14) || (load16(h + 12) & 0xf7ff) != __builtin_bswap16(0x8010) ||
        load32(h + TCP_HDR) != TCP_TS_PREFIX || rd32(h + 4) != end.v || !ip_ok(ip, m->len - ETH_LEN, total))
        return 0;
    uint32_t len = total - IP4_LEN - PLAIN_TS;
    bool ok = len > COPY_BREAK && (int32_t)(rd32(h + TCP_HDR + 4) - c->ts_recent) >= 0 &&
              end.v + len - c->rcv_nxt.v <= c->rcv_adv.v - c->rcv_nxt.v && tcp_checksum_ok(m, ip, total - IP4_LEN);
    return ok ? len : 0;
}

static inline void keep_payload(struct bypass_stack *s, bypass_pkt p, uint32_t len)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->seg_flags = 0;
    m->data_off = (uint16_t)(m->off + PLAIN + PLAIN_TS);
    m->data_len = (uint16_t)len;
}

/* Takes the first segment's data, and what follows it in the batch up to where an ACK is due. How many segments. */
static int take_train(struct bypass_stack *s, struct tcp_conn *c, const bypass_pkt *pkts, const struct rx_flow *flows,
                      int n, struct segment *g)
{
    const uint8_t *first = pkt_data(s, g->pkt);
    uint32_t largest = g->len, len;
    seq_t end = seq_add(g->seq, g->len);
    int k = 1;
    keep_payload(s, g->pkt, g->len);
    for (; k < n && flows[k].plain && flows[k].hash == flows[0].hash; k++, end = seq_add(end, len)) {
        if (end.v - c->last_ack_sent.v >= ACK_BATCH_MAX * max_u32(c->rcv_mss, largest))
            break;
        len = follows(s, c, pkts[k], end, first);
        if (len == 0)
            break;
        keep_payload(s, pkts[k], len);
        largest = max_u32(largest, len);
        STAT_ADD(s, rx_bytes, pkt_meta(s, pkts[k])->len);
    }
    seq_t last = seq_add(end, 0u - pkt_meta(s, pkts[k - 1])->data_len);
    if (seq_lt(c->snd_wl1, last)) { /* it tells the window, also when the first one was overtaken by news of it */
        c->snd_wl1 = last;
        c->snd_wl2 = g->ack;
        c->snd_wnd = g->wnd << c->snd_wscale;
        c->snd_wnd_max = max_u32(c->snd_wnd_max, c->snd_wnd);
    }
    struct tcp_cold *cold = conn_cold(s, c);
    cold->segs_in += (uint32_t)k - 1;
    cold->data_segs_in += (uint32_t)k - 1;
    STAT_ADD(s, tcp_in, (uint32_t)k - 1);
    STAT_ADD(s, tcp_in_fast, (uint32_t)k - 1);
    STAT_ADD(s, tcp_in_joined, (uint32_t)k - 1);
    tcp_rcv_train(s, c, g, pkts, k, largest);
    g->pkt = BYPASS_PKT_NONE;
    return k;
}

int tcp_fast_in(struct bypass_stack *s, const bypass_pkt *pkts, const struct rx_flow *flows, int n)
{
    bypass_pkt p = pkts[0];
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    const uint8_t *eth = pkt_data(s, p), *ip = eth + ETH_LEN;
    struct segment g;
    struct tcp_conn *c = find_plain(s, flows[0].hash, ip);
    int taken = 1;
    if (!c || !predicted(s, c, m, eth, &g))
        return 0;
    const uint8_t *h = ip + IP4_LEN;
    g.pkt = p;
    g.wnd = rd16(h + 14);
    g.flags = h[13];
    g.data_off = PLAIN + PLAIN_TS;
    g.opt.has_ts = true;
    g.opt.sacks = 0;
    m->seg_flags = 0;
    STAT(s, tcp_in);
    STAT(s, tcp_in_fast);
    c->queue = m->queue;
    conn_count_in(s, c, conn_cold(s, c), g.len);
    if (seq_eq(c->last_ack_sent, c->rcv_nxt)) { /* RFC 7323 4.3 (2) */
        c->ts_recent = g.opt.ts_val;
        c->ts_recent_ms = conn_now_ms(s);
    }
    if ((c->feat & TX_LONE) && seq_eq(g.ack, c->snd_nxt) && !(c->flags & TF_WANT_OUT))
        tcp_ack_lone(s, c, g.wnd);
    else
        (void)tcp_ack_in(s, c, &g);
    if (n > 1 && may_be_train(s, c, &g))
        taken = take_train(s, c, pkts, flows, n, &g);
    else if (g.len > 0)
        tcp_rcv_small(s, c, &g);
    tcp_output(s, c);
    if (g.pkt != BYPASS_PKT_NONE)
        pkt_free(s, g.pkt);
    return taken;
}

/* ---- Sending --------------------------------------------------------------------------------------------- */
/* Copies a short payload and sums it on the way: csum_copy() in place. */
static inline uint32_t copy_small(uint8_t *to, const uint8_t *from, uint32_t len)
{
    uint64_t a = 0, v;
    uint32_t words = len & ~15u;
    for (uint32_t i = 0; i < words; i += 16) {
        v = load64(from + i);
        memcpy(to + i, &v, 8);
        a = __builtin_add_overflow(a, v, &a) ? a + 1 : a;
        v = load64(from + i + 8);
        memcpy(to + i + 8, &v, 8);
        a = __builtin_add_overflow(a, v, &a) ? a + 1 : a;
    }
    uint32_t sum = csum_add((uint32_t)a, (uint32_t)(a >> 32));
    return words == len ? sum : csum_copy(to + words, from + words, len - words, sum);
}

/* Ethernet, IP and TCP headers in front of the payload at b + PLAIN + PLAIN_TS, each word built and summed in
 * registers. */
static inline __attribute__((always_inline)) void put_headers(const struct bypass_stack *s, const struct tcp_conn *c,
                                                              const struct tcp_cold *k, const struct dst *d, uint8_t *b,
                                                              seq_t at, uint8_t flags, uint32_t len,
                                                              uint32_t payload_sum, uint16_t wnd)
{
    uint32_t src = load32(addr_v4(&c->laddr)), dst = load32(addr_v4(&c->raddr)), tcp_len = PLAIN_TS + len;
    uint16_t total = __builtin_bswap16((uint16_t)(IP4_LEN + tcp_len));
    memcpy(b + ETH_DST, d->mac, 6);
    memcpy(b + ETH_SRC, s->dev->mac, 6);
    wr16(b + ETH_TYPE, ETH_TYPE_IPV4);
    static_assert(TX_ECN == 2, "ECT(0) in place (RFC 3168 5)");
    uint8_t tos = (uint8_t)(k->opt.tos | (c->feat & TX_ECN));
    uint64_t w0 = (uint64_t)__builtin_bswap16(IP4_DF) << 48 | (uint32_t)total << 16 | (uint32_t)tos << 8 | 0x45;
    uint64_t w1 = (uint64_t)src << 32 | PROTO_TCP << 8 | k->opt.ttl;
    w1 |= (uint32_t)csum_ipv4_header(w0, w1, dst) << 16;
    memcpy(b + ETH_LEN, &w0, 8);
    memcpy(b + ETH_LEN + 8, &w1, 8);
    memcpy(b + ETH_LEN + IP4_DST, &dst, 4);
    uint64_t t[4];
    t[0] = (uint64_t)__builtin_bswap32(at.v) << 32 | (uint32_t)__builtin_bswap16(c->rport) << 16 |
           __builtin_bswap16(c->lport);
    t[1] = (uint64_t)__builtin_bswap16(wnd) << 48 | (uint64_t)flags << 40 | (uint64_t)(PLAIN_TS << 2) << 32 |
           __builtin_bswap32(c->rcv_nxt.v);
    t[2] = (uint64_t)TCP_TS_PREFIX << 32;
    t[3] = (uint64_t)__builtin_bswap32(c->ts_recent) << 32 | __builtin_bswap32(conn_now_ms(s) + k->ts_offset);
    uint64_t pseudo = (uint64_t)src + dst + __builtin_bswap16((uint16_t)tcp_len) + (PROTO_TCP << 8) + payload_sum;
    t[2] |= csum_fold(csum_words(t, 4, csum_add((uint32_t)pseudo, (uint32_t)(pseudo >> 32))));
    memcpy(b + PLAIN, t, sizeof t);
}

/* Nothing is queued or in flight, nothing has to wait: what one segment carries goes at once. */
static inline bool may_go_at_once(struct bypass_stack *s, const struct tcp_conn *c, const struct tcp_cold *k, size_t n)
{
    const uint32_t flags = TF_TS | TF_FIN_QUEUED | TF_CORK | TF_RECOVERY | TF_LOSS | TF_BLOCKED | TF_PROBING | TF_DEAD;
    const uint32_t feat = TX_CWR | TX_ECE | TX_DSACK | TX_PACED | TX_URG_OUT;
    return c->state == BYPASS_ESTABLISHED && (c->flags & flags) == TF_TS && (c->feat & feat) == 0 &&
           c->sndq_head == BYPASS_PKT_NONE && c->snd_nxt.v == c->snd_una.v && c->ooo == NO_INDEX &&
           n - 1 < c->snd_mss && n <= c->snd_wnd && n <= c->sndbuf && k->error == 0 &&
           s->dev->free_frames >= s->dev->frames / 4;
}

/* Nothing was learned that an ACK of this segment would change: no losses, and a window that one segment does not fill
 * (window_limits() of tcp_cc.c would say no). Then it needs no record, until something else happens. */
static inline bool may_be_lone(const struct tcp_conn *c)
{
    return !has_flight(c) && c->ssthresh == UINT32_MAX && c->cwnd >= 4u * c->snd_mss && (c->feat & TX_CC_LAZY);
}

/* The frame as the only one of the send queue. */
static inline void enqueue(struct bypass_stack *s, struct tcp_conn *c, struct tcp_cold *k, bypass_pkt p, uint32_t n)
{
    c->sndq_head = c->sndq_tail = p;
    c->snd_queued = n;
    c->snd_nxt = seq_add(c->snd_nxt, n);
    c->last_ack_sent = c->rcv_nxt;
    tcp_data_out(c);
    c->flags &= ~(uint32_t)(TF_ACK_NOW | TF_ACK_LATER | TF_ACK_BATCH | TF_MORE | TF_PUSH_ALL);
    c->ack_at = 0;
    k->unacked_since = now_ns(s);
    k->segs_out++;
    k->data_segs_out++;
}

int64_t tcp_fast_send(struct bypass_stack *s, struct tcp_conn *c, const void *buf, size_t n)
{
    struct tcp_cold *k = conn_cold(s, c);
    bypass_pkt p;
    if (unlikely(!may_go_at_once(s, c, k, n)))
        return 0;
    const struct dst *d = dst_get(s, &c->dst, &c->raddr);
    if (unlikely(!d || d->state != DST_OK || c->path_mtu != d->mtu || s->dev->ops->alloc(s->dev, &p, 1) != 1))
        return 0;
    tcp_cc_wake(s, c);
    uint16_t off = s->dev->headroom;
    uint8_t *payload = pkt_frame(s, p) + off;
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    m->off = (uint16_t)(off - PLAIN - PLAIN_TS);
    m->len = (uint16_t)(n + PLAIN + PLAIN_TS);
    m->queue = c->queue;
    m->flags = 0;
    m->data_off = off;
    m->data_len = (uint16_t)n;
    m->seq = c->snd_nxt.v;
    m->next = BYPASS_PKT_NONE;
    m->seg_flags = IN_TCP | SEG_PSH;
    m->time_ns = now_ns(s);
    m->csum = copy_small(payload, buf, (uint32_t)n);
    uint16_t wnd = (uint16_t)min_u32(tcp_rcv_window(s, c) >> c->rcv_wscale, 65535);
    put_headers(s, c, k, d, payload - PLAIN - PLAIN_TS, c->snd_nxt, TCP_ACK | TCP_PSH, (uint32_t)n, m->csum, wnd);
    if (tx_csum_offload(s))
        csum_leave(m, payload - PLAIN_TS + TCP_CSUM,
                   csum_pseudo(&c->laddr, &c->raddr, PROTO_TCP, PLAIN_TS + (uint32_t)n), NET_HEADERS, TCP_CSUM);
    if (likely(may_be_lone(c))) {
        c->feat |= TX_LONE;
        enqueue(s, c, k, p, (uint32_t)n);
    } else {
        tcp_rate_write(s, c);
        tcp_flight_begin(s, c);
        tcp_sack_sent(s, c, p);
        tcp_rate_sent(s, c, p);
        enqueue(s, c, k, p, (uint32_t)n);
        tcp_cc_sent(s, c);
    }
    tcp_rtx_restart(s, c);
    STAT(s, tcp_out);
    STAT(s, tcp_out_data_segments);
    STAT_ADD(s, tcp_copied_bytes, n);
    tx_queue(s, p);
    return (int64_t)n;
}

/* ---- Sending many ---------------------------------------------------------------------------------------- */
/* The headers that the segments of a burst share, with sequence number 0 and without PSH, and their sum. */
struct burst {
    uint8_t head[PLAIN + PLAIN_TS];
    uint16_t sum;
};

/* Nothing goes into the headers but what always does, and each segment may go when both windows allow. */
static inline bool burst_is_usual(const struct tcp_conn *c)
{
    const uint32_t flags = TF_TS | TF_RECOVERY | TF_LOSS | TF_BLOCKED | TF_PROBING | TF_DEAD;
    const uint32_t feat = TX_CWR | TX_ECE | TX_DSACK | TX_PACED | TX_URG_OUT | TX_PMTU_SEARCH | TX_PMTU_PROBE | TX_LONE;
    return has_flight(c) && (c->flags & flags) == TF_TS && (c->feat & feat) == 0 && c->ooo == NO_INDEX;
}

static inline uint32_t burst_room(const struct bypass_stack *s, const struct tcp_conn *c)
{
    int32_t usable = seq_diff(seq_add(c->snd_una, c->snd_wnd), c->snd_nxt);
    uint32_t pipe = tcp_pipe(s, c);
    return usable <= 0 || pipe >= c->cwnd ? 0 : min_u32((uint32_t)usable, c->cwnd - pipe);
}

static inline bool is_full(const struct tcp_conn *c, const struct bypass_pkt_meta *m)
{
    return m->data_len == c->snd_mss && !(m->holders & BYPASS_HOLD_DEV) && !(m->seg_flags & IN_TXQ);
}

static inline void burst_send(struct bypass_stack *s, struct tcp_conn *c, const struct burst *b, bypass_pkt p)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    uint8_t *eth = pkt_frame(s, p) + m->data_off - sizeof b->head;
    uint32_t seq_word = __builtin_bswap32(m->seq), psh = m->seg_flags & SEG_PSH ? TCP_PSH : 0;
    memcpy(eth, b->head, sizeof b->head);
    memcpy(eth + PLAIN + TCP_SEQ, &seq_word, 4);
    eth[PLAIN + TCP_FLAGS] |= (uint8_t)psh;
    uint16_t check = csum_fold(csum_add(csum_add(m->csum, seq_word), b->sum + (psh << 8)));
    memcpy(eth + PLAIN + TCP_CSUM, &check, 2);
    if (tx_csum_offload(s))
        csum_leave(m, eth + PLAIN + TCP_CSUM,
                   csum_pseudo(&c->laddr, &c->raddr, PROTO_TCP, PLAIN_TS + (uint32_t)m->data_len), NET_HEADERS,
                   TCP_CSUM);
    m->off = (uint16_t)(m->data_off - sizeof b->head);
    m->len = (uint16_t)(m->data_len + sizeof b->head);
    m->queue = c->queue;
    m->time_ns = tcp_stamp(s, c);
    tcp_rate_sent(s, c, p);
    tcp_sack_sent(s, c, p);
    tx_queue(s, p);
}

/* Full segments that were never sent, as many as both windows allow, but the last that is written: tcp_out.c decides
 * about that one, and about all that is unusual. Segments are cut when the program writes, so that one pass copies and
 * sums the payload; what is left for here is one header for all. */
void tcp_fast_burst(struct bypass_stack *s, struct tcp_conn *c, const struct dst *d)
{
    uint32_t room = burst_is_usual(c) ? burst_room(s, c) : 0, n = 0;
    bypass_pkt p = c->sndq_next;
    if (room < 2u * c->snd_mss || p == BYPASS_PKT_NONE || p == c->sndq_tail || !is_full(c, pkt_meta(s, p)))
        return;
    struct burst b;
    struct tcp_cold *k = conn_cold(s, c);
    uint16_t wnd = (uint16_t)min_u32(tcp_rcv_window(s, c) >> c->rcv_wscale, 65535);
    put_headers(s, c, k, d, b.head, seq(0), TCP_ACK, c->snd_mss, 0, wnd);
    memcpy(&b.sum, b.head + PLAIN + TCP_CSUM, 2);
    b.sum = (uint16_t)~b.sum;
    if (c->snd_nxt.v == c->snd_una.v)
        k->unacked_since = now_ns(s);
    for (; p != c->sndq_tail && room >= c->snd_mss && is_full(c, pkt_meta(s, p)); n++) {
        burst_send(s, c, &b, p);
        room -= c->snd_mss;
        c->snd_nxt = seq_add(c->snd_nxt, c->snd_mss);
        p = pkt_meta(s, p)->next;
    }
    c->sndq_next = p;
    c->last_ack_sent = c->rcv_nxt;
    c->flags &= ~(uint32_t)(TF_ACK_NOW | TF_ACK_LATER | TF_ACK_BATCH);
    c->ack_at = 0;
    conn_flight(s, c)->prr_out += n * c->snd_mss;
    k->segs_out += n;
    k->data_segs_out += n;
    STAT_ADD(s, tcp_out, n);
    STAT_ADD(s, tcp_out_data_segments, n);
    STAT_ADD(s, tcp_out_joined, n);
    tcp_cc_sent(s, c);
}
