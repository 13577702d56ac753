/* SPDX-License-Identifier: Apache-2.0 */
/* The Internet checksum (RFC 1071): partial sums, sum-and-copy in one pass, folding. */
#ifndef BYPASS_STACK_CSUM_H
#define BYPASS_STACK_CSUM_H

#include "types.h"

/* Partial sums are ones'-complement sums of 16-bit words in memory order, folded to 32 bits or fewer.
 * They add up by csum_add() as long as each piece but the last has even length. */
uint32_t csum_bytes(const void *data, size_t len, uint32_t sum);
/* Copies len bytes and returns the partial sum of them added to `sum`: one pass over the data. */
uint32_t csum_copy(void *dst, const void *src, size_t len, uint32_t sum);
static inline uint32_t csum_add(uint32_t a, uint32_t b)
{
    uint64_t sum = (uint64_t)a + b;
    return (uint32_t)(sum + (sum >> 32));
}
/* The complement, as it is stored in a header (with memcpy, no byte swap). Adding the halves exchanged leaves their sum,
 * end-around carry included, in the upper half. */
static inline uint16_t csum_fold(uint32_t sum)
{
    sum += sum << 16 | sum >> 16;
    return (uint16_t) ~(sum >> 16);
}
static inline uint16_t csum_fold64(uint64_t sum)
{
    sum += sum << 32 | sum >> 32;
    return csum_fold((uint32_t)(sum >> 32));
}
/* Of the 20 bytes of an IPv4 header without options: 0 when its checksum is right. */
static inline uint16_t csum_ipv4_header(uint64_t first, uint64_t second, uint32_t third)
{
    uint64_t sum;
    sum = __builtin_add_overflow(first, second, &sum) ? sum + 1 : sum;
    return csum_fold64(__builtin_add_overflow(sum, third, &sum) ? sum + 1 : sum);
}
/* csum_bytes() of n words in registers. */
static inline uint32_t csum_words(const uint64_t *w, uint32_t n, uint32_t sum)
{
    uint64_t a = sum;
    for (uint32_t i = 0; i < n; i++)
        a = __builtin_add_overflow(a, w[i], &a) ? a + 1 : a;
    return csum_add((uint32_t)a, (uint32_t)(a >> 32));
}

/* Payload into a frame, and its partial sum: 0 where the device sums. */
static inline uint32_t csum_copy_tx(const struct bypass_netdev *dev, void *dst, const void *src, size_t len)
{
    if (!(dev->caps & BYPASS_CAP_TX_CSUM))
        return csum_copy(dst, src, len, 0);
    memcpy(dst, src, len);
    return 0;
}
/* Leaves the checksum at `field` to the device, which adds all bytes from `start` (of the complete frame) on: what it
 * finds there is the pseudo-header's sum. */
static inline void csum_leave(struct bypass_pkt_meta *m, uint8_t *field, uint32_t pseudo, uint16_t start, uint16_t off)
{
    uint16_t part = (uint16_t)~csum_fold(pseudo);
    memcpy(field, &part, 2);
    m->flags = BYPASS_TX_CSUM;
    m->csum_start = start;
    m->csum_off = off;
}

/* csum_bytes() of few bytes, in place: a header and a short payload. */
static inline uint32_t csum_small(const uint8_t *p, size_t len, uint32_t sum)
{
    uint64_t a = sum, v;
    if (len > 256)
        return csum_bytes(p, len, sum);
    for (; len >= 16; len -= 16, p += 16) {
        memcpy(&v, p, 8);
        a = __builtin_add_overflow(a, v, &a) ? a + 1 : a;
        memcpy(&v, p + 8, 8);
        a = __builtin_add_overflow(a, v, &a) ? a + 1 : a;
    }
    if (len > 0)
        a = csum_add((uint32_t)a, (uint32_t)(a >> 32)) + (uint64_t)csum_bytes(p, len, 0);
    return csum_add((uint32_t)a, (uint32_t)(a >> 32));
}

/* Partial sum of the IPv4 or IPv6 pseudo-header (RFC 9293 3.1, RFC 8200 8.1). */
uint32_t csum_pseudo_any(const addr_t *src, const addr_t *dst, uint8_t proto, uint32_t len);
static inline uint32_t csum_pseudo(const addr_t *src, const addr_t *dst, uint8_t proto, uint32_t len)
{
    uint32_t a, b;
    if (unlikely(!addr_is_v4(dst)))
        return csum_pseudo_any(src, dst, proto, len);
    memcpy(&a, addr_v4(src), 4); /* what stands in front of it, ::ffff, is zero in ones'-complement arithmetic */
    memcpy(&b, addr_v4(dst), 4);
    return csum_add(csum_add(a, b), (uint32_t)__builtin_bswap16((uint16_t)len) + __builtin_bswap16(proto));
}

/* The variants that csum_bytes() and csum_copy() choose from, for tests. The wide ones need csum_has_avx2(). */
uint32_t csum_bytes_portable(const void *data, size_t len, uint32_t sum);
uint32_t csum_copy_portable(void *dst, const void *src, size_t len, uint32_t sum);
uint32_t csum_bytes_avx2(const void *data, size_t len, uint32_t sum);
uint32_t csum_copy_avx2(void *dst, const void *src, size_t len, uint32_t sum);
bool csum_has_avx2(void);

#endif
