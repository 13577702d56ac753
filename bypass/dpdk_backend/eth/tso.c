/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tso.c - consecutive segments of one connection become one large packet, which the device cuts up again (TSO): the stack
 * knows nothing of it, and loss, pacing and retransmission are per segment as ever.
 *
 *   frames of the stack   | headers, 1448 bytes | headers, 1448 bytes | headers, 700 bytes |
 *   what the driver gets  | headers, 1448 bytes -> 1448 bytes -> 700 bytes |   one chain of mbufs, tso_segsz 1448
 *
 * Nothing is copied: the later mbufs begin behind their headers. The first one's headers are changed for the whole, and
 * put back when the driver does not take it. Joined is what a device can restore: all headers equal but sequence number,
 * length and checksums, full segments but for the last, and flags other than ACK only on the last (mbuf library, 7.6). A
 * device numbers the packets itself, which says nothing where they must not be cut (DF: RFC 6864 4.1). Frames may be
 * anybody's, by raw sockets or an application of bypass-fwd: what they say of themselves is not believed.
 */
#include <string.h>

#include <rte_ip.h>
#include <rte_tcp.h>

#include "eth/port.h"

enum {
    IP_AT = ETH_HEADER,
    TCP_AT = IP_AT + sizeof(struct rte_ipv4_hdr),
    MAX_JOIN = 32,
    MAX_PAYLOAD = UINT16_MAX - 120, /* the IP length has 16 bits */
    LAST_FLAGS = RTE_TCP_PSH_FLAG | RTE_TCP_FIN_FLAG,
};

static struct rte_ipv4_hdr *ip_of(struct rte_mbuf *m)
{
    return rte_pktmbuf_mtod_offset(m, struct rte_ipv4_hdr *, IP_AT);
}
static struct rte_tcp_hdr *tcp_of(struct rte_mbuf *m)
{
    return rte_pktmbuf_mtod_offset(m, struct rte_tcp_hdr *, TCP_AT);
}
static uint32_t header_len(struct rte_mbuf *m) { return TCP_AT + (tcp_of(m)->data_off >> 4) * 4u; }

static bool is_ipv4(struct rte_mbuf *m)
{
    return rte_pktmbuf_mtod(m, struct rte_ether_hdr *)->ether_type == RTE_BE16(RTE_ETHER_TYPE_IPV4);
}

/* An untagged IPv4 TCP segment with payload, and nothing behind it, whose checksum is the device's to complete. */
static bool candidate(struct rte_mbuf *m)
{
    const struct bypass_pkt_meta *meta = mbuf_meta(m);

    return (meta->flags & BYPASS_TX_CSUM) && meta->csum_off == 16 && meta->csum_start == TCP_AT &&
           m->data_len >= TCP_AT + sizeof(struct rte_tcp_hdr) && is_ipv4(m) && ip_of(m)->version_ihl == 0x45 &&
           ip_of(m)->next_proto_id == IPPROTO_TCP && ip_of(m)->fragment_offset == RTE_BE16(RTE_IPV4_HDR_DF_FLAG) &&
           rte_be_to_cpu_16(ip_of(m)->total_length) == m->data_len - IP_AT && tcp_of(m)->data_off >= 0x50 &&
           m->data_len > header_len(m);
}

/* b's IP checksum is right, as the one that a device makes; or as wrong as the first one's. */
static bool is_summed(struct rte_mbuf *first, struct rte_mbuf *b)
{
    return memcmp(ip_of(first), ip_of(b), sizeof(struct rte_ipv4_hdr)) == 0 || rte_ipv4_cksum(ip_of(b)) == 0;
}

/* Does b go on where a ends, by headers that a device makes itself from a's? */
static bool follows(struct rte_mbuf *first, struct rte_mbuf *a, struct rte_mbuf *b)
{
    const struct rte_ipv4_hdr *ip = ip_of(first), *next = ip_of(b);
    const struct rte_tcp_hdr *tcp = tcp_of(first), *tb = tcp_of(b);
    uint32_t headers = header_len(first), payload = a->data_len - headers;

    return a->data_len == first->data_len && b->data_len <= first->data_len &&
           tcp_of(a)->tcp_flags == RTE_TCP_ACK_FLAG && !(tb->tcp_flags & ~(RTE_TCP_ACK_FLAG | LAST_FLAGS)) &&
           (tb->tcp_flags & RTE_TCP_ACK_FLAG) &&
           memcmp(rte_pktmbuf_mtod(first, void *), rte_pktmbuf_mtod(b, void *), ETH_HEADER) == 0 &&
           ip->type_of_service == next->type_of_service && ip->time_to_live == next->time_to_live &&
           ip->src_addr == next->src_addr && ip->dst_addr == next->dst_addr && is_summed(first, b) &&
           tcp->src_port == tb->src_port && tcp->dst_port == tb->dst_port && tcp->recv_ack == tb->recv_ack &&
           tcp->data_off == tb->data_off && tcp->rx_win == tb->rx_win && tcp->tcp_urp == tb->tcp_urp &&
           memcmp(tcp + 1, tb + 1, headers - TCP_AT - sizeof *tcp) == 0 &&
           rte_be_to_cpu_32(tb->sent_seq) == rte_be_to_cpu_32(tcp_of(a)->sent_seq) + payload;
}

static void join(const struct dpdk_port *d, struct rte_mbuf **run, int n, struct tso_undo *undo)
{
    struct rte_mbuf *first = run[0];
    struct rte_ipv4_hdr *ip = ip_of(first);
    struct rte_tcp_hdr *tcp = tcp_of(first);
    uint32_t headers = header_len(first);

    *undo = (struct tso_undo){ip->total_length, ip->hdr_checksum, tcp->cksum, tcp->tcp_flags};
    tcp->tcp_flags = tcp_of(run[n - 1])->tcp_flags;
    first->tso_segsz = (uint16_t)(first->data_len - headers);
    for (int i = 1; i < n; i++) {
        rte_pktmbuf_adj(run[i], (uint16_t)headers);
        run[i]->ol_flags = 0;
        run[i - 1]->next = run[i];
        first->pkt_len += run[i]->data_len;
    }
    first->nb_segs = (uint16_t)n;
    first->l4_len = headers - TCP_AT;
    first->ol_flags |= d->tso_flags;
    ip->total_length = rte_cpu_to_be_16((uint16_t)(first->pkt_len - IP_AT));
    ip->hdr_checksum = 0;
    if (!(d->tso_flags & RTE_MBUF_F_TX_IP_CKSUM)) {
        ip->hdr_checksum = rte_ipv4_cksum(ip);
    }
    tcp->cksum = rte_ipv4_phdr_cksum(ip, first->ol_flags); /* without the length, which differs by segment */
}

static int run_of(const struct dpdk_port *d, struct rte_mbuf **m, int n)
{
    uint32_t headers, payload;
    int run = 1;

    if (!candidate(m[0])) {
        return 1;
    }
    headers = header_len(m[0]);
    payload = m[0]->data_len - headers;
    while (run < n && run < MAX_JOIN && run < d->tso_pieces && candidate(m[run]) && follows(m[0], m[run - 1], m[run]) &&
           payload + m[run]->data_len - headers <= MAX_PAYLOAD) {
        payload += m[run]->data_len - headers;
        run++;
    }
    return run > 1 && rte_ipv4_cksum(ip_of(m[0])) != 0 ? 1 : run;
}

int tso_join(struct dpdk_port *d, struct rte_mbuf **mbufs, int n, struct tso_packet *out)
{
    int packets = 0;

    for (int at = 0; at < n; packets++) {
        struct tso_packet *p = &out[packets];

        p->frames = run_of(d, mbufs + at, n - at);
        if (p->frames > 1) {
            join(d, mbufs + at, p->frames, &p->undo);
        }
        mbufs[packets] = mbufs[at]; /* at is never behind */
        at += p->frames;
    }
    return packets;
}

void tso_take_back(struct rte_mbuf *first, const struct tso_packet *p)
{
    struct rte_ipv4_hdr *ip = ip_of(first);
    struct rte_tcp_hdr *tcp = tcp_of(first);

    if (p->frames == 1) {
        return;
    }
    ip->total_length = p->undo.ip_len;
    ip->hdr_checksum = p->undo.ip_sum;
    tcp->cksum = p->undo.tcp_sum;
    tcp->tcp_flags = p->undo.tcp_flags;
    for (struct rte_mbuf *m = first, *next; m; m = next) {
        next = m->next;
        m->next = NULL;
        m->nb_segs = 1;
    }
}
