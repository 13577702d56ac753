/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_opt.c - TCP options, both ways: MSS (RFC 9293 3.7.1), window scale and timestamps (RFC 7323).
 * Unknown options are skipped by their length (RFC 9293 3.1, MUST-6).
 */
#include "tcp.h"

enum { OPT_END = 0, OPT_NOP = 1, OPT_MSS = 2, OPT_WSCALE = 3, OPT_TS = 8, MAX_WSCALE = 14 };

static_assert(TCP_TS_PREFIX == (10 << 24 | OPT_TS << 16 | OPT_NOP << 8 | OPT_NOP), "little-endian");

bool tcp_opt_parse_ts(const uint8_t *p, uint32_t len, struct tcp_opts *out)
{
    if (len != TCP_TS_BYTES || rd32(p) != __builtin_bswap32(TCP_TS_PREFIX))
        return false;
    out->has_ts = true;
    out->ts_val = rd32(p + 4);
    out->ts_ecr = rd32(p + 8);
    return true;
}

static void opt_take(uint8_t kind, const uint8_t *value, uint32_t len, struct tcp_opts *out)
{
    if (kind == OPT_MSS && len == 4) {
        out->mss = rd16(value);
    } else if (kind == OPT_WSCALE && len == 3) {
        out->has_wscale = true;
        out->wscale = value[0] > MAX_WSCALE ? MAX_WSCALE : value[0]; /* RFC 7323 2.3 */
    } else if (kind == OPT_TS && len == 10) {
        out->has_ts = true;
        out->ts_val = rd32(value);
        out->ts_ecr = rd32(value + 4);
    }
}

bool tcp_opt_parse(const uint8_t *p, uint32_t len, struct tcp_opts *out)
{
    while (len > 0) {
        if (p[0] == OPT_END)
            return true;
        if (p[0] == OPT_NOP) {
            p++, len--;
            continue;
        }
        if (len < 2 || p[1] < 2 || p[1] > len)
            return false;
        opt_take(p[0], p + 2, p[1], out);
        len -= p[1];
        p += p[1];
    }
    return true;
}

uint32_t tcp_opt_write_ts(uint8_t *p, uint32_t val, uint32_t ecr)
{
    wr32(p, __builtin_bswap32(TCP_TS_PREFIX));
    wr32(p + 4, val);
    wr32(p + 8, ecr);
    return TCP_TS_BYTES;
}

uint32_t tcp_opt_write_syn(uint8_t *p, uint16_t mss, bool wscale, uint8_t shift, bool ts, uint32_t val, uint32_t ecr)
{
    uint8_t *start = p;
    *p++ = OPT_MSS;
    *p++ = 4;
    wr16(p, mss);
    p += 2;
    if (ts)
        p += tcp_opt_write_ts(p, val, ecr);
    if (wscale) {
        *p++ = OPT_NOP;
        *p++ = OPT_WSCALE;
        *p++ = 3;
        *p++ = shift;
    }
    return (uint32_t)(p - start);
}
