/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_net SEED ROUNDS - a stack under a rain of frames: right ones, ones with a lie in them, torn ones; socket calls,
 * passing time and a device in trouble between them. Nothing is expected but that it neither crashes nor leaks, keeps
 * its bounds, and still answers afterwards. Free frames are poisoned (memdev.h): use after free is seen.
 */
#include "memdev.h"

#include "core.h"
#include "csum.h"
#include "wire.h"

enum { FRAMES = 256, STRIDE = 2048, SOCKS = 12, PEERS = 40 };

static uint64_t rng;

static uint32_t rnd(uint32_t n) /* 0 .. n-1 */
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return n == 0 ? 0 : (uint32_t)(rng >> 16) % n;
}

static bool one_in(uint32_t n) { return rnd(n) == 0; }

struct world {
    struct memdev m;
    struct bypass_stack s;
    uint64_t now;
    uint64_t env_state;
    bypass_sock socks[SOCKS];
    bypass_sock listener;
    bool lazy; /* nobody reads in this run: buffers, chunks and frames run out */
};

static const uint8_t our_mac[6] = {2, 0, 0, 0, 0, 1}, us[4] = {192, 0, 2, 1};

static struct bypass_endpoint endpoint(const uint8_t ip[4], uint16_t port)
{
    return (struct bypass_endpoint){.addr = addr_from_v4(ip), .port = port};
}

/* ---- Frames ------------------------------------------------------------------------------------- */

struct frame {
    uint8_t b[1700];
    uint32_t len;
};

static void peer_ip(uint8_t ip[4])
{
    static const uint8_t odd[][4] = {
        {0, 0, 0, 0}, {127, 0, 0, 1}, {224, 0, 0, 1}, {255, 255, 255, 255}, {192, 0, 2, 1}};
    memcpy(ip, (uint8_t[4]){192, 0, 2, (uint8_t)(2 + rnd(PEERS))}, 4);
    if (one_in(5)) {
        memcpy(ip, (uint8_t[4]){198, 51, 100, (uint8_t)rnd(256)}, 4);
    } else if (one_in(30)) {
        memcpy(ip, odd[rnd(5)], 4);
    }
}

static uint16_t port(void) { return one_in(10) ? (uint16_t)rnd(65536) : (uint16_t)(7 + rnd(6)); }

static void put(struct frame *f, const void *bytes, uint32_t n)
{
    memcpy(f->b + f->len, bytes, n);
    f->len += n;
}

static void put_random(struct frame *f, uint32_t n)
{
    for (uint32_t i = 0; i < n && f->len < sizeof f->b; i++) {
        f->b[f->len++] = (uint8_t)rnd(256);
    }
}

static uint32_t payload_len(void) { return one_in(3) ? rnd(1400) : rnd(64); }

static void fix_l4(struct frame *f, uint32_t ip, uint32_t l4, uint8_t proto)
{
    uint8_t *p = f->b + l4;
    uint32_t len = f->len - l4, at = proto == PROTO_TCP ? 16 : proto == PROTO_UDP ? 6 : 2;
    if (len < at + 2) {
        return;
    }
    memset(p + at, 0, 2);
    addr_t src = addr_from_v4(f->b + ip + IP4_SRC), dst = addr_from_v4(f->b + ip + IP4_DST);
    uint16_t csum = csum_fold(csum_bytes(p, len, proto == PROTO_ICMP ? 0 : csum_pseudo(&src, &dst, proto, len)));
    memcpy(p + at, &csum, 2);
}

static void fix_ip(struct frame *f, uint32_t ip)
{
    uint32_t hlen = (f->b[ip] & 15u) * 4;
    if (hlen >= IP4_LEN && ip + hlen <= f->len) {
        memset(f->b + ip + IP4_CSUM, 0, 2);
        uint16_t csum = csum_fold(csum_bytes(f->b + ip, hlen, 0));
        memcpy(f->b + ip + IP4_CSUM, &csum, 2);
    }
}

static void l4_udp(struct frame *f)
{
    uint8_t h[8];
    uint32_t n = payload_len();
    wr16(h, port());
    wr16(h + 2, port());
    wr16(h + 4, (uint16_t)(8 + n));
    put(f, h, 8);
    put_random(f, n);
}

static void l4_tcp(struct frame *f)
{
    uint8_t h[20] = {0};
    uint32_t opts = rnd(11) * 4, n = one_in(2) ? payload_len() : 0;
    wr16(h, port());
    wr16(h + 2, port());
    wr32(h + 4, rnd(4) * 1000);
    wr32(h + 8, (uint32_t)rng);
    h[12] = (uint8_t)((5 + opts / 4) << 4);
    h[13] = one_in(3) ? 2 : (uint8_t)rnd(64);
    wr16(h + 14, (uint16_t)rnd(65536));
    put(f, h, 20);
    for (uint32_t i = 0; i < opts; i++) { /* kinds and small lengths: parsers like them */
        f->b[f->len++] = (uint8_t)rnd(11);
    }
    put_random(f, n);
}

static void l4_icmp(struct frame *f)
{
    static const uint8_t types[] = {8, 3, 3, 11, 12, 0, 4, 5};
    uint8_t h[8] = {types[rnd(8)], one_in(3) ? 4 : (uint8_t)rnd(17), 0, 0, 0, 0, (uint8_t)rnd(256), (uint8_t)rnd(256)};
    put(f, h, 8);
    if (h[0] != 8 && !one_in(8)) {
        uint8_t q[28] = {0x45, 0, 0, 28, 0, 0, 0, 0, 64, one_in(2) ? PROTO_UDP : PROTO_TCP};
        memcpy(q + 12, us, 4);
        peer_ip(q + 16);
        wr16(q + 20, port());
        wr16(q + 22, port());
        put(f, q, 28);
    }
    put_random(f, payload_len() / 4);
}

static void frame_arp(struct frame *f)
{
    uint8_t a[28] = {0, 1, 8, 0, 6, 4, 0, (uint8_t)(1 + rnd(2)), 2, 0, 0, 0, 0, (uint8_t)(2 + rnd(8))};
    peer_ip(a + 14);
    memcpy(a + 24, us, 4);
    wr16(f->b + 12, ETH_TYPE_ARP);
    put(f, a, 28);
}

static void frame_ip(struct frame *f)
{
    static const uint8_t protos[] = {PROTO_UDP, PROTO_UDP, PROTO_TCP, PROTO_ICMP, PROTO_ICMP, 47};
    static const uint8_t bcast[4] = {192, 0, 2, 255};
    uint8_t proto = protos[rnd(6)], h[20] = {0x45, 0, 0, 0, 0, 0, 0, 0, 64};
    uint32_t ip = f->len, opts = one_in(20) ? rnd(11) * 4 : 0;
    h[0] = (uint8_t)(0x45 + opts / 4);
    h[9] = proto;
    peer_ip(h + 12);
    memcpy(h + 16, one_in(20) ? bcast : us, 4);
    put(f, h, 20);
    for (uint32_t i = 0; i < opts; i++) {
        f->b[f->len++] = (uint8_t)rnd(one_in(2) ? 8 : 256);
    }
    uint32_t l4 = f->len;
    if (one_in(6)) { /* a fragment of one of few datagrams */
        wr16(f->b + ip + IP4_ID, (uint16_t)rnd(3));
        memcpy(f->b + ip + IP4_SRC, (uint8_t[4]){192, 0, 2, 2}, 4);
        wr16(f->b + ip + IP4_FRAG, (uint16_t)(rnd(6) * 2 | (one_in(3) ? 0 : IP4_MF)));
        put_random(f, one_in(4) ? rnd(1400) : 16);
    } else {
        (proto == PROTO_UDP ? l4_udp : proto == PROTO_TCP ? l4_tcp : l4_icmp)(f);
        fix_l4(f, ip, l4, proto);
    }
    wr16(f->b + ip + IP4_TOTAL, (uint16_t)(f->len - ip));
    if (one_in(20)) {
        f->b[ip + rnd(20)] ^= (uint8_t)(1 << rnd(8)); /* a lie with a right checksum */
    }
    fix_ip(f, ip);
}

static void make_frame(struct frame *f)
{
    f->len = ETH_LEN;
    memcpy(f->b, our_mac, 6);
    memcpy(f->b + 6, (uint8_t[6]){2, 0, 0, 0, 0, 2}, 6);
    if (one_in(15)) {
        memset(f->b, 0xff, 6);
    }
    wr16(f->b + 12, ETH_TYPE_IPV4);
    (one_in(10) ? frame_arp : frame_ip)(f);
    if (one_in(10)) {
        f->b[rnd(f->len)] ^= (uint8_t)(1 << rnd(8));
    }
    if (one_in(10)) {
        f->len = rnd(f->len + 1);
    } else if (one_in(10)) {
        put_random(f, rnd(50));
    }
}

/* The pieces of one datagram, larger than a frame, most of them there; some come twice. */
static void rain_train(struct world *w)
{
    static const uint8_t protos[] = {PROTO_UDP, PROTO_UDP, PROTO_TCP, PROTO_ICMP, 47};
    uint8_t proto = protos[rnd(5)];
    uint16_t id = (uint16_t)rnd(65536);
    uint32_t piece = 8 * (1 + rnd(180)), pieces = 2 + rnd(6), skip = one_in(3) ? rnd(pieces) : pieces;
    for (uint32_t i = 0; i < pieces; i++) {
        struct frame f = {.len = ETH_LEN};
        uint8_t h[20] = {0x45, 0, 0, 0, 0, 0, 0, 0, 64, proto, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1};
        uint8_t l4[8] = {0, 9, 0, (uint8_t)(7 + rnd(6))};
        memcpy(f.b, our_mac, 6);
        wr16(f.b + 12, ETH_TYPE_IPV4);
        wr16(h + IP4_ID, id);
        wr16(h + IP4_FRAG, (uint16_t)(i * piece / 8 | (i + 1 < pieces ? IP4_MF : 0)));
        wr16(h + IP4_TOTAL, (uint16_t)(IP4_LEN + piece));
        wr16(l4 + UDP_SIZE, (uint16_t)(piece * pieces)); /* without checksum */
        put(&f, h, 20);
        put(&f, l4, i == 0 ? 8 : 0);
        put_random(&f, piece - (i == 0 ? 8 : 0));
        fix_ip(&f, ETH_LEN);
        for (uint32_t n = i == skip ? 0 : one_in(10) ? 2 : 1; n > 0; n--) {
            (void)memdev_inject(&w->m, f.b, f.len);
        }
    }
}

/* ---- Calls -------------------------------------------------------------------------------------- */

static void reopen(struct world *w, int i)
{
    struct bypass_endpoint local = endpoint((uint8_t[4]){0, 0, 0, 0}, port()), peer;
    uint8_t ip[4];
    peer_ip(ip);
    peer = endpoint(ip, port());
    if (w->socks[i] >= 0) {
        (void)(one_in(2) ? bypass_close(&w->s, w->socks[i]) : bypass_abort(&w->s, w->socks[i]));
    }
    w->socks[i] = bypass_socket(&w->s, one_in(4) ? BYPASS_STREAM : BYPASS_DGRAM);
    if (w->socks[i] < 0) {
        return;
    }
    (void)bypass_setopt(&w->s, w->socks[i], BYPASS_SO_REUSEADDR, rnd(2));
    (void)bypass_setopt(&w->s, w->socks[i], BYPASS_SO_BROADCAST, rnd(2));
    (void)bypass_setopt(&w->s, w->socks[i], BYPASS_SO_RCVBUF, one_in(4) ? 4096 : 1 << 20);
    (void)bypass_bind(&w->s, w->socks[i], &local);
    if (one_in(2)) {
        (void)bypass_connect(&w->s, w->socks[i], &peer);
    }
}

static void call(struct world *w)
{
    static uint8_t buf[65536];
    int i = (int)rnd(SOCKS);
    struct bypass_endpoint to, from;
    struct bypass_event ev[8];
    uint8_t ip[4];
    peer_ip(ip);
    to = endpoint(ip, port());
    switch (rnd(9)) {
    case 0:
        reopen(w, i);
        break;
    case 1:
    case 2:
        (void)bypass_sendto(&w->s, w->socks[i], buf, one_in(10) ? rnd(65536) : rnd(3000), 0, one_in(3) ? NULL : &to);
        break;
    case 3:
    case 4:
        if (w->lazy) {
            break;
        }
        (void)bypass_recvfrom(&w->s, w->socks[i], buf, rnd(2000), (int)rnd(4), &from);
        break;
    case 5:
        (void)bypass_events(&w->s, ev, 8);
        (void)bypass_ready(&w->s, w->socks[i]);
        (void)bypass_error(&w->s, w->socks[i]);
        break;
    case 6:
        w->m.hold_tx = one_in(8);
        w->m.tx_limit = one_in(4) ? rnd(40) : UINT32_MAX;
        break;
    case 7:
        (void)bypass_nexthop_set(&w->s, &to.addr, one_in(5) ? NULL : our_mac, (uint16_t)rnd(2000));
        if (one_in(20)) {
            bypass_nexthop_forget(&w->s, one_in(2) ? NULL : &to.addr);
        }
        break;
    default: {
        bypass_sock c = bypass_accept(&w->s, w->listener);
        if (c >= 0) {
            (void)bypass_send(&w->s, c, buf, rnd(3000), 0);
            (void)bypass_close(&w->s, c);
        }
    }
    }
}

/* ---- Run ---------------------------------------------------------------------------------------- */

static void bounds(struct world *w)
{
    struct bypass_audit a;
    bypass_audit(&w->s, &a);
    assert(a.dst_waiting <= FRAMES / 8);
    assert(a.frags <= core(&w->s)->cfg.max_frags);
    assert(a.handles <= core(&w->s)->cfg.max_socks);
    memdev_forget_sent(&w->m);
}

static void open_world(struct world *w, uint32_t flags)
{
    struct bypass_config cfg;
    struct bypass_env env = {.random = memdev_env_random, .ctx = &w->env_state};
    memset(w, 0, sizeof *w);
    w->env_state = rng;
    w->now = 1000000000;
    w->lazy = one_in(3);
    memdev_open(&w->m, FRAMES, STRIDE);
    bypass_config_default(&cfg, 32);
    cfg.flags = flags;
    cfg.max_chunks = 60;
    cfg.max_dsts = 24;
    cfg.max_frags = 8;
    cfg.rcvbuf = 65536;
    size_t size = bypass_arena_size(&cfg);
    void *arena = aligned_alloc(64, size);
    assert(arena != NULL);
    memset(arena, 0, size);
    int err = bypass_create(&w->s, arena, size, &cfg, &w->m.dev, &env, w->now);
    assert(err == 0);
    addr_t addr = addr_from_v4(us), gateway = addr_from_v4((uint8_t[4]){192, 0, 2, 254});
    err = bypass_addr_add(&w->s, &addr, 24);
    assert(err == 0);
    err = bypass_gateway_set(&w->s, &gateway);
    assert(err == 0);
    for (int i = 0; i < SOCKS; i++) {
        w->socks[i] = -1;
    }
    struct bypass_endpoint local = endpoint((uint8_t[4]){0, 0, 0, 0}, 9);
    w->listener = bypass_socket(&w->s, BYPASS_STREAM);
    err = bypass_bind(&w->s, w->listener, &local);
    assert(err == 0);
    err = bypass_listen(&w->s, w->listener, 4);
    assert(err == 0);
}

/* After all that a ping is answered (the sender is known, the burst of errors is over). */
static void still_alive(struct world *w)
{
    struct frame f = {.len = ETH_LEN};
    size_t len;
    bool answered = false;
    const uint8_t *sent;
    addr_t peer = addr_from_v4((uint8_t[4]){192, 0, 2, 2});
    memcpy(f.b, our_mac, 6);
    wr16(f.b + 12, ETH_TYPE_IPV4);
    put(&f, (uint8_t[28]){0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1, 8}, 28);
    fix_l4(&f, ETH_LEN, ETH_LEN + IP4_LEN, PROTO_ICMP);
    fix_ip(&f, ETH_LEN);
    w->m.hold_tx = 0;
    w->m.tx_limit = UINT32_MAX;
    for (int i = 0; i < 40; i++) { /* fragments time out, connections give up, the ring empties */
        (void)bypass_poll(&w->s, w->now += 1000000000, 1000);
    }
    memdev_forget_sent(&w->m);
    int err = bypass_nexthop_set(&w->s, &peer, our_mac, 0);
    assert(err == 0);
    err = memdev_inject(&w->m, f.b, f.len);
    assert(err == 0);
    (void)bypass_poll(&w->s, w->now, 64);
    while ((sent = memdev_sent(&w->m, &len)) != NULL) {
        answered |= len == 42 && sent[23] == PROTO_ICMP && sent[34] == ICMP_ECHO_REPLY;
    }
    assert(answered);
}

static void run(uint32_t rounds, uint32_t flags)
{
    static struct world w;
    struct frame f;
    open_world(&w, flags);
    for (uint32_t i = 0; i < rounds; i++) {
        for (uint32_t n = rnd(12); n > 0; n--) {
            make_frame(&f);
            (void)memdev_inject_queue(&w.m, f.b, f.len, (uint16_t)rnd(2), one_in(10) ? BYPASS_RX_CSUM_OK : 0);
        }
        if (one_in(8)) {
            rain_train(&w);
        }
        for (uint32_t n = rnd(4); n > 0; n--) {
            call(&w);
        }
        w.now += one_in(50) ? rnd(40) * 1000000000ull : rnd(1000000);
        (void)bypass_poll(&w.s, w.now, (int)rnd(40));
        bounds(&w);
    }
    still_alive(&w);
    struct bypass_audit a, zero = {0};
    bypass_destroy(&w.s);
    bypass_audit(&w.s, &a);
    assert(memcmp(&a, &zero, sizeof a) == 0);
    memdev_close(&w.m);
    for (int i = 0; i < bypass_stat_count(); i++) {
        printf("%s %llu\n", bypass_stat_name(i), (unsigned long long)bypass_stats(&w.s)[i]);
    }
    free(w.s.arena);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: fuzz_net SEED ROUNDS\n");
        return 2;
    }
    rng = strtoull(argv[1], NULL, 10) * 0x9e3779b97f4a7c15ull + 1;
    run((uint32_t)strtoul(argv[2], NULL, 10), BYPASS_F_PING | BYPASS_F_RST | (one_in(4) ? 0 : BYPASS_F_ARP));
    return 0;
}
