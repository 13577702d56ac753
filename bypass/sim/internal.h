/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the simulator share: its structs, its random generator, the seams between them. */
#ifndef BYPASS_SIM_INTERNAL_H
#define BYPASS_SIM_INTERNAL_H

#include <stdbool.h>
#include <string.h>

#include "sim.h"

enum { ETH_HEADER = 14, CACHE_LINE = 64 };
#define PPM 1000000u

/* xoshiro256** (Blackman and Vigna, "Scrambled linear pseudorandom number generators"), seeded by
 * splitmix64 so that neighbouring seeds give unrelated streams. */
struct prng {
    uint64_t s[4];
};
static inline uint64_t splitmix64(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}
static inline void prng_seed(struct prng *g, uint64_t seed, uint64_t stream)
{
    uint64_t state = seed;
    state = splitmix64(&state) ^ stream;
    for (int i = 0; i < 4; i++) {
        g->s[i] = splitmix64(&state);
    }
}
static inline uint64_t rotl64(uint64_t x, int k) { return x << k | x >> (64 - k); }
static inline uint64_t prng_next(struct prng *g)
{
    uint64_t *s = g->s, result = rotl64(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotl64(s[3], 45);
    return result;
}
/* Uniform in 0..n-1; n > 0. The bias of the multiplication is below n / 2^64. */
static inline uint64_t prng_below(struct prng *g, uint64_t n)
{
    return (uint64_t)((unsigned __int128)prng_next(g) * n >> 64);
}
static inline bool prng_hit(struct prng *g, uint32_t ppm) { return ppm && prng_below(g, PPM) < ppm; }

/* A frame on the wire; its bytes lie in a slot of the port it goes to. */
struct flight {
    uint64_t time_ns; /* of arrival */
    uint32_t slot;
    uint16_t len;
    uint16_t flags; /* meta.flags on arrival */
};

struct completion {
    uint64_t time_ns;
    bypass_pkt pkt;
};

struct port {
    struct bypass_netdev dev;
    struct sim *sim;
    struct sim_wire *wire;
    struct port *next; /* on the same wire */
    struct port *all;  /* of the same simulation */
    uint32_t index;    /* in order of creation */
    uint32_t flags;
    void *memory; /* one mapping holds all arrays */
    size_t memory_bytes;

    /* Packet memory. The free pool is a stack, so that warm frames are used first; frames from `bump`
     * on were never used and cost no memory. */
    uint32_t *free_list, free_listed, bump, pool_free, rx_reserve;
    uint64_t *rx_time_ns;
    uint32_t *rxq, rxq_mask, rxq_head, rxq_tail;
    struct completion *done;
    uint32_t done_cap, done_mask, done_head, done_tail;

    /* Frames that are on their way to this port: a ring sorted by time. */
    struct flight *flights;
    uint32_t flights_cap, flights_mask, flights_head, flights_tail;
    uint8_t *slots;
    uint32_t slot_stride;
    uint32_t *slot_free, slot_listed, slot_bump;

    /* The direction that begins here. */
    struct sim_faults faults;
    struct prng prng;
    uint64_t busy_until_ns, rate_remainder, last_arrival_ns;
    uint8_t *script;
    uint32_t script_len, script_next;

    struct sim_device_faults bad;
    struct prng bad_prng;
    struct sim_port_stats stats;
    struct capture *capture;
    uint16_t capture_interface;
};

struct sim_wire {
    struct sim *sim;
    struct sim_wire *next;
    struct port *ports;
    uint32_t flags;
};

struct sim_stack {
    struct bypass_stack *stack; /* NULL: free entry */
    struct port *port;
    uint64_t tx_frames; /* of the port before the last poll */
    bool touched;       /* the program may have called it: poll once */
    bool stalled;       /* its deadline has passed, but polling does nothing now */
};

struct random_stream { /* what sim_env() hands out */
    struct random_stream *next;
    struct prng prng;
};

struct sim {
    uint64_t seed, now_ns;
    struct sim_wire *wires;
    struct port *ports;
    struct random_stream *streams;
    uint32_t port_count;
    struct sim_stack *stacks;
    int stack_count, stack_cap;
};

/* ---- port.c */
struct outgoing { /* a frame being sent */
    const uint8_t *data;
    uint32_t len;
    uint16_t csum_start, csum_off;
    bool complete_csum;
};
static inline struct port *port_of(struct bypass_netdev *dev) { return (struct port *)dev; }
static inline const struct port *port_of_const(const struct bypass_netdev *dev) { return (const struct port *)dev; }
bool port_is(const struct bypass_netdev *dev);
void port_release(struct port *p);
/* A frame has arrived: its bytes are copied to a frame of the pool. PKT_NONE (counted): dropped. The
 * caller may still change the bytes, then port_rx_end() queues it. */
bypass_pkt port_rx_begin(struct port *p, const uint8_t *data, uint32_t len);
void port_rx_end(struct port *p, bypass_pkt pkt, uint8_t rx_flags);
static inline uint8_t *port_bytes(const struct port *p, bypass_pkt pkt, uint32_t off)
{
    return p->dev.mem + (size_t)pkt * p->dev.stride + off;
}
static inline uint32_t port_rx_waiting(const struct port *p) { return p->rxq_tail - p->rxq_head; }

/* ---- fault.c */
struct fate {
    bool deliver;
    bool twice;
    bool mark; /* CE */
    uint16_t capture_flags;
    uint64_t arrival_ns[2];
    uint32_t corrupt_at;   /* offset of the word */
    uint16_t corrupt_mask; /* 0: intact; in memory order */
};
void fault_decide(struct port *from, const struct outgoing *out, uint64_t now_ns, struct fate *fate);

/* ---- wire.c */
void wire_send(struct port *from, const struct outgoing *out);
/* Hands over what has arrived by now. */
void wire_deliver(struct port *to, uint64_t now_ns);
static inline uint64_t wire_next(const struct port *to)
{
    return to->flights_head == to->flights_tail ? UINT64_MAX : to->flights[to->flights_head & to->flights_mask].time_ns;
}

#endif
