/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_pmtu.c - the path's MTU: reports by ICMP (RFC 1191; which of them are believed: tcp_icmp_error, RFC 5927), and
 * packetization-layer discovery (RFC 4821) where no reports come.
 *
 *     OFF --full segments time out 4 times: a black hole--> SEARCH at 1024 bytes of payload --high - low < 8--> DONE
 *                                                             ^                                                |
 *                                                             +---- after ten minutes: has the path grown? ----+
 *
 * In SEARCH the MTU in use is mtu_low, mtu_high the largest that might work. Now and then a segment is sent that is larger
 * than the others. Its acknowledgment raises mtu_low; its loss, the only one, is no sign of congestion (RFC 4821 7.6.1):
 * it is sent again in pieces, and after three mtu_high sinks. A probe is merged from queued data, so it costs no padding.
 */
#include "tcp.h"

enum { PMTU_OFF, PMTU_SEARCH, PMTU_DONE };
enum {
    HEADERS = 20 + TCP_HDR,
    BASE_MTU = 1024 + HEADERS, /* RFC 4821 7.2: likely to work, and not bad */
    MIN_MTU = 552,             /* as Linux' min_pmtu: below it lies an attack */
    CLOSE_ENOUGH = 8,
    TRIES = 3,       /* RFC 8899 5.1.2 */
    PROBE_CWND = 11, /* segments: else a lost probe would cost a timeout */
    SPARE = 4,       /* segments behind the probe, whose ACKs tell of its loss */
    AGAIN_S = 600,   /* RFC 4821 7.3 */
};

static uint16_t now_s(const struct bypass_stack *s) { return (uint16_t)(now_ns(s) / SEC_NS); }

/* What the path's reports, the link, the peer's MSS and a frame allow. */
static uint16_t largest(struct bypass_stack *s, struct tcp_conn *c)
{
    const struct dst *d = dst_get(s, &c->dst, &c->raddr);
    uint32_t mtu = d && d->mtu ? d->mtu : s->dev->mtu;
    mtu = min_u32(mtu, (uint32_t)c->syn_mss + HEADERS);
    return (uint16_t)min_u32(mtu, s->dev->stride - s->dev->headroom);
}

static void use(struct bypass_stack *s, struct tcp_conn *c) { conn_update_mss(s, c, c->path_mtu); }

uint16_t tcp_pmtu_limit(const struct tcp_cold *k, uint16_t mtu)
{
    return k->mtu_state != PMTU_OFF && k->mtu_low < mtu ? k->mtu_low : mtu;
}

/* ---- ICMP -------------------------------------------------------------------------------------------------- */
void tcp_pmtu_icmp(struct bypass_stack *s, struct tcp_conn *c, const struct icmp_error *e)
{
    struct tcp_cold *k = conn_cold(s, c);
    struct dst *d = dst_get(s, &c->dst, &c->raddr);
    uint16_t mtu = e->mtu < MIN_MTU ? MIN_MTU : e->mtu;
    uint16_t now = d && d->mtu ? d->mtu : s->dev->mtu;
    if (!d || mtu >= now)
        return;
    dst_lower_mtu(s, d, mtu);
    c->path_mtu = mtu;
    k->mtu_high = (uint16_t)min_u32(k->mtu_high, mtu);
    k->mtu_low = (uint16_t)min_u32(k->mtu_low, mtu);
    use(s, c);
    if (c->state != BYPASS_SYN_SENT && c->state != BYPASS_SYN_RECEIVED) {
        c->feat &= ~(uint32_t)TX_PMTU_PROBE; /* if it was the probe, it is answered */
        tcp_mark_oversize(s, c);
        tcp_output(s, c);
    }
}

/* ---- Search ------------------------------------------------------------------------------------------------- */
static void search(struct bypass_stack *s, struct tcp_conn *c, uint16_t low)
{
    struct tcp_cold *k = conn_cold(s, c);
    k->mtu_state = PMTU_SEARCH;
    c->feat |= TX_PMTU_SEARCH;
    k->mtu_high = largest(s, c);
    k->mtu_low = (uint16_t)min_u32(low, k->mtu_high);
    k->mtu_fails = 0;
    use(s, c);
}

static void settle(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (k->mtu_high - k->mtu_low >= CLOSE_ENOUGH)
        return;
    k->mtu_state = PMTU_DONE;
    k->mtu_probe = now_s(s);
}

void tcp_pmtu_established(struct bypass_stack *s, struct tcp_conn *c)
{
    if (core(s)->cfg.mtu_probing == BYPASS_MTU_PROBING_ALWAYS)
        search(s, c, BASE_MTU);
}

/* What a probe that is not acknowledged tells. */
static void probe_failed(struct bypass_stack *s, struct tcp_conn *c, bool for_good)
{
    struct tcp_cold *k = conn_cold(s, c);
    STAT(s, tcp_mtu_probes_lost);
    c->feat &= ~(uint32_t)TX_PMTU_PROBE;
    if (!for_good && ++k->mtu_fails < TRIES)
        return;
    k->mtu_fails = 0;
    k->mtu_high = (uint16_t)max_u32(k->mtu_probe - 1u, k->mtu_low);
    settle(s, c);
}

/* The fourth timeout in a row, and full segments are what is lost (RFC 4821 7.6.4). */
void tcp_pmtu_timeout(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (c->feat & TX_PMTU_PROBE)
        probe_failed(s, c, true);
    if (core(s)->cfg.mtu_probing == BYPASS_MTU_PROBING_OFF || c->rtx_count < 3 || c->sndq_head == BYPASS_PKT_NONE)
        return;
    uint32_t lost = pkt_meta(s, c->sndq_head)->data_len;
    uint16_t low = k->mtu_state == PMTU_OFF ? (uint16_t)BASE_MTU : (uint16_t)max_u32(k->mtu_low / 2u, MIN_MTU);
    if (lost + HEADERS <= low)
        return;
    STAT(s, tcp_mtu_black_holes);
    search(s, c, low);
}

void tcp_pmtu_acked(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (seq_leq(c->snd_una, conn_flight(s, c)->probe_seq))
        return;
    c->feat &= ~(uint32_t)TX_PMTU_PROBE;
    STAT(s, tcp_mtu_probes_acked);
    k->mtu_low = k->mtu_probe;
    k->mtu_fails = 0;
    settle(s, c);
    use(s, c);
}

bool tcp_pmtu_probe_lost(struct bypass_stack *s, struct tcp_conn *c)
{
    if (!(c->feat & TX_PMTU_PROBE) || !seq_eq(c->snd_una, conn_flight(s, c)->probe_seq))
        return false;
    if (c->lost_bytes > pkt_meta(s, c->sndq_head)->data_len)
        return false; /* others too: that is congestion */
    probe_failed(s, c, false);
    tcp_mark_oversize(s, c); /* it is the only one that is larger than snd_mss: it goes again in pieces */
    return true;
}

/* ---- Probing ------------------------------------------------------------------------------------------------- */
static bool may_probe(struct bypass_stack *s, struct tcp_conn *c, uint32_t payload)
{
    uint32_t unsent = c->snd_queued - (c->snd_nxt.v - c->snd_una.v), need = payload + SPARE * c->snd_mss;
    int32_t usable = seq_diff(seq_add(c->snd_una, c->snd_wnd), c->snd_nxt);
    bool calm = !has_flight(c) || conn_flight(s, c)->ca_state == CA_OPEN;
    return calm && c->lost_bytes == 0 && c->cwnd >= PROBE_CWND * c->snd_mss && unsent >= need &&
           usable >= (int32_t)need;
}

uint32_t tcp_pmtu_probe(struct bypass_stack *s, struct tcp_conn *c)
{
    struct tcp_cold *k = conn_cold(s, c);
    if (c->feat & TX_PMTU_PROBE)
        return 0;
    if (k->mtu_state == PMTU_DONE && (uint16_t)(now_s(s) - k->mtu_probe) >= AGAIN_S)
        search(s, c, k->mtu_low);
    if (k->mtu_state != PMTU_SEARCH)
        return 0;
    settle(s, c);
    uint32_t size = (k->mtu_low + k->mtu_high + 1u) / 2, options = c->flags & TF_TS ? (uint32_t)TCP_TS_BYTES : 0;
    uint32_t payload = size - HEADERS - options;
    if (k->mtu_state != PMTU_SEARCH || payload <= c->snd_mss || !may_probe(s, c, payload) ||
        (uint32_t)pkt_meta(s, c->sndq_next)->data_off + payload > s->dev->stride)
        return 0;
    uint32_t pipe = tcp_pipe(s, c);
    if (pipe > 0 && pipe + payload > c->cwnd)
        return TCP_PMTU_HOLD; /* each ACK makes room for an ordinary segment only */
    bool cut_larger = pkt_meta(s, c->sndq_next)->data_len > payload; /* before the black hole was known */
    if (cut_larger ? !tcp_snd_split(s, c, c->sndq_next, payload) : !tcp_snd_merge(s, c, c->sndq_next, payload))
        return 0;
    k->mtu_probe = (uint16_t)size;
    return payload;
}

void tcp_pmtu_probe_sent(struct bypass_stack *s, struct tcp_conn *c, seq_t first)
{
    STAT(s, tcp_mtu_probes);
    c->feat |= TX_PMTU_PROBE;
    conn_flight(s, c)->probe_seq = first;
}
