/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every variant of the checksum against RFC 1071's own words: all lengths to 400 and some large ones, at all
 * alignments. Buffers end where the data ends, so that the address sanitizer sees a byte read or written too much.
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

#include "csum.h"

static uint16_t naive(const uint8_t *p, size_t len, uint16_t sum16)
{
    uint32_t sum = sum16;
    for (size_t i = 0; i < len; i += 2) {
        sum += (uint32_t)p[i] << 8 | (i + 1 < len ? p[i + 1] : 0);
        sum = (sum & 0xffff) + (sum >> 16);
    }
    return (uint16_t)sum;
}

/* The sum as a 16-bit big-endian word; 0 and 0xffff are the same number. */
static uint16_t word(uint32_t sum)
{
    uint16_t folded = (uint16_t)~csum_fold(sum), w = rd16(&folded);
    return w == 0xffff ? 0 : w;
}

typedef uint32_t sum_fn(const void *, size_t, uint32_t);
typedef uint32_t copy_fn(void *, const void *, size_t, uint32_t);

static uint32_t checks;

static void check(sum_fn *sum, copy_fn *copy, const uint8_t *p, size_t len, uint32_t start)
{
    uint16_t start16 = (uint16_t)~csum_fold(start);
    uint16_t expected = naive(p, len, rd16(&start16));
    uint8_t *to = malloc(len + 1);
    assert(to != NULL);
    to[len] = 0x5a;
    expected = expected == 0xffff ? 0 : expected;
    assert(word(sum(p, len, start)) == expected);
    assert(word(copy(to, p, len, start)) == expected);
    assert(len == 0 || memcmp(to, p, len) == 0);
    assert(to[len] == 0x5a);
    free(to);
    checks++;
}

static void fill(uint8_t *p, size_t len, uint32_t seed)
{
    for (size_t i = 0; i < len; i++) {
        seed = seed * 1664525 + 1013904223;
        p[i] = seed % 5 == 0 ? 0xff : (uint8_t)(seed >> 24);
    }
}

static void check_all(sum_fn *sum, copy_fn *copy)
{
    static const size_t large[] = {1448, 1460, 2047, 4096, 9000, 65535, 1 << 20};
    for (size_t len = 0; len <= 400; len++) {
        for (size_t shift = 0; shift < 64; shift += len < 100 ? 1 : 7) {
            uint8_t *block = malloc(shift + len + (shift + len == 0));
            assert(block != NULL);
            fill(block, shift + len, (uint32_t)(len * 64 + shift));
            check(sum, copy, block + shift, len, (uint32_t)(len * 0x9e3779b9u));
            free(block);
        }
    }
    for (size_t i = 0; i < ARRAY_LEN(large); i++) {
        uint8_t *block = malloc(large[i] + 3);
        assert(block != NULL);
        memset(block, 0xff, large[i] + 3); /* most carries */
        check(sum, copy, block + 3, large[i], 0xffffffff);
        fill(block, large[i] + 3, 1);
        check(sum, copy, block + 3, large[i], 0xffffffff);
        free(block);
    }
}

static void check_pseudo(void)
{
    static const uint8_t v4[2][4] = {{192, 0, 2, 1}, {203, 0, 113, 254}};
    uint8_t header[12] = {192, 0, 2, 1, 203, 0, 113, 254, 0, 17};
    addr_t src = addr_from_v4(v4[0]), dst = addr_from_v4(v4[1]);
    for (uint32_t len = 0; len < 65536; len += 255) {
        wr16(header + 10, (uint16_t)len);
        assert(word(csum_pseudo(&src, &dst, 17, len)) == naive(header, 12, 0));
    }
    uint8_t six[40] = {0x20, 1, 0xd, 0xb8, [15] = 1, [16] = 0xfe, 0x80, [31] = 2, [39] = 58}; /* RFC 8200 8.1 */
    memcpy(src.b, six, 16);
    memcpy(dst.b, six + 16, 16);
    wr32(six + 32, 0x12345);
    assert(word(csum_pseudo(&src, &dst, 58, 0x12345)) == naive(six, 40, 0));
}

int main(void)
{
    check_all(csum_bytes_portable, csum_copy_portable);
    check_all(csum_bytes, csum_copy);
    if (csum_has_avx2()) {
        check_all(csum_bytes_avx2, csum_copy_avx2);
    }
    check_pseudo();
    printf("%u checks, avx2 %s\n", checks, csum_has_avx2() ? "tested" : "missing");
    return 0;
}
