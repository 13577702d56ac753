/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_fwd - a hostile application's memory under bypass-fwd: words and slots at will, frames that are nearly right, and
 * rounds between. Whatever leaves is judged here once more, from its bytes alone: the interface's address, IPv4 of this
 * host, a leased port or the rest of a datagram that began with one, an error about a packet to a leased port. Another
 * application, which behaves, gets exactly what is for it, and its frames are all there in the end.
 */
#include "fuzz.h"

#include "fwd/forward.h"
#include "fwd/layout.h"

enum {
    FRAMES = 64,
    RING = 16,
    HOSTILE = 1,
    DECENT = 2,
    PORT_A = 5000, /* UDP and TCP, leased to the hostile one; a block from BLOCK on */
    BLOCK = 0x8100,
    PORT_B = 6000,
    ENTRY_A = 7,
    ENTRY_B = 8,
    ETH = 14,
    IP = 20,
    DATAGRAMS = 256,
};

static const uint8_t host[4] = {192, 0, 2, 10}, remote[4] = {198, 51, 100, 7}, mac[6] = {2, 0, 0, 0, 0, 1};

struct world {
    struct memdev dev;
    struct forwarder *f;
    struct port port[3];
    void *mem[3];
    size_t size;
    uint64_t now;
    uint32_t delivered, received; /* to and by the decent one */
    uint16_t begun[DATAGRAMS];    /* identifications of first fragments that left */
    uint32_t begun_n;
};

#ifdef FUZZ_PASS /* linked with --wrap: what is refused for that reason leaves, and the harness has to notice */
enum fwd_refusal __real_check_send(const struct checker *c, struct sender *s, const uint8_t *frame,
                                   const struct bypass_pkt_meta *m, uint64_t now_ns);
enum fwd_refusal __wrap_check_send(const struct checker *c, struct sender *s, const uint8_t *frame,
                                   const struct bypass_pkt_meta *m, uint64_t now_ns);
enum fwd_refusal __wrap_check_send(const struct checker *c, struct sender *s, const uint8_t *frame,
                                   const struct bypass_pkt_meta *m, uint64_t now_ns)
{
    enum fwd_refusal why = __real_check_send(c, s, frame, m, now_ns);

    return why == FUZZ_PASS ? FWD_OK : why;
}
#endif

/* ---- What may leave ---------------------------------------------------------------------------------------- */

static uint32_t be16(const uint8_t *p) { return (uint32_t)(p[0] << 8 | p[1]); }

static bool leased(uint32_t port) { return port == PORT_A || (port >= BLOCK && port < BLOCK + 256); }

static void judge_icmp(const uint8_t *ip, uint32_t len)
{
    const uint8_t *icmp = ip + IP, *quote = icmp + 8;
    uint32_t hlen = (quote[0] & 15u) * 4;

    CHECK(len >= IP + 8 + 28 && (icmp[0] == 3 || icmp[0] == 11), "ICMP type %u, %u bytes", icmp[0], len);
    CHECK(len >= IP + 8 + hlen + 4 && (quote[9] == 6 || quote[9] == 17), "a quote of protocol %u", quote[9]);
    CHECK(memcmp(quote + 16, host, 4) == 0 && leased(be16(quote + hlen + 2)), "an error about port %u",
          be16(quote + hlen + 2));
    CHECK(memcmp(quote + 12, ip + 16, 4) == 0, "an error to somebody else");
}

static void judge(struct world *w, const uint8_t *frame, uint32_t len)
{
    const uint8_t *ip = frame + ETH;
    uint32_t frag;

    CHECK(len >= ETH + IP && len <= 1514, "%u bytes", len);
    CHECK(!(frame[0] & 1) && memcmp(frame + 6, mac, 6) == 0 && be16(frame + 12) == 0x0800, "Ethernet");
    CHECK(ip[0] == 0x45 && be16(ip + 2) == len - ETH, "IPv4 header %02x, %u bytes", ip[0], be16(ip + 2));
    CHECK(memcmp(ip + 12, host, 4) == 0, "from %u.%u.%u.%u", ip[12], ip[13], ip[14], ip[15]);
    CHECK(ip[16] != 0 && ip[16] != 127 && ip[16] < 224 && memcmp(ip + 16, "\xc0\0\2\xff", 4) != 0, "to %u...", ip[16]);
    frag = be16(ip + 6) & 0x3fff;
    if (ip[9] == 1) {
        CHECK(frag == 0, "a fragment of ICMP");
        judge_icmp(ip, len - ETH);
        return;
    }
    CHECK(ip[9] == 17 || (ip[9] == 6 && frag == 0), "protocol %u, fragment %x", ip[9], frag);
    if (frag & 0x1fff) {
        bool known = false;

        for (uint32_t i = 0; i < w->begun_n && i < DATAGRAMS; i++) {
            known |= w->begun[i] == be16(ip + 4);
        }
        CHECK(known, "fragment %x of datagram %u, which nobody began", frag, be16(ip + 4));
        return;
    }
    CHECK(len >= ETH + IP + 8 && leased(be16(ip + IP)), "from port %u", be16(ip + IP));
    if (frag) {
        w->begun[w->begun_n++ % DATAGRAMS] = (uint16_t)be16(ip + 4);
    }
}

/* ---- The world --------------------------------------------------------------------------------------------- */

static void add(struct world *w, uint32_t app)
{
    struct fwd_port_add about = {.app = app, .cfg = {.frames = FRAMES, .rx_ring = RING, .tx_ring = RING}};
    int err;

    about.cfg.mtu = 1500;
    about.cfg.queues = 2;
    about.cfg.frame_size = app == HOSTILE ? 2 * PORT_STRIDE : 0; /* larger than the device's frames */
    memcpy(about.cfg.mac, mac, 6);
    w->size = port_mem_size(&about.cfg);
    if (!w->mem[app]) {
        w->mem[app] = aligned_alloc(PORT_PAGE, w->size);
        memset(w->mem[app], 0, w->size);
        err = port_init(w->mem[app], w->size, &about.cfg);
        CHECK(err == 0 && port_attach(&w->port[app], w->mem[app], w->size, -1, -1) == 0, "port: %d", err);
    }
    err = forward_port_add(w->f, &about, w->mem[app], w->size, -1);
    CHECK(err == 0, "%d", err);
}

static void lease(struct world *w, uint32_t app, uint32_t proto, uint16_t port, uint32_t flags, int on)
{
    struct fwd_lease l = {.app = app, .proto = proto, .flags = flags, .local = {.port = port}};
    int err;

    l.local.addr.b[10] = l.local.addr.b[11] = 0xff;
    memcpy(l.local.addr.b + 12, host, 4);
    err = forward_lease(w->f, &l, on);
    CHECK(err == 0, "lease: %d", err);
}

static void hostile_leases(struct world *w, int on)
{
    lease(w, HOSTILE, 17, PORT_A, 0, on);
    lease(w, HOSTILE, 6, PORT_A, 0, on);
    lease(w, HOSTILE, 6, BLOCK, FWD_LEASE_BLOCK, on);
}

static void hostile_comes(struct world *w)
{
    add(w, HOSTILE);
    hostile_leases(w, 1);
    CHECK(forward_entry(w->f, ENTRY_A, HOSTILE) == 0, "entry");
}

static void hostile_goes(struct world *w)
{
    hostile_leases(w, 0); /* one by one: the table is large */
    CHECK(forward_port_del(w->f, HOSTILE) == 0, "no port");
}

static void open_world(struct world *w)
{
    static struct forwarder forwarder; /* its table of leases is made once, and empty after each input */
    struct fwd_local local = {.prefix_len = 24};
    struct leases leases = forwarder.check.leases;

    memset(w, 0, sizeof *w);
    w->now = 1000000000;
    w->f = &forwarder;
    if (leases.table) {
        memset(w->f, 0, sizeof *w->f);
        w->f->check.leases = leases;
    } else {
        CHECK(forward_init(w->f, 1) == 0, "memory");
    }
    memdev_open(&w->dev, 128, 2048);
    forward_device(w->f, &w->dev.dev);
    local.addr.b[10] = local.addr.b[11] = 0xff;
    memcpy(local.addr.b + 12, host, 4);
    checker_locals(&w->f->check, &local, 1);
    hostile_comes(w);
    add(w, DECENT);
    lease(w, DECENT, 17, PORT_B, 0, 1);
    CHECK(forward_entry(w->f, ENTRY_B, DECENT) == 0, "entry");
}

static void close_world(struct world *w)
{
    struct frame_audit audit;
    int err = port_audit(&w->port[DECENT], &audit);

    CHECK(err == 0 && audit.free + audit.rx == FRAMES, "of the decent one's frames %u are free, %u posted", audit.free,
          audit.rx);
    CHECK(!forward_port_find(w->f, DECENT)->peer.cut, "the decent one was cut off");
    CHECK(w->received == w->delivered, "%u of %u frames", w->received, w->delivered);
    w->dev.dev.ops->free(&w->dev.dev, w->f->pkt, (int)w->f->pending);
    memdev_close(&w->dev);
    hostile_goes(w);
    lease(w, DECENT, 17, PORT_B, 0, 0);
    CHECK(forward_port_del(w->f, DECENT) == 0 && w->f->check.leases.count == 0, "leases are left");
    free(w->mem[HOSTILE]);
    free(w->mem[DECENT]);
}

/* ---- What happens ------------------------------------------------------------------------------------------ */

static void round_of(struct world *w, uint64_t ns)
{
    const uint8_t *frame;
    size_t len;
    int n;
    bypass_pkt pkts[64];
    struct port *b = &w->port[DECENT];

    w->now += ns;
    forward_round(w->f, w->now);
    while ((frame = memdev_sent(&w->dev, &len)) != NULL) {
        judge(w, frame, (uint32_t)len);
    }
    while ((n = b->nd.ops->rx_burst(&b->nd, pkts, 64)) > 0) {
        for (int i = 0; i < n; i++) {
            const uint8_t *ip = b->nd.mem + (size_t)pkts[i] * PORT_STRIDE + PORT_HEADROOM + ETH;

            CHECK(be16(ip + IP + 2) == PORT_B, "to port %u", be16(ip + IP + 2));
        }
        w->received += (uint32_t)n;
        b->nd.ops->free(&b->nd, pkts, n);
    }
    if (forward_port_find(w->f, HOSTILE)->peer.cut) { /* once more */
        hostile_goes(w);
        hostile_comes(w);
    }
}

static void ip_put(uint8_t *ip, uint8_t proto, uint32_t len, const uint8_t *src, const uint8_t *dst, uint16_t frag)
{
    uint32_t sum = 0;

    memset(ip, 0, IP);
    ip[0] = 0x45;
    ip[2] = (uint8_t)(len >> 8);
    ip[3] = (uint8_t)len;
    ip[5] = 9;
    ip[6] = (uint8_t)(frag >> 8);
    ip[7] = (uint8_t)frag;
    ip[8] = 64;
    ip[9] = proto;
    memcpy(ip + 12, src, 4);
    memcpy(ip + 16, dst, 4);
    for (int i = 0; i < IP; i += 2) {
        sum += be16(ip + i);
    }
    sum = ~((sum & 0xffff) + (sum >> 16));
    ip[10] = (uint8_t)(sum >> 8);
    ip[11] = (uint8_t)sum;
}

static void ports_put(uint8_t *l4, uint16_t sport, uint16_t dport, uint32_t len)
{
    memset(l4, 0, 20);
    l4[0] = (uint8_t)(sport >> 8);
    l4[1] = (uint8_t)sport;
    l4[2] = (uint8_t)(dport >> 8);
    l4[3] = (uint8_t)dport;
    l4[4] = (uint8_t)(len >> 8); /* of UDP */
    l4[5] = (uint8_t)len;
    l4[12] = 0x50; /* of TCP */
}

/* A frame that is right: by kind UDP, TCP, TCP from the block, ICMP, a first and a later fragment. Its length. */
static uint32_t frame_put(uint8_t *b, uint32_t kind, uint32_t data)
{
    static const uint8_t other[6] = {2, 0, 0, 0, 0, 2};
    uint8_t *ip = b + ETH, *l4 = ip + IP;
    uint32_t len = IP + 20 + data % 1400;
    const uint16_t frags[8] = {[4] = 0x2000, [5] = 0x2000 | 10, [6] = 20};

    memcpy(b, other, 6);
    memcpy(b + 6, mac, 6);
    b[12] = 8;
    b[13] = 0;
    memset(ip, 0x11, len);
    if (kind == 3) {
        len = IP + 8 + IP + 8;
        memset(l4, 0, 8);
        l4[0] = l4[1] = 3;
        ip_put(l4 + 8, 17, 100, remote, host, 0);
        ports_put(l4 + 8 + IP, 53, PORT_A, 80);
    } else if (kind < 5) {
        ports_put(l4, kind == 2 ? BLOCK + 77 : PORT_A, 53, kind == 4 ? 3000 : len - IP);
    }
    ip_put(ip, kind == 3 ? 1 : kind == 1 || kind == 2 ? 6 : 17, len, host, remote, frags[kind]);
    return ETH + len;
}

/* The hostile one posts a frame: right, or with one or two bytes changed, and the header's sum made right or not. */
static void post_frame(struct world *w, struct input *in)
{
    struct port *a = &w->port[HOSTILE];
    uint32_t done = forward_port_find(w->f, HOSTILE)->peer.tx_done, what = in_u8(in), number = in_u8(in) % FRAMES;
    uint8_t *b = a->nd.mem + (size_t)number * a->nd.stride + PORT_HEADROOM;
    struct port_tx_slot *slot = &a->tx[done & (RING - 1)];
    uint32_t len = frame_put(b, (what & 7) % 7, in_u8(in) * 8u);

    for (uint32_t i = what >> 6; i > 0; i--) {
        uint32_t at = in_u8(in);

        b[at % len] = in_u8(in);
    }
    if (what & 32) {
        uint8_t head[IP];

        memcpy(head, b + ETH, IP);
        ip_put(head, head[9], be16(head + 2), head + 12, head + 16, (uint16_t)be16(head + 6));
        head[5] = b[ETH + 5];
        memcpy(b + ETH + 10, head + 10, 2);
    }
    *slot = (struct port_tx_slot){.frame = number, .off = PORT_HEADROOM, .len = (uint16_t)len};
    if (what & 16) {
        slot->len = (uint16_t)(slot->len + in_u8(in) - 128);
    }
    a->sh->tx_posted = done + 1;
    round_of(w, 1000);
}

static void receive(struct world *w, struct input *in)
{
    uint8_t b[2048];
    uint32_t what = in_u8(in), len = frame_put(b, 0, in_u8(in) * 8u);
    int err;

    ip_put(b + ETH, 17, len - ETH, remote, host, 0);
    ports_put(b + ETH + IP, 53, what & 1 ? PORT_B : PORT_A, len - ETH - IP);
    if (what & 4 && !(what & 1)) { /* for nobody, or for the hostile one: any bytes */
        b[in_u8(in)] = in_u8(in);
    }
    err = memdev_inject_queue(&w->dev, b, len, 0, what & 2 ? BYPASS_RX_VERDICT : 0);
    if (err == 0) {
        uint32_t at = (w->dev.rx_tail - 1) % w->dev.dev.frames;

        memdev_meta(&w->dev, w->dev.rx[at])->entry = what & 1 ? ENTRY_B : what & 8 ? in_u8(in) | 1u << 4 : ENTRY_A;
        w->delivered += what & 1;
    }
    round_of(w, 1000);
}

static void scribble(struct world *w, struct input *in)
{
    struct port *a = &w->port[HOSTILE];
    uint32_t where = in_u16(in), value = in_u16(in);
    uint32_t *words = w->mem[HOSTILE];

    switch (value & 3) {
    case 0: /* anywhere in the head and the rings */
        words[where % (port_places(&forward_port_find(w->f, HOSTILE)->peer.cfg).free_list / 4)] = value * 0x10001u;
        break;
    case 1:
        ((uint16_t *)&a->tx[where % RING])[where / RING % 8] = (uint16_t)value;
        break;
    case 2:
        a->rx[where % RING].frame = value >> 2 & 1 ? value : value % FRAMES;
        break;
    default: /* positions near what is believed */
        a->sh->tx_posted = forward_port_find(w->f, HOSTILE)->peer.tx_done + (value >> 2) % (RING + 2);
        a->sh->rx_posted = forward_port_find(w->f, HOSTILE)->peer.rx_done + where % (RING + 2);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct world w;
    struct input in = {data, data + (size < 4000 ? size : 4000)};

    open_world(&w);
    while (in.p < in.end) {
        switch (in_u8(&in) % 8) {
        case 0:
        case 1:
        case 2:
            post_frame(&w, &in);
            break;
        case 3:
            receive(&w, &in);
            break;
        case 4:
            round_of(&w, in_u8(&in) * 20000000ull);
            break;
        case 5: { /* what it allows itself changes */
            struct fwd_rate rate = {.app = HOSTILE, .bytes = in_u8(&in) * 1000u, .bytes_burst = in_u8(&in) * 100u};

            CHECK(forward_rate(w.f, &rate, w.now) == 0, "rate");
            break;
        }
        default:
            scribble(&w, &in);
        }
    }
    round_of(&w, 1000000000);
    close_world(&w);
    return 0;
}
