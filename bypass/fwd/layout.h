/* SPDX-License-Identifier: Apache-2.0 */
/*
 * layout.h - what lies in a port's memory, for its two halves: port.c (the application's) and peer.c (bypass-fwd's).
 *
 * Barriers:
 *   A  application posts:   store-release of *_posted   -> load-acquire by bypass-fwd before it reads slots
 *   B  bypass-fwd is done:  store-release of *_done     -> load-acquire by the application before it reuses them
 *   C  before sleeping:     store "sleeps", full fence, look at the ring    | one of the two
 *      after posting:       store position, full fence, look at "sleeps"    | sees the other's store
 */
#ifndef BYPASS_FWD_LAYOUT_H
#define BYPASS_FWD_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>

#include "port.h"

enum {
    PORT_MAGIC = 0x54524f50, /* "PORT" */
    PORT_META = 64,
    PORT_PAGE = 4096,
    PORT_ETH = PORT_ETH_HEADER,

    /* port_shared.app_sleeps */
    PORT_AWAKE = 0,
    PORT_ASLEEP = 1, /* or about to be: wants a wake-up */
    PORT_RUNG = 2,   /* a wake-up is on its way */

    /* port_shared.link */
    PORT_LINK_UP = 0,
    PORT_LINK_DOWN = 1,
    PORT_LINK_GONE = 2,
};

struct port_rx_slot {
    uint32_t frame; /* the application's; the rest is filled in by bypass-fwd */
    uint16_t off, len;
    uint16_t queue;
    uint8_t flags; /* BYPASS_RX_* */
    uint8_t reserved;
    uint32_t entry, rule, hash;
    uint32_t pad[2];
};

struct port_tx_slot {
    uint32_t frame;
    uint16_t off, len;
    uint16_t queue;
    uint16_t flags; /* BYPASS_TX_CSUM */
    uint16_t csum_start, csum_off;
};

struct port_state { /* of the application alone */
    uint32_t free_count;
    uint32_t rx_posted, rx_taken; /* positions: posted; given to the caller */
    uint32_t rx_done;             /* what was last seen of bypass-fwd */
    uint32_t tx_posted, tx_reaped, tx_done;
    uint32_t fill_target;
    uint32_t announced; /* port_wait_announced() */
    uint32_t bell_owed; /* wake-ups that were said and are not yet read from the doorbell */
    uint32_t gone;
    uint32_t bad_free;
    struct port_counters n;
};

struct port_shared {
    uint32_t magic, reserved;
    struct port_config cfg;
    struct { /* the application writes */
        uint32_t rx_posted, tx_posted;
    } __attribute__((aligned(64)));
    struct { /* bypass-fwd writes */
        uint32_t rx_done, tx_done, link;
        uint64_t about; /* of the device, as it is now: port_about(); 0: as in cfg */
    } __attribute__((aligned(64)));
    uint32_t fwd_sleeps __attribute__((aligned(64))); /* 1: ring the doorbell. Both write */
    uint32_t app_sleeps __attribute__((aligned(64))); /* PORT_AWAKE.. Both write */
    struct port_state st __attribute__((aligned(64)));
};

_Static_assert(sizeof(struct port_rx_slot) == 32 && sizeof(struct port_tx_slot) == 16, "two and four a cache line");
_Static_assert(sizeof(struct bypass_pkt_meta) <= PORT_META, "metadata of a frame fits one cache line");

struct port_places {
    size_t rx, tx, free_list, meta, frames, end; /* bytes from the memory's start */
};

static inline bool port_pow2(uint32_t n, uint32_t max) { return n >= 16 && n <= max && !(n & (n - 1)); }

static inline uint32_t port_fill_target(const struct port_config *cfg)
{
    uint32_t half = cfg->frames / 2, most = cfg->rx_ring < half ? cfg->rx_ring : half;

    return cfg->fill_target ? cfg->fill_target : most;
}

static inline uint32_t port_frame_size(const struct port_config *cfg)
{
    return cfg->frame_size ? cfg->frame_size : PORT_STRIDE;
}

static inline bool port_config_valid(const struct port_config *cfg)
{
    return cfg->frames >= 64 && cfg->frames <= PORT_MAX_FRAMES && port_pow2(cfg->rx_ring, PORT_MAX_FRAMES) &&
           port_pow2(cfg->tx_ring, PORT_MAX_FRAMES) && port_fill_target(cfg) <= cfg->rx_ring &&
           port_fill_target(cfg) < cfg->frames && port_frame_size(cfg) % PORT_STRIDE == 0 &&
           port_frame_size(cfg) <= PORT_MAX_STRIDE && cfg->mtu >= 68 &&
           cfg->mtu <= port_frame_size(cfg) - PORT_HEADROOM - PORT_ETH && cfg->queues >= 1;
}

/* A MAC address, its first byte lowest, and an MTU above it. */
static inline uint64_t port_about(const uint8_t mac[6], uint16_t mtu)
{
    uint64_t about = mtu;

    for (int i = 5; i >= 0; i--) {
        about = about << 8 | mac[i];
    }
    return about;
}

static inline size_t port_align(size_t n, size_t to) { return (n + to - 1) & ~(to - 1); }

static inline struct port_places port_places(const struct port_config *cfg) /* a valid one */
{
    struct port_places p = {.rx = port_align(sizeof(struct port_shared), 64)};

    p.tx = p.rx + cfg->rx_ring * sizeof(struct port_rx_slot);
    p.free_list = p.tx + cfg->tx_ring * sizeof(struct port_tx_slot);
    p.meta = port_align(p.free_list + cfg->frames * sizeof(uint32_t), 64);
    p.frames = port_align(p.meta + (size_t)cfg->frames * PORT_META, PORT_PAGE);
    p.end = p.frames + (size_t)cfg->frames * port_frame_size(cfg);
    return p;
}

#endif
