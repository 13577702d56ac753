/* SPDX-License-Identifier: Apache-2.0 */
/*
 * eth.c - Ethernet II (RFC 894): is the frame for us, what does it carry; and the header of what leaves.
 * Tagged and 802.3 frames are counted as unknown: the driver or the steering program takes tags off.
 */
#include "net.h"

int eth_in(struct bypass_stack *s, bypass_pkt *p, struct rx_info *ri)
{
    struct bypass_pkt_meta *m = pkt_meta(s, *p);
    const uint8_t *eth = pkt_data(s, *p);
    if (unlikely(m->len < ETH_LEN)) {
        STAT(s, eth_in_short);
        pkt_free(s, *p);
        return 0;
    }
    m->seg_flags = 0; /* stale after reception; a reply may leave in this frame */
    ri->multicast = false;
    if (unlikely(memcmp(eth + ETH_DST, s->dev->mac, 6) != 0)) {
        if (!(eth[ETH_DST] & ETH_GROUP_BIT)) {
            STAT(s, eth_in_not_us);
            pkt_free(s, *p);
            return 0;
        }
        ri->multicast = true;
    }
    uint16_t type = rd16(eth + ETH_TYPE);
    m->off = (uint16_t)(m->off + ETH_LEN);
    m->len = (uint16_t)(m->len - ETH_LEN);
    if (likely(type == ETH_TYPE_IPV4)) {
        return ipv4_in(s, p, m, eth + ETH_LEN, ri);
    }
    if (type == ETH_TYPE_ARP) {
        arp_in(s, *p);
        return 0;
    }
    STAT(s, eth_in_unknown_type);
    pkt_free(s, *p);
    return 0;
}

void eth_out(struct bypass_stack *s, bypass_pkt p, const struct dst *d)
{
    uint8_t *eth = pkt_push(s, p, ETH_LEN); /* ip_out() left room */
    memcpy(eth + ETH_DST, d->mac, 6);
    memcpy(eth + ETH_SRC, s->dev->mac, 6);
    wr16(eth + ETH_TYPE, ETH_TYPE_IPV4);
    tx_queue(s, p);
}
