/* SPDX-License-Identifier: Apache-2.0 */
/*
 * wire.c - carries frames from port to port. A frame that arrives at once is copied straight into the
 * receiver's packet memory; one that takes time waits in a slot of the port it goes to, in order of
 * arrival, and is copied a second time when it arrives. (A sender's own frame cannot wait instead: it
 * would look untransmitted to its stack for as long as the wire is.)
 */
#include <stdlib.h>

#include "internal.h"

/* RFC 1071, of data in memory order; what is stored goes back in memory order too. */
static void complete_csum(uint8_t *frame, const struct outgoing *out)
{
    uint64_t sum = 0;
    uint32_t at = (uint32_t)out->csum_start + out->csum_off;
    if (at + 2 > out->len) {
        return;
    }
    for (uint32_t i = out->csum_start; i + 1 < out->len; i += 2) {
        uint16_t word;
        memcpy(&word, frame + i, 2);
        sum += word;
    }
    if ((out->len - out->csum_start) & 1) {
        sum += frame[out->len - 1];
    }
    while (sum >> 16) {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    uint16_t csum = (uint16_t)~sum;
    csum = csum ? csum : 0xffff; /* RFC 768: zero would mean "none" */
    memcpy(frame + at, &csum, 2);
}

/* Sets both ECN bits of an IPv4 header and mends its checksum (RFC 1624 equation 3). */
static void mark_ce(uint8_t *ip)
{
    uint16_t old = (uint16_t)(ip[0] << 8 | ip[1]), check = (uint16_t)(ip[10] << 8 | ip[11]);
    ip[1] |= 3;
    uint32_t sum = (uint16_t)~check + (uint32_t)(uint16_t)~old + (uint16_t)(ip[0] << 8 | ip[1]);
    sum = (sum & 0xffff) + (sum >> 16);
    check = (uint16_t) ~((sum & 0xffff) + (sum >> 16));
    ip[10] = (uint8_t)(check >> 8);
    ip[11] = (uint8_t)check;
}

/* What the wire does to the bytes of one copy. */
static void finish_bytes(uint8_t *frame, const struct outgoing *out, const struct fate *fate)
{
    if (out->complete_csum) {
        complete_csum(frame, out);
    }
    if (fate->mark) {
        mark_ce(frame + ETH_HEADER);
    }
    if (fate->corrupt_mask) {
        frame[fate->corrupt_at] ^= (uint8_t)(fate->corrupt_mask >> 8);
        if (fate->corrupt_at + 1 < out->len) {
            frame[fate->corrupt_at + 1] ^= (uint8_t)fate->corrupt_mask;
        }
    }
}

/* Inserts behind everything that arrives no later. Frames mostly come in order: no step is needed. */
static void flight_insert(struct port *to, const struct flight *f)
{
    uint32_t i = to->flights_tail++;
    while (i != to->flights_head && to->flights[(i - 1) & to->flights_mask].time_ns > f->time_ns) {
        to->flights[i & to->flights_mask] = to->flights[(i - 1) & to->flights_mask];
        i--;
    }
    to->flights[i & to->flights_mask] = *f;
}

static void fly(struct port *to, const struct outgoing *out, const struct fate *fate, uint64_t time_ns, uint8_t flags)
{
    if (to->flights_tail - to->flights_head == to->flights_cap || out->len > to->slot_stride) {
        to->stats.in_flight_dropped++;
        return;
    }
    uint32_t slot = to->slot_listed ? to->slot_free[--to->slot_listed] : to->slot_bump++;
    uint8_t *bytes = to->slots + (size_t)slot * to->slot_stride;
    memcpy(bytes, out->data, out->len);
    finish_bytes(bytes, out, fate);
    flight_insert(to, &(struct flight){.time_ns = time_ns, .slot = slot, .len = (uint16_t)out->len, .flags = flags});
}

static void deliver(struct port *to, const struct outgoing *out, const struct fate *fate, uint64_t time_ns)
{
    uint64_t now_ns = to->sim->now_ns;
    uint8_t flags = fate->corrupt_mask ? 0 : BYPASS_RX_CSUM_OK;
    if (time_ns > now_ns) {
        fly(to, out, fate, time_ns, flags);
        return;
    }
    bypass_pkt pkt = port_rx_begin(to, out->data, out->len);
    if (pkt != BYPASS_PKT_NONE) {
        finish_bytes(port_bytes(to, pkt, to->dev.headroom), out, fate);
        port_rx_end(to, pkt, flags);
    }
}

static struct port *port_with_mac(const struct sim_wire *wire, const uint8_t *mac)
{
    for (struct port *p = wire->ports; p; p = p->next) {
        if (memcmp(p->dev.mac, mac, sizeof p->dev.mac) == 0) {
            return p;
        }
    }
    return NULL;
}

void wire_send(struct port *from, const struct outgoing *out)
{
    struct fate fate;
    uint64_t now_ns = from->sim->now_ns;
    from->stats.tx_frames++;
    from->stats.tx_bytes += out->len;
    fault_decide(from, out, now_ns, &fate);
    if (from->capture) {
        capture_add(from->capture, now_ns, from->capture_interface, fate.capture_flags, out->data, out->len);
    }
    if (!fate.deliver) {
        return;
    }
    const struct port *only = from->wire->flags & SIM_WIRE_SWITCH ? port_with_mac(from->wire, out->data) : NULL;
    for (struct port *to = from->wire->ports; to; to = to->next) {
        if (to == from || (only && to != only && !(to->flags & SIM_PORT_RAW))) {
            continue;
        }
        deliver(to, out, &fate, fate.arrival_ns[0]);
        if (fate.twice) {
            deliver(to, out, &fate, fate.arrival_ns[1]);
        }
    }
}

void wire_deliver(struct port *to, uint64_t now_ns)
{
    while (wire_next(to) <= now_ns) {
        const struct flight *f = &to->flights[to->flights_head++ & to->flights_mask];
        bypass_pkt pkt = port_rx_begin(to, to->slots + (size_t)f->slot * to->slot_stride, f->len);
        if (pkt != BYPASS_PKT_NONE) {
            port_rx_end(to, pkt, (uint8_t)f->flags);
        }
        to->slot_free[to->slot_listed++] = f->slot;
    }
}

struct sim_wire *sim_wire_create(struct sim *sim, uint32_t flags)
{
    struct sim_wire *wire = calloc(1, sizeof *wire);
    if (!wire) {
        return NULL;
    }
    wire->sim = sim;
    wire->flags = flags;
    wire->next = sim->wires;
    sim->wires = wire;
    return wire;
}
