/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_reass - fragments of UDP datagrams, any pieces in any order, often overlapping. Every datagram has bytes of its
 * own, so whatever is delivered must be exactly one of them, whole.
 *
 * An input is records of five bytes: which datagram and whether it is the last piece; where the piece begins; how long it
 * is (two bytes); what happens then.
 */
#include "fuzz.h"

enum { RECORD = 5, DATAGRAMS = 4, MOST = 9000 };

static uint8_t byte_at(uint32_t id, uint32_t at) { return (uint8_t)(at * 7 + (at >> 8) * 13 + id * 61 + 1); }

/* Byte `at` of the datagram, its UDP header included; no checksum. */
static uint8_t udp_byte(uint32_t id, uint32_t at, uint32_t whole)
{
    const uint8_t head[8] = {0x10, (uint8_t)id, 0, 7, (uint8_t)(whole >> 8), (uint8_t)whole, 0, 0};
    return at < 8 ? head[at] : byte_at(id, at - 8);
}

static uint32_t length_of(uint32_t id) { return 600 + id * 1700; } /* UDP header and payload */

static void send_piece(struct fuzz_world *w, uint32_t id, uint32_t from, uint32_t n, bool more)
{
    uint8_t f[FZ_ETH + FZ_IP + 1480];
    n = n > 1480 ? 1480 : n;
    uint8_t *p = fuzz_ip_head(f, FZ_UDP_PROTO, n);
    put16(f + FZ_ETH + 4, id + 1);
    put16(f + FZ_ETH + 6, (from / 8 & 0x1fff) | (more ? 0x2000 : 0));
    for (uint32_t i = 0; i < n; i++)
        p[i] = udp_byte(id, from + i, length_of(id));
    fuzz_fix(f, FZ_ETH + FZ_IP + n);
    (void)memdev_inject(&w->m, f, FZ_ETH + FZ_IP + n);
}

static void read_all(struct fuzz_world *w, bypass_sock sock)
{
    static uint8_t buf[MOST];
    struct bypass_endpoint from;
    int64_t n;
    while ((n = bypass_recvfrom(&w->s, sock, buf, sizeof buf, 0, &from)) >= 0) {
        uint32_t id = from.port - 0x1000u;
        CHECK(id < DATAGRAMS, "from port %u", from.port);
        CHECK(n + 8 == (int64_t)length_of(id), "datagram %u has %lld bytes", id, (long long)n);
        for (uint32_t i = 0; i < n; i++)
            CHECK(buf[i] == byte_at(id, i), "byte %u of datagram %u", i, id);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_world w;
    struct bypass_endpoint local = fuzz_endpoint((uint8_t[4]){0}, 7);
    fuzz_open(&w, BYPASS_F_RST, 4, 65536, 65536);
    bypass_sock sock = bypass_socket(&w.s, BYPASS_DGRAM);
    int err = bypass_bind(&w.s, sock, &local);
    CHECK(err == 0, "bind: %d", err);
    struct input in = {data, data + (size < 400 * RECORD ? size : 400 * RECORD)};
    while (in.p + RECORD <= in.end) {
        uint8_t what = in_u8(&in), where = in_u8(&in);
        uint32_t n = in_u16(&in);
        uint8_t then = in_u8(&in);
        uint32_t id = what & 3, whole = length_of(id), from = where * 8u * (what & 4 ? 23 : 1);
        bool last = from + n >= whole && !(what & 16);
        if (what & 8) /* as a sender would have cut it */
            n = from < whole && whole - from < 1480 ? whole - from : 184 * 8;
        n = last && from < whole ? whole - from : n;
        if (from + n > whole && !(what & 32)) /* else: beyond the end that another piece names */
            n = from < whole ? whole - from : 0;
        send_piece(&w, id, from, n, !(from + n >= whole));
        if (then & 1)
            fuzz_poll(&w);
        if ((then & 6) == 6)
            w.now += (uint64_t)(then >> 3) * 1000000000ull;
        if (then & 1 && !(then & 64))
            read_all(&w, sock);
        memdev_forget_sent(&w.m);
    }
    fuzz_poll(&w);
    fuzz_poll(&w); /* one takes 64 frames */
    read_all(&w, sock);
    struct bypass_audit a;
    w.now += 120000000000ull; /* RFC 791: what is incomplete is forgotten */
    fuzz_poll(&w);
    fuzz_poll(&w);
    bypass_audit(&w.s, &a);
    CHECK(a.frags == 0, "%u datagrams are still waited for", a.frags);
    fuzz_close(&w);
    return 0;
}
