/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hash.c - keyed hashes: SipHash for secrets that leave the machine (sequence numbers, cookies), and for tables;
 * a hash of one IPv4 flow, which every segment pays for, by the AES instructions where the processor has them.
 */
#include "core.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static inline uint64_t rotl64(uint64_t v, int n) { return v << n | v >> (64 - n); }

#define SIP_ROUND(v0, v1, v2, v3)                                                                                      \
    do {                                                                                                               \
        v0 += v1, v1 = rotl64(v1, 13), v1 ^= v0, v0 = rotl64(v0, 32);                                                  \
        v2 += v3, v3 = rotl64(v3, 16), v3 ^= v2;                                                                       \
        v0 += v3, v3 = rotl64(v3, 21), v3 ^= v0;                                                                       \
        v2 += v1, v1 = rotl64(v1, 17), v1 ^= v2, v2 = rotl64(v2, 32);                                                  \
    } while (0)

/* SipHash with one compression and three finalisation rounds (Aumasson, Bernstein 2012). */
uint64_t siphash13(const uint64_t key[2], const void *data, size_t len)
{
    uint64_t v0 = 0x736f6d6570736575ull ^ key[0], v1 = 0x646f72616e646f6dull ^ key[1];
    uint64_t v2 = 0x6c7967656e657261ull ^ key[0], v3 = 0x7465646279746573ull ^ key[1];
    const uint8_t *p = data;
    uint64_t last = (uint64_t)len << 56, word;
    for (; len >= 8; len -= 8, p += 8) {
        memcpy(&word, p, 8);
        v3 ^= word;
        SIP_ROUND(v0, v1, v2, v3);
        v0 ^= word;
    }
    word = 0; /* the last 0 to 7 bytes, without a call for so few */
    for (size_t at = len & ~(size_t)3; at < len; at++)
        word |= (uint64_t)p[at] << 8 * at;
    if (len & 4) {
        uint32_t four;
        memcpy(&four, p, 4);
        word |= four;
    }
    last |= word;
    v3 ^= last;
    SIP_ROUND(v0, v1, v2, v3);
    v0 ^= last;
    v2 ^= 0xff;
    SIP_ROUND(v0, v1, v2, v3);
    SIP_ROUND(v0, v1, v2, v3);
    SIP_ROUND(v0, v1, v2, v3);
    return v0 ^ v1 ^ v2 ^ v3;
}

/* The same of 12 bytes in registers: an IPv4 flow, once for every segment. */
uint64_t siphash13_12(const uint64_t key[2], uint64_t first, uint32_t rest)
{
    uint64_t v0 = 0x736f6d6570736575ull ^ key[0], v1 = 0x646f72616e646f6dull ^ key[1];
    uint64_t v2 = 0x6c7967656e657261ull ^ key[0], v3 = 0x7465646279746573ull ^ key[1] ^ first;
    uint64_t last = 12ull << 56 | rest;
    SIP_ROUND(v0, v1, v2, v3);
    v0 ^= first;
    v3 ^= last;
    SIP_ROUND(v0, v1, v2, v3);
    v0 ^= last;
    v2 ^= 0xff;
    SIP_ROUND(v0, v1, v2, v3);
    SIP_ROUND(v0, v1, v2, v3);
    SIP_ROUND(v0, v1, v2, v3);
    return v0 ^ v1 ^ v2 ^ v3;
}

/* ---- Flows --------------------------------------------------------------------------------------- */
#if defined(__x86_64__)

bool hash_has_aes(void) { return __builtin_cpu_supports("aes") != 0; }

/* Three rounds of AES, with secret round keys: two diffuse every bit into every other. Not a MAC; but who does not
 * know the keys, and never sees a value, cannot choose flows that collide, and a seventh of SipHash's instructions. */
__attribute__((target("aes"))) uint32_t hash_flow_aes(const uint64_t key[4], uint64_t hosts, uint32_t ports)
{
    const __m128i k0 = _mm_loadu_si128((const __m128i *)key), k1 = _mm_loadu_si128((const __m128i *)(key + 2));
    __m128i x = _mm_xor_si128(_mm_set_epi64x(ports, (int64_t)hosts), k0);
    x = _mm_aesenc_si128(x, k1);
    x = _mm_aesenc_si128(x, k0);
    x = _mm_aesenc_si128(x, k1);
    return (uint32_t)_mm_cvtsi128_si32(x);
}

#else

bool hash_has_aes(void) { return false; }

uint32_t hash_flow_aes(const uint64_t key[4], uint64_t hosts, uint32_t ports)
{
    return (uint32_t)siphash13_12(key, hosts, ports);
}

#endif

void hash_init(struct core *c, const uint64_t secret[2])
{
    memcpy(c->hash_key, secret, 16);
    for (uint64_t i = 0; i < 4; i++)
        c->flow_key[i] = siphash13(secret, &i, sizeof i);
    c->flow_aes = hash_has_aes();
}
