/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The Internet checksum (RFC 1071; RFC 1624 for updates). Words are added as they lie in memory: the ones'-complement
 * sum does not care about byte order (RFC 1071 2.B), nor about the width of the addition (2.C): 64-bit sums fold to
 * 32 and 16 bits.
 *
 * Two variants of sum and of sum-and-copy: portable, 8 bytes at a time with end-around carry, and AVX2, 64 bytes at a
 * time into 64-bit lanes that cannot overflow. csum_bytes() and csum_copy() choose at run time.
 */
#include "csum.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Below this the wide loop's set-up and reduction cost more than they save. */
enum { WIDE_MIN = 192 };

static inline uint64_t load64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

static inline uint64_t add_carry(uint64_t a, uint64_t b)
{
    uint64_t sum;
    return __builtin_add_overflow(a, b, &sum) ? sum + 1 : sum;
}

static inline uint32_t fold32(uint64_t sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    return (uint32_t)(sum + (sum >> 32));
}

/* The last 1 to 7 bytes, padded with zeros behind (RFC 1071 1). */
static inline uint64_t load_tail(const uint8_t *p, size_t len)
{
    uint8_t pad[8] = {0};
    size_t at = 0;
    if (len & 4) {
        memcpy(pad, p, 4);
        at = 4;
    }
    if (len & 2) {
        memcpy(pad + at, p + at, 2);
        at += 2;
    }
    if (len & 1) {
        pad[at] = p[at];
    }
    return load64(pad);
}

uint32_t csum_bytes_portable(const void *data, size_t len, uint32_t sum)
{
    const uint8_t *p = data;
    uint64_t a = sum, b = 0;
    for (; len >= 32; len -= 32, p += 32) {
        a = add_carry(a, load64(p));
        b = add_carry(b, load64(p + 8));
        a = add_carry(a, load64(p + 16));
        b = add_carry(b, load64(p + 24));
    }
    for (; len >= 8; len -= 8, p += 8) {
        a = add_carry(a, load64(p));
    }
    if (len > 0) {
        b = add_carry(b, load_tail(p, len));
    }
    return fold32(add_carry(a, b));
}

uint32_t csum_copy_portable(void *dst, const void *src, size_t len, uint32_t sum)
{
    const uint8_t *p = src;
    uint8_t *q = dst;
    uint64_t a = sum, b = 0;
    for (; len >= 32; len -= 32, p += 32, q += 32) {
        uint64_t v[4] = {load64(p), load64(p + 8), load64(p + 16), load64(p + 24)};
        memcpy(q, v, 32);
        a = add_carry(add_carry(a, v[0]), v[1]);
        b = add_carry(add_carry(b, v[2]), v[3]);
    }
    for (; len >= 8; len -= 8, p += 8, q += 8) {
        uint64_t v = load64(p);
        memcpy(q, &v, 8);
        a = add_carry(a, v);
    }
    if (len > 0) {
        b = add_carry(b, load_tail(p, len));
        for (size_t i = 0; i < len; i++) {
            q[i] = p[i];
        }
    }
    return fold32(add_carry(a, b));
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) static inline uint64_t lanes_sum(__m256i a, __m256i b)
{
    __m256i sum = _mm256_add_epi64(a, b); /* each lane below 2^33 times the number of rounds */
    __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    return (uint64_t)_mm_cvtsi128_si64(half) + (uint64_t)_mm_extract_epi64(half, 1);
}

__attribute__((target("avx2"))) uint32_t csum_bytes_avx2(const void *data, size_t len, uint32_t sum)
{
    const uint8_t *p = data;
    const __m256i low = _mm256_set1_epi64x(0xffffffff);
    __m256i a = _mm256_setzero_si256(), b = a;
    for (; len >= 64; len -= 64, p += 64) {
        __m256i v = _mm256_loadu_si256((const __m256i *)p), w = _mm256_loadu_si256((const __m256i *)(p + 32));
        a = _mm256_add_epi64(a, _mm256_and_si256(v, low));
        b = _mm256_add_epi64(b, _mm256_srli_epi64(v, 32));
        a = _mm256_add_epi64(a, _mm256_and_si256(w, low));
        b = _mm256_add_epi64(b, _mm256_srli_epi64(w, 32));
    }
    return csum_bytes_portable(p, len, csum_add(fold32(lanes_sum(a, b)), sum));
}

__attribute__((target("avx2"))) uint32_t csum_copy_avx2(void *dst, const void *src, size_t len, uint32_t sum)
{
    const uint8_t *p = src;
    uint8_t *q = dst;
    const __m256i low = _mm256_set1_epi64x(0xffffffff);
    __m256i a = _mm256_setzero_si256(), b = a;
    for (; len >= 64; len -= 64, p += 64, q += 64) {
        __m256i v = _mm256_loadu_si256((const __m256i *)p), w = _mm256_loadu_si256((const __m256i *)(p + 32));
        _mm256_storeu_si256((__m256i *)q, v);
        _mm256_storeu_si256((__m256i *)(q + 32), w);
        a = _mm256_add_epi64(a, _mm256_and_si256(v, low));
        b = _mm256_add_epi64(b, _mm256_srli_epi64(v, 32));
        a = _mm256_add_epi64(a, _mm256_and_si256(w, low));
        b = _mm256_add_epi64(b, _mm256_srli_epi64(w, 32));
    }
    return csum_copy_portable(q, p, len, csum_add(fold32(lanes_sum(a, b)), sum));
}

bool csum_has_avx2(void) { return __builtin_cpu_supports("avx2"); }

#else

uint32_t csum_bytes_avx2(const void *data, size_t len, uint32_t sum) { return csum_bytes_portable(data, len, sum); }

uint32_t csum_copy_avx2(void *dst, const void *src, size_t len, uint32_t sum)
{
    return csum_copy_portable(dst, src, len, sum);
}

bool csum_has_avx2(void) { return false; }

#endif

uint32_t csum_bytes(const void *data, size_t len, uint32_t sum)
{
    if (len >= WIDE_MIN && csum_has_avx2()) {
        return csum_bytes_avx2(data, len, sum);
    }
    return csum_bytes_portable(data, len, sum);
}

uint32_t csum_copy(void *dst, const void *src, size_t len, uint32_t sum)
{
    if (len >= WIDE_MIN && csum_has_avx2()) {
        return csum_copy_avx2(dst, src, len, sum);
    }
    return csum_copy_portable(dst, src, len, sum);
}

/* An IPv4 address in its IPv6 form brings 0xffff along, which is zero in ones'-complement arithmetic: one formula
 * serves both families. The IPv6 pseudo-header has a 32-bit length and the IPv4 one 16 bits: the same sum. */
uint32_t csum_pseudo_any(const addr_t *src, const addr_t *dst, uint8_t proto, uint32_t len)
{
    uint64_t sum = (uint64_t)__builtin_bswap32(len) + __builtin_bswap32(proto);
    sum = add_carry(sum, load64(src->b));
    sum = add_carry(sum, load64(src->b + 8));
    sum = add_carry(sum, load64(dst->b));
    sum = add_carry(sum, load64(dst->b + 8));
    return fold32(sum);
}
