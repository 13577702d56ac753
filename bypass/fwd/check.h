/* SPDX-License-Identifier: Apache-2.0 */
/*
 * check.h - may this application send this frame? And whose is a frame that came? Pure functions of bytes: no memory
 * of an application is touched here, the frame lies in bypass-fwd's own.
 *
 * What may be sent is what the stack sends: Ethernet from the interface's address to one host, IPv4 without options
 * from an address of this host; TCP and UDP from a leased port; ICMP errors about a packet to a leased port. Later
 * fragments of a UDP datagram, which have no ports, follow their first one by source, destination and identification;
 * TCP is never fragmented by the stack.
 */
#ifndef BYPASS_FWD_CHECK_H
#define BYPASS_FWD_CHECK_H

#include "bypass.h"
#include "fwd.h"
#include "lease.h"

enum { CHECK_FRAGMENTS = 64 };

struct checker { /* of the interface */
    uint8_t mac[6];
    uint16_t mtu;
    struct leases leases;
    uint32_t locals, broadcasts;        /* numbers of */
    uint32_t local[FWD_LOCALS_MAX];     /* in host order, sorted */
    uint32_t broadcast[FWD_LOCALS_MAX]; /* of their subnets, likewise */
};

struct sender {     /* of one application */
    uint32_t owner; /* in leases */
    uint32_t allow; /* FWD_ALLOW_* */
    uint32_t next;  /* place of the next first fragment: the oldest is forgotten */
    struct {
        uint32_t src, dst;
        uint16_t id;
        uint64_t until_ns; /* 0: none */
    } fragment[CHECK_FRAGMENTS];
};

void checker_locals(struct checker *c, const struct fwd_local *list, uint32_t count);
/* FWD_OK, or why not. m: length, and the checksum request. */
enum fwd_refusal check_send(const struct checker *c, struct sender *s, const uint8_t *frame,
                            const struct bypass_pkt_meta *m, uint64_t now_ns);
/* The owner of a received frame, by its headers: for frames without a verdict. 0: nobody's. */
uint32_t check_owner(const struct checker *c, const uint8_t *frame, uint32_t len);

/* A bucket of tokens, kept as the time at which it will be full again: no rounding is lost between calls. */
struct bucket {
    uint64_t per_s; /* bytes or packets; 0: no limit */
    uint64_t burst;
    uint64_t full_ns; /* in units of 1/64 ns */
};
void bucket_set(struct bucket *b, uint64_t per_s, uint64_t burst, uint64_t now_ns);
/* When something may be taken out: a time that is not in the future: now. */
uint64_t bucket_ready(const struct bucket *b);
void bucket_take(struct bucket *b, uint64_t n, uint64_t now_ns);

#endif
