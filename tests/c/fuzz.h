/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz.h - what the libFuzzer harnesses (fuzz_*.c with LLVMFuzzerTestOneInput) share: a stack that is the same for every
 * input, a reader of the input's bytes, frames and their checksums. They use the public header and the small netdev of
 * memdev.h, and nothing of the stack.
 *
 * A harness asserts: a crash is its only way to say that something is wrong. docs/testing.md tells how they are run.
 */
#ifndef TESTS_FUZZ_H
#define TESTS_FUZZ_H

#include <stdbool.h>
#include <sys/mman.h>

#include "memdev.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max);

/* Also in a build without asserts, and with the values. */
#define CHECK(cond, ...)                                                                                               \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond);                                                 \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fprintf(stderr, "\n");                                                                                     \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* ---- The input, read from its beginning; zeroes behind its end ---------------------------------------------------- */
struct input {
    const uint8_t *p, *end;
};

static inline uint8_t in_u8(struct input *in) { return in->p < in->end ? *in->p++ : 0; }

static inline uint16_t in_u16(struct input *in)
{
    uint8_t hi = in_u8(in);
    return (uint16_t)(hi << 8 | in_u8(in));
}

/* ---- Bytes of packets (network order) ----------------------------------------------------------------------------- */
static inline uint32_t get16(const uint8_t *p) { return (uint32_t)p[0] << 8 | p[1]; }
static inline uint32_t get32(const uint8_t *p) { return get16(p) << 16 | get16(p + 2); }
static inline void put16(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 8);
    p[1] = (uint8_t)v;
}
static inline void put32(uint8_t *p, uint32_t v)
{
    put16(p, v >> 16);
    put16(p + 2, v);
}

static inline uint32_t fuzz_sum(const uint8_t *p, uint32_t n, uint32_t sum) /* RFC 1071, not folded */
{
    for (; n > 1; n -= 2, p += 2)
        sum += get16(p);
    return n ? sum + ((uint32_t)p[0] << 8) : sum;
}

static inline uint16_t fuzz_fold(uint32_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

enum { FZ_ETH = 14, FZ_IP = 20, FZ_TCP = 20, FZ_ICMP_PROTO = 1, FZ_TCP_PROTO = 6, FZ_UDP_PROTO = 17 };

/* The sum of a whole transport message with its pseudo header: 0 when its checksum is right. */
static inline uint16_t fuzz_l4_sum(const uint8_t *ip, const uint8_t *l4, uint32_t n)
{
    uint32_t sum = ip[9] == FZ_ICMP_PROTO ? 0 : fuzz_sum(ip + 12, 8, ip[9] + n);
    return fuzz_fold(fuzz_sum(l4, n, sum));
}

/* Makes the checksums of an IPv4 frame right for what stands there, as far as its lengths allow. */
static inline void fuzz_fix(uint8_t *f, uint32_t len)
{
    if (len < FZ_ETH + FZ_IP || get16(f + 12) != 0x0800)
        return;
    uint8_t *ip = f + FZ_ETH;
    uint32_t hlen = (ip[0] & 15u) * 4, total = get16(ip + 2), have = len - FZ_ETH;
    if (hlen < FZ_IP || hlen > have)
        return;
    put16(ip + 10, 0);
    put16(ip + 10, fuzz_fold(fuzz_sum(ip, hlen, 0)));
    uint32_t end = total < have ? total : have, at = ip[9] == FZ_TCP_PROTO ? 16 : ip[9] == FZ_UDP_PROTO ? 6 : 2;
    bool known = ip[9] == FZ_TCP_PROTO || ip[9] == FZ_UDP_PROTO || ip[9] == FZ_ICMP_PROTO;
    if (!known || (get16(ip + 6) & 0x3fff) != 0 || end < hlen + at + 2)
        return;
    put16(ip + hlen + at, 0);
    uint16_t sum = fuzz_l4_sum(ip, ip + hlen, end - hlen);
    put16(ip + hlen + at, sum == 0 && ip[9] == FZ_UDP_PROTO ? 0xffff : sum);
}

static const uint8_t fuzz_our_mac[6] = {2, 0, 0, 0, 0, 1}, fuzz_peer_mac[6] = {2, 0, 0, 0, 0, 2};
static const uint8_t fuzz_us[4] = {192, 0, 2, 1}, fuzz_peer[4] = {192, 0, 2, 2};

static inline struct bypass_addr fuzz_addr(const uint8_t ip[4])
{
    return (struct bypass_addr){{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ip[0], ip[1], ip[2], ip[3]}};
}

static inline struct bypass_endpoint fuzz_endpoint(const uint8_t ip[4], uint16_t port)
{
    return (struct bypass_endpoint){.addr = fuzz_addr(ip), .port = port};
}

/* Ethernet and IPv4 headers from the peer to us for n bytes of payload that follow; returns where they go. */
static inline uint8_t *fuzz_ip_head(uint8_t *f, uint8_t proto, uint32_t n)
{
    memcpy(f, fuzz_our_mac, 6);
    memcpy(f + 6, fuzz_peer_mac, 6);
    put16(f + 12, 0x0800);
    uint8_t *ip = f + FZ_ETH;
    memset(ip, 0, FZ_IP);
    ip[0] = 0x45;
    put16(ip + 2, FZ_IP + n);
    put16(ip + 6, 0x4000);
    ip[8] = 64;
    ip[9] = proto;
    memcpy(ip + 12, fuzz_peer, 4);
    memcpy(ip + 16, fuzz_us, 4);
    return ip + FZ_IP;
}

enum { FZ_FIN = 1, FZ_SYN = 2, FZ_RST = 4, FZ_PSH = 8, FZ_ACK = 16, FZ_URG = 32 };

struct fuzz_tcp {
    uint16_t sport, dport;
    uint32_t seq, ack;
    uint32_t flags, window, urg;
    uint32_t opt_len, len; /* bytes; options are padded by the end-of-list option */
    const uint8_t *opts, *data;
};

/* A frame from the peer with this segment, checksums right; returns its length. f: 1514 bytes. */
static inline uint32_t fuzz_tcp_frame(uint8_t *f, const struct fuzz_tcp *t)
{
    uint32_t opt = (t->opt_len + 3) & ~3u, n = FZ_TCP + opt + t->len;
    uint8_t *p = fuzz_ip_head(f, FZ_TCP_PROTO, n);
    assert(opt <= 40 && n <= 1480);
    memset(p, 0, FZ_TCP + opt);
    put16(p, t->sport);
    put16(p + 2, t->dport);
    put32(p + 4, t->seq);
    put32(p + 8, t->ack);
    p[12] = (uint8_t)((FZ_TCP + opt) / 4 << 4);
    p[13] = (uint8_t)t->flags;
    put16(p + 14, t->window);
    put16(p + 18, t->urg);
    if (t->opt_len)
        memcpy(p + FZ_TCP, t->opts, t->opt_len);
    if (t->len && t->data)
        memcpy(p + FZ_TCP + opt, t->data, t->len);
    else
        memset(p + FZ_TCP + opt, 'x', t->len);
    fuzz_fix(f, FZ_ETH + FZ_IP + n);
    return FZ_ETH + FZ_IP + n;
}

/* ---- A stack, the same for every input ------------------------------------------------------------------------------ */
struct fuzz_world {
    struct memdev m;
    struct bypass_stack s;
    uint64_t now, env_state;
};

enum { FUZZ_FRAMES = 96, FUZZ_STRIDE = 2048, FUZZ_START_S = 100 };

/* conns and buffers: of the stack. The peer's MAC address is known. */
static inline void fuzz_open(struct fuzz_world *w, uint32_t flags, uint32_t conns, uint32_t rcvbuf, uint32_t sndbuf)
{
    static void *arena;
    static size_t room;
    struct bypass_config cfg;
    struct bypass_env env = {.random = memdev_env_random, .ctx = &w->env_state};
    memset(w, 0, sizeof *w);
    w->env_state = 7;
    w->now = FUZZ_START_S * 1000000000ull;
    memdev_open(&w->m, FUZZ_FRAMES, FUZZ_STRIDE);
    bypass_config_default(&cfg, conns);
    cfg.flags = flags;
    cfg.max_socks = conns + 8;
    cfg.max_chunks = 48;
    cfg.max_dsts = 16;
    cfg.max_frags = 4;
    cfg.rcvbuf = rcvbuf;
    cfg.sndbuf = sndbuf;
    size_t size = bypass_arena_size(&cfg);
    CHECK(size > 0, "a configuration that makes no sense");
    if (size > room) {
        if (arena)
            (void)munmap(arena, room);
        arena = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(arena != MAP_FAILED, "no memory");
        room = size;
    }
    (void)madvise(arena, room, MADV_DONTNEED); /* zeroes again, and only what is touched costs anything */
    int err = bypass_create(&w->s, arena, size, &cfg, &w->m.dev, &env, w->now);
    CHECK(err == 0, "bypass_create: %d", err);
    struct bypass_addr us = fuzz_addr(fuzz_us), peer = fuzz_addr(fuzz_peer);
    err = bypass_addr_add(&w->s, &us, 24);
    CHECK(err == 0, "bypass_addr_add: %d", err);
    err = bypass_nexthop_set(&w->s, &peer, fuzz_peer_mac, 0);
    CHECK(err == 0, "bypass_nexthop_set: %d", err);
}

static inline void fuzz_poll(struct fuzz_world *w) { (void)bypass_poll(&w->s, w->now, 64); }

static inline uint32_t fuzz_conns(struct fuzz_world *w)
{
    struct bypass_audit a;
    bypass_audit(&w->s, &a);
    return a.conns;
}

/* Nobody answers any more: what no handle owns has to end by itself, within a day. */
static inline void fuzz_run_out(struct fuzz_world *w)
{
    uint64_t last = w->now + 86400ull * 1000000000ull;
    w->m.hold_tx = 0;
    w->m.tx_limit = UINT32_MAX;
    for (int i = 0; fuzz_conns(w) > 0; i++) {
        uint64_t due = bypass_deadline(&w->s);
        CHECK(due != UINT64_MAX, "a connection without an owner waits for ever");
        w->now = due > w->now ? due : w->now + 1;
        CHECK(w->now < last, "a connection without an owner is there after a day");
        CHECK(i < 100000, "the stack wants to be polled again and again");
        if (i > 1000) /* what waits for a frame looks every 50 us: that ends with the frames' owners, in seconds */
            w->now += 10000000;
        fuzz_poll(w);
        memdev_forget_sent(&w->m);
    }
}

/* Nothing may be left. */
static inline void fuzz_close(struct fuzz_world *w)
{
    struct bypass_audit a, zero = {0};
    bypass_destroy(&w->s);
    bypass_audit(&w->s, &a);
    CHECK(memcmp(&a, &zero, sizeof a) == 0, "conns %u handles %u timers %u chunks %u frags %u frames %u", a.conns,
          a.handles, a.timers, a.chunks, a.frags, a.frames);
    memdev_close(&w->m);
}

#endif
