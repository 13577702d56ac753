/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fault.c - decides what becomes of a frame: lost, duplicated, corrupted, held back, delayed, queued
 * for a limited rate. It decides only; wire.c carries it out.
 *
 * Corruption stays within what checksums promise to find (RFC 1071): one to three bits of one aligned
 * 16-bit word of the IP packet. A ones' complement sum notices every such change, since only 0x0000 and
 * 0xffff are alike to it. Left out are the words whose meaning the sum itself depends on, where a
 * changed sum could by chance be right again: the header length of IPv4 and the length of UDP.
 */
#include <errno.h>
#include <stdlib.h>

#include "internal.h"

enum {
    ETHERTYPE_IPV4 = 0x0800,
    ETHERTYPE_IPV6 = 0x86dd,
    IPPROTO_UDP_ = 17,
    IPV6_ADDRESSES = 8, /* what precedes them is under no checksum (RFC 8200 3) */
    DEFAULT_QUEUE_BYTES = 262144,
};

static uint16_t be16_at(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }

/* Bits of the word at `at` that may be flipped, in memory order as two bytes; 0: none. */
static uint16_t corruptible_bits(const struct outgoing *out, uint32_t at)
{
    const uint8_t *ip = out->data + ETH_HEADER;
    uint32_t off = at - ETH_HEADER;
    if (be16_at(out->data + 12) == ETHERTYPE_IPV6) {
        return off < IPV6_ADDRESSES ? 0 : 0xffff;
    }
    uint32_t header = (ip[0] & 15u) * 4;
    if (off == 0) {
        return 0xf0ff; /* not the header length */
    }
    bool first = (be16_at(ip + 6) & 0x1fff) == 0;
    if (ip[9] == IPPROTO_UDP_ && first && off == header + 4) {
        return 0;
    }
    return 0xffff;
}

/* Chooses word and bits. false: the frame has nothing that a checksum covers. */
static bool choose_corruption(struct prng *g, const struct outgoing *out, struct fate *fate)
{
    uint16_t type = be16_at(out->data + 12);
    uint32_t least = type == ETHERTYPE_IPV4 ? 20 : 40;
    if ((type != ETHERTYPE_IPV4 && type != ETHERTYPE_IPV6) || out->len < ETH_HEADER + least) {
        return false;
    }
    uint16_t bits;
    do {
        fate->corrupt_at = ETH_HEADER + 2 * (uint32_t)prng_below(g, (out->len - ETH_HEADER + 1) / 2);
        bits = corruptible_bits(out, fate->corrupt_at);
        if (fate->corrupt_at + 1 == out->len) {
            bits &= 0xff00; /* the last byte of an odd packet is the upper half of its word */
        }
    } while (!bits);
    uint16_t mask = 0;
    for (uint64_t flips = 1 + prng_below(g, 3); flips;) {
        uint16_t bit = (uint16_t)(1u << prng_below(g, 16));
        if (bits & bit && !(mask & bit)) {
            mask |= bit;
            flips--;
        }
    }
    fate->corrupt_mask = mask;
    return true;
}

/* One draw decides, so that each probability is that of all frames; unless a script says otherwise. */
static uint8_t draw(struct port *from)
{
    const struct sim_faults *f = &from->faults;
    if (from->script_next < from->script_len) {
        uint8_t fate = from->script[from->script_next++];
        if (fate != SIM_FATE_RANDOM) {
            return fate;
        }
    }
    const uint32_t ppm[] = {
        [SIM_FATE_LOSE] = f->loss_ppm,
        [SIM_FATE_DUPLICATE] = f->duplicate_ppm,
        [SIM_FATE_CORRUPT] = f->corrupt_ppm,
        [SIM_FATE_REORDER] = f->reorder_ppm,
    };
    if (!(f->loss_ppm | f->duplicate_ppm | f->corrupt_ppm | f->reorder_ppm)) {
        return SIM_FATE_PASS;
    }
    uint64_t at = prng_below(&from->prng, PPM);
    for (uint8_t fate = SIM_FATE_LOSE; fate <= SIM_FATE_REORDER; fate++) {
        if (at < ppm[fate]) {
            return fate;
        }
        at -= ppm[fate];
    }
    return SIM_FATE_PASS;
}

static uint64_t waiting_bytes(const struct port *from, uint64_t now_ns)
{
    if (from->busy_until_ns <= now_ns) {
        return 0;
    }
    return (uint64_t)((unsigned __int128)(from->busy_until_ns - now_ns) * from->faults.rate_bps / 8000000000ull);
}

/* As a router does that tells of its queue in place of dropping (RFC 3168 5). */
static bool deserves_mark(struct port *from, const struct outgoing *out, uint64_t now_ns)
{
    const struct sim_faults *f = &from->faults;
    if (!f->mark_bytes || !f->rate_bps || waiting_bytes(from, now_ns) <= f->mark_bytes) {
        return false;
    }
    const uint8_t *ip = out->data + ETH_HEADER;
    return be16_at(out->data + 12) == ETHERTYPE_IPV4 && out->len >= ETH_HEADER + 20u && (ip[1] & 3);
}

/* When the last bit has left, behind what waits for the rate. UINT64_MAX: the queue is full. */
static uint64_t departure_ns(struct port *from, uint32_t len, uint64_t now_ns)
{
    const struct sim_faults *f = &from->faults;
    if (!f->rate_bps) {
        return now_ns;
    }
    if (from->busy_until_ns <= now_ns) {
        from->busy_until_ns = now_ns;
        from->rate_remainder = 0;
    }
    uint64_t waiting = waiting_bytes(from, now_ns);
    uint32_t limit = f->queue_bytes ? f->queue_bytes : DEFAULT_QUEUE_BYTES;
    if (waiting + len > limit && from->busy_until_ns > now_ns) {
        return UINT64_MAX;
    }
    /* The remainder is carried over, so that the rate holds exactly. */
    uint64_t work = len * 8000000000ull + from->rate_remainder;
    from->busy_until_ns += work / f->rate_bps;
    from->rate_remainder = work % f->rate_bps;
    return from->busy_until_ns;
}

/* Delay and jitter. Order is kept: jitter alone never makes a frame overtake another. */
static uint64_t arrival_ns(struct port *from, uint64_t departed_ns)
{
    const struct sim_faults *f = &from->faults;
    uint64_t t = departed_ns + f->delay_ns;
    if (f->jitter_ns) {
        t += prng_below(&from->prng, f->jitter_ns + 1);
        if (t < from->last_arrival_ns) {
            t = from->last_arrival_ns;
        }
        from->last_arrival_ns = t;
    }
    return t;
}

static void drop(struct fate *fate, uint64_t *counter, uint16_t capture_flag)
{
    ++*counter;
    fate->deliver = false;
    fate->capture_flags |= capture_flag;
}

static void apply(struct port *from, const struct outgoing *out, uint8_t what, struct fate *fate)
{
    enum { DEFAULT_REORDER_NS = 1000000 };
    switch (what) {
    case SIM_FATE_LOSE:
        drop(fate, &from->stats.lost, CAPTURE_LOST);
        break;
    case SIM_FATE_CORRUPT:
        if (!choose_corruption(&from->prng, out, fate)) {
            drop(fate, &from->stats.lost, CAPTURE_LOST);
            break;
        }
        from->stats.corrupted++;
        fate->capture_flags |= CAPTURE_CORRUPTED;
        break;
    case SIM_FATE_REORDER: {
        uint64_t most = from->faults.reorder_ns ? from->faults.reorder_ns : DEFAULT_REORDER_NS;
        fate->arrival_ns[0] += 1 + prng_below(&from->prng, most);
        from->stats.reordered++;
        fate->capture_flags |= CAPTURE_REORDERED;
        break;
    }
    case SIM_FATE_DUPLICATE:
        fate->twice = true;
        fate->arrival_ns[1] = fate->arrival_ns[0];
        from->stats.duplicated++;
        fate->capture_flags |= CAPTURE_DUPLICATED;
        break;
    default:
        break;
    }
}

void fault_decide(struct port *from, const struct outgoing *out, uint64_t now_ns, struct fate *fate)
{
    const struct sim_faults *f = &from->faults;
    *fate = (struct fate){.deliver = true, .capture_flags = CAPTURE_TX};
    if (from->bad.down) {
        drop(fate, &from->stats.down_dropped, CAPTURE_DOWN);
        return;
    }
    if (f->mtu && out->len > ETH_HEADER + f->mtu) {
        drop(fate, &from->stats.oversize, CAPTURE_OVERSIZE);
        return;
    }
    fate->mark = deserves_mark(from, out, now_ns);
    uint64_t departed_ns = departure_ns(from, out->len, now_ns);
    if (departed_ns == UINT64_MAX) {
        drop(fate, &from->stats.queue_dropped, CAPTURE_QUEUE_DROPPED);
        return;
    }
    from->stats.marked += fate->mark;
    uint8_t what = draw(from);
    fate->arrival_ns[0] = arrival_ns(from, departed_ns);
    apply(from, out, what, fate);
}

void sim_port_faults(struct bypass_netdev *dev, const struct sim_faults *faults) { port_of(dev)->faults = *faults; }

int sim_port_script(struct bypass_netdev *dev, const uint8_t *fates, uint32_t n)
{
    struct port *p = port_of(dev);
    uint8_t *copy = malloc(n ? n : 1);
    if (!copy) {
        return -ENOMEM;
    }
    memcpy(copy, fates, n);
    free(p->script);
    p->script = copy;
    p->script_len = n;
    p->script_next = 0;
    return 0;
}
