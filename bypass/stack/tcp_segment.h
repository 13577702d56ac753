/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp_segment.h - a segment as it came, parsed, and its options (tcp_opt.c). All numbers in host order.
 */
#ifndef BYPASS_STACK_TCP_SEGMENT_H
#define BYPASS_STACK_TCP_SEGMENT_H

#include "core.h"

enum { TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_PSH = 8, TCP_ACK = 16, TCP_URG = 32, TCP_ECE = 64, TCP_CWR = 128 };
enum { TCP_HDR = 20, TCP_OPTS_MAX = 40, TCP_TS_BYTES = 12, TCP_MIN_MSS = 48, TCP_DEFAULT_MSS = 536 };
enum { TCP_TS_PREFIX = 0x0a080101 }; /* NOP NOP, timestamps, 10 bytes (RFC 7323 appendix A), as it lies in memory */

enum { SACK_BLOCKS = 4 };
struct sack_block {
    seq_t first, end; /* received: first..end-1 */
};

enum { FO_COOKIE_MAX = 16 };
struct tcp_opts {
    uint16_t mss; /* 0: absent */
    uint8_t wscale;
    bool has_wscale, has_ts;
    uint32_t ts_val, ts_ecr;
    bool sack_ok;  /* SACK-permitted */
    bool has_fo;   /* Fast Open: cookie_len 0 asks for one (RFC 7413 4.1.1) */
    uint8_t sacks; /* blocks in sack[] */
    uint8_t cookie_len;
    struct sack_block sack[SACK_BLOCKS];
    uint8_t cookie[FO_COOKIE_MAX];
};
struct segment {
    const struct rx_info *ri;
    bypass_pkt pkt; /* BYPASS_PKT_NONE once it was kept or freed */
    uint16_t src_port, dst_port;
    seq_t seq, ack;
    uint32_t wnd;      /* as on the wire, not scaled */
    uint32_t len;      /* payload bytes */
    uint16_t data_off; /* from meta.off */
    uint8_t flags;
    uint16_t urg; /* urgent pointer */
    bool follows; /* a SYN that replaces a connection in TIME_WAIT, which had sent up to old_snd_nxt */
    seq_t old_snd_nxt;
    uint32_t hash;
    struct tcp_opts opt;
};
/* Sequence space it takes: payload, SYN, FIN. */
static inline uint32_t seg_len(const struct segment *g)
{
    return g->len + !!(g->flags & TCP_SYN) + !!(g->flags & TCP_FIN);
}

/* tcp_opt.c. false: malformed. */
bool tcp_opt_parse(const uint8_t *p, uint32_t len, struct tcp_opts *out);
bool tcp_opt_parse_ts(const uint8_t *p, uint32_t len, struct tcp_opts *out); /* the common layout only */
/* Writes what `o` holds (MSS always), padded to a multiple of four; at most 40 bytes. Returns their number. */
uint32_t tcp_opt_write_syn(uint8_t *p, const struct tcp_opts *o);
uint32_t tcp_opt_write_ts(uint8_t *p, uint32_t val, uint32_t ecr);
/* As many of the blocks as `room` bytes hold; 0: none. */
uint32_t tcp_opt_write_sack(uint8_t *p, uint32_t room, const struct sack_block *b, uint32_t n);

#endif
