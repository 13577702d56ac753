/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_frames - whole frames into a stack that has a connection in every state, a listener and UDP sockets. It neither
 * crashes nor leaks, and gives everything back.
 *
 * An input is records: a control byte, a length (two bytes), a frame. The mutator below keeps that shape, aims segments at
 * the connections, and makes checksums right again, so that what it changes is looked at and not dropped at the door.
 */
#include "fuzz.h"

enum { PORT = 80, LANES = 10, FIRST_PORT = 1000, PEER_ISS = 0xfffffc00, MAX_RECORDS = 64, MOST = 1514 };

struct lane { /* a connection as the set-up left it */
    uint16_t sport, dport;
    uint32_t state;
    uint32_t seq, una, nxt; /* what we expect; what we sent: oldest unacknowledged, next */
};
static struct lane lanes[LANES + 1];

/* ---- Set-up: the same numbers each time, so an input means the same each time -------------------------------------- */

static void say(struct fuzz_world *w, const struct lane *l, uint32_t flags, uint32_t window, uint32_t len,
                uint32_t ahead)
{
    uint8_t f[MOST];
    struct fuzz_tcp t = {.sport = l->sport,
                         .dport = l->dport,
                         .seq = l->seq + ahead,
                         .ack = l->nxt,
                         .flags = flags,
                         .window = window,
                         .len = len};
    static const uint8_t syn_opts[] = {2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 5, 0, 0, 0, 0, 3, 3, 2};
    if (flags & FZ_SYN) {
        t.opts = syn_opts;
        t.opt_len = sizeof syn_opts;
    }
    (void)memdev_inject(&w->m, f, fuzz_tcp_frame(f, &t));
    fuzz_poll(w);
}

/* Reads the connection's numbers out of the stack. */
static void learn(struct fuzz_world *w, struct lane *l)
{
    struct bypass_tcp_info i;
    uint32_t cursor = 0;
    while (bypass_conn_next(&w->s, &cursor, &i) == 1) {
        if (i.peer.port == l->sport && i.local.port == l->dport) {
            l->seq = i.rcv_nxt;
            l->una = i.snd_una;
            l->nxt = i.snd_nxt;
            l->state = i.state;
        }
    }
}

static bypass_sock established(struct fuzz_world *w, struct lane *l, bypass_sock listener, uint32_t window)
{
    l->seq = PEER_ISS;
    say(w, l, FZ_SYN, 65535, 0, 0);
    learn(w, l);
    say(w, l, FZ_ACK, window, 0, 0);
    bypass_sock c = bypass_accept(&w->s, listener);
    CHECK(c >= 0, "accept: %lld", (long long)c);
    return c;
}

/* A connection for each state that matters; lane 0 is the plain one, lane LANES the active open. */
static void enter_state(struct fuzz_world *w, int n, bypass_sock listener)
{
    static uint8_t data[6000];
    struct lane *l = &lanes[n];
    *l = (struct lane){.sport = (uint16_t)(FIRST_PORT + n), .dport = PORT, .seq = PEER_ISS};
    if (n == 8) { /* SYN-RECEIVED */
        say(w, l, FZ_SYN, 65535, 0, 0);
        learn(w, l);
        return;
    }
    bypass_sock c = established(w, l, listener, n == 6 ? 0 : 65535);
    if (n == 1 || n == 2 || n == 6) /* data in flight; the same, then in recovery; a closed window */
        (void)bypass_send(&w->s, c, data, sizeof data, 0);
    if (n == 7) /* data out of order */
        say(w, l, FZ_ACK, 65535, 500, 1000);
    if (n == 4 || n == 5) /* CLOSE-WAIT, LAST-ACK */
        say(w, l, FZ_ACK | FZ_FIN, 65535, 0, 0);
    if (n == 3 || n == 5 || n == 9) /* FIN-WAIT, LAST-ACK, TIME-WAIT */
        (void)bypass_shutdown(&w->s, c, BYPASS_SHUT_WR);
    (void)bypass_flush(&w->s);
    learn(w, l);
    if (n == 2) {
        l->nxt = l->una;
        for (int i = 0; i < 4; i++)
            say(w, l, FZ_ACK, 65535, 0, 0);
    }
    if (n == 9)
        say(w, l, FZ_ACK | FZ_FIN, 65535, 0, 0);
    learn(w, l);
}

static void set_up(struct fuzz_world *w, bypass_sock udp[2])
{
    struct bypass_endpoint any = fuzz_endpoint((uint8_t[4]){0}, PORT), server = fuzz_endpoint(fuzz_peer, 80);
    fuzz_open(w, BYPASS_F_ARP | BYPASS_F_PING | BYPASS_F_RST, 16, 65536, 65536);
    bypass_sock listener = bypass_socket(&w->s, BYPASS_STREAM);
    (void)bypass_bind(&w->s, listener, &any);
    (void)bypass_listen(&w->s, listener, 4);
    for (int n = 0; n < LANES; n++)
        enter_state(w, n, listener);
    bypass_sock c = bypass_socket(&w->s, BYPASS_STREAM);
    any.port = FIRST_PORT - 1;
    (void)bypass_bind(&w->s, c, &any);
    (void)bypass_connect(&w->s, c, &server); /* SYN-SENT */
    (void)bypass_flush(&w->s);
    lanes[LANES] = (struct lane){.sport = 80, .dport = any.port, .seq = PEER_ISS};
    learn(w, &lanes[LANES]);
    lanes[LANES].seq = PEER_ISS;
    static const uint32_t states[LANES + 1] = {BYPASS_ESTABLISHED, BYPASS_ESTABLISHED, BYPASS_ESTABLISHED,
                                               BYPASS_FIN_WAIT_1,  BYPASS_CLOSE_WAIT,  BYPASS_LAST_ACK,
                                               BYPASS_ESTABLISHED, BYPASS_ESTABLISHED, BYPASS_SYN_RECEIVED,
                                               BYPASS_TIME_WAIT,   BYPASS_SYN_SENT};
    for (int i = 0; i <= LANES; i++)
        CHECK(lanes[i].state == states[i], "connection %d is in state %u", i, lanes[i].state);
    for (int i = 0; i < 2; i++) {
        any.port = (uint16_t)(7 + i);
        udp[i] = bypass_socket(&w->s, BYPASS_DGRAM);
        (void)bypass_bind(&w->s, udp[i], &any);
    }
    memdev_forget_sent(&w->m);
}

/* ---- One input ------------------------------------------------------------------------------------------------------- */

static void programs(struct fuzz_world *w, const bypass_sock udp[2])
{
    static uint8_t buf[3000];
    struct bypass_event ev[8];
    struct bypass_endpoint from;
    for (int n = bypass_events(&w->s, ev, 8), i = 0; i < n; i++) {
        (void)bypass_recv(&w->s, ev[i].sock, buf, sizeof buf, 0);
        (void)bypass_send(&w->s, ev[i].sock, buf, 700, 0);
        (void)bypass_accept(&w->s, ev[i].sock);
    }
    for (int i = 0; i < 2; i++)
        (void)bypass_recvfrom(&w->s, udp[i], buf, sizeof buf, 0, &from);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t waits_ms[8] = {1, 41, 210, 1100, 3000, 61000, 200000, 900000};
    struct fuzz_world w;
    struct input in = {data, data + size};
    bypass_sock udp[2];
    set_up(&w, udp);
    for (int i = 0; i < MAX_RECORDS && in.p < in.end; i++) {
        uint8_t control = in_u8(&in);
        uint32_t n = in_u16(&in), left = (uint32_t)(in.end - in.p);
        n = n < left ? n : left;
        if (n <= MOST)
            (void)memdev_inject_queue(&w.m, in.p, n, control & 1, control & 2 ? BYPASS_RX_CSUM_OK : 0);
        in.p += n;
        if (control & 64)
            continue; /* the next one comes in the same batch */
        if (control & 8)
            w.now += waits_ms[control >> 3 & 7] * 1000000ull;
        fuzz_poll(&w);
        if (control & 4)
            programs(&w, udp);
        memdev_forget_sent(&w.m);
    }
    fuzz_poll(&w);
    fuzz_close(&w);
    return 0;
}

/* ---- The mutator ----------------------------------------------------------------------------------------------------- */

struct record {
    uint32_t at, len; /* of the whole record: three bytes and the frame */
};

static uint32_t find_records(const uint8_t *data, size_t size, struct record r[MAX_RECORDS])
{
    uint32_t n = 0;
    for (uint32_t at = 0; at + 3 <= size && n < MAX_RECORDS; n++) {
        uint32_t len = 3 + get16(data + at + 1);
        if (len > size - at)
            len = (uint32_t)size - at;
        r[n] = (struct record){at, len};
        at += len;
    }
    return n;
}

static uint32_t state;
static uint32_t rnd(uint32_t n)
{
    state = state * 1664525u + 1013904223u;
    return n ? (state >> 8) % n : 0;
}

static uint32_t near_edge(void)
{
    static const int32_t edges[] = {0, 0, 0, 1, -1, 2, 500, 1000, 1460, -1460, 65535, 65536, 65537, 1 << 20, INT32_MIN};
    return (uint32_t)edges[rnd(15)];
}

/* Makes a TCP segment of this frame (or what is there of one) that the connection `l` may have to look at. */
static void aim(uint8_t *tcp, const struct lane *l)
{
    static const uint8_t flags[] = {16, 16, 16, 24, 17, 4, 20, 2, 18, 1, 0, 41, 0xd0, 0xc2};
    put16(tcp, l->sport);
    put16(tcp + 2, l->dport);
    put32(tcp + 4, l->seq + near_edge());
    put32(tcp + 8, (rnd(2) ? l->una : l->nxt) + near_edge());
    tcp[13] = flags[rnd(sizeof flags)];
    if (rnd(3) == 0)
        put16(tcp + 14, rnd(2) ? rnd(4) * 536 : rnd(65536));
}

static uint32_t options(uint8_t *o, const struct lane *l)
{
    uint32_t n = rnd(2) ? 12 : 12 + 8 * (1 + rnd(3)), from = l->una;
    memcpy(o, (uint8_t[4]){1, 1, 8, 10}, 4);
    put32(o + 4, 5 + near_edge());
    put32(o + 8, near_edge());
    if (n > 12) {
        memcpy(o + 12, (uint8_t[2]){5, (uint8_t)(n - 12 + 2)}, 2);
        n += 2;
        for (uint32_t at = 14; at + 8 <= n; at += 8) {
            put32(o + at, from += rnd(3000));
            put32(o + at + 4, from += 1 + rnd(3000));
        }
    }
    return n;
}

/* A new record at `out`; returns its length. */
static uint32_t fresh(uint8_t *out)
{
    const struct lane *l = &lanes[rnd(LANES + 1)];
    uint8_t opts[40];
    struct fuzz_tcp t = {.flags = FZ_ACK, .window = 65535, .len = rnd(2) ? rnd(1400) : 0, .opts = opts};
    t.opt_len = rnd(2) ? options(opts, l) : 0;
    uint32_t n = fuzz_tcp_frame(out + 3, &t);
    aim(out + 3 + FZ_ETH + FZ_IP, l);
    fuzz_fix(out + 3, n);
    out[0] = (uint8_t)rnd(256);
    put16(out + 1, n);
    return n + 3;
}

static size_t splice(uint8_t *data, size_t size, size_t max, uint32_t at, const uint8_t *bytes, uint32_t n)
{
    if (size + n > max)
        return size;
    memmove(data + at + n, data + at, size - at);
    memcpy(data + at, bytes, n);
    return size + n;
}

/* Changes one frame, whose length stays. */
static void bend(uint8_t *f, uint32_t n)
{
    if (n >= FZ_ETH + FZ_IP + FZ_TCP && f[FZ_ETH] == 0x45 && f[FZ_ETH + 9] == FZ_TCP_PROTO && rnd(2))
        aim(f + FZ_ETH + FZ_IP, &lanes[rnd(LANES + 1)]);
    else if (n > 0)
        (void)LLVMFuzzerMutate(f, n, n);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed)
{
    static uint8_t scratch[MOST + 3];
    struct record r[MAX_RECORDS];
    state = seed;
    if (lanes[0].nxt == 0) { /* the numbers to aim at */
        struct fuzz_world w;
        bypass_sock udp[2];
        set_up(&w, udp);
        fuzz_close(&w);
    }
    uint32_t n = find_records(data, size, r), which = rnd(n ? n : 1), what = rnd(8);
    if (n == 0 || what < 2)
        return splice(data, size, max, n ? r[which].at : 0, scratch, fresh(scratch));
    if (what == 2 && r[which].len <= sizeof scratch) { /* the same once more, elsewhere */
        memcpy(scratch, data + r[which].at, r[which].len);
        return splice(data, size, max, r[rnd(n)].at, scratch, r[which].len);
    }
    if (what == 3 && n > 1) {
        memmove(data + r[which].at, data + r[which].at + r[which].len, size - r[which].at - r[which].len);
        return size - r[which].len;
    }
    if (what == 4)
        return LLVMFuzzerMutate(data, size, max);
    if (r[which].len > 3)
        bend(data + r[which].at + 3, r[which].len - 3);
    if (rnd(4) == 0)
        data[r[which].at] = (uint8_t)rnd(256);
    if (rnd(8) != 0)
        fuzz_fix(data + r[which].at + 3, r[which].len - 3);
    return size;
}
