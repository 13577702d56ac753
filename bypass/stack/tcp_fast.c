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

/* Hashes the flows of a batch and fetches what they will touch: the table's lines together, then the connections'.
 * hash[i] is valid where has[i] is. */
void tcp_fast_prefetch(struct bypass_stack *s, const bypass_pkt *pkts, struct rx_flow *flows, int n)
{
    const struct flow_slot *table = flow_table(s);
    uint32_t mask = tcp_head(s)->table_mask;
    for (int i = 0; i < n; i++) {
        const uint8_t *eth = pkt_data(s, pkts[i]);
        flows[i].plain = is_plain_tcp(eth, pkt_meta(s, pkts[i])->len);
        if (!flows[i].plain)
            continue;
        flows[i].hash = hash_flow(s, load64(eth + ETH_LEN + IP4_SRC), load32(eth + PLAIN));
        __builtin_prefetch(&table[flows[i].hash & mask]);
        if (i + 1 < n)
            __builtin_prefetch(pkt_data(s, pkts[i + 1]));
    }
    if (n == 1)
        return;
    for (int i = 0; i < n; i++) {
        uint32_t idx = flows[i].plain ? table[flows[i].hash & mask].idx : 0;
        if (idx == 0)
            continue;
        const uint8_t *c = (const uint8_t *)conn_at(s, idx - 1);
        for (uint32_t off = 0; off < sizeof(struct tcp_conn); off += 64)
            __builtin_prefetch(c + off);
    }
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
    const uint32_t feat = TX_ECE | TX_CWR | TX_DSACK | TX_URG_IN | TX_URG_OUT | TX_PMTU_PROBE;
    return c->state == BYPASS_ESTABLISHED && (c->flags & flags) == TF_TS && (c->feat & feat) == 0 &&
           c->ooo_head == NO_INDEX && c->sock != NO_INDEX;
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

bool tcp_fast_in(struct bypass_stack *s, bypass_pkt p, uint32_t hash)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    const uint8_t *eth = pkt_data(s, p), *ip = eth + ETH_LEN;
    struct segment g;
    struct tcp_conn *c = find_plain(s, hash, ip);
    if (!c || !predicted(s, c, m, eth, &g))
        return false;
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
    conn_cold(s, c)->last_in = now_ns(s);
    if (seq_eq(c->last_ack_sent, c->rcv_nxt)) { /* RFC 7323 4.3 (2) */
        c->ts_recent = g.opt.ts_val;
        c->ts_recent_ms = conn_now_ms(s);
    }
    (void)tcp_ack_in(s, c, &g);
    if (g.len > 0)
        tcp_rcv_data(s, c, &g);
    tcp_output(s, c);
    if (g.pkt != BYPASS_PKT_NONE)
        pkt_free(s, g.pkt);
    return true;
}
