/* SPDX-License-Identifier: Apache-2.0 */
/*
 * peer.h - bypass-fwd's half of a port. The memory is the application's to write at any time, so nothing that stands in
 * it is believed: sizes and places come from the broker, positions are kept here and only compared, every slot is read
 * once, and what it says is checked before it is used. An application that breaks the rules is cut off: its port is
 * not served any more. Nothing here blocks, whatever the application does with its ends of memory and doorbells.
 */
#ifndef BYPASS_FWD_PEER_H
#define BYPASS_FWD_PEER_H

#include "port.h"

struct peer_counters {
    uint64_t rx_packets, rx_bytes; /* to the application */
    uint64_t rx_full;              /* dropped: it has posted no frames */
    uint64_t rx_bad_slot;          /* dropped: it posted a frame that there is not */
    uint64_t tx_packets, tx_bytes; /* copied from the application */
    uint64_t tx_bad_slot;          /* descriptors without sense, skipped */
    uint64_t rings;                /* system calls to wake it */
    uint64_t rings_failed;
};

struct peer {
    struct port_config cfg;
    struct port_shared *sh;
    uint8_t *frames;
    uint32_t frame_size;
    struct port_rx_slot *rx;
    struct port_tx_slot *tx;
    uint32_t rx_posted, rx_done; /* seen of the application; ours */
    uint32_t tx_posted, tx_done;
    uint32_t unpublished; /* frames written and not yet shown */
    uint32_t cut;         /* a position made no sense: it is not served any more */
    int doorbell;         /* socket to wake it, or -1 */
    struct peer_counters n;
};

/* A view of a port's memory. Positions go on where an earlier bypass-fwd ended. 0, -EINVAL, -ENOMEM (size). */
int peer_attach(struct peer *peer, void *mem, size_t size, const struct port_config *cfg, int doorbell);

/* Copies a received frame to the application. 0: it has no room for it, counted. */
int peer_deliver(struct peer *peer, const uint8_t *frame, const struct bypass_pkt_meta *meta);
/* Shows it what was delivered, and wakes it if it sleeps. */
void peer_publish(struct peer *peer);

/* Frames that it wants to send, at most max. */
uint32_t peer_tx_avail(struct peer *peer, uint32_t max);
/* Copies the oldest into `to`, with len, queue, flags and checksum request in *meta. It is the application's again after
 * peer_tx_publish(). 0: it made no sense, or is longer than room; counted. */
int peer_tx_take(struct peer *peer, uint8_t *to, uint32_t room, struct bypass_pkt_meta *meta);
void peer_tx_publish(struct peer *peer);

/* on 1: a post is to ring the doorbell from now on; then look at peer_tx_avail() once more. */
void peer_sleeps(struct peer *peer, int on);
/* The device's MAC address and MTU, from now on. */
void peer_about(struct peer *peer, const uint8_t mac[6], uint16_t mtu);
void peer_link(struct peer *peer, int link); /* PORT_LINK_*; wakes it when that is news */

#endif
