/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_tso - segments joined for a device that cuts them up again (tso.c): frames of anybody, mostly of one connection, with
 * whatever bytes and descriptions the input says. The harness is the device: it cuts the large packet up by what its
 * mbufs say, and what leaves has to be what was given, to the byte; each frame whole or in one large packet, in order;
 * the driver may refuse, and then every frame is as it was. Frames end where their memory ends.
 */
#include "fuzz.h"

#include "tso_frames.h"

enum { MAX_FRAMES = 40, IP = 14, TCP = 34, MAX_LEN = 512 };

struct given {
    struct rte_mbuf *m;
    uint16_t len;
    uint8_t bytes[MAX_LEN];
};

#ifdef FUZZ_TSO /* linked with --wrap: what the driver is told is not so, and the harness has to notice */
int __real_tso_join(struct dpdk_port *d, struct rte_mbuf **mbufs, int n, struct tso_packet *out);
int __wrap_tso_join(struct dpdk_port *d, struct rte_mbuf **mbufs, int n, struct tso_packet *out);
int __wrap_tso_join(struct dpdk_port *d, struct rte_mbuf **mbufs, int n, struct tso_packet *out)
{
    int packets = __real_tso_join(d, mbufs, n, out);

    for (int i = 0; i < packets; i++) {
        if (out[i].frames > 1 && FUZZ_TSO == 1) {
            mbufs[i]->tso_segsz--;
        } else if (out[i].frames > 1) {
            mbufs[i]->next->data_off--;
        }
    }
    return packets;
}
#endif

/* ---- Frames ------------------------------------------------------------------------------------------------------ */
static void put_ip_sum(uint8_t *f)
{
    put16(f + IP + 10, 0);
    put16(f + IP + 10, fuzz_fold(fuzz_sum(f + IP, 20, 0)));
}

/* The next segment of a connection, as the stack makes them, but for what the input changes in it. */
static void make_frame(struct given *g, struct input *in, uint32_t *seq, uint32_t mss)
{
    uint8_t what = in_u8(in), *f = g->bytes, flags = BYPASS_TX_CSUM, patches = what >> 5;
    uint32_t options = 12, payload = what & 1 ? in_u8(in) : mss, start = TCP, off = 16;

    g->len = (uint16_t)(TCP + FZ_TCP + options + payload);
    memset(f, 0x5a, g->len);
    memset(f, 0x02, 12);
    put16(f + 12, 0x0800);
    memcpy(f + IP, (const uint8_t[]){0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2}, 20);
    put16(f + IP + 2, g->len - IP);
    memcpy(f + TCP, (const uint8_t[]){0, 80, 0x30, 0x39, 0, 0, 0, 0, 1, 2, 3, 4, 0x80, 0x10, 1, 0, 0xca, 0xfe, 0, 0},
           20);
    put32(f + TCP + 4, *seq);
    *seq += payload;
    f[TCP + 13] |= what & 2 ? in_u8(in) : 0;
    for (uint32_t i = 0; i < payload; i++) {
        f[TCP + FZ_TCP + options + i] = (uint8_t)(*seq + i * 7);
    }
    for (uint32_t i = 0; i < patches; i++) {
        uint8_t at = in_u8(in);

        f[at % (g->len < 90 ? g->len : 90)] = in_u8(in);
    }
    if (!(what & 4)) {
        put_ip_sum(f);
    }
    if (what & 8) { /* cut off, or described otherwise */
        g->len = (uint16_t)(14 + in_u16(in) % (g->len - 13u));
    }
    if (what & 16) {
        start = in_u8(in) % 64;
        off = in_u8(in) & 1 ? 16 : 6;
        flags = in_u8(in) & 1 ? BYPASS_TX_CSUM : 0;
    }
    g->m = frame_make(f, g->len, flags, (uint16_t)start, (uint16_t)off);
}

static void is_untouched(const struct given *g)
{
    const struct rte_mbuf *m = g->m;

    CHECK(memcmp(frame_bytes(g->m), g->bytes, g->len) == 0, "of %u bytes", g->len);
    CHECK(m->next == NULL && m->nb_segs == 1, "%u pieces", m->nb_segs);
}

/* ---- The device --------------------------------------------------------------------------------------------------- */

/* A right checksum of TCP in place of what is the device's to complete. */
static void complete(uint8_t *f, uint32_t len)
{
    put16(f + TCP + 16, 0);
    put16(f + TCP + 16, fuzz_l4_sum(f + IP, f + TCP, len - TCP));
}

/* Payload of the chain, and what it says of itself. */
static uint32_t gather(const struct rte_mbuf *first, uint32_t headers, uint8_t *out)
{
    uint32_t n = 0, pieces = 0;

    for (const struct rte_mbuf *m = first; m; m = m->next, pieces++) {
        const uint8_t *p = rte_pktmbuf_mtod(m, const uint8_t *);
        uint32_t skip = m == first ? headers : 0;

        CHECK(m == first || m->ol_flags == 0, "a piece has flags");
        memcpy(out + n, p + skip, m->data_len - skip);
        n += m->data_len - skip;
    }
    CHECK(first->nb_segs == pieces, "%u pieces of %u", pieces, first->nb_segs);
    CHECK(first->pkt_len == headers + n, "%u bytes of %u", headers + n, first->pkt_len);
    return n;
}

static void cut_up(const struct dpdk_port *d, const struct rte_mbuf *first, const struct given *g, int frames)
{
    static uint8_t payload[1 << 16];
    uint8_t seg[MAX_LEN], want[MAX_LEN], head[128];
    uint32_t headers = first->l2_len + first->l3_len + first->l4_len, n, at = 0, size = first->tso_segsz;

    CHECK(first->l2_len == 14 && first->l3_len == 20 && headers <= 14 + 20 + 60 && headers >= 54, "%u", headers);
    CHECK((first->ol_flags & d->tso_flags) == d->tso_flags && first->ol_flags & RTE_MBUF_F_TX_IPV4, "flags");
    CHECK(frames <= d->tso_pieces, "%d frames", frames);
    n = gather(first, headers, payload);
    memcpy(head, frame_bytes((struct rte_mbuf *)(uintptr_t)first), headers);
    CHECK(get16(head + IP + 2) == headers - IP + n, "%u bytes by IP", get16(head + IP + 2));
    CHECK(d->tso_flags & RTE_MBUF_F_TX_IP_CKSUM ? get16(head + IP + 10) == 0 : !fuzz_fold(fuzz_sum(head + IP, 20, 0)),
          "IP's checksum");
    CHECK(size > 0 && (n + size - 1) / size == (uint32_t)frames, "%u bytes by %u in %d", n, size, frames);
    for (int i = 0; i < frames; i++, at += size) {
        uint32_t len = headers + (n - at < size ? n - at : size);
        bool last = i + 1 == frames;

        memcpy(seg, head, headers);
        memcpy(seg + headers, payload + at, len - headers);
        put16(seg + IP + 2, len - IP);
        put32(seg + TCP + 4, get32(head + TCP + 4) + at);
        seg[TCP + 13] &= last ? 0xff : (uint8_t)~0x09; /* FIN and PSH are the last one's */
        memcpy(want, g[i].bytes, g[i].len);
        CHECK(fuzz_fold(fuzz_sum(want + IP, 20, 0)) == 0, "a device makes a wrong checksum right");
        put16(seg + IP + 4, get16(want + IP + 4)); /* DF: the number says nothing */
        CHECK(get16(want + IP + 6) == 0x4000, "a device would number it");
        put_ip_sum(seg);
        put_ip_sum(want);
        complete(seg, len);
        CHECK(len == g[i].len, "segment %d: %u bytes of %u", i, len, g[i].len);
        complete(want, len);
        CHECK(memcmp(seg, want, len) == 0, "segment %d differs", i);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct dpdk_port d;
    static struct given g[MAX_FRAMES];
    struct input in = {data, data + size};
    struct rte_mbuf *mbufs[MAX_FRAMES];
    struct tso_packet packets[MAX_FRAMES];
    uint8_t how = in_u8(&in), pieces = in_u8(&in), taken;
    uint32_t seq = (uint32_t)in_u16(&in) << 16 | 0xff00, mss = 1 + in_u8(&in);
    int n = 1 + in_u8(&in) % MAX_FRAMES, packed, at = 0;

    d.tso_pieces = 1 + pieces % 64;
    d.tso_flags = RTE_MBUF_F_TX_TCP_SEG | (how & 1 ? RTE_MBUF_F_TX_IP_CKSUM : 0);
    for (int i = 0; i < n; i++) {
        make_frame(&g[i], &in, &seq, mss);
        mbufs[i] = g[i].m;
    }
    taken = in_u8(&in); /* packets that the driver takes */
    packed = tso_join(&d, mbufs, n, packets);
    for (int i = 0; i < packed; at += packets[i++].frames) {
        CHECK(packets[i].frames >= 1 && at + packets[i].frames <= n, "%d frames at %d", packets[i].frames, at);
        CHECK(mbufs[i] == g[at].m, "packet %d begins with another frame", i);
        if (packets[i].frames == 1) {
            is_untouched(&g[at]);
        } else {
            cut_up(&d, mbufs[i], &g[at], packets[i].frames);
        }
        if (i < taken) {
            continue;
        }
        tso_take_back(mbufs[i], &packets[i]);
        for (int j = at; j < at + packets[i].frames; j++) {
            is_untouched(&g[j]);
        }
    }
    CHECK(at == n, "%d frames of %d", at, n);
    for (int i = 0; i < n; i++) {
        free(g[i].m);
    }
    return 0;
}
