/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arp.c - ARP on the wire (RFC 826, RFC 5227): answers requests for our addresses, hands answers to the next-hop
 * cache, asks. When to ask and what to believe for how long: dst.c. Only with BYPASS_F_ARP; otherwise the kernel
 * answers and ARP does not come here.
 */
#include "net.h"

static const uint8_t broadcast[6] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

static bool arp_valid(const uint8_t *arp, uint16_t len)
{
    static const uint8_t zero[6];
    if (len < ARP_LEN || rd16(arp + ARP_HTYPE) != ARP_HTYPE_ETHERNET || rd16(arp + ARP_PTYPE) != ETH_TYPE_IPV4) {
        return false;
    }
    if (arp[ARP_HLEN] != 6 || arp[ARP_PLEN] != 4) {
        return false;
    }
    return !(arp[ARP_SHA] & ETH_GROUP_BIT) && memcmp(arp + ARP_SHA, zero, 6) != 0;
}

/* Only entries that exist: nobody fills the table by talking (RFC 826's merge flag). */
static void learn(struct bypass_stack *s, const uint8_t *arp)
{
    addr_t sender = addr_from_v4(arp + ARP_SPA);
    struct dst *d = dst_find(s, &sender);
    if (d != NULL && addr_on_link(s, arp + ARP_SPA)) {
        dst_answer(s, d, arp + ARP_SHA);
    }
}

/* The answer leaves in the frame of the request. */
static void reply(struct bypass_stack *s, bypass_pkt p)
{
    struct bypass_pkt_meta *m = pkt_meta(s, p);
    uint8_t target[4];
    m->len = ARP_LEN; /* without the padding */
    m->flags = 0;
    uint8_t *eth = pkt_push(s, p, ETH_LEN), *arp = eth + ETH_LEN;
    memcpy(target, arp + ARP_TPA, 4);
    memcpy(eth + ETH_DST, arp + ARP_SHA, 6);
    memcpy(eth + ETH_SRC, s->dev->mac, 6);
    wr16(eth + ETH_TYPE, ETH_TYPE_ARP);
    wr16(arp + ARP_OP, ARP_REPLY);
    memcpy(arp + ARP_THA, arp + ARP_SHA, 10); /* MAC and address of the one who asked */
    memcpy(arp + ARP_SHA, s->dev->mac, 6);
    memcpy(arp + ARP_SPA, target, 4);
    STAT(s, arp_out_reply);
    tx_queue(s, p);
}

void arp_in(struct bypass_stack *s, bypass_pkt p)
{
    const uint8_t *arp = pkt_data(s, p);
    if (!(core(s)->cfg.flags & BYPASS_F_ARP)) {
        STAT(s, arp_in_ignored);
    } else if (!arp_valid(arp, pkt_meta(s, p)->len)) {
        STAT(s, arp_in_bad);
    } else if (addr_kind(s, arp + ARP_SPA) == ADDR_LOCAL) {
        bool echo = memcmp(arp + ARP_SHA, s->dev->mac, 6) == 0;
        STAT_ADD(s, arp_in_ignored, echo);
        STAT_ADD(s, arp_in_conflict, !echo); /* RFC 5227 2.4: somebody else claims our address */
    } else if (addr_kind(s, arp + ARP_SPA) != ADDR_UNICAST && load_be32(arp + ARP_SPA) != 0) {
        STAT(s, arp_in_bad);
    } else {
        bool request = rd16(arp + ARP_OP) == ARP_REQUEST;
        if (!request && rd16(arp + ARP_OP) != ARP_REPLY) {
            STAT(s, arp_in_ignored);
            pkt_free(s, p);
            return;
        }
        STAT_ADD(s, arp_in_request, request);
        STAT_ADD(s, arp_in_reply, !request);
        if (load_be32(arp + ARP_SPA) != 0) { /* 0: a probe (RFC 5227 2.1.1), which tells nothing but wants an answer */
            learn(s, arp);
        }
        if (request && addr_kind(s, arp + ARP_TPA) == ADDR_LOCAL) {
            reply(s, p);
            return;
        }
    }
    pkt_free(s, p);
}

void arp_ask(struct bypass_stack *s, const addr_t *target, const uint8_t *mac)
{
    addr_t from;
    bypass_pkt p;
    if (!addr_for(s, target, &from) || (p = pkt_alloc(s)) == BYPASS_PKT_NONE) {
        return; /* asked again in a second */
    }
    uint8_t *eth = pkt_put(s, p, ETH_LEN + ARP_LEN), *arp = eth + ETH_LEN;
    memcpy(eth + ETH_DST, mac != NULL ? mac : broadcast, 6);
    memcpy(eth + ETH_SRC, s->dev->mac, 6);
    wr16(eth + ETH_TYPE, ETH_TYPE_ARP);
    wr16(arp + ARP_HTYPE, ARP_HTYPE_ETHERNET);
    wr16(arp + ARP_PTYPE, ETH_TYPE_IPV4);
    arp[ARP_HLEN] = 6;
    arp[ARP_PLEN] = 4;
    wr16(arp + ARP_OP, ARP_REQUEST);
    memcpy(arp + ARP_SHA, s->dev->mac, 6);
    memcpy(arp + ARP_SPA, addr_v4(&from), 4);
    memset(arp + ARP_THA, 0, 6);
    memcpy(arp + ARP_TPA, addr_v4(target), 4);
    STAT(s, arp_out_request);
    tx_queue(s, p);
}
