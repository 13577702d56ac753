/* SPDX-License-Identifier: Apache-2.0 */
/* Quantities with types: byte order, TCP sequence numbers, addresses. No logic beyond them. */
#ifndef BYPASS_STACK_TYPES_H
#define BYPASS_STACK_TYPES_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bypass.h"

typedef uint16_t be16; /* as on the wire; convert at the edge with rd16/wr16 or to_be16 */
typedef uint32_t be32;

/* Unaligned big-endian access: what parsers and builders of headers use. */
static inline uint16_t rd16(const void *p)
{
    const uint8_t *b = p;
    return (uint16_t)(b[0] << 8 | b[1]);
}
static inline uint32_t rd32(const void *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return __builtin_bswap32(v);
}
static inline void wr16(void *p, uint16_t v)
{
    v = __builtin_bswap16(v);
    memcpy(p, &v, 2);
}
static inline void wr32(void *p, uint32_t v)
{
    v = __builtin_bswap32(v);
    memcpy(p, &v, 4);
}

/* A TCP sequence number: modulo 2^32 (RFC 9293 3.4). Compare with these, never with < . */
typedef struct {
    uint32_t v;
} seq_t;

static inline seq_t seq(uint32_t v) { return (seq_t){v}; }
static inline seq_t seq_add(seq_t a, uint32_t n) { return (seq_t){a.v + n}; }
static inline int32_t seq_diff(seq_t a, seq_t b) { return (int32_t)(a.v - b.v); } /* a - b */
static inline bool seq_lt(seq_t a, seq_t b) { return seq_diff(a, b) < 0; }
static inline bool seq_leq(seq_t a, seq_t b) { return seq_diff(a, b) <= 0; }
static inline bool seq_gt(seq_t a, seq_t b) { return seq_diff(a, b) > 0; }
static inline bool seq_geq(seq_t a, seq_t b) { return seq_diff(a, b) >= 0; }
static inline bool seq_eq(seq_t a, seq_t b) { return a.v == b.v; }

typedef struct bypass_addr addr_t;

static inline bool addr_eq(const addr_t *a, const addr_t *b) { return memcmp(a, b, sizeof *a) == 0; }
/* IPv4 inside an address: the last four bytes, as on the wire. */
static inline const uint8_t *addr_v4(const addr_t *a) { return a->b + 12; }
static inline bool addr_is_v4(const addr_t *a)
{
    static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
    return memcmp(a->b, mapped, 12) == 0;
}
static inline addr_t addr_from_v4(const void *wire)
{
    addr_t a = {{0}};
    a.b[10] = a.b[11] = 0xff;
    memcpy(a.b + 12, wire, 4);
    return a;
}
/* The wildcard, :: or 0.0.0.0 in either form. */
static inline bool addr_is_any(const addr_t *a)
{
    static const uint8_t zero[16];
    return memcmp(a->b, zero, 16) == 0 || (addr_is_v4(a) && memcmp(a->b + 12, zero, 4) == 0);
}

#define MSEC_NS 1000000ull
#define SEC_NS 1000000000ull
#define NO_DEADLINE UINT64_MAX
#define NO_INDEX 0xffffffffu

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

static inline uint32_t min_u32(uint32_t a, uint32_t b) { return a < b ? a : b; }
static inline uint32_t max_u32(uint32_t a, uint32_t b) { return a > b ? a : b; }
static inline uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }

#endif
