/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_opt.c - TCP options, both ways: MSS (RFC 9293 3.7.1), window scale and timestamps (RFC 7323), selective
 * acknowledgment (RFC 2018), Fast Open (RFC 7413).
 * Unknown options are skipped by their length (RFC 9293 3.1, MUST-6).
 */
#include "tcp.h"

enum {
    OPT_END = 0,
    OPT_NOP = 1,
    OPT_MSS = 2,
    OPT_WSCALE = 3,
    OPT_SACK_OK = 4,
    OPT_SACK = 5,
    OPT_TS = 8,
    OPT_FASTOPEN = 34,
    MAX_WSCALE = 14,
};

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
    } else if (kind == OPT_SACK_OK && len == 2) {
        out->sack_ok = true;
    } else if (kind == OPT_SACK && len >= 10 && (len - 2) % 8 == 0) {
        out->sacks = (uint8_t)min_u32((len - 2) / 8, SACK_BLOCKS);
        for (uint32_t i = 0; i < out->sacks; i++)
            out->sack[i] = (struct sack_block){seq(rd32(value + 8 * i)), seq(rd32(value + 8 * i + 4))};
    } else if (kind == OPT_FASTOPEN && (len == 2 || (len >= 6 && len <= 18 && len % 2 == 0))) {
        out->has_fo = true; /* RFC 7413 4.1.1: 4 to 16 bytes, even; none asks for a cookie */
        out->cookie_len = (uint8_t)(len - 2);
        memcpy(out->cookie, value, out->cookie_len);
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

uint32_t tcp_opt_write_sack(uint8_t *p, uint32_t room, const struct sack_block *b, uint32_t n)
{
    uint32_t fit = room < 12 ? 0 : min_u32(n, (room - 4) / 8);
    if (fit == 0)
        return 0;
    p[0] = p[1] = OPT_NOP;
    p[2] = OPT_SACK;
    p[3] = (uint8_t)(2 + 8 * fit);
    for (uint32_t i = 0; i < fit; i++) {
        wr32(p + 4 + 8 * i, b[i].first.v);
        wr32(p + 8 + 8 * i, b[i].end.v);
    }
    return 4 + 8 * fit;
}

static uint8_t *write_cookie(uint8_t *p, const struct tcp_opts *o)
{
    *p++ = OPT_FASTOPEN;
    *p++ = (uint8_t)(2 + o->cookie_len);
    memcpy(p, o->cookie, o->cookie_len);
    return p + o->cookie_len;
}

uint32_t tcp_opt_write_syn(uint8_t *p, const struct tcp_opts *o)
{
    uint8_t *start = p;
    *p++ = OPT_MSS;
    *p++ = 4;
    wr16(p, o->mss);
    p += 2;
    const uint8_t sack_ok[4] = {OPT_SACK_OK, 2, OPT_NOP, OPT_NOP};
    if (o->has_ts) {
        uint32_t n = tcp_opt_write_ts(p, o->ts_val, o->ts_ecr);
        if (o->sack_ok) /* in place of its two NOPs */
            memcpy(p, sack_ok, 2);
        p += n;
    } else if (o->sack_ok) {
        memcpy(p, sack_ok, sizeof sack_ok);
        p += sizeof sack_ok;
    }
    if (o->has_wscale) {
        *p++ = OPT_NOP;
        *p++ = OPT_WSCALE;
        *p++ = 3;
        *p++ = o->wscale;
    }
    if (o->has_fo && p - start + 2 + o->cookie_len <= 40)
        p = write_cookie(p, o);
    while ((p - start) % 4 != 0)
        *p++ = OPT_NOP;
    return (uint32_t)(p - start);
}
