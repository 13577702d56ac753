/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_ops - a story: socket calls, segments near a connection's numbers, time, a device in trouble, in any order.
 *
 * An input is eight bytes of set-up and records of eight bytes: what happens, to which connection, and six arguments. The
 * harness plays the peer of up to four connections at once (lanes), and holds the stack to this:
 *  - what the program reads is a beginning of the peer's stream, what leaves is the program's, byte for byte; the bytes of
 *    both streams are known by their place. Only bytes that the peer called urgent may be missing, and come by themselves;
 *  - acknowledgments never go back nor beyond what the peer sent, the right edge of the offered window never goes left,
 *    nothing is sent beyond the largest window that the peer offered;
 *  - a segment draws at most ANSWERS segments without data;
 *  - at the end everything that no program owns ends by itself, and nothing is left.
 */
#include "fuzz.h"
#include "fuzz_lend.h"

enum { RECORD = 8, MOST_RECORDS = 300, LANES = 4, PORT = 80, FIRST_PORT = 2000, PEER_ISS = 0xfffff000, ANSWERS = 2 };
enum { MSS = 1460, OUR_BYTES = 1 << 20, URGENT = 8 };

struct lane {
    bypass_sock sock; /* -1: none */
    uint16_t sport, dport;
    bool offered;      /* edge_in is known */
    bool live, ts;     /* numbers are known and held to; timestamps in what the peer sends */
    uint32_t iss;      /* ours, once seen */
    uint32_t claimed;  /* one behind the last sequence number that the peer used */
    uint32_t acked;    /* largest acknowledgment seen */
    uint32_t edge_out; /* right edge that the stack offered */
    uint32_t edge_in;  /* right edge that the peer offered */
    uint32_t una;      /* the stack's own, from the last look */
    uint32_t ts_last;  /* the stack's last timestamp */
    uint32_t wrote, read;
    uint32_t urgent[URGENT]; /* places of bytes in the peer's stream that it called urgent */
    uint32_t urgent_n;
    bool fin;
    bool
        blind; /* bytes were thrown away unseen, urgent ones perhaps among them: where the next one is from is not known */
};

struct story {
    struct fuzz_world w;
    struct lane lanes[LANES];
    bypass_sock listener;
    struct fuzz_lent lent;
    uint16_t next_port;
    bool slow;         /* the device may hold segments back */
    uint32_t in, bare; /* segments to the stack since it was polled last, and those without data that it answered */
};

static int32_t diff(uint32_t a, uint32_t b) { return (int32_t)(a - b); } /* RFC 9293 3.4 */

static uint8_t our_byte(uint32_t at) { return (uint8_t)(at * 31 + (at >> 8) * 17 + (at >> 16)); }
static uint8_t peer_byte(uint32_t at) { return (uint8_t)(at * 29 + (at >> 8) * 11 + 3); }

/* ---- What leaves the stack ------------------------------------------------------------------------------------------- */

struct seen {
    uint32_t seq, ack, flags, window, len;
    const uint8_t *data, *opts;
    uint32_t opt_len, urg;
};

static bool find_option(const struct seen *g, uint8_t kind, uint32_t len, const uint8_t **value)
{
    for (uint32_t i = 0; i < g->opt_len && g->opts[i] != 0; i += g->opts[i] == 1 ? 1 : g->opts[i + 1]) {
        if (g->opts[i] == 1)
            continue;
        CHECK(i + 1 < g->opt_len && g->opts[i + 1] >= 2 && i + g->opts[i + 1] <= g->opt_len, "option %u", g->opts[i]);
        if (g->opts[i] == kind && g->opts[i + 1] == len) {
            *value = g->opts + i + 2;
            return true;
        }
    }
    return false;
}

static void check_sack(const struct lane *l, const struct seen *g)
{
    const uint8_t *v;
    for (uint32_t n = 1; n <= 4; n++) {
        if (!find_option(g, 5, 2 + 8 * n, &v))
            continue;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t from = get32(v + 8 * i), to = get32(v + 8 * i + 4);
            CHECK(diff(to, from) > 0, "an empty SACK block");
            CHECK(diff(to, g->ack) <= 0 || diff(l->claimed, to) >= 0,
                  "a SACK block beyond what was sent"); /* RFC 2883 */
        }
    }
}

static void check_data(struct lane *l, const struct seen *g)
{
    for (uint32_t i = 0; i < g->len; i++) {
        uint32_t at = g->seq - l->iss - 1 + i;
        CHECK(at < l->wrote, "byte %u of %u written", at, l->wrote);
        CHECK(g->data[i] == our_byte(at), "byte %u", at);
    }
    if (g->flags & FZ_URG)
        CHECK(diff(l->iss + 1 + l->wrote, g->seq + g->urg) >= 0, "urgent beyond what was written");
    if (g->len)
        CHECK(diff(l->edge_in, g->seq + g->len) >= 0, "sent %d beyond the window", diff(g->seq + g->len, l->edge_in));
}

static void syn_seen(struct lane *l, const struct seen *g)
{
    if ((l->iss != 0 && l->iss != g->seq) || (g->flags & FZ_ACK && g->ack != PEER_ISS + 1))
        l->live = false; /* a SYN of the peer's began another connection in this one's place, or with another number */
    l->iss = g->seq;
}

static bool numbers(struct story *s, const struct lane *l, struct bypass_tcp_info *i)
{
    uint32_t cursor = 0;
    while (bypass_conn_next(&s->w.s, &cursor, i) == 1)
        if (i->peer.port == l->sport && i->local.port == l->dport)
            return true;
    return false;
}

static bool is_slow(const struct story *s)
{
    return s->w.m.tx_limit != UINT32_MAX || s->w.m.hold_tx || s->w.m.kick_result;
}

/* RFC 7323 2.4: the window may seem to shrink by what the shift cuts off. */
static void check_window(struct story *s, struct lane *l, const struct seen *g)
{
    struct bypass_tcp_info i;
    if (is_slow(s) || s->slow || !numbers(s, l, &i) || i.state == BYPASS_SYN_RECEIVED)
        return; /* whether windows were scaled when it was made is not known: another one may be in its place */
    uint32_t shift = i.flags & 2 && !(g->flags & FZ_SYN) ? i.rcv_wscale : 0, edge = g->ack + (g->window << shift);
    CHECK(diff(edge, l->edge_out) >= -(1 << shift) + 1, "the window shrinks by %d (shift %u)", diff(l->edge_out, edge),
          shift);
    l->edge_out = diff(edge, l->edge_out) > 0 ? edge : l->edge_out;
}

static void segment_seen(struct story *s, struct lane *l, const struct seen *g)
{
    const uint8_t *v;
    if (find_option(g, 8, 10, &v))
        l->ts_last = get32(v);
    if (g->flags & FZ_SYN)
        syn_seen(l, g);
    s->bare += g->len == 0 && !(g->flags & FZ_FIN);
    if (!l->live || g->flags & FZ_RST)
        return;
    if (g->flags & FZ_ACK) {
        CHECK(diff(l->claimed, g->ack) >= 0, "acknowledges %d more than was sent", diff(g->ack, l->claimed));
        CHECK(diff(g->ack, l->acked) >= 0, "an acknowledgment goes back by %d", diff(l->acked, g->ack));
        check_window(s, l, g);
        l->acked = g->ack;
        check_sack(l, g);
    }
    check_data(l, g);
}

static void frame_seen(struct story *s, const uint8_t *f, size_t n)
{
    if (n < FZ_ETH + FZ_IP || get16(f + 12) != 0x0800 || f[FZ_ETH + 9] != FZ_TCP_PROTO)
        return;
    const uint8_t *ip = f + FZ_ETH, *tcp = ip + FZ_IP;
    uint32_t total = get16(ip + 2), off = (tcp[12] >> 4) * 4u;
    CHECK(ip[0] == 0x45 && fuzz_fold(fuzz_sum(ip, FZ_IP, 0)) == 0 && total + FZ_ETH == n, "a bad IPv4 header");
    CHECK(off >= FZ_TCP && FZ_IP + off <= total, "a bad data offset");
    CHECK(fuzz_l4_sum(ip, tcp, total - FZ_IP) == 0, "a bad checksum");
    struct seen g = {.seq = get32(tcp + 4), .ack = get32(tcp + 8), .flags = tcp[13], .window = get16(tcp + 14)};
    if (getenv("FUZZ_VERBOSE"))
        fprintf(stderr, "%u > %u flags %02x seq %u ack %u win %u len %u\n", get16(tcp), get16(tcp + 2), g.flags, g.seq,
                g.ack, g.window, total - FZ_IP - off);
    g.urg = get16(tcp + 18);
    g.opts = tcp + FZ_TCP;
    g.opt_len = off - FZ_TCP;
    g.data = tcp + off;
    g.len = total - FZ_IP - off;
    for (int i = 0; i < LANES; i++)
        if (s->lanes[i].sport == get16(tcp + 2) && s->lanes[i].dport == get16(tcp))
            segment_seen(s, &s->lanes[i], &g);
}

static void look(struct story *s)
{
    const uint8_t *f;
    size_t n;
    while ((f = memdev_sent(&s->w.m, &n)) != NULL)
        frame_seen(s, f, n);
}

static void poll(struct story *s)
{
    s->bare = 0;
    fuzz_poll(&s->w);
    look(s);
    bool slow = is_slow(s);
    CHECK(s->in == 0 || slow || s->slow || s->bare <= ANSWERS * s->in + LANES, "%u answers without data to %u segments",
          s->bare, s->in);
    s->in = 0; /* (a timer of each lane may have been due as well) */
    s->slow = slow;
}

/* ---- What the peer says ------------------------------------------------------------------------------------------------ */

static int32_t distance(uint8_t b)
{
    static const int32_t edges[] = {0,         0,    0,     0,     0,     0,       0,
                                    1,         -1,   2,     -2,    MSS,   -MSS,    2 * MSS,
                                    536,       4096, -4096, 65535, 65536, 1 << 30, INT32_MIN + 99999,
                                    -(1 << 30)};
    const int n = sizeof edges / sizeof *edges;
    return b < 4 * n ? edges[b / 4] : (b - 4 * n) * 37;
}

/* Options of a segment by number: 0 to 63 none but timestamps, then SACK blocks, then bytes that lie. */
static uint32_t make_options(uint8_t *o, const struct lane *l, uint8_t kind, uint8_t arg,
                             const struct bypass_tcp_info *i, uint64_t now)
{
    uint32_t n = 0;
    if (l->ts && !(kind & 1)) {
        memcpy(o, (uint8_t[4]){1, 1, 8, 10}, 4);
        put32(o + 4, (uint32_t)(now / 1000000) + (kind & 2 ? (uint32_t)distance(arg) : 0));
        put32(o + 8, l->ts_last + (kind & 4 ? (uint32_t)distance(arg) : 0));
        n = 12;
    }
    if (kind >= 64 && kind < 192) {
        uint32_t blocks = 1 + kind / 8 % 3, from = i->snd_una + (uint32_t)distance(arg);
        memcpy(o + n, (uint8_t[4]){1, 1, 5, (uint8_t)(2 + 8 * blocks)}, 4);
        for (n += 4; blocks > 0; blocks--, n += 8) {
            put32(o + n, from);
            put32(o + n + 4, from + (kind & 32 ? MSS : (uint32_t)distance((uint8_t)(arg * 3 + kind))));
            from += 2 * MSS;
        }
    } else if (kind >= 192) {
        o[n++] = arg;
        o[n++] = kind & 15;
    }
    return n;
}

/* The right edge that this segment offers, the largest so far. */
static void offer(struct story *s, struct lane *l, const struct fuzz_tcp *t)
{
    struct bypass_tcp_info i = {0};
    bool there = numbers(s, l, &i), scaled = there && i.flags & 2 && !(t->flags & FZ_SYN);
    uint32_t from = t->flags & FZ_ACK ? t->ack : i.snd_una + 1,
             edge = from + (t->window << (scaled ? i.snd_wscale : 0));
    if (!there || !(t->flags & (FZ_ACK | FZ_SYN)) || diff(edge, i.snd_una) > 1 << 30 ||
        diff(edge, i.snd_una) < -(1 << 30))
        return; /* what is that far is never acceptable */
    if (!l->offered || diff(edge, l->edge_in) > 0)
        l->edge_in = edge;
    l->offered = true;
}

/* RFC 6093 2.1: the pointer names the byte behind the urgent one, as everybody reads it. */
static void call_urgent(struct lane *l, struct fuzz_tcp *t)
{
    if (!(t->flags & FZ_URG))
        return;
    if (l->urgent_n == URGENT)
        t->flags &= ~(uint32_t)FZ_URG;
    else
        l->urgent[l->urgent_n++] = t->seq - PEER_ISS - 1 + (t->urg ? t->urg - 1 : 0);
}

/* Our SYN is answered by a SYN with another number than the peer's bytes are counted from: whose connection is it? */
static void another_number(struct story *s, struct lane *l, const struct fuzz_tcp *t)
{
    struct bypass_tcp_info i;
    if ((t->flags & (FZ_SYN | FZ_ACK | FZ_RST)) == (FZ_SYN | FZ_ACK) && t->seq != PEER_ISS && numbers(s, l, &i) &&
        i.state == BYPASS_SYN_SENT && diff(t->ack, i.snd_una) > 0 && diff(t->ack, i.snd_nxt) <= 0)
        l->live = false;
}

static void inject(struct story *s, struct lane *l, struct fuzz_tcp *t)
{
    static uint8_t data[MSS];
    uint8_t f[1514];
    uint32_t high = t->seq + t->len + !!(t->flags & FZ_SYN) + !!(t->flags & FZ_FIN);
    if (t->len > MSS - 40)
        t->len = t->opt_len ? MSS - 40 : t->len;
    for (uint32_t i = 0; i < t->len; i++)
        data[i] = peer_byte(t->seq - PEER_ISS - 1 + i + !!(t->flags & FZ_SYN));
    call_urgent(l, t);
    another_number(s, l, t);
    t->data = data;
    t->sport = l->sport;
    t->dport = l->dport;
    if (diff(high, l->claimed) > 0 && diff(high, l->claimed) < 1 << 29) /* farther is never acceptable */
        l->claimed = high;
    offer(s, l, t);
    if (getenv("FUZZ_VERBOSE"))
        fprintf(stderr, "    %u > %u flags %02x seq %u ack %u win %u len %u opts %u\n", l->sport, l->dport, t->flags,
                t->seq, t->ack, t->window, t->len, t->opt_len);
    s->in++;
    (void)memdev_inject(&s->w.m, f, fuzz_tcp_frame(f, t));
}

/* A segment at distances from the connection: flags, seq, size, ack, window, options. */
static void op_segment(struct story *s, struct lane *l, const uint8_t *a)
{
    static const uint8_t flags[] = {16, 16, 16, 16, 16, 16, 24, 24,   17,   17,   4,
                                    20, 2,  18, 1,  0,  8,  48, 0xd0, 0x90, 0x50, 7};
    static const uint16_t sizes[] = {0, 0, 0, 1, 100, 536, MSS, MSS},
                          windows[] = {65535, 0, 1, 536, MSS, 5000, 30000, 128};
    struct bypass_tcp_info i;
    uint8_t opts[40];
    if (!numbers(s, l, &i))
        memset(&i, 0, sizeof i);
    uint32_t base = a[0] & 128 ? i.rcv_nxt + i.rcv_wnd : i.rcv_nxt;
    struct fuzz_tcp t = {.flags = flags[(a[0] & 127) % sizeof flags], .opts = opts};
    t.seq = base + (uint32_t)distance(a[1]);
    t.len = t.flags & FZ_SYN ? 0 : sizes[a[2] & 7];
    t.ack = (a[2] & 8 ? i.snd_nxt : i.snd_una) + (uint32_t)distance(a[3]);
    t.window = windows[a[2] >> 4 & 7];
    t.opt_len = make_options(opts, l, a[4], a[5], &i, s->w.now);
    t.urg = (uint16_t)distance(a[5]);
    inject(s, l, &t);
    if (a[2] & 128)
        return; /* more in the same batch */
    poll(s);
}

/* As a good peer: everything that arrived is acknowledged, in order. */
static void op_polite(struct story *s, struct lane *l, const uint8_t *a)
{
    struct bypass_tcp_info i;
    uint8_t opts[40];
    if (!numbers(s, l, &i))
        return;
    bool syn = i.state == BYPASS_SYN_SENT;
    struct fuzz_tcp t = {.flags = FZ_ACK | (syn ? FZ_SYN : a[0] & 1 ? FZ_FIN : 0), .window = 65535, .opts = opts};
    t.seq = syn ? PEER_ISS : i.rcv_nxt;
    t.ack = i.snd_nxt;
    t.len = syn ? 0 : a[1] * 8u % (MSS - 40);
    if (syn && a[2] & 1) {
        memcpy(opts, (uint8_t[8]){2, 4, 5, 0xb4, 4, 2, 1, 1}, 8);
        t.opt_len = 8;
    } else {
        t.opt_len = make_options(opts, l, 0, 0, &i, s->w.now);
    }
    inject(s, l, &t);
    poll(s);
}

/* ---- Connections begin --------------------------------------------------------------------------------------------------- */

static void lane_reset(struct story *s, struct lane *l, uint16_t sport, uint16_t dport)
{
    (void)s;
    *l = (struct lane){.sock = -1, .sport = sport, .dport = dport, .live = true, .claimed = PEER_ISS};
    l->acked = PEER_ISS;
    l->edge_out = PEER_ISS;
}

static void release(struct story *s, struct lane *l)
{
    if (l->sock >= 0)
        (void)bypass_close(&s->w.s, l->sock);
    l->sock = -1;
    poll(s);
}

static void op_peer_connects(struct story *s, struct lane *l, const uint8_t *a)
{
    static const uint8_t syn_opts[] = {2, 4, 5, 0xb4, 1, 3, 3, 0, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0};
    uint8_t opts[40], f[1514];
    release(s, l);
    lane_reset(s, l, s->next_port++, PORT);
    l->claimed = PEER_ISS + 1;
    uint32_t n = a[0] & 1 ? 4 : 0; /* MSS; then window scale, SACK permitted, timestamps */
    memcpy(opts, syn_opts, sizeof opts < sizeof syn_opts ? sizeof opts : sizeof syn_opts);
    if (a[0] & 2) {
        n = 8;
        opts[7] = a[1] % 15;
    }
    if ((a[0] & 6) == 6)
        n = 10;
    if ((a[0] & 14) == 14) {
        n = 20;
        l->ts = true;
        put32(opts + 12, (uint32_t)(s->w.now / 1000000));
    }
    struct fuzz_tcp t = {.sport = l->sport, .dport = PORT, .seq = PEER_ISS, .flags = FZ_SYN, .window = 65535};
    t.opts = opts;
    t.opt_len = n;
    t.flags |= a[0] & 16 ? 0xc0 : 0;
    (void)memdev_inject(&s->w.m, f, fuzz_tcp_frame(f, &t));
    poll(s);
    offer(s, l, &t);
    if (!(a[2] & 1)) /* else the third segment is another record's */
        op_polite(s, l, (const uint8_t[6]){0});
}

static void op_connect(struct story *s, struct lane *l, const uint8_t *a)
{
    struct bypass_endpoint local = fuzz_endpoint(fuzz_us, s->next_port), peer = fuzz_endpoint(fuzz_peer, 443);
    release(s, l);
    lane_reset(s, l, 443, s->next_port++);
    l->sock = bypass_socket(&s->w.s, BYPASS_STREAM);
    if (l->sock < 0)
        return;
    if (bypass_bind(&s->w.s, l->sock, &local) == 0)
        (void)bypass_connect(&s->w.s, l->sock, &peer);
    (void)bypass_flush(&s->w.s);
    look(s);
    if (a[0] & 1)
        op_polite(s, l, (const uint8_t[6]){0, 0, a[1]});
}

static void op_accept(struct story *s)
{
    struct bypass_endpoint peer;
    bypass_sock c = bypass_accept(&s->w.s, s->listener);
    if (c < 0)
        return;
    int err = bypass_peer(&s->w.s, c, &peer);
    for (int i = 0; i < LANES; i++) {
        struct lane *l = &s->lanes[i];
        if (err == 0 && l->sport == peer.port && l->dport == PORT && l->sock < 0) {
            l->sock = c;
            return;
        }
    }
    (void)bypass_abort(&s->w.s, c); /* of a lane that has begun anew */
}

/* ---- What programs do --------------------------------------------------------------------------------------------------- */

static void op_write(struct story *s, struct lane *l, const uint8_t *a)
{
    static uint8_t buf[65536];
    uint32_t n = (uint32_t)a[0] << (a[1] & 7);
    if (l->sock < 0 || l->wrote + n > OUR_BYTES)
        return;
    for (uint32_t i = 0; i < n; i++)
        buf[i] = our_byte(l->wrote + i);
    int64_t took = bypass_send(&s->w.s, l->sock, buf, n, (a[1] & 8 ? BYPASS_MORE : 0) | (a[1] & 16 ? BYPASS_OOB : 0));
    CHECK(took <= (int64_t)n, "took %lld of %u", (long long)took, n);
    CHECK(took <= 0 || !l->fin, "took bytes behind the end");
    l->wrote += took > 0 ? (uint32_t)took : 0;
    (void)bypass_flush(&s->w.s);
    look(s);
}

static bool is_urgent(const struct lane *l, uint32_t at)
{
    for (uint32_t i = 0; i < l->urgent_n; i++)
        if (l->urgent[i] == at)
            return true;
    return false;
}

/* Holds what was read to the peer's stream; the place behind it. */
static uint32_t check_read(const struct lane *l, const uint8_t *buf, int64_t got)
{
    uint32_t at = l->read;
    for (int64_t i = 0; i < got && l->live && !l->blind; i++, at++) {
        while (buf[i] != peer_byte(at) && is_urgent(l, at))
            at++;
        CHECK(buf[i] == peer_byte(at), "byte %u of the peer's", at);
    }
    return at;
}

static void check_urgent(const struct lane *l, uint8_t byte)
{
    for (uint32_t i = 0; i < l->urgent_n && l->live; i++)
        if (peer_byte(l->urgent[i]) == byte)
            return;
    CHECK(!l->live, "an urgent byte that nobody sent");
}

static void op_read(struct story *s, struct lane *l, const uint8_t *a)
{
    static uint8_t buf[65536];
    uint32_t n = ((uint32_t)a[0] << (a[1] & 7)) + 1;
    int flags = (a[1] & 8 ? BYPASS_PEEK : 0) | (a[1] & 16 ? BYPASS_OOB : 0) | (a[1] & 32 ? BYPASS_TRUNC : 0);
    if (l->sock < 0)
        return;
    int64_t got = bypass_recv(&s->w.s, l->sock, buf, n, flags);
    CHECK(got <= (int64_t)n, "got %lld of %u", (long long)got, n);
    if (flags & BYPASS_TRUNC) {
        l->blind |= got > 0 && l->urgent_n > 0;
        l->read += got > 0 && flags == BYPASS_TRUNC ? (uint32_t)got : 0;
    } else if (flags & BYPASS_OOB) {
        CHECK(got <= 1, "%lld urgent bytes", (long long)got);
        if (got == 1)
            check_urgent(l, buf[0]);
    } else {
        uint32_t at = check_read(l, buf, got);
        l->read = flags & BYPASS_PEEK ? l->read : at;
    }
    (void)bypass_at_mark(&s->w.s, l->sock);
    (void)bypass_flush(&s->w.s);
    look(s);
}

static void op_lend(struct story *s, struct lane *l, const uint8_t *a)
{
    struct bypass_buf bufs[4];
    if (a[1] & 128)
        fuzz_lent_mistake(&s->w.s, &s->lent, a + 2);
    if (a[1] & 64 && s->lent.n > 0)
        fuzz_lent_release(&s->w.s, &s->lent, a[2] % s->lent.n);
    if (l->sock < 0)
        return;
    int n = bypass_recv_zc(&s->w.s, l->sock, bufs, (a[0] & 3) + 1);
    CHECK(n <= (a[0] & 3) + 1, "%d pieces", n);
    for (int i = 0; i < n; i++) {
        l->read = check_read(l, bufs[i].data, bufs[i].len);
        fuzz_lent_keep(&s->w.s, &s->lent, &bufs[i]);
    }
    (void)bypass_flush(&s->w.s);
    look(s);
}

static void op_hand_over(struct story *s, struct lane *l, const uint8_t *a)
{
    struct bypass_buf bufs[4];
    uint32_t at = l->wrote, lens[4];
    int n = l->sock < 0 ? 0 : bypass_buf_alloc(&s->w.s, l->sock, bufs, (a[0] & 3) + 1);
    for (int i = 0; i < n; i++) {
        lens[i] = bufs[i].len = 1 + (a[1 + i % 3] * bufs[i].cap >> 8);
        for (uint32_t k = 0; k < lens[i]; k++)
            bufs[i].data[k] = our_byte(at++);
    }
    if (n <= 0 || at > OUR_BYTES)
        n = n > 0 ? -n : 0; /* all go back */
    int took =
        n > 0 ? bypass_send_zc(&s->w.s, l->sock, bufs, n, (a[4] & 8 ? BYPASS_MORE : 0) | (a[4] & 16 ? 8 : 0)) : 0;
    CHECK(took <= 0 || !l->fin, "took buffers behind the end");
    for (int i = 0; i < (n < 0 ? -n : n); i++) {
        if (i < took)
            l->wrote += lens[i];
        else
            CHECK(bypass_release(&s->w.s, &bufs[i].token, 1) == 0, "what was not taken is the program's");
    }
    (void)bypass_flush(&s->w.s);
    look(s);
}

static void op_end(struct story *s, struct lane *l, uint8_t how)
{
    if (l->sock < 0)
        return;
    if (how & 2) {
        (void)(how & 1 ? bypass_abort : bypass_close)(&s->w.s, l->sock);
        l->sock = -1;
    } else if (bypass_shutdown(&s->w.s, l->sock, how & 4 ? BYPASS_SHUT_RD : BYPASS_SHUT_WR) == 0) {
        l->fin |= !(how & 4);
    }
    (void)bypass_flush(&s->w.s);
    look(s);
}

static void op_option(struct story *s, struct lane *l, const uint8_t *a)
{
    static const int64_t values[] = {0, 1, 4096, 20000, 1 << 20, -1, 2, 536};
    static const char *ccs[] = {"reno", "cubic", "dctcp", "bbr", "none"};
    bypass_sock sock = a[0] & 128 ? s->listener : l->sock;
    if (sock < 0)
        return;
    if (a[0] & 64)
        (void)bypass_cc_set(&s->w.s, sock, ccs[a[2] % 5]);
    if (sock == s->listener && (a[0] & 63) == BYPASS_SO_RCVBUF)
        return; /* a SYN that was answered before it has been promised another window, which nothing remembers */
    (void)bypass_setopt(&s->w.s, sock, a[0] & 63, values[a[1] & 7] + a[2]);
    (void)bypass_getopt(&s->w.s, sock, a[0] & 63);
    (void)bypass_flush(&s->w.s);
    look(s);
}

static void op_time(struct story *s, const uint8_t *a)
{
    static const uint32_t ms[] = {0, 1, 10, 41, 210, 1000, 3000, 20000, 61000, 300000, 7200000};
    uint64_t until = s->w.now + ms[a[0] % 11] * 1000000ull, due;
    for (int i = 0; i < 50 && (due = bypass_deadline(&s->w.s)) <= until && a[1] & 1; i++) {
        s->w.now = due > s->w.now ? due : s->w.now;
        poll(s);
    }
    s->w.now = until;
    poll(s);
}

static void op_icmp(struct story *s, struct lane *l, const uint8_t *a)
{
    uint8_t f[128];
    struct bypass_tcp_info i;
    uint8_t *p = fuzz_ip_head(f, FZ_ICMP_PROTO, 8 + 28);
    if (!numbers(s, l, &i))
        return;
    memset(p, 0, 36);
    p[0] = a[0] & 1 ? 3 : 11;
    p[1] = a[0] & 2 ? 4 : a[0] >> 4;
    put16(p + 6, (uint32_t)a[1] * 8);
    memcpy(p + 8, f + FZ_ETH, FZ_IP); /* the packet that it is about went the other way */
    memcpy(p + 8 + 12, fuzz_us, 4);
    memcpy(p + 8 + 16, fuzz_peer, 4);
    p[8 + 9] = FZ_TCP_PROTO;
    put16(p + 28, l->dport);
    put16(p + 30, l->sport);
    put32(p + 32, i.snd_una + (uint32_t)distance(a[2]));
    fuzz_fix(f, FZ_ETH + FZ_IP + 36);
    (void)memdev_inject(&s->w.m, f, FZ_ETH + FZ_IP + 36);
    poll(s);
}

static void device(struct story *s, const uint8_t *a)
{
    s->w.m.tx_limit = a[0] & 1 ? a[1] % 4 : UINT32_MAX;
    s->w.m.hold_tx = a[0] >> 1 & 1;
    s->w.m.kick_result = a[0] & 4 ? -EAGAIN : 0;
}

/* ---- A story ----------------------------------------------------------------------------------------------------------- */

static void check_lane(struct lane *l, const struct bypass_tcp_info *i)
{
    CHECK(diff(i->snd_nxt, i->snd_una) >= 0, "snd_una is beyond snd_nxt");
    CHECK(!l->una || diff(i->snd_una, l->una) >= 0, "snd_una goes back");
    CHECK(diff(l->claimed, i->rcv_nxt) >= 0, "rcv_nxt is beyond what was sent");
    l->una = i->snd_una;
}

static void check_numbers(struct story *s)
{
    struct bypass_tcp_info i;
    for (int n = 0; n < LANES; n++) {
        struct lane *l = &s->lanes[n];
        if (!numbers(s, l, &i))
            l->una = 0; /* the next connection of these ports has numbers of its own */
        else if (l->live && l->iss && i.state != BYPASS_SYN_SENT)
            check_lane(l, &i);
    }
}

static void step(struct story *s, const uint8_t *r)
{
    struct lane *l = &s->lanes[r[0] >> 6];
    const uint8_t *a = r + 1;
    switch (r[0] & 31) {
    case 0:
        op_peer_connects(s, l, a);
        break;
    case 1:
        op_connect(s, l, a);
        break;
    case 2:
    case 3:
        op_accept(s);
        break;
    case 4:
    case 5:
    case 6:
        op_write(s, l, a);
        break;
    case 7:
    case 8:
        op_read(s, l, a);
        break;
    case 9:
        op_end(s, l, a[0]);
        break;
    case 10:
        op_option(s, l, a);
        break;
    case 11:
    case 12:
        op_time(s, a);
        break;
    case 13:
        op_icmp(s, l, a);
        break;
    case 14:
        device(s, a);
        break;
    case 15:
    case 16:
    case 17:
        op_polite(s, l, a);
        break;
    case 18:
        op_lend(s, l, a);
        break;
    case 19:
        op_hand_over(s, l, a);
        break;
    default:
        op_segment(s, l, a);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t buffers[] = {4096, 20000, 65536, 1 << 20};
    static struct story s;
    struct bypass_endpoint local = fuzz_endpoint((uint8_t[4]){0}, PORT);
    if (size < RECORD)
        return 0;
    s = (struct story){.next_port = FIRST_PORT};
    fuzz_open(&s.w, BYPASS_F_RST | BYPASS_F_PING, 6, buffers[data[0] & 3], buffers[data[0] >> 2 & 3]);
    s.listener = bypass_socket(&s.w.s, BYPASS_STREAM);
    (void)bypass_bind(&s.w.s, s.listener, &local);
    (void)bypass_listen(&s.w.s, s.listener, 2);
    for (int i = 0; i < LANES; i++)
        lane_reset(&s, &s.lanes[i], s.next_port++, PORT);
    for (size_t at = RECORD, n = 0; at + RECORD <= size && n < MOST_RECORDS; at += RECORD, n++) {
        step(&s, data + at);
        check_numbers(&s);
    }
    device(&s, (const uint8_t[2]){0});
    op_accept(&s);
    op_accept(&s);
    op_accept(&s);
    for (int i = 0; i < LANES; i++)
        release(&s, &s.lanes[i]);
    (void)bypass_close(&s.w.s, s.listener);
    fuzz_lent_end(&s.w.s, &s.lent);
    fuzz_run_out(&s.w);
    fuzz_close(&s.w);
    return 0;
}

/* Records stay whole: inserted, repeated, moved, dropped, or one byte of one changed. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed)
{
    uint32_t n = (uint32_t)(size / RECORD), state = seed * 2654435761u + 1, which, other;
#define RND(k) ((state = state * 1664525u + 1013904223u) >> 8) % (k)
    if (n < 2 || RND(8) == 0)
        return LLVMFuzzerMutate(data, size, max);
    which = 1 + RND(n - 1);
    other = 1 + RND(n - 1);
    uint8_t *r = data + which * RECORD, one[RECORD];
    memcpy(one, data + other * RECORD, RECORD);
    switch (RND(6)) {
    case 0: /* a new one, or an old one again */
    case 1:
        if (size + RECORD > max)
            break;
        memmove(r + RECORD, r, size - which * RECORD);
        if (RND(2))
            memcpy(r, one, RECORD);
        else
            for (int i = 0; i < RECORD; i++)
                r[i] = (uint8_t)(i > 1 && RND(2) ? 0 : RND(256));
        return size + RECORD;
    case 2:
        memmove(r, r + RECORD, size - (which + 1) * RECORD);
        return size - RECORD;
    case 3:
        memcpy(data + other * RECORD, r, RECORD);
        memcpy(r, one, RECORD);
        break;
    default:
        which = RND(RECORD);
        r[which] = (uint8_t)RND(256);
    }
#undef RND
    return size;
}
